"""Tool declarations, and calls held against their schema."""

from typing import Any

import pytest

from gemsmith.errors import ToolError
from gemsmith.text.calls import ToolCall
from gemsmith.text.tools import check_tool, declaration, validate_arguments


def tool(parameters: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "description": "d", "parameters": parameters, **more}
    return {"type": "function", "function": function}


def one(schema: Any) -> dict[str, Any]:
    return tool({"type": "object", "properties": {"a": schema}, "required": []})


def declared(schema: Any) -> str:
    """The text of one property."""
    return declaration(one(schema)).split("properties:", 1)[1].rsplit(",type:", 1)[0]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer", "minimum": 1, "enum": [1]}, '{a:{type:<|"|>INTEGER<|"|>}}'),
        ({"type": "string", "nullable": True}, '{a:{nullable:true,type:<|"|>STRING<|"|>}}'),
        ({"type": "array", "items": {}}, '{a:{type:<|"|>ARRAY<|"|>}}'),
        ({"type": ["string", "null"]}, "{a:{type:<|\"|>['STRING', 'NULL']<|\"|>}}"),
        ({}, '{a:{type:<|"|><|"|>}}'),
        (True, '{a:{type:<|"|><|"|>}}'),
        (
            {"type": "object", "additionalProperties": {"type": "string"}},
            '{a:{properties:{additionalProperties:{type:<|"|>STRING<|"|>}},type:<|"|>OBJECT<|"|>}}',
        ),
        (
            {"type": "array", "items": {"type": ["string", "null"], "maxLength": 3, "x": None}},
            '{a:{items:{maxLength:3,type:[<|"|>STRING<|"|>,<|"|>NULL<|"|>]},type:<|"|>ARRAY<|"|>}}',
        ),
    ],
)
def test_a_property_is_declared_as_the_official_template_does(schema: Any, text: str) -> None:
    assert declared(schema) == text


def test_without_a_type_a_brace_stays_open_as_in_the_official_template() -> None:
    assert declaration(tool({"required": ["a"]})) == (
        'declaration:f{description:<|"|>d<|"|>,parameters:{required:[<|"|>a<|"|>],}'
    )
    assert declaration(tool({}, response={"type": "string"})) == (
        'declaration:f{description:<|"|>d<|"|>,response:{}'
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("x", "a tool must look like .*, not 'x'"),
        ({"name": "f"}, "a tool must look like"),
        ({"function": {"name": ""}}, "a tool needs a name"),
        (
            tool({"properties": ["a"], "type": "object"}),
            r"'properties' must be a mapping, not \['a'\]",
        ),
        (tool({"required": 5, "type": "object"}), "tool 'f' has a schema that cannot be written"),
    ],
)
def test_a_tool_of_the_wrong_shape_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        declaration(given)


ENDLESS: dict[str, Any] = {"type": "object", "properties": {}}
ENDLESS["properties"]["again"] = ENDLESS
DEEP: dict[str, Any] = {"type": "string"}
for _ in range(70):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (tool(None, name="a b"), "the tool's name 'a b' cannot be written in a call; use at most"),
        (tool(None, name="a" * 257), "cannot be written in a call"),
        (tool(None, name=5), "the tool's name 5 cannot"),
        (tool([]), r"parameters must be a mapping, not \[\]"),
        (tool({"type": "string"}), "parameters need 'type': 'object', not 'string'"),
        (one(5), r"tool 'f', parameters\.a: a schema must be a mapping, not 5"),
        (one({"type": "text"}), r"parameters\.a: the type 'text' is unknown; known are string"),
        (
            one({"not": {}}),
            r"parameters\.a: the schema keyword 'not' is not supported; say it with",
        ),
        (one({"anyOf": {}}), "'anyOf' must be a list"),
        (one({"$ref": "#"}), r"parameters\.a\.a: '#' leads back to itself"),
        (one({"$ref": "#/properties/a"}), "leads back to itself; the format has no recursion"),
        (one({"$ref": "http://x"}), "'http://x' is not found; only '#/...' inside"),
        (one({"type": "object", "properties": {"b": {"enum": "x"}}}), r"a\.b: 'enum' is 'x'"),
        (tool(ENDLESS), "nested more than 64 levels deep"),
        (one(DEEP), "nested more than 64 levels deep"),
        (one({"anyOf": [{}] * 30_000}), "more than 20000 parts"),
    ],
)
def test_a_schema_beyond_what_can_be_checked_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        check_tool(given)


def test_references_that_do_not_recurse_but_fan_out_are_bounded() -> None:
    """Thirty definitions that each name the next twice are a billion parts when followed."""
    defs: dict[str, Any] = {"d30": {"type": "string"}}
    for index in range(30):
        both = [{"$ref": f"#/$defs/d{index + 1}"}] * 2
        defs[f"d{index}"] = {"anyOf": both}
    with pytest.raises(ToolError, match="more than 20000 parts"):
        check_tool(
            tool({"type": "object", "properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": defs})
        )


WEATHER = tool(
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 2},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"type": "string", "enum": ["c", "f"], "nullable": True},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
            "where": {
                "type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]
            },
            "free": {"type": "object"},
            "either": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/word"}]},
        },
        "required": ["city"],
        "$defs": {"word": {"const": "x"}},
    }
)  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Rome"},
        {"city": "Rome", "days": 3, "unit": "c", "tags": ["a"], "where": {"lat": 1}},
        {"city": "Rome", "days": 3.0, "unit": None, "free": {"any": 1}, "either": "x"},
    ],
)
def test_arguments_that_fit_have_no_problem(arguments: dict[str, Any]) -> None:
    assert validate_arguments(ToolCall("f", arguments), WEATHER) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "f lacks the required key 'city'"),
        ({"city": 5}, "f.city is 5, not of type string"),
        ({"city": "x"}, "f.city is 'x', outside minLength 2"),
        ({"city": "Rome", "days": True}, "f.days is True, not of type integer"),
        ({"city": "Rome", "days": 1.5}, "f.days is 1.5, not of type integer"),
        ({"city": "Rome", "days": 15}, "f.days is 15, outside maximum 14"),
        ({"city": "Rome", "unit": "k"}, "f.unit is 'k', not one of ['c', 'f']"),
        ({"city": "Rome", "tags": ["a", 1]}, "f.tags[1] is 1, not of type string"),
        (
            {"city": "Rome", "tags": ["a", "b", "c"]},
            "f.tags is ['a', 'b', 'c'], outside maxItems 2",
        ),
        ({"city": "Rome", "where": {}}, "f.where lacks the required key 'lat'"),
        ({"city": "Rome", "town": "x"}, "f has the unknown key 'town'; declared: 'city'"),
        ({"city": "Rome", "where": {"lat": 1, "x": 2}}, "f.where has the unknown key 'x'"),
        ({"city": "Rome", "either": "y"}, "f.either is 'y', which fits 0 branches of anyOf"),
    ],
)
def test_arguments_that_do_not_fit_are_told(arguments: dict[str, Any], message: str) -> None:
    (problem,) = validate_arguments(ToolCall("f", arguments), WEATHER)
    assert problem.kind == "invalid_arguments"
    assert problem.message.startswith(message)


def test_a_call_of_another_tool_is_told() -> None:
    (problem,) = validate_arguments(ToolCall("g", {}), WEATHER)
    assert (problem.kind, problem.message) == ("unknown_tool", "'g' was called, 'f' declared")
