"""OpenAI's `/v1/audio/transcriptions`: recordings of any length, a window at a time.

`engine.transcribe` does the work in a thread of its own; its requests go through the engine like
everybody else's, one after the other, and end with the client.
"""

import asyncio
import time
from typing import Any, Literal, cast

from gemsmith.engine.engine import LM
from gemsmith.engine.reply import collect
from gemsmith.engine.request import Generation
from gemsmith.engine.transcribe import Transcript, transcribe
from gemsmith.errors import CapacityError
from gemsmith.media.transcript import to_srt
from gemsmith.server.errors import refused
from gemsmith.server.service import Service

Format = Literal["json", "text", "srt", "verbose_json"]


class _Through:
    """What `transcribe` asks of a model, answered by the engine."""

    def __init__(self, service: Service, tenant: str, temperature: float) -> None:
        self.config = service.lm.config
        self.closed = False
        self._service, self._tenant, self._temperature = service, tenant, temperature
        self._loop = asyncio.get_running_loop()
        self._deadline = time.monotonic() + service.limits.request_s

    def generate(self, messages: list[dict[str, Any]], **options: Any) -> Generation:
        if self.closed:
            raise CapacityError("the client is gone")
        options["temperature"] = self._temperature
        work = self._reply(messages, options)
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _reply(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Generation:
        service = self._service
        prompt = await service.engine.encode(messages)
        replies = await service.submit(
            [prompt],
            service.params(options),
            n=1,
            tenant=self._tenant,
            deadline=self._deadline,
        )
        try:
            found = []
            async for _, event in replies:
                if self.closed:
                    raise CapacityError("the client is gone")
                found.append(event)
            return collect(found)
        finally:
            replies.abort()


async def run(
    service: Service, recording: bytes, tenant: str, *, temperature: float = 0.0
) -> Transcript:
    """The words of a recording, given as the bytes of a sound or video file.

    Raises:
      RequestError: a file that cannot be read, or a model that hears nothing.
      ApiError: the time is up.
    """
    through = _Through(service, tenant, temperature)
    try:
        return await asyncio.to_thread(transcribe, cast(LM, through), recording)
    finally:
        through.closed = True


def check(fields: dict[str, Any]) -> None:
    """Refuse what other fields of a form would ask for.

    Raises:
      ApiError: one that is known to nobody, or cannot be served.
    """
    for name, value in fields.items():
        if name == "stream" and str(value).lower() == "false":
            continue
        if name in ("timestamp_granularities[]", "timestamp_granularities") and value == "segment":
            continue
        raise refused(name, "this field cannot be served here; leave it out")


def spell(made: Transcript, form: Format) -> dict[str, Any] | str:
    """A transcript as it was asked for."""
    match form:
        case "json":
            return {"text": made.text} | (
                {"problems": list(made.problems)} if made.problems else {}
            )
        case "text":
            return made.text + "\n"
        case "srt":
            return to_srt(made.segments)
        case "verbose_json":
            segments = [
                {"id": i, "start": s.start_s, "end": s.end_s, "text": s.text}
                for i, s in enumerate(made.segments)
            ]
            return {
                "task": "transcribe",
                "text": made.text,
                "duration": made.segments[-1].end_s if made.segments else 0.0,
                "segments": segments,
                "problems": list(made.problems),
            }
