"""Products of low-bit weights with a few rows, and attention: bytes a second beside the machine's
reading speed.

Decoding reads every weight once a token, so a product of few rows is as fast as memory is read.
Each kind of weight fills one buffer that no cache holds (large pages behind it where the system has
them), is multiplied whole, and its bits are compared with torch's before anything is timed.

Ceiling: the best of the plain readings of the same buffer, same threads and pages, made in turn
with the products. It reads in the order of addresses and computes nothing but a sum.

Attention: all 35 layers of E2B for one token (or several: verification) over stored K/V of some
context, its storing of new K/V included. Layers that share K/V read them again, mostly from cache,
so the rate may pass the ceiling of memory.

Run: python -m benchmarks.kernels [--record]
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from gemsmith import work
from gemsmith.cache.ring import RingCache
from gemsmith.config import PRESETS
from gemsmith.ops import cpu, native
from gemsmith.quant.formats import Format

INPUTS = 1536
"""hidden_size of E2B: the inputs of most of its weights."""
KINDS = (Format(2), Format(4), Format(4, 32), Format(4, 32, steps=True), Format(8))
ROWS = (1, 2, 4, 8)
CHECKED = 4
"""Blocks of 16 outputs that are compared with torch's, at either end."""


def fill(gib: float) -> Tensor:
    """A buffer of random bytes."""
    buffer = torch.empty(int(gib * 2**30) // 2**21 * 2**21, dtype=torch.uint8)
    native.advise_hugepages(buffer)
    return buffer.random_(0, 256, generator=torch.Generator().manual_seed(0))


def weight(buffer: Tensor, format: Format) -> cpu.PackedWeight:
    """The buffer as a weight of INPUTS inputs, as many outputs as fit."""
    _, count, line = cpu.lines_shape(1, INPUTS, format.bits)
    blocks = buffer.numel() // (count * line)
    lines = buffer[: blocks * count * line].view(blocks, count, line)
    generator = torch.Generator().manual_seed(1)
    shape = blocks * cpu.BLOCK, format.groups(INPUTS)
    if format.steps:
        multiples = torch.randint(1, 16, shape, generator=generator)
        steps = torch.randint(8, 16, (shape[0], 1), generator=generator) / 1024
        scales = cpu.pack_steps(multiples * steps)
    else:
        scales = torch.rand(shape, generator=generator).view(blocks, -1, cpu.BLOCK)
    return packed(lines, scales, format.bits, format.group)


def packed(lines: Tensor, scales: Tensor, bits: int, group: int | None) -> cpu.PackedWeight:
    outputs = len(lines) * cpu.BLOCK
    return cpu.PackedWeight(
        lines, scales, outputs=outputs, inputs=INPUTS, bits=bits, group=group
    )  # fmt: skip


def name_of(weight: cpu.PackedWeight) -> str:
    return str(Format(weight.bits, weight.group, steps=weight.scales.dtype == torch.int8))


def check(weight: cpu.PackedWeight, x8: Tensor, sx: Tensor) -> None:
    """Ends the program if the first or last outputs are not torch's to the bit."""
    found = cpu.gemm(weight, x8, sx)
    for part in (slice(None, CHECKED), slice(-CHECKED, None)):
        some = packed(weight.lines[part], weight.scales[part], weight.bits, weight.group)
        first = 0 if part.start is None else weight.outputs - some.outputs
        mine = found[:, first : first + some.outputs]
        if not torch.equal(mine, cpu.gemm_reference(some, x8, sx)):
            sys.exit(f"{name_of(weight)}, {len(x8)} rows: not torch's result; nothing was timed")


CONTEXTS = (128, 1024, 8192)
STEPS = (1, 4, 8)
"""Tokens of a step."""


class Attending:
    """The attention of steps of E2B at one context; nothing of the step is kept."""

    def __init__(self, context: int, tokens: int, dtype: torch.dtype) -> None:
        self.config = PRESETS["E2B"].text_config
        self.cache = RingCache(self.config, dtype=dtype)
        self.cache.reserve(context)
        generator = torch.Generator().manual_seed(3)
        self.new: list[list[Tensor]] = []
        for plan in self.config.layers:
            heads = [self.config.num_attention_heads] + [plan.num_key_value_heads] * 2
            new = [torch.randn(tokens, n, plan.head_dim, generator=generator) for n in heads]
            new[0] /= plan.head_dim**0.5
            self.new.append(new)
            if plan.owns_kv:
                shape = (context, plan.num_key_value_heads, plan.head_dim)
                past = torch.randn(shape, generator=generator)
                slots = self.cache._layers[plan.index].slots
                slots.write(0, past[: len(slots)], past[: len(slots)])
        self.start, self.tokens = context - tokens, tokens
        self.nbytes = work.decode_bytes(self.config, context, 0, dtype.itemsize)

    def step(self) -> None:
        self.cache.length = self.start
        with self.cache.step(self.tokens):
            for plan, (q, k, v) in zip(self.config.layers, self.new, strict=True):
                own = (k, v) if plan.owns_kv else (None, None)
                self.cache.attend(plan.index, q, *own, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=0.75, help="size of the weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not native.available():
        sys.exit("the C++ extension is not built: there are no kernels to measure")
    about = measure.machine()

    buffer = fill(options.gib)
    weights = [weight(buffer, format) for format in KINDS]
    generator = torch.Generator().manual_seed(2)
    runs: dict[str, Callable[[], object]] = {"read": lambda: native.read_memory(buffer)}
    sizes: dict[str, int] = {"read": buffer.nbytes}
    for rows in ROWS:
        given = cpu.quantize_rows(torch.randn(rows, INPUTS, generator=generator))
        for each in weights:
            check(each, *given)
            name = f"{name_of(each)} x{rows}"
            runs[name] = lambda each=each, given=given: cpu.gemm(each, *given)
            sizes[name] = each.nbytes
    for context in CONTEXTS:
        for tokens in STEPS:
            for dtype in (torch.int8, torch.bfloat16):
                attending = Attending(context, tokens, dtype)
                name = f"attend {context} {str(dtype).removeprefix('torch.')} x{tokens}"
                runs[name], sizes[name] = attending.step, attending.nbytes
    seconds = measure.interleaved(runs, repeats=options.repeats)
    rates = {name: [sizes[name] / s / 1e9 for s in found] for name, found in seconds.items()}
    ceiling = max(rates["read"])
    print(f"{native.isa()}, {native.threads()} threads, {buffer.nbytes / 2**30:.2f} GiB of weights")
    results: dict[str, dict[str, Any]] = {}
    for name, values in rates.items():
        found = results[name] = {**measure.summary(values), "ceiling": ceiling}
        print(
            f"{name:24} {found['median']:6.1f} GB/s ({found['min']:.1f}-{found['max']:.1f}, "
            f"n={found['n']})   {found['median'] / ceiling:.0%} of {ceiling:.1f}, "
            f"{sizes[name] / found['median'] / 1e6:.2f} ms"
        )
    measure.finish(
        "kernels",
        {
            "model": "any",
            "dtype": "low-bit",
            "isa": native.isa(),
            "threads": native.threads(),
            "inputs": INPUTS,
            "bytes": buffer.nbytes,
            "unit": "GB/s",
            "runs": results,
        },
        about,
        record=options.record,
    )


if __name__ == "__main__":
    main()
