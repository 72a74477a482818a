"""Attention over contiguous keys: causal, sliding-window, blockwise, or under an explicit mask.

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


def visible(
    q_positions_T: Tensor,
    k_positions_S: Tensor,
    window: int | None,
    q_block_T: Tensor | None = None,
    k_block_S: Tensor | None = None,
) -> Tensor:
    """[T, S] bool: key not after the query, and among the last `window` keys up to it.

    Given blocks (see `causal_attention`), a later key of the query's own block may be seen too.
    """
    distance = q_positions_T[:, None] - k_positions_S[None, :]
    mask = distance >= 0
    if q_block_T is not None and k_block_S is not None:
        mask = mask | ((q_block_T[:, None] == k_block_S) & (q_block_T[:, None] >= 0))
    return mask if window is None else mask & (distance < window)


def causal_attention(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    window: int | None,
    block_T: Tensor | None = None,
) -> Tensor:
    """Attention of the last T of S consecutive tokens over all S. Returns [T, N, H].

    Queries are cut into runs no longer than the window, each with the keys it can see, so a
    sliding layer costs T * window rather than T * S whatever the length of the chunk.

    block_T: tokens of one block, consecutive ones with the same number >= 0, see each other whole
    (an image in the sliding layers of 12B, 26B-A4B and 31B); -1 belongs to none.
    """
    T, S = q_TNH.shape[0], k_SKH.shape[0]
    past = S - T
    if T == 1:
        first = 0 if window is None else max(0, S - window)
        return masked_attention(q_TNH, k_SKH[first:], v_SKH[first:], None)
    if block_T is None and past == 0 and (window is None or window >= S):
        return masked_attention(q_TNH, k_SKH, v_SKH, None, causal=True)
    run = T if window is None else max(window, 128)
    outs: list[Tensor] = []
    for start in range(0, T, run):
        stop = min(start + run, T)
        first = 0 if window is None else max(0, past + start - window + 1)
        last = past + stop
        q_block = k_block = None
        if block_T is not None:
            # The last query's block may go on after it.
            if block_T[stop - 1] >= 0:
                last += int((block_T[stop:] == block_T[stop - 1]).sum())
            q_block = block_T[start:stop]
            k_block = F.pad(block_T[: last - past], (past, 0), value=-1)[first:]
        q_at = torch.arange(past + start, past + stop, device=q_TNH.device)
        k_at = torch.arange(first, last, device=q_TNH.device)
        outs.append(
            masked_attention(
                q_TNH[start:stop],
                k_SKH[first:last],
                v_SKH[first:last],
                visible(q_at, k_at, window, q_block, k_block),
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs)
