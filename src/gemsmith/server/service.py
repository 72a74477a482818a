"""What every API needs of the engine: a request in the engine's words in, events out.

`Ask` is what the APIs translate to, and the only way in: a field that the engine learns is passed
on here. `Replies` gives the events of one request's replies (`n`, or several prompts), within its
time. What this is not: it knows no HTTP.
"""

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from gemsmith.engine.async_engine import AsyncEngine, Stream
from gemsmith.engine.engine import LM
from gemsmith.engine.grammar import Follow
from gemsmith.engine.media import Prompt
from gemsmith.engine.reply import Event
from gemsmith.engine.request import Finished, Request, SamplingParams
from gemsmith.errors import GemsmithError
from gemsmith.server.errors import ApiError, refused
from gemsmith.server.limits import Limits
from gemsmith.server.media import gate
from gemsmith.server.metrics import Metrics
from gemsmith.text.calls import ToolCall
from gemsmith.text.stream import parse_output
from gemsmith.text.tools import check_tool

EFFORTS: dict[str, int | None] = {
    "minimal": 128,
    "low": 512,
    "medium": 2048,
    "high": 8192,
    "xhigh": 32768,
    "max": None,
}
"""Tokens of thought that a word stands for; "none" is no thought at all."""
MAX_RETRY_S = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A conversation and what is wanted of the reply; names as those of `LM.stream`."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: str | Mapping[str, Any] = "auto"
    """auto, none, required, or a tool that is declared, see `named`."""
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    enable_thinking: bool = False
    preserve_thinking: bool = False
    image_budget: int | str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters that the client gave; the others are the checkpoint's."""
    n: int = 1


class Service:
    """One model behind one engine."""

    def __init__(
        self,
        lm: LM,
        engine: AsyncEngine,
        *,
        limits: Limits | None = None,
        name: str | None = None,
        also: Sequence[str] = (),
    ) -> None:
        """lm: the engine's own. name: what the model is called here. also: other names that
        clients may call it by."""
        self.lm, self.engine, self.limits = lm, engine, limits or Limits()
        self.name = name or lm.name
        self.names = (self.name, *also)
        self.modalities = ["text"]
        """What it reads."""
        if lm.config.vision_config is not None:
            self.modalities += ["image", "video"]
        if lm.config.audio_config is not None:
            self.modalities.append("audio")
        self.metrics = Metrics(self.name, engine.stats, lm.memory()["weights"])
        self.created = int(time.time())
        self._usual_s = 1.0
        """How long a request takes, lately."""

    @property
    def ready(self) -> bool:
        return self.engine.healthy and not self.engine.draining

    def check_model(self, name: str) -> None:
        """Raises:
        ApiError: another model is asked for.
        """
        if name not in self.names:
            raise ApiError(
                404,
                f"model: {name!r} is not served here; this is {' or '.join(self.names)}",
                code="model_not_found",
                param="model",
            )

    async def prompt(self, ask: Ask) -> Prompt:
        """What the model will read.

        Raises:
          RequestError, ApiError: it cannot be written.
        """
        self._check(ask)
        # Tools that may not be called are not shown.
        tools = ask.tools if ask.tool_choice != "none" else []
        messages = await gate(ask.messages, self.limits)
        try:
            return await self.engine.encode(
                messages,
                tools=tools or None,
                enable_thinking=ask.enable_thinking,
                preserve_thinking=ask.preserve_thinking,
                image_budget=ask.image_budget,
            )
        except (UnicodeError, RecursionError) as error:
            raise ApiError(400, _UNREADABLE[isinstance(error, RecursionError)]) from None

    async def text_prompt(self, prompt: str | list[int]) -> Prompt:
        """A prompt without chat format.

        Raises:
          RequestError, ApiError: it cannot be read.
        """
        if not isinstance(prompt, str):
            return Prompt(prompt)
        try:
            return await self.engine.encode(prompt)
        except UnicodeError:
            raise ApiError(400, _UNREADABLE[False]) from None

    def params(self, given: Mapping[str, Any]) -> SamplingParams:
        """Raises:
        RequestError: a value outside its range.
        """
        return self.lm.sampling.changed(**given)

    async def start(self, ask: Ask, tenant: str) -> "Replies":
        """Queue a conversation's request.

        Raises:
          GemsmithError: it cannot be served, or not now.
        """
        deadline = time.monotonic() + self.limits.request_s
        params = self.params(ask.params)
        prompt = await self.prompt(ask)
        follow = await self.engine.follow(
            tools=ask.tools or None,
            tool_choice=ask.tool_choice,
            parallel_tool_calls=ask.parallel_tool_calls,
            response_format=ask.response_format,
            enable_thinking=ask.enable_thinking,
        )
        return await self.submit(
            [prompt], params, n=ask.n, tenant=tenant, deadline=deadline, follow=follow
        )

    async def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        n: int,
        tenant: str,
        deadline: float | None = None,
        chat: bool = True,
        follow: Follow | None = None,
    ) -> "Replies":
        """Queue n replies to each prompt, each with a seed of its own.

        Raises:
          GemsmithError: they cannot be served, or not now.
        """
        if len(prompts) * n > self.limits.choices:
            raise refused(
                "n", f"{len(prompts) * n} replies at once; at most {self.limits.choices} are given"
            )
        longest = self.engine.plan.max_model_len
        for prompt in prompts:
            if len(prompt.ids) >= longest:
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt.ids)} tokens, but a sequence here holds {longest} "
                    "and the reply needs room in it; shorten it, drop old messages, or serve with "
                    "a larger --max-model-len",
                    code="context_length_exceeded",
                    param="messages" if chat else "prompt",
                )
        deadline = deadline or time.monotonic() + self.limits.request_s
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                for choice in range(n):
                    seed = None if params.seed is None else (params.seed + choice) % 2**63
                    request = Request(
                        prompt=prompt,
                        params=params.changed(seed=seed),
                        chat=chat,
                        follow=follow,
                        tenant=tenant,
                    )
                    streams.append(await self.engine.submit(request))
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        return Replies(self, list(prompts), streams, deadline)

    def retry_after_s(self) -> int:
        """When a place in the queue should be free, in seconds."""
        stats, seats = self.engine.stats(), self.engine.plan.max_num_seqs
        wait = self._usual_s * (stats.waiting + 1) / seats
        return min(max(1, math.ceil(wait)), MAX_RETRY_S)

    def note(self, finished: Finished) -> None:
        """Remember what a reply took."""
        self.metrics.finished(finished.usage, finished.finish_reason)
        self._usual_s += 0.1 * (finished.usage.total_s - self._usual_s)

    def stopped_at(self, finished: Finished, stops: Sequence[str]) -> str | None:
        """The stop string that ended a reply, if one did."""
        if not stops or not finished.token_ids or finished.token_ids[-1] in self.lm.end_ids:
            return None
        text = parse_output(self.lm.tokenizer.decode(finished.token_ids)).content
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
        return min(found)[2] if found else None

    def _check(self, ask: Ask) -> None:
        """Refuse what can be told to be wrong at once, by the field's name."""
        for tool in ask.tools:
            check_tool(tool)
        names = [tool["function"]["name"] for tool in ask.tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise refused("tools", f"{twice!r} is declared twice; give each tool its own name")
        if ask.tool_choice not in ("auto", "none"):
            if not names:
                raise refused("tool_choice", "a call is required, but no tool is declared")
            if not isinstance(ask.tool_choice, str):
                name = ask.tool_choice["function"]["name"]
                if name not in names:
                    raise refused("tool_choice", f"no tool {name!r} is declared")
        places = sum(
            not isinstance(part, Mapping) or part.get("type") != "text"
            for message in ask.messages
            if isinstance(content := message.get("content"), list)
            for part in content
        )
        if places > self.limits.media:
            raise refused(
                "messages", f"{places} images, sounds and videos; at most {self.limits.media} fit"
            )


_UNREADABLE = (
    "a text holds half of a surrogate pair, which is no character; send valid Unicode",
    "the messages or tools are nested too deeply; flatten them",
)


class Replies:
    """The events of all replies to a request, each with the number of its reply, as they come.

    Closing it, or an error, aborts what is not done.
    """

    def __init__(
        self, service: Service, prompts: list[Prompt], streams: list[Stream], deadline: float
    ) -> None:
        self.prompts = prompts
        self._service, self._streams = service, streams
        self._deadline = deadline
        self._waiting: dict[asyncio.Task[Event], int] = {}
        self._left = dict(enumerate(streams))
        self.finished: dict[int, Finished] = {}
        """Of those replies that are done."""

    def __len__(self) -> int:
        return len(self._streams)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        """Raises:
        ApiError: the time is up. GemsmithError: a reply failed.
        """
        if not self._left:
            raise StopAsyncIteration
        seconds = self._deadline - time.monotonic()
        try:
            async with asyncio.timeout(seconds):
                index, event = await self._next()
        except TimeoutError:
            self.abort()
            limit = self._service.limits.request_s
            raise ApiError(
                504, f"the reply took more than the {limit:g} s that one may take", code="timeout"
            ) from None
        except GemsmithError:
            self.abort()
            raise
        if isinstance(event, Finished):
            del self._left[index]
            self.finished[index] = event
            self._service.note(event)
        return index, event

    def abort(self) -> None:
        """Free what is held, before the engine's next step."""
        for task in self._waiting:
            task.cancel()
            # Where several failed at once, one of the errors has been told.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        for stream in self._streams:
            stream.abort()
        self._left.clear()

    async def _next(self) -> tuple[int, Event]:
        if len(self._streams) == 1:
            return 0, await anext(self._streams[0])
        for index, stream in self._left.items():
            if index not in self._waiting.values():
                self._waiting[asyncio.ensure_future(_event(stream))] = index
        done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        task = min(done, key=lambda each: self._waiting[each])
        return self._waiting.pop(task), task.result()


async def _event(stream: Stream) -> Event:
    return await anext(stream)


# -- what the APIs share ----------------------------------------------------------------------


def thinking(effort: str | None, budget: int | None = None) -> tuple[bool, dict[str, int]]:
    """Whether to think, and the sampling parameters that bound it. budget: wins over the word.

    Raises:
      ApiError: an unknown word.
    """
    if effort is not None and effort != "none" and effort not in EFFORTS:
        raise refused("reasoning_effort", f"{effort!r} is not one of none, {', '.join(EFFORTS)}")
    if budget is None and effort not in (None, "none"):
        budget = EFFORTS[effort]
    wanted = effort not in (None, "none") or (effort is None and budget is not None)
    return wanted, {"thinking_budget": budget} if wanted and budget is not None else {}


def check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    """Every call is answered once, right after the message that made it, and nothing else is.

    Raises:
      ApiError: an answer without its call, or the reverse.
    """
    open_calls: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            id = message.get("tool_call_id")
            if id not in open_calls:
                raise refused(
                    f"messages.{index}",
                    f"tool_call_id {id!r} answers no call of the assistant message before it",
                )
            open_calls.remove(id)
            continue
        if open_calls:
            raise refused(
                f"messages.{index}",
                f"the call {open_calls[0]!r} before it has no answer; every tool call needs one",
            )
        open_calls = [call["id"] for call in message.get("tool_calls") or ()]
        if len(set(open_calls)) < len(open_calls):
            raise refused(f"messages.{index}", "two calls have the same id")


def named(tool: str | None) -> dict[str, Any]:
    """The choice of a tool by its name."""
    return {"type": "function", "function": {"name": tool}}


def arguments_of(call: ToolCall) -> str:
    """A call's arguments as JSON text."""
    return json.dumps(call.arguments, ensure_ascii=False)


def dump(body: Any) -> bytes:
    """JSON as it is sent."""
    # A model may write half of a surrogate pair in an argument.
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
