"""Training for low bits: products see rounded weights, the optimizer moves the exact ones.

Gradients pass the rounding as if it were not there (the straight-through estimator, Bengio et
al., arXiv:1308.3432): a weight moves in full precision and, some steps later, its code does. What
is trained so, and written rounded, lies on the grid that `quantize` looks for: its low-bit form is
the same model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gemsmith.config import Gemma4Config
from gemsmith.model.text import TextModel
from gemsmith.quant.formats import Format
from gemsmith.weights.recipe import Recipe


def decoder_formats(model: TextModel, bits: str | None) -> dict[str, Format]:
    """What the recipe of so many bits makes of each of the decoder's weights; None: nothing.

    Raises:
      ConfigError: no such recipe, or its groups do not divide a weight's rows.
    """
    if bits is None:
        return {}
    # The towers are another module, whose names no recipe for the text alone has.
    return Recipe(bits).formats(Gemma4Config(text_config=model.config))


@contextmanager
def rounded(model: TextModel, formats: Mapping[str, Format]) -> Iterator[None]:
    """Inside, `model` has the rounded weights, and gradients are those of them; after, its own."""
    weights = dict(model.named_parameters())
    exact = {name: weights[name].detach().clone() for name in formats}
    try:
        with torch.no_grad():
            for name, format in formats.items():
                weights[name].copy_(nearest(exact[name], format))
        yield
    finally:
        with torch.no_grad():
            for name, weight in exact.items():
                weights[name].copy_(weight)


def nearest(weight: Tensor, format: Format) -> Tensor:
    """The float32 values of `quantize.round_to_nearest`, without their codes: a third of its time.

    Raises:
      ConfigError: the format's groups do not divide a row.
    """
    K = weight.shape[-1]
    groups = weight.float().reshape(-1, K // format.groups(K))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    inverse = torch.where(largest.abs() > 1e-30, 1 / largest, 0.0)
    codes = (groups * (inverse * -format.offset)).round_().clamp_(-format.offset, format.offset - 1)
    scale = largest / -format.offset
    if format.group:
        scale = scale.bfloat16().float()
    return codes.mul_(scale).view(weight.shape)
