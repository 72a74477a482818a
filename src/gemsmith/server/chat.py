"""OpenAI's `/v1/chat/completions` and `/v1/completions`.

One `Choice` turns the events of a reply into deltas and, joined, into the message: streaming and
not streaming cannot differ. A tool call comes in one delta, whole. What looked like a call and
could not be read is never lost: its words are content, and `tool_problems` says what is wrong and
has it as it was written. A call that max_tokens cut is no call and no content; it is told there.
"""

import json
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from gemsmith.engine.reply import Event
from gemsmith.engine.request import Finished, TokenLogprob, Usage
from gemsmith.server.errors import refused
from gemsmith.server.protocol import ChatRequest, CompletionRequest, Message, NamedTool
from gemsmith.server.service import (
    Ask,
    Replies,
    Service,
    arguments_of,
    check_turns,
    dump,
    named,
    thinking,
)
from gemsmith.text.stream import Content, Thinking, ToolCallEvent, ToolProblem
from gemsmith.text.tokenizer import Tokenizer

Json = dict[str, Any]


def ask_of(request: ChatRequest) -> Ask:
    """A chat request in the engine's words.

    Raises:
      ApiError: something that cannot be served.
    """
    messages = [_message(index, message) for index, message in enumerate(request.messages)]
    check_turns(messages)
    template = request.chat_template_kwargs
    effort = request.reasoning_effort
    if effort is None and template is not None and template.enable_thinking is not None:
        effort = "max" if template.enable_thinking else "none"
    think, params = thinking(effort, request.thinking_budget)
    params |= request.sampling()
    if request.max_completion_tokens is not None:
        params["max_tokens"] = request.max_completion_tokens
    if request.top_logprobs is not None and not request.logprobs:
        raise refused("top_logprobs", "needs logprobs: true")
    if request.logprobs:
        params["logprobs"] = request.top_logprobs or 0
    choice = request.tool_choice
    return Ask(
        messages=messages,
        tools=[
            tool.model_dump(exclude={"function": {"strict"}}, exclude_none=True)
            for tool in request.tools
        ],
        tool_choice=named(choice.function.get("name")) if isinstance(choice, NamedTool) else choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=request.response_format,
        enable_thinking=think,
        preserve_thinking=template is not None and template.preserve_thinking,
        image_budget=request.mm_budget,
        params=params,
        n=request.n,
    )


def _message(index: int, message: Message) -> Json:
    made: Json = {"role": message.role, "content": message.content or ""}
    if message.role == "assistant":
        if isinstance(message.content, list):
            made["content"] = _said(index, message.content)
        if thought := message.reasoning_content or message.reasoning:
            made["reasoning"] = thought
        if message.tool_calls:
            made["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": arguments(
                            call.function.arguments, f"messages.{index}.tool_calls.{place}"
                        ),
                    },
                }
                for place, call in enumerate(message.tool_calls)
            ]
    elif message.tool_calls:
        raise refused(f"messages.{index}.tool_calls", "only an assistant message may have them")
    if message.role == "tool":
        made["tool_call_id"] = message.tool_call_id
    return made


def _said(index: int, parts: list[Json]) -> str:
    """Parts of an assistant's message as its text."""
    texts = [part.get(str(part.get("type"))) for part in parts]
    if not all(
        part.get("type") in ("text", "refusal") and isinstance(text, str)
        for part, text in zip(parts, texts, strict=True)
    ):
        raise refused(f"messages.{index}.content", "an assistant's parts must be text")
    return "".join(str(text) for text in texts)


def arguments(given: str | Mapping[str, Any], where: str) -> Json:
    """The arguments of an earlier call.

    Raises:
      ApiError: no JSON object.
    """
    if isinstance(given, Mapping):
        return dict(given)
    try:
        read = json.loads(given or "{}")
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise refused(f"{where}.function.arguments", "must be a JSON object, as text")
    return read


# -- replies ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Choice:
    """One reply as OpenAI has it."""

    tokenizer: Tokenizer
    message: Json = field(default_factory=lambda: {"role": "assistant", "content": None})
    finish_reason: str | None = None
    logprobs: Json | None = None
    usage: Usage | None = None

    def feed(self, event: Event) -> Json | None:
        """The delta that an event makes, added to the message; None if it makes none."""
        match event:
            case Thinking(text):
                delta: Json = {"reasoning_content": text}
            case Content(text):
                delta = {"content": text}
            case ToolCallEvent(call):
                entry = {
                    "id": f"call_{uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": arguments_of(call)},
                }
                calls = self.message.setdefault("tool_calls", [])
                calls.append(entry)
                return {"tool_calls": [{"index": len(calls) - 1, **entry}]}
            case ToolProblem(problem):
                told = {"kind": problem.kind, "message": problem.message, "raw": problem.raw}
                self.message.setdefault("tool_problems", []).append(told)
                delta = {"content": problem.text} if problem.text else {}
                self._add(delta)
                return {**delta, "tool_problems": [told]}
            case Finished():
                self.finish_reason, self.usage = event.finish_reason.value, event.usage
                if event.logprobs is not None:
                    self.logprobs = {
                        "content": [_logprob(p, self.tokenizer) for p in event.logprobs]
                    }
                if event.notes:
                    self.message["notes"] = list(event.notes)
                return None
        self._add(delta)
        return delta

    def _add(self, delta: Json) -> None:
        for name, text in delta.items():
            self.message[name] = (self.message.get(name) or "") + text


def _logprob(entry: TokenLogprob, tokenizer: Tokenizer) -> Json:
    """One token's. Thoughts and markers have theirs, too: an entry a token of the reply."""

    def told(id: int, logprob: float) -> Json:
        spelled = tokenizer.piece(id)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": max(logprob, -9999.0),  # JSON has no infinity
            "bytes": list(spelled),
        }

    top = [told(id, logprob) for id, logprob in entry.top]
    return {**told(entry.token_id, entry.logprob), "top_logprobs": top}


def usage_of(usages: list[Usage], prompts: int = 1) -> Json:
    """What a request cost. Replies to one prompt share it: it is counted once."""
    each = usages[:: max(1, len(usages) // prompts)]
    details = {"cached_tokens": sum(u.cached_tokens for u in each)}
    for kind in ("image", "audio", "video"):
        details[f"{kind}_tokens"] = sum(getattr(u, f"{kind}_tokens") for u in each)
    prompt = sum(u.prompt_tokens for u in each)
    completion = sum(u.completion_tokens for u in usages)
    thought = sum(u.thinking_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": details,
        "completion_tokens_details": {"reasoning_tokens": thought},
    }


async def chat(service: Service, replies: Replies) -> Json:
    """The whole answer."""
    choices = [Choice(service.lm.tokenizer) for _ in range(len(replies))]
    async for index, event in replies:
        choices[index].feed(event)
    return _head(service, "chat.completion", "chatcmpl") | {
        "choices": [
            {
                "index": index,
                "message": choice.message,
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_of([choice.usage for choice in choices if choice.usage]),
    }


async def chat_stream(
    service: Service, request: ChatRequest, replies: Replies
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    head = _head(service, "chat.completion.chunk", "chatcmpl")
    wants_usage = request.stream_options is not None and request.stream_options.include_usage
    choices = [Choice(service.lm.tokenizer) for _ in range(len(replies))]

    def chunk(index: int, delta: Json, reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": reason, **more}
        return data(head | {"choices": [choice]} | ({"usage": None} if wants_usage else {}))

    for index in range(len(choices)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in replies:
        choice = choices[index]
        delta = choice.feed(event)
        if delta is not None:
            yield chunk(index, delta)
            continue
        if choice.logprobs is not None:
            yield chunk(index, {}, logprobs=choice.logprobs)
        notes = {"notes": choice.message["notes"]} if "notes" in choice.message else {}
        yield chunk(index, notes, choice.finish_reason)
    if wants_usage:
        usages = [choice.usage for choice in choices if choice.usage]
        yield data(head | {"choices": [], "usage": usage_of(usages)})
    yield b"data: [DONE]\n\n"


# -- plain completions ------------------------------------------------------------------------


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, one or several.

    Raises:
      ApiError: none.
    """
    given: Any = request.prompt
    several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    prompts = given if several else [given]
    if not prompts or [] in prompts:
        raise refused("prompt", "is empty; give a text, token ids, or a list of either")
    return prompts


def completion_params(request: CompletionRequest) -> Json:
    """The sampling parameters that were given; OpenAI's default length is 16 tokens."""
    given = {"max_tokens": 16} | request.sampling()
    return given if request.logprobs is None else given | {"logprobs": request.logprobs}


async def completion(service: Service, replies: Replies) -> Json:
    """The whole answer."""
    texts = ["" for _ in range(len(replies))]
    ends: dict[int, Finished] = {}
    async for index, event in replies:
        if isinstance(event, Content):
            texts[index] += event.text
        elif isinstance(event, Finished):
            ends[index] = event
    return _head(service, "text_completion", "cmpl") | {
        "choices": [
            {
                "index": index,
                "text": text,
                "logprobs": _old_logprobs(ends[index], service.lm.tokenizer),
                "finish_reason": ends[index].finish_reason.value,
            }
            for index, text in enumerate(texts)
        ],
        "usage": usage_of([ends[i].usage for i in range(len(texts))], len(replies.prompts)),
    }


async def completion_stream(
    service: Service, request: CompletionRequest, replies: Replies
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    head = _head(service, "text_completion", "cmpl")
    wants_usage = request.stream_options is not None and request.stream_options.include_usage
    usages: dict[int, Usage] = {}
    async for index, event in replies:
        choice: Json = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        if isinstance(event, Content):
            choice["text"] = event.text
        elif isinstance(event, Finished):
            usages[index] = event.usage
            choice["logprobs"] = _old_logprobs(event, service.lm.tokenizer)
            choice["finish_reason"] = event.finish_reason.value
        yield data(head | {"choices": [choice]})
    if wants_usage:
        ordered = [usages[index] for index in sorted(usages)]
        yield data(head | {"choices": [], "usage": usage_of(ordered, len(replies.prompts))})
    yield b"data: [DONE]\n\n"


def _old_logprobs(finished: Finished, tokenizer: Tokenizer) -> Json | None:
    if finished.logprobs is None:
        return None
    entries = [_logprob(entry, tokenizer) for entry in finished.logprobs]
    offsets, at = [], 0
    for entry in entries:
        offsets.append(at)
        at += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
        ],
        "text_offset": offsets,
    }


def _head(service: Service, kind: str, prefix: str) -> Json:
    return {
        "id": f"{prefix}-{uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }


def data(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + dump(body) + b"\n\n"
