"""How fast this machine reads memory and multiplies, measured once and kept.

Bandwidth: all cores read a buffer that no cache holds. Rates, in operations a second, 2 a
multiply-add: one product of float32 matrices by numpy, and by the C++ extension two of rows with
weights of few bits, one with a scale a row and one with a scale for each 32 inputs, of which a
matrix unit is several times faster at the former. With the extension its plain reading; without it
numpy's sum, and no rate of low-bit products.

The rate of bfloat16 follows: numpy has no such type, and torch, which multiplies it, takes longer
to import than all of this. A CPU's bfloat16 units are those of its int8 products, whose registers
hold half as many of the wider values: half the operations (TDPBF16PS beside TDPBSSD, VDPBF16PS
beside VPDPBUSD, BFMMLA beside SMMLA). A CPU without such units multiplies float32 instead.

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

VERSION = 4
READ_BYTES = 128 << 20
"""Beyond what a desktop's caches hold; some servers' hold as much, and look faster."""
ROWS, WIDTH, OUTPUTS = 256, 1536, 2048
"""Of the products: large enough that neither starting threads matters nor unpacking weights."""
FLOAT_ROWS = 64
"""Of float32, which takes longest; more are no faster."""
REPEATS = 12
"""Of each, and the best counts: the first few are slower by half, while the cores wake up."""
MAX_FILE_BYTES = 1 << 16
RATES = ("float32", "bfloat16", "rows", "groups")


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured."""

    bandwidth: float
    """Bytes a second."""
    float32: float
    """Operations a second on float32."""
    bfloat16: float
    """On bfloat16, as the CPU multiplies it."""
    rows: float | None
    """On weights of few bits with a scale a row; None without the extension."""
    groups: float | None
    """On those with a scale for each group of inputs."""
    cores: int
    busy: bool = False
    """Other programs were at work: the figures are too low."""

    @property
    def operations(self) -> dict[str, float | None]:
        """Operations a second by what is multiplied."""
        return {name: getattr(self, name) for name in RATES}


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
    int8 = int4 = None
    if native is None:
        bandwidth = buffer.nbytes / _best(buffer.sum)
    else:
        native.set_threads(cores)
        read = buffer.ctypes.data, buffer.nbytes
        bandwidth = buffer.nbytes / _best(lambda: native.read_memory(*read))
        # Codes and scales as ops/cpu.py has them: blocks of 16 rows, lines of 64 bytes, 32 to a
        # scale, which is a step.
        lines = np.zeros((OUTPUTS // 16, WIDTH // 4, 64), np.uint8)
        scales = np.zeros((OUTPUTS // 16, 1 + WIDTH // 128, 64), np.int8)
        y = np.empty((ROWS, OUTPUTS), np.float32)

        def low(bits: int, group: int) -> float:
            width = 8 if group else 32
            weight = (lines.ctypes.data, scales.ctypes.data, OUTPUTS, WIDTH, bits, group, width)
            linear = native.linear
            return operations / _best(lambda: linear(*weight, x.ctypes.data, ROWS, y.ctypes.data))

        int8, int4 = low(8, 0), low(4, 32)
    # The last, as the threads of numpy's BLAS wait busily for more.
    w = np.ones((WIDTH, OUTPUTS), np.float32)
    x = x[:FLOAT_ROWS]
    float32 = operations * FLOAT_ROWS / ROWS / _best(lambda: x @ w)
    half = int8 / 2 if int8 and _same_units(native.isa() if native else "") else 0.0
    return Rates(bandwidth, float32, max(float32, half), int8, int4, cores)


def _same_units(isa: str) -> bool:
    """Whether the units that multiply int8 in the extension's kernels multiply bfloat16, too."""
    flags = hardware.machine().isa
    return "amx_bf16" in flags if isa == "amx" else hardware.machine().multiplies_bfloat16


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
        kept = {name: data[name] for name in ("bandwidth", *RATES)}
        values = [value for value in kept.values() if value is not None]
        if not all(isinstance(v, float) and 0 < v < 1e18 for v in values):
            return None
        return Rates(**kept, cores=int(data["cores"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
