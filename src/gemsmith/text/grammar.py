"""Declared tools and response formats to grammars that hold a model to them while it writes.

`call_grammar` turns the JSON schemas of tools into a Lark grammar of Gemma 4's own call syntax,
from behind `<|tool_call>` to `<tool_call|>`. It writes calls in one form, that of
`tools.call_parts`: no space between the parts, keys sorted without regard to case, declared ones
before others. So a call that the model wrote and its history, written again, are the same tokens.
`response_grammar` does the same for a plain reply. What this is not: it knows no tokens but the
markers and holds no state of a reply (see engine.grammar).

A schema (schema.py) is kept to the letter: what no grammar can hold a call to is a ToolError with
its place. A tool whose function says `"strict": False` is held to the syntax alone.

What a schema leaves open is bounded where the parser or a client would fail: numbers have at most
18 digits before and after the point, values of no declared shape at most FREE_DEPTH levels. Keys
that `additionalProperties` allows may come twice; the last one counts.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from gemsmith.errors import RequestError, ToolError
from gemsmith.text import lark
from gemsmith.text.calls import CALL_OPEN, QUOTE, show
from gemsmith.text.schema import BOUNDS, LOOSE, Schema, among, implied
from gemsmith.text.tokenizer import SpecialIds
from gemsmith.text.tools import check_tool, tool_name, value_parts

ToolChoice = Literal["auto", "required", "none"] | str | Mapping[str, Any]
"""A word, a tool's name, or as OpenAI has it {"type": "function", "function": {"name": ...}}."""

FREE_DEPTH = 8
"""Nesting of a value whose schema allows anything."""
MAX_GRAMMAR_CHARACTERS = 4_000_000
MAX_UNIQUE = 64
"""Most values to choose from for an array of unique items: a bit each in the parser's state."""
SPACE = r" |\n( {0,24}|\t{0,12})"
"""Between two parts of JSON: a space, or a line's end and the next one's indentation, twelve levels
of two spaces. A model at a loss writes spaces: of forty that were let through it wrote forty."""

_KEY = re.compile(r"[^\s{}\[\](),<:\"'=][^{}\[\](),<:\n]{0,254}(?<!\s)|[^\s{}\[\](),<:\"'=]")
_INTEGER = r"/-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?([eE][-+]?[0-9]{1,2})?/"
_ANY_KEY = r"/[\p{L}\p{N}_$@][\p{L}\p{N}_.\-]{0,63}/"
_REACH = 10**15
"""Where a number with one bound ends on its open side."""
STRING = lark.without([QUOTE, CALL_OPEN])
"""What can stand between quotes and come out again as it was (see `calls.CallParser.string`)."""


# -- what is asked ----------------------------------------------------------------------------


def chosen_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice
) -> tuple[list[Mapping[str, Any]], bool]:
    """The tools that may be called, and whether one must be.

    Raises:
      ToolError: no call can hold a tool's name, the choice is unknown, or names a tool that is not
        declared, or there is none.
    """
    declared = list(tools or ())
    names = [tool_name(tool) for tool in declared]
    if choice in ("auto", "none"):
        return (declared if choice == "auto" else []), False
    if not declared:
        raise ToolError(
            f"tool_choice {show(choice)} needs a tool to call, but none is declared; give "
            "tools=[...]"
        )
    if choice == "required":
        return declared, True
    name: Any = choice
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in names:
        raise ToolError(
            f"tool_choice {show(choice)}: must be auto, required, none, or the name of a declared "
            f"tool: {', '.join(names)}"
        )
    return [declared[names.index(name)]], True


def response_grammar(response_format: Mapping[str, Any] | None) -> str | None:
    """What llguidance is to read for a format of the answer; None where any text will do.

    response_format: {"type": "text"}, {"type": "json_object"}, {"type": "json_schema",
    "json_schema": {"schema": ...}} (or "schema" beside "type"), {"type": "regex", "pattern": ...}
    (of the whole answer), or {"type": "lark", "grammar": ...} in llguidance's dialect.

    Raises:
      RequestError: a shape, schema, expression or grammar that cannot be held to, and why.
    """
    from llguidance import LLMatcher

    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    given: Any = response_format
    match kind:
        case "text":
            return None
        case "json_object":
            grammar = _json_grammar({"type": "object"})
        case "json_schema":
            inner = given.get("json_schema", given)
            schema = inner.get("schema") if isinstance(inner, Mapping) else None
            if not isinstance(schema, Mapping | bool):
                raise RequestError(
                    "response_format json_schema needs a schema, a mapping, under "
                    f"'json_schema': {{'schema': ...}}, not {show(schema)}"
                )
            grammar = _json_grammar(schema)
        case "regex":
            pattern = given.get("pattern")
            if not isinstance(pattern, str) or not 0 < len(pattern) <= lark.MAX_PATTERN:
                raise RequestError(
                    "response_format regex needs a 'pattern' of 1 to "
                    f"{lark.MAX_PATTERN} characters, not {show(pattern)}"
                )
            grammar = LLMatcher.grammar_from_regex(lark.anchored(pattern))
        case "lark":
            text = given.get("grammar")
            if not isinstance(text, str) or not 0 < len(text) <= MAX_GRAMMAR_CHARACTERS:
                raise RequestError(
                    "response_format lark needs a 'grammar', a text of at most "
                    f"{MAX_GRAMMAR_CHARACTERS} characters, not {show(text)}"
                )
            grammar = LLMatcher.grammar_from_lark(text)
        case _:
            raise RequestError(
                f"response_format {show(response_format)}: its 'type' must be text, json_object, "
                "json_schema, regex or lark"
            )
    if error := lark.complaint(grammar):
        raise RequestError(f"response_format {kind} cannot be held to: {error}")
    return grammar


def _json_grammar(schema: Mapping[str, Any] | bool) -> str:
    from llguidance import LLMatcher

    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"response_format: the schema is no JSON: {error}") from None
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"response_format: the schema has {len(text)} characters; at most "
            f"{MAX_GRAMMAR_CHARACTERS} are read"
        )
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": SPACE})


# -- calls ------------------------------------------------------------------------------------


def call_grammar(tools: Sequence[Mapping[str, Any]], special: SpecialIds) -> str:
    """A Lark grammar (llguidance's dialect) of one call of one of `tools`.

    It begins after `<|tool_call>` and ends with `<tool_call|>`. special: must have `quote` and
    `tool_call_close`.

    Raises:
      ToolError: a schema that a call cannot be held to, with the place and the way out.
    """
    assert special.quote is not None
    rules: dict[str, str] = {}
    known: dict[str, str] = {}
    calls: list[str] = []
    seen: set[str] = set()
    for tool in tools:
        compiler = _Compiler(tool, rules, known)
        if compiler.name in seen:
            raise ToolError(f"two tools are called {compiler.name!r}; give each its own name")
        seen.add(compiler.name)
        calls.append(compiler.call())
        size = sum(map(len, rules.values()))
        if size > MAX_GRAMMAR_CHARACTERS:
            raise ToolError(
                f"the schemas of the tools up to {compiler.name!r} make a grammar of {size} "
                f"characters; at most {MAX_GRAMMAR_CHARACTERS} are compiled: declare fewer or "
                "smaller tools at once"
            )
        if error := lark.stumble(_text(rules, calls[-1:], quote=256, close=257)):
            raise compiler.schema.refuse("parameters", f"the schema cannot be held to: {error}")
    return _text(rules, calls, quote=special.quote, close=special.tool_call_close)


def _text(rules: Mapping[str, str], calls: list[str], *, quote: int, close: int | None) -> str:
    start = f'start: "call:" ({" | ".join(calls)}) close\nquote: <[{quote}]>\nclose: <[{close}]>\n'
    return start + "".join(f"{name}: {body}\n" for name, body in rules.items())


class _Compiler:
    """One tool's schema to rules. Every method that gives a string gives a rule's or its name."""

    def __init__(
        self, tool: Mapping[str, Any], rules: dict[str, str], known: dict[str, str]
    ) -> None:
        """rules: by name, added to. known: names of rules by their bodies; tools share them."""
        self.rules, self.known = rules, known
        self.name, function = tool_name(tool), tool["function"]
        self.strict = function.get("strict") is not False
        if self.strict:
            try:
                check_tool(tool)
            except ToolError as error:
                raise ToolError(f"{error}; or {LOOSE}") from None
        else:
            check_tool({**tool, "function": {**function, "parameters": None}})
        self.schema = Schema(self.name, function.get("parameters") or {"type": "object"})

    def call(self) -> str:
        if not self.strict:
            return f'{lark.literal(self.name)} "{{" {self.pairs(FREE_DEPTH)} "}}"'
        ways = [
            self.object(flat, "parameters", closed=True)
            for flat in self.schema.flat(self.schema.root, "parameters")
        ]
        if not (ways := [way for way in ways if way]):
            raise self.schema.refuse("parameters", "no arguments fit this schema")
        return f"{lark.literal(self.name)} ({' | '.join(ways)})"

    def rule(self, body: str, *, terminal: bool = False) -> str:
        """The name of a rule with this body."""
        name = self.known.get(body)
        if name is None:
            name = self.known[body] = f"{'T' if terminal else 'r'}{len(self.known)}"
            self.rules[name] = body
        return name

    # Values.

    def value(self, schema: Any, path: str) -> str | None:
        """A rule of the values that fit a schema; None if none does."""
        ways = [way for flat in self.schema.flat(schema, path) for way in self.ways(flat, path)]
        return self.rule(" | ".join(dict.fromkeys(ways))) if ways else None

    def ways(self, flat: dict[str, Any], path: str) -> list[str]:
        if "enum" in flat:
            return self.literals([v for v in flat["enum"] if self.schema.fits(v, flat)], path)
        if not flat:
            return [self.anything(FREE_DEPTH)]
        kinds = flat.get("type") or implied(flat)
        ways: list[str | None] = []
        for kind in kinds:
            match kind:
                case "string":
                    ways.append(self.string(flat, path))
                case "integer" | "number":
                    if kind == "number" or "number" not in kinds:
                        ways.append(self.number(kind, flat, path))
                case "boolean":
                    ways.append('"true" | "false"')
                case "null":
                    ways.append('"null"')
                case "array":
                    ways.append(self.array(flat, path))
                case "object":
                    ways.append(self.object(flat, path))
        return [way for way in ways if way]

    def literals(self, values: list[Any], path: str) -> list[str]:
        """Rules of values that a schema lists."""
        texts: list[str] = []
        others: list[str] = []
        for value in values:
            if isinstance(value, str):
                self.check_writable(value, path)
                texts.append(value)
            elif isinstance(value, bool) or value is None or isinstance(value, list | Mapping):
                others.append(self.written(value, path))
            elif isinstance(value, int | float) and math.isfinite(value):
                others.append(lark.literal(str(value)))
            else:
                raise self.schema.refuse(path, f"the listed value {show(value)} is not JSON")
        ways = list(others)
        if any(texts):
            words = " | ".join(lark.literal(text) for text in dict.fromkeys(texts) if text)
            empty = "?" if "" in texts else ""
            ways.append(f"quote {self.rule(words, terminal=True)}{empty} quote")
        elif texts:
            ways.append("quote quote")
        return ways

    def written(self, value: Any, path: str) -> str:
        """One value, as `tools.value_parts` writes it."""
        pieces: list[str] = []
        text = ""
        for part, is_markup in value_parts(value):
            if is_markup and part == QUOTE:
                pieces += [lark.literal(text)] * bool(text) + ["quote"]
                text = ""
            else:
                self.check_writable(part, path)
                text += part
        return " ".join(pieces + [lark.literal(text)] * bool(text))

    def check_writable(self, text: str, path: str) -> None:
        if QUOTE in text or CALL_OPEN in text:
            raise self.schema.refuse(
                path, f"the listed value {show(text)} holds a marker of the format"
            )

    def string(self, flat: Mapping[str, Any], path: str) -> str | None:
        terms = [f"/{lark.escaped(STRING)}/"]
        low, high = flat.get("minLength", 0), flat.get("maxLength")
        if high is not None and high < low:
            return None
        if low or high is not None:
            terms.append(f"/(?s:.{{{low},{'' if high is None else high}}})/")
        terms += [f"/{lark.escaped(pattern)}/" for pattern in flat.get("patterns", [])]
        term = self.rule(" & ".join(terms), terminal=True)
        if len(terms) > 1:
            from llguidance import LLMatcher

            grammar = LLMatcher.grammar_from_lark(f"start: T\nT: {' & '.join(terms)}\n")
            tried = lark.matcher(lark.byte_vocabulary(), grammar)
            tried.compute_bitmask()
            if tried.is_error() and lark.reason(tried).startswith("NoExtension"):
                return None  # no text fits
            if tried.is_error():
                raise self.schema.refuse(
                    path, f"its strings cannot be held to: {lark.reason(tried)}"
                )
        return f"quote {term} quote"

    def number(self, kind: str, flat: Mapping[str, Any], path: str) -> str | None:
        bounds = {key: flat[key] for key in BOUNDS if key in flat}
        if not bounds:
            return self.rule(_INTEGER if kind == "integer" else _NUMBER, terminal=True)
        from llguidance import LLMatcher

        lows = [bounds[key] for key in ("minimum", "exclusiveMinimum") if key in bounds]
        highs = [bounds[key] for key in ("maximum", "exclusiveMaximum") if key in bounds]
        if lows and highs and max(lows) > min(highs):
            return None
        if not lows:
            bounds["minimum"] = min(-_REACH, *(-abs(10 * high) for high in highs), 0)
        if not highs:
            bounds["maximum"] = max(_REACH, *(abs(10 * low) for low in lows), 0)
        schema = json.dumps({"type": kind, **bounds})
        if error := lark.complaint(LLMatcher.grammar_from_json_schema(schema)):
            raise self.schema.refuse(path, f"its numbers cannot be held to: {error}")
        options = '{"x-guidance": {"whitespace_flexible": false}, '
        return self.rule(f"%json {options}{schema[1:]}")

    def array(self, flat: Mapping[str, Any], path: str) -> str | None:
        low, high = flat.get("minItems", 0), flat.get("maxItems")
        if high is not None and high < low:
            return None
        schema = flat.get("items", True)
        if flat.get("uniqueItems") and (high is None or high > 1):
            return self.unique(schema, low, high, path)
        item = self.value(schema, f"{path}.items") if high != 0 else None
        if item is None:
            return '"[" "]"' if low == 0 else None
        more = lark.times(f'("," {item})', max(0, low - 1), None if high is None else high - 1)
        return f'"[" ({item} {more}){"?" if low == 0 else ""} "]"'

    def unique(self, schema: Any, low: int, high: int | None, path: str) -> str | None:
        """An array of listed values, each at most once: a bit of the parser's state for each."""
        flats = self.schema.flat(schema, f"{path}.items")
        listed: list[Any] = []
        for flat in flats:
            if "enum" not in flat and flat.get("type") in (["boolean"], ["null"]):
                flat["enum"] = [True, False] if flat["type"] == ["boolean"] else [None]
            if "enum" not in flat:
                raise self.schema.refuse(
                    path,
                    "'uniqueItems' can be held to only where the items are listed in an enum; "
                    "leave it out and drop repeats when the call comes",
                )
            listed += [
                v for v in flat["enum"] if self.schema.fits(v, flat) and not among(v, listed)
            ]
        if len(listed) > MAX_UNIQUE:
            raise self.schema.refuse(
                path,
                f"'uniqueItems' over {len(listed)} values; at most {MAX_UNIQUE} can be held to",
            )
        if low > len(listed):
            return None
        most = len(listed) if high is None else min(high, len(listed))
        lines = [f'"" %if bit_count_ge(_, {low})']
        for index, value in enumerate(listed):
            word = self.rule(" | ".join(self.literals([value], path)))
            free = f"and(bit_clear({index}), bit_count_lt(_, {most}))"
            first = f"and(is_zeros(_), {free})"
            then = f"and(not(is_zeros(_)), {free})"
            lines.append(f"{word} \0::set_bit({index}) %if {first}")
            lines.append(f'"," {word} \0::set_bit({index}) %if {then}')
        body = "\n | ".join(lines)
        if (name := self.known.get(body)) is None:
            name = self.known[body] = f"u{len(self.known)}"
            self.rules[f"{name}::_"] = body.replace("\0", name)
        return f'"[" {name}::0x0 "]"'

    def object(self, flat: Mapping[str, Any], path: str, *, closed: bool = False) -> str | None:
        """A mapping: declared keys sorted, then others if the schema allows any.

        closed: it is the arguments themselves, which hold no key that is not declared.
        """
        if flat.get("type", ["object"]) != ["object"] and "object" not in flat["type"]:
            return None
        if "enum" in flat:
            listed = [
                v for v in flat["enum"] if isinstance(v, Mapping) and self.schema.fits(v, flat)
            ]
            return " | ".join(self.literals(listed, path)) or None
        declared: Mapping[str, Any] = flat.get("properties", {})
        others = flat.get("additionalProperties", not (declared or closed))
        required = dict.fromkeys(flat.get("required", []))
        if others is False and (unknown := [key for key in required if key not in declared]):
            raise self.schema.refuse(
                path, f"the required key {show(unknown[0])} is not among its properties"
            )
        schemas = {**dict.fromkeys(required, others), **declared}
        # As `tools.pairs_parts` sorts them, so that a call and its history are the same tokens.
        keys = sorted(schemas, key=str.lower)
        pairs: list[tuple[str, bool]] = []
        for key in keys:
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise self.schema.refuse(
                    path,
                    f"the key {show(key)} cannot be written in a call, whose keys stand without "
                    "quotes; rename it",
                )
            value = self.value(schemas[key], f"{path}.{key}")
            if value is None and key in required:
                return None
            if value is not None:
                pairs.append((f"{lark.literal(key + ':')} {value}", key in required))
        low, high = flat.get("minProperties", 0), flat.get("maxProperties")
        other = self.other(others, keys, path)
        if high is not None and other is None and high >= len(pairs):
            high = None
        inside = self.members(pairs, other, low, high)
        return None if inside is None else f'"{{" {inside} "}}"'

    def other(self, others: Any, keys: Iterable[str], path: str) -> str | None:
        """A pair whose key is not declared."""
        if others is False:
            return None
        value = self.value(others, f"{path}.additionalProperties")
        if value is None:
            return None
        taken = " | ".join(lark.literal(key) for key in keys)
        key = f"{_ANY_KEY} & ~({taken})" if taken else _ANY_KEY
        return f'{self.rule(key, terminal=True)} ":" {value}'

    def members(
        self, pairs: list[tuple[str, bool]], other: str | None, low: int, high: int | None
    ) -> str | None:
        """Pairs in their order, the optional ones there or not, then `low` to `high` in all."""
        enough = max(1, low, high or 0)
        known: dict[tuple[int, int], str | None] = {}
        # From the last pair back; `count` are written, `enough` stands for that many or more.
        for index in range(len(pairs), -1, -1):
            for count in range(min(index, enough) + 1):
                known[index, count] = self.rest(pairs, other, index, count, low, high, known)
        return known[0, 0]

    def rest(
        self,
        pairs: list[tuple[str, bool]],
        other: str | None,
        index: int,
        count: int,
        low: int,
        high: int | None,
        known: Mapping[tuple[int, int], str | None],
    ) -> str | None:
        comma = '"," ' * bool(count)
        if index == len(pairs):
            missing = max(0, low - count)
            left = None if high is None else high - count
            if other is None or left == 0:
                return '""' if missing == 0 else None
            more = f'("," {other})'
            if count:
                return lark.times(more, missing, left)
            more = lark.times(more, max(0, missing - 1), None if left is None else left - 1)
            return f"({other} {more}){'?' if missing == 0 else ''}"
        pair, required = pairs[index]
        ways: list[str] = []
        if high is None or count < high:
            enough = max(1, low, high or 0)
            then = known[index + 1, min(count + 1, enough)]
            if then is not None:
                ways.append(f"{comma}{pair} {then}")
        if not required and (then := known[index + 1, count]) is not None:
            ways.append(then)
        return self.rule(" | ".join(ways)) if ways else None

    # Values of any shape.

    def anything(self, depth: int) -> str:
        """Any value, nested at most `depth` levels."""
        string = f"quote {self.rule(f'/{lark.escaped(STRING)}/', terminal=True)} quote"
        ways = [string, self.rule(_NUMBER, terminal=True), '"true"', '"false"', '"null"']
        if depth:
            inner = self.anything(depth - 1)
            ways += [f'"[" ({inner} ("," {inner})*)? "]"', f'"{{" {self.pairs(depth)} "}}"']
        return self.rule(" | ".join(ways))

    def pairs(self, depth: int) -> str:
        """Any keys, with values of `depth` - 1 levels."""
        pair = f'{self.rule(_ANY_KEY, terminal=True)} ":" {self.anything(depth - 1)}'
        return f'({pair} ("," {pair})*)?'
