"""One step on the model: chunks of several sequences in one packed forward pass.

Prompts and generating sequences go through each matrix together, one row a token; attention looks
at each sequence's own blocks. Layers that own no K/V, the last norm and the head run only at the
rows whose logits are asked for. What this is not: it chooses neither tokens (see `reply`) nor what
to run (see `scheduler`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gemsmith.cache.block_pool import Pages
from gemsmith.cache.paged import Chunk, PagedCache
from gemsmith.engine.context import Next, Soft, read
from gemsmith.engine.sampler import Sees
from gemsmith.model.text import TextModel


@dataclass(slots=True)
class Work:
    """The tokens of one sequence in a step; blocks for them are taken."""

    pages: Pages
    ids: list[int]
    """Known ones, then drafts of what follows."""
    asks: int
    """After how many of them, the last ones, what follows is wanted."""
    sees: Sees | None = None
    """What of the logits the choice of a next token may depend on; None: on all."""
    soft: Soft | None = None
    """Which of them, counted from the first, stand for an image or a sound."""
    blocks_T: Tensor | None = None
    """See `ops.attention.causal_attention`."""


class Runner:
    """A model and the K/V of all its sequences."""

    def __init__(self, model: TextModel, cache: PagedCache) -> None:
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> list[list[Next]]:
        """Compute K/V of the works' tokens; what follows those of each that it asks for.

        Nothing is committed: a pass that raises can be run again.
        """
        ids = [id for work in works for id in work.ids]
        at, values, first = [], [], 0
        for work in works:
            if work.soft is not None:
                at.append(work.soft[0] + first)
                values.append(work.soft[1])
            first += len(work.ids)
        rows = read(
            self.model,
            ids,
            [(len(work.ids), work.asks) for work in works],
            self.cache.step([Chunk(w.pages, len(w.ids), w.blocks_T) for w in works]),
            [work.sees for work in works if work.asks],
            (torch.cat(at), torch.cat(values)) if at else None,
        )
        found = iter(rows.all())
        return [list(islice(found, work.asks)) for work in works]
