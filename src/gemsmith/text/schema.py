"""What the JSON schema of a tool's parameters asks of a value, without $ref and without branches.

`Schema.flat` resolves references and multiplies anyOf, oneOf and allOf out, so that a grammar has
one plain shape after the other to write. A schema is kept to the letter; what cannot be held to
while a call is written is a ToolError with its place (`Schema.refuse`). Whether finished arguments
fit their schema is for `tools.validate_arguments`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

from gemsmith.errors import ToolError
from gemsmith.text import lark
from gemsmith.text.calls import ToolCall, show
from gemsmith.text.tools import is_kind, resolve, same, validate_arguments

LOOSE = "give the function 'strict': False to hold its calls to the syntax alone"
MAX_ALTERNATIVES = 256
"""Most combinations of the branches of one schema (anyOf, oneOf and allOf multiply)."""
MOST = 1_000_000
"""Longest text or list that a schema may ask for; beyond this, an upper bound bounds nothing."""

FORMATS = {
    "date": r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
    "time": r"([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]{1,9})?"
    r"(Z|[-+]([01][0-9]|2[0-3]):[0-5][0-9])",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
FORMATS["date-time"] = f"{FORMATS['date']}T{FORMATS['time']}"
"""Formats whose shape is beyond doubt; any other is a remark, as JSON Schema has it."""
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_KINDS = frozenset({"string", "number", "boolean", "array", "object", "null"})


class Schema:
    """The parameters of one tool. Paths are for errors alone."""

    def __init__(self, tool: str, root: Mapping[str, Any]) -> None:
        """tool: its name. root: what `$ref` starts from."""
        self.tool, self.root = tool, root

    def refuse(self, path: str, reason: str) -> ToolError:
        return ToolError(f"tool {self.tool!r}, {path}: {reason}; or {LOOSE}")

    def flat(self, schema: Any, path: str) -> list[dict[str, Any]]:
        """Schemas without $ref, anyOf, oneOf, allOf and nullable, one of which a value must fit."""
        if isinstance(schema, bool):
            return [{}] if schema else []
        ways = [self._own(schema, path)]
        if "$ref" in schema:
            ways = self._joined(ways, self.flat(resolve(self.root, schema["$ref"]), path), path)
        for index, branch in enumerate(schema.get("allOf", [])):
            where = f"{path}.allOf[{index}]"
            ways = self._joined(ways, self.flat(branch, where), where)
        for keyword in ("anyOf", "oneOf"):
            if not (branches := schema.get(keyword)):
                continue
            flats = [self.flat(b, f"{path}.{keyword}[{i}]") for i, b in enumerate(branches)]
            if keyword == "oneOf":
                self._check_apart(flats, path)
            ways = self._joined(ways, [way for flat in flats for way in flat], path)
        if schema.get("nullable") is True:
            ways = [way for way in ways if way.get("type") != ["null"]] + [{"type": ["null"]}]
        return ways

    def _own(self, schema: Mapping[str, Any], path: str) -> dict[str, Any]:
        """The keywords that say something of a value by themselves."""
        flat: dict[str, Any] = {}
        if kinds := schema.get("type", []):
            kinds = [kinds] if isinstance(kinds, str) else kinds
            flat["type"] = list(dict.fromkeys(kind.lower() for kind in kinds))
        if schema.get("enum"):
            flat["enum"] = list(schema["enum"])
        if "const" in schema:
            both = [schema["const"]]
            flat["enum"] = _common(flat["enum"], both) if "enum" in flat else both
        for keyword in (*BOUNDS, *LENGTHS):
            if (bound := schema.get(keyword)) is None:
                continue
            whole = keyword in LENGTHS
            good = isinstance(bound, int | float) and not isinstance(bound, bool)
            if not good or not math.isfinite(bound) or (whole and (bound < 0 or bound % 1)):
                what = "a whole number from 0 on" if whole else "a number"
                raise self.refuse(path, f"{keyword!r} is {show(bound)} but must be {what}")
            if not whole or bound <= MOST or not keyword.startswith("max"):
                flat[keyword] = int(bound) if whole else bound
            if whole and bound > MOST and keyword.startswith("min"):
                raise self.refuse(path, f"{keyword!r} is {bound}; at most {MOST} can be asked for")
        if flat.get("multipleOf", 1) <= 0:
            raise self.refuse(path, f"'multipleOf' is {show(flat['multipleOf'])}, not above 0")
        if (pattern := schema.get("pattern")) is not None:
            flat["patterns"] = [self._pattern(pattern, path)]
        if isinstance(format := schema.get("format"), str) and format in FORMATS:
            flat.setdefault("patterns", []).append(FORMATS[format])
        for keyword in ("properties", "required", "additionalProperties", "items"):
            if schema.get(keyword) is not None:
                flat[keyword] = schema[keyword]
        if schema.get("uniqueItems") is True:
            flat["uniqueItems"] = True
        return flat

    def _pattern(self, pattern: Any, path: str) -> str:
        """A schema's regular expression as one of the whole string."""
        if not isinstance(pattern, str) or len(pattern) > lark.MAX_PATTERN:
            raise self.refuse(
                path,
                f"'pattern' is {show(pattern)}, no text of at most {lark.MAX_PATTERN} characters",
            )
        from llguidance import LLMatcher

        whole = lark.anchored(pattern)
        if error := lark.complaint(LLMatcher.grammar_from_regex(whole)):
            raise self.refuse(path, f"the pattern {show(pattern)} cannot be held to: {error}")
        return whole

    def _joined(
        self, left: list[dict[str, Any]], right: list[dict[str, Any]], path: str
    ) -> list[dict[str, Any]]:
        """The schemas that fit one of both sides."""
        if len(left) * len(right) > MAX_ALTERNATIVES:
            raise self.refuse(
                path, f"its branches combine in more than {MAX_ALTERNATIVES} ways; join some"
            )
        merged = (self._merge(a, b, path) for a, b in product(left, right))
        return [flat for flat in merged if flat is not None]

    def _merge(self, a: dict[str, Any], b: dict[str, Any], path: str) -> dict[str, Any] | None:
        """What fits both; None where that can be told to be nothing."""
        if not a or not b:
            return a or b
        flat = {**a, **b}
        if "type" in a and "type" in b:
            flat["type"] = [kind for kind in a["type"] if kind in b["type"]]
            if "integer" not in flat["type"] and "integer" in a["type"] + b["type"]:
                flat["type"] += ["integer"] if "number" in a["type"] + b["type"] else []
            if not flat["type"]:
                return None
        if "enum" in a and "enum" in b:
            flat["enum"] = _common(a["enum"], b["enum"])
            if not flat["enum"]:
                return None
        for keyword in (*BOUNDS, *LENGTHS):
            if keyword in a and keyword in b and a[keyword] != b[keyword]:
                if keyword == "multipleOf":
                    if a[keyword] % 1 or b[keyword] % 1:
                        raise self.refuse(path, "two values of 'multipleOf' meet; give one")
                    flat[keyword] = math.lcm(int(a[keyword]), int(b[keyword]))
                else:
                    tighter = max if keyword.lower().find("min") >= 0 else min
                    flat[keyword] = tighter(a[keyword], b[keyword])
        if "patterns" in a and "patterns" in b:
            flat["patterns"] = list(dict.fromkeys(a["patterns"] + b["patterns"]))
        if "items" in a and "items" in b and a["items"] != b["items"]:
            flat["items"] = {"allOf": [a["items"], b["items"]]}
        if "required" in a and "required" in b:
            flat["required"] = list(dict.fromkeys(a["required"] + b["required"]))
        if "properties" in a or "properties" in b:
            keys = list(dict.fromkeys([*a.get("properties", {}), *b.get("properties", {})]))
            flat["properties"] = {key: _both(_of(a, key), _of(b, key)) for key in keys}
        if "additionalProperties" in a and "additionalProperties" in b:
            flat["additionalProperties"] = _both(
                a["additionalProperties"], b["additionalProperties"]
            )
        return flat

    def _check_apart(self, branches: list[list[dict[str, Any]]], path: str) -> None:
        """Refuse a oneOf that a value might fit twice."""
        for (i, left), (j, right) in combinations(enumerate(branches), 2):
            if not all(self._apart(a, b, path) for a, b in product(left, right)):
                raise self.refuse(
                    path,
                    f"branches {i} and {j} of 'oneOf' may both fit; use anyOf, or tell them apart "
                    "by a required property with a const in each",
                )

    def _apart(self, a: dict[str, Any], b: dict[str, Any], path: str) -> bool:
        """Whether surely no value fits both."""
        if not kinds_of(a) & kinds_of(b):
            return True
        if "enum" in a and "enum" in b:
            return not _common(a["enum"], b["enum"])
        if kinds_of(a) & kinds_of(b) != {"object"}:
            return False
        for x, y in ((a, b), (b, a)):
            alien = set(x.get("required", [])) - set(y.get("properties", {}))
            if alien and y.get("additionalProperties") is False:
                return True
        keys = set(a.get("required", [])) & set(b.get("required", []))
        return any(
            all(
                self._apart(x, y, path)
                for x, y in product(
                    self.flat(a.get("properties", {}).get(key, True), path),
                    self.flat(b.get("properties", {}).get(key, True), path),
                )
            )
            for key in sorted(keys)
        )

    def fits(self, value: Any, flat: Mapping[str, Any]) -> bool:
        """Whether a listed value keeps to the schema's other keywords."""
        kinds = flat.get("type")
        if kinds and not any(is_kind(value, kind) for kind in kinds):
            return False
        if isinstance(value, str) and not all(
            re.fullmatch(pattern, value, re.DOTALL) for pattern in flat.get("patterns", [])
        ):
            return False
        ignored = ("type", "enum", "patterns")
        schema = {key: value for key, value in flat.items() if key not in ignored}
        if not schema:
            return True
        inner = {"type": "object", "properties": {"v": schema}}
        for key in ("$defs", "definitions"):
            if key in self.root:
                inner[key] = self.root[key]
        tool = {"function": {"name": "t", "parameters": inner}}
        return not validate_arguments(ToolCall("t", {"v": value}), tool)


def kinds_of(flat: Mapping[str, Any]) -> set[str]:
    """Types that a value of this schema can have; integers are numbers."""
    if "enum" in flat:
        return {kind for value in flat["enum"] for kind in _KINDS if is_kind(value, kind)}
    kinds = flat.get("type") or implied(flat)
    return {"number" if kind == "integer" else kind for kind in kinds}


def implied(flat: Mapping[str, Any]) -> list[str]:
    """Types meant by a schema that names none: those its keywords speak of."""
    for kind, keywords in (
        ("object", ("properties", "required", "additionalProperties", *LENGTHS[4:])),
        ("array", ("items", "uniqueItems", *LENGTHS[2:4])),
        ("string", ("patterns", *LENGTHS[:2])),
        ("number", BOUNDS),
    ):
        if any(keyword in flat for keyword in keywords):
            return [kind]
    return sorted(_KINDS)


def _of(flat: Mapping[str, Any], key: str) -> Any:
    """What a schema without branches says of one key; absent keywords say nothing."""
    return flat.get("properties", {}).get(key, flat.get("additionalProperties", True))


def _both(a: Any, b: Any) -> Any:
    if a is True or b is True or a == b:
        return b if a is True else a
    return False if a is False or b is False else {"allOf": [a, b]}


def _common(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    return [value for value in left if among(value, right)]


def among(value: Any, values: Iterable[Any]) -> bool:
    return any(same(value, other) for other in values)
