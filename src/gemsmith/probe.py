"""How fast this machine reads memory and multiplies, measured once and kept.

Bandwidth: all cores read a buffer that no cache holds. Rates: one product of float32 matrices, and
one of rows with 4-bit weights by the C++ extension (operations a second, 2 a multiply-add). With
the extension its plain reading; without it numpy's sum, and no rate of low-bit products.

It takes less than half a second; the result lies in the user's cache folder (`probe.json`) and is
measured anew on another processor or another number of cores. What it is not: a benchmark. A
machine that is busy measures slow: that result is used once and not kept.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from gemsmith import hardware

VERSION = 2
READ_BYTES = 128 << 20
"""Beyond what a desktop's caches hold; some servers' hold as much, and look faster."""
ROWS, WIDTH, OUTPUTS = 64, 1536, 2048
"""Of the products: large enough that starting threads is no matter."""
REPEATS = 12
"""Of each, and the best counts: the first few are slower by half, while the cores wake up."""
MAX_FILE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured."""

    bandwidth: float
    """Bytes a second."""
    float_rate: float
    """Operations a second on float32."""
    int_rate: float | None
    """Operations a second on weights of few bits; None without the extension."""
    cores: int
    busy: bool = False
    """Other programs were at work: the figures are too low."""


def rates(*, fresh: bool = False) -> Rates:
    """Of this machine: what was kept, or measured now."""
    machine = hardware.machine()
    cores = max(1, min(machine.cores, int(machine.cpu_limit or machine.cores)))
    native = _native()
    key = f"{VERSION} {machine.cpu} {cores} {native.isa() if native else 'numpy'}"
    path = _file()
    if path and not fresh:
        found = _read(path, key)
        if found:
            return found
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 2
    found = replace(measure(cores), busy=busy)
    if path and not busy:
        # A cache: where there is no room for it, it is measured again.
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"key": key, **asdict(found)}), encoding="utf-8")
            temporary.replace(path)
    return found


def measure(cores: int) -> Rates:
    """Measure now, on so many cores."""
    import numpy as np

    native = _native()
    buffer = np.empty(READ_BYTES // 8)
    if native is not None:  # before a page is touched: one that is there stays small
        native.advise_hugepages(buffer.ctypes.data, buffer.nbytes)
    buffer.fill(1)
    x = np.ones((ROWS, WIDTH), np.float32)
    operations = 2 * ROWS * WIDTH * OUTPUTS
    int_rate = None
    if native is None:
        bandwidth = buffer.nbytes / _best(buffer.sum)
    else:
        native.set_threads(cores)
        read = buffer.ctypes.data, buffer.nbytes
        bandwidth = buffer.nbytes / _best(lambda: native.read_memory(*read))
        # Codes and scales as ops/cpu.py has them: blocks of 16 rows, lines of 64 bytes, 32 to a
        # scale.
        lines = np.zeros((OUTPUTS // 16, WIDTH // 8, 64), np.uint8)
        scales = np.ones((OUTPUTS // 16, WIDTH // 32, 16), np.float32)
        y = np.empty((ROWS, OUTPUTS), np.float32)
        weight = (lines.ctypes.data, scales.ctypes.data, OUTPUTS, WIDTH, 4, 32, 32)
        seconds = _best(lambda: native.linear(*weight, x.ctypes.data, ROWS, y.ctypes.data))
        int_rate = operations / seconds
    # The last, as the threads of numpy's BLAS wait busily for more.
    w = np.ones((WIDTH, OUTPUTS), np.float32)
    return Rates(bandwidth, operations / _best(lambda: x @ w), int_rate, cores)


def _best(run: Callable[[], object]) -> float:
    """The least seconds of some runs, after one that nobody timed."""
    run()
    least = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return max(least, 1e-9)


def _native() -> ModuleType | None:
    try:
        return import_module("gemsmith._native")
    except ImportError:
        return None


def _file() -> Path | None:
    folder = hardware.cache_folder()
    return folder and folder / "probe.json"


def _read(path: Path, key: str) -> Rates | None:
    """What was kept for this machine; None if there is none, or it is not whole."""
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(MAX_FILE_BYTES))
        if data["key"] != key:
            return None
        kept = {name: data[name] for name in ("bandwidth", "float_rate", "int_rate")}
        values = [value for value in kept.values() if value is not None]
        if not all(isinstance(v, float) and 0 < v < 1e18 for v in values):
            return None
        return Rates(**kept, cores=int(data["cores"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
