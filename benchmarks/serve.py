"""gemsmith's server beside llama.cpp's under agents: 1, 8 and 32 clients, same weights, one run.

A client is an agent at work. Its prompts begin with what all of them share (system prompt, tool
declarations), then comes its own task; each turn the prompt grows by the call that was made and the
tool's result, and a pause passes as a tool runs. Token ids are drawn with a fixed seed, so both
servers get the same bytes; the end of every turn is marked as in a chat. Each reply has the same
number of tokens, without regard to what ends one (`ignore_eos`), and calls in prompts are drawn
too, so prompts do not depend on replies: what a server kept of its own reply helps neither.

Both servers are up all the time and take turns, round after round; in each round all tokens are
new, so that no round finds what an earlier one left. tokens/s are those generated for all clients,
over the time in which a request was open: the pauses of a lone client are nobody's work. Time to
first token is the median over clients, of first turns and of later ones. A run that is stopped is
continued by the next one (`measure.Unfinished`).

Run: python -m benchmarks.serve [--model pocket] [--record]
"""

import argparse
import asyncio
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

from benchmarks import measure, servers
from benchmarks.client import Answer, ask
from benchmarks.random_checkpoint import FIRST_IDS
from benchmarks.servers import LLAMA, OURS, Server

CLIENTS = (1, 8, 32)


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of an agent's conversation, and its pauses."""

    shared: int
    """System prompt and tool declarations."""
    task: int
    call: int
    result: int
    turns: int
    generated: int
    """Of each reply."""
    pause_s: float
    """At most; drawn for each turn."""

    @property
    def longest(self) -> int:
        """Prompt and reply of the last turn."""
        grown = (self.turns - 1) * (self.call + self.result)
        return self.shared + self.task + grown + self.generated


SHAPES = {
    "pocket": Shape(768, 48, 32, 96, turns=5, generated=32, pause_s=0.05),
    "E2B": Shape(96, 12, 8, 12, turns=3, generated=6, pause_s=0.5),
    "tiny-E2B": Shape(64, 16, 8, 16, turns=3, generated=4, pause_s=0.02),
}

Prompts = list[list[int]]


def conversations(shape: Shape, clients: int, vocabulary: int, seed: str) -> list[Prompts]:
    """The prompts of each client, turn by turn; other seeds share no token at the start."""
    draw = Random(seed)
    # Away from special tokens, which stand at the beginning and the end.
    words = range(vocabulary // 4, vocabulary * 15 // 16)

    def turn(tokens: int) -> list[int]:
        return [*draw.choices(words, k=tokens - 1), FIRST_IDS["turn_close"]]

    shared = [FIRST_IDS["bos"], *turn(shape.shared - 1)]
    found: list[Prompts] = []
    for _ in range(clients):
        prompts = [shared + turn(shape.task)]
        while len(prompts) < shape.turns:
            prompts.append(prompts[-1] + turn(shape.call) + turn(shape.result))
        found.append(prompts)
    return found


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of one server gave."""

    tokens_per_s: float
    first_turn_s: float
    """Median time to first token."""
    later_turns_s: float


async def play(server: Server, shape: Shape, talks: list[Prompts], seed: str) -> Round:
    """All clients at once, each turn after turn.

    Raises:
      RuntimeError: a request that failed, or has another number of tokens.
    """
    turns: list[list[Answer]] = [[] for _ in range(shape.turns)]

    async def client(number: int, prompts: Prompts) -> None:
        pauses = Random(f"{seed} {number}")
        for turn, prompt in enumerate(prompts):
            await asyncio.sleep(pauses.uniform(0, shape.pause_s))
            answer = await ask(server.port, "/v1/completions", body(prompt, shape))
            check(answer, server.name, shape.generated)
            turns[turn].append(answer)

    await asyncio.gather(*(client(number, prompts) for number, prompts in enumerate(talks)))
    answers = [answer for turn in turns for answer in turn]
    waits = [[answer.first - answer.began for answer in turn] for turn in turns]
    busy = open_seconds((answer.began, answer.ended) for answer in answers)
    return Round(
        len(answers) * shape.generated / busy,
        median(waits[0]),
        median(wait for turn in waits[1:] for wait in turn),
    )


def played(server: Server, shape: Shape, talks: list[Prompts], seed: str) -> dict[str, Any]:
    """A round, and the most memory that the server ever held."""
    done = asyncio.run(play(server, shape, talks, seed))
    return {"round": asdict(done), "peak": server.peak()}


def body(prompt: list[int], shape: Shape) -> dict[str, Any]:
    return {
        "model": "model",
        "prompt": prompt,
        "max_tokens": shape.generated,
        "ignore_eos": True,
        "temperature": 1,
        "top_k": 64,
        "top_p": 0.95,
        "min_p": 0,
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def check(answer: Answer, name: str, tokens: int) -> None:
    """Raises:
    RuntimeError: the request failed, or its reply has another number of tokens.
    """
    if answer.status != 200:
        raise RuntimeError(f"{name}: status {answer.status}: {answer.body[:300]!r}")
    usage = [event["usage"] for event in answer.events() if event.get("usage")]
    if not usage or usage[-1]["completion_tokens"] != tokens:
        raise RuntimeError(f"{name}: {tokens} tokens were asked for: {answer.body[-300:]!r}")


def open_seconds(spans: Any) -> float:
    """Length of the union of (begin, end) pairs."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


@dataclass(slots=True)
class Found:
    """One server's rounds by number of clients, and its peak."""

    rounds: dict[int, list[Round]] = field(default_factory=dict)
    peak: int = 0
    missing: str = ""

    def record(self) -> dict[str, Any]:
        loads = {
            str(clients): {
                what: measure.summary([getattr(each, what) for each in rounds])
                for what in Round.__slots__
            }
            for clients, rounds in self.rounds.items()
        }
        return {"loads": loads, "peak": self.peak, "missing": self.missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="pocket", choices=servers.MODELS)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    about = measure.machine() | {"threads": options.threads}
    shape, weights = SHAPES[options.model], servers.weights_of(options.model)
    so_far = measure.Unfinished(f"serve-{options.model}", about, clients=[*options.clients])
    with ExitStack() as stack:
        up, missing = servers.both(
            stack,
            weights,
            sequences=max(options.clients),
            longest=shape.longest,
            threads=options.threads,
        )
        found = {name: Found(missing=missing.get(name, "")) for name in (OURS, LLAMA)}
        loads = [(-1, min(options.clients))]  # the warm-up, which is not counted
        loads += [(number, n) for number in range(options.rounds) for n in options.clients]
        for number, clients in loads:
            seed = f"{number} {clients}"
            talks = conversations(shape, clients, weights.vocabulary, seed)
            for server in list(up):
                run = partial(played, server, shape, talks, seed)
                try:
                    if number >= 0:
                        took = so_far.of(number, clients, server.name, measure=run)
                    else:
                        took = run()
                except (RuntimeError, OSError) as error:
                    if server.name == OURS:
                        raise
                    found[server.name].missing = str(error)
                    up.remove(server)
                    continue
                done, each = Round(**took["round"]), found[server.name]
                each.peak = max(each.peak, took["peak"])
                if number >= 0:
                    each.rounds.setdefault(clients, []).append(done)
                print(
                    f"round {number + 1} of {options.rounds}, {clients:2} clients: "
                    f"{server.name:15} {done.tokens_per_s:8.1f} tok/s, first token "
                    f"{done.first_turn_s:.3f} s, later turns {done.later_turns_s:.3f} s",
                    flush=True,
                )
    report(options.model, weights.dtype, shape, found, about, options.record)
    so_far.end()


def report(
    model: str,
    dtype: str,
    shape: Shape,
    found: dict[str, Found],
    about: dict[str, Any],
    record: Path | None,
) -> None:
    """Print the findings and the JSON line."""
    programs = {name: each.record() for name, each in found.items()}
    for name, program in programs.items():
        for clients, load in program["loads"].items():
            for what, run in load.items():
                print(
                    f"{name:15} {clients:>2} clients  {what:14} {run['median']:9.3f} "
                    f"({run['min']:.3f}-{run['max']:.3f}, n={run['n']})"
                )
        print(program["missing"] or f"{name:15} peak {program['peak'] / 1e9:.2f} GB")
    for clients, load in programs[OURS]["loads"].items():
        if theirs := programs[LLAMA]["loads"].get(clients):
            for what, needed in (("tokens_per_s", ">= 2"), ("later_turns_s", "<= 0.3")):
                ratio = load[what]["median"] / theirs[what]["median"]
                print(f"{clients:>2} clients, {what} over llama-server's: {ratio:.2f} ({needed})")
    results = {"model": model, "dtype": dtype, "shape": asdict(shape), "programs": programs}
    measure.finish("serve", results, about, record=record)


if __name__ == "__main__":
    sys.exit(main())
