"""Floats -> codes and scales, without calibration data.

`round_to_nearest` takes each scale from the largest weight; `search` tries a few dozen scales for
each group, fits each to its codes by least squares and keeps the best: at 4 bits in groups of 32
that is a tenth less error, for ten times the work. Where scales are to be steps, each row gets the
step whose multiples meet these scales best: 6 to 8 % more error than free scales have, for a fourth
more work. `quantize` is what to call: it first looks
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
from gemsmith.ops import cpu
from gemsmith.quant.formats import Format, Quantized, pack

CHUNK_WEIGHTS = 1 << 19
"""Weights in work at once: about 12 MB of temporaries, which stays in a CPU's cache."""
STEP_LEAST = 0.85
"""Of a fifteenth of a row's largest scale: the least step tried. A smaller one would clip it."""
STEPS = 10
"""Tried from there on, 8 to each doubling; beyond, all multiples are coarse."""
STEPS_ROUNDED = 2
"""The best of these by an estimate, for which weights are rounded; with all of them the error is a
five-hundredth less."""
STEPS_COST = 1.1
"""Squared error with steps, of that with free scales, beyond which a weight keeps these."""
GRID_ROWS = 64
GRID_ERROR = 1e-5
"""Relative squared error below which weights lie on a grid. Rounding of the weights to bfloat16,
and of the scale, leaves at most 4e-6; a search on other weights leaves 1e-3 at 4 bits."""


def quantize(weight: Tensor, format: Format, *, grid: bool | None = None) -> Quantized:
    """A weight [..., N, K] of any float dtype in `format`: its own grid, else the best searched.

    Scales of groups are values of bfloat16, as they are stored; those of rows are float32. format
    and grid: what `settle` said of the whole weight, where this is a part of its rows; the result
    of each row then depends on that row alone. Without grid that is asked first.

    Raises:
      ConfigError: the format's groups do not divide K.
      WeightsError: a weight is infinite or not a number.
    """
    if grid is None:
        format, grid = settle(weight, format)
    if grid:
        return _by_chunks(weight, format.free, _grid_ratios(format))
    return search(weight, format)


def settle(weight: Tensor, format: Format) -> tuple[Format, bool]:
    """The format that a weight gets where `format` is asked for, and whether it lies on its grid
    already. On a grid the scales are those of the training; and where steps would cost too much, as
    in rows of which few groups are by far the largest, they stay free. Looks at GRID_ROWS rows.

    Raises: as `quantize`.
    """
    if on_grid(weight, format):
        return format.free, True
    if format.steps:
        flat = weight.reshape(-1, weight.shape[-1])
        sample = flat[spread(len(flat))].float()
        steps, free = (squares(sample, search(sample, f))[0] for f in (format, format.free))
        if steps > STEPS_COST * free:
            return format.free, False
    return format, False


def round_to_nearest(weight: Tensor, format: Format) -> Quantized:
    """Each scale such that the largest weight of its group becomes -2^(bits-1); none are steps."""
    return _by_chunks(weight, format.free, [-float(format.offset)], refit=False)


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
    found = _by_chunks(sample, format.free, _grid_ratios(format))
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
        if format.steps:
            codes, scale = _to_steps(groups, codes, scale.view(-1, G), format, counts)
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
        error = _errors(groups, codes, scale, counts)
        # All codes and the scale negated are the same weights: the positive scale wins.
        better = (error < best_error) | ((error == best_error) & (scale > best_scale))
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
    # A scale of 0, or one that is no number, would say nothing of its codes, all 0.
    best_scale = torch.where(best_scale == 0, torch.ones_like(best_scale), best_scale)
    return best_codes.to(torch.int8), best_scale


def _to_steps(
    groups: Tensor, codes: Tensor, scale_NG: Tensor, format: Format, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `_best` found, with the scales of each row multiples of a step, and codes to match.

    Steps have 4 significant bits, so that multiples of them up to 15 are values of bfloat16. Were
    the codes kept, a scale s that becomes t would add power * (t - s)^2 to the error, with power
    the sum of their squares: by that the steps are compared. For the best few the weights are
    rounded again, with the multiples next below and above each scale.
    """
    N, G = scale_NG.shape
    squared = codes.float().square()
    power_NG = (squared if counts is None else squared * counts).sum(-1).view(N, G)
    largest_N1 = (scale_NG.abs() * (power_NG > 0)).amax(-1, keepdim=True)
    largest_N1 = largest_N1.where(largest_N1 > 0, 1)
    first_N1 = _step_number(largest_N1 * (STEP_LEAST / cpu.MOST_MULTIPLE)) + 1
    added: list[Tensor] = []
    for n in range(STEPS):
        step_N1 = _step(first_N1 + n)
        moved_NG = _multiples(scale_NG / step_N1) * step_N1 - scale_NG
        added.append((power_NG * moved_NG.square()).sum(-1))
    best: tuple[Tensor, Tensor] | None = None
    least_N1 = torch.full_like(largest_N1, torch.inf)
    for n_N in torch.stack(added).argsort(dim=0, stable=True)[:STEPS_ROUNDED]:
        step_N1 = _step(first_N1 + n_N[:, None])
        ratio_NG = scale_NG / step_N1
        tried: list[tuple[Tensor, Tensor]] = []
        for place in (torch.floor, torch.ceil):
            scale = (_multiples(ratio_NG, place) * step_N1).view(-1, 1)
            its = (groups / scale).round_().clamp_(-format.offset, format.offset - 1)
            tried.append((its.to(torch.int8), scale))
        below, above = (_errors(groups, *each, counts) for each in tried)
        found = _either(above < below, tried[1], tried[0])
        error_N1 = torch.minimum(above, below).view(N, G).sum(-1, keepdim=True)
        better = (error_N1 < least_N1).expand(N, G).reshape(-1, 1)
        least_N1 = torch.minimum(error_N1, least_N1)
        best = _either(better, found, best or found)
    assert best is not None, "some steps are tried"
    return best


def _either(
    choice: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    return torch.where(choice, one[0], other[0]), torch.where(choice, one[1], other[1])


def _errors(groups: Tensor, codes: Tensor, scale: Tensor, counts: Tensor | None) -> Tensor:
    """Squared errors [n, 1] of [n, g] weights."""
    error = torch.addcmul(groups, codes, scale, value=-1).square_()
    return (error if counts is None else error.mul_(counts)).sum(-1, keepdim=True)


def _multiples(ratio_NG: Tensor, place: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """Multiples that a scale may be of its step; none is 0, which would say nothing of codes."""
    most = cpu.MOST_MULTIPLE
    whole_NG = place(ratio_NG).clamp_(-most, most)
    return torch.where(whole_NG == 0, torch.where(ratio_NG < 0, -1.0, 1.0), whole_NG)


def _step_number(x: Tensor) -> Tensor:
    """Of the largest step that is not above x: steps are numbered, 8 to each doubling."""
    fraction, exponent = torch.frexp(x)
    return 8 * (exponent - 4) + (fraction * 16).int() - 8


def _step(number: Tensor) -> Tensor:
    return torch.ldexp((8 + number % 8).float(), number // 8)
