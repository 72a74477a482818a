"""Attention over stored keys and values by the C++ extension, which reads them where they lie, in
float32, bfloat16 or int8.

Which keys a query sees, and what happens without the extension, is for `attention`; so is the
reference. Letters: R query rows, N query heads, K key/value heads, H head size, S keys, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops import native
from gemsmith.ops.rotary import KeyRule

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""How keys and values may be stored, as native/kernels.h numbers it."""
INT8 = (FORMATS[torch.int8],) * 2
MAX_HEAD = 512


class StoredKV:
    """Keys and values [slots, K, H] each as `attention` reads them: float32, bfloat16, or int8 with
    float32 scales [slots, K]. Checked once, here.

    With a rule, values alone: the key of a slot is rebuilt from its value whenever it is read.

    The tensors are kept, not copied, and must not be resized. H is a multiple of 16 up to MAX_HEAD.
    Needs the extension.
    """

    __slots__ = ("_tensors", "arguments", "formats", "head_dim", "heads", "rule", "slots")

    def __init__(
        self,
        k: Tensor | None,
        v: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        *,
        rule: KeyRule | None = None,
    ):
        """Raises:
        WeightsError: tensors that do not fit each other, not contiguous, or not on the CPU.
        """
        if (k is None) != (rule is not None):
            raise WeightsError("keys are either stored or rebuilt by a rule: give one of the two")
        self.rule = rule
        if k is None:
            k, k_scale = v, v_scale
        if k.ndim != 3 or k.shape[2] % 16 or not 16 <= k.shape[2] <= MAX_HEAD:
            raise WeightsError(
                f"keys {list(k.shape)}: they must be [slots, K, H] with H a multiple of 16 up to "
                f"{MAX_HEAD}"
            )
        self.slots, self.heads, self.head_dim = k.shape
        for name, values, scale in (("k", k, k_scale), ("v", v, v_scale)):
            if values.dtype not in FORMATS:
                raise WeightsError(f"{name} is {values.dtype}; it must be one of {list(FORMATS)}")
            native.check(values, name, values.dtype, tuple(k.shape))
            if (values.dtype == torch.int8) != (scale is not None):
                raise WeightsError(f"{name} is {values.dtype}: int8 has scales, no other type does")
            if scale is not None:
                native.check(scale, f"{name}_scale", torch.float32, (self.slots, self.heads))
        if rule is not None:
            native.check(rule.norm_H, "norm", torch.float32, (self.head_dim,))
            pairs = len(rule.turns.frequencies_R)
            if pairs > self.head_dim // 2:
                raise WeightsError(f"{pairs} pairs of a head of {self.head_dim} cannot turn")
        self.formats = FORMATS[k.dtype], FORMATS[v.dtype]
        self._tensors = (k, v, k_scale, v_scale)
        self.arguments = tuple(
            0 if t is None else t.data_ptr() for t in (k, k_scale, v, v_scale)
        )  # fmt: skip

    def write(self, slot: int, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Store float32 k and v of T tokens as int8 from `slot` on, as `quantize_rows` rounds them.

        Raises:
          WeightsError: they are not float32 [T, K, H], T tokens have no room, or the slots are not
            int8.
        """
        T = k_TKH.shape[0] if k_TKH.ndim else 0
        shape = (T, self.heads, self.head_dim)
        native.check(k_TKH, "k", torch.float32, shape)
        native.check(v_TKH, "v", torch.float32, shape)
        self.check_slots(slot, T)
        if self.formats != INT8:
            raise WeightsError("only int8 slots are written here")
        kernels, rows = native.ready(), T * self.heads
        assert kernels is not None, "StoredKV needs the extension"
        k, k_scale, v, v_scale = self.arguments
        stored = ((v_TKH, v, v_scale), (k_TKH, k, k_scale))
        for x, values, scale in stored if self.rule is None else stored[:1]:
            first = slot * self.heads
            kernels.quantize_rows(
                x.data_ptr(), rows, self.head_dim, values + first * self.head_dim, scale + 4 * first
            )

    def check_slots(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self.slots:
            raise WeightsError(f"slots {first} to {first + count} of {self.slots}")


class Readers:
    """What each of several sequences asks of storages: for `attention_of_many` and
    `cpu_layers.run_layers`, for all layers that are alike. Checked once, here."""

    __slots__ = ("_stops", "positions", "ranges_R2", "rows", "sequences", "spans")

    def __init__(
        self,
        spans: Sequence[Sequence[tuple[int, int, int]]],
        rows: Sequence[int],
        ranges_R2: Tensor,
        origins: Sequence[int],
    ):
        """Of each sequence: spans of (a storage's number, first slot, count), one after the other
        its keys 0..S-1; its rows; origin: which of its tokens key 0 is. ranges_R2, int64, of all
        rows: row r sees keys ranges[r, 0] to ranges[r, 1] - 1 of its sequence, one that sees none
        gets NaN.

        Raises:
          WeightsError: a sequence without keys, or ranges of another type or shape.
        """
        self.sequences: list[int] = []
        """Rows, spans and origin of each."""
        self.spans: list[int] = []
        self._stops: dict[int, int] = {}
        """By storage: one after the last slot."""
        self.positions = 0
        """One after the last token of the longest sequence."""
        for runs, count, origin in zip(spans, rows, origins, strict=True):
            self.sequences += (count, len(runs), origin)
            stop, least = origin, 0
            for storage, first, keys in runs:
                self.spans += (storage, first, keys)
                self._stops[storage] = max(self._stops.get(storage, 0), first + keys)
                stop, least = stop + keys, min(least, storage, first, keys)
            if not runs or min(least, origin) < 0:
                raise WeightsError(f"spans {list(runs)} from token {origin}: attention needs keys")
            self.positions = max(self.positions, stop)
        self.rows = sum(rows)
        native.check(ranges_R2, "ranges", torch.int64, (self.rows, 2))
        self.ranges_R2 = ranges_R2

    def check(self, storages: Sequence[StoredKV]) -> None:
        """Raises:
        WeightsError: storages that are not alike, or slots that are not there.
        """
        kv = storages[0]
        for each in storages:
            if (each.formats, each.heads, each.head_dim) != (kv.formats, kv.heads, kv.head_dim):
                raise WeightsError("keys of different formats or shapes are not attended together")
            if each.rule is not kv.rule:
                raise WeightsError("keys that follow different rules are not attended together")
        for storage, stop in self._stops.items():
            if storage >= len(storages):
                raise WeightsError(f"storage number {storage} of {len(storages)}")
            storages[storage].check_slots(0, stop)


def attention(
    q_RNH: Tensor,
    spans: Sequence[tuple[StoredKV, int, int]],
    ranges_R2: Tensor,
    origin: int = 0,
) -> Tensor:
    """`attention_of_many` of one sequence: spans of (storage, first slot, count).

    Raises:
      WeightsError: other types, shapes or layouts; no keys; slots that are not there.
    """
    return attention_of_many(q_RNH, *readers_of(spans, ranges_R2, origin))


def readers_of(
    spans: Sequence[tuple[StoredKV, int, int]], ranges_R2: Tensor, origin: int
) -> tuple[list[StoredKV], Readers]:
    """Storages, and what one sequence asks of them; as `attention` takes it.

    Raises: as `Readers`.
    """
    storages = list(dict.fromkeys(kv for kv, _, _ in spans))
    runs = [(storages.index(kv), first, count) for kv, first, count in spans]
    return storages, Readers([runs], [len(ranges_R2)], ranges_R2, [origin])


def attention_of_many(q_RNH: Tensor, storages: Sequence[StoredKV], readers: Readers) -> Tensor:
    """Attention of float32 queries over stored keys, softmax scale 1; float32 [R, N, H], the rows
    of one sequence after those of the other.

    N is a multiple of K; consecutive query heads share a key/value head. A row has the same bits
    whatever other rows and earlier keys are given with it. Needs the extension.

    Raises:
      WeightsError: other types, shapes or layouts; slots that are not there.
    """
    readers.check(storages)
    N, kv = q_RNH.shape[1] if q_RNH.ndim == 3 else 0, storages[0]
    native.check(q_RNH, "q", torch.float32, (readers.rows, N, kv.head_dim))
    if N < 1 or N % kv.heads:
        raise WeightsError(f"{N} query heads do not share {kv.heads} key/value heads evenly")
    kernels = native.ready()
    assert kernels is not None, "StoredKV needs the extension"
    y_RNH = torch.empty_like(q_RNH)
    kernels.attention(
        q_RNH.data_ptr(), N, kv.heads, kv.head_dim, addresses(storages), *kv.formats,
        readers.sequences, readers.spans, readers.ranges_R2.data_ptr(), y_RNH.data_ptr(),
        _rule_arguments(kv.rule, readers.positions),
    )  # fmt: skip
    return y_RNH


def addresses(storages: Sequence[StoredKV]) -> list[int]:
    """Four of each, as the extension takes them."""
    return [address for kv in storages for address in kv.arguments]


def _rule_arguments(rule: KeyRule | None, keys: int) -> tuple[int, ...]:
    """As KeyRule in native/kernels.h has them; zeros for None."""
    if rule is None:
        return (0,) * 7
    turns = rule.turns
    turns.reach(keys)
    frequencies_R = turns.frequencies_R
    tables = (frequencies_R, *turns.near, *turns.far)
    return rule.norm_H.data_ptr(), len(frequencies_R), *(t.data_ptr() for t in tables)
