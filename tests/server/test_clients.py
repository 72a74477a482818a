"""The official clients, over a socket: tool loops of several steps with streaming; leaving early.

The model is told what to say: one call, then another, then the answer.
"""

import json
from typing import Any

import anthropic
import httpx2 as httpx
import openai
import pytest
from tests.server.conftest import CALL, THOUGHT, WEATHER, on_a_socket, until, user

from gemsmith.engine.batching import EngineConfig

FUNCTION = WEATHER["function"]


def three_steps(prompt: str) -> str:
    """Two calls, one after the other, and an answer."""
    answered = prompt.count("<tool_response|>")
    # Where thinking is asked for, the prompt itself opens the thought that follows a result.
    opened = prompt.endswith("<|channel>thought\n")
    if answered < 2:
        thought = THOUGHT.removeprefix("<|channel>thought\n") if opened else THOUGHT
        return f"{thought}{CALL}<|tool_response>"
    return "dry\n<channel|>" * opened + "Sun, then <b>rain</b> \u2602.<turn|>"


@pytest.mark.parametrize("streaming", [False, True])
def test_the_openai_client_runs_a_tool_loop(says, streaming):
    lm = says(three_steps)
    with on_a_socket(lm) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        messages: list[Any] = user("Rain?")
        steps = 0
        while True:
            steps += 1
            asked: dict[str, Any] = {"model": "gemma", "messages": messages, "tools": [WEATHER]}
            if streaming:
                with client.chat.completions.stream(**asked) as stream:
                    for _ in stream:
                        pass
                    message = stream.get_final_completion().choices[0].message
            else:
                message = client.chat.completions.create(**asked).choices[0].message
            messages.append(message.model_dump())
            if not message.tool_calls:
                break
            for call in message.tool_calls:
                assert json.loads(call.function.arguments) == {"city": "Rome", "days": 2}
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "dry"})
        assert steps == 3
        assert message.content == "Sun, then <b>rain</b> \u2602."
        # Thoughts of a tool loop that is still running are shown to the model again.
        assert lm.asked[-1].count("rain?") == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_the_openai_client_runs_a_tool_loop_of_responses(says, streaming):
    lm = says(three_steps)
    with on_a_socket(lm) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        items: list[Any] = user("Rain?")
        tool: Any = {"type": "function", "strict": False, **FUNCTION}
        for step in range(3):
            asked: dict[str, Any] = {"model": "gemma", "input": items, "tools": [tool]}
            if streaming:
                with client.responses.stream(**asked) as stream:
                    for _ in stream:
                        pass
                    made = stream.get_final_response()
            else:
                made = client.responses.create(**asked)
            items += [item.model_dump(exclude_none=True) for item in made.output]
            calls = [item for item in made.output if item.type == "function_call"]
            assert len(calls) == (step < 2)
            for call in calls:
                assert json.loads(call.arguments) == {"city": "Rome", "days": 2}
                output = {"call_id": call.call_id, "output": "dry"}
                items.append({"type": "function_call_output", **output})
        assert made.output_text == "Sun, then <b>rain</b> \u2602."
        assert made.usage is not None
        assert lm.asked[-1].count("rain?") == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_the_anthropic_client_runs_a_tool_loop(says, streaming):
    lm = says(three_steps)
    tool: Any = {
        "name": "weather",
        "description": "Tells the weather.",
        "input_schema": FUNCTION["parameters"],
    }
    with on_a_socket(lm) as (url, _), anthropic.Anthropic(base_url=url, api_key="none") as client:
        messages: list[Any] = user("Rain?")
        for step in range(3):
            asked: dict[str, Any] = {
                "model": "gemma",
                "max_tokens": 300,
                "system": [
                    {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}
                ],
                "messages": messages,
                "tools": [tool],
                "thinking": {"type": "enabled", "budget_tokens": 1024},
            }
            if streaming:
                with client.messages.stream(**asked) as stream:
                    for _ in stream:
                        pass
                    made = stream.get_final_message()
            else:
                made = client.messages.create(**asked)
            counted = client.messages.count_tokens(
                **{name: asked[name] for name in asked if name != "max_tokens"}
            )
            usage = made.usage
            assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
            messages.append({"role": "assistant", "content": made.content})
            calls = [block for block in made.content if block.type == "tool_use"]
            assert made.stop_reason == ("tool_use" if step < 2 else "end_turn")
            results = [
                {"type": "tool_result", "tool_use_id": call.id, "content": "dry"} for call in calls
            ]
            assert all(call.input == {"city": "Rome", "days": 2} for call in calls)
            messages.append({"role": "user", "content": results})
        thought, block = made.content
        assert thought.type == "thinking"
        assert thought.thinking == "dry"
        assert block.type == "text"
        assert block.text == "Sun, then <b>rain</b> \u2602."
        assert lm.asked[-1].count("rain?") == 2


def test_errors_come_as_the_clients_know_them(says):
    with on_a_socket(says("Yes.<turn|>")) as (url, _):
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
            pytest.raises(openai.BadRequestError, match="temperature 9999"),
        ):
            client.chat.completions.create(
                model="gemma",
                messages=user("x"),  # pyright: ignore[reportArgumentType]
                temperature=9999,
            )
        with (
            anthropic.Anthropic(base_url=url, api_key="none") as client,
            pytest.raises(anthropic.NotFoundError, match="not served here"),
        ):
            client.messages.create(model="other", max_tokens=1, messages=[])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_frees_its_place(says, path, streaming):
    """It would be thousands of steps otherwise."""
    body = {
        "model": "gemma",
        "messages": user("x"),
        "input": "x",
        "max_tokens": 2900,
        "stream": streaming,
    }
    known = {
        "/v1/chat/completions": ("messages", "max_tokens"),
        "/v1/messages": ("messages", "max_tokens"),
        "/v1/responses": ("input",),
    }
    body = {name: body[name] for name in ("model", "stream", *known[path])}
    with on_a_socket(says("a" * 2900)) as (url, service), httpx.Client(base_url=url) as client:
        if streaming:
            with client.stream("POST", path, json=body) as answer:
                assert next(answer.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=1.0)
        until(lambda: service.engine.stats().aborted == 1)
        stats = service.engine.stats()
        assert stats.running == stats.waiting == 0
        assert stats.generated_tokens < 2000


def test_a_request_that_fails_takes_no_other_with_it(says):
    lm = says(lambda prompt: "FAIL" if "bad" in prompt else "a" * 60 + "<turn|>")
    with on_a_socket(lm) as (url, service), httpx.Client(base_url=url, timeout=60) as client:
        body = {"model": "gemma", "messages": user("good"), "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            bad = body | {"messages": user("bad")}
            failed = client.post("/v1/chat/completions", json=bad | {"stream": False})
            assert failed.status_code == 500
            assert "secret" not in failed.text
            midway = client.post("/v1/chat/completions", json=bad)
            last = [line for line in midway.text.splitlines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
            assert "".join(lines).count('"content": "a"') == 60
        assert service.engine.stats().failed == 2
        assert client.get("/health").status_code == 200


def test_a_stream_that_waits_says_that_it_is_alive(says, monkeypatch):
    monkeypatch.setattr("gemsmith.server.http.PING_S", 0.05)
    config = EngineConfig(max_num_seqs=1, max_model_len=3000)
    with (
        on_a_socket(says("a" * 2900), config) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        body = {"model": "gemma", "messages": user("x"), "stream": True, "max_tokens": 2900}
        with client.stream("POST", "/v1/chat/completions", json=body) as first:
            held = first.iter_raw()  # let go, it would close the connection
            next(held)
            for path, ping in (
                ("/v1/chat/completions", ": ping"),
                ("/v1/messages", 'data: {"type": "ping"}'),
            ):
                with client.stream("POST", path, json=body | {"max_tokens": 1}) as second:
                    assert ping in second.iter_lines()
