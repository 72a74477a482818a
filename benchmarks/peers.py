"""gemsmith beside llama.cpp and Transformers: same model, same threads and cores, in one run.

Each program works in a fresh process that is bound to the same cores: load, a short warm-up, then
each task once. They take turns, round after round, so that what disturbs the machine falls on all
alike; a figure is the median over rounds. A run that is stopped is continued by the next one
(`measure.Unfinished`). llama.cpp runs the very 4-bit weights that gemsmith runs
(see to_gguf.py) and Transformers the bfloat16 weights of the same size; before anything is timed
the logits of gemsmith and llama.cpp are compared.

llama.cpp is compiled here (see llama.py); where it cannot be, gemsmith is measured alone, and the
reason is said.

"8 streams" of gemsmith are 8 requests in the engine of its server, which chooses their tokens; the
others are given theirs.

Run: python -m benchmarks.peers [--record]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import decode, llama, measure, random_checkpoint, to_gguf
from benchmarks.llama_worker import ids_of
from gemsmith import OPENMP_WAITS
from gemsmith.config import Gemma4Config

PROMPT = 40
LIMIT = 0.25
"""Relative distance of logits: ours and llama.cpp's weights are equal, but each rounds activations
to 8 bits in its own way, in every product of every layer. Logits of another model are 1.4 away."""
ROUTED_LIMIT = 0.7
"""The same where experts are chosen: a rounding can choose another expert."""


@dataclass(slots=True)
class Program:
    """One program with one model, and what was measured of it."""

    name: str
    command: list[str]
    model: Path
    bytes_per_token: int
    skips: tuple[str, ...] = ()
    """Tasks it is not given."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)
    about: str = ""
    missing: str = ""
    """Why nothing, or nothing more, was measured of it."""


def tasks_of(size: str) -> dict[str, list[Any]]:
    """What every program does in one round, in order."""
    if size.startswith("tiny"):
        return {
            "warm-up": ["prefill", 8],
            "decode 16": ["decode", 16, 4],
            "8 streams": ["streams", 8, 8, 2],
            "prefill 32": ["prefill", 32],
            "decode 64": ["decode", 64, 4],
        }
    tasks: dict[str, list[Any]] = {
        "warm-up": ["decode", 64, 2],
        "decode 128": ["decode", 128, 32],
        "8 streams": ["streams", 8, 64, 16],
        "prefill 512": ["prefill", 512],
        "prefill 2048": ["prefill", 2048],
        "decode 8192": ["decode", 8192, 32],
    }
    if size not in ("E2B", "E4B"):
        for name in ("8 streams", "prefill 2048", "decode 8192"):
            del tasks[name]
    return tasks


def tokens_of(task: list[Any]) -> int:
    """Tokens that a task times."""
    method, *numbers = task
    return {"prefill": numbers[0], "decode": numbers[-1], "streams": numbers[0] * numbers[-1]}[
        method
    ]


def run(program: Program, tasks: dict[str, list[Any]], where: dict[str, Any]) -> dict[str, Any]:
    """One fresh process: what the worker says of these tasks.

    Raises:
      RuntimeError: it failed; its last line.
    """
    job = {"model": str(program.model), "tasks": tasks, **where}
    # What gemsmith wants of its own threads is not passed on to others.
    others = {name: value for name, value in os.environ.items() if name not in OPENMP_WAITS}
    made = subprocess.run(
        program.command,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=measure.REPOSITORY,
        env=others,
    )
    if made.returncode:
        lines = made.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"exit code {made.returncode}: {lines[-1][:200]}")
    return json.loads(made.stdout.strip().splitlines()[-1])


def note(program: Program, tasks: dict[str, list[Any]], done: dict[str, Any]) -> None:
    """Keep what one process measured."""
    program.loads.append(done["load"])
    program.about = " ".join(f"{done['version']} {done['about']}".split())
    for name, found in done["tasks"].items():
        if name == "warm-up":
            continue
        result = found["result"]
        seconds = result["seconds"] if isinstance(result, dict) else result[0]
        program.seconds.setdefault(name, []).append(seconds)
        program.peaks[name] = max(program.peaks.get(name, 0), found["peak"])
        if isinstance(result, dict) and result["fill"] is not None:
            fill = f"prefill {tasks[name][1]}"
            if fill not in tasks:
                program.seconds.setdefault(fill, []).append(result["fill"])


def distance(ours: Program, theirs: Program, where: dict[str, Any], vocabulary: int) -> float:
    """Relative distance |a - b| / |b| of two programs' logits after the same prompt."""
    found = []
    for program in (ours, theirs):
        path = Path(where["scratch"]) / "logits"
        run(program, {"logits": ["logits", ids_of(PROMPT, vocabulary), str(path)]}, where)
        found.append(np.fromfile(path, np.float32).astype(np.float64))
    a, b = found
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def programs(size: str, folder: Path | None) -> list[Program]:
    """Those that can run here, and those that cannot with the reason.

    Checkpoints are kept in `folder`, or where the other benchmarks have theirs.
    """

    def place(bits: str) -> Path | None:
        return folder / f"{size}-{bits}" if folder else None

    worker = [sys.executable, "-m", "benchmarks.workers"]
    made: list[Program] = []
    four = random_checkpoint.made(size, "4", place("4"))
    config = Gemma4Config.load(four)
    made.append(Program("gemsmith int4", [*worker, "gemsmith"], four, decode.weight_bytes(four)))
    if not config.text_config.enable_moe_block:
        mobile = random_checkpoint.made(size, "mobile", place("mobile"))
        made.append(
            Program("gemsmith mobile", [*worker, "gemsmith"], mobile, decode.weight_bytes(mobile))
        )
    python, missing = llama.python()
    file = four.with_name(f"{four.name}-Q4_0.gguf")
    if python:
        to_gguf.write(four, file)
    made.append(
        Program(
            "llama.cpp Q4_0",
            [python, str(Path(__file__).with_name("llama_worker.py"))],
            file,
            to_gguf.bytes_per_token(config.text_config),
            missing=missing,
        )
    )
    if not config.text_config.enable_moe_block:
        floats = random_checkpoint.made(size, None, place("16"))
        made.append(
            Program(
                "Transformers bf16",
                [*worker, "transformers"],
                floats,
                decode.weight_bytes(floats),
                skips=("decode 8192",),
            )
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="E2B", choices=random_checkpoint.SIZES)
    parser.add_argument("--folder", type=Path, help="where the random checkpoints are kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    about = measure.machine() | {"threads": options.threads}
    cores = (
        sorted(os.sched_getaffinity(0))[: options.threads] if platform.system() == "Linux" else []
    )
    all_programs = programs(options.size, options.folder)
    tasks = tasks_of(options.size)
    so_far = measure.Unfinished(f"peers-{options.size}", about)

    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        where = {"threads": options.threads, "cores": cores, "scratch": scratch}
        by_name = {program.name: program for program in all_programs}
        ours, theirs = by_name["gemsmith int4"], by_name["llama.cpp Q4_0"]
        text = Gemma4Config.load(ours.model).text_config
        apart = None
        if not theirs.missing:
            try:
                apart = distance(ours, theirs, where, text.vocab_size)
            except RuntimeError as error:
                theirs.missing = str(error)
        limit = ROUTED_LIMIT if text.enable_moe_block else LIMIT
        if apart is not None and not apart <= limit:
            sys.exit(
                f"logits are {apart:.3f} off llama.cpp's, more than {limit}; nothing was timed"
            )
        for number in range(options.rounds):
            for program in all_programs:
                if program.missing:
                    continue
                mine = {name: task for name, task in tasks.items() if name not in program.skips}
                if program is ours:
                    mine["read"] = ["read", ours.bytes_per_token]
                print(f"round {number + 1} of {options.rounds}: {program.name}", flush=True)
                try:
                    done = so_far.of(
                        number, program.name, measure=partial(run, program, mine, where)
                    )
                    note(program, mine, done)
                except RuntimeError as error:
                    program.missing = str(error)
    report(options.size, all_programs, tasks, apart, about, options.record)
    so_far.end()


def report(
    size: str,
    all_programs: list[Program],
    tasks: dict[str, list[Any]],
    apart: float | None,
    about: dict[str, Any],
    record: Path | None,
) -> None:
    """Print the findings and the JSON line."""
    reads = next((p.seconds.pop("read") for p in all_programs if "read" in p.seconds), [])
    ours = all_programs[0]
    rate = ours.bytes_per_token / min(reads) if reads else None
    counts = {name: tokens_of(task) for name, task in tasks.items()}
    counts |= {f"prefill {task[1]}": task[1] for task in tasks.values() if task[0] == "decode"}
    found: dict[str, dict[str, Any]] = {}
    for program in all_programs:
        speeds = {
            task: measure.summary([counts[task] / s for s in seconds])
            for task, seconds in program.seconds.items()
        }
        found[program.name] = {
            "speeds": speeds,
            "peak": program.peaks,
            "load": measure.summary(program.loads) if program.loads else None,
            "bytes_per_token": program.bytes_per_token,
            "about": program.about,
            "missing": program.missing,
        }
        for task, s in speeds.items():
            share = ""
            if task.startswith("decode") and rate:
                most = rate / program.bytes_per_token
                share = (
                    f"   {s['median'] / most:.0%} of {most:.1f} (weights at {rate / 1e9:.1f} GB/s)"
                )
            print(
                f"{program.name:18} {task:26} {s['median']:8.2f} tok/s "
                f"({s['min']:.2f}-{s['max']:.2f}, n={s['n']}){share}"
            )
        if program.peaks:
            least = next(iter(program.peaks))
            print(
                f"{program.name:18} peak {program.peaks[least] / 1e9:.2f} GB at {least}, "
                f"{max(program.peaks.values()) / 1e9:.2f} GB in all"
            )
        if program.missing:
            print(f"{program.name:18} {program.missing}")
    if apart is not None:
        print(f"logits of gemsmith int4 and llama.cpp are {apart:.3f} apart")
    results = {
        "model": size,
        "dtype": "4-bit",
        "unit": "tok/s",
        "programs": found,
        "logit_distance": apart,
        "gb_s_measured": rate and rate / 1e9,
    }
    measure.finish("peers", results, about, record=record)


if __name__ == "__main__":
    main()
