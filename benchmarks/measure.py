"""Timing, machine limits and the record of a measurement.

A benchmark prints its findings for people and, as its last line, one JSON object; with --record
that line is also appended to NAME.jsonl in docs/numbers, or in the folder that is named, from which
report.py makes a page.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import mmap
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
from gemsmith.ops import native

REPOSITORY = Path(__file__).resolve().parent.parent
NUMBERS = REPOSITORY / "docs" / "numbers"
UNFINISHED = REPOSITORY / "build" / "unfinished"


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


def read_bandwidth(nbytes: int = 1 << 30) -> float:
    """Bytes per second of reading memory that no cache holds, the best of several times."""
    reader = Reader(nbytes)
    return reader.nbytes / best_seconds(reader.read)


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


def add_record(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=NUMBERS,
        metavar="FOLDER",
        help="append to docs/numbers, or to this folder",
    )


def finish(
    name: str, results: Mapping[str, Any], about: Mapping[str, Any], *, record: Path | None
) -> None:
    """Print the JSON line, and append it to NAME.jsonl in the folder `record` if there is one.

    about: `machine()`, taken before the measurements so that its load average is not their own.
    """
    module = f"benchmarks.{name}"
    line = {
        "name": name,
        **results,
        "machine": dict(about),
        "versions": versions(),
        "commit": commit(),
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": now(),
    }
    if record:
        note(record / f"{name}.jsonl", line)
    print(json.dumps(line))


def now() -> str:
    """Date and time, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")


def note(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file; what comes after one that was cut off begins a new line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")


def noted(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `note` writes; those that were cut off are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


class Unfinished:
    """What a run has measured so far, in a file: if it is stopped, the next one goes on from there.

    What was measured at another commit, on another machine or with other `settings` is not taken. A
    run that came to its end leaves nothing, so that the next one measures again.
    """

    def __init__(self, name: str, about: Mapping[str, Any], **settings: Any) -> None:
        """about: `machine()`, and the threads that were asked for."""
        self._path = UNFINISHED / f"{name}.jsonl"
        machine = [about["cpu"], about["cores"], about["threads"]]
        self._settings = {"commit": commit(), "machine": machine, **settings}
        self._found = {
            tuple(line["key"]): line["found"]
            for line in noted(self._path)
            if line["settings"] == self._settings
        }
        if self._found:
            print(f"goes on after {len(self._found)} measurements in {self._path}", flush=True)

    def of(self, *key: str | int, measure: Callable[[], Any]) -> Any:
        """What was measured for `key`, or is now: something that JSON gives back as it was."""
        if key not in self._found:
            self._found[key] = measure()
            line = {"settings": self._settings, "key": key, "found": self._found[key]}
            note(self._path, line)
        return self._found[key]

    def end(self) -> None:
        """The run is over."""
        self._path.unlink(missing_ok=True)


def label(bits: str | None) -> str:
    """What a table calls a format: bfloat16, 4-bit, mobile."""
    return "bfloat16" if bits is None else f"{bits}-bit" if bits.isdigit() else bits


def environment(threads: int) -> dict[str, str]:
    """For a process of ours that takes no option for it: so many threads."""
    return os.environ | {"OMP_NUM_THREADS": str(threads)}


class Reader:
    """Reads a buffer of so many bytes whole, as fast as this machine can.

    With the extension by its plain reading (large pages, prefetch, no computing but a sum), without
    it by torch's sum of floats.
    """

    def __init__(self, nbytes: int) -> None:
        self._buffer = torch.empty(max(1, nbytes // 64) * 16)
        if native.available():
            native.advise_hugepages(self._buffer)
        self._buffer.fill_(1.0)
        self.nbytes = self._buffer.nbytes

    def read(self) -> None:
        if native.available():
            native.read_memory(self._buffer)
        else:
            self._buffer.sum()


def cached_bytes(folder: Path) -> int | None:
    """Bytes of a folder's files that the system's page cache holds now; None where it cannot say.

    Unlike a process's resident set, this is memory that the system takes back when it needs it.
    """
    if sys.platform != "linux":
        return None
    page, held = os.sysconf("SC_PAGE_SIZE"), 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    for path in folder.iterdir():
        size = path.stat().st_size if path.is_file() else 0
        if size == 0:
            continue
        with path.open("rb") as file:
            # Copy-on-write, so that ctypes may take its address; nothing is written.
            mapped = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
        pages = ctypes.create_string_buffer(-(-size // page))
        first = ctypes.c_char.from_buffer(mapped)
        known = libc.mincore(ctypes.addressof(first), size, pages) == 0
        del first
        mapped.close()
        if not known:
            return None
        held += page * sum(byte & 1 for byte in pages.raw)
    return held
