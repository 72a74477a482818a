"""The tool loop: calls are run, results go back, the conversation is kept."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest

from gemsmith.agent import loop
from gemsmith.agent.tools import Tool, Toolbox
from gemsmith.errors import RequestError
from gemsmith.text import chat
from gemsmith.text.calls import Problem, ToolCall

ECHO = Tool(
    name="echo",
    description="Say it again",
    parameters={"type": "object", "properties": {"text": {"type": "string"}}},
    run=lambda text: {"text": text},
)


@dataclass
class Reply:
    text: str = ""
    tool_calls: Sequence[ToolCall] = ()
    problems: Sequence[Problem] = ()

    @property
    def message(self) -> dict[str, Any]:
        calls = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in self.tool_calls
        ]
        return {"role": "assistant", "content": self.text} | (
            {"tool_calls": calls} if calls else {}
        )


@dataclass
class Scripted:
    """Gives its replies in order and keeps what it was asked."""

    replies: list[Reply]
    asked: list[Any] = field(default_factory=list)

    def chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> Reply:
        self.asked.append((deepcopy(list(messages)), list(tools)))
        return self.replies.pop(0)


def call(text: str) -> ToolCall:
    return ToolCall("echo", {"text": text})


def test_results_of_all_calls_go_back_before_the_next_reply():
    model = Scripted([Reply(tool_calls=[call("a"), call("b")]), Reply("done")])
    messages: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    steps = list(loop.run(model, messages, Toolbox([ECHO])))
    assert [step.results for step in steps] == [[{"text": "a"}, {"text": "b"}], []]
    assert model.asked[1][0][1]["tool_responses"] == [
        {"name": "echo", "response": {"text": "a"}},
        {"name": "echo", "response": {"text": "b"}},
    ]
    assert messages[-1] == {"role": "assistant", "content": "done"}


def test_the_conversation_renders_in_the_official_format():
    model = Scripted([Reply(tool_calls=[call("a")]), Reply("done")])
    messages: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    for _ in loop.run(model, messages, Toolbox([ECHO])):
        pass
    assert chat.render(messages, variant="edge") == (
        "<bos><|turn>user\ngo<turn|>\n<|turn>model\n"
        '<|tool_call>call:echo{text:<|"|>a<|"|>}<tool_call|>'
        '<|tool_response>response:echo{text:<|"|>a<|"|>}<tool_response|>'
        "done<turn|>\n"
    )


def test_a_model_that_never_stops_calling_is_stopped():
    model = Scripted([Reply(tool_calls=[call("a")]) for _ in range(9)])
    messages: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    with pytest.raises(RequestError, match="still calls tools after 3 replies"):
        list(loop.run(model, messages, Toolbox([ECHO]), max_steps=3))
    assert len(messages) == 4


def test_an_interrupted_reply_leaves_the_steps_before_it():
    class Interrupted(Scripted):
        def chat(self, messages: Any, tools: Any) -> Reply:
            if not self.replies:
                raise KeyboardInterrupt
            return super().chat(messages, tools)

    messages: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    with pytest.raises(KeyboardInterrupt):
        list(loop.run(Interrupted([Reply(tool_calls=[call("a")])]), messages, Toolbox([ECHO])))
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_a_failed_call_is_told_to_the_model():
    model = Scripted([Reply(tool_calls=[ToolCall("nothing", {})]), Reply("sorry")])
    messages: list[dict[str, Any]] = [{"role": "user", "content": "go"}]
    first, _ = loop.run(model, messages, Toolbox([ECHO]))
    assert first.results == [{"error": "no tool 'nothing'; there are echo"}]
