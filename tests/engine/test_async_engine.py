"""The asyncio face: streams, cancellation, back-pressure, draining; nothing is left behind."""

import asyncio
import gc
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from gemsmith.engine.async_engine import AsyncEngine, Stream
from gemsmith.engine.batching import BatchEngine, EngineConfig
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt, parts
from gemsmith.engine.reply import collect
from gemsmith.engine.request import Finished, Request, SamplingParams
from gemsmith.errors import CapacityError, GemsmithError, QueueFullError, RequestError
from gemsmith.testing import random_model, tiny_config

SMALL = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, max_model_len=200, block_tokens=4)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def lm(tokenizer) -> LM:
    config = tiny_config("E2B", vocab_size=tokenizer.vocab_size)
    return LM(random_model(config), tokenizer, config, kv="float32")


def asked(length: int, params: SamplingParams = GREEDY) -> Request:
    draw = random.Random(length)
    ids = [draw.randrange(3, 280) for _ in range(length)]
    return Request(prompt=Prompt(ids), params=params, chat=False)


def run(lm: LM, scenario: Callable, config: EngineConfig = SMALL) -> AsyncEngine:
    """A scenario on an engine of its own; every block is free afterwards."""

    async def main() -> AsyncEngine:
        engine = AsyncEngine(lm, config)
        try:
            async with asyncio.timeout(60):
                await scenario(engine)
                await engine.drain()
        finally:
            engine.close()
        return engine

    engine = asyncio.run(main())
    engine._engine.prefix.clear()
    blocks = engine._engine.cache.blocks
    assert (blocks.full.held, blocks.sliding.held) == (0, 0)
    blocks.check([])
    return engine


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def test_many_clients_get_what_each_would_get_alone(lm):
    lengths = [3, 50, 17, 90, 8, 33, 4, 61]

    async def client(engine: AsyncEngine, length: int) -> tuple[int, ...]:
        return collect([e async for e in await engine.submit(asked(length))]).token_ids

    async def scenario(engine: AsyncEngine) -> None:
        found = await asyncio.gather(*(client(engine, length) for length in lengths))
        for length, ids in zip(lengths, found, strict=True):
            assert ids == lm.complete(asked(length).prompt.ids, sampling=GREEDY).token_ids
        assert engine.stats().finished == len(lengths)
        assert engine.stats().generated_tokens_per_s > 0

    run(lm, scenario)


def test_a_cancelled_client_frees_its_seat(lm):
    long = GREEDY.changed(max_tokens=150)

    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(asked(5, long))
        await anext(stream)

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().aborted == 1)
        assert engine.stats().running == 0
        assert [e async for e in stream] == []

    run(lm, scenario)


@pytest.mark.parametrize("leave", ["break", "drop", "error"])
def test_a_stream_left_early_is_aborted(lm, leave):
    long = GREEDY.changed(max_tokens=150)

    async def scenario(engine: AsyncEngine) -> None:
        stream: Stream | None = await engine.submit(asked(5, long))
        if leave == "break":
            async with stream as events:
                async for _ in events:
                    break
        elif leave == "error":
            with suppress(ZeroDivisionError):
                async with stream as events:
                    async for _ in events:
                        raise ZeroDivisionError
        stream = events = None
        gc.collect()
        await until(lambda: engine.stats().aborted == 1)

    run(lm, scenario)


def test_submitting_can_be_cancelled(lm):
    async def scenario(engine: AsyncEngine) -> None:
        task = asyncio.create_task(engine.submit(asked(5, GREEDY.changed(max_tokens=150))))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().aborted == 1)

    run(lm, scenario)


def test_refusals_come_from_submit(lm):
    long = GREEDY.changed(max_tokens=190)

    async def scenario(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="no token ids"):
            await engine.submit(Request(prompt=Prompt([])))
        first = await engine.submit(asked(5, long))
        await anext(first)
        second = await engine.submit(asked(5, long))
        with pytest.raises(QueueFullError, match="1 requests are waiting"):
            await engine.submit(asked(5, long))
        await first.aclose()
        await second.aclose()

    run(lm, scenario, replace(SMALL, queue_limit=1, max_num_seqs=1))


def test_draining_ends_what_is_here_and_refuses_what_comes(lm):
    async def scenario(engine: AsyncEngine) -> None:
        stream = await engine.submit(asked(20))
        drained = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="the engine is shutting down"):
            await engine.submit(asked(5))
        events = [event async for event in stream]
        assert isinstance(events[-1], Finished)
        await drained
        assert engine.draining
        assert not engine.healthy

    run(lm, scenario)


def test_what_is_left_when_draining_takes_too_long_is_told_so(lm):
    async def scenario(engine: AsyncEngine) -> None:
        streams = [await engine.submit(asked(5, GREEDY.changed(max_tokens=190))) for _ in range(4)]
        await engine.drain(timeout_s=0)
        for stream in streams:
            with pytest.raises(CapacityError, match="was shut down before this was done"):
                async for _ in stream:
                    pass

    run(lm, scenario)


def test_an_error_of_the_engine_itself_reaches_every_client(lm, monkeypatch):
    def broken(self):
        raise AssertionError("blocks went missing")

    async def scenario(engine: AsyncEngine) -> None:
        monkeypatch.setattr(BatchEngine, "step", broken)
        stream = await engine.submit(asked(5))
        with pytest.raises(GemsmithError, match=r"a step failed: .*blocks went missing"):
            await anext(stream)
        assert not engine.healthy
        with pytest.raises(CapacityError, match="the engine has stopped: a step failed"):
            await engine.submit(asked(5))

    run(lm, scenario)


def test_messages_are_encoded_beside_the_steps(lm):
    async def scenario(engine: AsyncEngine) -> None:
        lm.is_chat = True
        messages = [{"role": "user", "content": "abc"}]
        assert (await engine.encode(messages)).ids == lm.encode(messages).ids

    run(lm, scenario)


@pytest.fixture
def slow(lm, monkeypatch) -> threading.Event:
    """Until it is set, no medium is read; then they turn out to be none."""
    read, lm.is_chat = threading.Event(), True
    monkeypatch.setattr(
        "gemsmith.engine.engine.collect_media",
        lambda messages, *_, **__: [] if not any(parts(messages)) else read.wait() and [],
    )
    return read


FILM = [{"role": "user", "content": [{"type": "video", "video": b""}]}]


def test_a_text_does_not_wait_for_the_film_of_another(lm, slow):
    async def scenario(engine: AsyncEngine) -> None:
        film = asyncio.create_task(engine.encode(FILM))
        await asyncio.sleep(0)
        assert (await engine.encode([{"role": "user", "content": "abc"}])).ids
        assert not film.done()
        slow.set()
        assert (await film).ids

    run(lm, scenario)


def test_what_is_read_while_the_engine_closes_is_refused(lm, slow):
    async def scenario(engine: AsyncEngine) -> None:
        film = asyncio.create_task(engine.encode(FILM))
        await asyncio.sleep(0)
        await engine.drain(0)
        slow.set()
        with pytest.raises(CapacityError, match="shutting down"):
            await film

    run(lm, scenario)


def test_random_clients_leave_nothing_behind(lm):
    draw = random.Random(2)

    async def client(engine: AsyncEngine) -> None:
        params = GREEDY.changed(max_tokens=draw.randrange(1, 30))
        try:
            async with asyncio.timeout(draw.choice([None, None, 0.02, 0.1])):
                async for _ in await engine.submit(asked(draw.randrange(1, 90), params)):
                    pass
        except TimeoutError:
            pass

    async def scenario(engine: AsyncEngine) -> None:
        await asyncio.gather(*(client(engine) for _ in range(40)))
        await until(lambda: engine.stats().running + engine.stats().waiting == 0)
        assert engine.stats().finished + engine.stats().aborted == 40

    run(lm, scenario)
