"""The tokens one sequence consists of so far and their K/V; runs the model over new ones.

Kept after a request, so that a prompt which begins with the same tokens (the next message of a
conversation) computes only what is new.
"""

from typing import Any

import torch
from torch import Tensor

from gemsmith.cache.ring import RingCache
from gemsmith.model.text import TextModel

CHUNK_TOKENS = 512
"""Prompt tokens run in one pass: enough for full speed, bounds the memory of activations."""


class Context:
    """One growing sequence on one model."""

    def __init__(self, model: TextModel) -> None:
        weight: Any = model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.ids: list[int] = []
        """The tokens that K/V are held for."""
        self.whole = True
        """False once a pass was cut off; such a context is not to be used again."""
        self._cache = RingCache(
            model.config, dtype=weight.dtype, device=weight.device, k_from_v=model.k_from_v
        )

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @torch.inference_mode()
    def reserve(self, tokens: int) -> None:
        """Allocate for `tokens` tokens in all.

        Raises:
          CapacityError: no memory for them.
        """
        self._cache.reserve(tokens)

    @torch.inference_mode()
    def rewind_for(self, ids: list[int]) -> int:
        """Keep only what `ids` begins with, its last token excepted; returns the tokens kept.

        The last token must run again for its logits. Where sliding layers no longer hold what lies
        before the point of difference, nothing can be kept.
        """
        common = 0
        for held, new in zip(self.ids, ids[:-1], strict=False):
            if held != new:
                break
            common += 1
        if not self._cache.can_trim(common):
            common = 0
        self._cache.trim(common)
        del self.ids[common:]
        return common

    @torch.inference_mode()
    def run(self, ids: list[int]) -> Tensor:
        """Append tokens (at least one); returns the logits [V] after the last, float32."""
        hidden_1D = torch.empty(0)
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = ids[start : start + CHUNK_TOKENS]
            # Layers without K/V of their own run at the prompt's last token only.
            last = [len(chunk) - 1] if start + CHUNK_TOKENS >= len(ids) else []
            hidden_1D = self._pass(chunk, torch.tensor(last, dtype=torch.long, device=self.device))
        return self.model.logits(hidden_1D)[0]

    @torch.no_grad()  # not inference mode: the caller may change what it gets
    def run_all(self, ids: list[int]) -> Tensor:
        """Append tokens (at least one); returns the logits [T, V] after each, float32."""
        chunks = (ids[i : i + CHUNK_TOKENS] for i in range(0, len(ids), CHUNK_TOKENS))
        return torch.cat([self.model.logits(self._pass(chunk, None)) for chunk in chunks])

    def _pass(self, ids: list[int], rows_R: Tensor | None) -> Tensor:
        ids_T = torch.tensor(ids, device=self.device)
        self.whole = False
        with self._cache.step(len(ids)) as positions_T:
            # A single token is its own last row.
            rows_R = None if len(ids) == 1 else rows_R
            hidden_RD = self.model(ids_T, positions_T, self._cache, rows_R=rows_R)
        self.ids += ids
        self.whole = True
        return hidden_RD
