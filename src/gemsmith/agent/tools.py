"""Tools that run: what the model is told of a function, and the function.

A tool's failure is the model's to read, not the program's to die of: unknown names, arguments
against the schema and errors of the function come back as {"error": text}. What this is not: it
neither parses calls (see text.calls) nor talks to a model (see `loop`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from gemsmith.errors import ToolError
from gemsmith.text.calls import ToolCall
from gemsmith.text.tools import check_tool, validate_arguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    run: Callable[..., Mapping[str, Any]]
    """Takes the arguments by keyword; returns what the model is to read."""

    @property
    def declaration(self) -> dict[str, Any]:
        """The tool in OpenAI's shape, as `generate(tools=...)` takes it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}


class Toolbox:
    """Tools by name."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        """Raises ToolError: a name given twice, or a schema that cannot be declared."""
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise ToolError(f"two tools are called {tool.name!r}; give each its own name")
            check_tool(tool.declaration)
            self.tools[tool.name] = tool

    @property
    def declarations(self) -> list[dict[str, Any]]:
        return [tool.declaration for tool in self.tools.values()]

    def run(self, call: ToolCall) -> dict[str, Any]:
        """The result of a call, or {"error": text} with what the model can put right."""
        tool = self.tools.get(call.name)
        if tool is None:
            near = get_close_matches(call.name, self.tools, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(self.tools)}"
            return {"error": f"no tool {call.name!r}; {hint}"}
        problems = validate_arguments(call, tool.declaration)
        if problems:
            return {"error": "; ".join(problem.message for problem in problems)}
        try:
            return dict(tool.run(**call.arguments))
        except (ValueError, OSError, ArithmeticError, LookupError) as error:
            return {"error": str(error) or type(error).__name__}
