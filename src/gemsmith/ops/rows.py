"""What stands between the products of a layer, row by row: norms, their sums with the residual
stream, gated units, rotation.

Inside all is float32. On the CPU, where nobody asks for a gradient, the C++ extension goes over the
values once and rounds once; torch makes a tensor a step, and rounds to x's dtype after each. Where
the CPU multiplies bfloat16, those steps were a third of a prompt's time.

Shapes: T tokens, N heads, H head_dim, P pairs that turn, D any width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemsmith.ops import native

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What the extension takes, and how its functions for it are called."""


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last dimension, in float32, back in x's dtype."""
    if _goes_native(x, weight_D):
        rows, y = _rows(x), torch.empty_like(x, memory_format=torch.contiguous_format)
        call = getattr(native.ready(), f"norm_{TYPES[x.dtype]}")
        weight = 0 if weight_D is None else weight_D.data_ptr()
        call(rows.data_ptr(), weight, *rows.shape, eps, y.data_ptr())
        return y
    wide = None if weight_D is None else weight_D.float()
    return F.rms_norm(x.float(), (x.shape[-1],), wide, eps).to(x.dtype)


def add_norm(
    x: Tensor, branch: Tensor, weight_D: Tensor, eps: float, scale: Tensor | float | None = None
) -> Tensor:
    """x plus the RMS norm of `branch`, of x's shape and dtype; times a scalar, if there is one."""
    if _goes_native(x, branch, weight_D) and branch.shape == x.shape:
        rows, added = _rows(x), _rows(branch)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        call = getattr(native.ready(), f"add_norm_{TYPES[x.dtype]}")
        call(
            rows.data_ptr(), added.data_ptr(), weight_D.data_ptr(), *rows.shape, eps,
            1.0 if scale is None else float(scale), y.data_ptr(),
        )  # fmt: skip
        return y
    total = x + rms_norm(branch, weight_D, eps)
    return total if scale is None else total * scale


def geglu(gate_TD: Tensor, up_TD: Tensor) -> Tensor:
    """gelu(gate) * up, the GELU approximated by tanh."""
    if _goes_native(gate_TD, up_TD) and gate_TD.shape == up_TD.shape and gate_TD.ndim == 2:
        if gate_TD.stride(1) != 1 or up_TD.stride(1) != 1:
            gate_TD, up_TD = gate_TD.contiguous(), up_TD.contiguous()
        y_TD = torch.empty_like(gate_TD, memory_format=torch.contiguous_format)
        call = getattr(native.ready(), f"geglu_{TYPES[gate_TD.dtype]}")
        call(
            gate_TD.data_ptr(), gate_TD.stride(0), up_TD.data_ptr(), up_TD.stride(0),
            *gate_TD.shape, y_TD.data_ptr(),
        )  # fmt: skip
        return y_TD
    return F.gelu(gate_TD, approximate="tanh") * up_TD


def rotate(x_TNH: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + H/2) for i below the table's width; the other dimensions pass.

    table: cos and sin, each [T, 1, P] float32.
    """
    cos, sin = table
    half, pairs = x_TNH.shape[-1] // 2, cos.shape[-1]
    if _goes_native(x_TNH) and _fits(x_TNH, cos, sin):
        x_TNH, cos, sin = x_TNH.contiguous(), cos.contiguous(), sin.contiguous()
        y_TNH = torch.empty_like(x_TNH)
        call = getattr(native.ready(), f"rotate_{TYPES[x_TNH.dtype]}")
        call(
            x_TNH.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x_TNH.shape, pairs, y_TNH.data_ptr()
        )
        return y_TNH
    cos, sin = (t.to(x_TNH.dtype) for t in table)
    a, b = x_TNH[..., :pairs], x_TNH[..., half : half + pairs]
    turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
    if pairs == half:
        return torch.cat((turned_a, turned_b), -1)
    return torch.cat((turned_a, x_TNH[..., pairs:half], turned_b, x_TNH[..., half + pairs :]), -1)


def _goes_native(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the extension takes rows of x, and others of the same dtype: contiguous where they
    are as wide as a row."""
    if x.dtype not in TYPES or torch.compiler.is_compiling() or not native.available():
        return False
    grads = torch.is_grad_enabled()
    for each in (x, *others):
        if each is None:
            continue
        if each.dtype != x.dtype or not each.is_cpu or (grads and each.requires_grad):
            return False
        if each.ndim == 1 and (each.shape != x.shape[-1:] or not each.is_contiguous()):
            return False
    return x.ndim > 1


def _fits(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether these are the angles of x's tokens."""
    shape = (x_TNH.shape[0], 1, cos.shape[-1])
    return (
        x_TNH.ndim == 3
        and 2 * cos.shape[-1] <= x_TNH.shape[-1]
        and all(t.dtype == torch.float32 and t.is_cpu and t.shape == shape for t in (cos, sin))
    )


def _rows(x: Tensor) -> Tensor:
    """x as contiguous rows [..., D]."""
    return x.reshape(-1, x.shape[-1]).contiguous()
