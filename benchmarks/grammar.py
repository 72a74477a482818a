"""Calls of tools with random schemas: does every one parse, and does `jsonschema` find it fits?

Each tool (`testing.random_tool`) is offered to a model that must call it, at a temperature that
makes it write nonsense where it may. A call that max_tokens cut short is counted apart: it comes
back as a problem, not as a call. A reply of nothing at all is a failure, and so is one that came to
its end without a call. With --free the same is asked without a grammar, for comparison.

Replies are computed in batches, with low-bit weights: on the CPU each is the same to the bit as
when `LM.generate` is asked for it alone, so a failure is found again by its seed. What is done is
noted in --progress, and not done again by a run of the same settings at the same commit.

Run: python -m benchmarks.grammar [--count 10000] [--temperature 2] [--free] [--record]
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from jsonschema import Draft202012Validator

from benchmarks import measure
from gemsmith.engine.batching import BatchEngine, EngineConfig, run_all
from gemsmith.engine.engine import LM
from gemsmith.engine.reply import collect
from gemsmith.engine.request import Generation, Request
from gemsmith.errors import GemsmithError
from gemsmith.testing import random_tool

MAX_TOKENS = 200
BITS = "4"
PIECE = 100
"""Schemas that are asked together, and noted as done together."""
PROGRESS = measure.REPOSITORY / "build" / "grammar.jsonl"
ENGINE = EngineConfig(max_num_seqs=16, max_model_len=4096, queue_limit=PIECE, prefix_caching=False)


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


def measure_piece(
    engine: BatchEngine, seeds: Sequence[int], *, temperature: float, constrained: bool = True
) -> dict[str, Any]:
    """Counts over the random tools of some seeds; failures with their seeds."""
    lm, started = engine.lm, time.perf_counter()
    tools = [random_tool(Random(seed)) for seed in seeds]
    requests = [
        Request(
            prompt=lm.encode([{"role": "user", "content": "Use the tool now."}], tools=[tool]),
            params=lm.sampling.changed(temperature=temperature, seed=seed, max_tokens=MAX_TOKENS),
            follow=lm.follow(tools=[tool], tool_choice="required") if constrained else None,
        )
        for seed, tool in zip(seeds, tools, strict=True)
    ]
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    for seed, tool, made in zip(seeds, tools, run_all(engine, requests), strict=True):
        if isinstance(made, GemsmithError):
            failures.append({"seed": seed, "wrong": [str(made)]})
            continue
        reply = collect(made)
        found = list(wrong(reply, tool))
        cut = reply.finish_reason == "length"
        if constrained and not (found or cut or reply.tool_calls):
            found.append("no call")
        counts["calls"] += len(reply.tool_calls)
        counts["tokens"] += reply.usage.completion_tokens
        counts["cut_short"] += cut
        counts["good_calls"] += 0 if found else len(reply.tool_calls)
        counts["empty_replies"] += "empty reply" in found
        if found:
            failures.append({"seed": seed, "wrong": found[:3]})
    return {
        **{name: counts[name] for name in COUNTED},
        "failures": failures,
        "seconds": round(time.perf_counter() - started, 1),
    }


COUNTED = ("calls", "good_calls", "cut_short", "empty_replies", "tokens")


def total(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all pieces; `in_a_row` are schemas before the first failure."""
    failures = [failure for piece in pieces for failure in piece["failures"]]
    schemas = sum(piece["count"] for piece in pieces)
    first = min(piece["first"] for piece in pieces)
    return {
        "schemas": schemas,
        "in_a_row": min((failure["seed"] for failure in failures), default=first + schemas) - first,
        **{name: sum(piece[name] for piece in pieces) for name in COUNTED},
        "failures": len(failures),
        "first_failures": failures[:10],
        "seconds": round(sum(piece["seconds"] for piece in pieces), 1),
    }


def noted(path: Path, settings: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Pieces that were done with these settings before, by their first seed and count."""
    return {
        (piece["first"], piece["count"]): piece
        for piece in measure.noted(path)
        if piece["settings"] == settings
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=10_000, help="random schemas")
    parser.add_argument("--first", type=int, default=0, help="seed of the first schema")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--free", action="store_true", help="without a grammar")
    parser.add_argument("--progress", type=Path, default=PROGRESS, help="where pieces are noted")
    measure.add_record(parser)
    asked = parser.parse_args()
    if asked.count < 1:
        parser.error("--count must be at least 1")
    about = measure.machine()
    settings = {
        "model": asked.model,
        "dtype": measure.label(BITS) + ", free" * asked.free,
        "constrained": not asked.free,
        "temperature": asked.temperature,
        "commit": measure.commit(),
    }
    done = noted(asked.progress, settings)
    engine = BatchEngine(LM.load(asked.model, device="cpu", quant=f"int{BITS}"), ENGINE)
    pieces: list[dict[str, Any]] = []
    end = asked.first + asked.count
    for first in range(asked.first, end, PIECE):
        seeds = range(first, min(first + PIECE, end))
        piece = done.get((first, len(seeds)))
        if piece is None:
            found = measure_piece(
                engine, seeds, temperature=asked.temperature, constrained=not asked.free
            )
            piece = {"first": first, "count": len(seeds), "settings": settings, **found}
            measure.note(asked.progress, piece)
        pieces.append(piece)
        so_far = total(pieces)
        print(
            f"{so_far['schemas']} schemas, {so_far['calls']} calls, {so_far['cut_short']} cut "
            f"short, {so_far['failures']} failures, {so_far['seconds']:.0f} s",
            flush=True,
        )
    results = {**settings, "max_tokens": MAX_TOKENS, **total(pieces)}
    measure.finish("grammar", results, about, record=asked.record)
    return 1 if results["failures"] and not asked.free else 0


if __name__ == "__main__":
    sys.exit(main())
