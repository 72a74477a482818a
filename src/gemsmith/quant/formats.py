"""What a low-bit weight is: codes packed into bytes, and the scales that make them numbers.

A weight w of a row is q * scale, with q an integer of `bits` bits in [-2^(bits-1), 2^(bits-1)-1].
Stored is u = q + 2^(bits-1) (offset binary), consecutive k in one byte, the first in the lowest
bits. One scale serves a row, or `group` consecutive k of a row. A scale may be negative: then the
row's largest weight, whatever its sign, may take the code with the largest magnitude.

Scales of groups are any values of bfloat16; or they are steps, integers from -15 to 15 times one
step of their row, so that a product adds up nothing but integers (see ops/cpu.py). Who reads scales
as they are need not know.

The same bytes are in Google's mobile checkpoints and, four to a word, in compressed-tensors'
`pack-quantized`. Nothing here chooses codes (see quantize.py) or multiplies (see linear.py).

Shapes: N rows (outputs), K columns (inputs), E experts, G scales of a row.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from gemsmith.errors import ConfigError, WeightsError
from gemsmith.ops import cpu, native

BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Format:
    """How one weight is stored. Written `int8`, `int4-g32` with a scale for every 32 k, `int4-g32s`
    with scale steps."""

    bits: int
    """2, 4 or 8."""
    group: int | None = None
    """Weights of a row that share a scale; None: all of them."""
    steps: bool = False
    """Whether scales are multiples of one step a row."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits {self.bits}: weights are stored in 2, 4 or 8")
        if self.group is not None and self.group < 1:
            raise ConfigError(f"group {self.group}: must be positive, or None for one scale a row")
        if self.steps and not cpu.takes_steps(self.bits, self.group):
            raise ConfigError(
                f"{self.free} has no scale steps; 4 bits have them in groups of up to 32, 2 bits "
                "in groups of up to 128"
            )

    def __str__(self) -> str:
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "") + "s" * self.steps

    @property
    def free(self) -> "Format":
        """The same with scales of any value."""
        return replace(self, steps=False)

    def stepped(self, K: int) -> "Format":
        """The same with scale steps, if rows of K weights can have them."""
        return replace(self, steps=cpu.takes_steps(self.bits, self.group) and self.group != K)

    @property
    def offset(self) -> int:
        """2^(bits-1): what is added to a code to store it, and the magnitude of the least code."""
        return 1 << (self.bits - 1)

    def groups(self, K: int, name: str = "a weight") -> int:
        """Scales of a row of K weights.

        Raises:
          ConfigError: K is not a whole number of groups, or of bytes; `name` says whose K it is.
        """
        if self.group and K % self.group:
            fits = [g for g in (128, 64, 32, 16, 8) if K % g == 0]
            way = f"groups of {', '.join(map(str, fits))}" if fits else "one scale a row"
            raise ConfigError(
                f"{name} has rows of {K}, which groups of {self.group} do not divide; use {way}"
            )
        if K * self.bits % 8:
            raise ConfigError(f"{name} has rows of {K}: at {self.bits} bits not whole bytes")
        if self.steps and self.group == K:
            raise ConfigError(f"{name} has rows of {K}, one group, whose scale is no step")
        return K // self.group if self.group else 1

    def bytes(self, *shape: int) -> int:
        """Bytes of a weight [..., N, K] as packed: scales of groups bfloat16, of rows float32; a
        step float32, a multiple of it a byte."""
        *rows, K = shape
        scales = 2 * self.groups(K) if self.group else 4
        if self.steps:
            scales = self.groups(K) + 4
        return math.prod(rows) * (K * self.bits // 8 + scales)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 codes q [..., K] -> uint8 [..., K * bits / 8]."""
    u = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 8:
        return u
    fields = 8 // bits
    u = u.unflatten(-1, (-1, fields))
    out = u[..., 0].clone()
    for field in range(1, fields):
        out |= u[..., field] << (bits * field)
    return out


def unpack(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., K * bits / 8] -> int8 codes q [..., K]."""
    if bits == 8:
        return (packed ^ 128).view(torch.int8)
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    fields = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(fields, -1).flatten(-2).view(torch.int8) - offset


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight [N, K], or a stack [E, N, K], in a format."""

    format: Format
    shape: tuple[int, ...]
    packed: Tensor
    """uint8 [..., N, K * bits / 8]."""
    scales: Tensor
    """float32 [..., N, G]."""

    def __post_init__(self) -> None:
        *rows, K = self.shape
        wanted = (*rows, K * self.format.bits // 8), (*rows, self.format.groups(K))
        found = tuple(self.packed.shape), tuple(self.scales.shape)
        if (
            found != wanted
            or self.packed.dtype != torch.uint8
            or self.scales.dtype != torch.float32
        ):
            raise WeightsError(
                f"a weight {list(self.shape)} in {self.format} has uint8 codes {list(wanted[0])} "
                f"and float32 scales {list(wanted[1])}, not {self.packed.dtype} {list(found[0])} "
                f"and {self.scales.dtype} {list(found[1])}"
            )

    @classmethod
    def from_codes(cls, format: Format, codes: Tensor, scales: Tensor) -> Self:
        """From int8 codes [..., N, K] and scales [..., N, G]."""
        return cls(format, tuple(codes.shape), pack(codes, format.bits), scales.float())

    def __getitem__(self, index: int | slice) -> "Quantized":
        """One expert of a stack, or a range of rows (or experts); nothing is copied."""
        packed, scales = self.packed[index], self.scales[index]
        shape = (*packed.shape[:-1], self.shape[-1])
        return Quantized(self.format, shape, packed, scales)

    def flat(self) -> "Quantized":
        """All rows of a stack as one weight [E * N, K]; nothing is copied."""
        packed, scales = self.packed.flatten(0, -2), self.scales.flatten(0, -2)
        return Quantized(self.format, (len(packed), self.shape[-1]), packed, scales)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes

    def codes(self) -> Tensor:
        """int8 [..., N, K]."""
        return unpack(self.packed, self.format.bits)

    def dequantize(self) -> Tensor:
        """float32 [..., N, K]: the whole weight; take rows of a large one."""
        if self.packed.is_cpu and native.available():
            parts = (self.packed, self.scales)
            packed, scales = (part.reshape(-1, part.shape[-1]).contiguous() for part in parts)
            return cpu.dequantize(packed, scales, self.format.bits).view(self.shape)
        grouped = self.codes().unflatten(-1, (self.scales.shape[-1], -1))
        return (grouped * self.scales[..., None]).flatten(-2)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [..., K]: the rows of a weight [N, K] whose numbers are ids [...]."""
        shape = (*ids.shape, self.shape[-1])
        return Quantized(self.format, shape, self.packed[ids], self.scales[ids]).dequantize()
