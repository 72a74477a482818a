"""Floats -> codes and scales, without calibration data.

`round_to_nearest` takes each scale from the largest weight; `search` tries a few dozen scales for
each group, fits each to its codes by least squares and keeps the best: at 4 bits in groups of 32
that is a tenth less error, for ten times the work. `quantize` is what to call: it first looks
whether the weights lie on a grid already, as those of quantization-aware training do, and then
takes that grid, because a fresh one would lose what the training won (the import trap: rounding
such weights by the usual rule keeps a sixth of the codes, since it need not meet the scale that
was trained).

Not here: Hadamard rotation with Lloyd-Max levels. It is the best of the data-free methods below
4 bits, but its levels are not equally spaced, so that no integer product serves it, no checkpoint
layout that others read can say it, and each product would rotate its input first. At 4 bits, the
least that is good without training, it gains over the search only where tails are heavy. HQQ and
scales with a minimum gained nothing on bell-shaped weights.

Shapes: N rows, K columns, G groups of a row, g weights of a group; leading dimensions (experts) are
rows too. Work is done some rows at a time; no float copy of a whole weight is made.

Source of the least-squares search: the idea of ggml's `make_qx_quants`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.quant.formats import Format, Quantized, pack

CHUNK_WEIGHTS = 1 << 19
"""Weights in work at once: about 12 MB of temporaries, which stays in a CPU's cache."""
GRID_ROWS = 64
GRID_ERROR = 1e-5
"""Relative squared error below which weights lie on a grid. Rounding of the weights to bfloat16,
and of the scale, leaves at most 4e-6; a search on other weights leaves 1e-3 at 4 bits."""


def quantize(weight: Tensor, format: Format, *, grid: bool | None = None) -> Quantized:
    """A weight [..., N, K] of any float dtype in `format`: its own grid, else the best searched.

    Scales of groups are values of bfloat16, as they are stored; those of rows are float32. grid:
    what `on_grid` said of the whole weight, where this is a part of its rows; the result of each
    row then depends on that row alone.

    Raises:
      ConfigError: the format's groups do not divide K.
      WeightsError: a weight is infinite or not a number.
    """
    if on_grid(weight, format) if grid is None else grid:
        return _by_chunks(weight, format, _grid_ratios(format))
    return search(weight, format)


def round_to_nearest(weight: Tensor, format: Format) -> Quantized:
    """Each scale such that the largest weight of its group becomes -2^(bits-1)."""
    return _by_chunks(weight, format, [-float(format.offset)], refit=False)


def search(weight: Tensor, format: Format, *, importance_K: Tensor | None = None) -> Quantized:
    """The scales of least squared error among those tried; at 8 bits one, for more gain nothing.

    importance_K: what a squared error in each column counts, nothing below 0; None: all the same.
    """
    offset = format.offset
    if format.bits == 8:
        ratios = [-float(offset)]
    elif format.group:
        ratios = [-offset * (1 + step / 80) for step in range(-10, 11)]
    else:
        # In a long row the largest weight is far out, and it pays to clip it.
        ratios = [-offset * 1.09**step for step in range(-1, 24)]
    return _by_chunks(weight, format, ratios, importance_K=importance_K)


def relative_error(weight: Tensor, quantized: Quantized) -> float:
    """|w - q|^2 / |w|^2 over the whole weight."""
    wrong, whole = squares(weight, quantized)
    return wrong / whole if whole else 0.0


def squares(weight: Tensor, quantized: Quantized) -> tuple[float, float]:
    """|w - q|^2 and |w|^2 over the whole weight, computed some rows at a time."""
    flat = weight.reshape(-1, weight.shape[-1])
    rows = quantized.flat()
    step, wrong, whole = _rows_at_once(flat.shape[1]), 0.0, 0.0
    for start in range(0, flat.shape[0], step):
        part = flat[start : start + step].float()
        wrong += (part - rows[start : start + step].dequantize()).square().sum().item()
        whole += part.square().sum().item()
    return wrong, whole


def _grid_ratios(format: Format) -> list[float]:
    """Codes that the largest weight of a group may have had.

    At 8 bits a row's largest weight has one of the outermost codes.
    """
    most = format.offset
    first = 1 if format.bits < 8 else most - 1
    codes = range(first, most + 1)
    return [*map(float, codes), *(-float(code) for code in codes)]


def on_grid(weight: Tensor, format: Format) -> bool:
    """Whether GRID_ROWS rows, spread over the weight, are all codes times scales already.

    Raises: as `quantize`.
    """
    flat = weight.reshape(-1, weight.shape[-1])
    sample = flat[spread(flat.shape[0])].float()
    found = _by_chunks(sample, format, _grid_ratios(format))
    return relative_error(sample, found) < GRID_ERROR


def spread(rows: int) -> slice:
    """The rows that `on_grid` looks at."""
    return slice(None, None, -(-rows // GRID_ROWS))


def _rows_at_once(K: int) -> int:
    return max(1, CHUNK_WEIGHTS // K)


def _by_chunks(
    weight: Tensor,
    format: Format,
    ratios: list[float],
    *,
    refit: bool = True,
    importance_K: Tensor | None = None,
) -> Quantized:
    """Quantize all rows with the best of the scales largest / ratio, chunk by chunk."""
    *lead, K = weight.shape
    G = format.groups(K)
    flat = weight.reshape(-1, K)
    N = flat.shape[0]
    packed = torch.empty((N, K * format.bits // 8), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((N, G), dtype=torch.float32, device=weight.device)
    step = _rows_at_once(K)
    for start in range(0, N, step):
        groups = flat[start : start + step].float().reshape(-1, K // G)
        if not torch.isfinite(groups).all():
            raise WeightsError("a weight is infinite or not a number; the checkpoint is damaged")
        counts = None
        if importance_K is not None:
            counts = importance_K.view(G, -1).repeat(len(groups) // G, 1)
        codes, scale = _best(groups, format, ratios, refit, counts)
        packed[start : start + step] = pack(codes.view(-1, K), format.bits)
        scales[start : start + step] = scale.view(-1, G)
    shape = tuple(weight.shape)
    return Quantized(format, shape, packed.view(*lead, -1), scales.view(*lead, G))


def _best(
    groups: Tensor, format: Format, ratios: list[float], refit: bool, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of [n, g] float32 weights the int8 codes [n, g] and scales [n, 1] of least error.

    counts: [n, g], what the square of each weight's error counts.
    """
    low, high = -float(format.offset), float(format.offset - 1)
    stored: Callable[[Tensor], Tensor] = (
        (lambda s: s.bfloat16().float()) if format.group else (lambda s: s)
    )
    at = groups.abs().argmax(-1, keepdim=True)
    largest = groups.gather(-1, at)
    # A group of zeros, or of numbers too small to divide by, is zeros.
    inverse = torch.where(largest.abs() > 1e-30, 1 / largest, 0.0)
    best_codes = torch.zeros_like(groups)
    best_scale = torch.ones_like(largest)
    best_error = torch.full_like(largest, torch.inf)
    least = 1 if counts is None else 1e-30
    for ratio in ratios:
        codes = (groups * (inverse * ratio)).round_().clamp_(low, high)
        scale = largest / ratio
        if refit:
            weighed = codes if counts is None else codes * counts
            power = (codes * weighed).sum(-1, keepdim=True)
            product = (groups * weighed).sum(-1, keepdim=True)
            scale = torch.where(power > 0, product / power.clamp_min(least), scale)
        scale = stored(scale)
        error = torch.addcmul(groups, codes, scale, value=-1).square_()
        error = (error if counts is None else error.mul_(counts)).sum(-1, keepdim=True)
        # All codes and the scale negated are the same weights: the positive scale wins.
        better = (error < best_error) | ((error == best_error) & (scale > best_scale))
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
    # A scale of 0, or one that is no number, would say nothing of its codes, all 0.
    best_scale = torch.where(best_scale == 0, torch.ones_like(best_scale), best_scale)
    return best_codes.to(torch.int8), best_scale
