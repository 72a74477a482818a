"""Clients of a soak test in one process: well-behaved, impatient and broken ones, until the time is
up. Standard library alone, so that there may be many; `soak.py` starts, stops and continues them.

What an answer must be is known of every request: whole and well-formed, or a refusal with a status
from 400 to 499. Anything else is a failure of the server, and told as such.

Run by soak.py: python -m benchmarks.soak_worker PORT SECONDS CLIENTS SEED
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from benchmarks.client import Answer, ask

TOOL = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
FUNCTION = {"name": TOOL["name"], "description": TOOL["description"], "parameters": TOOL["schema"]}
CLAUDES = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["schema"]}
UNWRITABLE = {"type": "function", "function": {"name": "a b"}}
FORM = "multipart/form-data; boundary=x"
PATIENCE_S = 300
"""How long an answer may take: far more than any should."""
WAV = b"RIFF\x04\x00\x00\x00WAVE"

Body = dict[str, Any] | bytes | None
Wish = tuple[str, Body]
"""Path and body."""


def chat(draw: Random, **more: Any) -> Wish:
    """A conversation of some turns, with a history that others share now and then."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": f"You are agent {draw.randrange(4)}. " * 4},
        {"role": "user", "content": f"What is the weather in city {draw.randrange(20)}?"},
    ]
    for step in range(draw.randrange(4)):
        call = {"name": "get_weather", "arguments": json.dumps({"city": f"city {step}"})}
        calls = [{"id": f"c{step}", "type": "function", "function": call}]
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        messages.append({"role": "tool", "tool_call_id": f"c{step}", "content": '{"sky": "clear"}'})
    body = {
        "model": "model",
        "messages": messages,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": draw.choice(["auto", "required", "none"]),
        "max_tokens": draw.randrange(1, 48),
        "stream": draw.random() < 0.6,
        "temperature": draw.choice([0, 1]),
    }
    if draw.random() < 0.2:
        body |= {"tools": [], "tool_choice": "auto", "n": 2}
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": TOOL["schema"]},
        }
    return "/v1/chat/completions", body | more


def completions(draw: Random) -> Wish:
    prompt = [draw.randrange(300, 4000) for _ in range(draw.randrange(1, 400))]
    body = {"model": "model", "prompt": prompt, "max_tokens": draw.randrange(1, 48)}
    return "/v1/completions", body | {"ignore_eos": True, "stream": draw.random() < 0.5}


def responses(draw: Random) -> Wish:
    tools = [{"type": "function"} | FUNCTION] if draw.random() < 0.5 else []
    body = {"model": "model", "input": f"Tell me about {draw.randrange(9)}.", "tools": tools}
    more = {"max_output_tokens": draw.randrange(1, 48), "stream": draw.random() < 0.5}
    return "/v1/responses", body | more


def messages(draw: Random) -> Wish:
    body = {"model": "model", "messages": [{"role": "user", "content": "Set a timer."}]}
    more = {"max_tokens": draw.randrange(1, 48), "stream": draw.random() < 0.5, "tools": [CLAUDES]}
    return "/v1/messages", body | more


def count(draw: Random) -> Wish:
    said = [{"role": "user", "content": "word " * draw.randrange(1, 200)}]
    return "/v1/messages/count_tokens", {"model": "model", "messages": said}


def look(draw: Random) -> Wish:
    paths = ["/health", "/ready", "/metrics", "/debug/cache", "/v1/models", "/v1/models/model"]
    return draw.choice([*paths, "/openapi.json"]), None


def wrong(draw: Random) -> Wish:
    """What must be refused."""
    path, good = chat(draw)
    assert isinstance(good, dict)
    said = good["messages"]
    sound = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + WAV
    named = b'\r\n--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nmodel\r\n--x--\r\n'
    return draw.choice(
        [
            (path, b"{" * draw.randrange(1, 5000)),
            (path, draw.randbytes(200)),
            (path, b""),
            (path, good | {"model": "other"}),
            (path, good | {"no_such_field": 1}),
            (path, good | {"temperature": -1}),
            (path, good | {"max_tokens": "many"}),
            (path, good | {"messages": []}),
            (path, good | {"messages": [*said, {"role": "nobody", "content": "x"}]}),
            (path, good | {"messages": [{"role": "user", "content": "word " * 20000}]}),
            (path, good | {"messages": [*said, picture("data:image/png;base64,AAAA")]}),
            (path, good | {"messages": [*said, picture("http://127.0.0.1/x.png")]}),
            (path, good | {"tools": [UNWRITABLE], "tool_choice": "auto"}),
            (path, good | {"n": 1000}),
            ("/v1/completions", {"model": "model", "prompt": [10**9]}),
            ("/v1/messages", {"model": "model", "messages": 1, "max_tokens": 5}),
            ("/v1/responses", {"model": "model", "input": [{"type": "no such"}]}),
            ("/v1/audio/transcriptions", sound + named),
            ("/no/such/path", None),
            ("/health", {}),
        ]
    )


def picture(url: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


GOOD: tuple[Callable[[Random], Wish], ...] = (
    chat, chat, chat, completions, responses, messages, count, look,
)  # fmt: skip


def fault(answer: Answer, body: Body) -> str | None:
    """What is wrong with the answer to a good request."""
    if answer.status != 200:
        return f"status {answer.status}: {answer.body[:200]!r}"
    if not isinstance(body, dict) or not body.get("stream"):
        return None if answer.body else "an empty answer"
    try:
        events = answer.events()
    except ValueError as error:
        return f"a stream that is no JSON: {error}"
    if not events or any("error" in event and event["error"] for event in events):
        return f"a stream that failed: {answer.body[-200:]!r}"
    ends = (b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete")
    if not any(end in answer.body[-20000:] for end in ends):
        return f"a stream without an end: {answer.body[-200:]!r}"
    return None


async def client(port: int, until: float, draw: Random, told: Counter[str]) -> list[str]:
    """One request after another; what the server did wrong."""
    faults: list[str] = []
    while time.monotonic() < until:
        mood = draw.choices(("good", "wrong", "abort"), (6, 2, 2))[0]
        path, body = wrong(draw) if mood == "wrong" else draw.choice(GOOD)(draw)
        kind = FORM if path.endswith("transcriptions") else "application/json"
        told[f"{mood} {path}"] += 1
        try:
            if mood == "abort":
                with suppress(TimeoutError, ConnectionAbortedError):
                    most = draw.choice([None, 0, 500, 3000])
                    async with asyncio.timeout(draw.choice([0.01, 0.1, 1])):
                        await ask(port, path, body, kind=kind, most=most)
                continue
            async with asyncio.timeout(PATIENCE_S):
                answer = await ask(port, path, body, kind=kind)
        except (OSError, TimeoutError) as error:
            faults.append(f"{mood} {path}: {type(error).__name__} {error}")
            continue
        told[f"status {answer.status}"] += 1
        found = fault(answer, body) if mood == "good" else None
        if mood == "wrong" and not 400 <= answer.status < 500:
            found = f"status {answer.status} of {str(body)[:200]}: {answer.body[:200]!r}"
        if found:
            faults.append(f"{mood} {path}: {found}")
        await asyncio.sleep(draw.expovariate(1 / 0.2))
    return faults


async def main(port: int, seconds: float, clients: int, seed: int) -> None:
    until, told = time.monotonic() + seconds, Counter[str]()
    draws = [Random(f"{seed} {number}") for number in range(clients)]
    found = await asyncio.gather(*(client(port, until, draw, told) for draw in draws))
    print(json.dumps({"told": told, "faults": [fault for each in found for fault in each]}))


if __name__ == "__main__":
    port, seconds, clients, seed = sys.argv[1:]
    asyncio.run(main(int(port), float(seconds), int(clients), int(seed)))
