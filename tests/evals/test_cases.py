"""Files of conversations to compare on: what is read of them, and what is refused by line."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemsmith.errors import RequestError
from gemsmith.evals.cases import read_cases

ASK = [{"role": "user", "content": "How much?"}]
TOOL = {"type": "function", "function": {"name": "sine"}}
CALL = {"type": "function", "function": {"name": "sine", "arguments": {"x": 1}}}


def write(path: Path, *lines: Any) -> Path:
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def test_lines_are_read_as_openai_writes_them(tmp_path: Path) -> None:
    call = {**CALL, "function": {"name": "sine", "arguments": '{"x": 1}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"}
    path = write(
        tmp_path / "talks.jsonl",
        {"messages": ASK},
        "",
        {"messages": [*ASK, calling], "tools": [TOOL], "category": "calls"},
        {"messages": [*ASK, calling], "tools": [TOOL], "enable_thinking": True},
    )
    plain, called, thought = read_cases(path)
    assert (plain.category, plain.messages, plain.reply, plain.tools) == ("talks", ASK, None, None)
    assert plain.where == f"{path}:1"
    assert (called.where, called.category, called.messages) == (f"{path}:3", "calls", ASK)
    assert called.expected == {"type": "calls", "calls": [CALL["function"]]}
    assert called.reply == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert thought.reply is not None
    assert thought.reply["reasoning"] == "hm"


def test_a_limit_is_of_each_category(tmp_path: Path) -> None:
    lines = [{"messages": ASK, "category": c} for c in "abaab"]
    path = write(tmp_path / "talks.jsonl", *lines)
    assert [c.where[-1] for c in read_cases(path, limit=2)] == ["1", "2", "3", "5"]
    with pytest.raises(RequestError, match="limit 0: at least one item"):
        read_cases(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([1], 'talks.jsonl:2: must be an object with "messages", not list'),
        ({"prompt": "x"}, 'talks.jsonl:2: needs "messages": a list of objects'),
        ({"messages": ["x"]}, 'talks.jsonl:2: needs "messages": a list of objects'),
        ({"messages": ASK, "tools": {}}, 'talks.jsonl:2: "tools" must be a list'),
        ({"messages": ASK, "tools": [1]}, "talks.jsonl:2: a tool must look like"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]},
            'talks.jsonl:2: a tool call needs a "function"',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": 7}]},
            'talks.jsonl:2: "tool_calls" must be a list',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"function": {"name": "sine", "arguments": "{x}"}}]}]},
            "talks.jsonl:2: the arguments of 'sine' are no JSON",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [
                {"function": {"name": "sine", "arguments": "[1]"}}]}]},
            "talks.jsonl:2: the arguments of 'sine' must be an object",
        ),
    ],
)  # fmt: skip
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "talks.jsonl", {"messages": ASK}, line)
    with pytest.raises(RequestError, match=message):
        read_cases(path)


def test_files_without_lines_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(RequestError, match=r"empty.jsonl is empty; give at least one conversation"):
        read_cases(empty)
    with pytest.raises(RequestError, match=r"gone.jsonl does not exist"):
        read_cases(tmp_path / "gone.jsonl")
