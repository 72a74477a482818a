"""Grammars of calls and answers, walked byte by byte: no model, no vocabulary."""

import json
import re
import time
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gemsmith.errors import RequestError, ToolError
from gemsmith.testing import random_tool
from gemsmith.text import lark
from gemsmith.text.calls import CALL_CLOSE, CALL_OPEN, QUOTE, parse_calls
from gemsmith.text.grammar import call_grammar, chosen_tools, response_grammar
from gemsmith.text.tokenizer import SpecialIds
from gemsmith.text.tools import call_parts, validate_arguments

BYTES = SpecialIds(quote=256, tool_call_close=257)
"""Ids of the markers beside the 256 bytes."""


def tool(parameters: dict[str, Any] | None, **function: Any) -> dict[str, Any]:
    declared = {"name": "t", "description": "", "parameters": parameters, **function}
    return {"type": "function", "function": declared}


def of(schema: dict[str, Any], **root: Any) -> dict[str, Any]:
    """A tool whose one required argument `a` has a schema."""
    return tool({"type": "object", "properties": {"a": schema}, "required": ["a"], **root})


def matcher(*tools: dict[str, Any]) -> Any:
    made = lark.matcher(lark.byte_vocabulary(), call_grammar(list(tools), BYTES))
    assert not made.is_error(), made.get_error()
    return made


def ids_of(text: str) -> list[int]:
    """Bytes, the two markers as ids of their own."""
    ids: list[int] = []
    for piece in re.split(f"({re.escape(QUOTE)}|{re.escape(CALL_CLOSE)})", text):
        ids += {QUOTE: [256], CALL_CLOSE: [257]}.get(piece) or piece.encode()
    return ids


def accepts(made: Any, text: str) -> bool:
    """Whether `text`, what stands behind `<|tool_call>`, is a whole call."""
    ids = ids_of(text)
    walked = made.deep_copy()
    return walked.try_consume_tokens(ids) == len(ids) and walked.is_accepting()


def walk(made: Any, random: Random, most: int = 600) -> str | None:
    """A call drawn from a grammar, ready to close what is open; None if it has no end in time."""
    walked, ids = made.deep_copy(), []
    while len(ids) < most:
        bits = walked.compute_bitmask()
        may = [id for id in range(258) if bits[id // 8] >> id % 8 & 1]
        assert may, "the grammar leads nowhere"
        closing = [id for id in may if id in (*b"}],", 256, 257)]
        id = random.choice(closing if closing and random.random() < 0.5 else may)
        assert walked.consume_token(id)
        ids.append(id)
        if id == 257:
            marks = {256: QUOTE.encode(), 257: CALL_CLOSE.encode()}
            return CALL_OPEN + b"".join(marks.get(i) or bytes([i]) for i in ids).decode()
    return None


# -- every call that comes out ----------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False), seed=st.integers(0, 2**32))
def test_every_call_let_through_parses_and_fits_its_schema(random, seed):
    declared = random_tool(random)
    text = walk(matcher(declared), Random(seed))
    if text is None:
        return
    found = parse_calls(text)
    assert [call.name for call in found.calls] == ["use_it"]
    # Keys that no schema names may come twice; nothing else is wrong with the text.
    assert {problem.kind for problem in found.problems} <= {"duplicate_key"}
    arguments = found.calls[0].arguments
    Draft202012Validator(declared["function"]["parameters"]).validate(arguments)
    assert validate_arguments(found.calls[0], declared) == []


def test_a_call_is_let_through_as_the_history_writes_it():
    declared = tool(
        {
            "type": "object",
            "properties": {
                "zoom": {"type": "number"},
                "City": {"type": "string"},
                "at": {"type": "object", "properties": {"y": {"type": "integer"}, "x": {}}},
                "days": {"type": "array", "items": {"type": "integer"}},
                "ok": {"type": "boolean"},
                "none": {"type": "null"},
            },
        }
    )
    arguments = {
        "zoom": -2.5,
        "City": 'a "b" {c}\n<d> é',
        "at": {"x": [{"k": 1e-07}], "y": 0},
        "days": [1, -20],
        "ok": True,
        "none": None,
    }
    made = matcher(declared)
    for some in (arguments, {}, {"ok": False}, {"days": [], "zoom": 3}):
        text = "".join(part for part, _ in call_parts("t", some)).removeprefix(CALL_OPEN)
        assert accepts(made, text), text
    assert not accepts(made, f"call:t{{ok:true,days:[]}}{CALL_CLOSE}")  # not sorted
    assert not accepts(made, f"call:t{{ok: true}}{CALL_CLOSE}")  # a space


Q = QUOTE
CASES = [
    ({"type": "string"}, [f"{Q}{Q}", f"{Q}<|tool_cal{Q}", f"{Q}}},a:{Q}"], ["x", "1", '"x"']),
    ({"type": "string"}, [], [f"{Q}<|tool_call>{Q}", f"{Q}a{Q}{Q}", "null"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, [f"{Q}éé{Q}"], [f"{Q}é{Q}", f"{Q}abcd{Q}"],
    ),
    ({"type": "string", "format": "date"}, [f"{Q}2024-02-29{Q}"], [f"{Q}2024-13-01{Q}"]),
    ({"type": "string", "nullable": True}, [f"{Q}x{Q}", "null"], ["1"]),
    ({"type": ["integer", "null"]}, ["0", "-7", "null"], ["07", "1.0", "+1", "1" * 19, "true"]),
    ({"type": "number"}, ["0.5", "-3", "2e10", "1.5E-3"], [".5", "1.", "1e400", "NaN"]),
    ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12}, ["3", "11"], ["2", "12", "100"]),
    ({"type": "integer", "minimum": 5}, ["5", "99999"], ["4", "-5"]),
    ({"type": "number", "exclusiveMinimum": 0}, ["0.1", "7"], ["0", "0.0", "-1"]),
    ({"type": "integer", "minimum": 0, "maximum": 50, "multipleOf": 7}, ["0", "49"], ["48", "56"]),
    ({"type": "boolean"}, ["true", "false"], ["True", "1"]),
    ({"enum": ["a", "ab", 1, None, ""]}, [f"{Q}ab{Q}", f"{Q}{Q}", "1", "null"], [f"{Q}b{Q}", "11"]),
    ({"type": "integer", "enum": [1, "a", 2.5]}, ["1"], [f"{Q}a{Q}", "2.5"]),
    ({"const": {"b": [1, "x"], "A": True}}, [f"{{A:true,b:[1,{Q}x{Q}]}}"], ["{}"]),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, [f"{Q}1{Q}", "1"], ["1.5", "null"]),
    ({"type": "integer", "anyOf": [{"minimum": 9}, {"maximum": 1}]}, ["9", "1"], ["5"]),
    ({"allOf": [{"type": "integer"}, {"minimum": 2}, {"maximum": 3}]}, ["2", "3"], ["1", "4"]),
    ({"type": "integer", "minimum": 2, "maximum": 9, "allOf": [{"minimum": 5, "maximum": 7}]},
     ["5", "7"], ["4", "8", "2", "9"]),
    ({"oneOf": [{"type": "string"}, {"const": 4}]}, [f"{Q}{Q}", "4"], ["5"]),
    ({"$ref": "#/$defs/D", "minimum": 5}, ["5"], ["4", f"{Q}5{Q}"]),
    ({"type": "array", "items": {"type": "null"}}, ["[]", "[null,null]"], ["[null,]", "[1]"]),
    ({"type": "array", "items": {"const": 1}, "minItems": 1, "maxItems": 2}, ["[1]", "[1,1]"],
     ["[]", "[1,1,1]"]),
    ({"type": "array", "items": {"const": 1}, "maxItems": 0}, ["[]"], ["[1]"]),
    ({"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 1},
     ["[3,1]", "[2]", "[1,2,3]"], ["[]", "[1,1]", "[1,2,1]"]),
    ({"type": "object"}, ["{}", f"{{k:{Q}v{Q},x:[1]}}"], ["{:1}", f"{{{Q}k{Q}:1}}"]),
    ({"type": "object", "properties": {"b": {"const": 1}, "A": {"const": 2}}, "required": ["b"]},
     ["{A:2,b:1}", "{b:1}"], ["{A:2}", "{b:1,A:2}", "{b:1,c:3}", "{A:2,b:1,}"]),
    ({"properties": {"b": {"const": 1}}, "additionalProperties": {"type": "null"}},
     ["{}", "{b:1}", "{b:1,c:null}", "{bb:null}"], ["{b:null}", "{c:1}", "{c:null,b:1}"]),
    ({"type": "object", "properties": {"x": {"const": 1}, "y": {"const": 1}, "z": {"const": 1}},
      "minProperties": 1, "maxProperties": 2}, ["{x:1}", "{y:1,z:1}"], ["{}", "{x:1,y:1,z:1}"]),
    ({"type": "object", "additionalProperties": {"const": 1}, "minProperties": 2},
     ["{p:1,q:1}", "{p:1,q:1,r:1}"], ["{}", "{p:1}"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES)
def test_values_that_fit_are_let_through_and_no_others(schema, good, bad):
    made = matcher(of(schema, **{"$defs": {"D": {"type": "integer"}}}))
    for value in good:
        assert accepts(made, f"call:t{{a:{value}}}{CALL_CLOSE}"), value
    for value in bad:
        assert not accepts(made, f"call:t{{a:{value}}}{CALL_CLOSE}"), value


PATTERNS = ["^a+$", "b", "^b", "c$", "^a|c$", r"^\d{2}\s\w$", r"^[^/|]+/x$", r"\$$", "(^a)?b", "^$"]
TEXTS = ["", "a", "aa", "ab", "abc", "c", "xc", "12 _", "a/x", "cost $", "b", "b\nc", "é/x", "12 é"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_read_as_json_schema_reads_it(pattern):
    try:
        made = matcher(of({"type": "string", "pattern": pattern}))
    except ToolError:
        assert pattern == "(^a)?b"  # an anchor inside a group
        return
    for text in TEXTS:
        # ASCII, as ECMA-262 has it; and $ is the very end, which re's also finds before a newline
        fits = re.search(pattern.replace("$", r"\Z") if pattern != r"\$$" else r"\$\Z", text, re.A)
        assert accepts(made, f"call:t{{a:{Q}{text}{Q}}}{CALL_CLOSE}") == bool(fits), text


def test_of_several_tools_each_has_its_own_arguments():
    made = matcher(of({"const": 1}), tool(None, name="t.2"))
    assert accepts(made, f"call:t{{a:1}}{CALL_CLOSE}")
    assert accepts(made, f"call:t.2{{}}{CALL_CLOSE}")
    assert not accepts(made, f"call:t.2{{a:1}}{CALL_CLOSE}")
    assert not accepts(made, f"call:t.3{{}}{CALL_CLOSE}")


def test_a_tool_that_is_not_strict_is_held_to_the_syntax_alone():
    recursive = {"$ref": "#"}
    made = matcher(tool({"type": "object", "properties": {"a": recursive}}, strict=False))
    assert accepts(made, f"call:t{{any:[{{x:1}}],{'b'}:{Q}{Q}}}{CALL_CLOSE}")
    assert not accepts(made, f"call:t{{a:}}{CALL_CLOSE}")


# -- what cannot be held to -------------------------------------------------------------------

REFUSED = [
    ({"type": "string", "pattern": "^(?=a)b"}, r"parameters.a: the pattern .* look-ahead"),
    ({"type": "string", "pattern": r"(a)\1"}, r"parameters.a: the pattern .* backreferences"),
    ({"type": "string", "pattern": 5}, "'pattern' is 5, no text"),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "'uniqueItems' can be"),
    ({"type": "array", "items": {"enum": list(range(65))}, "uniqueItems": True}, "over 65 values"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "branches 0 and 1 of 'oneOf' may both"),
    (
        {"type": "object", "properties": {"x:y": {}}},
        "parameters.a: the key 'x:y' cannot be written",
    ),
    ({"type": "object", "properties": {" x": {}}}, "the key ' x' cannot be written"),
    ({"type": "object", "properties": {"x": {}}, "required": ["y"]}, "the required key 'y' is not"),
    ({"const": 'a <|"|> b'}, "the listed value .* holds a marker"),
    ({"enum": [float("inf")]}, "the listed value inf is not JSON"),
    ({"type": "string", "minLength": -1}, "'minLength' is -1 but must be a whole number"),
    ({"type": "string", "minLength": 2_000_000}, "'minLength' is 2000000; at most 1000000"),
    ({"type": "number", "multipleOf": 0}, "'multipleOf' is 0, not above 0"),
    (
        {"type": "integer", "minimum": 5, "maximum": 6, "multipleOf": 7},
        "its numbers cannot be held",
    ),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "parameters: no arguments fit"),
    ({"type": "string", "pattern": "^a$", "minLength": 3}, "parameters: no arguments fit"),
    ({"patternProperties": {}}, "parameters.a: the schema keyword 'patternProperties' is not"),
    ({"$ref": "#"}, "leads back to itself"),
    ({"allOf": [{"anyOf": [{"minimum": i}, {"maximum": i}]} for i in range(9)]}, "more than 256"),
    ({"allOf": [{"multipleOf": 0.5}, {"multipleOf": 2}]}, "two values of 'multipleOf' meet"),
    ({"type": "array", "items": {"type": "null"}, "minItems": 10**6}, "cannot be held to: .*items"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_what_no_grammar_holds_is_refused_with_its_place(schema, message):
    with pytest.raises(ToolError, match=message) as refused:
        call_grammar([of(schema)], BYTES)
    assert "tool 't', " in str(refused.value)
    assert "'strict': False" in str(refused.value)
    call_grammar([tool(of(schema)["function"]["parameters"], strict=False)], BYTES)


def test_names_that_no_call_can_hold_are_refused():
    message = r"the tool's name 'a b' cannot be written in a call; use .* and _ \. - / : \$ @$"
    for choice in ("none", "auto", "required", "t"):
        with pytest.raises(ToolError, match=message):
            chosen_tools([tool(None), tool(None, name="a b")], choice)
    with pytest.raises(ToolError, match=message):
        call_grammar([tool(None, name="a b")], BYTES)
    with pytest.raises(ToolError, match="two tools are called 't'"):
        call_grammar([tool(None), tool(None)], BYTES)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubled(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


HOSTILE = {
    "deep": nested(60),
    "doubling": doubled(40),
    "huge enum": {"enum": [f"value {i}" for i in range(30_000)]},
    "catastrophic": {"type": "string", "pattern": "^(a+)+$"},
    "states": {"type": "string", "pattern": "(a|b)*a(a|b){60}c"},
    "repeats": {"type": "string", "pattern": "^((a{100}){100}){100}$"},
    "long": {"type": "string", "minLength": 900_000, "maxLength": 999_999},
    "many": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(800)}},
    "counted": {
        "type": "object",
        "properties": {f"p{i}": {"type": "null"} for i in range(1000)},
        "minProperties": 500,
    },
    "lists": {"type": "array", "minItems": 2000, "items": {"type": "array", "minItems": 2000}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_compiled_or_refused_in_bounded_time(name):
    started = time.process_time()
    with suppress(ToolError):
        walk(matcher(of(HOSTILE[name])), Random(1), most=40)
    assert time.process_time() - started < 10


# -- what is asked ----------------------------------------------------------------------------

TOOLS = [tool(None), tool(None, name="other")]


def test_the_choice_says_which_tools_may_and_whether_one_must():
    assert chosen_tools(TOOLS, "auto") == (TOOLS, False)
    assert chosen_tools(TOOLS, "none") == ([], False)
    assert chosen_tools(None, "auto") == ([], False)
    assert chosen_tools(TOOLS, "required") == (TOOLS, True)
    assert chosen_tools(TOOLS, "other") == (TOOLS[1:], True)
    named = {"type": "function", "function": {"name": "other"}}
    assert chosen_tools(TOOLS, named) == (TOOLS[1:], True)


@pytest.mark.parametrize("choice", ["any", {"type": "function"}, {"function": {"name": 3}}, 7])
def test_an_unknown_choice_is_refused_with_the_names(choice):
    with pytest.raises(ToolError, match=r"tool_choice .*must be auto, required, none, .*t, other"):
        chosen_tools(TOOLS, choice)


def test_a_call_cannot_be_required_without_tools():
    with pytest.raises(ToolError, match="tool_choice 'required' needs a tool to call"):
        chosen_tools([], "required")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("json", "response_format 'json': its 'type' must be"),
        ({"type": "xml"}, "its 'type' must be text, json_object, json_schema, regex or lark"),
        ({"type": "json_schema"}, "json_schema needs a schema, a mapping"),
        ({"type": "json_schema", "schema": {"type": "strin"}}, "json_schema cannot be held to: "),
        ({"type": "json_schema", "schema": {"not": {}}}, "json_schema cannot be held to: .*not"),
        ({"type": "json_schema", "schema": {"const": float("nan")}}, "the schema is no JSON"),
        ({"type": "regex", "pattern": ""}, "regex needs a 'pattern' of 1 to 10000 characters"),
        ({"type": "regex", "pattern": "(?=a)"}, "regex cannot be held to: look-around"),
        ({"type": "lark", "grammar": "start: x"}, "lark cannot be held to: .*x"),
        ({"type": "lark", "grammar": None}, "lark needs a 'grammar', a text"),
    ],
)
def test_a_format_that_cannot_be_held_to_is_refused(asked, message):
    with pytest.raises(RequestError, match=message):
        response_grammar(asked)


@pytest.mark.parametrize("indent", [None, 1, 2, 4, "\t"])
def test_json_may_be_indented_and_has_no_more_space_than_that(indent):
    made = response_grammar({"type": "json_object"})
    assert made is not None
    value = {"a": [1, {"b": [{"c": [[], {}]}]}], "d": "x"}
    for text, fits in (
        (json.dumps(value, indent=indent), True),
        (json.dumps(value, indent=indent, separators=(",", ":")), True),
        ('{"a":  1}', False),
        ('{"a":\n\n1}', False),
        (f'{{"a":\n{" " * 25}1}}', False),
        ('{"a": 1 } ', False),
    ):
        held = lark.matcher(lark.byte_vocabulary(), made)
        taken = held.try_consume_tokens(list(text.encode()))
        assert (taken == len(text) and held.is_accepting()) == fits, text


def test_any_text_needs_no_grammar():
    assert response_grammar(None) is None
    assert response_grammar({"type": "text"}) is None
