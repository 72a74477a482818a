"""The batching engine for asyncio: requests in, streams of events out, one worker thread.

    engine = AsyncEngine(lm)
    prompt = await engine.encode(messages, tools=tools)
    async with await engine.submit(Request(prompt=prompt)) as events:
        async for event in events: ...                     # the last is `Finished`
    await engine.drain()

The worker alone touches the model. A stream that is cancelled, closed or dropped aborts its request
before the next step. What this is not: no HTTP, no time limits (`asyncio.timeout` cancels).
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

from gemsmith.engine.batching import BatchEngine, EngineConfig, Outcome, Stats
from gemsmith.engine.engine import LM
from gemsmith.engine.grammar import Follow
from gemsmith.engine.media import Prompt, parts
from gemsmith.engine.reply import Event
from gemsmith.engine.request import Finished, Request
from gemsmith.errors import CapacityError, GemsmithError

STATS_S = 0.02
"""Replies may go on for so long before `stats` tells: of a small model's step a snapshot of it is a
fortieth."""
SHUTTING_DOWN = "the engine is shutting down; send the request elsewhere"


@dataclass(slots=True, eq=False)
class _Mailbox:
    """Where the worker leaves what it did for a request. It must not hold the `Stream` itself, or
    that could never be dropped."""

    loop: asyncio.AbstractEventLoop
    outcomes: "asyncio.Queue[Outcome]" = field(default_factory=asyncio.Queue)


class Stream:
    """The events of one request, as an async iterator; closing it early aborts the request."""

    def __init__(self, id: int, engine: "AsyncEngine", outcomes: "asyncio.Queue[Outcome]") -> None:
        self.id = id
        self._engine, self._outcomes = engine, outcomes
        self._ready: list[Event] = []
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Raises:
        GemsmithError: the request failed.
        """
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            try:
                outcome = await self._outcomes.get()
            except asyncio.CancelledError:
                self.abort()
                raise
            if isinstance(outcome, GemsmithError):
                self._ended = True
                raise outcome
            self._ready += outcome
            self._ended = bool(outcome) and isinstance(outcome[-1], Finished)
        return self._ready.pop(0)

    def abort(self) -> None:
        """Drop the request before the next step, if it is not done. At once, from any thread."""
        if not self._ended:
            self._ended = True
            self._engine._abort(self.id)

    async def aclose(self) -> None:
        self.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        self.abort()


class AsyncEngine:
    """A `BatchEngine` in a thread of its own. Any event loop may use it."""

    def __init__(self, lm: LM, config: EngineConfig | None = None) -> None:
        """Raises: as `BatchEngine`."""
        self._engine = BatchEngine(lm, config)
        self.plan = self._engine.plan
        self._mailboxes: dict[int, _Mailbox] = {}
        self._commands: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._draining = self._closed = False
        self._idle = True
        """Whether the worker waits; changed under the lock alone, as is the next."""
        self._gone = False
        """Whether the worker has done all that it will."""
        self._broken: GemsmithError | None = None
        self._stats, self._stats_until = self._engine.stats(), 0.0
        # One at a time: tokenizers and templates need not be for many threads.
        self._encoder = ThreadPoolExecutor(1, "gemsmith-encode")
        # A film takes seconds, which requests of text need not wait, and gigabytes: one at a time.
        self._reader = ThreadPoolExecutor(1, "gemsmith-media")
        self._thread = threading.Thread(target=self._work, name="gemsmith-engine", daemon=True)
        self._thread.start()

    async def encode(self, messages: list[dict[str, Any]] | str, **options: Any) -> Prompt:
        """`LM.encode`, or `LM.encode_text` of a text, beside the running steps.

        Raises: as these; CapacityError: the engine is shutting down.
        """
        lm = self._engine.lm
        encode: Callable[..., Prompt] = lm.encode_text if isinstance(messages, str) else lm.encode
        if lm.is_chat and not isinstance(messages, str) and any(parts(messages)):
            read = partial(lm.read_media, messages, image_budget=options.get("image_budget"))
            options["media"] = await self._run(self._reader, read)
        return await self._run(self._encoder, partial(encode, messages, **options))

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        if self._draining:
            raise CapacityError(SHUTTING_DOWN)
        return await asyncio.get_running_loop().run_in_executor(executor, work)

    async def follow(self, **options: Any) -> Follow | None:
        """`LM.follow` beside the running steps: a schema may take a while to compile.

        Raises: as `LM.follow`; CapacityError: the engine is shutting down.
        """
        return await self._run(self._encoder, partial(self._engine.lm.follow, **options))

    async def submit(self, request: Request) -> Stream:
        """Queue a request; its events come from what is returned.

        Raises:
          QueueFullError: too many wait.
          RequestError: it can never be served.
          CapacityError: the engine is shutting down.
        """
        loop = asyncio.get_running_loop()
        added: asyncio.Future[Stream] = loop.create_future()

        def accepted(id: int, mailbox: _Mailbox) -> None:
            stream = Stream(id, self, mailbox.outcomes)
            if added.cancelled():
                stream.abort()
            else:
                added.set_result(stream)

        def refused(error: Exception) -> None:
            if not added.cancelled():
                added.set_exception(error)

        def add() -> None:
            try:
                if self._broken is not None:
                    raise CapacityError(f"the engine has stopped: {self._broken}")
                id = self._engine.add(request)
            except Exception as error:
                self._tell(loop, partial(refused, error))
                return
            mailbox = self._mailboxes[id] = _Mailbox(loop)
            if not self._tell(loop, partial(accepted, id, mailbox)):
                self._drop(id)

        self._order(add, new=True)
        return await added

    def stats(self) -> Stats:
        """As of the last step, or of one within STATS_S before it. From any thread."""
        return self._stats

    @property
    def healthy(self) -> bool:
        """Whether steps are run; False after `close`, or after an error of the engine itself."""
        return self._thread.is_alive() and self._broken is None

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    async def drain(self, timeout_s: float | None = None) -> None:
        """Refuse new requests, let those that are here end, then close. What is left after the
        timeout is aborted."""
        self._draining = True
        waiter = asyncio.get_running_loop().run_in_executor(None, self._wait_idle, timeout_s)
        await waiter
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def close(self) -> None:
        """Abort everything and end the thread. May be called twice, from any thread but its own."""
        with self._wake:
            self._draining = self._closed = True
            self._wake.notify_all()
        self._thread.join()
        self._engine.close()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._reader.shutdown(wait=False, cancel_futures=True)

    # -- the worker ---------------------------------------------------------------------------

    def _order(self, command: Callable[[], None], *, new: bool = False) -> None:
        """Have the worker run something between two steps."""
        with self._wake:
            if new and self._broken is None and (self._draining or self._closed):
                raise CapacityError(SHUTTING_DOWN)
            if self._gone:
                command()  # nobody else touches the engine
                return
            self._commands.append(command)
            self._wake.notify_all()

    def _abort(self, id: int) -> None:
        self._order(partial(self._drop, id))

    def _drop(self, id: int) -> None:
        self._mailboxes.pop(id, None)
        self._engine.abort(id)

    def _wait_idle(self, timeout_s: float | None) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._idle and not self._commands, timeout_s)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._closed or self._engine.busy)
                commands, self._commands = self._commands, []
                closed, self._idle = self._closed, False
            commands_came = bool(commands)
            try:
                while commands:  # none is kept: what it refers to may be dropped
                    commands.pop(0)()
                if not closed:
                    self._deliver(self._engine.step())
            except Exception as error:
                self._broken = GemsmithError(f"a step failed: {error!r}")
                self._broken.__cause__ = error
                self._fail_all(self._broken)
            if closed:
                self._fail_all(CapacityError("the engine was shut down before this was done"))
            if commands_came or not self._engine.busy or time.monotonic() > self._stats_until:
                self._stats = self._engine.stats()
                self._stats_until = time.monotonic() + STATS_S
            with self._wake:
                done = closed or self._broken is not None
                self._idle = done or not self._engine.busy
                if done:
                    self._gone = True
                    while self._commands:  # one that stayed would keep `drain` waiting
                        self._commands.pop(0)()
                self._wake.notify_all()
                if done:
                    return

    def _fail_all(self, error: GemsmithError) -> None:
        ids = list(self._mailboxes)
        self._deliver([(id, error) for id in ids])
        for id in ids:
            with suppress(Exception):
                self._engine.abort(id)
        self._stats = self._engine.stats()

    def _deliver(self, outcomes: list[tuple[int, Outcome]]) -> None:
        """One call into each loop a step, however many requests got on."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Outcome]]] = {}
        gone = []
        for id, outcome in outcomes:
            mailbox = self._mailboxes.get(id)
            if mailbox is None or not outcome:
                continue
            if isinstance(outcome, GemsmithError) or isinstance(outcome[-1], Finished):
                del self._mailboxes[id]
            by_loop.setdefault(mailbox.loop, []).append((mailbox, outcome))
        for loop, batch in by_loop.items():
            if not self._tell(loop, partial(_put, batch)):
                gone += [id for id, mailbox in self._mailboxes.items() if mailbox.loop is loop]
        for id in gone:
            self._drop(id)

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> bool:
        """Whether the loop is still there to be told."""
        try:
            loop.call_soon_threadsafe(call)
        except RuntimeError:
            return False
        return True


def _put(batch: list[tuple[_Mailbox, Outcome]]) -> None:
    for mailbox, outcome in batch:
        mailbox.outcomes.put_nowait(outcome)
