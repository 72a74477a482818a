"""Codes chosen with calibration data: GPTQ.

Rounding each weight by itself makes W as good as can be; what counts is W x. Here the columns of a
weight are rounded one after the other, and the error of each is passed on to the columns still to
come, in the proportions in which the inputs x of the data make up for it. With H = sum of x x^T
these follow from the Cholesky factor of H's inverse.

Scales come first, searched for each group as without data but with every column's error weighted
by the size of its inputs (the diagonal of H), and are kept: so columns may be taken in any order,
largest inputs first, while what is stored is in the order it always was. Nothing else of the format
changes: who reads or multiplies such weights need not know how they were made.

What it is not: running the model to get the inputs, see weights/calibrate.py.

Shapes: N rows (outputs), K columns (inputs), G scales of a row, T tokens.
Source: Frantar et al., GPTQ, arXiv 2210.17323, with static groups and activation order.
"""

import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.quantize import search

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: inputs that the data lacks must not seem free."""
BLOCK = 128
"""Columns rounded before their errors are passed on beyond them."""


def gram(x_TK: Tensor, into: Tensor | None = None) -> Tensor:
    """x^T x, float32 [K, K], added to `into` in place if that is given."""
    x_TK = x_TK.float()
    if into is None:
        into = torch.zeros((x_TK.shape[1],) * 2, device=x_TK.device)
    return into.addmm_(x_TK.T, x_TK)


def gptq(weight_NK: Tensor, H_KK: Tensor, format: Format) -> Quantized:
    """A weight of floats in `format`, for inputs whose `gram` is H; both are left as they were.

    Work memory: the weight in float32 and three matrices like H.

    Raises:
      ConfigError: the format's groups do not divide K.
      WeightsError: a weight, or H, has values that are infinite or not a number.
    """
    if not torch.isfinite(H_KK).all():
        raise WeightsError("inputs on the calibration data are infinite or not a number")
    diagonal_K = H_KK.diagonal()
    size = diagonal_K.mean().clamp_min(1e-30)
    start = search(weight_NK, format, importance_K=diagonal_K / size + DAMPING)
    K = weight_NK.shape[1]
    order_K = diagonal_K.argsort(descending=True, stable=True)
    U_KK = _factor(H_KK[order_K][:, order_K])
    W_KN = weight_NK.T.float()[order_K]
    scale_KN = start.scales.T[order_K // (K // start.scales.shape[1])]
    low, high = -format.offset, format.offset - 1
    codes_KN = torch.empty((K, weight_NK.shape[0]), dtype=torch.int8, device=weight_NK.device)
    for begin in range(0, K, BLOCK):
        end = min(begin + BLOCK, K)
        errors_BN = torch.empty_like(W_KN[begin:end])
        for k in range(begin, end):
            q_N = (W_KN[k] / scale_KN[k]).round_().clamp_(low, high)
            codes_KN[order_K[k]] = q_N.to(torch.int8)
            errors_BN[k - begin] = (W_KN[k] - q_N * scale_KN[k]) / U_KK[k, k]
            W_KN[k + 1 : end].addr_(U_KK[k, k + 1 : end], errors_BN[k - begin], alpha=-1)
        W_KN[end:].addmm_(U_KK[begin:end, end:].T, errors_BN, alpha=-1)
    return Quantized.from_codes(format, codes_KN.T.contiguous(), start.scales)


def output_error(weight_NK: Tensor, quantized: Quantized, H_KK: Tensor) -> tuple[float, float]:
    """Sums over the data's tokens of |(w - q) x|^2 and of |w x|^2."""
    weight_NK = weight_NK.float()
    wrong_NK = weight_NK - quantized.dequantize()
    return tuple((part @ H_KK * part).sum().item() for part in (wrong_NK, weight_NK))  # pyright: ignore[reportReturnType]


def _factor(H_KK: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of H, damped until there is one."""
    mean = H_KK.diagonal().mean().clamp_min(1e-30)
    damping = DAMPING
    while True:
        damped = H_KK.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
