"""The embedded model behind the server, and the clients that people use: each runs a tool loop of
several steps with streaming, until the calendar holds what a file says.

The errand is the first of `gemsmith demo`; the tools really run.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pydantic_ai
import pytest
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tests.server.conftest import on_a_socket, until, user

from gemsmith.agent.tools import Tool, Toolbox
from gemsmith.cli.desk import Desk, make_folder
from gemsmith.cli.tour import DESK_TOOLS, ERRANDS, WANTED
from gemsmith.engine.batching import EngineConfig
from gemsmith.engine.engine import LM
from gemsmith.server.service import Service
from gemsmith.text.calls import ToolCall

ERRAND = next(iter(ERRANDS))
MOST_STEPS = 6


def with_openai(url: str, tools: Toolbox) -> str:
    messages: list[Any] = user(ERRAND)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for _ in range(MOST_STEPS):
            with client.chat.completions.stream(
                model="gemma",
                messages=messages,
                tools=tools.declarations,  # pyright: ignore[reportArgumentType]
                temperature=0,
            ) as stream:
                for _ in stream:
                    pass
                message = stream.get_final_completion().choices[0].message
            messages.append(message.model_dump())
            if not message.tool_calls:
                return message.content or ""
            for call in message.tool_calls:
                result = _run(tools, call.function.name, json.loads(call.function.arguments))
                messages.append(
                    {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}
                )
    raise AssertionError("it calls on and on")


def with_anthropic(url: str, tools: Toolbox) -> str:
    messages: list[Any] = user(ERRAND)
    declared: list[Any] = [
        {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
        for tool in tools.tools.values()
    ]
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        for _ in range(MOST_STEPS):
            with client.messages.stream(
                model="gemma",
                max_tokens=300,
                messages=messages,
                tools=declared,
                extra_body={"temperature": 0},
            ) as stream:
                for _ in stream:
                    pass
                made = stream.get_final_message()
            messages.append({"role": "assistant", "content": made.content})
            calls = [block for block in made.content if block.type == "tool_use"]
            if not calls:
                return "".join(block.text for block in made.content if block.type == "text")
            results = [
                {"type": "tool_result", "tool_use_id": call.id,
                 "content": json.dumps(_run(tools, call.name, call.input))}
                for call in calls
            ]  # fmt: skip
            messages.append({"role": "user", "content": results})
    raise AssertionError("it calls on and on")


def with_pydantic_ai(url: str, tools: Toolbox) -> str:
    """The framework runs the loop by itself."""

    def tool(declared: Tool) -> pydantic_ai.Tool[Any]:
        return pydantic_ai.Tool.from_schema(
            lambda **arguments: _run(tools, declared.name, arguments),
            name=declared.name,
            description=declared.description,
            json_schema=dict(declared.parameters),
        )

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            agent = pydantic_ai.Agent(
                OpenAIChatModel("gemma", provider=OpenAIProvider(openai_client=client)),
                tools=[tool(each) for each in tools.tools.values()],
                model_settings={"temperature": 0},
            )
            said = ""
            async with agent.run_stream_events(ERRAND) as events:
                async for event in events:
                    if isinstance(event, pydantic_ai.AgentRunResultEvent):
                        said = event.result.output
            return said

    return asyncio.run(ask())


def _run(tools: Toolbox, name: str, arguments: Any) -> dict[str, Any]:
    return tools.run(ToolCall(name, arguments))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    lm = LM.load("pocket", quant="int4")
    config = EngineConfig(max_num_seqs=4, max_model_len=2048)
    with on_a_socket(lm, config) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("client", [with_openai, with_anthropic, with_pydantic_ai])
def test_a_client_runs_an_errand_of_several_steps(
    client: Callable[[str, Toolbox], str], served: tuple[str, Service], tmp_path: Path
):
    url, service = served
    make_folder(tmp_path)
    desk, before = Desk(tmp_path), service.engine.stats()
    assert client(url, desk.toolbox(DESK_TOOLS)), "there is an answer"
    assert desk.events == WANTED
    # It read, it wrote, it said so.
    until(lambda: service.engine.stats().finished - before.finished >= 3)
    after = service.engine.stats()
    assert after.failed == after.aborted == 0
    # Each prompt goes on from the one before it.
    assert after.prefix_hits - before.prefix_hits >= 2
