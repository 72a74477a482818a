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


def attention(
    q_RNH: Tensor,
    spans: Sequence[tuple[StoredKV, int, int]],
    ranges_R2: Tensor,
    origin: int = 0,
) -> Tensor:
    """Attention of float32 queries over stored keys, softmax scale 1; float32 [R, N, H].

    spans: (storage, first slot, count) each; one after the other they are keys 0..S-1. ranges_R2,
    int64: row r sees keys ranges[r, 0] to ranges[r, 1] - 1; one that sees none gets NaN. N is a
    multiple of K; consecutive query heads share a key/value head. origin: which token of its
    sequence key 0 is; a row has the same bits whatever rows and earlier keys are given with it.
    Needs the extension.

    Raises:
      WeightsError: other types, shapes or layouts; no keys; slots that are not there.
    """
    R, N, _ = q_RNH.shape if q_RNH.ndim == 3 else (0, 0, 0)
    if not spans:
        raise WeightsError("attention needs keys: no spans were given")
    kv = spans[0][0]
    native.check(q_RNH, "q", torch.float32, (R, N, kv.head_dim))
    native.check(ranges_R2, "ranges", torch.int64, (R, 2))
    if N < 1 or N % kv.heads:
        raise WeightsError(f"{N} query heads do not share {kv.heads} key/value heads evenly")
    addresses: list[int] = []
    keys = sum(count for _, _, count in spans)
    for each, first, count in spans:
        each.check_slots(first, count)
        if (each.formats, each.heads, each.head_dim) != (kv.formats, kv.heads, kv.head_dim):
            raise WeightsError("spans of different formats or shapes cannot be attended together")
        if each.rule is not kv.rule:
            raise WeightsError("spans whose keys follow other rules cannot be attended together")
        addresses += (*each.arguments, first, count)
    kernels = native.ready()
    assert kernels is not None, "StoredKV needs the extension"
    y_RNH = torch.empty_like(q_RNH)
    kernels.attention(
        q_RNH.data_ptr(), R, N, kv.heads, kv.head_dim, addresses, *kv.formats,
        ranges_R2.data_ptr(), y_RNH.data_ptr(), origin, _rule_arguments(kv.rule, origin + keys),
    )  # fmt: skip
    return y_RNH


class Readers:
    """What each of several sequences asks of one storage: for `attention_of_many`, for all layers
    that are alike. Checked once, here."""

    __slots__ = ("_ranges", "_sequences", "_spans", "positions", "rows", "stop")

    def __init__(
        self,
        spans: Sequence[Sequence[tuple[int, int]]],
        ranges: Sequence[Tensor],
        origins: Sequence[int],
    ):
        """Of each sequence: (first slot, count) spans, and ranges_R2 and origin as in `attention`.

        Raises:
          WeightsError: a sequence without keys, or ranges of another type or shape.
        """
        self._sequences: list[int] = []
        self._spans: list[int] = []
        self.stop = 0
        """One after the last slot."""
        self.positions = 0
        """One after the last token of the longest sequence."""
        for runs, ranges_R2, origin in zip(spans, ranges, origins, strict=True):
            native.check(ranges_R2, "ranges", torch.int64, (None, 2))
            if not runs or min(min(run) for run in runs) < 0 or origin < 0:
                raise WeightsError(f"spans {runs} from token {origin}: attention needs keys")
            self._sequences += (ranges_R2.shape[0], len(runs), origin)
            for first, count in runs:
                self._spans += (first, count)
                self.stop = max(self.stop, first + count)
            self.positions = max(self.positions, origin + sum(count for _, count in runs))
        self._ranges = torch.cat(list(ranges))
        self.rows = self._ranges.shape[0]


def attention_of_many(q_RNH: Tensor, kv: StoredKV, readers: Readers) -> Tensor:
    """`attention` of several sequences, one after the other in q, over one storage: the same bits.
    Needs the extension.

    Raises:
      WeightsError: as `attention`.
    """
    N = q_RNH.shape[1] if q_RNH.ndim == 3 else 0
    native.check(q_RNH, "q", torch.float32, (readers.rows, N, kv.head_dim))
    if N < 1 or N % kv.heads:
        raise WeightsError(f"{N} query heads do not share {kv.heads} key/value heads evenly")
    kv.check_slots(0, readers.stop)
    kernels = native.ready()
    assert kernels is not None, "StoredKV needs the extension"
    y_RNH = torch.empty_like(q_RNH)
    kernels.attention_of_many(
        q_RNH.data_ptr(), N, kv.heads, kv.head_dim, kv.arguments, *kv.formats,
        readers._sequences, readers._spans, readers._ranges.data_ptr(), y_RNH.data_ptr(),
        _rule_arguments(kv.rule, readers.positions),
    )  # fmt: skip
    return y_RNH


def _rule_arguments(rule: KeyRule | None, keys: int) -> tuple[int, ...]:
    """As KeyRule in native/kernels.h has them; zeros for None."""
    if rule is None:
        return (0,) * 7
    turns = rule.turns
    turns.reach(keys)
    frequencies_R = turns.frequencies_R
    tables = (frequencies_R, *turns.near, *turns.far)
    return rule.norm_H.data_ptr(), len(frequencies_R), *(t.data_ptr() for t in tables)
