"""Cross entropy of the next token, over the rows that count.

Only rows of the batch that are learned reach the head, and layers that own no K/V run on those
rows alone. The [R, V] logits never exist as a whole: each chunk of rows runs its forward and its
backward before the next begins.

Shapes: R rows, D hidden_size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

LOGITS_PER_CHUNK = 1 << 23
"""Float32 logits alive at a time (32 MiB, and as much again for their gradient)."""


def chunk_rows(vocab_size: int) -> int:
    """Rows of a chunk: as many as LOGITS_PER_CHUNK allows."""
    return max(1, LOGITS_PER_CHUNK // vocab_size)


def backward_in_chunks(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden_RD: torch.Tensor,
    targets_R: torch.Tensor,
    weights_R: torch.Tensor,
    *,
    chunk: int,
) -> torch.Tensor:
    """Weighted mean of the cross entropy of rows; runs the whole backward pass.

    Rows without a target (-100) have weight 0.

    `head` maps hidden states [n, D] to float32 logits [n, V]. Gradients are added to the leaves
    of `hidden_RD` and to the head's weight.

    Returns:
      the loss, a detached scalar; 0 (and no gradient) where no row has a weight.
    """
    leaf_RD = hidden_RD.detach().requires_grad_()
    whole = weights_R.sum().clamp(min=1)
    total = torch.zeros((), device=hidden_RD.device)
    for begin in range(0, len(targets_R), chunk):
        rows = slice(begin, begin + chunk)
        logits = head(leaf_RD[rows]).float()
        each = F.cross_entropy(logits, targets_R[rows], ignore_index=-100, reduction="none")
        loss = (each * weights_R[rows]).sum() / whole
        loss.backward()
        total += loss.detach()
    hidden_RD.backward(leaf_RD.grad)
    return total


def sum_cross_entropy(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(target) over rows; a target of -100 adds nothing."""
    return F.cross_entropy(logits_RV.float(), targets_R, ignore_index=-100, reduction="sum")
