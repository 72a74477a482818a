"""Key/value cache of one growing sequence.

Sliding layers keep their window in a ring; full layers keep everything in a slab that grows;
layers that read another layer's K/V keep nothing; K = V layers keep V alone and rebuild K when
they read it. Bytes held are exactly `sizing.kv_bytes`. Values are stored as float32, bfloat16, or
int8 with one float32 scale a token and head.

A step either completes or leaves no trace: rings are written when the step ends (a single token
at once, so that attention reads the ring itself; what it overwrote is put back if the step
fails), and slabs are written beyond the length that counts. So a step may also be left open, until
it is known how many of its tokens count: those that do not leave no trace either.

Shapes: T tokens of the step, R rows asked for, S keys seen, N query heads, K key/value heads,
        H head_dim.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemsmith import hardware, sizing
from gemsmith.config import LayerPlan, TextConfig
from gemsmith.errors import CapacityError, ConfigError, WeightsError
from gemsmith.ops.attention import Queries, Slots, Span, stored_attention
from gemsmith.ops.cpu_attention import readers_of
from gemsmith.ops.cpu_decoder import Seen, Sight, Stores
from gemsmith.ops.cpu_layers import Place
from gemsmith.ops.rotary import KeyRule

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""How K/V can be stored, by name."""

ALIGNED = 256
"""The extension adds up what a query sees in pieces that begin at multiples of this, counted from
the first key it is given (`SPLIT` of native/attention.cpp)."""

KFromV = Callable[[int], KeyRule]
"""Of a layer's number: how its keys follow from its values."""


def check_format(dtype: torch.dtype) -> None:
    """Raises:
    ConfigError: K/V cannot be stored so.
    """
    if dtype not in FORMATS.values():
        raise ConfigError(f"K/V cannot be stored as {dtype}; {', '.join(FORMATS)} can be")


def empty_slots(
    plan: LayerPlan, count: int, dtype: torch.dtype, device: torch.device, rule: KeyRule | None
) -> Slots:
    """Storage of `count` tokens in a layer that owns K/V; rule: for a K = V layer."""
    return Slots.empty(
        count,
        plan.num_key_value_heads,
        plan.head_dim,
        dtype=dtype,
        device=device,
        keys=not plan.k_eq_v,
        rule=rule,
    )


@dataclass(slots=True)
class _Group:
    """Layers that own K/V and whose slots follow each other in one storage, so that one copy serves
    them all: the sliding ones that are alike. A full layer is alone: to grow takes its bytes twice.
    """

    plans: list[LayerPlan]
    storage: Slots

    @property
    def slots(self) -> int:
        """Of a layer."""
        return len(self.storage) // len(self.plans)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """[layers, slots, ...] each."""
        return self.storage.stacked(len(self.plans))

    def layers(self) -> "dict[int, _Layer]":
        """By number."""
        parts = self.storage.split(len(self.plans))
        return {
            plan.index: _Layer(plan, slots, self)
            for plan, slots in zip(self.plans, parts, strict=True)
        }


@dataclass(slots=True)
class _Layer:
    """Storage of a layer that owns K/V."""

    plan: LayerPlan
    slots: Slots
    group: _Group

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {f"layers.{self.plan.index}.{n}": t for n, t in self.slots.tensors.items()}


@dataclass(slots=True)
class _View:
    """The S keys that a layer's queries look at this step, in order."""

    spans: list[Span]
    keys: int


class RingCache:
    """The past of one sequence. Use `step` around each forward pass.

    dtype: what values are stored as, see FORMATS. k_from_v is `TextModel.k_from_v`; configs
    without K = V layers do not need it.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        k_from_v: KFromV | None = None,
    ) -> None:
        check_format(dtype)
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.length = 0
        """Tokens held."""
        self.reserved = 0
        """Tokens that storage has been sized for; never shrinks."""
        self._k_from_v = k_from_v
        k_eq_v = [p.index for p in config.layers if p.owns_kv and p.k_eq_v]
        self._rules = {index: k_from_v(index) for index in k_eq_v if k_from_v is not None}
        alike: dict[object, list[LayerPlan]] = {}
        for plan in config.layers:
            if plan.owns_kv:
                sliding = plan.window, plan.num_key_value_heads, plan.head_dim, plan.k_eq_v
                alike.setdefault(plan.index if plan.window is None else sliding, []).append(plan)
        self._groups = [_Group(plans, self._empty(plans)) for plans in alike.values()]
        self._layers: dict[int, _Layer] = {}
        for group in self._groups:
            self._layers |= group.layers()
        self._plans = config.layers
        self._sources = {plan.kv_source for plan in self._plans if not plan.owns_kv}
        self._views: dict[int, _View] = {}
        self._pasts: dict[int, list[tuple[int, int]]] = {}
        self._places: dict[tuple[int, bool, bool], Place | None] = {}
        self._queries: dict[tuple[int, int | None, bool], Queries] = {}
        self._unwritten: dict[int, Slots] = {}
        """By a group's first layer: of the step's tokens, what its rings do not hold yet."""
        self._pending: dict[int, Slots] = {}
        """Each layer's part of it."""
        self._overwritten: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """By a group's first layer: places, and what they held before the step."""
        self._stores: Stores | None = None
        """Where the extension finds all that is stored, once asked."""
        self._step_tokens = 0
        self._open_tokens = 0
        self._blocks_T: Tensor | None = None

    def _empty(self, plans: list[LayerPlan], slots: int = 0) -> Slots:
        """Storage of so many slots for each of layers that are alike."""
        rule = self._rules.get(plans[0].index)
        return empty_slots(plans[0], len(plans) * slots, self.dtype, self.device, rule)

    @property
    def nbytes(self) -> int:
        """Bytes of K/V storage, equal to sizing.kv_bytes(config, reserved, dtype.itemsize)."""
        return sum(t.nbytes for layer in self._layers.values() for t in layer.tensors.values())

    def reserve(self, tokens: int) -> None:
        """Size the storage for `tokens` tokens in all.

        Raises:
          CapacityError: more than the model's max_position_embeddings, or no memory for it.
        """
        limit = self.config.max_position_embeddings
        if tokens > limit:
            raise CapacityError(
                f"{tokens} tokens do not fit the model's context of {limit}; "
                "shorten the prompt or ask for fewer new tokens"
            )
        if tokens <= self.reserved:
            return
        if sizing.slab_tokens(tokens) > sizing.slab_tokens(self.reserved):
            self._check_room(tokens)
        try:
            for group in self._groups:
                slots, window = sizing.slab_tokens(tokens), group.plans[0].window
                if window is not None:
                    slots = min(slots, window)
                if slots > group.slots:
                    self._grow(group, slots)
        except (RuntimeError, MemoryError) as error:
            need = sizing.kv_bytes(self.config, tokens, self.dtype.itemsize) / 2**30
            raise CapacityError(
                f"no memory for {need:.2f} GiB of K/V for {tokens} tokens; "
                "use a shorter context or a narrower dtype"
            ) from error
        self.reserved = tokens

    def _check_room(self, tokens: int) -> None:
        """Refuse what the memory cannot hold, before a system that promises more than it has kills
        the process for it."""
        need = sizing.kv_bytes(self.config, tokens, self.dtype.itemsize)
        more = need - self.nbytes
        free = hardware.free_bytes(self.device) if more > 0 else None
        if free is None or more <= free:
            return
        room = free + self.nbytes
        most = sizing.largest_context(self.config, room, self.dtype.itemsize)
        name = next(name for name, dtype in FORMATS.items() if dtype == self.dtype)
        way = f"the largest context that fits is {most} tokens"
        narrow = sizing.kv_bytes(self.config, tokens, 1)
        if self.dtype.itemsize > 1:
            fits = "" if narrow <= room else ", which is not there either"
            way += f"; kv='int8' would need {narrow / 2**30:.2f} GiB{fits}"
        raise CapacityError(
            f"a context of {tokens} tokens needs {need / 2**30:.2f} GiB of {name} K/V, and "
            f"{room / 2**30:.2f} GiB are free; {way}"
        )

    def _grow(self, group: _Group, slots: int) -> None:
        # A ring only grows until it is as long as its window, so slot = position still holds.
        new = self._empty(group.plans, slots)
        held, old = min(self.length, group.slots), group.tensors
        for name, tensor in new.stacked(len(group.plans)).items():
            tensor[:, :held] = old[name][:, :held]
        group.storage, self._stores = new, None
        self._layers |= group.layers()

    @contextmanager
    def step(
        self, tokens: int, blocks_T: Tensor | None = None, *, left_open: bool = False
    ) -> Iterator[Tensor]:
        """Run one forward pass of `tokens` new tokens inside; yields their positions [T].

        If the body raises, the cache is as it was before. blocks_T: tokens that see each other
        whole in sliding layers, see `ops.attention.causal_attention`; a block lies in one step.
        left_open: nothing counts until `commit` says how much; for two tokens or more.
        """
        assert tokens > 1 or not left_open, "a single token is written at once"
        self._drop_open()
        self.reserve(self.length + tokens)
        self._step_tokens, self._blocks_T = tokens, blocks_T
        try:
            yield self.positions_T
            self._open_tokens = tokens
            if not left_open:
                self.commit(tokens)
        except BaseException:
            for places in self._overwritten.values():
                for place, old in places:
                    place.copy_(old)
            self._drop_open()
            raise
        finally:
            self._overwritten.clear()
            self._views.clear()
            self._pasts.clear()
            self._places.clear()
            self._queries.clear()
            self._step_tokens, self._blocks_T = 0, None

    def commit(self, tokens: int) -> None:
        """Keep the first `tokens` of the step that was left open; the others never were.

        Without it all of that step is dropped by the next one, or by `trim`.
        """
        assert 0 <= tokens <= self._open_tokens, f"{tokens} of {self._open_tokens} tokens"
        for index, unwritten in self._unwritten.items():
            self._write_rings(self._layers[index].group, unwritten, tokens)
        self.length += tokens
        self._drop_open()

    def _drop_open(self) -> None:
        self._unwritten.clear()
        self._pending.clear()
        self._open_tokens = 0

    def attend(
        self,
        layer: int,
        q: Tensor,
        k_TKH: Tensor | None,
        v_TKH: Tensor | None,
        rows_R: Tensor | None,
    ) -> Tensor:
        """See `model.text.KVStore`."""
        plan = self._plans[layer]
        if k_TKH is not None and v_TKH is not None:
            view = self._append(self._layers[layer], k_TKH, v_TKH)
            if layer in self._sources:
                self._views[layer] = view
        else:
            view = self._views[plan.kv_source]
        return stored_attention(q, view.spans, self._asking(view.keys, plan.window, rows_R))

    def read(self, layer: int, q_BNH: Tensor) -> Tensor:
        """See `model.drafter.TargetKV`: of the one sequence, between steps."""
        plan = self._plans[layer]
        slots, window = self._layers[plan.kv_source].slots, plan.window
        if window is None:
            first, spans = 0, [(slots, 0, self.length)]
        else:
            first = max(0, self.length - window + 1)
            spans = [(slots, *turn) for turn in _turns(first, self.length, window)]
        return stored_attention(q_BNH, spans, Queries(1, self.length - first, None, origin=first))

    @property
    def positions_T(self) -> Tensor:
        """Of the step's tokens."""
        return torch.arange(self.length, self.length + self._step_tokens, device=self.device)

    def seen(self) -> Seen | None:
        """See `model.text.Pass`: a single token's, which is written at once."""
        if self._step_tokens != 1 or self._blocks_T is not None:
            return None
        if self._stores is None:
            natives = {layer: own.slots._native for layer, own in self._layers.items()}
            self._stores = Stores.of(len(self._plans), natives)
            if self._stores is None:
                return None
        runs: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for group in self._groups:
            layer = self._layers[group.plans[0].index]
            view, _, _ = self._view(layer, 1)
            runs[layer.plan.window is not None] = [(first, n) for _, first, n in view.spans]
        full, sliding = (Sight([runs[s]], [0]) for s in (False, True))
        return Seen(self._stores, [self.length], full, sliding)

    def place(self, layer: int, rows_R: Tensor | None) -> Place | None:
        """Where the extension itself stores and finds K/V of a layer this step, in the stead of
        `attend`; None where it cannot. Once a layer and step, in order."""
        if self.dtype != torch.int8:
            return None
        plan = self._plans[layer]
        # Layers that read the same keys share a place.
        kind = (plan.kv_source, plan.owns_kv, rows_R is None)
        if kind not in self._places:
            self._places[kind] = self._place(plan, rows_R)
        return self._places[kind]

    def _place(self, plan: LayerPlan, rows_R: Tensor | None) -> Place | None:
        own = self._layers.get(plan.index)
        into, slot = None, 0
        if own is None:
            view = self._views.get(plan.kv_source)
        elif own.slots.k is None:
            return None
        else:
            view, target, slot = self._view(own, self._step_tokens)
            into = target._native
            if plan.index in self._sources:
                self._views[plan.index] = view
        if view is None or any(slots._native is None for slots, _, _ in view.spans):
            return None
        spans = [(slots._native, first, n) for slots, first, n in view.spans if slots._native]
        asking = self._asking(view.keys, plan.window, rows_R)
        storages, readers = readers_of(spans, asking.ranges_R2, asking.origin)
        slots_T = None if into is None else torch.arange(slot, slot + self._step_tokens)
        return Place(into, slots_T, storages, readers)

    def _asking(self, keys: int, window: int | None, rows_R: Tensor | None) -> Queries:
        """The same for all layers of a kind in a step."""
        kind = (keys, window, rows_R is None)
        if kind not in self._queries:
            blocks_T = None if window is None else self._blocks_T
            self._queries[kind] = Queries(self._step_tokens, keys, window, blocks_T, rows_R)
        return self._queries[kind]

    def _append(self, layer: _Layer, k_TKH: Tensor, v_TKH: Tensor) -> _View:
        view, target, slot = self._view(layer, v_TKH.shape[0])
        target.write(slot, k_TKH, v_TKH)
        return view

    def _view(self, layer: _Layer, tokens: int) -> tuple[_View, Slots, int]:
        """The keys that this step sees in a layer of its own, and where its tokens' go: slots, and
        the first of them."""
        start, stop = self.length, self.length + tokens
        window, slots = layer.plan.window, layer.slots
        if window is None:
            if slots.k is None and slots.rule is None:
                raise ValueError(f"layer {layer.plan.index} is K = V: RingCache needs k_from_v")
            return _View([(slots, 0, stop)], stop), slots, start
        assert slots.k is not None, "K = V layers are full-attention layers"
        plans, first = layer.group.plans, layer.group.plans[0].index
        if tokens == 1:
            slot = start % window
            if start >= window and first not in self._overwritten:
                places = [tensor[:, slot] for tensor in layer.group.tensors.values()]
                self._overwritten[first] = [(place, place.clone()) for place in places]
            spans = self._past(slots, stop, window)
            return _View(spans, _keys(spans)), slots, slot
        if first not in self._unwritten:
            self._unwritten[first] = whole = self._empty(plans, tokens)
            self._pending |= {
                plan.index: part for plan, part in zip(plans, whole.split(len(plans)), strict=True)
            }
        pending = self._pending[layer.plan.index]
        spans = [*self._past(slots, start, window), (pending, 0, tokens)]
        return _View(spans, _keys(spans)), pending, 0

    def _past(self, ring: Slots, stop: int, window: int) -> list[Span]:
        """Where positions up to stop-1 that the step's first token sees lie, in order.

        Before them as many slots as bring them to where they would stand if all keys from position
        0 on were given. They lie outside of every window; but for them a query's bits would depend
        on how many tokens a step has, as each step begins with another key.
        """
        if window not in self._pasts:  # rings of a window are equally long
            first = max(0, self.length - window + 1)
            before, runs = first % ALIGNED if ring._native is not None else 0, []
            while before:
                runs.append((0, min(before, len(ring))))
                before -= runs[-1][1]
            self._pasts[window] = [*runs, *_turns(first, stop, window)]
        return [(ring, *run) for run in self._pasts[window]]

    def _write_rings(self, group: _Group, unwritten: Slots, tokens: int) -> None:
        window, new = group.plans[0].window, unwritten.stacked(len(group.plans))
        assert window is not None
        at = max(0, tokens - window)
        first, stop = self.length + at, self.length + tokens
        for slot, count in _turns(first, stop, window):
            for name, tensor in group.tensors.items():
                tensor[:, slot : slot + count] = new[name][:, at : at + count]
            at += count

    def trim(self, length: int) -> None:
        """Forget the tokens after the first `length`; storage stays.

        A ring that has wrapped has lost what left its window, so it can go back by one token
        only, or to nothing at all.

        Raises:
          CapacityError: a sliding layer no longer holds the tokens before `length`.
        """
        if not 0 <= length <= self.length:
            raise CapacityError(f"cannot trim to {length}: the cache holds {self.length} tokens")
        if length and not self.can_trim(length):
            raise CapacityError(
                f"cannot trim from {self.length} to {length} tokens: sliding layers keep the "
                f"last {self.config.sliding_window} only. Fork or save before going on instead."
            )
        self._drop_open()
        self.length = length

    def can_trim(self, length: int) -> bool:
        """Whether `trim(length)` would succeed for 0 < length <= self.length."""
        wrapped = self.length > self.config.sliding_window
        slides = any(layer.plan.window is not None for layer in self._layers.values())
        return length == 0 or not (wrapped and slides) or length >= self.length - 1

    def fork(self) -> Self:
        """An independent copy, to go on from the same past in two ways."""
        copy = type(self)(
            self.config, dtype=self.dtype, device=self.device, k_from_v=self._k_from_v
        )
        copy.reserve(self.reserved)
        copy.length = self.length
        for group, own in zip(copy._groups, self._groups, strict=True):
            for name, tensor in group.storage.tensors.items():
                tensor.copy_(own.storage.tensors[name])
        return copy

    def save(self, path: str | Path) -> None:
        """Write the past to a safetensors file, without unused storage."""
        tensors = {
            name: tensor[: self.length].contiguous()
            for layer in self._layers.values()
            for name, tensor in layer.tensors.items()
        }
        metadata = {
            "length": str(self.length),
            "format": str(self.dtype).removeprefix("torch."),
            "config": self._fingerprint(),
        }
        save_file(tensors, path, metadata)

    @classmethod
    def restore(
        cls,
        path: str | Path,
        config: TextConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        k_from_v: KFromV | None = None,
    ) -> Self:
        """Read what `save` wrote, for the same config and format (dtype).

        Raises:
          WeightsError: damaged, or saved from another model or in another format.
        """
        cache = cls(config, dtype=dtype, device=device, k_from_v=k_from_v)
        try:
            with safe_open(path, framework="pt", device=str(cache.device)) as file:
                metadata = file.metadata() or {}
                saved_as = FORMATS[metadata["format"]]
                if saved_as != dtype:
                    raise WeightsError(
                        f"{path}: K/V saved as {metadata['format']}, and this cache holds "
                        f"{str(dtype).removeprefix('torch.')}; restore it as saved, or prefill "
                        "the prompt again"
                    )
                if metadata.get("config") != cache._fingerprint():
                    raise WeightsError(f"{path}: K/V of another model; prefill the prompt again")
                length = int(metadata["length"])
                cache.reserve(length)
                for layer in cache._layers.values():
                    for name, tensor in layer.tensors.items():
                        saved = file.get_tensor(name)
                        tensor[: saved.shape[0]] = saved
                        if saved.shape[0] != min(length, tensor.shape[0]):
                            raise ValueError(f"{name} holds {saved.shape[0]} tokens")
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"{path}: not a saved cache ({error})") from error
        cache.length = length
        return cache

    def _fingerprint(self) -> str:
        text = f"{self.config.layers}{self.config.sliding_window}"
        return hashlib.sha256(text.encode()).hexdigest()


def _keys(spans: list[Span]) -> int:
    return sum(count for _, _, count in spans)


def _turns(first: int, stop: int, window: int) -> list[tuple[int, int]]:
    """Where positions first..stop-1, at most `window` of them, lie in a ring: up to two runs of
    slots, (first, count)."""
    slot, count = first % window, stop - first
    until_end = min(count, window - slot)
    runs = [(slot, until_end), (0, count - until_end)]
    return [run for run in runs if run[1]]
