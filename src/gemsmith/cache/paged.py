"""Key/value cache of many sequences: blocks of a fixed number of tokens, allocated once by plan.

Full and sliding layers alike keep tokens in blocks (see `block_pool`); a block of a sliding layer
goes back to its pool once it has left the window. So nothing is overwritten while it may be
needed: a pass that fails leaves no trace but unused slots, tokens that are not committed never
were, and blocks can be held by several sequences and by a prefix cache without a copy. A ring in
place of the sliding blocks would save at most one block a sequence and lose all that.

Layers that read another layer's K/V hold nothing; K = V layers hold V alone. Values are stored as
in `ring.RingCache` and read by the same kernels.

Shapes: T tokens of the step, of all sequences, one sequence after the other; R rows asked for;
        S keys of a sequence; N query heads, K key/value heads, H head_dim.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gemsmith.cache.block_pool import Blocks, Pages, Table
from gemsmith.cache.ring import KFromV, check_format, empty_slots
from gemsmith.config import TextConfig
from gemsmith.errors import CapacityError
from gemsmith.ops.attention import (
    Queries,
    Reading,
    Slots,
    batched_attention,
)
from gemsmith.ops.cpu_decoder import Seen, Sight, Stores
from gemsmith.ops.cpu_layers import Place
from gemsmith.sizing import KVPlan


@dataclass(slots=True)
class Chunk:
    """The tokens that one sequence has in a step; their blocks are taken already."""

    pages: Pages
    tokens: int
    blocks_T: Tensor | None = None
    """Tokens that see each other whole, see `ops.attention.causal_attention`."""


class PagedCache:
    """K/V of all sequences. `blocks` says who holds what; `step` is the store of one pass."""

    def __init__(
        self,
        config: TextConfig,
        plan: KVPlan,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        k_from_v: KFromV | None = None,
    ) -> None:
        """dtype: see `ring.FORMATS`. k_from_v: `TextModel.k_from_v`, for K = V layers.

        Raises:
          ConfigError: another dtype.
          CapacityError: no memory for the plan.
        """
        check_format(dtype)
        self.config, self.plan, self.layers = config, plan, config.layers
        self.dtype, self.device = dtype, torch.device(device)
        self.blocks = Blocks(plan)
        self.slots: dict[int, Slots] = {}
        """By layer, of those that own K/V: block b is slots b * block_tokens and on."""
        try:
            for layer in self.layers:
                if layer.owns_kv:
                    sliding = layer.window is not None
                    blocks = plan.sliding_blocks if sliding else plan.full_blocks
                    rule = k_from_v(layer.index) if layer.k_eq_v and k_from_v else None
                    self.slots[layer.index] = empty_slots(
                        layer, blocks * plan.block_tokens, dtype, self.device, rule
                    )
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(
                f"no memory for {plan.nbytes / 2**30:.2f} GiB of K/V; plan fewer sequences at a "
                "time, shorter ones, or a narrower dtype"
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of K/V storage, equal to the plan's. Memory is touched as blocks are used."""
        return sum(t.nbytes for slots in self.slots.values() for t in slots.tensors.values())

    @cached_property
    def stores(self) -> Stores | None:
        """Where the extension finds K/V by itself; None where it cannot."""
        natives = {layer: slots._native for layer, slots in self.slots.items()}
        return Stores.of(len(self.layers), natives)

    @cached_property
    def _rows(self) -> dict[bool, list[Any]]:
        """What slots of full (False) and sliding layers hold, as bytes [slots, bytes]; by NumPy
        where they are the CPU's, which slices in a tenth of the time."""
        rows: dict[bool, list[Any]] = {False: [], True: []}
        for index, slots in self.slots.items():
            for tensor in slots.tensors.values():
                flat = tensor.view(len(tensor), -1).view(torch.uint8)
                rows[self.layers[index].window is not None].append(
                    flat.numpy() if flat.is_cpu else flat
                )
        return rows

    def step(self, chunks: Sequence[Chunk]) -> "PagedStep":
        """The store of one pass over the chunks' tokens. Commit them when it has succeeded."""
        return PagedStep(self, chunks)

    def reader(self, pages: Sequence[Pages]) -> "PagedReader":
        """What these sequences have stored, to be asked from after their last token."""
        return PagedReader(self, pages)

    def copy_out(self, pages: Pages, start: int) -> dict[str, Tensor]:
        """What a sequence has stored, by layer and name: in full layers of its tokens from `start`
        on, in sliding layers of the window before its end."""
        return {
            f"{layer}.{name}": tensor[slots].cpu()
            for layer, slots, tensors in self._stored(pages, start, pages.length)
            for name, tensor in tensors.items()
        }

    def copy_in(self, pages: Pages, start: int, stop: int, stored: dict[str, Tensor]) -> None:
        """The reverse, for tokens start..stop-1 of full layers; the window that it brings is kept
        where the sequence ends there."""
        for layer, slots, tensors in self._stored(pages, start, stop):
            for name, tensor in tensors.items():
                tensor[slots] = stored[f"{layer}.{name}"].to(self.device)

    def _stored(
        self, pages: Pages, start: int, stop: int
    ) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
        """Each layer that owns K/V, the slots of a sequence in it, and what has these slots."""
        first = self.blocks.window_start(pages.length) * self.plan.block_tokens
        for layer, slots in self.slots.items():
            sliding = self.layers[layer].window is not None
            if sliding and stop < pages.length:
                continue
            at = torch.arange(first if sliding else start, stop)
            yield layer, self.slots_of(_table(pages, sliding), at), slots.tensors

    def slots_of(self, table: Table, at_T: Tensor) -> Tensor:
        """The slots of some tokens of a sequence, [T]."""
        size = self.plan.block_tokens
        return torch.tensor(table.blocks)[at_T // size - table.first] * size + at_T % size

    def branch(self, pages: Pages, length: int) -> Pages:
        """A second sequence with the same first `length` tokens.

        Whole blocks are shared; the last one, if it is not full, is copied.

        Raises:
          CapacityError: no block is free for the copy.
        """
        size = self.plan.block_tokens
        used = length % size
        pools = [p for p in (self.blocks.full, self.blocks.sliding) if p.blocks]
        if used and not all(pool.free for pool in pools):
            raise CapacityError("no block of K/V is free to branch a sequence")
        branch = self.blocks.share(pages, length)
        if not used:
            return branch
        for sliding, pool, table in (
            (False, self.blocks.full, branch.full),
            (True, self.blocks.sliding, branch.sliding),
        ):
            if not pool.blocks:
                continue
            old, [new] = table.blocks[-1], pool.take(1)
            for rows in self._rows[sliding]:
                rows[new * size : new * size + used] = rows[old * size : old * size + used]
            pool.release([old])
            table.blocks[-1] = new
        return branch


@dataclass(slots=True)
class _Part:
    """What one sequence's queries see in layers of a kind: runs of slots, from a first token on."""

    runs: list[tuple[int, int]]
    """(first slot, count), one after the other."""
    keys: int
    start: int
    """Which token of the sequence the first key is."""


class PagedStep:
    """`model.text.KVStore` of one forward pass over packed chunks of several sequences."""

    def __init__(self, cache: PagedCache, chunks: Sequence[Chunk]) -> None:
        self.cache, self.chunks = cache, chunks
        self._readings: dict[tuple[bool, bool], Reading] = {}
        self._places: dict[tuple[int, bool, bool], Place] = {}
        self._rows: list[Tensor] | None = None

    @property
    def positions_T(self) -> Tensor:
        ranges = [
            torch.arange(chunk.pages.length, chunk.pages.length + chunk.tokens)
            for chunk in self.chunks
        ]
        return torch.cat(ranges).to(self.cache.device)

    @cached_property
    def _targets(self) -> dict[bool, Tensor]:
        """Where the tokens of the step go, [T] slots, in full (False) and sliding layers."""
        return {sliding: self._target(sliding) for sliding in (False, True)}

    def _target(self, sliding: bool) -> Tensor:
        at: list[int] = []
        for chunk in self.chunks:
            start = chunk.pages.length
            for slot, count in self._runs(chunk.pages, sliding, start, start + chunk.tokens):
                at += range(slot, slot + count)
        return torch.tensor(at, dtype=torch.long, device=self.cache.device)

    @cached_property
    def _parts(self) -> dict[bool, list[_Part]]:
        return {s: [self._part(chunk, s) for chunk in self.chunks] for s in (False, True)}

    def _part(self, chunk: Chunk, sliding: bool) -> _Part:
        pages, window = chunk.pages, self.cache.plan.window
        start = max(0, pages.length - window + 1) if sliding and window is not None else 0
        stop = pages.length + chunk.tokens
        return _Part(self._runs(pages, sliding, start, stop), stop - start, start)

    def _runs(self, pages: Pages, sliding: bool, start: int, stop: int) -> list[tuple[int, int]]:
        """Where tokens start..stop-1 of a sequence lie: (first slot, count), one after the other;
        none where it has no blocks of the kind."""
        size, table = self.cache.plan.block_tokens, _table(pages, sliding)
        if not table.blocks or start >= stop:
            return []
        blocks = table.blocks[start // size - table.first : -(-stop // size) - table.first]
        runs: list[tuple[int, int]] = []
        begin, after = blocks[0], blocks[0]
        for block in blocks:
            if block != after:
                runs.append((begin * size, (after - begin) * size))
                begin = block
            after = block + 1
        runs.append((begin * size, (after - begin) * size - -stop % size))
        slot, count = runs[0]
        runs[0] = slot + start % size, count - start % size
        return runs

    def _rows_of(self, rows_R: Tensor) -> list[Tensor]:
        """Of each chunk the tokens that ask, counted from its first."""
        if self._rows is None:
            rows = rows_R.tolist()
            assert rows == sorted(rows), "rows are asked for in order"
            split, first = [], 0
            for chunk in self.chunks:
                stop = first + chunk.tokens
                split.append(torch.tensor([r - first for r in rows if first <= r < stop]))
                first = stop
            self._rows = split
        return self._rows

    def _reading(self, sliding: bool, rows_R: Tensor | None) -> Reading:
        """What the sequences that ask see and ask, in all layers of a kind."""
        kind = (sliding, rows_R is None)
        if kind not in self._readings:
            runs, queries = [], []
            window = self.cache.plan.window if sliding else None
            for i, (chunk, part) in enumerate(zip(self.chunks, self._parts[sliding], strict=True)):
                rows = None if rows_R is None else self._rows_of(rows_R)[i]
                if rows is not None and not len(rows):
                    continue
                if rows is not None and len(rows) == chunk.tokens:
                    rows = None
                at = None if rows is None else rows.to(self.cache.device)
                blocks_T = chunk.blocks_T if sliding else None
                runs.append(part.runs)
                queries.append(Queries(chunk.tokens, part.keys, window, blocks_T, at, part.start))
            self._readings[kind] = Reading(runs, queries)
        return self._readings[kind]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k_TKH: Tensor | None,
        v_TKH: Tensor | None,
        rows_R: Tensor | None,
    ) -> Tensor:
        """See `model.text.KVStore`; rows_R ascend."""
        plan = self.cache.layers[layer]
        sliding = plan.window is not None
        slots = self.cache.slots[plan.kv_source]
        if k_TKH is not None and v_TKH is not None:
            slots.scatter(self._targets[sliding], k_TKH, v_TKH)
        return batched_attention(q, slots, self._reading(sliding, rows_R))

    def seen(self) -> Seen | None:
        """See `model.text.Pass`."""
        stores = self.cache.stores
        if stores is None or any(chunk.blocks_T is not None for chunk in self.chunks):
            return None
        full, sliding = (
            Sight([part.runs for part in self._parts[s]], [part.start for part in self._parts[s]])
            for s in (False, True)
        )
        return Seen(stores, [chunk.pages.length for chunk in self.chunks], full, sliding)

    def place(self, layer: int, rows_R: Tensor | None) -> Place | None:
        """See `ring.RingCache.place`."""
        plan = self.cache.layers[layer]
        slots, sliding = self.cache.slots[plan.kv_source], plan.window is not None
        if self.cache.dtype != torch.int8 or slots._native is None or slots.rule is not None:
            return None
        kind = (plan.kv_source, plan.owns_kv, rows_R is None)
        if kind not in self._places:
            into = slots._native if plan.owns_kv else None
            slots_T = self._targets[sliding] if plan.owns_kv else None
            readers = self._reading(sliding, rows_R).readers
            self._places[kind] = Place(into, slots_T, [slots._native], readers)
        return self._places[kind]


class PagedReader:
    """`model.drafter.TargetKV` of some sequences, for as long as their pages stay as they are."""

    def __init__(self, cache: PagedCache, pages: Sequence[Pages]) -> None:
        self._cache, self._step = cache, PagedStep(cache, [Chunk(p, 0) for p in pages])
        self._readings: dict[bool, Reading] = {}

    def read(self, layer: int, q_BNH: Tensor) -> Tensor:
        """See `model.drafter.TargetKV`."""
        plan = self._cache.layers[layer]
        sliding = plan.window is not None
        if sliding not in self._readings:
            parts = self._step._parts[sliding]
            # A part reaches as far as the window of the token that comes next.
            queries = [Queries(1, part.keys, None, origin=part.start) for part in parts]
            self._readings[sliding] = Reading([part.runs for part in parts], queries)
        slots = self._cache.slots[plan.kv_source]
        return batched_attention(q_BNH, slots, self._readings[sliding])


def _table(pages: Pages, sliding: bool) -> Table:
    return pages.sliding if sliding else pages.full
