"""A server in this process, or on a socket, around a model that says what it is told to say."""

import asyncio
import io
import json
import re
import threading
import time
import wave
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
import uvicorn
from tests.engine.conftest import byte_tokenizer

from gemsmith.cli.serve import listen
from gemsmith.config import Gemma4Config
from gemsmith.engine.async_engine import AsyncEngine
from gemsmith.engine.batching import EngineConfig
from gemsmith.engine.context import Next
from gemsmith.engine.engine import LM
from gemsmith.engine.reply import Reply
from gemsmith.engine.request import SamplingParams
from gemsmith.errors import GemsmithError
from gemsmith.server.app import create_app
from gemsmith.server.limits import Keys, Limits
from gemsmith.server.service import Service
from gemsmith.testing import (
    media_ids,
    random_model,
    random_towers,
    tiny_config,
    tiny_media_config,
)
from gemsmith.text.tokenizer import Tokenizer

SMALL = EngineConfig(max_num_seqs=4, max_model_len=3000, max_num_batched_tokens=4000, queue_limit=4)
COLD = replace(SMALL, prefix_caching=False)
"""Where usage is compared: asking twice costs the same."""
Script = Callable[[str], str | list[int]]


class ScriptedReply(Reply):
    """Whatever the model finds likely, the script is what it says."""

    script: list[int]
    model: Any

    def take(self, following: Any) -> list[Any]:
        logits_V = torch.zeros_like(following.logits_V)
        at = len(self.token_ids)
        logits_V[self.script[at] if at < len(self.script) else 1] = 20.0
        return super().take(Next(self.model, torch.empty(0), logits_V))


class ScriptedLM(LM):
    """Replies with `script(prompt's text)`; a reply "FAIL" makes the model raise instead."""

    script: Script
    asked: list[str]

    def follow(self, **options: Any) -> None:
        """Nothing: the script may say what a grammar would not let through."""

    def reply(self, prompt: Any, params: SamplingParams, **options: Any) -> Reply:
        made = super().reply(prompt, params, **options)
        self.asked.append(self.tokenizer.decode(prompt.ids))
        text = self.script(self.asked[-1])
        made.__class__ = ScriptedReply
        assert isinstance(made, ScriptedReply)
        made.model = self.model
        made.script = self.tokenizer.encode(text) if isinstance(text, str) else text
        if text == "FAIL":
            made.take = _fail  # pyright: ignore[reportAttributeAccessIssue]
        return made


def _fail(following: Any) -> list[Any]:
    raise GemsmithError("secret detail of /some/file")


def scripted(config: Gemma4Config, tokenizer: Tokenizer, **options: Any) -> ScriptedLM:
    ends = [tokenizer.special.turn_close, tokenizer.special.tool_response_open]
    return ScriptedLM(
        random_model(config),
        tokenizer,
        config,
        end_ids=[id for id in ends if id is not None],
        sampling=SamplingParams(temperature=0),
        kv="float32",
        name="tiny",
        **options,
    )


@pytest.fixture(scope="session")
def tiny() -> ScriptedLM:
    tokenizer = byte_tokenizer()
    return scripted(tiny_config("E2B", vocab_size=tokenizer.vocab_size), tokenizer)


@pytest.fixture(scope="session")
def sensing() -> ScriptedLM:
    """The same with eyes and ears."""
    tokenizer = byte_tokenizer()
    config = tiny_media_config("E2B", vocab_size=tokenizer.vocab_size)
    config = replace(config, **media_ids(tokenizer.special))
    return scripted(config, tokenizer, towers=lambda: random_towers(config))


@pytest.fixture
def says(tiny: ScriptedLM) -> Callable[[str | Script], ScriptedLM]:
    """The model, told what to say: a text, or a function of the prompt's text that gives the
    reply's text or its ids."""

    def told(script: str | Script) -> ScriptedLM:
        tiny.script = script if callable(script) else lambda _: script
        tiny.asked = []
        return tiny

    return told


@pytest.fixture(scope="session")
def pocket() -> LM:
    return LM.load("pocket")


@contextmanager
def service_of(
    lm: LM, config: EngineConfig = SMALL, limits: Limits | None = None
) -> Iterator[Service]:
    """A service; nothing is held by its engine once it is idle."""
    engine = AsyncEngine(lm, config)
    try:
        yield Service(lm, engine, limits=limits, name="gemma")
    finally:
        engine.close()
        engine._engine.check()
        assert engine.stats().running == engine.stats().waiting == 0


@asynccontextmanager
async def serving(
    lm: LM,
    *,
    config: EngineConfig = SMALL,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    hosts: tuple[str, ...] = (),
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """A client of a server in this process."""
    with service_of(lm, config, limits) as service:
        app = create_app(service, keys=Keys(keys), origins=origins, hosts=hosts)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://here", timeout=60
        ) as client:
            yield client, service


@contextmanager
def on_a_socket(
    lm: LM,
    config: EngineConfig = SMALL,
    limits: Limits | None = None,
    *,
    keys: tuple[str, ...] = (),
) -> Iterator[tuple[str, Service]]:
    """The address of a server in a thread."""
    with service_of(lm, config, limits) as service:
        listening = listen("127.0.0.1", 0)
        app = create_app(service, keys=Keys(keys))
        settings = uvicorn.Config(app, log_config=None, access_log=False)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
        finally:
            server.should_exit = True
            thread.join()
            listening.close()


def run(scenario: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(100):
            await scenario()

    asyncio.run(main())


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for it: an engine counts a step after its events are out."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.005)


def recording(seconds: float) -> bytes:
    """A tone as the bytes of a WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(
            (np.sin(np.arange(int(16000 * seconds)) / 20) * 9000).astype("<i2").tobytes()
        )
    return file.getvalue()


def events(text: str) -> list[Any]:
    """The data of server-sent events, the final [DONE] left out."""
    found = re.findall(r"^data: (.*)$", text, re.M)
    return [json.loads(line) for line in found if line != "[DONE]"]


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>'
THOUGHT = "<|channel>thought\nrain?\n<channel|>"
