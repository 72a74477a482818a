"""A whole pass of a decoder of low-bit weights in one call of the C++ extension: token ids in,
normed hidden states and the greatest logits out.

A small model's pass takes a fraction of a millisecond, and less than what Python and torch take to
hand its parts from one to the next; besides, other threads of Python may work while it runs. The
modules of `model.text` say what is computed; native/decoder.cpp computes the same bits.

Letters: T tokens of a pass, R of them that ask what follows, L layers, D hidden size, P per-layer
inputs, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops import native
from gemsmith.ops.cpu import PackedWeight, checked_skips
from gemsmith.ops.cpu_attention import INT8, StoredKV
from gemsmith.ops.cpu_layers import Layer
from gemsmith.ops.rotary import Angles

Found = tuple[Tensor, Tensor, Tensor]
"""As `ops.cpu.top` gives it."""
Part = tuple[int, int]
"""Tokens that one sequence has in a pass, and after how many of them, the last ones, what follows
is asked."""


class Stage(NamedTuple):
    """A layer, and where it stands."""

    layer: Layer
    source: int
    """Whose keys and values it reads: its own number where it owns some."""
    sliding: bool
    """Whether it sees a window alone."""


class Stores:
    """Where a cache keeps keys and values: those of each layer that owns some, in int8."""

    __slots__ = ("_kept", "heads", "native", "slots")

    def __init__(self, layers: int, stored: Mapping[int, StoredKV]) -> None:
        kernels = native.extension()
        assert kernels is not None, "StoredKV needs the extension"
        self._kept = dict(stored)
        self.heads = {layer: (kv.heads, kv.head_dim) for layer, kv in stored.items()}
        self.slots = {layer: kv.slots for layer, kv in stored.items()}
        nowhere = (0, 0, 0, 0)
        self.native = kernels.stores(
            [stored[i].arguments if i in stored else nowhere for i in range(layers)]
        )

    @classmethod
    def of(cls, layers: int, stored: Mapping[int, StoredKV | None]) -> Self | None:
        """None where a pass in one call cannot read them: where they are no int8, or keys follow a
        rule."""
        fit = {
            layer: kv
            for layer, kv in stored.items()
            if kv is not None and kv.formats == INT8 and kv.rule is None
        }
        return cls(layers, fit) if len(fit) == len(stored) else None


class Sight:
    """What sequences see in layers of one kind: runs of slots (first, count) of each, its keys one
    after the other, the last of them its tokens of this pass; and which token of the sequence the
    first key is."""

    __slots__ = ("keys", "numbers", "stop")

    def __init__(self, runs: Sequence[Sequence[tuple[int, int]]], origins: Sequence[int]) -> None:
        """Raises:
        WeightsError: places before the first, or runs of nothing.
        """
        self.numbers: list[int] = []
        """As the extension takes them."""
        self.keys: list[int] = []
        """Of each sequence."""
        self.stop = 0
        """One after the last slot."""
        for its, origin in zip(runs, origins, strict=True):
            self.numbers += (origin, len(its))
            keys = 0
            for first, count in its:
                self.numbers += (first, count)
                self.stop, keys = max(self.stop, first + count), keys + count
                if first < 0 or count < 1:
                    raise WeightsError(f"{count} slots from {first} on hold no keys")
            if origin < 0:
                raise WeightsError(f"no token {origin} begins a sequence's keys")
            self.keys.append(keys)


@dataclass(slots=True)
class Seen:
    """What the sequences of a pass see, and where each goes on."""

    stores: Stores
    starts: list[int]
    """The position of each one's first token of the pass."""
    full: Sight
    sliding: Sight


@dataclass(kw_only=True, slots=True)
class Scales:
    """What a decoder multiplies with; see `model.text.TextModel`."""

    eps: float
    embedding: float
    projection: float = 1.0
    identity: float = 1.0
    sum: float = 1.0


class Decoder:
    """All of a decoder whose matrices are packed, for float32 hidden states.

    Needs the extension.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        shared: int,
        window: int | None,
        embedding: PackedWeight,
        head: PackedWeight,
        norm: Tensor,
        frequencies: tuple[Tensor | None, Tensor | None],
        scales: Scales,
        projection: PackedWeight | Tensor | None = None,
        projection_norm: Tensor | None = None,
        table: Tensor | None = None,
        most_tokens: int,
    ) -> None:
        """shared: from this layer on none owns keys and values. frequencies: by which full and
        sliding layers turn, None where there are none. projection, a weight or bfloat16 [L*P, D],
        and its norm [P]: of per-layer inputs, where the layers have them; table: float32 [V, L*P],
        or None where each pass is given its rows. most_tokens: of a pass that is taken.

        Raises:
          WeightsError: parts that do not belong together.
        """
        layers = [stage.layer for stage in stages]
        L, D, P = len(layers), layers[0]._D, layers[0]._P
        V = embedding.outputs
        for name, found, wanted in (
            ("embedding", (embedding.inputs,), (D,)),
            ("head", (head.outputs, head.inputs), (V, D)),
            ("layers", {(layer._D, layer._P) for layer in layers}, {(D, P)}),
            ("projection", bool(P), projection is not None and projection_norm is not None),
        ):
            if found != wanted:
                raise WeightsError(f"{name} of the decoder: {found}, not {wanted}")
        native.check(norm, "norm", torch.float32, (D,))
        fields: tuple[int, ...] = (0,) * 7
        if projection_norm is not None:
            native.check(projection_norm, "the projection's norm", torch.float32, (P,))
        if isinstance(projection, PackedWeight):
            if (projection.outputs, projection.inputs) != (L * P, D) or P % 16:
                raise WeightsError(
                    f"a projection [{projection.outputs}, {projection.inputs}] for {L} layers of "
                    f"{P} inputs each, a multiple of 16"
                )
            fields = projection.arguments
        elif projection is not None:
            native.check(projection, "projection", torch.bfloat16, (L * P, D))
            fields = (projection.data_ptr(), 0, L * P, D, 16, 0, 0)
        if table is not None:
            native.check(table, "table", torch.float32, (V, L * P))
        for i, (layer, source, sliding) in enumerate(stages):
            read = stages[source].layer if 0 <= source <= i else None
            if read is None or not read._K or bool(layer._K) != (source == i):
                raise WeightsError(f"layer {i} cannot read keys and values of layer {source}")
            if read._H != layer._H or layer._N % read._K or stages[source].sliding != sliding:
                raise WeightsError(f"layers {i} and {source} do not share keys and values")
            turns = frequencies[sliding]
            if turns is None or 2 * len(turns) > layer._H or (sliding and not window):
                raise WeightsError(f"layer {i} has no angles or no window")
            if i >= shared and layer._K:
                raise WeightsError(f"layer {i} owns keys and values, beyond layer {shared}")
        kernels = native.extension()
        assert kernels is not None, "the layers were made by the extension"
        self._kept = (layers, embedding, head, norm, projection, projection_norm, table)
        """What the addresses belong to."""
        self._V, self._D, self._width, self._head = V, D, L * P, head
        self._heads = {i: (s.layer._K, s.layer._H) for i, s in enumerate(stages) if s.layer._K}
        self._kinds = [
            [i for i, stage in enumerate(stages) if stage.layer._K and stage.sliding == sliding]
            for sliding in (False, True)
        ]
        self.needs_rows = bool(P) and table is None
        """Whether a pass is to be given the rows of the per-layer table."""
        self.most_tokens = most_tokens
        self._passed: tuple[int, Tensor] = (0, torch.empty(0, dtype=torch.int64))
        self._angles = Angles([turns for turns in frequencies if turns is not None])
        self._turns = [turns is not None for turns in frequencies]
        """Of full and sliding layers: whether there are some."""
        self._native = kernels.decoder(
            [layer._layer for layer in layers],
            [stage.source for stage in stages],
            [int(stage.sliding) for stage in stages],
            [shared, D, P, window or 0],
            [scales.eps, scales.embedding, scales.projection, scales.identity, scales.sum],
            [0 if a is None else a.data_ptr() for a in (norm, projection_norm, table)],
            [embedding.arguments, head.arguments, fields],
        )

    def read(
        self,
        ids: list[int],
        parts: Sequence[Part],
        seen: Seen,
        *,
        rows_T: Tensor | None = None,
        count: int = 0,
        skipped: Tensor | None = None,
    ) -> tuple[Tensor, Found | None]:
        """Hidden states [R, D] after the final norm of the tokens that ask, and with a count what
        `cpu.top` finds of the head's outputs there. Keys and values of all tokens are stored.

        parts: of each sequence, whose tokens follow each other in ids. rows_T: float32 [T, L*P]
        where `needs_rows`.

        Raises:
          WeightsError: ids, slots or sizes that do not belong together.
        """
        tokens, asks = sum(part[0] for part in parts), sum(part[1] for part in parts)
        if not ids or tokens != len(ids) or any(not 0 <= a <= t for t, a in parts):
            raise WeightsError(f"{len(ids)} tokens in parts {list(parts)}")
        if min(ids) < 0 or max(ids) >= self._V:
            raise WeightsError(
                f"rows {min(ids)} to {max(ids)} of a table of {self._V}; the tokenizer belongs to "
                "another model"
            )
        self._check(parts, seen)
        rows = 0
        if self.needs_rows:
            assert rows_T is not None, "there is no table to take rows from"
            native.check(rows_T, "rows", torch.float32, (tokens, self._width))
            rows = rows_T.data_ptr()
        kernels = native.ready()
        assert kernels is not None, "the decoder was made by the extension"
        tables, row = self._angles.of(seen.starts, [part[0] for part in parts])
        each = iter(tables)
        angles = [_addresses(*next(each), row) if there else (0, 0, 0) for there in self._turns]
        y_RD, found, where = torch.empty((asks, self._D)), None, (0, 0, 0, 0, 0, 0)
        if count:
            skipped = self._skips(count, skipped)
            found = (
                torch.empty((asks, count)),
                torch.empty((asks, count), dtype=torch.int64),
                torch.empty(asks),
            )
            addresses = [tensor.data_ptr() for tensor in found]
            where = (count, skipped.data_ptr(), len(skipped), *addresses)
        self._native.read(
            seen.stores.native, ids, [number for part in parts for number in part],
            seen.full.numbers, seen.sliding.numbers, angles, rows, y_RD.data_ptr(), where,
        )  # fmt: skip
        return y_RD, found

    def _skips(self, count: int, skipped: Tensor | None) -> Tensor:
        """`checked_skips`, of thousands of ids that are the same at every token."""
        before, checked = self._passed
        if skipped is None or skipped.dtype != checked.dtype:
            return checked_skips(self._head, count, skipped)
        if count != before or not torch.equal(skipped, checked):
            self._passed = count, checked_skips(self._head, count, skipped).clone()
        return self._passed[1]

    def _check(self, parts: Sequence[Part], seen: Seen) -> None:
        """Raises:
        WeightsError: keys of other layers, slots that are not there, or none for these tokens.
        """
        stores = seen.stores
        if stores.heads != self._heads:
            raise WeightsError(f"keys and values {stores.heads}; the layers have {self._heads}")
        for owners, sight in zip(self._kinds, (seen.full, seen.sliding), strict=True):
            if not owners:
                continue
            if sight.stop > min(stores.slots[layer] for layer in owners):
                raise WeightsError(f"slot {sight.stop - 1} of {stores.slots}")
            if len(sight.keys) != len(parts) or any(
                keys < part[0] for keys, part in zip(sight.keys, parts, strict=True)
            ):
                raise WeightsError(f"keys {sight.keys} of sequences with tokens {list(parts)}")


def _addresses(cos: Tensor, sin: Tensor, row: int) -> tuple[int, int, int]:
    """Of a row of angles and those after it, and how many pairs turn."""
    pairs = cos.shape[-1]
    return cos.data_ptr() + 4 * row * pairs, sin.data_ptr() + 4 * row * pairs, pairs
