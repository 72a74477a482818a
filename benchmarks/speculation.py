"""Replies guessed ahead against the same replies without: how many guesses are right, what is won.

Kinds of text, each in two prompts: `echo`, a text to be said again; `tool`, calls whose arguments
stand in the question; `free`, drawn so hot that there is nothing to look up, and all that guessing
could do is lose; `repeats`, pairs of tokens drawn from few, where there is always something to look
up and it is mostly wrong. The first two end by themselves, the others at a length.
`periodic` are random tokens in a loop, an upper end. The model runs with guesses and without in
turn, in one process, after one round that nobody timed; given is the median of the ratios with the
least and the greatest, and the same of two runs without guesses, which is the noise. Token ids are
compared every time.

`together` is the same of `echo`, `tool` and `free` in the batching engine, 1, 4 and 16 requests at
a time: passes without guesses over those with, and the ratio of speeds.

Run: python -m benchmarks.speculation [--model pocket] [--quant int4] [--rounds 7] [--tokens 200]
"""

import argparse
import json
import statistics
import sys
import time
from random import Random
from typing import Any

from gemsmith.engine.batching import BatchEngine, EngineConfig, run_all
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.reply import collect
from gemsmith.engine.request import Generation, Request
from gemsmith.errors import GemsmithError

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "send_message",
        "description": "Send a text to a person.",
        "parameters": {
            "type": "object",
            "properties": {"to": {"type": "string"}, "text": {"type": "string"}},
            "required": ["to", "text"],
        },
    },
}
TEXTS = (
    "The red boat leaves the harbour at nine and comes back with the fish before noon.",
    '{"name": "lamp", "price": 12, "tags": ["light", "desk"], "stock": {"here": 3, "there": 4}}',
)


def asked(lm: LM, tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Arguments of `LM.generate` or, of ids, `LM.complete`, by kind."""
    length = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    draw = Random(1)
    loops = [[draw.randrange(300, lm.tokenizer.vocab_size) for _ in range(24)] for _ in range(2)]
    ends = {"temperature": 0, "max_tokens": tokens}
    return {
        "echo": [{"prompt": f"Say this again: {text} {text} {text}", **ends} for text in TEXTS],
        "tool": [
            {
                "prompt": f"Send a message to Anna Kowalski that says: {text}",
                "tools": [TOOL],
                "tool_choice": "required",
                **ends,
            }
            for text in TEXTS
        ],
        "periodic": [{"prompt": loop * 8, **length} for loop in loops],
        "free": [
            {"prompt": f"Tell me about {thing}.", **length, "temperature": 4, "seed": seed}
            for seed, thing in enumerate(("rain", "glass"))
        ],
        "repeats": [
            {"prompt": loop[:3] * 20, **length, "temperature": 4, "top_k": 3, "seed": seed}
            for seed, loop in enumerate(loops)
        ],
    }


def timed(lm: LM, request: dict[str, Any]) -> tuple[Generation, float]:
    """A reply, and seconds a token after the first."""
    lm._engine.kept = None  # every reply reads its whole prompt
    started = time.perf_counter()
    reply = lm.generate(**request) if isinstance(request["prompt"], str) else lm.complete(**request)
    seconds = time.perf_counter() - started - reply.usage.time_to_first_token_s
    return reply, seconds / max(1, reply.usage.completion_tokens - 1)


def measure(plain: LM, ahead: LM, rounds: int, tokens: int) -> dict[str, Any]:
    """By kind: tokens, guesses, those right, and speed with guesses over that without."""
    found: dict[str, Any] = {}
    for kind, requests in asked(plain, tokens).items():
        ratios, noise = [], []
        counts = {"tokens": 0, "drafted": 0, "accepted": 0}
        for turn in range(rounds + 1):
            for request in requests:
                expected, slow = timed(plain, request)
                reply, fast = timed(ahead, request)
                _, again = timed(plain, request)
                if reply.token_ids != expected.token_ids:
                    raise SystemExit(f"{kind}: another reply with guesses than without")
                if turn:
                    ratios.append((slow + again) / 2 / fast)
                    noise.append(slow / again)
                    counts["tokens"] += reply.usage.completion_tokens
                    counts["drafted"] += reply.usage.drafted_tokens
                    counts["accepted"] += reply.usage.accepted_tokens
        found[kind] = {
            **counts,
            "right": round(counts["accepted"] / max(1, counts["drafted"]), 3),
            "speed": _spread(ratios),
            "noise": _spread(noise),
        }
    return found


def request_of(
    lm: LM, *, prompt: Any, tools: Any = None, tool_choice: Any = "auto", **options: Any
) -> Request:
    """What `LM.generate` or `LM.complete` would be asked, for an engine."""
    params = lm.sampling.changed(**options)
    if not isinstance(prompt, str):
        return Request(prompt=Prompt(prompt), params=params, chat=False)
    encoded = lm.encode([{"role": "user", "content": prompt}], tools=tools)
    return Request(
        prompt=encoded, params=params, follow=lm.follow(tools=tools, tool_choice=tool_choice)
    )


def timed_batch(engine: BatchEngine, requests: list[Request]) -> tuple[list[Any], int, float]:
    """Token ids of the replies, passes, and seconds of all."""
    before = engine.stats()
    replies = [
        None if isinstance(outcome, GemsmithError) else collect(outcome).token_ids
        for outcome in run_all(engine, requests)
    ]
    after = engine.stats()
    return replies, after.steps - before.steps, after.busy_s - before.busy_s


def measure_together(plain: LM, ahead: LM, rounds: int, tokens: int) -> dict[str, Any]:
    """By kind and number of requests: passes without guesses over those with, and speed."""
    config = EngineConfig(max_num_seqs=16, max_model_len=2048, prefix_caching=False)
    found: dict[str, Any] = {}
    for kind in ("echo", "tool", "free"):
        asked_for = [request_of(plain, **each) for each in asked(plain, tokens)[kind]]
        for count in (1, 4, 16):
            engines = BatchEngine(plain, config), BatchEngine(ahead, config)
            requests = [asked_for[i % len(asked_for)] for i in range(count)]
            passes, speed = [], []
            for turn in range(rounds + 1):
                expected, slow_passes, slow = timed_batch(engines[0], requests)
                replies, fast_passes, fast = timed_batch(engines[1], requests)
                if None in replies or replies != expected:
                    raise SystemExit(f"{kind}: other replies with guesses than without")
                if turn:
                    passes.append(slow_passes / fast_passes)
                    speed.append(slow / fast)
            found[f"{kind} x {count}"] = {"passes": _spread(passes), "speed": _spread(speed)}
    return found


def _spread(values: list[float]) -> list[float]:
    """Median, least, greatest."""
    return [round(v, 3) for v in (statistics.median(values), min(values), max(values))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--quant", default="int4", help="int8, int4 or int2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    ahead = LM.load(args.model, quant=args.quant, speculation="on")
    plain = LM(
        ahead.model, ahead.tokenizer, ahead.config, sampling=ahead.sampling,
        end_ids=ahead.end_ids, template=ahead.template, kv=str(ahead.kv).removeprefix("torch."),
        speculation="off", name=ahead.name,
    )  # fmt: skip
    found = measure(plain, ahead, args.rounds, args.tokens)
    found["together"] = measure_together(plain, ahead, args.rounds, args.tokens)
    print(json.dumps({"name": "speculation", "model": args.model, "quant": args.quant, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
