"""Gemma 4's tool protocol: declarations and calls written, arguments checked.

The encoder writes tool declarations, calls and responses as the official chat template does. The
checker compares a call with its tool's JSON schema. Reading calls is the work of `calls`, whose
names are repeated here. Nothing here runs a tool.

Part: a piece of prompt text and whether it is markup (True) or content (False); see `chat`.

Source: official chat template of 2026-07-09.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gemsmith.errors import ToolError
from gemsmith.text.calls import (
    CALL_CLOSE,
    CALL_OPEN,
    MAX_DEPTH,
    NAME,
    QUOTE,
    RESPONSE_CLOSE,
    RESPONSE_OPEN,
    ParsedCalls,
    Problem,
    ToolCall,
    parse_calls,
    show,
)

__all__ = [
    "MAX_DEPTH",
    "ParsedCalls",
    "Part",
    "Problem",
    "ToolCall",
    "call_parts",
    "check_tool",
    "declaration",
    "declaration_parts",
    "parse_calls",
    "response_parts",
    "tool_name",
    "validate_arguments",
    "value_parts",
]

MAX_SCHEMA_NODES = 20_000
"""Most mappings and lists in one tool's schema."""

Part = tuple[str, bool]


# -- writing ----------------------------------------------------------------------------------


def declaration(tool: Mapping[str, Any]) -> str:
    """One tool, in OpenAI's shape, as the model reads it: `declaration:NAME{...}`.

    Says of the schema what the official template says: of each property its description, an enum
    of strings, items, nullable, properties, required and type, and nothing else. A schema without
    `type` leaves a brace open, as the official template does.

    Raises:
      ToolError: the tool is no mapping with a `function`, or the template could not write it.
    """
    return "".join(text for text, _ in declaration_parts(tool))


def declaration_parts(tool: Mapping[str, Any]) -> list[Part]:
    """`declaration`, markup and content kept apart."""
    function = _function(tool)
    try:
        return list(_declaration(function))
    except (TypeError, ValueError, AttributeError) as error:
        raise ToolError(
            f"tool {show(function.get('name'))} has a schema that cannot be written: {error}"
        ) from None


def _function(tool: Any) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise ToolError(
            f"a tool must look like {{'type': 'function', 'function': {{...}}}}, not {show(tool)}"
        )
    return function


def value_parts(value: Any, *, quote_keys: bool = False, depth: int = 0) -> Iterator[Part]:
    """A JSON-like value: keys bare in calls and responses, quoted inside declarations.

    Raises:
      ToolError: nested deeper than MAX_DEPTH, or keys that cannot be sorted.
    """
    if depth >= MAX_DEPTH and isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        raise ToolError(f"a value is nested more than {MAX_DEPTH} levels deep; flatten it")
    if value is None:
        yield "null", True
    elif isinstance(value, str):
        yield from _quoted(value)
    elif isinstance(value, bool):
        yield ("true" if value else "false"), True
    elif isinstance(value, Mapping):
        yield "{", True
        yield from pairs_parts(value, quote_keys=quote_keys, depth=depth + 1)
        yield "}", True
    elif isinstance(value, Sequence):
        yield "[", True
        for index, item in enumerate(value):
            if index:
                yield ",", True
            yield from value_parts(item, quote_keys=quote_keys, depth=depth + 1)
        yield "]", True
    else:
        yield str(value), False


def pairs_parts(
    mapping: Mapping[str, Any], *, quote_keys: bool = False, depth: int = 1
) -> Iterator[Part]:
    """The inside of a mapping, `key:value` comma separated, sorted without regard to case."""
    for index, (key, value) in enumerate(_sorted(mapping)):
        if index:
            yield ",", True
        if quote_keys:
            yield from _quoted(key)
        else:
            yield str(key), False
        yield ":", True
        yield from value_parts(value, quote_keys=quote_keys, depth=depth)


def call_parts(name: str, arguments: Mapping[str, Any] | None) -> Iterator[Part]:
    """One call between its markers."""
    yield f"{CALL_OPEN}call:", True
    yield name, False
    yield "{", True
    yield from pairs_parts(arguments or {})
    yield "}" + CALL_CLOSE, True


def response_parts(name: str, response: Any) -> Iterator[Part]:
    """One tool's answer between its markers; what is no mapping goes under the key `value`."""
    yield f"{RESPONSE_OPEN}response:", True
    yield name, False
    yield "{", True
    yield from pairs_parts(response if isinstance(response, Mapping) else {"value": response})
    yield "}" + RESPONSE_CLOSE, True


def _quoted(text: str) -> Iterator[Part]:
    if not isinstance(text, str):
        raise ToolError(f"the key {text!r} must be a string")
    yield QUOTE, True
    yield text, False
    yield QUOTE, True


def _sorted(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    try:
        return sorted(
            mapping.items(),
            key=lambda item: item[0].lower() if isinstance(item[0], str) else item[0],
        )
    except TypeError:
        raise ToolError(f"the keys {show(list(mapping))} must all be strings") from None


def _declaration(function: Mapping[str, Any]) -> Iterator[Part]:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ToolError(f"a tool needs a name, a string that is not empty, not {show(name)}")
    yield "declaration:", True
    yield name, False
    yield "{description:", True
    yield from _quoted(str(function.get("description", "")))
    parameters = function.get("parameters")
    if parameters:
        yield ",parameters:{", True
        if _get(parameters, "properties"):
            yield "properties:{", True
            yield from _properties(_get(parameters, "properties"), depth=0)
            yield "},", True
        if _get(parameters, "required"):
            yield from _names("required", _get(parameters, "required"))
            yield ",", True
        if _get(parameters, "type"):
            yield from _type(_get(parameters, "type"))
            yield "}", True
    if "response" in function:
        response = function["response"]
        yield ",response:{", True
        if _get(response, "description"):
            yield "description:", True
            yield from _quoted(str(_get(response, "description")))
            yield ",", True
        if str(_get(response, "type")).upper() == "OBJECT":
            yield from _type(_get(response, "type"))
            yield "}", True
    yield "}", True


_OWN_KEYWORDS = frozenset({"description", "type", "properties", "required", "nullable"})


def _properties(properties: Mapping[str, Any], *, depth: int) -> Iterator[Part]:
    if depth > MAX_DEPTH:
        raise ToolError(f"a schema is nested more than {MAX_DEPTH} levels deep; flatten it")
    if not isinstance(properties, Mapping):
        raise ToolError(f"'properties' must be a mapping, not {show(properties)}")
    for index, (key, schema) in enumerate(_sorted(properties)):
        if index:
            yield ",", True
        yield str(key), False
        yield ":{", True
        for section in _property_sections(schema, depth):
            yield from section
            yield ",", True
        yield from _type(_get(schema, "type"))
        yield "}", True


def _property_sections(schema: Any, depth: int) -> Iterator[Iterator[Part]]:
    """What stands before the type of one property, in the template's order."""
    kind = str(_get(schema, "type")).upper()
    if _get(schema, "description"):
        yield _labelled("description", _quoted(str(_get(schema, "description"))))
    if kind == "STRING" and _get(schema, "enum"):
        yield _labelled("enum", value_parts(_get(schema, "enum"), quote_keys=True))
    items = _get(schema, "items")
    if kind == "ARRAY" and isinstance(items, Mapping) and items:
        yield _braced("items", _items(items, depth))
    if _get(schema, "nullable"):
        yield iter([("nullable:true", True)])
    if kind == "OBJECT":
        inner = _get(schema, "properties")
        if not isinstance(inner, Mapping):
            # An object that names no properties: its own other keywords pass for properties.
            inner = {key: value for key, value in schema.items() if key not in _OWN_KEYWORDS}
        yield _braced("properties", _properties(inner, depth=depth + 1))
        if _get(schema, "required"):
            yield _names("required", _get(schema, "required"))


def _items(items: Mapping[str, Any], depth: int) -> Iterator[Part]:
    shown = [(key, value) for key, value in _sorted(items) if value is not None]
    for index, (key, value) in enumerate(shown):
        if index:
            yield ",", True
        if key == "properties":
            inner = value if isinstance(value, Mapping) else {}
            yield from _braced("properties", _properties(inner, depth=depth + 1))
        elif key == "required":
            yield from _names("required", value)
        elif key == "type":
            kind = (
                value.upper() if isinstance(value, str) else [str(item).upper() for item in value]
            )
            yield from _labelled("type", value_parts(kind))
        else:
            yield str(key), False
            yield ":", True
            yield from value_parts(value, quote_keys=True, depth=depth)


def _labelled(label: str, parts: Iterable[Part]) -> Iterator[Part]:
    yield label + ":", True
    yield from parts


def _braced(label: str, parts: Iterable[Part]) -> Iterator[Part]:
    yield label + ":{", True
    yield from parts
    yield "}", True


def _names(label: str, names: Iterable[Any]) -> Iterator[Part]:
    yield label + ":[", True
    for index, name in enumerate(names):
        if index:
            yield ",", True
        yield from _quoted(str(name))
    yield "]", True


def _type(kind: Any) -> Iterator[Part]:
    yield from _labelled("type", _quoted(str(kind).upper()))


def _get(node: Any, key: str) -> Any:
    """A schema keyword; empty where the template would find nothing."""
    return node.get(key, "") if isinstance(node, Mapping) else ""


# -- checking ---------------------------------------------------------------------------------

_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (Mapping,),
    "null": (type(None),),
}
CHECKED = frozenset(
    [
        "type",
        "enum",
        "const",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "minItems",
        "maxItems",
        "uniqueItems",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "nullable",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "$defs",
        "definitions",
    ]
)
"""Keywords that `validate_arguments` holds a call to."""
NOT_CHECKED = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "format",
        "pattern",
        "multipleOf",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "$schema",
        "$id",
        "$comment",
        "$anchor",
        "minProperties",
        "maxProperties",
        "response",
    ]
)
"""Keywords that may stand in a schema but are not checked (a pattern could run for ever)."""


def tool_name(tool: Mapping[str, Any]) -> str:
    """What a declared tool is called.

    Raises:
      ToolError: the tool is no mapping with a `function`, or no call can hold its name.
    """
    name = _function(tool).get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ToolError(
            f"the tool's name {show(name)} cannot be written in a call; use at most 256 letters, "
            "digits and _ . - / : $ @"
        )
    return name


def check_tool(tool: Mapping[str, Any]) -> None:
    """Refuse a tool whose name no call can hold, or whose schema is recursive, absurdly large,
    misshapen or beyond what we check.

    Raises:
      ToolError: with the place in the schema and the way out.
    """
    name, function = tool_name(tool), tool["function"]
    declaration_parts(tool)
    schema = function.get("parameters")
    if schema is None:
        return
    if not isinstance(schema, Mapping):
        raise ToolError(f"tool {name!r}: parameters must be a mapping, not {show(schema)}")
    if schema and schema.get("type") != "object":
        raise ToolError(
            f"tool {name!r}: parameters need 'type': 'object', not {show(schema.get('type'))}"
        )
    walk = _SchemaWalk(name, schema)
    walk.check(schema, "parameters", 0, ())


class _SchemaWalk:
    """One pass over a schema that follows local references and remembers how it got there."""

    def __init__(self, name: str, root: Mapping[str, Any]) -> None:
        self.name, self.root, self.num_nodes = name, root, 0

    def error(self, where: str, what: str) -> ToolError:
        return ToolError(f"tool {self.name!r}, {where}: {what}")

    def check(self, schema: Any, where: str, depth: int, references: tuple[str, ...]) -> None:
        self.num_nodes += 1
        if self.num_nodes > MAX_SCHEMA_NODES:
            raise self.error(
                where, f"the schema has more than {MAX_SCHEMA_NODES} parts; shorten it"
            )
        if depth > MAX_DEPTH:
            raise self.error(where, f"nested more than {MAX_DEPTH} levels deep; flatten it")
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            raise self.error(where, f"a schema must be a mapping, not {show(schema)}")
        for keyword in schema:
            if keyword not in CHECKED and keyword not in NOT_CHECKED:
                raise self.error(
                    where,
                    f"the schema keyword {show(keyword)} is not supported; say it with "
                    "type, enum, properties, required, items or anyOf",
                )
        kinds = schema.get("type", [])
        for kind in (
            [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else [kinds]
        ):
            if not isinstance(kind, str) or kind.lower() not in _PLAIN_TYPES:
                raise self.error(
                    where, f"the type {show(kind)} is unknown; known are {', '.join(_PLAIN_TYPES)}"
                )
        for keyword, shape in (("required", list), ("enum", list), ("properties", Mapping)):
            if keyword in schema and not isinstance(schema[keyword], shape):
                raise self.error(where, f"{keyword!r} is {show(schema[keyword])}, the wrong shape")
        reference = schema.get("$ref")
        if reference is not None:
            if reference in references:
                raise self.error(
                    where, f"{show(reference)} leads back to itself; the format has no recursion"
                )
            target = resolve(self.root, reference)
            if target is None:
                raise self.error(
                    where, f"{show(reference)} is not found; only '#/...' inside the schema is"
                )
            self.check(target, where, depth + 1, (*references, reference))
        for key, value in schema.get("properties", {}).items():
            self.check(value, f"{where}.{key}", depth + 1, references)
        for keyword in ("items", "additionalProperties"):
            if keyword in schema and schema[keyword] is not None:
                self.check(schema[keyword], f"{where}.{keyword}", depth + 1, references)
        for keyword in ("anyOf", "oneOf", "allOf"):
            branches = schema.get(keyword, [])
            if not isinstance(branches, list):
                raise self.error(where, f"{keyword!r} must be a list, not {show(branches)}")
            for index, branch in enumerate(branches):
                self.check(branch, f"{where}.{keyword}[{index}]", depth + 1, references)


def resolve(root: Mapping[str, Any], reference: Any) -> Any:
    """The schema that a `$ref` of `root` names; None if it is not there."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    node: Any = root
    for step in reference.removeprefix("#").strip("/").split("/") if len(reference) > 1 else []:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(node, Mapping) or step not in node:
            return None
        node = node[step]
    return node


def validate_arguments(call: ToolCall, tool: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a call by its tool's declared schema; empty if nothing is.

    Types, required keys, unknown keys, enum, const, bounds, lengths and branches are checked (see
    CHECKED). A key that the schema does not name is a problem unless `additionalProperties` allows
    it. An integer with a zero fraction passes for an integer.

    Raises:
      ToolError: the schema itself is unusable (see `check_tool`).
    """
    check_tool(tool)
    function = tool["function"]
    if call.name != function["name"]:
        return [Problem("unknown_tool", f"{call.name!r} was called, {function['name']!r} declared")]
    schema = function.get("parameters") or {"type": "object"}
    messages = _mismatches(call.arguments, schema, schema, call.name)
    return [Problem("invalid_arguments", message) for message in messages]


def _mismatches(value: Any, schema: Any, root: Mapping[str, Any], where: str) -> list[str]:
    if schema is True:
        return []
    if schema is False:
        return [f"{where} is not allowed"]
    if "$ref" in schema:
        target = resolve(root, schema["$ref"])
        wrong = _mismatches(value, target, root, where)
        if wrong:
            return wrong
    if value is None and schema.get("nullable") is True:
        return []
    kinds = schema.get("type", [])
    kinds = [kind.lower() for kind in ([kinds] if isinstance(kinds, str) else kinds)]
    if kinds and not any(is_kind(value, kind) for kind in kinds):
        return [f"{where} is {show(value)}, not of type {' or '.join(kinds)}"]
    found: list[str] = []
    if schema.get("enum") and not any(same(value, item) for item in schema["enum"]):
        found.append(f"{where} is {show(value)}, not one of {show(schema['enum'])}")
    if "const" in schema and not same(value, schema["const"]):
        found.append(f"{where} is {show(value)}, not {show(schema['const'])}")
    found += _out_of_bounds(value, schema, where)
    if isinstance(value, Mapping):
        found += _mapping_mismatches(value, schema, root, where)
    elif isinstance(value, list | tuple) and schema.get("items") is not None:
        for index, item in enumerate(value):
            found += _mismatches(item, schema["items"], root, f"{where}[{index}]")
    for branch in schema.get("allOf", []):
        found += _mismatches(value, branch, root, where)
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword, [])
        fits = sum(not _mismatches(value, branch, root, where) for branch in branches)
        if branches and (fits == 0 or (keyword == "oneOf" and fits > 1)):
            found.append(f"{where} is {show(value)}, which fits {fits} branches of {keyword}")
    return found


def _mapping_mismatches(
    value: Mapping[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str
) -> list[str]:
    properties = schema.get("properties", {})
    found = [
        f"{where} lacks the required key {key!r}"
        for key in schema.get("required", [])
        if key not in value
    ]
    # Only a schema that names its keys, or forbids others, can call a key unknown.
    closed = bool(properties) or schema is root
    branches = any(keyword in schema for keyword in ("anyOf", "oneOf", "allOf", "$ref"))
    others = schema.get("additionalProperties", not closed or branches)
    for key, item in value.items():
        if key in properties:
            found += _mismatches(item, properties[key], root, f"{where}.{key}")
        elif others is False:
            names = ", ".join(map(repr, properties)) or "none"
            found.append(f"{where} has the unknown key {key!r}; declared: {names}")
        elif isinstance(others, Mapping):
            found += _mismatches(item, others, root, f"{where}.{key}")
    return found


def _out_of_bounds(value: Any, schema: Mapping[str, Any], where: str) -> list[str]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        measure, bounds = value, ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    elif isinstance(value, str):
        measure, bounds = len(value), ("minLength", "maxLength")
    elif isinstance(value, list | tuple):
        measure, bounds = len(value), ("minItems", "maxItems")
    else:
        return []
    found: list[str] = []
    for keyword in bounds:
        bound = schema.get(keyword)
        if not isinstance(bound, int | float) or isinstance(bound, bool):
            continue
        exclusive = keyword.startswith("exclusive")
        lower = "min" in keyword.lower()
        short = measure < bound or (exclusive and measure == bound) if lower else False
        long = measure > bound or (exclusive and measure == bound) if not lower else False
        if short or long:
            found.append(f"{where} is {show(value)}, outside {keyword} {bound}")
    if schema.get("uniqueItems") is True and isinstance(value, list | tuple):
        shown = [json.dumps(item, sort_keys=True, default=str) for item in value]
        if len(set(shown)) < len(shown):
            found.append(f"{where} is {show(value)}, which repeats an item")
    return found


def is_kind(value: Any, kind: str) -> bool:
    """Whether a value is of this JSON Schema type; 1.0 is an integer."""
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PLAIN_TYPES[kind])


def same(value: Any, other: Any) -> bool:
    """Equality as JSON sees it: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
