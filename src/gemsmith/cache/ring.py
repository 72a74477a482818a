"""Key/value cache of one growing sequence.

Sliding layers keep their window in a ring; full layers keep everything in a slab that grows;
layers that read another layer's K/V keep nothing; K = V layers keep V alone and rebuild K when
they read it. Bytes held are exactly `sizing.kv_bytes`.

A step either completes or leaves no trace: rings are written when the step ends (a single token
at once, so that attention reads the ring itself; what it overwrote is put back if the step
fails), and slabs are written beyond the length that counts.

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
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemsmith import sizing
from gemsmith.config import LayerPlan, TextConfig
from gemsmith.errors import CapacityError, WeightsError
from gemsmith.ops.attention import causal_attention, masked_attention, visible

KFromV = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class _Layer:
    """Storage of a layer that owns K/V: [slots, K, H] each; k is None where K = V."""

    plan: LayerPlan
    k: Tensor | None
    v: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        name = f"layers.{self.plan.index}"
        keys = {} if self.k is None else {f"{name}.k": self.k}
        return keys | {f"{name}.v": self.v}


@dataclass(slots=True)
class _View:
    """What a layer's queries look at this step: S keys from position `first` on, in order.

    In a step of one token order and position do not matter: every key is visible.
    """

    k_SKH: Tensor
    v_SKH: Tensor
    first: int


class RingCache:
    """The past of one sequence. Use `step` around each forward pass.

    k_from_v is `TextModel.k_from_v`; configs without K = V layers do not need it.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        k_from_v: KFromV | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.length = 0
        """Tokens held."""
        self.reserved = 0
        """Tokens that storage has been sized for; never shrinks."""
        self._k_from_v = k_from_v
        self._layers = {
            plan.index: _Layer(plan, None if plan.k_eq_v else self._empty(plan), self._empty(plan))
            for plan in config.layers
            if plan.owns_kv
        }
        self._sources = {plan.kv_source for plan in config.layers if not plan.owns_kv}
        self._views: dict[int, _View] = {}
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        self._overwritten: dict[int, tuple[int, list[Tensor]]] = {}
        self._step_tokens = 0
        self._blocks_T: Tensor | None = None

    def _empty(self, plan: LayerPlan, slots: int = 0) -> Tensor:
        shape = (slots, plan.num_key_value_heads, plan.head_dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

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
        try:
            for layer in self._layers.values():
                slots = sizing.slab_tokens(tokens)
                if layer.plan.window is not None:
                    slots = min(slots, layer.plan.window)
                if slots > layer.v.shape[0]:
                    layer.k = None if layer.k is None else self._grown(layer.plan, layer.k, slots)
                    layer.v = self._grown(layer.plan, layer.v, slots)
        except (RuntimeError, MemoryError) as error:
            need = sizing.kv_bytes(self.config, tokens, self.dtype.itemsize) / 2**30
            raise CapacityError(
                f"no memory for {need:.2f} GiB of K/V for {tokens} tokens; "
                "use a shorter context or a narrower dtype"
            ) from error
        self.reserved = tokens

    def _grown(self, plan: LayerPlan, old: Tensor, slots: int) -> Tensor:
        # A ring only grows until it is as long as its window, so slot = position still holds.
        new = self._empty(plan, slots)
        held = min(self.length, old.shape[0])
        new[:held] = old[:held]
        return new

    @contextmanager
    def step(self, tokens: int, blocks_T: Tensor | None = None) -> Iterator[Tensor]:
        """Run one forward pass of `tokens` new tokens inside; yields their positions [T].

        If the body raises, the cache is as it was before. blocks_T: tokens that see each other
        whole in sliding layers, see `ops.attention.causal_attention`; a block lies in one step.
        """
        self.reserve(self.length + tokens)
        self._step_tokens, self._blocks_T = tokens, blocks_T
        try:
            yield torch.arange(self.length, self.length + tokens, device=self.device)
            for index, (k_TKH, v_TKH) in self._pending.items():
                self._write_ring(self._layers[index], k_TKH, v_TKH)
            self.length += tokens
        except BaseException:
            for index, (slot, old_kv) in self._overwritten.items():
                for tensor, old in zip(self._layers[index].tensors.values(), old_kv, strict=True):
                    tensor[slot] = old
            raise
        finally:
            self._overwritten.clear()
            self._views.clear()
            self._pending.clear()
            self._step_tokens, self._blocks_T = 0, None

    def attend(
        self,
        layer: int,
        q: Tensor,
        k_TKH: Tensor | None,
        v_TKH: Tensor | None,
        rows_R: Tensor | None,
    ) -> Tensor:
        """See `model.text.KVStore`."""
        plan = self.config.layers[layer]
        if k_TKH is not None and v_TKH is not None:
            view = self._append(self._layers[layer], k_TKH.to(self.dtype), v_TKH.to(self.dtype))
            if layer in self._sources:
                self._views[layer] = view
        else:
            view = self._views[plan.kv_source]
        if self._step_tokens == 1:
            return masked_attention(q, view.k_SKH, view.v_SKH, None)
        blocks_T = None if plan.window is None else self._blocks_T
        if rows_R is None:
            return causal_attention(q, view.k_SKH, view.v_SKH, plan.window, blocks_T)
        k_at = torch.arange(view.first, view.first + view.k_SKH.shape[0], device=q.device)
        in_block = ()
        if blocks_T is not None:
            past = len(k_at) - len(blocks_T)
            in_block = (blocks_T[rows_R], F.pad(blocks_T, (past, 0), value=-1))
        mask = visible(rows_R + self.length, k_at, plan.window, *in_block)
        return masked_attention(q, view.k_SKH, view.v_SKH, mask)

    def _append(self, layer: _Layer, k_TKH: Tensor, v_TKH: Tensor) -> _View:
        start, stop = self.length, self.length + k_TKH.shape[0]
        window = layer.plan.window
        if window is None:
            layer.v[start:stop] = v_TKH
            v_SKH = layer.v[:stop]
            if layer.k is None:
                return _View(self._rebuilt(layer.plan, v_SKH), v_SKH, 0)
            layer.k[start:stop] = k_TKH
            return _View(layer.k[:stop], v_SKH, 0)
        assert layer.k is not None, "K = V layers are full-attention layers"
        if k_TKH.shape[0] == 1:
            slot = start % window
            self._overwritten[layer.plan.index] = (
                slot,
                [t[slot].clone() for t in (layer.k, layer.v)],
            )
            self._write_ring(layer, k_TKH, v_TKH)
            held = min(stop, window)
            return _View(layer.k[:held], layer.v[:held], stop - held)
        self._pending[layer.plan.index] = (k_TKH, v_TKH)
        past = min(start, window - 1)
        slots = torch.arange(start - past, start, device=self.device) % window
        return _View(
            torch.cat((layer.k[slots], k_TKH)), torch.cat((layer.v[slots], v_TKH)), start - past
        )

    def _rebuilt(self, plan: LayerPlan, v_SKH: Tensor) -> Tensor:
        if self._k_from_v is None:
            raise ValueError(f"layer {plan.index} is K = V: RingCache needs k_from_v")
        positions_S = torch.arange(v_SKH.shape[0], device=self.device)
        return self._k_from_v(plan.index, v_SKH, positions_S)

    def _write_ring(self, layer: _Layer, k_TKH: Tensor, v_TKH: Tensor) -> None:
        assert layer.k is not None
        assert layer.plan.window is not None
        kept = min(k_TKH.shape[0], layer.plan.window)
        stop = self.length + k_TKH.shape[0]
        slots = torch.arange(stop - kept, stop, device=self.device) % layer.plan.window
        layer.k[slots] = k_TKH[-kept:]
        layer.v[slots] = v_TKH[-kept:]

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
        copy.length, copy.reserved = self.length, self.reserved
        for index, layer in self._layers.items():
            k = None if layer.k is None else layer.k.clone()
            copy._layers[index] = _Layer(layer.plan, k, layer.v.clone())
        return copy

    def save(self, path: str | Path) -> None:
        """Write the past to a safetensors file, without unused storage."""
        tensors = {
            name: tensor[: self.length].contiguous()
            for layer in self._layers.values()
            for name, tensor in layer.tensors.items()
        }
        metadata = {"length": str(self.length), "config": self._fingerprint()}
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
        """Read what `save` wrote, for the same config and dtype.

        Raises:
          WeightsError: damaged, or saved from another model or dtype.
        """
        cache = cls(config, dtype=dtype, device=device, k_from_v=k_from_v)
        try:
            with safe_open(path, framework="pt", device=str(cache.device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("config") != cache._fingerprint():
                    raise WeightsError(
                        f"{path}: K/V of another model or dtype; prefill the prompt again"
                    )
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
        text = f"{self.config.layers}{self.config.sliding_window}{self.dtype}"
        return hashlib.sha256(text.encode()).hexdigest()
