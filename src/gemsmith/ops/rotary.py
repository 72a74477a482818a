"""Rotary position embedding, and the keys of K = V layers, which it makes of stored values.

Shapes: T tokens, S keys, K key/value heads, H head_dim, R pairs of a head that turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemsmith.ops.rows import rotate

BLOCK = 128
"""Positions of which `Turns.far_BR` knows the first; KEYS in native/kernels.h."""


def table(positions_T: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, each [T, 1, R] float32."""
    angle = positions_T[:, None, None].float() * frequencies_R
    return angle.cos(), angle.sin()


Tables = list[tuple[Tensor, Tensor]]


class Angles:
    """cos and sin of the positions of a pass, for the extension, by several settings of
    frequencies. A reply goes on token by token: its next positions are worked out together."""

    AHEAD = 64

    def __init__(self, frequencies: Sequence[Tensor]) -> None:
        self._frequencies = frequencies
        self._ahead: tuple[int, Tables] = (0, [])
        """A position, and tables of AHEAD from it on."""

    def of(self, starts: Sequence[int], tokens: Sequence[int]) -> tuple[Tables, int]:
        """`table` of positions, so many on end from each start, for each setting; and the row of
        the tables at which these positions begin."""
        if len(starts) > 1 or tokens[0] > 1:
            ranges = [torch.arange(s, s + n) for s, n in zip(starts, tokens, strict=True)]
            return self._of(torch.cat(ranges)), 0
        first, tables = self._ahead
        if not (tables and first <= starts[0] < first + self.AHEAD):
            first = starts[0]
            self._ahead = _, tables = first, self._of(torch.arange(first, first + self.AHEAD))
        return tables, starts[0] - first

    def _of(self, positions_T: Tensor) -> Tables:
        return [table(positions_T, frequencies_R) for frequencies_R in self._frequencies]


class Turns:
    """cos and sin of every position in two parts, for the extension: those of the first position of
    each block, and those of the places in a block. Layers that turn alike share one.

    A table of every position would be as large as what it serves to rebuild.
    """

    def __init__(self, frequencies_R: Tensor) -> None:
        self.frequencies_R = frequencies_R.float().contiguous()
        self.near = table(torch.arange(BLOCK), self.frequencies_R.cpu())
        self.far = table(torch.zeros(1), self.frequencies_R.cpu())

    def reach(self, positions: int) -> None:
        """Know the blocks of so many positions."""
        blocks = -(-positions // BLOCK)
        if blocks > len(self.far[0]):
            # Twice as many, so that a growing context seldom asks.
            first = torch.arange(2 * blocks) * BLOCK
            self.far = table(first, self.frequencies_R.cpu())


@dataclass(frozen=True, eq=False)
class KeyRule:
    """How the keys of a K = V layer follow from its values, at the position of each.

    There v = n(x) and k = rotate(norm * n(x)) with the same un-weighted norm n, so one copy is
    enough: k = rotate(norm * v), exact up to the rounding of v.
    """

    norm_H: Tensor
    """float32: the weight of the key norm."""
    turns: Turns = field(repr=False)

    def keys(self, v_SKH: Tensor, positions_S: Tensor) -> Tensor:
        """[S, K, H] in the values' dtype."""
        k_SKH = (v_SKH.float() * self.norm_H).to(v_SKH.dtype)
        return rotate(k_SKH, table(positions_S, self.turns.frequencies_R))
