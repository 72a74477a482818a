"""Bodies bent in any way: whatever a client sends, it is not the server that fails."""

import asyncio
import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.server.conftest import CALL, WEATHER, serving, user

FUNCTION = WEATHER["function"]
CALLED = {"name": "weather", "arguments": '{"city": "Rome"}'}
DRY = {"type": "text", "text": "dry"}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "gemma",
        "messages": [
            {"role": "system", "content": "Be kind."},
            *user([{"type": "text", "text": "x"}]),
            {
                "role": "assistant",
                "content": "y",
                "reasoning_content": "z",
                "tool_calls": [{"id": "c", "type": "function", "function": CALLED}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "dry"},
        ],
        "tools": [WEATHER],
        "temperature": 0.5,
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 1,
        "stop": ["q"],
        "seed": 1,
        "n": 2,
        "reasoning_effort": "low",
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {
        "model": "gemma",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "z"}]},
            {"type": "function_call", "call_id": "c", **CALLED},
            {"type": "function_call_output", "call_id": "c", "output": "dry"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "max_output_tokens": 9,
    },
    "/v1/messages": {
        "model": "gemma",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "Be kind."}],
        "messages": [
            *user("x"),
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "z", "signature": ""},
                    {"type": "tool_use", "id": "c", "name": "weather", "input": {"city": "Rome"}},
                ],
            },
            *user([{"type": "tool_result", "tool_use_id": "c", "content": [DRY]}]),
        ],
        "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
        "stop_sequences": ["q"],
        "thinking": {"type": "enabled", "budget_tokens": 9},
    },
    "/v1/completions": {
        "model": "gemma",
        "prompt": ["a", "b"],
        "max_tokens": 9,
        "logprobs": 1,
        "stop": "q",
    },
}  # fmt: skip
JUNK = st.sampled_from(
    [None, True, False, 0, -1, 3, 2**70, 1e308, float("nan"), "", "x", "\ud800", "<turn|>",
     "data:,", "a" * 5000, [], {}, [[]], [None], [{}], ["a", 1], {"type": "text"}, {"$ref": "#"},
     {"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}]
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a JSON value."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [place for key, item in inside for place in [(*path, key), *places(item, (*path, key))]]


@st.composite
def bent(draw: st.DrawFn, path: str) -> dict[str, Any]:
    """A good body with up to three values exchanged, dropped or put under another name."""
    body: Any = copy.deepcopy(GOOD[path])
    body["stream"] = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(body)))
        holder = body
        for key in way:
            holder = holder[key]
        what = draw(st.sampled_from(["exchange", "drop", "rename", "repeat"]))
        if what == "exchange":
            holder[last] = draw(JUNK)
        elif what == "drop":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(["type", "content", "id", "name", "x"]))] = holder[last]
        else:
            holder.append(copy.deepcopy(holder[last]))
        if not places(body):
            break
    return body


@pytest.mark.parametrize("path", GOOD)
def test_no_body_makes_the_server_fail(says, path):
    lm = says(lambda prompt: f"So{CALL}<|tool_response>" if "dry" in prompt else "Yes.<turn|>")

    @settings(
        max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(body=bent(path))
    def hold(body: dict[str, Any]) -> None:
        async def ask() -> None:
            answer = await client.post(
                path, content=json.dumps(body), headers={"content-type": "application/json"}
            )
            assert answer.status_code in (200, 400, 404), (answer.text, body)
            assert '"server_error"' not in answer.text, body
            assert '"api_error"' not in answer.text, body

        loop.run_until_complete(ask())

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        server = serving(lm)
        client, service = runner.run(server.__aenter__())
        try:
            good = runner.run(client.post(path, json=GOOD[path]))
            assert good.status_code == 200, good.text
            hold()
        finally:
            runner.run(server.__aexit__(None, None, None))
        assert service.engine.stats().failed == 0
