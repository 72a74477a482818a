"""Anthropic's `/v1/messages` and `/v1/messages/count_tokens`.

`Writer` turns the events of a reply into the events of the stream and, joined, into the message:
streaming and not streaming cannot differ. Thoughts are blocks without a signature; they may be sent
back as they came. Cache marks are accepted: prefixes are found without them.
"""

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field

from gemsmith.engine.reply import Event
from gemsmith.engine.request import Finished, FinishReason
from gemsmith.server.errors import refused
from gemsmith.server.protocol import Ignored, Lenient, Strict, checked, only
from gemsmith.server.service import (
    Ask,
    Replies,
    Service,
    check_turns,
    dump,
    named,
    thinking,
)
from gemsmith.text.stream import Content, Thinking, ToolCallEvent, ToolProblem

Json = dict[str, Any]
PING = b'event: ping\ndata: {"type": "ping"}\n\n'


def _no_servers(value: Any) -> Any:
    if value:
        raise ValueError("nothing but the client's own tools can be called here; leave it out")
    return value


def _only_thoughts(value: Any) -> Any:
    """Thoughts of earlier turns are never shown to the model: clearing them asks for nothing."""
    edits = value.get("edits", []) if isinstance(value, dict) else None
    edits = edits if isinstance(edits, list) else [edits]
    kinds = [edit.get("type") if isinstance(edit, dict) else None for edit in edits]
    if other := [kind for kind in kinds if not str(kind).startswith("clear_thinking")]:
        raise ValueError(f"{other[0]!r} cannot be done here; leave it out")
    return value


_CLEARING = {
    "type": ["object", "null"],
    "properties": {
        "edits": {
            "type": "array",
            "items": {"properties": {"type": {"pattern": "^clear_thinking"}}, "required": ["type"]},
        }
    },
}


class Turn(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | list[Json]


class Tool(Lenient):
    name: str
    type: Literal["custom"] = "custom"
    description: str | None = None
    input_schema: Json


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingOptions(Lenient):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputConfig(Strict):
    effort: str | None = None
    format: Json | None = None


class CountRequest(Strict):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: list[Turn]
    system: str | list[Json] | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    mm_budget: int | Literal["auto"] | None = None
    mcp_servers: Annotated[Any, checked(_no_servers, enum=[[], None])] = None
    context_management: Annotated[Any, checked(_only_thoughts, **_CLEARING)] = None
    cache_control: Ignored = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False
    metadata: Ignored = None
    service_tier: Annotated[str | None, only("auto", "standard_only")] = None
    container: Annotated[Any, checked(_no_servers, enum=[None])] = None


def ask_of(request: CountRequest) -> Ask:
    """A request in the engine's words.

    Raises:
      ApiError: something that cannot be served.
    """
    messages: list[Json] = []
    if request.system:
        messages.append({"role": "system", "content": _texts(request.system, "system")})
    for index, turn in enumerate(request.messages):
        messages += _turn(turn, f"messages.{index}.content")
    check_turns(messages)
    options, output = request.thinking, request.output_config or OutputConfig()
    effort, budget = output.effort, None
    if options is not None:
        budget = options.budget_tokens
        if options.type == "disabled":
            effort, budget = "none", None
        elif effort is None:
            effort = "max" if budget is None else None
    elif effort is not None:
        effort = "none"  # how hard to think matters where thinking is asked for
    think, params = thinking(effort, budget)
    if isinstance(request, MessagesRequest):
        given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k")}
        given |= {"max_tokens": request.max_tokens, "stop": request.stop_sequences}
        params |= {name: value for name, value in given.items() if value is not None}
    choice = request.tool_choice or ToolChoice(type="auto")
    wanted: Any = {"any": "required", "tool": named(choice.name)}.get(choice.type, choice.type)
    return Ask(
        messages=messages,
        tools=[_tool(tool) for tool in request.tools],
        tool_choice=wanted,
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        response_format=output.format,
        enable_thinking=think,
        image_budget=request.mm_budget,
        params=params,
    )


def _tool(tool: Tool) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _texts(content: str | list[Json], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = [block.get("text") for block in content if block.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise refused(where, "must be text, or blocks of text")
    return "\n".join(str(text) for text in texts)


def _turn(turn: Turn, where: str) -> Iterator[Json]:
    """One turn as OpenAI's messages: results of tools are messages of their own there."""
    if turn.role == "system" or isinstance(turn.content, str):
        yield {"role": turn.role, "content": _texts(turn.content, where)}
        return
    parts: list[Json] = []
    calls: list[Json] = []
    thoughts: list[str] = []
    for place, block in enumerate(turn.content):
        here = f"{where}.{place}"
        kind = block.get("type")
        if kind == "tool_result" and turn.role == "user":
            if parts:
                raise refused(here, "results of tools come before everything else in a turn")
            yield _result(block, here)
        elif kind == "tool_use" and turn.role == "assistant":
            if not isinstance(block.get("id"), str) or not isinstance(block.get("name"), str):
                raise refused(here, "must have an id, a name and an input")
            if not isinstance(given := block.get("input", {}), dict):
                raise refused(f"{here}.input", "must be an object")
            function = {"name": block["name"], "arguments": given}
            calls.append({"id": block["id"], "type": "function", "function": function})
        elif kind == "thinking" and turn.role == "assistant":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "redacted_thinking" and turn.role == "assistant":
            continue  # another model's, unreadable
        elif kind == "image" and turn.role == "user":
            parts.append(_image(block, here))
        elif kind == "text" and isinstance(block.get("text"), str):
            parts.append({"type": "text", "text": block["text"]})
        else:
            raise refused(here, f"a block of type {kind!r} cannot be read in a {turn.role} turn")
    if turn.role == "user":
        if parts or not turn.content:
            yield {"role": "user", "content": parts}
        return
    made: Json = {"role": "assistant", "content": "".join(part["text"] for part in parts)}
    if any(thoughts):
        made["reasoning"] = "\n".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    yield made


def _result(block: Json, where: str) -> Json:
    content = block.get("content") or ""
    if isinstance(content, list):
        content = [
            _image(part, f"{where}.content") if part.get("type") == "image" else part
            for part in content
            if isinstance(part, dict)
        ]
        if all(part.get("type") == "text" for part in content):
            content = _texts(content, f"{where}.content")
    if block.get("is_error"):
        failed = "error: "
        if isinstance(content, str):
            content = failed + content
        else:
            content = [{"type": "text", "text": failed}, *content]
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _image(block: Json, where: str) -> Json:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if isinstance(source, dict) and kind == "base64":
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
    elif isinstance(source, dict) and kind == "url":
        url = source.get("url")
    else:
        raise refused(f"{where}.source", "must be of type base64 or url")
    return {"type": "image_url", "image_url": {"url": url}}


# -- replies ----------------------------------------------------------------------------------


class Writer:
    """One reply as Anthropic has it."""

    def __init__(self, service: Service, replies: Replies, stops: list[str] | None) -> None:
        self._service, self._stops = service, stops or []
        self.message: Json = {
            "id": f"msg_{uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": len(replies.prompts[0].ids),
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 0,
            },
        }
        self._open: str | None = None

    def start(self) -> Json:
        """The first event of the stream."""
        message = json.loads(json.dumps(self.message))
        return {"type": "message_start", "message": message}

    def feed(self, event: Event) -> Iterator[Json]:
        """The stream's events for one of ours, added to the message."""
        match event:
            case Thinking(text):
                yield from self._text("thinking", "thinking", text)
            case Content(text):
                yield from self._text("text", "text", text)
            case ToolCallEvent(call):
                yield from self._close()
                block = {"type": "tool_use", "id": f"toolu_{uuid4().hex[:24]}", "name": call.name}
                yield self._begin("tool_use", block | {"input": {}})
                written = dump(call.arguments).decode()
                yield self._delta({"type": "input_json_delta", "partial_json": written})
                self.message["content"][-1]["input"] = call.arguments
                yield from self._close()
            case ToolProblem(problem):
                if problem.text:
                    yield from self._text("text", "text", problem.text)
            case Finished():
                yield from self._close()
                yield from self._end(event)

    def _text(self, kind: str, name: str, text: str) -> Iterator[Json]:
        if self._open != kind:
            yield from self._close()
            more = {"signature": ""} if kind == "thinking" else {}
            yield self._begin(kind, {"type": kind, name: "", **more})
        self.message["content"][-1][name] += text
        yield self._delta({"type": f"{kind}_delta", name: text})

    def _begin(self, kind: str, block: Json) -> Json:
        self._open = kind
        self.message["content"].append(block)
        return {"type": "content_block_start", "index": self._index, "content_block": dict(block)}

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    @property
    def _index(self) -> int:
        return len(self.message["content"]) - 1

    def _end(self, finished: Finished) -> Iterator[Json]:
        reasons = {
            FinishReason.STOP: "end_turn",
            FinishReason.LENGTH: "max_tokens",
            FinishReason.TOOL_CALLS: "tool_use",
        }
        reason = reasons[finished.finish_reason]
        stop = None
        if finished.finish_reason is FinishReason.STOP:
            stop = self._service.stopped_at(finished, self._stops)
            reason = "stop_sequence" if stop else reason
        usage = finished.usage
        self.message["usage"] |= {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }
        self.message |= {"stop_reason": reason, "stop_sequence": stop}
        delta = {"stop_reason": reason, "stop_sequence": stop}
        yield {"type": "message_delta", "delta": delta, "usage": self.message["usage"]}
        yield {"type": "message_stop"}


async def message(service: Service, request: MessagesRequest, replies: Replies) -> Json:
    """The whole answer."""
    writer = Writer(service, replies, request.stop_sequences)
    async for _, event in replies:
        for _ in writer.feed(event):
            pass
    return writer.message


async def stream(
    service: Service, request: MessagesRequest, replies: Replies
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    writer = Writer(service, replies, request.stop_sequences)
    yield data(writer.start())
    async for _, event in replies:
        for told in writer.feed(event):
            yield data(told)


def data(body: Json) -> bytes:
    """One server-sent event, with its name."""
    return b"event: " + body["type"].encode() + b"\ndata: " + dump(body) + b"\n\n"
