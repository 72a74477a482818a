"""Timing, machine limits and the record of a measurement.

A benchmark prints its findings for people and, as its last line, one JSON object; with --record
that line is also appended to docs/numbers/NAME.jsonl, from which report.py makes docs/numbers.md.
"""

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from gemsmith import hardware

REPOSITORY = Path(__file__).resolve().parent.parent
NUMBERS = REPOSITORY / "docs" / "numbers"


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times over, in turns so that noise falls on all alike.

    Each measurement follows `warm_up` untimed runs of the same: the first one after another's has
    that one's caches and memory to clear away.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            for _ in range(warm_up):
                run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, least, most and number of measurements."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def best_seconds(run: Callable[[], object], *, repeats: int = 5) -> float:
    """The least of several times: what the machine can do, for ceilings."""
    return min(interleaved({"": run}, repeats=repeats)[""])


def product_rates(tokens: int, width_in: int, width_out: int) -> dict[str, float]:
    """Operations per second of x [tokens, in] @ w.T [in, out], by dtype."""
    rates: dict[str, float] = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        x = torch.randn(tokens, width_in).to(dtype)
        w = torch.randn(width_out, width_in).to(dtype)
        seconds = best_seconds(lambda x=x, w=w: F.linear(x, w))
        rates[name] = 2 * tokens * width_in * width_out / seconds
    return rates


def read_bandwidth(gib: float = 1.0) -> float:
    """Bytes per second of summing float32 values that no cache holds."""
    values = torch.ones(int(gib * 2**28))
    return values.nbytes / best_seconds(values.sum)


def machine() -> dict[str, Any]:
    """Processor, threads and memory, and how busy it was: take this before measuring."""
    found = hardware.machine()
    return {
        "cpu": found.cpu,
        "isa": list(found.isa),
        "cores": found.cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round((found.memory_bytes or 0) / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """Short hash of HEAD, with + where src or benchmarks differ from it."""

    def git(*words: str) -> str:
        made = subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=False
        )
        return made.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def finish(
    name: str, results: Mapping[str, Any], about: Mapping[str, Any], *, record: bool
) -> None:
    """Print the JSON line, and append it to docs/numbers/NAME.jsonl if it is to be recorded.

    about: `machine()`, taken before the measurements so that its load average is not their own.
    """
    module = f"benchmarks.{name}"
    line = json.dumps(
        {
            "name": name,
            **results,
            "machine": dict(about),
            "versions": versions(),
            "commit": commit(),
            "command": " ".join(["python -m", module, *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        }
    )
    if record:
        NUMBERS.mkdir(parents=True, exist_ok=True)
        with (NUMBERS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
