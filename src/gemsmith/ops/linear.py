"""Matrix products with stored weights.

Many CPUs have no bfloat16 multiplier, and there a bfloat16 product of many rows runs several times
slower than the same in float32. So the weight is widened on the way: by the C++ extension where it
is fast at that, and then a row has the same bits whatever rows stand beside it; elsewhere a tall
product widens a block of rows of the weight at a time for torch. The result differs from the plain
product only by rounding (it accumulates in float32).

Beside low-bit weights hidden states are float32, and what stayed bfloat16 is widened on the way
too: for few rows by the extension, on any CPU.

A weight may also be something other than a tensor, stored in few bits for one: then it multiplies
itself, and whoever asks for the product need not know.

Shapes: T rows, D inputs, O outputs.
"""

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemsmith import hardware
from gemsmith.ops import cpu, native

MIN_ROWS = 32
"""Below this many rows reading the weight is what costs, and widening it only adds to that."""
FEW_ROWS = 6
"""Up to so many rows of bfloat16 the extension takes together, and reads the weight as fast as
memory gives it; torch does not, whatever the CPU multiplies."""
BLOCK_OUTPUTS = 2048
"""Rows of the weight widened at once: at most 2048 * D * 4 bytes beside the model."""


class Factor(Protocol):
    """A weight [O, D], or a stack of weights, that is no tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> "Factor":
        """One weight of a stack, or some outputs."""
        ...

    def multiply(self, x_TD: Tensor) -> Tensor:
        """x @ self.T, [T, O] in x's dtype."""
        ...

    def multiply_by_rows(self, x_TD: Tensor, ids_n: Tensor) -> Tensor:
        """Columns ids of `multiply`, [T, n]."""
        ...

    def top(
        self, x_TD: Tensor, count: int, skipped: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `top` below."""
        ...


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products of its own; kept, as each product asks."""
    return hardware.machine().multiplies_bfloat16


def bfloat16_rows_are_alone() -> bool:
    """Whether a row of a product of bfloat16s on the CPU has the same bits whatever rows stand
    beside it: where the extension multiplies them. Elsewhere torch does, in an order that depends
    on their number; it is faster where the CPU has no AVX512, and of many rows where the CPU has
    bfloat16 products of its own."""
    return cpu.tiles_bfloat16() and not cpu_multiplies_bfloat16()


def linear(x_TD: Tensor, weight_OD: Tensor | Factor) -> Tensor:
    """x @ weight.T, [T, O] in x's dtype; a bfloat16 weight on the CPU takes float32 rows too."""
    if not isinstance(weight_OD, Tensor):
        return weight_OD.multiply(x_TD)
    if weight_OD.dtype != torch.bfloat16 or x_TD.device.type != "cpu":
        return F.linear(x_TD, weight_OD)
    few, grads = x_TD.shape[0] < MIN_ROWS, _needs_grad(x_TD, weight_OD)
    if not grads and _goes_native(x_TD, few):
        return cpu.linear_bfloat16(weight_OD, x_TD.contiguous())
    if x_TD.dtype == torch.bfloat16 and (
        few or cpu_multiplies_bfloat16() or _needs_grad(weight_OD)
    ):
        return F.linear(x_TD, weight_OD)
    wide_TD = x_TD.float()
    out_TO = x_TD.new_empty((x_TD.shape[0], weight_OD.shape[0]))
    room_BD = torch.empty((min(BLOCK_OUTPUTS, weight_OD.shape[0]), weight_OD.shape[1]))
    for start in range(0, weight_OD.shape[0], BLOCK_OUTPUTS):
        block = weight_OD[start : start + BLOCK_OUTPUTS]
        # Fresh memory costs more than widening, but a gradient needs every block again.
        block = block.float() if grads else room_BD[: len(block)].copy_(block)
        out_TO[:, start : start + BLOCK_OUTPUTS] = F.linear(wide_TD, block)
    return out_TO


def linear_rows(x_TD: Tensor, weight_OD: Tensor | Factor, ids_n: Tensor) -> Tensor:
    """Columns ids of `linear`, [T, n]; of the weight only these rows are read. Bit for bit the same
    where the weight is no tensor or the extension multiplies, else up to the order in which a
    product adds."""
    if not isinstance(weight_OD, Tensor):
        return weight_OD.multiply_by_rows(x_TD, ids_n)
    return linear(x_TD, weight_OD[ids_n])


def top(
    x_TD: Tensor, weight_OD: Tensor | Factor, count: int, skipped: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The `count` greatest of `linear`'s outputs, as `cpu.top` has them; None where they are not to
    be had without all the others."""
    return None if isinstance(weight_OD, Tensor) else weight_OD.top(x_TD, count, skipped)


def _goes_native(x_TD: Tensor, few: bool) -> bool:
    """Whether the extension multiplies these rows with a bfloat16 weight."""
    if x_TD.dtype == torch.float32:
        return few and native.available()
    return bfloat16_rows_are_alone() or (len(x_TD) <= FEW_ROWS and cpu.tiles_bfloat16())


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
