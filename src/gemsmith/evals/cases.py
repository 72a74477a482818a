"""Conversations on which two builds of a model are compared: pocket's items, or a file's."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemsmith.engine.engine import LM
from gemsmith.errors import GemsmithError, RequestError
from gemsmith.evals.items import held_out
from gemsmith.evals.lines import read_lines
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.text.tools import check_tool
from gemsmith.weights.hub import POCKET, resolve


@dataclass(frozen=True, slots=True)
class Case:
    """One conversation to compare on."""

    where: str
    """How an error names it: an item's id, or file and line."""
    category: str
    messages: list[dict[str, Any]]
    """Up to the reply, which is not among them."""
    tools: list[dict[str, Any]] | None = None
    enable_thinking: bool = False
    reply: dict[str, Any] | None = None
    """The assistant message to follow; None: what the reference says."""
    expected: dict[str, Any] | None = None
    """As `Item.expected`; None: it is not known what is right."""


def pocket_cases(a: LM, b: LM, limit: int | None = None) -> list[Case]:
    """The held-out items that both builds can be asked; at most `limit` of each category.

    Raises:
      RequestError: the vocabulary is not pocket's.
    """
    if difference(a.tokenizer, Tokenizer.load(resolve(POCKET))) is not None:
        raise RequestError(
            f"{a.name} has another vocabulary than pocket, and the items that come with gemsmith "
            'are pocket\'s; give --data FILE.jsonl, a line each: {"messages": [...], "tools": '
            "[...]} in OpenAI's shape, with or without the last assistant message"
        )
    items = min((held_out(lm.config)[0] for lm in (a, b)), key=len)
    cases = [
        Case(
            f"item {item.id}",
            item.category,
            item.messages,
            item.tools,
            item.enable_thinking,
            expected=item.expected,
        )
        for item in items
        if item.expected["type"] != "reading"  # longer than can be heard in one prompt
    ]
    return _limited(cases, limit)


def read_cases(path: str | Path, limit: int | None = None) -> list[Case]:
    """Conversations of a JSON-lines file; at most the first `limit` of each category.

    A line is an object with `messages` (OpenAI's; arguments of calls as objects or JSON text) and,
    if it likes, `tools`, `category` (by default that of all: the file's name) and
    `enable_thinking`. A last message of the assistant is the reply to follow; if it calls tools,
    the same calls are what is right. Empty lines are passed over.

    Raises:
      RequestError: no such file, no line in it, or one that is no conversation, by its number.
    """
    lines = read_lines(path, option="--data", kind="conversation")
    return _limited([_case(data, where, Path(path).stem) for where, data in lines], limit)


def _case(data: Any, where: str, category: str) -> Case:
    def bad(what: str) -> RequestError:
        return RequestError(f"{where}: {what}")

    if not isinstance(data, dict):
        raise bad(f'must be an object with "messages", not {type(data).__name__}')
    messages, tools = data.get("messages"), data.get("tools")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise bad('needs "messages": a list of objects with "role" and "content"')
    if not isinstance(tools, list | None):
        raise bad('"tools" must be a list')
    try:
        messages = [_with_decoded_calls(message) for message in messages]
        for tool in tools or ():
            check_tool(tool)
    except (GemsmithError, ValueError) as error:
        raise bad(str(error)) from None
    *prompt, last = messages or [{}]
    reply = last if last.get("role") in ("assistant", "model") else None
    thinking = data.get("enable_thinking", False) is True
    if reply is not None and not thinking:
        # A thought that was not asked for has no place in the prompt's format.
        reply = {k: v for k, v in reply.items() if k not in ("reasoning", "reasoning_content")}
    calls = [call["function"] for call in (reply or {}).get("tool_calls") or ()]
    return Case(
        where,
        str(data.get("category", category)),
        messages if reply is None else prompt,
        tools or None,
        thinking,
        reply,
        {"type": "calls", "calls": calls} if calls else None,
    )


def _with_decoded_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError('"tool_calls" must be a list')
    if not calls:
        return message
    decoded: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('a tool call needs a "function" with a "name" and "arguments"')
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                name = function["name"]
                raise ValueError(f"the arguments of {name!r} are no JSON ({error})") from None
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {function['name']!r} must be an object")
        function = {"name": function["name"], "arguments": arguments}
        decoded.append({**call, "function": function})
    return {**message, "tool_calls": decoded}


def _limited(cases: Sequence[Case], limit: int | None) -> list[Case]:
    if limit is None:
        return list(cases)
    if limit < 1:
        raise RequestError(f"limit {limit}: at least one item of each category has to be asked")
    seen: Counter[str] = Counter()
    kept: list[Case] = []
    for case in cases:
        seen[case.category] += 1
        if seen[case.category] <= limit:
            kept.append(case)
    return kept


def difference(a: Tokenizer, b: Tokenizer) -> str | None:
    """The first in which two vocabularies differ; None if they are the same."""
    if a.vocab_size != b.vocab_size:
        return f"{a.vocab_size} and {b.vocab_size} tokens"
    for id in range(a.vocab_size):
        if a.token(id) != b.token(id):
            return f"token {id} is {a.token(id)!r} and {b.token(id)!r}"
    return None
