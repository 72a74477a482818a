"""No cache: whole sequences, packed one after the other, attended once. Training and parity.

Shapes: T packed tokens, R rows asked for, N query heads, K key/value heads, H head_dim.
"""

from collections.abc import Sequence
from copy import copy
from itertools import accumulate

import torch
from torch import Tensor

from gemsmith.config import TextConfig
from gemsmith.errors import RequestError
from gemsmith.ops.attention import causal_attention, masked_attention, visible


class NoCache:
    """Attention within each of the packed sequences of `lengths` tokens; nothing is kept after.

    Use one object for one forward pass: layers that own no K/V read those that an earlier layer
    of the same pass left here. blocks_T: see `ops.attention.causal_attention`; sliding layers
    alone heed it.
    """

    def __init__(
        self, config: TextConfig, lengths: Sequence[int], blocks_T: Tensor | None = None
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise RequestError(f"lengths {list(lengths)}: every packed sequence needs a token")
        self.layers = config.layers
        self.lengths = list(lengths)
        self._blocks: Sequence[Tensor | None] = [None] * len(self.lengths)
        if blocks_T is not None:
            self._blocks = blocks_T.split(self.lengths)
        self._sources = {plan.kv_source for plan in config.layers if not plan.owns_kv}
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}

    def fork(self) -> "NoCache":
        """For another pass that is the same up to here: it starts with the K/V left so far."""
        other = copy(self)
        other._kv = dict(self._kv)
        return other

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
        # Split, not sliced: the gradient of each slice would be a whole tensor of zeros.
        ks, vs = k_TKH.split(self.lengths), v_TKH.split(self.lengths)
        blocks = self._blocks if plan.window is not None else [None] * len(self.lengths)
        if rows_R is None:
            whole = zip(q.split(self.lengths), ks, vs, blocks, strict=True)
            return torch.cat([causal_attention(q, k, v, plan.window, b) for q, k, v, b in whole])
        rows_R, order = rows_R.sort()
        starts = torch.tensor(list(accumulate(self.lengths, initial=0)), device=rows_R.device)
        counts = torch.searchsorted(rows_R, starts).diff().tolist()
        parts: list[Tensor] = []
        asked = zip(
            q[order].split(counts), rows_R.split(counts), starts, ks, vs, blocks, strict=False
        )
        for q_RNH, at_R, start, k_SKH, v_SKH, block_T in asked:
            if not len(at_R):
                continue
            at_R = at_R - start
            low = 0 if plan.window is None else max(0, int(at_R[0]) - plan.window + 1)
            stop = int(at_R[-1]) + 1 if block_T is None else len(block_T)
            k_at = torch.arange(low, stop, device=q.device)
            in_block = () if block_T is None else (block_T[at_R], block_T[low:])
            mask = visible(at_R, k_at, plan.window, *in_block)
            parts.append(masked_attention(q_RNH, k_SKH[low:stop], v_SKH[low:stop], mask))
        return torch.cat(parts)[order.argsort()]
