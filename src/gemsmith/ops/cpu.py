"""Products of low-bit weights with int8 activations, and attention over stored K/V, on the CPU.

The C++ extension `gemsmith._native` does them where it could be built; torch does elsewhere, with
the same bits and much slower (`gemm_reference` and its kin, the oracle in tests). This is the only
module that loads the extension; which weights are quantized, and how, is not known here.

Letters: N outputs (rows of the weight), K inputs, M rows of activations (tokens), G groups along K
that share a scale, b bits (2, 4 or 8), f = 8 / b codes in a byte.

Weights are stored in lines of 64 bytes: 16 outputs x 4 bytes. lines is uint8
[ceil(N/16), ceil(K/4f), 64]; in line l of block r, byte 4*row + i, bits p*b.., holds input
k = l*4f + 4p + i of output 16r + row as u = q + 2^(b-1), q in [-2^(b-1), 2^(b-1) - 1]. scales is
[ceil(N/16), G, 16]: bfloat16 where G > 1 and that holds every scale exactly (float32 would be a
fifth of the bytes of 4-bit groups of 32), else float32. native/kernels.h says the same.

    y[m, n] = sx[m] * sum over g of scale[n, g] * (sum over k in g of q[n, k] * x8[m, k])

The inner sum is exact; the outer one is float32, in ascending order, each product and each sum
rounded. So every instruction set and torch give equal bits, whatever the number of threads.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gemsmith import hardware
from gemsmith.errors import WeightsError
from gemsmith.ops.rotary import KeyRule

LINE, BLOCK = 64, 16
MAX_INPUTS = 65536
"""Sums of 255 * 128 over more inputs than this pass 32 bits."""
REFERENCE_CODES = 1 << 22
"""Weights that torch widens to float64 at once: 32 MiB."""


@cache
def _native() -> ModuleType | None:
    """None where no C++ compiler was found when gemsmith was installed."""
    try:
        return import_module("gemsmith._native")
    except ImportError:
        return None


def available() -> bool:
    """Whether the extension is there."""
    return _native() is not None


def isa() -> str:
    """The instruction set in use: one of `isas()`."""
    native = _native()
    return native.isa() if native else "torch"


def isas() -> tuple[str, ...]:
    """What this CPU and this build can use, slowest first; "torch" alone without the extension."""
    native = _native()
    return tuple(native.isas()) if native else ("torch",)


def force_isa(name: str | None) -> None:
    """Use one instruction set from now on, in every thread; None: the fastest. For tests.

    Raises:
      ValueError: it is not one of `isas()`.
    """
    native = _native()
    forced = native.force_isa(name or "") if native else name in (None, "torch")
    if not forced:
        raise ValueError(f"instruction set {name!r} cannot be used here; {', '.join(isas())} can")


@cache
def _cores() -> int:
    machine = hardware.machine()
    return max(1, min(machine.cores, int(machine.cpu_limit or machine.cores)))


def threads() -> int:
    """Threads a product may use: torch's number, but no more than the cores granted."""
    return min(torch.get_num_threads(), _cores())


def _ready() -> ModuleType | None:
    """The extension, told how many threads it may use now."""
    native = _native()
    if native:
        native.set_threads(threads())
    return native


def lines_shape(outputs: int, inputs: int, bits: int) -> tuple[int, int, int]:
    """Shape of the lines of a weight [outputs, inputs].

    Raises:
      WeightsError: bits other than 2, 4, 8; no weight at all; more than MAX_INPUTS inputs.
    """
    if bits not in (2, 4, 8):
        raise WeightsError(f"weights of {bits} bits cannot be packed; 2, 4 and 8 can")
    if outputs < 1 or not 1 <= inputs <= MAX_INPUTS:
        raise WeightsError(
            f"a weight [{outputs}, {inputs}] cannot be packed: outputs must be at least 1, "
            f"inputs 1 to {MAX_INPUTS}"
        )
    return -(-outputs // BLOCK), -(-inputs * bits // 32), LINE


def groups_of(inputs: int, group: int | None) -> int:
    """How many groups of `group` inputs there are; one for None.

    Raises:
      WeightsError: the group is no positive multiple of 32, or does not divide the inputs.
    """
    if group is None:
        return 1
    if group < 1 or group % 32 or inputs % group:
        raise WeightsError(
            f"groups of {group} along {inputs} inputs: a group must be a multiple of 32 "
            "that divides the inputs"
        )
    return inputs // group


class PackedWeight:
    """A weight [N, K] as the kernels read it. Checked once, here: products only look at x.

    The tensors are kept, not copied (they may be mapped from a file), and must not be resized.
    """

    __slots__ = ("_arguments", "bits", "group", "inputs", "lines", "outputs", "scales")

    def __init__(
        self,
        lines: Tensor,
        scales: Tensor,
        *,
        outputs: int,
        inputs: int,
        bits: int,
        group: int | None = None,
    ):
        """group: inputs that share a scale; None for one scale per output.

        Raises:
          WeightsError: a size that cannot be, or tensors that are not what the sizes ask for,
            contiguous and on the CPU.
        """
        shape = lines_shape(outputs, inputs, bits)
        _check(lines, "lines", torch.uint8, shape)
        groups = groups_of(inputs, group)
        narrow = groups > 1 and scales.dtype == torch.bfloat16
        dtype = torch.bfloat16 if narrow else torch.float32
        _check(scales, "scales", dtype, (shape[0], groups, BLOCK))
        self.lines, self.scales = lines, scales
        self.outputs, self.inputs, self.bits, self.group = outputs, inputs, bits, group
        self._arguments = (
            lines.data_ptr(), scales.data_ptr(), outputs, inputs, bits, group or 0,
            16 if narrow else 32,
        )  # fmt: skip

    @classmethod
    def pack(
        cls,
        packed: Tensor,
        scales_NG: Tensor,
        *,
        inputs: int,
        bits: int,
        group: int | None = None,
    ) -> Self:
        """From codes as `pack_lines` takes them and scales float32 [N, G]."""
        lines = pack_lines(packed, inputs, bits)
        outputs = packed.shape[0]
        _check(scales_NG, "scales", torch.float32, (outputs, groups_of(inputs, group)))
        scales = pack_scales(scales_NG)
        return cls(lines, scales, outputs=outputs, inputs=inputs, bits=bits, group=group)

    @property
    def nbytes(self) -> int:
        """Bytes that a product of few rows reads."""
        return self.lines.nbytes + self.scales.nbytes

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, K]: the rows (outputs) of int64 ids [n], each q * scale.

        Raises:
          WeightsError: an id is negative or not below the outputs.
        """
        _check(ids, "ids", torch.int64, (None,))
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.outputs:
            raise WeightsError(
                f"row {int(ids.min()) if int(ids.min()) < 0 else int(ids.max())} of a table of "
                f"{self.outputs}; the tokenizer belongs to another model"
            )
        native = _native()
        if native is None:
            return unpack_rows_reference(self, ids)
        out = torch.empty((len(ids), self.inputs))
        native.unpack_rows(
            self.lines.data_ptr(), self.scales.data_ptr(), self.inputs, self.bits,
            self.group or 0, 8 * self.scales.itemsize, ids.data_ptr(), len(ids), out.data_ptr(),
        )  # fmt: skip
        return out


def pack_lines(packed: Tensor, inputs: int, bits: int) -> Tensor:
    """Lines of a weight given as uint8 [N, ceil(K*b/8)]: codes u, consecutive ones in a byte,
    the first in the lowest bits. Outputs and inputs that fill up the lines hold q = 0."""
    outputs = packed.shape[0] if packed.ndim == 2 else 0
    shape = lines_shape(outputs, inputs, bits)
    _check(packed, "packed", torch.uint8, (outputs, -(-inputs * bits // 8)))
    native = _native()
    if native is None:
        return pack_lines_reference(packed, inputs, bits)
    lines = torch.empty(shape, dtype=torch.uint8)
    advise_hugepages(lines)
    native.pack_lines(packed.data_ptr(), outputs, inputs, bits, lines.data_ptr())
    return lines


def pack_scales(scales_NG: Tensor) -> Tensor:
    """Scales float32 [N, G] as they lie beside lines: [ceil(N/16), G, 16], filled up with 0;
    bfloat16 where G > 1, no scale changes by it and whole lines of 64 bytes come out."""
    outputs, groups = scales_NG.shape
    blocks = -(-outputs // BLOCK)
    padded = scales_NG.new_zeros((blocks * BLOCK, groups))
    padded[:outputs] = scales_NG
    ordered = padded.view(blocks, BLOCK, groups).transpose(1, 2).contiguous()
    if groups == 1 or blocks * groups % 2:
        return ordered
    narrow = ordered.bfloat16()
    return narrow if torch.equal(narrow.float(), ordered) else ordered


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(x8 int8 [M, K], sx float32 [M]) of float32 rows: sx = max|x| / 127, or 1 where that is 0;
    x8 = x / sx rounded half to even. A row that is not finite becomes zeros and sx = NaN."""
    _check(x_MK, "x", torch.float32, (None, None))
    M, K = x_MK.shape
    if K == 0:
        raise WeightsError(f"x {list(x_MK.shape)} has no inputs; rows must have at least 1")
    native = _ready()
    if native is None:
        return quantize_rows_reference(x_MK)
    x8, sx = torch.empty((M, K), dtype=torch.int8), torch.empty(M)
    native.quantize_rows(x_MK.data_ptr(), M, K, x8.data_ptr(), sx.data_ptr())
    return x8, sx


def gemm(weight: PackedWeight, x8_MK: Tensor, sx_M: Tensor) -> Tensor:
    """y float32 [M, N] of activations as `quantize_rows` gives them.

    Raises:
      WeightsError: they have another type, shape or layout than the weight asks for.
    """
    M = x8_MK.shape[0] if x8_MK.ndim else 0
    _check(x8_MK, "x8", torch.int8, (M, weight.inputs))
    _check(sx_M, "sx", torch.float32, (M,))
    native = _ready()
    if native is None:
        return gemm_reference(weight, x8_MK, sx_M)
    y_MN = torch.empty((M, weight.outputs))
    native.matmul(*weight._arguments, x8_MK.data_ptr(), sx_M.data_ptr(), M, y_MN.data_ptr())
    return y_MN


def linear(weight: PackedWeight, x_MK: Tensor) -> Tensor:
    """y float32 [M, N] of float32 rows: `gemm` of `quantize_rows`, in one call of the extension.

    Raises:
      WeightsError: x has another type, shape or layout than the weight asks for.
    """
    M = x_MK.shape[0] if x_MK.ndim else 0
    _check(x_MK, "x", torch.float32, (M, weight.inputs))
    native = _ready()
    if native is None:
        return gemm_reference(weight, *quantize_rows_reference(x_MK))
    y_MN = torch.empty((M, weight.outputs))
    native.linear(*weight._arguments, x_MK.data_ptr(), M, y_MN.data_ptr())
    return y_MN


def top(
    weight: PackedWeight, x_MK: Tensor, count: int, skipped: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the outputs that `linear` would give, the greatest of each row, without the others.

    Values float32 and ids int64, [M, count] each, greatest first, of equal ones the lowest id
    first; and most [M], the greatest of all. skipped: int64 ids, ascending, that are passed over
    (not by most). Where an output is NaN so is most, and values and ids mean nothing.

    Raises:
      WeightsError: x or skipped do not fit the weight, or fewer than `count` outputs are left.
    """
    M = x_MK.shape[0] if x_MK.ndim else 0
    _check(x_MK, "x", torch.float32, (M, weight.inputs))
    skipped = torch.empty(0, dtype=torch.int64) if skipped is None else skipped
    _check(skipped, "skipped", torch.int64, (None,))
    left = weight.outputs - len(skipped)
    if not 0 < count <= left:
        raise WeightsError(f"the {count} greatest of {left} outputs")
    if len(skipped) and not (
        0 <= int(skipped[0]) <= int(skipped[-1]) < weight.outputs
        and bool((skipped[1:] > skipped[:-1]).all())
    ):
        raise WeightsError(f"skipped: ids must ascend within {weight.outputs} outputs")
    native = _ready()
    if native is None:
        return top_reference(weight, x_MK, count, skipped)
    values, ids = torch.empty((M, count)), torch.empty((M, count), dtype=torch.int64)
    most_M = torch.empty(M)
    native.top(
        *weight._arguments, x_MK.data_ptr(), M, count, skipped.data_ptr(), len(skipped),
        values.data_ptr(), ids.data_ptr(), most_M.data_ptr(),
    )  # fmt: skip
    return values, ids, most_M


def linear_of(weight: PackedWeight, x_MK: Tensor, ids: Tensor) -> Tensor:
    """The outputs of int64 ids [n] alone, as `linear` would give them: float32 [M, n]. Reads the
    blocks of 16 outputs in which they lie, once each where ids ascend.

    Raises:
      WeightsError: x does not fit the weight, or an id is no output.
    """
    M = x_MK.shape[0] if x_MK.ndim else 0
    _check(x_MK, "x", torch.float32, (M, weight.inputs))
    _check(ids, "ids", torch.int64, (None,))
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < weight.outputs:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise WeightsError(f"output {wrong} of a weight of {weight.outputs}")
    native = _ready()
    if native is None:
        return gemm_reference(weight, *quantize_rows_reference(x_MK))[:, ids]
    y_Mn = torch.empty((M, len(ids)))
    native.linear_of(
        *weight._arguments, x_MK.data_ptr(), M, ids.data_ptr(), len(ids), y_Mn.data_ptr()
    )
    return y_Mn


class Layer:
    """A decoder layer of low-bit weights, but for its attention; `model.text.DecoderLayer`'s halves
    in two calls of the extension, for float32 hidden states. Needs the extension.

    Shapes: M rows, D hidden size, N query heads, K key/value heads (0: reads another layer's), H
    head size, F width of the MLP, P per-layer inputs (0: none).
    """

    __slots__ = ("_D", "_H", "_K", "_N", "_P", "_kept", "_layer")

    WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down", "ple_gate", "ple_projection")
    NORMS = ("input", "q", "k", "attention", "before_mlp", "after_mlp", "ple")
    EXPERTS = ("router", "router_norm", "scale", "before", "after_mlp", "after")

    def __init__(
        self,
        weights: Mapping[str, PackedWeight],
        norms: Mapping[str, Tensor],
        *,
        heads: int,
        head_dim: int,
        eps: float,
        scalar: float,
    ):
        """weights, norms: by WEIGHTS and NORMS; without "k" the layer owns no keys and values,
        without "v" its values are its keys, without the "ple" ones it has no per-layer inputs.

        Raises:
          WeightsError: something is missing, or the sizes do not belong together.
        """
        native = _native()
        if native is None:
            raise RuntimeError("gemsmith._native is not built; run the layer's modules instead")
        q, gate = weights["q"], weights["gate"]
        D, H, F = q.inputs, head_dim, gate.outputs
        K = weights["k"].outputs // H if "k" in weights else 0
        P = weights["ple_gate"].outputs if "ple_gate" in weights else 0
        sizes = {
            "q": (heads * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, heads * H),
            "gate": (F, D), "up": (F, D), "down": (D, F), "ple_gate": (P, D),
            "ple_projection": (D, P),
        }  # fmt: skip
        optional = (
            {"v"} | (set() if K else {"k"}) | (set() if P else {"ple_gate", "ple_projection"})
        )
        for name in self.WEIGHTS:
            found = (weights[name].outputs, weights[name].inputs) if name in weights else None
            if found != sizes[name] and not (found is None and name in optional):
                raise WeightsError(f"weight {name} of the layer is {found}, not {sizes[name]}")
        lengths = {"q": H, "k": H if K else 0, "ple": D if P else 0}
        for name in self.NORMS:
            length = lengths.get(name, D)
            if length:
                _check(norms[name], f"norm {name}", torch.float32, (length,))
        if H % 2:
            raise WeightsError(f"heads of {H} values cannot be turned in pairs")
        kept_norms = [norms.get(name) for name in self.NORMS]
        kept_weights = [weights.get(name) for name in self.WEIGHTS]
        self._kept: tuple[object, ...] = (kept_weights, kept_norms)
        """What the addresses belong to."""
        self._D, self._N, self._K, self._H, self._P = D, heads, K, H, P
        self._layer = native.layer(
            [D, heads, K, H, F, P],
            eps,
            scalar,
            [[0] * 7 if w is None else w._arguments for w in kept_weights],
            [0 if n is None else n.data_ptr() for n in kept_norms],
        )

    def add_experts(
        self,
        gate_up: Sequence[PackedWeight],
        down: Sequence[PackedWeight],
        arrays: Mapping[str, Tensor],
        *,
        top_k: int,
    ) -> None:
        """Put experts beside the MLP; gate_up [2F, D] and down [D, F] of each of the E.

        arrays: "router" [E, D]; "router_norm" [D], by which the router's normed input is
        multiplied; "scale" [E] of each expert's output; the norms [D] "before" the experts, of the
        MLP's output "after_mlp", and of theirs "after".

        Raises:
          WeightsError: the sizes do not belong together.
        """
        E, D = len(gate_up), self._D
        F = down[0].inputs if down else 0
        shapes = {(w.outputs, w.inputs) for w in gate_up}, {(w.outputs, w.inputs) for w in down}
        if shapes != ({(2 * F, D)}, {(D, F)}) or len(down) != E or not 0 < top_k <= E:
            raise WeightsError(
                f"{E} and {len(down)} experts, {top_k} at a time, of {shapes[0]} and {shapes[1]}: "
                f"each must be [2F, {D}] and [{D}, F] with one F"
            )
        sizes = {"router": (E, D), "scale": (E,)}
        for name in self.EXPERTS:
            _check(arrays[name], name, torch.float32, sizes.get(name, (D,)))
        kept = [arrays[name] for name in self.EXPERTS]
        self._kept += (list(gate_up), list(down), kept)
        native = _ready()
        assert native is not None, "the layer was made by the extension"
        native.set_experts(
            self._layer, top_k, F, [w._arguments for w in gate_up], [w._arguments for w in down],
            [array.data_ptr() for array in kept],
        )  # fmt: skip

    def before(
        self, x_MD: Tensor, cos_MR: Tensor, sin_MR: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q [M, N, H], and k and v [M, K, H] or None, normed and turned: R of the H/2 pairs of
        a head turn, by angles of these cosines and sines."""
        M, R = x_MD.shape[0], cos_MR.shape[-1]
        _check(x_MD, "x", torch.float32, (M, self._D))
        _check(cos_MR, "cos", torch.float32, (M, min(R, self._H // 2)))
        _check(sin_MR, "sin", torch.float32, (M, R))
        _ready()
        q_MNH = torch.empty((M, self._N, self._H))
        k_MKH = torch.empty((M, self._K, self._H)) if self._K else None
        v_MKH = torch.empty((M, self._K, self._H)) if self._K else None
        self._layer.before(
            x_MD.data_ptr(), M, cos_MR.data_ptr(), sin_MR.data_ptr(), R, q_MNH.data_ptr(),
            k_MKH.data_ptr() if k_MKH is not None else 0,
            v_MKH.data_ptr() if v_MKH is not None else 0,
        )  # fmt: skip
        return q_MNH, k_MKH, v_MKH

    def after(self, x_MD: Tensor, o_MNH: Tensor, ple_MP: Tensor | None) -> Tensor:
        """The layer's output [M, D] from its input and attention's output."""
        M = x_MD.shape[0]
        _check(x_MD, "x", torch.float32, (M, self._D))
        _check(o_MNH, "o", torch.float32, (M, self._N, self._H))
        place, stride = 0, 0
        if ple_MP is not None:
            if ple_MP.stride(-1) != 1 or ple_MP.dtype != torch.float32:
                ple_MP = ple_MP.float().contiguous()
            if tuple(ple_MP.shape) != (M, self._P):
                raise WeightsError(f"per-layer inputs {list(ple_MP.shape)}, not {[M, self._P]}")
            place, stride = ple_MP.data_ptr(), ple_MP.stride(0)
        elif self._P:
            raise WeightsError(f"the layer wants per-layer inputs [{M}, {self._P}]")
        _ready()
        y_MD = torch.empty((M, self._D))
        self._layer.after(
            x_MD.data_ptr(), o_MNH.data_ptr(), place, stride, M, y_MD.data_ptr()
        )  # fmt: skip
        return y_MD


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

    __slots__ = ("_arguments", "_tensors", "formats", "head_dim", "heads", "rule", "slots")

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
            _check(values, name, values.dtype, tuple(k.shape))
            if (values.dtype == torch.int8) != (scale is not None):
                raise WeightsError(f"{name} is {values.dtype}: int8 has scales, no other type does")
            if scale is not None:
                _check(scale, f"{name}_scale", torch.float32, (self.slots, self.heads))
        if rule is not None:
            _check(rule.norm_H, "norm", torch.float32, (self.head_dim,))
            pairs = len(rule.turns.frequencies_R)
            if pairs > self.head_dim // 2:
                raise WeightsError(f"{pairs} pairs of a head of {self.head_dim} cannot turn")
        self.formats = FORMATS[k.dtype], FORMATS[v.dtype]
        self._tensors = (k, v, k_scale, v_scale)
        self._arguments = tuple(
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
        _check(k_TKH, "k", torch.float32, shape)
        _check(v_TKH, "v", torch.float32, shape)
        self._room(slot, T)
        if self.formats != INT8:
            raise WeightsError("only int8 slots are written here")
        native, rows = _ready(), T * self.heads
        assert native is not None, "StoredKV needs the extension"
        k, k_scale, v, v_scale = self._arguments
        stored = ((v_TKH, v, v_scale), (k_TKH, k, k_scale))
        for x, values, scale in stored if self.rule is None else stored[:1]:
            first = slot * self.heads
            native.quantize_rows(
                x.data_ptr(), rows, self.head_dim, values + first * self.head_dim, scale + 4 * first
            )

    def _room(self, first: int, count: int) -> None:
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
    _check(q_RNH, "q", torch.float32, (R, N, kv.head_dim))
    _check(ranges_R2, "ranges", torch.int64, (R, 2))
    if N < 1 or N % kv.heads:
        raise WeightsError(f"{N} query heads do not share {kv.heads} key/value heads evenly")
    addresses: list[int] = []
    keys = sum(count for _, _, count in spans)
    for each, first, count in spans:
        each._room(first, count)
        if (each.formats, each.heads, each.head_dim) != (kv.formats, kv.heads, kv.head_dim):
            raise WeightsError("spans of different formats or shapes cannot be attended together")
        if each.rule is not kv.rule:
            raise WeightsError("spans whose keys follow other rules cannot be attended together")
        addresses += (*each._arguments, first, count)
    native = _ready()
    assert native is not None, "StoredKV needs the extension"
    y_RNH = torch.empty_like(q_RNH)
    native.attention(
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
            _check(ranges_R2, "ranges", torch.int64, (None, 2))
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
    _check(q_RNH, "q", torch.float32, (readers.rows, N, kv.head_dim))
    if N < 1 or N % kv.heads:
        raise WeightsError(f"{N} query heads do not share {kv.heads} key/value heads evenly")
    kv._room(0, readers.stop)
    native = _ready()
    assert native is not None, "StoredKV needs the extension"
    y_RNH = torch.empty_like(q_RNH)
    native.attention_of_many(
        q_RNH.data_ptr(), N, kv.heads, kv.head_dim, kv._arguments, *kv.formats,
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


class Place(NamedTuple):
    """What a layer does with the keys and values of a step, for `run_layers`."""

    into: StoredKV | None
    """Where it stores its own, None if it owns none; from `slot` on."""
    slot: int
    spans: Sequence[tuple[StoredKV, int, int]]
    ranges_R2: Tensor
    """As `attention` takes them."""


def run_layers(
    layers: Sequence[Layer],
    places: Sequence[Place],
    tables: Sequence[tuple[Tensor, Tensor]],
    x_MD: Tensor,
    ple_MLP: Tensor | None,
) -> Tensor:
    """`Layer.before`, the storing of keys and values as int8, `attention` and `Layer.after` of one
    layer after the other, in one call: the same bits, and no Python in between.

    A place, and cos and sin [M, R], for each layer; ple_MLP: the per-layer inputs of them all.

    Raises:
      WeightsError: sizes, types or slots that do not belong together.
    """
    M, D = x_MD.shape
    _check(x_MD, "x", torch.float32, (M, layers[0]._D))
    P = layers[0]._P
    ple, stride = 0, 0
    if P:
        shape = (M, len(layers), P)
        if ple_MLP is None:
            raise WeightsError(f"the layers want per-layer inputs {list(shape)}")
        if tuple(ple_MLP.shape) != shape:
            raise WeightsError(f"per-layer inputs {list(ple_MLP.shape)}, not {list(shape)}")
        if ple_MLP.stride()[1:] != (P, 1) or ple_MLP.dtype != torch.float32:
            ple_MLP = ple_MLP.float().contiguous()
        ple, stride = ple_MLP.data_ptr(), ple_MLP.stride(0)
    fields: list[list[int]] = []
    for layer, place, (cos_MR, sin_MR) in zip(layers, places, tables, strict=True):
        R, H = cos_MR.shape[-1], layer._H
        _check(cos_MR, "cos", torch.float32, (M, min(R, H // 2)))
        _check(sin_MR, "sin", torch.float32, (M, R))
        _check(place.ranges_R2, "ranges", torch.int64, (M, 2))
        if (place.into is None) != (layer._K == 0):
            raise WeightsError(f"a layer of {layer._K} key/value heads was given {place.into}")
        if not place.spans:
            raise WeightsError("a layer needs keys: no spans were given")
        heads = place.spans[0][0].heads
        own = [] if place.into is None else [(place.into, place.slot, M)]
        for (kv, start, count), wanted in zip(
            (*own, *place.spans), [layer._K] * len(own) + [heads] * len(place.spans), strict=True
        ):
            kv._room(start, count)
            if kv.formats != INT8 or kv.rule or (kv.heads, kv.head_dim) != (wanted, H):
                raise WeightsError(
                    f"keys and values [{kv.heads}, {kv.head_dim}] of formats {kv.formats}; "
                    f"the layer runs on int8 [{wanted}, {H}]"
                )
        if layer._N % heads:
            raise WeightsError(f"{layer._N} query heads do not share {heads} key/value heads")
        into = (0, 0, 0, 0) if place.into is None else place.into._arguments
        addresses = (place.ranges_R2.data_ptr(), cos_MR.data_ptr(), sin_MR.data_ptr())
        fields.append([*into, place.slot, heads, *addresses, R])
        for kv, start, count in place.spans:
            fields[-1] += (*kv._arguments, start, count)
    native = _ready()
    assert native is not None, "the layers were made by the extension"
    y_MD = torch.empty((M, D))
    native.run_layers(
        [layer._layer for layer in layers], fields, x_MD.data_ptr(), ple, stride, M,
        y_MD.data_ptr(),
    )  # fmt: skip
    return y_MD


def advise_hugepages(tensor: Tensor) -> bool:
    """Ask for 2 MiB pages behind a large tensor, before it is written: weights stream about a tenth
    faster from them. False where that cannot be (another system than Linux, memory too small)."""
    native = _native()
    return bool(native and native.advise_hugepages(tensor.data_ptr(), tensor.nbytes))


def read_memory(tensor: Tensor) -> int:
    """Read a tensor's whole 64-byte lines with all threads, and return the sum of their 64-bit
    words modulo 2^64: what no product can do faster. Needs the extension.

    Raises:
      WeightsError: it is not contiguous on the CPU.
    """
    _check(tensor, "memory", tensor.dtype, tuple(tensor.shape))
    native = _ready()
    if native is None:
        raise RuntimeError("gemsmith._native is not built, and torch cannot read memory that fast")
    return native.read_memory(tensor.data_ptr(), tensor.nbytes)


def checksum(tensor: Tensor) -> int:
    """64 bits that any change of the tensor's bytes changes, all but surely; no defence against
    malice. Needs the extension; the bytes must be a multiple of 64.

    Raises:
      WeightsError: it is not contiguous on the CPU, or of another size.
    """
    _check(tensor, "memory", tensor.dtype, tuple(tensor.shape))
    native = _ready()
    if native is None or tensor.nbytes % LINE:
        raise WeightsError(f"no checksum of {tensor.nbytes} bytes: lines of {LINE} are summed")
    return native.checksum(tensor.data_ptr(), tensor.nbytes)


def _check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """The extension sees addresses alone, so nothing wrong may pass; None in shape: any size."""
    fits = tensor.shape == shape or (
        len(shape) == tensor.ndim
        and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    )
    if fits and tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise WeightsError(
                f"{name} asks for a gradient, and low-bit products give none; "
                "use torch.no_grad(), or weights of 16 bits"
            )
        return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise WeightsError(
        f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        f"{'' if tensor.is_contiguous() else ', not contiguous'}; "
        f"it must be contiguous {dtype} [{wanted}] on cpu"
    )


def pack_lines_reference(packed: Tensor, inputs: int, bits: int) -> Tensor:
    """`pack_lines` by torch."""
    outputs, fields = packed.shape[0], 8 // bits
    blocks, count, _ = lines_shape(outputs, inputs, bits)
    codes = _fields(packed, bits).transpose(1, 2).reshape(outputs, -1)[:, :inputs]
    padded = codes.new_full((blocks * BLOCK, count * 4 * fields), 1 << (bits - 1))
    padded[:outputs, :inputs] = codes
    # [block, row, line, field, i] -> [block, line, field, row, i]
    ordered = padded.view(blocks, BLOCK, count, fields, 4).permute(0, 2, 3, 1, 4)
    lines = torch.zeros((blocks, count, BLOCK, 4), dtype=torch.uint8)
    for field in range(fields):
        lines |= ordered[:, :, field] << (field * bits)
    return lines.view(blocks, count, LINE)


def unpack_lines(lines: Tensor, outputs: int, inputs: int, bits: int) -> Tensor:
    """q int8 [N, K] of lines."""
    blocks, count, _ = lines.shape
    # [block, line, field, row, i] -> [block, row, line, field, i]
    codes = _fields(lines, bits).view(blocks, count, 8 // bits, BLOCK, 4).permute(0, 3, 1, 2, 4)
    codes = codes.reshape(blocks * BLOCK, -1)[:outputs, :inputs]
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def unpack_rows_reference(weight: PackedWeight, ids: Tensor) -> Tensor:
    """`PackedWeight.rows` by torch."""
    block, row = ids // BLOCK, ids % BLOCK
    at = (torch.arange(len(ids)) * BLOCK + row).long()
    q_nK = unpack_lines(weight.lines[block], len(ids) * BLOCK, weight.inputs, weight.bits)[at]
    scales_nG = weight.scales[block].float().transpose(1, 2).flatten(0, 1)[at]
    return (q_nK.view(len(ids), scales_nG.shape[1], -1) * scales_nG[..., None]).flatten(1)


def _fields(packed: Tensor, bits: int) -> Tensor:
    """[..., f, bytes]: the first, second, ... code of every byte."""
    shifts = range(0, 8, bits)
    return torch.stack([packed >> shift & ((1 << bits) - 1) for shift in shifts], dim=-2)


def quantize_rows_reference(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` by torch."""
    finite_M1 = x_MK.isfinite().all(dim=1, keepdim=True)
    x_MK = x_MK.where(finite_M1, 0)
    sx_M1 = x_MK.abs().amax(dim=1, keepdim=True) / 127
    sx_M1 = sx_M1.where(sx_M1 != 0, 1)
    x8_MK = (x_MK / sx_M1).round().clamp(-127, 127).to(torch.int8)
    return x8_MK, sx_M1.where(finite_M1, torch.nan)[:, 0]


def gemm_reference(weight: PackedWeight, x8_MK: Tensor, sx_M: Tensor) -> Tensor:
    """`gemm` by torch, some blocks of outputs at a time; float64 holds every inner sum exactly."""
    M, K = x8_MK.shape
    outputs, groups = weight.outputs, weight.scales.shape[1]
    x_GMg = x8_MK.double().view(M, groups, K // groups).transpose(0, 1)
    y_MN = torch.empty((M, outputs))
    step = max(1, REFERENCE_CODES // (BLOCK * K))
    for first in range(0, weight.lines.shape[0], step):
        start, stop = first * BLOCK, min((first + step) * BLOCK, outputs)
        q_nK = unpack_lines(weight.lines[first : first + step], stop - start, K, weight.bits)
        w_Ggn = q_nK.double().view(stop - start, groups, -1).permute(1, 2, 0)
        scale_Gn = weight.scales[first : first + step].float().transpose(0, 1).reshape(groups, -1)
        total_Mn = torch.zeros((M, stop - start))
        for sums_Mn, scale_n in zip(x_GMg @ w_Ggn, scale_Gn[:, : stop - start], strict=True):
            total_Mn += sums_Mn.float() * scale_n
        y_MN[:, start:stop] = total_Mn * sx_M[:, None]
    return y_MN


def top_reference(
    weight: PackedWeight, x_MK: Tensor, count: int, skipped: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`top` by torch."""
    y_MN = gemm_reference(weight, *quantize_rows_reference(x_MK))
    most_M = y_MN.amax(1)
    y_MN.index_fill_(1, skipped, -torch.inf)
    values, ids = y_MN.sort(dim=1, descending=True, stable=True)
    return values[:, :count].contiguous(), ids[:, :count].contiguous(), most_M
