"""Weights of floats to few bits while they are read, some MiB at a time.

What they become is that of `gemsmith quantize`; into which formats is for recipe.py.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gemsmith.errors import CapacityError, WeightsError
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.quantize import quantize, settle, spread
from gemsmith.weights.tensors import StoredTensor, read_rows

ROUNDING = 2
"""To be raised when weights of floats are rounded otherwise, so that the cache is made anew."""

Advance = Callable[[str, int], None]
"""Told the weight in work and how many of its values were just done."""


def silent(key: str, values: int) -> None:
    """An `Advance` that tells nobody."""


def quantized(
    key: str, tensor: StoredTensor, format: Format, device: torch.device, advance: Advance
) -> Quantized:
    """A tensor of floats in `format`, or as it settles; it is never in memory as a whole."""
    *rows, K = tensor.shape
    N, G, done = math.prod(rows), format.groups(K, key), 0
    try:
        packed = torch.empty((N, K * format.bits // 8), dtype=torch.uint8, device=device)
        scales = torch.empty((N, G), dtype=torch.float32, device=device)
    except torch.OutOfMemoryError:
        raise CapacityError(
            f"{device}: out of memory at {key}; free memory there, or load on another device"
        ) from None
    format, grid = settled(key, tensor, format)
    for floats, part in rounded(key, tensor, format, grid):
        packed[done : done + len(floats)] = part.packed
        scales[done : done + len(floats)] = part.scales
        done += len(floats)
        advance(key, floats.numel())
    return Quantized(format, tensor.shape, packed.view(*rows, -1), scales.view(*rows, G))


def rounded(
    key: str, tensor: StoredTensor, format: Format, grid: bool
) -> Iterator[tuple[Tensor, Quantized]]:
    """The tensor [..., K] some MiB of rows at a time: as it is, and in the format in which, with
    `grid`, it was settled.

    Raises:
      WeightsError: a value is infinite or not a number; the file ends within the tensor.
    """
    for rows in read_rows(tensor):
        try:
            part = quantize(rows, format, grid=grid)
        except WeightsError as error:
            raise WeightsError(f"{tensor.file.name}: {key}: {error}") from None
        yield rows, part


def settled(key: str, tensor: StoredTensor, format: Format) -> tuple[Format, bool]:
    """`quant.quantize.settle` by some of the tensor's rows.

    Raises: as `rounded`.
    """
    sample = torch.cat([*read_rows(tensor, spread(math.prod(tensor.shape[:-1])).step)])
    try:
        return settle(sample, format)
    except WeightsError as error:
        raise WeightsError(f"{tensor.file.name}: {key}: {error}") from None
