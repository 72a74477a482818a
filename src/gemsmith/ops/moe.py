"""Mixture of experts: each token through its chosen experts.

Shapes: T tokens, D hidden_size, A experts a token, E experts, F expert width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemsmith.ops.linear import Factor, linear


def experts(
    x_TD: Tensor,
    index_TA: Tensor,
    weight_TA: Tensor,
    gate_up_EFD: Tensor | Factor,
    down_EDF: Tensor | Factor,
) -> Tensor:
    """Weighted sum of the chosen experts' gated MLPs, [T, D].

    Tokens are sorted by expert, so each expert that was chosen runs once over its tokens and the
    others are never touched. gate_up_EFD is [E, 2F, D], gate first; down_EDF is [E, D, F].
    """
    order = index_TA.flatten().argsort(stable=True)
    token = order // index_TA.shape[1]
    weight = weight_TA.flatten()[order]
    counts = torch.bincount(index_TA.flatten(), minlength=gate_up_EFD.shape[0]).tolist()
    out = torch.zeros_like(x_TD)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows = token[start : start + count]
        gate, up = linear(x_TD[rows], gate_up_EFD[expert]).chunk(2, dim=-1)
        hidden = linear(F.gelu(gate, approximate="tanh") * up, down_EDF[expert])
        scaled = hidden * weight[start : start + count, None]
        out.index_add_(0, rows, scaled.to(out.dtype))
        start += count
    return out
