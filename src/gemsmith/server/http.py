"""Answers over HTTP that end when the client goes away, and one line of log a request.

Lines are JSON and hold no text of a request or a reply, no key, and of an error only its kind and
where it arose.
"""

import asyncio
import json
import logging
import re
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemsmith.server.errors import ApiError, problem, speller
from gemsmith.server.service import Replies, Service, dump

log = logging.getLogger("gemsmith.server")
PING_S = 10.0
"""Silence after which a stream says that it is alive, or twice that: proxies cut what is silent for
long."""
_ID = re.compile(r"[\w.:-]{1,80}")
T = TypeVar("T")


class Gone(Exception):
    """The client went away."""


def answer(body: Any, error: ApiError | None = None) -> Response:
    """A JSON response."""
    status, headers = (error.status, error.headers) if error else (200, {})
    return Response(dump(body), status, headers, "application/json")


async def connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, unless the client goes away.

    Raises:
      Gone: it did; the work was cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """Server-sent events of a request's replies."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        replies: Replies,
        failed: Callable[[BaseException], bytes],
        ping: bytes = b": ping\n\n",
    ) -> None:
        """failed: an error in the midst as an event."""
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._replies, self._failed, self._ping = chunks, replies, failed, ping
        self._silent = True
        """Whether nothing was sent since the last look."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(scope, send))
        others = asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(self._stay(send))
        try:
            await asyncio.wait({writing, *others}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._replies.abort()
            await _end(writing, *others)
            await self._chunks.aclose()

    async def _write(self, scope: Scope, send: Send) -> None:
        """Send each chunk as it comes, and the end. One task for all of them: another for each
        would double what a token takes here."""
        await send({"type": "http.response.start", "status": self.status_code,
                    "headers": self.raw_headers})  # fmt: skip
        last = b""
        try:
            async for chunk in self._chunks:
                self._silent = False
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            note_error(scope, error)
            last = self._failed(error)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _stay(self, send: Send) -> None:
        """Say that the stream is alive where nothing was sent for long."""
        while True:
            self._silent = True
            await asyncio.sleep(PING_S)
            if self._silent:
                await send({"type": "http.response.body", "body": self._ping, "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def note_error(scope: Scope, error: BaseException) -> None:
    """Have the request's line of log name an error."""
    told = problem(error)
    scope["state"]["error"] = type(error).__name__
    if told.status == 500:
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        scope["state"]["trace"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
        if error.__cause__ is not None:
            scope["state"]["cause"] = type(error.__cause__).__name__


class Log:
    """An ASGI layer: numbers requests, counts errors, writes the log."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not _ID.fullmatch(id):
            id = f"req_{uuid4().hex}"
        scope.setdefault("state", {})
        started, status = time.monotonic(), 0

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", id.encode()), (b"request-id", id.encode())]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        try:
            await self.app(scope, receive, numbered)
        except Exception as error:  # nobody else knew what to do with it
            note_error(scope, error)
            if not status:
                await answer(speller(scope)(problem(error)), problem(error))(
                    scope, receive, numbered
                )
        finally:
            if status >= 400:
                self.service.metrics.refused(status)
            self._write(scope, id, status, time.monotonic() - started)

    def _write(self, scope: Scope, id: str, status: int, took_s: float) -> None:
        state = scope["state"]
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(took_s, 4),
        }
        line |= {key: state[key] for key in ("tenant", "error", "cause", "trace") if state.get(key)}
        replies: Replies | None = state.get("replies")
        if replies is not None:
            done = list(replies.finished.values())
            line["prompt_tokens"] = sum(len(prompt.ids) for prompt in replies.prompts)
            line["completion_tokens"] = sum(f.usage.completion_tokens for f in done)
            line["cached_tokens"] = sum(f.usage.cached_tokens for f in done)
            line["finish"] = [f.finish_reason.value for f in done]
            if len(done) < len(replies):
                line["unfinished"] = len(replies) - len(done)
        level = logging.ERROR if status >= 500 else logging.INFO
        log.log(level, json.dumps(line))
