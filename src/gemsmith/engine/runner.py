"""One step on the model: chunks of several sequences in one packed forward pass.

Prompts and generating sequences go through each matrix together, one row a token; attention looks
at each sequence's own blocks. Layers that own no K/V, the last norm and the head run only at the
rows whose logits are asked for. What this is not: it chooses neither tokens (see `reply`) nor what
to run (see `scheduler`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemsmith.cache.block_pool import Pages
from gemsmith.cache.paged import Chunk, PagedCache
from gemsmith.engine.context import Next, Soft
from gemsmith.model.text import TextModel


@dataclass(slots=True)
class Work:
    """The tokens of one sequence in a step; blocks for them are taken."""

    pages: Pages
    ids: list[int]
    asks: bool
    """Whether what follows the last one is wanted."""
    soft: Soft | None = None
    """Which of them, counted from the first, stand for an image or a sound."""
    blocks_T: Tensor | None = None
    """See `ops.attention.causal_attention`."""


class Runner:
    """A model and the K/V of all its sequences."""

    def __init__(self, model: TextModel, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[Next | None]:
        """Compute K/V of the works' tokens; what follows each that asked for it.

        Nothing is committed: a pass that raises can be run again.
        """
        device = self.cache.device
        ids = [id for work in works for id in work.ids]
        rows, at, values, first = [], [], [], 0
        for work in works:
            if work.soft is not None:
                at.append(work.soft[0] + first)
                values.append(work.soft[1])
            first += len(work.ids)
            if work.asks:
                rows.append(first - 1)
        step = self.cache.step([Chunk(w.pages, len(w.ids), w.blocks_T) for w in works])
        rows_R = None
        if len(rows) < len(ids):
            rows_R = torch.tensor(rows, dtype=torch.long, device=device)
        hidden_RD = self.model(
            torch.tensor(ids, device=device),
            step.positions_T,
            step,
            rows_R=rows_R,
            soft=(torch.cat(at), torch.cat(values)) if at else None,
        )
        if not rows:
            return [None] * len(works)
        # The head's weights are read once for all; one alone may do with the greatest of them.
        logits_RV = self.model.logits(hidden_RD) if len(rows) > 1 else [None]
        found = (
            Next(self.model, hidden_RD[r : r + 1], logits_V) for r, logits_V in enumerate(logits_RV)
        )
        return [next(found) if work.asks else None for work in works]
