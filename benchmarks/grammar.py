"""Calls of tools with random schemas: does every one parse, and does `jsonschema` find it fits?

Each tool (`testing.random_tool`) is offered to a model that must call it, at a temperature that
makes it write nonsense where it may. A call that max_tokens cut short is counted apart: it comes
back as a problem, not as a call. A reply of nothing at all would be a failure. With --free the same
is asked without a grammar, for comparison.

Run: python -m benchmarks.grammar [--count 300] [--model pocket] [--temperature 2] [--free]
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

from jsonschema import Draft202012Validator

import gemsmith
from gemsmith.engine.engine import LM
from gemsmith.engine.request import Generation
from gemsmith.testing import random_tool

MAX_TOKENS = 200


def wrong(reply: Generation, tool: dict[str, Any]) -> Iterator[str]:
    """What breaks the promise: an empty reply, a call that is none or does not fit its schema."""
    if not (reply.text or reply.tool_calls or reply.problems or reply.thinking):
        yield "empty reply"
    for problem in reply.problems:
        cut = reply.finish_reason == "length" and problem.kind == "truncated"
        if not cut and problem.kind != "duplicate_key":
            yield f"{problem.kind}: {problem.message}"
    schema = Draft202012Validator(tool["function"]["parameters"])
    for call in reply.tool_calls:
        if call.name != tool["function"]["name"]:
            yield f"called {call.name!r}"
        yield from (error.message for error in schema.iter_errors(call.arguments))


def measure(
    lm: LM, *, count: int, temperature: float, constrained: bool = True, first: int = 0
) -> dict[str, Any]:
    """Counts over `count` random tools, seeds from `first` on; failures with their seeds."""
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    started = time.perf_counter()
    for seed in range(first, first + count):
        tool = random_tool(Random(seed))
        reply = lm.generate(
            "Use the tool now.",
            tools=[tool],
            temperature=temperature,
            seed=seed,
            max_tokens=MAX_TOKENS,
            constrained=constrained,
            tool_choice="required" if constrained else "auto",
        )
        counts["calls"] += len(reply.tool_calls)
        counts["tokens"] += reply.usage.completion_tokens
        counts["cut_short"] += reply.finish_reason == "length"
        found = list(wrong(reply, tool))
        counts["good"] += not found and bool(reply.tool_calls)
        if found:
            failures.append({"seed": seed, "wrong": found[:3]})
    return {
        "name": "grammar",
        "model": lm.name,
        "constrained": constrained,
        "temperature": temperature,
        "schemas": count,
        "replies_with_good_calls": counts["good"],
        "calls": counts["calls"],
        "cut_short": counts["cut_short"],
        "tokens": counts["tokens"],
        "failures": len(failures),
        "first_failures": failures[:10],
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="seed of the first schema")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--free", action="store_true", help="without a grammar")
    asked = parser.parse_args()
    lm = gemsmith.load(asked.model)
    found = measure(
        lm,
        count=asked.count,
        temperature=asked.temperature,
        constrained=not asked.free,
        first=asked.first,
    )
    print(json.dumps(found, ensure_ascii=False))
    return 1 if found["failures"] and not asked.free else 0


if __name__ == "__main__":
    sys.exit(main())
