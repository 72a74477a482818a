"""The tool loop: ask the model, run what it calls, hand it the results, until it calls no more.

Knows nothing of how the model is reached: anything with `chat` will do, in this process or behind
a network. What this is not: it neither prints nor asks for approval; the caller does, between
the steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemsmith.agent.tools import Toolbox
from gemsmith.errors import RequestError
from gemsmith.text.calls import Problem, ToolCall


class Turn(Protocol):
    """One reply of a model; `gemsmith.engine.Generation` is one."""

    @property
    def text(self) -> str: ...
    @property
    def tool_calls(self) -> Sequence[ToolCall]: ...
    @property
    def problems(self) -> Sequence[Problem]: ...
    @property
    def message(self) -> dict[str, Any]:
        """The reply as an assistant message."""
        ...


class ChatModel(Protocol):
    """Whatever answers a conversation."""

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> Turn: ...


@dataclass(frozen=True, slots=True)
class Step:
    """One reply and what its calls gave; the last step of a loop has no calls."""

    turn: Turn
    results: list[dict[str, Any]]
    """One entry a call, in the order of the calls."""


def run(
    model: ChatModel, messages: list[dict[str, Any]], toolbox: Toolbox, *, max_steps: int = 8
) -> Iterator[Step]:
    """Yield each step as it is done, and append it to `messages`, which the caller keeps.

    Ends after a reply without calls, which is the answer. A reply whose calls could not all be
    read still runs those that could; see `turn.problems`.

    Raises:
      RequestError: the model still calls tools after `max_steps` replies.
    """
    for _ in range(max_steps):
        turn = model.chat(messages, toolbox.declarations)
        results = [toolbox.run(call) for call in turn.tool_calls]
        message = turn.message
        if results:
            message["tool_responses"] = [
                {"name": call.name, "response": result}
                for call, result in zip(turn.tool_calls, results, strict=True)
            ]
        messages.append(message)
        yield Step(turn, results)
        if not results:
            return
    raise RequestError(
        f"the model still calls tools after {max_steps} replies; ask for less at once"
    )
