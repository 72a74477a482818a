"""Products of low-bit weights with a few rows: bytes a second beside the machine's reading speed.

Decoding reads every weight once a token, so a product of few rows is as fast as memory is read.
Each kind of weight fills one buffer that no cache holds (large pages behind it where the system has
them), is multiplied whole, and its bits are compared with torch's before anything is timed.

Ceiling: the best of the plain readings of the same buffer, same threads and pages, made in turn
with the products. It reads in the order of addresses and computes nothing but a sum.

Run: python -m benchmarks.kernels
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from gemsmith.ops import cpu

INPUTS = 1536
"""hidden_size of E2B: the inputs of most of its weights."""
KINDS = ((2, None), (4, None), (4, 32), (8, None))
ROWS = (1, 2, 4, 8)
CHECKED = 4
"""Blocks of 16 outputs that are compared with torch's, at either end."""


def fill(gib: float) -> Tensor:
    """A buffer of random bytes."""
    buffer = torch.empty(int(gib * 2**30) // 2**21 * 2**21, dtype=torch.uint8)
    cpu.advise_hugepages(buffer)
    return buffer.random_(0, 256, generator=torch.Generator().manual_seed(0))


def weight(buffer: Tensor, bits: int, group: int | None) -> cpu.PackedWeight:
    """The buffer as a weight of INPUTS inputs, as many outputs as fit."""
    _, count, line = cpu.lines_shape(1, INPUTS, bits)
    blocks = buffer.numel() // (count * line)
    lines = buffer[: blocks * count * line].view(blocks, count, line)
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(blocks, cpu.groups_of(INPUTS, group), cpu.BLOCK, generator=generator)
    return packed(lines, scales, bits, group)


def packed(lines: Tensor, scales: Tensor, bits: int, group: int | None) -> cpu.PackedWeight:
    outputs = len(lines) * cpu.BLOCK
    return cpu.PackedWeight(
        lines, scales, outputs=outputs, inputs=INPUTS, bits=bits, group=group
    )  # fmt: skip


def name_of(weight: cpu.PackedWeight) -> str:
    return f"int{weight.bits}" + (f"-g{weight.group}" if weight.group else "")


def check(weight: cpu.PackedWeight, x8: Tensor, sx: Tensor) -> None:
    """Ends the program if the first or last outputs are not torch's to the bit."""
    found = cpu.gemm(weight, x8, sx)
    for part in (slice(None, CHECKED), slice(-CHECKED, None)):
        some = packed(weight.lines[part], weight.scales[part], weight.bits, weight.group)
        first = 0 if part.start is None else weight.outputs - some.outputs
        mine = found[:, first : first + some.outputs]
        if not torch.equal(mine, cpu.gemm_reference(some, x8, sx)):
            sys.exit(f"{name_of(weight)}, {len(x8)} rows: not torch's result; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=0.75, help="size of the weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not cpu.available():
        sys.exit("the C++ extension is not built: there are no kernels to measure")
    about = measure.machine()

    buffer = fill(options.gib)
    weights = [weight(buffer, bits, group) for bits, group in KINDS]
    generator = torch.Generator().manual_seed(2)
    runs: dict[str, Callable[[], object]] = {"read": lambda: cpu.read_memory(buffer)}
    sizes: dict[str, int] = {"read": buffer.nbytes}
    for rows in ROWS:
        given = cpu.quantize_rows(torch.randn(rows, INPUTS, generator=generator))
        for each in weights:
            check(each, *given)
            name = f"{name_of(each)} x{rows}"
            runs[name] = lambda each=each, given=given: cpu.gemm(each, *given)
            sizes[name] = each.nbytes
    seconds = measure.interleaved(runs, repeats=options.repeats)
    rates = {name: [sizes[name] / s / 1e9 for s in found] for name, found in seconds.items()}
    ceiling = max(rates["read"])
    print(f"{cpu.isa()}, {cpu.threads()} threads, {buffer.nbytes / 2**30:.2f} GiB of weights")
    results: dict[str, dict[str, Any]] = {}
    for name, values in rates.items():
        found = results[name] = {**measure.summary(values), "ceiling": ceiling}
        print(
            f"{name:12} {found['median']:6.1f} GB/s ({found['min']:.1f}-{found['max']:.1f}, "
            f"n={found['n']})   {found['median'] / ceiling:.0%} of {ceiling:.1f}"
        )
    measure.finish(
        "kernels",
        {
            "model": "none",
            "isa": cpu.isa(),
            "threads": cpu.threads(),
            "inputs": INPUTS,
            "bytes": buffer.nbytes,
            "unit": "GB/s",
            "runs": results,
        },
        about,
        record=False,
    )


if __name__ == "__main__":
    main()
