"""OpenAI's `/v1/responses`, without storage: every request brings its whole conversation.

`Writer` turns the events of a reply into the stream's events and, joined, into the response:
streaming and not streaming cannot differ. Thoughts are reasoning items in plain text, to be sent
back as they came.
"""

import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any
from uuid import uuid4

from gemsmith.engine.reply import Event
from gemsmith.engine.request import Finished, FinishReason
from gemsmith.server.chat import arguments
from gemsmith.server.errors import openai, problem, refused
from gemsmith.server.protocol import ResponsesNamedTool, ResponsesRequest
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

Json = dict[str, Any]
_NAMES = ("temperature", "top_p", "top_k", "seed")


def ask_of(request: ResponsesRequest) -> Ask:
    """A request in the engine's words.

    Raises:
      ApiError: something that cannot be served.
    """
    messages: list[Json] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        messages += _messages(request.input)
    check_turns(messages)
    effort = request.reasoning.effort if request.reasoning else None
    think, params = thinking(effort, request.thinking_budget)
    given = {name: getattr(request, name) for name in _NAMES}
    given["max_tokens"] = request.max_output_tokens
    params |= {name: value for name, value in given.items() if value is not None}
    choice = request.tool_choice
    return Ask(
        messages=messages,
        tools=[_tool(tool.model_dump(exclude_none=True)) for tool in request.tools],
        tool_choice=named(choice.name) if isinstance(choice, ResponsesNamedTool) else choice,
        parallel_tool_calls=request.parallel_tool_calls or not request.tools,
        response_format=_format(request.text.format) if request.text else None,
        enable_thinking=think,
        image_budget=request.mm_budget,
        params=params,
    )


def _tool(tool: Json) -> Json:
    names = ("name", "description", "parameters")
    return {"type": "function", "function": {name: tool[name] for name in names if name in tool}}


def _format(given: Json | None) -> Json | None:
    """As chat completions have it, where the schema stands a level deeper."""
    if given is None or given.get("type") != "json_schema":
        return given
    inner = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": inner}


def _messages(items: list[Json]) -> list[Json]:
    """Items as messages: what a model said in one turn, thoughts and calls too, is one message."""
    made: list[Json] = []
    for index, item in enumerate(items):
        where = f"input.{index}"
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant":
            said = _said(item.get("content"), f"{where}.content")
            if made and made[-1]["role"] == "assistant" and not made[-1]["content"]:
                made[-1]["content"] = said
            else:
                made.append({"role": "assistant", "content": said})
        elif kind == "message":
            if item.get("role") not in ("user", "system", "developer"):
                raise refused(f"{where}.role", f"{item.get('role')!r} is not known")
            content = _parts(item.get("content"), f"{where}.content")
            made.append({"role": item["role"], "content": content})
        elif kind == "reasoning":
            made.append({"role": "assistant", "content": "", "reasoning": _thought(item, where)})
        elif kind == "function_call":
            if not isinstance(item.get("call_id"), str) or not isinstance(item.get("name"), str):
                raise refused(where, "must have a call_id, a name and arguments")
            given = arguments(item.get("arguments") or "", where)
            function = {"name": item["name"], "arguments": given}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if not made or made[-1]["role"] != "assistant":
                made.append({"role": "assistant", "content": ""})
            made[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _parts(output, f"{where}.output")
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        else:
            raise refused(
                f"{where}.type",
                f"{kind!r} is not known here; use message, reasoning, function_call or "
                "function_call_output (nothing is stored, so items must be sent whole)",
            )
    return made


def _said(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = [
        part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        for part in (content if isinstance(content, list) else [None])
    ]
    if not all(isinstance(text, str) for text in texts):
        raise refused(where, "an assistant's content must be text")
    return "".join(str(text) for text in texts)


def _thought(item: Json, where: str) -> str:
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise refused(where, "must have content, a list of texts")
    return "".join(str(part.get("text") or "") for part in parts)


def _parts(content: Any, where: str) -> str | list[Json]:
    """Content as chat completions have it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refused(where, "must be text, or a list of parts")
    made: list[Json] = []
    for place, part in enumerate(content):
        match part.get("type") if isinstance(part, dict) else None:
            case "input_text" | "output_text" | "text":
                made.append({"type": "text", "text": part.get("text")})
            case "input_image":
                image = {"url": part.get("image_url"), "detail": part.get("detail")}
                made.append({"type": "image_url", "image_url": image})
            case "input_audio" | "video_url":
                made.append(part)
            case kind:
                raise refused(f"{where}.{place}.type", f"{kind!r} is not known here")
    return made


# -- replies ----------------------------------------------------------------------------------


class Writer:
    """One reply as a response."""

    def __init__(self, service: Service, request: ResponsesRequest) -> None:
        self.response: Json = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": service.name,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {
                "effort": request.reasoning.effort if request.reasoning else None,
                "summary": None,
            },
            "store": False,
            "temperature": request.temperature,
            "text": {"format": (request.text and request.text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice
            if isinstance(request.tool_choice, str)
            else request.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in request.tools],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        self._number = 0
        self._open = ""

    def start(self) -> Iterator[Json]:
        """The first events of the stream."""
        yield self._event("response.created", response=dict(self.response))
        yield self._event("response.in_progress", response=dict(self.response))

    def feed(self, event: Event) -> Iterator[Json]:
        """The stream's events for one of ours, added to the response."""
        match event:
            case Thinking(text):
                yield from self._text("reasoning", text)
            case Content(text):
                yield from self._text("message", text)
            case ToolCallEvent(call):
                yield from self._close()
                item = {
                    "id": f"fc_{uuid4().hex[:24]}",
                    "type": "function_call",
                    "call_id": f"call_{uuid4().hex[:24]}",
                    "name": call.name,
                    "arguments": "",
                    "status": "in_progress",
                }
                yield self._begin("function_call", item)
                name, written = "response.function_call_arguments", arguments_of(call)
                yield self._at(f"{name}.delta", delta=written)
                yield self._at(f"{name}.done", arguments=written, name=call.name)
                self._item["arguments"] = written
                yield from self._close()
            case ToolProblem(problem):
                if problem.text:
                    yield from self._text("message", problem.text)
            case Finished():
                cut = event.finish_reason is FinishReason.LENGTH
                yield from self._close("incomplete" if cut else "completed")
                self._end(event, cut)
                kind = "response.incomplete" if cut else "response.completed"
                yield self._event(kind, response=self.response)

    def failed(self, error: BaseException) -> Json:
        """The last event of a stream in which something went wrong."""
        told = openai(problem(error))["error"]
        code = told["code"] or told["type"]
        self.response |= {
            "status": "failed",
            "error": {"code": code, "message": told["message"]},
        }
        return self._event("response.failed", response=self.response)

    def _text(self, kind: str, text: str) -> Iterator[Json]:
        part_kind = "reasoning_text" if kind == "reasoning" else "output_text"
        if self._open != kind:
            yield from self._close()
            prefix = "rs" if kind == "reasoning" else "msg"
            item: Json = {"id": f"{prefix}_{uuid4().hex[:24]}", "type": kind}
            item |= {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            yield self._begin(kind, item | {"status": "in_progress", "content": []})
            part: Json = {"type": part_kind, "text": ""}
            part |= {} if kind == "reasoning" else {"annotations": [], "logprobs": []}
            self._item["content"].append(part)
            yield self._at("response.content_part.added", content_index=0, part=dict(part))
        self._item["content"][0]["text"] += text
        more = {} if kind == "reasoning" else {"logprobs": []}
        yield self._at(f"response.{part_kind}.delta", content_index=0, delta=text, **more)

    def _begin(self, kind: str, item: Json) -> Json:
        self._open = kind
        self.response["output"].append(item)
        told = item | ({"content": []} if "content" in item else {})
        return self._event("response.output_item.added", output_index=self._index, item=told)

    def _close(self, status: str = "completed") -> Iterator[Json]:
        if not self._open:
            return
        if self._open != "function_call":
            [part] = self._item["content"]
            more = {} if self._open == "reasoning" else {"logprobs": []}
            name = f"response.{part['type']}.done"
            yield self._at(name, content_index=0, text=part["text"], **more)
            yield self._at("response.content_part.done", content_index=0, part=part)
        self._item["status"] = status
        yield self._event("response.output_item.done", output_index=self._index, item=self._item)
        self._open = ""

    def _end(self, finished: Finished, cut: bool) -> None:
        usage = finished.usage
        details = {"cached_tokens": usage.cached_tokens}
        for kind in ("image", "audio", "video"):
            details[f"{kind}_tokens"] = getattr(usage, f"{kind}_tokens")
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": details,
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        self.response["status"] = "incomplete" if cut else "completed"
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        if finished.notes:
            self.response["notes"] = list(finished.notes)

    @property
    def _item(self) -> Json:
        return self.response["output"][-1]

    @property
    def _index(self) -> int:
        return len(self.response["output"]) - 1

    def _at(self, kind: str, **more: Any) -> Json:
        """An event about the item that is open."""
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **more)

    def _event(self, kind: str, **more: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}


async def response(service: Service, request: ResponsesRequest, replies: Replies) -> Json:
    """The whole answer."""
    writer = Writer(service, request)
    async for _, event in replies:
        for _ in writer.feed(event):
            pass
    return writer.response


async def stream(writer: Writer, replies: Replies) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events."""
    for told in writer.start():
        yield data(told)
    async for _, event in replies:
        for told in writer.feed(event):
            yield data(told)


def data(body: Json) -> bytes:
    """One server-sent event, with its name."""
    return b"event: " + body["type"].encode() + b"\ndata: " + dump(body) + b"\n\n"
