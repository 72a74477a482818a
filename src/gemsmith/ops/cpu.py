"""Products of low-bit weights with int8 activations on the CPU.

The C++ extension (native.py) does them where it could be built; torch does elsewhere, with the same
bits and much slower (`gemm_reference` and its kin, the oracle in tests). Which weights are
quantized, and how, is not known here.

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

Scale steps: the scales of a row are integers, `multiple[n, g]` from -15 to 15, times one `step[n]`.
Then scales is int8 [ceil(N/16), 4 + G up to a multiple of 4, 16]: the 16 steps as float32 in the
first four rows, multiples in the next G, zeros. A byte a group, and all sums are exact:

    y[m, n] = sx[m] * (step[n] * float32(sum over g of multiple[n, g] * (sum over k in g of ...)))
"""

from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops import native
from gemsmith.ops.native import LINE

BLOCK = 16
"""Rows of a weight whose codes stand together in a line."""
MAX_INPUTS = 65536
"""Sums of 255 * 128 over more inputs than this pass 32 bits."""
MOST_MULTIPLE = 15
"""Of a step: times a code of 4 bits it still fits 8."""
STEP_ROWS = LINE // BLOCK
"""Rows of packed scales that hold the steps; as many multiples fill a line."""
STEPS_AT_ONCE = 1 << 16
"""Scales that are divided into steps together: what that takes stays in cache."""
REFERENCE_CODES = 1 << 22
"""Weights that torch widens to float64 at once: 32 MiB."""


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


def takes_steps(bits: int, group: int | None) -> bool:
    """Whether scales may be steps: a group's sum of q * x8 fits 16 bits, as kernels take it."""
    return group is not None and group * 127 << (bits - 1) < 1 << 15


def steps_of(scales_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Multiples int8 [N, G] and steps float32 [N] of scales that are steps: the step of a row is
    the largest that divides all its scales, 1 where these are 0. Leading dimensions are rows, too.

    Raises:
      WeightsError: a row's scales are no values of bfloat16, or not -15 to 15 times one step.
    """
    *lead, G = scales_NG.shape
    flat_NG = scales_NG.reshape(-1, G).float()
    multiples_NG, steps_N = torch.empty_like(flat_NG, dtype=torch.int8), torch.empty(len(flat_NG))
    rows = max(1, STEPS_AT_ONCE // G)
    for start in range(0, len(flat_NG), rows):
        part_nG = flat_NG[start : start + rows]
        multiples_nG, step_n1 = _divided(part_nG)
        wrong_n = (multiples_nG.abs() > MOST_MULTIPLE) | (multiples_nG * step_n1 != part_nG)
        if wrong_n.any():
            row = start + int(wrong_n.any(-1).nonzero()[0])
            raise WeightsError(
                f"scales of row {row} are not whole multiples, up to {MOST_MULTIPLE}, of one step"
            )
        multiples_NG[start : start + rows] = multiples_nG
        steps_N[start : start + rows] = step_n1[:, 0]
    return multiples_NG.view(*lead, G), steps_N.view(lead)


def _divided(scales_NG: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [N, G] and float32 [N, 1]: what their product is of, if any two numbers are."""
    there_NG = scales_NG != 0
    fraction_NG, exponent_NG = torch.frexp(scales_NG.where(scales_NG.isfinite(), 0))
    least_N1 = exponent_NG.where(there_NG, 1 << 10).amin(-1, keepdim=True)
    # In units of the last of the smallest's 8 bits; none of the others is 2^4 times the smallest.
    raised_NG = (exponent_NG - least_N1).clamp(0, 4)
    whole_NG = torch.ldexp(fraction_NG, 8 + raised_NG).where(there_NG, 0).to(torch.int32)
    divisor_N1 = _common_divisor(whole_NG)
    step_N1 = torch.ldexp(divisor_N1.float(), least_N1 - 8)
    return whole_NG // divisor_N1, step_N1.where(there_NG.any(-1, True), 1)


def _common_divisor(values_NG: Tensor) -> Tensor:
    """The greatest of each row [N, 1]; 1 where all are 0."""
    while values_NG.shape[1] > 1:
        half = values_NG.shape[1] // 2
        rest_NG = values_NG[:, 2 * half :]
        pairs_NG = torch.gcd(values_NG[:, :half], values_NG[:, half : 2 * half])
        values_NG = torch.cat([pairs_NG, rest_NG], dim=1)
    return values_NG.abs().where(values_NG != 0, 1)


class PackedWeight:
    """A weight [N, K] as the kernels read it. Checked once, here: products only look at x.

    The tensors are kept, not copied (they may be mapped from a file), and must not be resized.
    """

    __slots__ = ("arguments", "bits", "group", "inputs", "lines", "outputs", "scales")

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
        native.check(lines, "lines", torch.uint8, shape)
        groups = groups_of(inputs, group)
        dtype = torch.float32
        if groups > 1 and scales.dtype in (torch.bfloat16, torch.int8):
            dtype = scales.dtype
        if dtype == torch.int8 and not takes_steps(bits, group):
            raise WeightsError(f"{bits} bits in groups of {group} cannot have scale steps")
        native.check(scales, "scales", dtype, scales_shape(shape[0], groups, dtype))
        self.lines, self.scales = lines, scales
        self.outputs, self.inputs, self.bits, self.group = outputs, inputs, bits, group
        self.arguments = (
            lines.data_ptr(), scales.data_ptr(), outputs, inputs, bits, group or 0,
            8 * dtype.itemsize,
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
        steps: bool = False,
    ) -> Self:
        """From codes as `pack_lines` takes them and scales float32 [N, G], which are to be steps or
        not."""
        lines = pack_lines(packed, inputs, bits)
        outputs = packed.shape[0]
        native.check(scales_NG, "scales", torch.float32, (outputs, groups_of(inputs, group)))
        scales = pack_steps(scales_NG) if steps else pack_scales(scales_NG)
        return cls(lines, scales, outputs=outputs, inputs=inputs, bits=bits, group=group)

    @property
    def nbytes(self) -> int:
        """Bytes that a product of few rows reads."""
        return self.lines.nbytes + self.scales.nbytes

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return groups_of(self.inputs, self.group)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, K]: the rows (outputs) of int64 ids [n], each q * scale.

        Raises:
          WeightsError: an id is negative or not below the outputs.
        """
        native.check(ids, "ids", torch.int64, (None,))
        if (wrong := _stray(ids, self.outputs)) is not None:
            raise WeightsError(
                f"row {wrong} of a table of {self.outputs}; the tokenizer belongs to another model"
            )
        kernels = native.ready()
        if kernels is None:
            return unpack_rows_reference(self, ids)
        out = torch.empty((len(ids), self.inputs))
        kernels.unpack_rows(
            self.lines.data_ptr(), self.scales.data_ptr(), self.inputs, self.bits,
            self.group or 0, 8 * self.scales.itemsize, ids.data_ptr(), len(ids), out.data_ptr(),
        )  # fmt: skip
        return out


def dequantize(packed: Tensor, scales_NG: Tensor, bits: int) -> Tensor:
    """float32 [N, K], each q * scale, of codes as `pack_lines` takes them, rows of whole bytes, and
    scales float32 [N, G]. Needs the extension.

    Raises:
      WeightsError: bits other than 2, 4, 8; another type, shape or layout; groups that do not
        divide the rows.
    """
    if bits not in (2, 4, 8):
        raise WeightsError(f"codes of {bits} bits are not packed; 2, 4 and 8 are")
    (N, G), K = scales_NG.shape, packed.shape[-1] * 8 // bits
    native.check(packed, "packed", torch.uint8, (N, K * bits // 8))
    native.check(scales_NG, "scales", torch.float32, (N, G))
    if not G or K % G:
        raise WeightsError(f"{G} groups do not divide rows of {K} codes")
    kernels = native.ready()
    assert kernels is not None, "ask `native.available` first"
    out_NK = torch.empty((N, K))
    kernels.dequantize(
        packed.data_ptr(), scales_NG.data_ptr(), N, K, bits, K // G, out_NK.data_ptr()
    )
    return out_NK


def pack_lines(packed: Tensor, inputs: int, bits: int) -> Tensor:
    """Lines of a weight given as uint8 [N, ceil(K*b/8)]: codes u, consecutive ones in a byte,
    the first in the lowest bits. Outputs and inputs that fill up the lines hold q = 0."""
    outputs = packed.shape[0] if packed.ndim == 2 else 0
    shape = lines_shape(outputs, inputs, bits)
    native.check(packed, "packed", torch.uint8, (outputs, -(-inputs * bits // 8)))
    kernels = native.extension()
    if kernels is None:
        return pack_lines_reference(packed, inputs, bits)
    lines = torch.empty(shape, dtype=torch.uint8)
    native.advise_hugepages(lines)
    kernels.pack_lines(packed.data_ptr(), outputs, inputs, bits, lines.data_ptr())
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


def pack_steps(scales_NG: Tensor) -> Tensor:
    """Scales [N, G] that are steps as they lie beside lines: int8, steps first.

    Raises: as `steps_of`.
    """
    multiples_NG, steps_N = steps_of(scales_NG)
    N, G = scales_NG.shape
    blocks = -(-N // BLOCK)
    steps = torch.zeros(blocks * BLOCK)
    steps[:N] = steps_N
    padded = multiples_NG.new_zeros((blocks * BLOCK, -(-G // STEP_ROWS) * STEP_ROWS))
    padded[:N, :G] = multiples_NG
    multiples = padded.view(blocks, BLOCK, -1).transpose(1, 2)
    return torch.cat([steps.view(torch.int8).view(blocks, STEP_ROWS, BLOCK), multiples], dim=1)


def scales_shape(blocks: int, groups: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Of the scales beside lines; int8: steps."""
    if dtype == torch.int8:
        groups = STEP_ROWS + -(-groups // STEP_ROWS) * STEP_ROWS
    return blocks, groups, BLOCK


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(x8 int8 [M, K], sx float32 [M]) of float32 rows: sx = max|x| / 127, or 1 where that is 0;
    x8 = x / sx rounded half to even. A row that is not finite becomes zeros and sx = NaN."""
    native.check(x_MK, "x", torch.float32, (None, None))
    M, K = x_MK.shape
    if K == 0:
        raise WeightsError(f"x {list(x_MK.shape)} has no inputs; rows must have at least 1")
    kernels = native.ready()
    if kernels is None:
        return quantize_rows_reference(x_MK)
    x8, sx = torch.empty((M, K), dtype=torch.int8), torch.empty(M)
    kernels.quantize_rows(x_MK.data_ptr(), M, K, x8.data_ptr(), sx.data_ptr())
    return x8, sx


def gemm(weight: PackedWeight, x8_MK: Tensor, sx_M: Tensor) -> Tensor:
    """y float32 [M, N] of activations as `quantize_rows` gives them: none is -128.

    Raises:
      WeightsError: they have another type, shape or layout than the weight asks for.
    """
    M = x8_MK.shape[0] if x8_MK.ndim else 0
    native.check(x8_MK, "x8", torch.int8, (M, weight.inputs))
    native.check(sx_M, "sx", torch.float32, (M,))
    kernels = native.ready()
    if kernels is None:
        return gemm_reference(weight, x8_MK, sx_M)
    y_MN = torch.empty((M, weight.outputs))
    kernels.matmul(*weight.arguments, x8_MK.data_ptr(), sx_M.data_ptr(), M, y_MN.data_ptr())
    return y_MN


def linear(weight: PackedWeight, x_MK: Tensor) -> Tensor:
    """y float32 [M, N] of float32 rows: `gemm` of `quantize_rows`, in one call of the extension.

    Raises:
      WeightsError: x has another type, shape or layout than the weight asks for.
    """
    M = x_MK.shape[0] if x_MK.ndim else 0
    native.check(x_MK, "x", torch.float32, (M, weight.inputs))
    kernels = native.ready()
    if kernels is None:
        return gemm_reference(weight, *quantize_rows_reference(x_MK))
    y_MN = torch.empty((M, weight.outputs))
    kernels.linear(*weight.arguments, x_MK.data_ptr(), M, y_MN.data_ptr())
    return y_MN


def tiles_bfloat16() -> bool:
    """Whether `linear_bfloat16` is fast for any number of bfloat16 rows."""
    return native.isa() in ("avx512vnni", "amx")


def linear_bfloat16(weight_NK: Tensor, x_MK: Tensor) -> Tensor:
    """y [M, N] of rows and a bfloat16 weight, widened on the way: float32, or rounded to bfloat16
    where x is. A row has the same bits whatever rows come with it, an output whatever others.
    Needs the extension.

    Raises:
      WeightsError: another type, shape or layout.
    """
    N, K = weight_NK.shape if weight_NK.ndim == 2 else (0, 0)
    M = x_MK.shape[0] if x_MK.ndim else 0
    native.check(weight_NK, "weight", torch.bfloat16, (N, K))
    dtype = torch.bfloat16 if x_MK.dtype == torch.bfloat16 else torch.float32
    native.check(x_MK, "x", dtype, (M, K))
    kernels = native.ready()
    assert kernels is not None, "ask `native.available` first"
    y_MN = torch.empty((M, N), dtype=dtype)
    kernels.linear_bfloat16(
        weight_NK.data_ptr(), N, K, x_MK.data_ptr(), 8 * dtype.itemsize, M, y_MN.data_ptr()
    )
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
    native.check(x_MK, "x", torch.float32, (M, weight.inputs))
    skipped = checked_skips(weight, count, skipped)
    kernels = native.ready()
    if kernels is None:
        return top_reference(weight, x_MK, count, skipped)
    values, ids = torch.empty((M, count)), torch.empty((M, count), dtype=torch.int64)
    most_M = torch.empty(M)
    kernels.top(
        *weight.arguments, x_MK.data_ptr(), M, count, skipped.data_ptr(), len(skipped),
        values.data_ptr(), ids.data_ptr(), most_M.data_ptr(),
    )  # fmt: skip
    return values, ids, most_M


def checked_skips(weight: PackedWeight, count: int, skipped: Tensor | None) -> Tensor:
    """The ids that `top` passes over.

    Raises:
      WeightsError: they do not ascend or are no outputs, or fewer than `count` others are left.
    """
    skipped = torch.empty(0, dtype=torch.int64) if skipped is None else skipped
    native.check(skipped, "skipped", torch.int64, (None,))
    left = weight.outputs - len(skipped)
    if not 0 < count <= left:
        raise WeightsError(f"the {count} greatest of {left} outputs")
    passed = skipped.tolist()
    if passed and not (
        0 <= passed[0] <= passed[-1] < weight.outputs
        and all(low < high for low, high in pairwise(passed))
    ):
        raise WeightsError(f"skipped: ids must ascend within {weight.outputs} outputs")
    return skipped


def linear_of(weight: PackedWeight, x_MK: Tensor, ids: Tensor) -> Tensor:
    """The outputs of int64 ids [n] alone, as `linear` would give them: float32 [M, n]. Reads the
    blocks of 16 outputs in which they lie, once each where ids ascend.

    Raises:
      WeightsError: x does not fit the weight, or an id is no output.
    """
    M = x_MK.shape[0] if x_MK.ndim else 0
    native.check(x_MK, "x", torch.float32, (M, weight.inputs))
    native.check(ids, "ids", torch.int64, (None,))
    if (wrong := _stray(ids, weight.outputs)) is not None:
        raise WeightsError(f"output {wrong} of a weight of {weight.outputs}")
    kernels = native.ready()
    if kernels is None:
        return gemm_reference(weight, *quantize_rows_reference(x_MK))[:, ids]
    y_Mn = torch.empty((M, len(ids)))
    kernels.linear_of(
        *weight.arguments, x_MK.data_ptr(), M, ids.data_ptr(), len(ids), y_Mn.data_ptr()
    )
    return y_Mn


def _stray(ids: Tensor, outputs: int) -> int | None:
    """An id that is none of so many outputs; None if there is none."""
    if not len(ids):
        return None
    listed = ids.tolist()
    low, high = min(listed), max(listed)
    return low if low < 0 else high if high >= outputs else None


# -- the same by torch ------------------------------------------------------------------------


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
    scales_nG = _floats(weight)[block].transpose(1, 2).flatten(0, 1)[at]
    return (q_nK.view(len(ids), scales_nG.shape[1], -1) * scales_nG[..., None]).flatten(1)


def _stepped(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Multiples [blocks, G, 16] and steps float32 [blocks, 16] of a weight that has them."""
    steps, multiples = weight.scales.split([STEP_ROWS, weight.scales.shape[1] - STEP_ROWS], dim=1)
    return multiples[:, : weight.groups], steps.flatten(1).contiguous().view(torch.float32)


def _floats(weight: PackedWeight) -> Tensor:
    """Scales float32 [blocks, G, 16]."""
    if weight.scales.dtype != torch.int8:
        return weight.scales.float()
    multiples, steps = _stepped(weight)
    return multiples * steps[:, None]


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
    outputs, groups = weight.outputs, weight.groups
    by, steps = _floats(weight), None
    if weight.scales.dtype == torch.int8:
        by, steps = _stepped(weight)
    x_GMg = x8_MK.double().view(M, groups, K // groups).transpose(0, 1)
    y_MN = torch.empty((M, outputs))
    step = max(1, REFERENCE_CODES // (BLOCK * K))
    for first in range(0, weight.lines.shape[0], step):
        start, stop = first * BLOCK, min((first + step) * BLOCK, outputs)
        q_nK = unpack_lines(weight.lines[first : first + step], stop - start, K, weight.bits)
        w_Ggn = q_nK.double().view(stop - start, groups, -1).permute(1, 2, 0)
        by_Gn = by[first : first + step].transpose(0, 1).reshape(groups, -1)[:, : stop - start]
        if steps is None:
            total_Mn = torch.zeros((M, stop - start))
            for sums_Mn, scale_n in zip(x_GMg @ w_Ggn, by_Gn, strict=True):
                total_Mn += sums_Mn.float() * scale_n
        else:
            exact_Mn = (x_GMg @ w_Ggn * by_Gn[:, None]).sum(0)
            total_Mn = exact_Mn.float() * steps[first : first + step].flatten()[: stop - start]
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
