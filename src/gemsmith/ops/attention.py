"""Attention over contiguous keys: causal, sliding-window, blockwise, or under an explicit mask; and
over keys and values as a cache stores them, float or int8.

Softmax scale is 1.0 always: Gemma 4 puts the scale into the query and key norms. Scores and
softmax are float32 inside the fused kernels.

int8: one float32 scale a token and head, the rule of `cpu.quantize_rows`. The extension reads the
stored keys where they lie, and rebuilds those of K = V layers a block at a time; torch widens and
rebuilds them all first.

Shapes: T queries, S keys, N query heads, K key/value heads, H head_dim. N is a multiple of K.
        R rows: the queries among T that ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from gemsmith.ops import cpu, cpu_attention, native
from gemsmith.ops.cpu_attention import MAX_HEAD, Readers, StoredKV
from gemsmith.ops.rotary import KeyRule

NATIVE_ROWS = 32
"""Most queries that the extension attends with over float K/V; beyond, torch's products are faster.
Over int8 it is faster for any number."""

WRITTEN_OUT = 1 << 23
"""Most scores of a sequence that is trained on the CPU and attended without the fused kernel."""
FILLED = 64


def masked_attention(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, mask_TS: Tensor | None, *, causal: bool = False
) -> Tensor:
    """Attention under a bool mask (True = may look); None = every key. Returns [T, N, H].

    `causal` is the lower triangle without a mask in memory, for T == S only.
    """
    scores = q_TNH.shape[0] * q_TNH.shape[1] * k_SKH.shape[0]
    if q_TNH.requires_grad and q_TNH.device.type == "cpu" and scores <= WRITTEN_OUT:
        return _written_out(q_TNH, k_SKH, v_SKH, mask_TS, causal)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_SKH, v_SKH))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_TS, is_causal=causal, scale=1.0, enable_gqa=gqa
    )
    return out.squeeze(0).transpose(0, 1)


def _written_out(
    q_TNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, mask_TS: Tensor | None, causal: bool
) -> Tensor:
    """`masked_attention` as products and a softmax: the fused backward pass takes twice as long.

    Lengths are filled up to multiples of FILLED: code for a bfloat16 product is made anew for each
    shape, and sequences of a batch have as many lengths as there are.
    """
    (T, N, H), (S, K, _) = q_TNH.shape, k_SKH.shape
    filled_T, filled_S = (-n % FILLED for n in (T, S))
    if mask_TS is None:
        mask_TS = torch.ones(T, S, dtype=torch.bool)
    if causal:
        mask_TS = mask_TS.tril()
    bias_TS = torch.full((T + filled_T, S + filled_S), -torch.inf)
    # Rows that are filled in see all, so that none of them is without a key.
    bias_TS[T:] = 0.0
    bias_TS[:T, :S].masked_fill_(mask_TS, 0.0)
    q_TNH, k_SKH, v_SKH = (
        F.pad(x, (0, 0, 0, 0, 0, by))
        for x, by in ((q_TNH, filled_T), (k_SKH, filled_S), (v_SKH, filled_S))
    )
    q = q_TNH.view(-1, K, N // K, H).transpose(0, 1).reshape(K, -1, H)
    scores = torch.bmm(q, k_SKH.permute(1, 2, 0)).float()
    shares = (scores.view(K, -1, N // K, bias_TS.shape[1]) + bias_TS[:, None]).softmax(-1)
    out = torch.bmm(shares.to(v_SKH.dtype).view(scores.shape), v_SKH.transpose(0, 1))
    return out.view(K, -1, N // K, H).transpose(0, 1).reshape(-1, N, H)[:T]


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


def quantize_heads(x_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [T, K, H], float32 scales [T, K]) of keys or values, by the rule of `quantize_rows`."""
    rows = x_TKH.float().reshape(-1, x_TKH.shape[-1])
    on_cpu = x_TKH.device.type == "cpu"
    x8, scale = cpu.quantize_rows(rows) if on_cpu else cpu.quantize_rows_reference(rows)
    return x8.view(x_TKH.shape), scale.view(x_TKH.shape[:2])


class Slots:
    """Keys and values of one layer as a cache stores them: [slots, K, H] each, contiguous.

    float32, bfloat16, or int8 with scales float32 [slots, K]. k is None where values alone are
    stored; a rule then rebuilds the key of a slot whenever it is read.
    """

    __slots__ = ("_native", "k", "k_scale", "rule", "v", "v_scale")

    def __init__(
        self,
        v: Tensor,
        k: Tensor | None,
        v_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        rule: KeyRule | None = None,
    ) -> None:
        self.v, self.k, self.v_scale, self.k_scale, self.rule = v, k, v_scale, k_scale, rule
        self._native = None
        if (k is not None or rule is not None) and _native_head(v):
            self._native = StoredKV(k, v, k_scale, v_scale, rule=rule)

    @classmethod
    def empty(
        cls,
        slots: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        keys: bool = True,
        rule: KeyRule | None = None,
    ) -> Self:
        """Uninitialised ones; without `keys`, values alone, and the rule for their keys."""

        def values() -> Tensor:
            return torch.empty((slots, heads, head_dim), dtype=dtype, device=device)

        def scales() -> Tensor | None:
            wanted = dtype == torch.int8
            return torch.empty((slots, heads), device=device) if wanted else None

        return cls(values(), values() if keys else None, scales(), scales() if keys else None, rule)

    def __len__(self) -> int:
        return self.v.shape[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What there is of v, v_scale, k, k_scale, by these names."""
        named = {"v": self.v, "v_scale": self.v_scale, "k": self.k, "k_scale": self.k_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def stacked(self, layers: int) -> dict[str, Tensor]:
        """`tensors` of so many layers whose slots follow each other: [layers, slots, ...] each."""
        shape = layers, len(self) // layers
        return {name: tensor.unflatten(0, shape) for name, tensor in self.tensors.items()}

    def split(self, layers: int) -> list[Self]:
        """The slots of each of these layers, on the same memory."""
        parts = {"k": [None] * layers, **self.stacked(layers)}
        each = ({name: part[at] for name, part in parts.items()} for at in range(layers))
        return [type(self)(**tensors, rule=self.rule) for tensors in each]

    def write(self, first: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Store T tokens from slot `first` on; k is ignored where values alone are stored."""
        if self._native is not None and self.v_scale is not None and k_TKH.dtype == torch.float32:
            self._native.write(first, k_TKH.contiguous(), v_TKH.contiguous())
            return
        stop = first + v_TKH.shape[0]
        for values, scale, x in ((self.v, self.v_scale, v_TKH), (self.k, self.k_scale, k_TKH)):
            if values is None:
                continue
            if scale is None:
                values[first:stop] = x
            else:
                values[first:stop], scale[first:stop] = quantize_heads(x)

    def scatter(self, at_T: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Store T tokens, each in the slot of its own that int64 at_T names; else as `write`."""
        for values, scale, x in ((self.v, self.v_scale, v_TKH), (self.k, self.k_scale, k_TKH)):
            if values is None:
                continue
            if scale is None:
                values[at_T] = x.to(values.dtype)
            else:
                values[at_T], scale[at_T] = quantize_heads(x)

    def widened(self, first: int, stop: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Keys (None where values alone are stored) and values of some slots: float ones as they
        are, int8 as `dtype`."""

        def wide(values: Tensor, scale: Tensor | None) -> Tensor:
            part = values[first:stop]
            if scale is None:
                return part
            return (part.float() * scale[first:stop, :, None]).to(dtype)

        return None if self.k is None else wide(self.k, self.k_scale), wide(self.v, self.v_scale)


Span = tuple[Slots, int, int]
"""Some slots in a row: from the first, a count."""


@dataclass(frozen=True)
class Queries:
    """Which tokens of a step ask, and what they may see of the S keys whose last T are the step's.

    window, block_T: see `causal_attention`. rows_R: the tokens that ask; None: every one. origin:
    which token of the sequence the first key is.
    """

    tokens: int
    keys: int
    window: int | None
    block_T: Tensor | None = None
    rows_R: Tensor | None = None
    origin: int = 0

    @property
    def past(self) -> int:
        return self.keys - self.tokens

    @cached_property
    def at(self) -> npt.NDArray[np.int64]:
        """The tokens that ask, [R]."""
        return np.arange(self.tokens) if self.rows_R is None else self.rows_R.numpy(force=True)

    @cached_property
    def ranges_R2(self) -> Tensor:
        return ranges_of([self])


def ranges_of(queries: Sequence[Queries]) -> Tensor:
    """The first key of its sequence that each row sees, and one after the last: int64 [R, 2], the
    rows of one sequence after those of the other."""
    at = np.concatenate([each.at for each in queries])
    rows = [len(each.at) for each in queries]
    stops = at + np.repeat([each.past + 1 for each in queries], rows)
    firsts = stops - np.repeat([each.window or each.keys for each in queries], rows)
    if any(each.block_T is not None for each in queries):
        ends = [_block_ends(each)[each.at] for each in queries]
        stops = np.maximum(stops, np.concatenate(ends))
    return torch.from_numpy(np.stack((np.maximum(firsts, 0), stops), 1))


def _block_ends(queries: Queries) -> npt.NDArray[np.int64]:
    """[T]: the key after the last token of each one's block, or 0 where it belongs to none."""
    ends = np.zeros(queries.tokens, np.int64)
    if queries.block_T is None:
        return ends
    blocks = queries.block_T.tolist()
    for t in reversed(range(len(blocks))):
        if blocks[t] >= 0:
            goes_on = t + 1 < len(blocks) and blocks[t + 1] == blocks[t]
            ends[t] = ends[t + 1] if goes_on else queries.past + t + 1
    return ends


def stored_attention(q_RNH: Tensor, spans: Sequence[Span], queries: Queries) -> Tensor:
    """Attention over the keys of `spans`, one after the other; [R, N, H] in q's dtype.

    Where keys are rebuilt, the first of the spans is that of position `queries.origin`, and so on.
    """
    if _goes_native(q_RNH, spans):
        natives = [(slots._native, first, n) for slots, first, n in spans if slots._native]
        q_RNH, dtype = q_RNH.contiguous(), q_RNH.dtype
        return cpu_attention.attention(
            q_RNH.float(), natives, queries.ranges_R2, queries.origin
        ).to(dtype)
    parts = [slots.widened(first, first + count, q_RNH.dtype) for slots, first, count in spans]
    ks, vs = zip(*parts, strict=True)
    v_SKH = (vs[0] if len(vs) == 1 else torch.cat(vs)).to(q_RNH.dtype)
    rule = spans[0][0].rule
    if rule is not None:
        k_SKH = rule.keys(v_SKH, queries.origin + torch.arange(len(v_SKH), device=v_SKH.device))
    else:
        k_SKH = (ks[0] if len(ks) == 1 else torch.cat(ks)).to(q_RNH.dtype)
    if queries.tokens == 1 and (queries.window is None or queries.keys <= queries.window):
        return masked_attention(q_RNH, k_SKH, v_SKH, None)
    window, block_T, rows_R = queries.window, queries.block_T, queries.rows_R
    if rows_R is None:
        return causal_attention(q_RNH, k_SKH, v_SKH, window, block_T)
    k_at = torch.arange(queries.keys, device=q_RNH.device)
    in_block = ()
    if block_T is not None:
        in_block = (block_T[rows_R], F.pad(block_T, (queries.past, 0), value=-1))
    mask = visible(rows_R + queries.past, k_at, window, *in_block)
    return masked_attention(q_RNH, k_SKH, v_SKH, mask)


@dataclass(frozen=True)
class Reading:
    """What several sequences ask of one storage, in layers that are alike: spans of slots of each,
    and its queries."""

    runs: Sequence[Sequence[tuple[int, int]]]
    queries: Sequence[Queries]

    @cached_property
    def rows(self) -> list[int]:
        """Queries of each sequence."""
        return [q.tokens if q.rows_R is None else len(q.rows_R) for q in self.queries]

    @cached_property
    def readers(self) -> Readers:
        """The same for the extension."""
        spans = [[(0, *run) for run in runs] for runs in self.runs]
        origins = [queries.origin for queries in self.queries]
        return Readers(spans, self.rows, ranges_of(self.queries), origins)


def batched_attention(q_RNH: Tensor, slots: Slots, reading: Reading) -> Tensor:
    """`stored_attention` of each sequence, one after the other in q, over one storage."""
    faster = slots.v_scale is not None or max(reading.rows) <= NATIVE_ROWS
    if slots._native is not None and faster:
        dtype = q_RNH.dtype
        q = q_RNH.float().contiguous()
        return cpu_attention.attention_of_many(q, [slots._native], reading.readers).to(dtype)
    outs = [
        stored_attention(q, [(slots, *run) for run in runs], queries)
        for q, runs, queries in zip(
            q_RNH.split(reading.rows), reading.runs, reading.queries, strict=True
        )
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _goes_native(q_RNH: Tensor, spans: Sequence[Span]) -> bool:
    if not all(slots._native for slots, _, _ in spans):
        return False
    if q_RNH.requires_grad and torch.is_grad_enabled():
        return False
    return spans[0][0].v_scale is not None or q_RNH.shape[0] <= NATIVE_ROWS


def _native_head(v: Tensor) -> bool:
    fits = v.shape[-1] % 16 == 0 and v.shape[-1] <= MAX_HEAD
    return v.device.type == "cpu" and fits and native.available()
