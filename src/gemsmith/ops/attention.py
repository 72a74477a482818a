"""Attention over contiguous keys: causal, sliding-window, or under an explicit mask.

Softmax scale is 1.0 always: Gemma 4 puts the scale into the query and key norms. Scores and
softmax are float32 inside the fused kernels.

Shapes: T queries, S keys, N query heads, K key/value heads, H head_dim. N is a multiple of K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_attention(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, mask_TS: Tensor | None, *, causal: bool = False
) -> Tensor:
    """Attention under a bool mask (True = may look); None = every key. Returns [T, N, H].

    `causal` is the lower triangle without a mask in memory, for T == S only.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_SKH, v_SKH))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_TS, is_causal=causal, scale=1.0, enable_gqa=gqa
    )
    return out.squeeze(0).transpose(0, 1)


def visible(q_positions_T: Tensor, k_positions_S: Tensor, window: int | None) -> Tensor:
    """[T, S] bool: key not after the query, and among the last `window` keys up to it."""
    distance = q_positions_T[:, None] - k_positions_S[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def causal_attention(q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, window: int | None) -> Tensor:
    """Attention of the last T of S consecutive tokens over all S. Returns [T, N, H].

    Queries are cut into runs no longer than the window, each with the keys it can see, so a
    sliding layer costs T * window rather than T * S whatever the length of the chunk.
    """
    T, S = q_TNH.shape[0], k_SKH.shape[0]
    past = S - T
    if T == 1:
        first = 0 if window is None else max(0, S - window)
        return masked_attention(q_TNH, k_SKH[first:], v_SKH[first:], None)
    if past == 0 and (window is None or window >= S):
        return masked_attention(q_TNH, k_SKH, v_SKH, None, causal=True)
    run = T if window is None else max(window, 128)
    outs: list[Tensor] = []
    for start in range(0, T, run):
        stop = min(start + run, T)
        first = 0 if window is None else max(0, past + start - window + 1)
        last = past + stop
        q_at = torch.arange(past + start, last, device=q_TNH.device)
        k_at = torch.arange(first, last, device=q_TNH.device)
        outs.append(
            masked_attention(
                q_TNH[start:stop],
                k_SKH[first:last],
                v_SKH[first:last],
                visible(q_at, k_at, window),
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs)
