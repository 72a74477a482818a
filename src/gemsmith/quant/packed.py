"""A low-bit weight in the order in which the CPU's kernels read it; see ops/cpu.py for that order.

It stands where `formats.Quantized` does: the same numbers, multiplied with by the C++ extension.
What it is not: a format of files that others read. It is made of codes, or read back from where it
was kept (weights/cached.py).

Shapes: N rows (outputs), K columns (inputs), E experts, B blocks of 16 rows, G scales of a row.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops import cpu, native
from gemsmith.quant.formats import Format, Quantized


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight, or a stack of weights of one shape."""

    format: Format
    shape: tuple[int, ...]
    """(N, K) or (E, N, K)."""
    lines: Tensor
    """uint8 [B, L, 64] or [E, B, L, 64], on the CPU."""
    scales: Tensor
    """[B, G, 16] or [E, B, G, 16], float32 or bfloat16; or steps, see ops/cpu.py."""

    @staticmethod
    def takes(format: Format, shape: tuple[int, ...]) -> bool:
        """Whether the kernels can multiply with such a weight; others stay with torch."""
        group, K = format.group, shape[-1]
        return native.available() and K <= cpu.MAX_INPUTS and (group is None or group % 32 == 0)

    @classmethod
    def of(cls, weight: Quantized) -> Self:
        """Repack; the codes are read once, one weight of a stack after the other.

        Raises:
          WeightsError: scales that should be steps are none.
        """
        bits, (*_, N, K) = weight.format.bits, weight.shape
        pack_scales = cpu.pack_steps if weight.format.steps else cpu.pack_scales
        if len(weight.shape) == 2:
            lines = cpu.pack_lines(weight.packed.contiguous(), K, bits)
            return cls(weight.format, weight.shape, lines, pack_scales(weight.scales))
        lines = torch.empty((weight.shape[0], *cpu.lines_shape(N, K, bits)), dtype=torch.uint8)
        native.advise_hugepages(lines)
        for place, codes in zip(lines, weight.packed, strict=True):
            place.copy_(cpu.pack_lines(codes.contiguous(), K, bits))
        scales = torch.stack([pack_scales(scales_NG) for scales_NG in weight.scales])
        return cls(weight.format, weight.shape, lines, scales)

    def __getitem__(self, index: int | slice) -> "Packed":
        """One weight of a stack, or a range of a weight's rows that starts at a block's first;
        nothing is copied."""
        if isinstance(index, int):
            return Packed(self.format, self.shape[1:], self.lines[index], self.scales[index])
        start, stop, _ = index.indices(self.shape[0])
        if len(self.shape) != 2 or start % cpu.BLOCK:
            raise WeightsError(f"rows {start} to {stop}: a part of packed rows starts at a block")
        blocks = slice(start // cpu.BLOCK, -(-stop // cpu.BLOCK))
        shape = (max(0, stop - start), self.shape[-1])
        return Packed(self.format, shape, self.lines[blocks], self.scales[blocks])

    @property
    def device(self) -> torch.device:
        return self.lines.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.lines.nbytes + self.scales.nbytes

    @property
    def weight(self) -> cpu.PackedWeight:
        """What ops/cpu.py multiplies with.

        Raises:
          WeightsError: the tensors were moved off the CPU.
        """
        N, K = self.shape
        return cpu.PackedWeight(
            self.lines, self.scales,
            outputs=N, inputs=K, bits=self.format.bits, group=self.format.group,
        )  # fmt: skip

    def dequantize(self) -> Tensor:
        """float32: the whole weight, or stack."""
        if len(self.shape) == 3:
            return torch.stack([self[expert].dequantize() for expert in range(self.shape[0])])
        return self.rows(torch.arange(self.shape[0]))

    def product(self, x_TK: Tensor) -> Tensor:
        """float32 [T, N]; x of any float dtype, rounded to int8 row by row."""
        return cpu.linear(self.weight, x_TK.float().contiguous())

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [..., K]: the rows whose numbers are ids [...]."""
        rows = self.weight.rows(ids.reshape(-1).contiguous())
        return rows.view(*ids.shape, self.shape[-1])
