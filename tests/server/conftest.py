"""A server in this process, on models that cost nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx2 as httpx
import pytest

from gemsmith.engine.async_engine import AsyncEngine
from gemsmith.engine.batching import EngineConfig
from gemsmith.engine.engine import LM
from gemsmith.server.app import create_app
from gemsmith.server.limits import Keys, Limits
from gemsmith.server.service import Service

SMALL = EngineConfig(max_num_seqs=4, max_model_len=2048, queue_limit=8)


@pytest.fixture(scope="session")
def pocket() -> LM:
    return LM.load("pocket")


@asynccontextmanager
async def serving(
    lm: LM,
    *,
    config: EngineConfig = SMALL,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    engine = AsyncEngine(lm, config)
    service = Service(lm, engine, limits=limits, name="pocket")
    app = create_app(service, keys=Keys(keys), origins=origins)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(
            transport=transport, base_url="http://here", timeout=60
        ) as client:
            yield client, service
    finally:
        engine.close()
        blocks = engine._engine.cache.blocks
        blocks.check([])


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(main())
