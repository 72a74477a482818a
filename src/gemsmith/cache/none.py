"""No cache: whole sequences, packed one after the other, attended once. Training and parity.

Shapes: T packed tokens, R rows asked for, N query heads, K key/value heads, H head_dim.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from gemsmith.config import TextConfig
from gemsmith.errors import RequestError
from gemsmith.ops.attention import causal_attention, masked_attention, visible


class NoCache:
    """Attention within each of the packed sequences of `lengths` tokens; nothing is kept after.

    Use one object for one forward pass: layers that own no K/V read those that an earlier layer
    of the same pass left here.
    """

    def __init__(self, config: TextConfig, lengths: Sequence[int]) -> None:
        if not lengths or min(lengths) < 1:
            raise RequestError(f"lengths {list(lengths)}: every packed sequence needs a token")
        self.layers = config.layers
        self.lengths = list(lengths)
        self._sources = {plan.kv_source for plan in config.layers if not plan.owns_kv}
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.compiler.disable
    def attend(
        self,
        layer: int,
        q: Tensor,
        k_TKH: Tensor | None,
        v_TKH: Tensor | None,
        rows_R: Tensor | None,
    ) -> Tensor:
        """See `model.text.KVStore`."""
        plan = self.layers[layer]
        if k_TKH is not None and v_TKH is not None:
            if layer in self._sources:
                self._kv[layer] = (k_TKH, v_TKH)
        else:
            k_TKH, v_TKH = self._kv[plan.kv_source]
        cuts = list(accumulate(self.lengths, initial=0))
        if rows_R is None:
            parts = [
                causal_attention(q[a:b], k_TKH[a:b], v_TKH[a:b], plan.window)
                for a, b in pairwise(cuts)
            ]
            return torch.cat(parts)
        order = rows_R.argsort(stable=True)
        edges = torch.searchsorted(rows_R[order], torch.tensor(cuts, device=rows_R.device))
        out = torch.empty_like(q)
        for (a, b), (first, last) in zip(pairwise(cuts), pairwise(edges.tolist()), strict=True):
            if first == last:
                continue
            at = order[first:last]
            low = a if plan.window is None else max(a, int(rows_R[at[0]]) - plan.window + 1)
            mask = visible(rows_R[at], torch.arange(low, b, device=q.device), plan.window)
            part = masked_attention(q[at], k_TKH[low:b], v_TKH[low:b], mask)
            out = out.index_copy(0, at, part)
        return out
