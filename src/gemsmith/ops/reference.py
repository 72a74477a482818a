"""The slow, obvious definition of every operation: the oracle for the fast ones.

Plain loops and full matrices in float32 (or float64 if given), no fused kernels, no tricks.
Nothing at run time calls this file.

Shapes: T queries, S keys, N query heads, K key/value heads, H head_dim, D hidden_size,
        E experts, F expert width.
Source: GEMMA formulas as in transformers 5.23 modeling_gemma4.py.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; plain weight, not 1 + weight."""
    normed = x * (x.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)
    return normed if weight is None else normed * weight


def inverse_frequencies(head_dim: int, theta: float, rotary_fraction: float = 1.0) -> Tensor:
    """[head_dim / 2] float32. Pairs beyond `rotary_fraction` do not turn: frequency 0.

    The exponent's denominator is the whole head_dim also where only a fraction rotates
    ("proportional" RoPE), which is what sets it apart from ordinary partial RoPE.
    """
    half = head_dim // 2
    turning = int(rotary_fraction * head_dim // 2)
    freqs = torch.zeros(half)
    for i in range(turning):
        freqs[i] = theta ** (-2 * i / head_dim)
    return freqs


def rope(x_TNH: Tensor, positions_T: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2) by position * inv_freq[i]."""
    half = x_TNH.shape[-1] // 2
    angle = positions_T[:, None, None].to(x_TNH.dtype) * inv_freq.to(x_TNH.dtype)
    a, b = x_TNH[..., :half], x_TNH[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def allowed(q_positions_T: Tensor, k_positions_S: Tensor, window: int | None) -> Tensor:
    """[T, S] bool: causal, and within `window` keys counting the query itself."""
    distance = q_positions_T[:, None] - k_positions_S[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attention(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, mask_TS: Tensor) -> Tensor:
    """Softmax attention with scale 1; query head n reads key/value head n // (N / K)."""
    group = q_TNH.shape[1] // k_SKH.shape[1]
    out = torch.empty_like(q_TNH)
    for n in range(q_TNH.shape[1]):
        scores = q_TNH[:, n] @ k_SKH[:, n // group].T
        weights = scores.masked_fill(~mask_TS, -torch.inf).softmax(-1)
        out[:, n] = weights @ v_SKH[:, n // group]
    return out


def experts(
    x_TD: Tensor, index_TA: Tensor, weight_TA: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's A chosen experts of weight * W_down(gelu_tanh(gate) * up)."""
    out = torch.zeros_like(x_TD)
    for t in range(x_TD.shape[0]):
        for expert, weight in zip(index_TA[t].tolist(), weight_TA[t], strict=True):
            gate, up = (gate_up_EFD[expert] @ x_TD[t]).chunk(2)
            hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
            out[t] += weight * (down_EDF[expert] @ hidden)
    return out
