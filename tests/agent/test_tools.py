"""Tools that run: results, and failures as something the model can read."""

from typing import Any

import pytest

from gemsmith.agent.tools import Tool, Toolbox
from gemsmith.errors import ToolError
from gemsmith.text.calls import ToolCall

NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}


def divide(a: int, b: int) -> dict[str, Any]:
    return {"result": a // b}


DIVIDE = Tool(name="divide", description="Divide", parameters=NUMBERS, run=divide)


def result(name: str, **arguments: Any) -> dict[str, Any]:
    return Toolbox([DIVIDE]).run(ToolCall(name, arguments))


def test_a_call_runs_the_function_with_its_arguments():
    assert result("divide", a=7, b=2) == {"result": 3}


def test_a_declaration_is_openais_shape():
    function = {"name": "divide", "description": "Divide", "parameters": NUMBERS}
    assert Toolbox([DIVIDE]).declarations == [{"type": "function", "function": function}]


def test_an_unknown_name_names_the_near_one():
    assert result("divides", a=1, b=1) == {"error": "no tool 'divides'; did you mean divide?"}


def test_an_unknown_name_lists_the_tools_when_none_is_near():
    assert result("xyz") == {"error": "no tool 'xyz'; there are divide"}


def test_arguments_against_the_schema_do_not_reach_the_function():
    assert "'b'" in result("divide", a=1)["error"]
    assert "integer" in result("divide", a=1, b="2")["error"]


def test_an_error_of_the_function_is_a_result():
    assert result("divide", a=1, b=0) == {"error": "integer division or modulo by zero"}


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ToolError, match="two tools are called 'divide'"):
        Toolbox([DIVIDE, DIVIDE])


def test_a_schema_that_cannot_be_declared_is_refused():
    bad = Tool(name="bad", description="", parameters={"type": "string"}, run=divide)
    with pytest.raises(ToolError, match="parameters need 'type': 'object'"):
        Toolbox([bad])
