"""The wall time of a loop of ten tool calls, at gemsmith's server and at llama.cpp's, one run.

One client asks for a call each step (`tool_choice: required`), appends the call and the tool's
result, and asks again; nothing waits between. Each server formats the chat, constrains the reply
and reads the call in its own way. Where an answer holds no call that fits the tool, the loop goes
on with the one that should have come, so both carry the same history; how many calls came is told,
and the tokens of an answer that is an error are not.

pocket is the trained model and ends its calls by itself; a server that lets it think first, or name
arguments that no schema knows, waits for what it then writes. Random weights end nothing that a
grammar leaves open, and llama.cpp's leaves arguments open: of these no reply may have more tokens
than the longest of ours had in the warm-up, which cuts llama.cpp's off and leaves ours as they are.

A run that is stopped is continued by the next one (`measure.Unfinished`).

Run: python -m benchmarks.agent [--model pocket] [--record]
"""

import argparse
import asyncio
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, servers
from benchmarks.client import ask
from benchmarks.servers import LLAMA, OURS, Server
from gemsmith.weights.hub import POCKET

STEPS = 10
MOST_TOKENS = 96
"""Of a reply that ends by itself."""
ROOM = 4096
"""Of a sequence. The prompts of random checkpoints have a token to a byte."""
CITIES = ("Paris", "Tokyo", "Lagos", "Quito", "Delhi")
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": list(CITIES)}},
            "required": ["city"],
        },
    },
}

Messages = list[dict[str, Any]]


@dataclass(slots=True)
class Loop:
    """What one loop took."""

    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)
    """Of each reply."""
    calls: int = 0


async def loop(server: Server, number: int, most: int) -> Loop:
    """Ten steps. number: another one shares no prompt with this."""
    done = Loop()
    messages: Messages = [
        {"role": "system", "content": f"Session {number}. Call tools."},
        {"role": "user", "content": f"Compare the weather in {', '.join(CITIES)}."},
    ]
    began = time.perf_counter()
    for step in range(STEPS):
        answer = await ask(server.port, "/v1/chat/completions", body(messages, most))
        told = answer.json() if answer.status == 200 else {}
        done.tokens.append(told.get("usage", {}).get("completion_tokens", 0))
        call = call_of(told)
        done.calls += call is not None
        messages += turn(call, step)
    done.seconds = time.perf_counter() - began
    return done


def looped(server: Server, number: int, most: int) -> dict[str, Any]:
    return asdict(asyncio.run(loop(server, number, most)))


def body(messages: Messages, most: int) -> dict[str, Any]:
    return {
        "model": "model",
        "messages": messages,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "temperature": 0,
        "max_tokens": most,
    }


def call_of(told: dict[str, Any]) -> str | None:
    """The city that a whole answer's call names; None where there is no call that fits the tool."""
    try:
        function = told["choices"][0]["message"]["tool_calls"][0]["function"]
        arguments = json.loads(function["arguments"])
        city = arguments["city"]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    fits = function["name"] == "get_weather" and city in CITIES and len(arguments) == 1
    return city if fits else None


def turn(city: str | None, step: int) -> Messages:
    """A call and its result, as an agent appends them."""
    arguments = {"city": city or CITIES[step % len(CITIES)]}
    function = {"name": "get_weather", "arguments": json.dumps(arguments)}
    id = f"call_{step}"
    result = {"city": arguments["city"], "sky": "clear", "celsius": 10 + step}
    return [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": id, "content": json.dumps(result)},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="pocket", choices=servers.MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    about = measure.machine() | {"threads": options.threads}
    weights = servers.weights_of(options.model, trained=True)
    so_far = measure.Unfinished(f"agent-{options.model}", about)
    with ExitStack() as stack:
        up, missing = servers.both(
            stack, weights, sequences=1, longest=ROOM, threads=options.threads
        )
        loops: dict[str, list[Loop]] = {OURS: [], LLAMA: []}
        warm = asyncio.run(loop(up[0], -1, MOST_TOKENS))
        most = MOST_TOKENS if options.model == POCKET else max(warm.tokens)
        for number in range(options.rounds + 1):
            for server in up:
                run = partial(looped, server, number, most)
                if number:
                    done = Loop(**so_far.of(number, server.name, most, measure=run))
                    loops[server.name].append(done)
                else:  # it warms up
                    done = Loop(**run())
                print(
                    f"round {number} of {options.rounds}: {server.name:15} {done.seconds:7.2f} s, "
                    f"{sum(done.tokens)} tokens, {done.calls} calls of {STEPS}",
                    flush=True,
                )
    report(options.model, weights.dtype, loops, missing, about, options.record)
    so_far.end()


def report(
    model: str,
    dtype: str,
    loops: dict[str, list[Loop]],
    missing: dict[str, str],
    about: dict[str, Any],
    record: Path | None,
) -> None:
    """Print the findings and the JSON line."""
    programs: dict[str, Any] = {}
    for name, done in loops.items():
        programs[name] = {"missing": missing.get(name, "")}
        if not done:
            print(f"{name:15} {missing.get(name)}")
            continue
        seconds = measure.summary([each.seconds for each in done])
        calls, tokens = sum(e.calls for e in done), sum(sum(e.tokens) for e in done) / len(done)
        programs[name] |= {"seconds": seconds, "calls": calls, "tokens": tokens}
        print(
            f"{name:15} {seconds['median']:.2f} s ({seconds['min']:.2f}-{seconds['max']:.2f}, "
            f"n={seconds['n']}), {tokens:.0f} tokens, {calls} calls of {STEPS * len(done)}"
        )
    if loops[LLAMA]:
        ratio = programs[OURS]["seconds"]["median"] / programs[LLAMA]["seconds"]["median"]
        print(f"{STEPS} steps, time over llama-server's: {ratio:.2f} (<= 0.5)")
    results = {"model": model, "dtype": dtype, "steps": STEPS, "programs": programs}
    measure.finish("agent", results, about, record=record)


if __name__ == "__main__":
    sys.exit(main())
