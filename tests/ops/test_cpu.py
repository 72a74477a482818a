"""Low-bit products: the extension against torch on every instruction set, and what is refused.

Without the extension the same tests hold torch's own code to plain Python arithmetic.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import needs_extension
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops import cpu, native

BITS = (2, 4, 8)


def random_codes(outputs: int, inputs: int, bits: int, seed: int = 0) -> Tensor:
    """q int8 [N, K] over the whole range."""
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (outputs, inputs), generator=generator, dtype=torch.int8)


def packed_codes(q_NK: Tensor, bits: int) -> Tensor:
    """uint8 [N, ceil(K*b/8)], by plain Python."""
    rows: list[list[int]] = []
    for row in q_NK.tolist():
        number = sum((q + (1 << (bits - 1))) << (bits * k) for k, q in enumerate(row))
        rows.append(list(number.to_bytes(-(-len(row) * bits // 8), "little")))
    return torch.tensor(rows, dtype=torch.uint8)


class Weight:
    """A random weight, or q given, as codes and packed; its rows `repeat` times over. narrow: with
    scales that bfloat16 holds. steps: with scales that are multiples of a step of their row."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        bits: int,
        group: int | None = None,
        *,
        q: Tensor | None = None,
        repeat: int = 1,
        narrow: bool = False,
        steps: bool = False,
    ):
        q = random_codes(outputs, inputs, bits) if q is None else q
        groups = cpu.groups_of(inputs, group)
        generator = torch.Generator().manual_seed(1)
        self.q = q.repeat(repeat, 1)
        self.scales_NG = torch.rand(outputs * repeat, groups, generator=generator) - 0.5
        if narrow:
            self.scales_NG = self.scales_NG.bfloat16().float()
        if steps:
            shape = self.scales_NG.shape
            multiples_NG = torch.randint(-15, 16, shape, generator=generator)
            step_N1 = torch.randint(8, 16, (shape[0], 1), generator=generator) / 2**10
            self.scales_NG = multiples_NG * step_N1
        codes = packed_codes(q, bits).repeat(repeat, 1)
        self.packed = cpu.PackedWeight.pack(
            codes, self.scales_NG, inputs=inputs, bits=bits, group=group, steps=steps
        )

    def times(self, x8: Tensor, sx: Tensor) -> Tensor:
        return cpu.gemm(self.packed, x8, sx)

    def plainly(self, x8: Tensor, sx: Tensor) -> Tensor:
        """The definition, from the codes: exact sums (float64 holds them), float32 steps."""
        groups = self.scales_NG.shape[1]
        x, q = (t.double().view(t.shape[0], groups, -1) for t in (x8, self.q))
        total = torch.zeros(x8.shape[0], len(self.q))
        for g in range(groups):
            total = total + (x[:, g] @ q[:, g].T).float() * self.scales_NG[:, g]
        return total * sx[:, None]

    def plainly_with_steps(self, x8: Tensor, sx: Tensor) -> Tensor:
        """The definition for scale steps, by Python's integers."""
        groups = self.scales_NG.shape[1]
        y = torch.zeros(len(x8), len(self.q))
        for n, (row, scales) in enumerate(zip(self.q, self.scales_NG.tolist(), strict=True)):
            whole = [int(scale * 2**40) for scale in scales]
            divisor = math.gcd(*whole) or 1
            multiples = torch.tensor([each // divisor for each in whole])
            by = row.long() * multiples.repeat_interleave(len(row) // groups)
            exact = (x8.long() @ by).float()
            y[:, n] = sx * (exact * (divisor / 2**40 if any(whole) else 1))
        return y


def activations(rows: int, inputs: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x8 = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
    return x8, torch.rand(rows, generator=generator) * 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 37), (33, 70), (5, 130)])
def test_lines_hold_the_codes_where_the_layout_says(shape: tuple[int, int], bits: int):
    q = random_codes(*shape, bits)
    lines = cpu.pack_lines(packed_codes(q, bits), shape[1], bits)
    fields = 8 // bits
    assert lines.shape == cpu.lines_shape(*shape, bits)
    for n in range(lines.shape[0] * 16):
        for k in range(lines.shape[1] * 4 * fields):
            line, rest = divmod(k, 4 * fields)
            field, i = divmod(rest, 4)
            byte = int(lines[n // 16, line, 4 * (n % 16) + i])
            code = byte >> (field * bits) & ((1 << bits) - 1)
            there = n < shape[0] and k < shape[1]
            assert code - (1 << (bits - 1)) == (int(q[n, k]) if there else 0)
    assert torch.equal(cpu.unpack_lines(lines, *shape, bits), q)
    assert torch.equal(cpu.pack_lines_reference(packed_codes(q, bits), shape[1], bits), lines)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 23, 41])
def test_any_number_of_rows_gives_the_defined_bits(isa: str, rows: int, bits: int):
    w = Weight(37, 131, bits)
    x8, sx = activations(rows, 131)
    assert torch.equal(w.times(x8, sx), w.plainly(x8, sx))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 19, 29])
@pytest.mark.parametrize("narrow", [False, True])
def test_grouped_scales_give_the_defined_bits(
    isa: str, narrow: bool, rows: int, group: int, bits: int
):
    w = Weight(24, 384, bits, group, narrow=narrow)
    assert w.packed.scales.dtype == (torch.bfloat16 if narrow and group < 384 else torch.float32)
    x8, sx = activations(rows, 384)
    assert torch.equal(w.times(x8, sx), w.plainly(x8, sx))


def test_scales_of_groups_are_narrow_where_that_changes_nothing():
    w = Weight(32, 128, 4, 32, narrow=True)
    assert w.packed.nbytes == 32 * 128 // 2 + 32 * 4 * 2
    assert torch.equal(w.packed.scales.float(), cpu.pack_scales(w.scales_NG).float())
    x8, sx = activations(3, 128)
    assert torch.equal(cpu.gemm_reference(w.packed, x8, sx), w.plainly(x8, sx))
    rows = torch.tensor([0, 31, 7])
    grouped = w.q[rows].float().view(3, 4, 32) * w.scales_NG[rows][..., None]
    assert torch.equal(w.packed.rows(rows), grouped.flatten(1))
    changed = w.scales_NG.clone()
    changed[31, 3] = 0.1
    assert cpu.pack_scales(changed).dtype == torch.float32
    assert cpu.pack_scales(w.scales_NG[:, :1]).dtype == torch.float32
    odd = Weight(16, 96, 4, 32, narrow=True)  # 96 bytes: no whole lines
    assert odd.packed.scales.dtype == torch.float32


STEPPED = [(24, 384, 4, 32), (37, 96, 4, 32), (16, 224, 2, 32), (33, 192, 2, 96), (5, 256, 2, 128)]
"""Outputs, inputs, bits and groups of weights that can have scale steps."""


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 23, 24, 47, 101])
@pytest.mark.parametrize("shape", STEPPED, ids=str)
def test_scale_steps_give_the_defined_bits(isa: str, threads: int, shape: Any, rows: int):
    w = Weight(*shape, steps=True)
    x8, sx = activations(rows, shape[1])
    x8.clamp_(min=-127)
    expected = w.plainly_with_steps(x8, sx)
    assert torch.equal(cpu.gemm_reference(w.packed, x8, sx), expected)
    assert torch.equal(w.times(x8, sx), expected)


@pytest.mark.parametrize("rows", [3, 151])
def test_scale_steps_of_a_large_weight_by_several_threads(isa: str, threads: int, rows: int):
    w = Weight(8, 4096, 4, 32, repeat=130, steps=True)
    x8, sx = activations(rows, 4096)
    x8.clamp_(min=-127)
    assert torch.equal(w.times(x8, sx), cpu.gemm_reference(w.packed, x8, sx))


@pytest.mark.parametrize("x", [-127, 127])
@pytest.mark.parametrize("multiple", [-15, 15])
@pytest.mark.parametrize("rows", [1, 4, 16, 40])
def test_the_largest_sums_with_steps_do_not_wrap(isa: str, rows: int, multiple: int, x: int):
    """15 * 8 * 127 * 65536 is below 2^31, a group's 8 * 127 * 32 below 2^15."""
    for bits, group in ((4, 32), (2, 128)):
        K, low = cpu.MAX_INPUTS, -(1 << (bits - 1))
        packed, scales = torch.zeros(3, K * bits // 8, dtype=torch.uint8), torch.ones(3, K // group)
        scales[:, 1:] = multiple  # one is 1, so that this is no step itself
        w = cpu.PackedWeight.pack(packed, scales, inputs=K, bits=bits, group=group, steps=True)
        y = cpu.gemm(w, torch.full((rows, K), x, dtype=torch.int8), torch.ones(rows))
        exact = low * x * (multiple * (K - group) + group)
        assert torch.equal(y, torch.full((rows, 3), float(exact)))


def test_steps_take_a_byte_a_group_and_a_line_a_block():
    w = Weight(37, 224, 4, 32, steps=True).packed
    assert w.scales.dtype == torch.int8
    assert w.nbytes == 3 * (28 * 64 + 64 + 8 * 16)
    assert w.scales.nbytes % 64 == 0


def test_rows_of_a_weight_with_steps_are_codes_times_scales(isa: str):
    w = Weight(37, 224, 4, 32, steps=True)
    ids = torch.tensor([36, 0, 15, 16, 36])
    expected = (w.q[ids].float().view(5, 7, 32) * w.scales_NG[ids][..., None]).flatten(1)
    assert torch.equal(w.packed.rows(ids), expected)
    assert torch.equal(cpu.unpack_rows_reference(w.packed, ids), expected)
    many = ids.repeat(40)  # more than one thread takes alone
    assert torch.equal(w.packed.rows(many), expected.repeat(40, 1))


@pytest.mark.parametrize("rows", [2, 40])
def test_parts_of_a_head_with_steps_are_those_of_the_whole(isa: str, threads: int, rows: int):
    w = Weight(2500, 96, 4, 32, repeat=2, steps=True)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(3))
    whole = cpu.gemm_reference(w.packed, *cpu.quantize_rows_reference(x))
    assert torch.equal(cpu.linear(w.packed, x), whole)
    values, ids, most = cpu.top(w.packed, x, 9)
    expected = whole.sort(dim=1, descending=True, stable=True)
    assert torch.equal(most, whole.amax(1))
    assert torch.equal(values, expected.values[:, :9])
    assert torch.equal(ids, expected.indices[:, :9])
    chosen = torch.tensor([4999, 16, 17, 2500, 15])
    assert torch.equal(cpu.linear_of(w.packed, x, chosen), whole[:, chosen])


def test_steps_are_the_largest_that_divide_a_row():
    scales = torch.tensor([[6.0, -9, 0], [0, 0, 0], [2**-100, 15 * 2**-100, -(2**-97)], [7, 7, -7]])
    multiples, steps = cpu.steps_of(scales)
    assert multiples.tolist() == [[2, -3, 0], [0, 0, 0], [1, 15, -8], [1, 1, -1]]
    assert steps.tolist() == [3, 1, 2**-100, 7]
    assert cpu.steps_of(scales.view(2, 2, 3))[1].tolist() == [[3, 1], [2**-100, 7]]


@pytest.mark.parametrize(
    "row",
    [
        [1.0, 16.0], [1.0, 17.0], [3.0, 32.0], [1.0, 1.0078125], [1.0, torch.nan], [torch.inf, 1.0],
        [1.0, 1e30], [1.00001, 1.00001], [1e-45, 1e38],
    ],
    ids=str,
)  # fmt: skip
def test_scales_that_are_no_steps_are_refused(row: list[float]):
    scales = torch.tensor([[1.0, 2.0], row])
    with pytest.raises(WeightsError, match="scales of row 1 are not whole multiples, up to 15, of"):
        cpu.pack_steps(scales)


@pytest.mark.parametrize(
    ("scales", "bits", "group", "told"),
    [
        (torch.zeros(2, 8, 16, dtype=torch.int8), 4, 64, "4 bits in groups of 64 cannot have"),
        (torch.zeros(2, 8, 16, dtype=torch.int8), 8, 32, "8 bits in groups of 32 cannot have"),
        (torch.zeros(2, 4, 16, dtype=torch.int8), 4, 32, r"scales is .* torch.int8 \[2, 8, 16\]"),
        (torch.zeros(2, 1, 16, dtype=torch.int8), 4, None, "scales is .* contiguous torch.float32"),
    ],
)  # fmt: skip
def test_steps_where_there_can_be_none_are_refused(
    scales: Tensor, bits: int, group: int | None, told: str
):
    lines = torch.zeros(2, 128 * bits // 32, 64, dtype=torch.uint8)
    with pytest.raises(WeightsError, match=told):
        cpu.PackedWeight(lines, scales, outputs=20, inputs=128, bits=bits, group=group)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [16, 24, 47, 48, 101])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(49, 200, None), (33, 96, 32)])
def test_many_rows_give_the_defined_bits(
    isa: str, threads: int, outputs: int, inputs: int, group: int | None, rows: int, bits: int
):
    w = Weight(outputs, inputs, bits, group, narrow=True)
    x8, sx = activations(rows, inputs)
    assert torch.equal(w.times(x8, sx), w.plainly(x8, sx))


def test_more_rows_than_one_pass_takes(isa: str):
    w = Weight(5, 8192, 4, 64, narrow=True)
    x8, sx = activations(151, 8192)
    assert torch.equal(w.times(x8, sx), w.plainly(x8, sx))


@pytest.mark.parametrize("bits", BITS)
def test_the_torch_code_gives_the_defined_bits(monkeypatch: pytest.MonkeyPatch, bits: int):
    """In one piece and in several."""
    for group in (None, 32):
        w = Weight(70, 96, bits, group)
        x8, sx = activations(5, 96)
        assert torch.equal(cpu.gemm_reference(w.packed, x8, sx), w.plainly(x8, sx))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "REFERENCE_CODES", 96 * 16 * 2)
            assert torch.equal(cpu.gemm_reference(w.packed, x8, sx), w.plainly(x8, sx))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_gives_the_defined_bits(data: st.DataObject):
    bits = data.draw(st.sampled_from(BITS))
    group = data.draw(st.sampled_from([None, 32, 64, 96]))
    inputs = data.draw(st.integers(1, 300)) if group is None else group * data.draw(
        st.integers(1, 4)
    )  # fmt: skip
    w = Weight(data.draw(st.integers(1, 50)), inputs, bits, group)
    x8, sx = activations(data.draw(st.integers(1, 30)), inputs)
    expected = w.plainly(x8, sx)
    for name in native.isas():
        native.force_isa(name)
        assert torch.equal(w.times(x8, sx), expected), name
    native.force_isa(None)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("x", [-128, 127, 0])
@pytest.mark.parametrize("lowest", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_the_largest_sums_do_not_wrap(isa: str, rows: int, lowest: bool, x: int, bits: int):
    """As many inputs as are allowed, all at one end of their range."""
    half = 1 << (bits - 1)
    q = torch.full((3, cpu.MAX_INPUTS), -half if lowest else half - 1, dtype=torch.int8)
    packed = torch.full((3, cpu.MAX_INPUTS * bits // 8), 0 if lowest else 255, dtype=torch.uint8)
    w = cpu.PackedWeight.pack(packed, torch.ones(3, 1), inputs=cpu.MAX_INPUTS, bits=bits)
    y = cpu.gemm(w, torch.full((rows, w.inputs), x, dtype=torch.int8), torch.ones(rows))
    assert torch.equal(y, torch.full((rows, 3), float(int(q[0, 0]) * x * cpu.MAX_INPUTS)))


def test_equal_weights_and_zeros_give_what_they_should(isa: str):
    w = Weight(20, 64, 4, q=torch.full((20, 64), 3, dtype=torch.int8))
    x8, sx = activations(4, 64)
    assert torch.equal(w.times(x8, sx), w.plainly(x8, sx))
    zeros = w.times(torch.zeros_like(x8), sx)
    assert torch.equal(zeros, torch.zeros(4, 20))


def test_no_rows_give_no_rows(isa: str):
    x8, sx = activations(0, 64)
    w = Weight(20, 64, 4)
    assert w.times(x8, sx).shape == (0, 20)
    assert cpu.linear(w.packed, torch.empty(0, 64)).shape == (0, 20)
    assert cpu.quantize_rows(torch.empty(0, 64))[0].shape == (0, 64)


@pytest.mark.parametrize("bits", BITS)
def test_threads_change_nothing(isa: str, threads: int, bits: int):
    """Large enough to be shared out, and with more rows than one pass takes."""
    w = Weight(8, 4096, bits, 128, repeat=130)
    x8, sx = activations(3, 4096)
    expected = w.plainly(x8, sx)
    for _ in range(5):
        assert torch.equal(w.times(x8, sx), expected)
    many = w.times(x8.repeat(50, 1), sx.repeat(50))
    assert torch.equal(many, expected.repeat(50, 1))
    x = torch.randn(90, 4096, generator=torch.Generator().manual_seed(3))
    for found, wanted in zip(cpu.quantize_rows(x), cpu.quantize_rows_reference(x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("bits", BITS)
def test_memory_need_not_be_aligned(isa: str, bits: int):
    w = Weight(19, 96, bits, 32)
    x8, sx = activations(5, 96)
    shifted = [_shifted(t) for t in (w.packed.lines, w.packed.scales, x8, sx)]
    assert any(t.data_ptr() % 16 for t in shifted)
    lines, scales, *given = shifted
    there = cpu.PackedWeight(lines, scales, outputs=19, inputs=96, bits=bits, group=32)
    assert torch.equal(cpu.gemm(there, *given), w.plainly(x8, sx))


def _shifted(tensor: Tensor) -> Tensor:
    """The same, one element further into its memory."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


def test_rows_are_quantized_as_defined(isa: str):
    x = torch.tensor(
        [
            [127.0, 0.5, 1.5, -2.5, -127.0],  # halves go to the even neighbour
            [0.0, -0.0, 0.0, 0.0, 0.0],
            [1e-45, -1e-45, 0.0, 0.0, 0.0],
            [1e-43, 2.5e-43, -2.5e-43, 0.0, 0.0],  # a scale too small to be exact
            [3e38, -3e38, 1.0, 0.0, 1e38],
            [float("inf"), 1.0, 2.0, 3.0, 4.0],
            [1.0, float("nan"), 2.0, 3.0, 4.0],
            [-float("inf"), float("nan"), 2.0, 3.0, 4.0],
        ]
    )
    x8, sx = cpu.quantize_rows(x)
    assert x8[0].tolist() == [127, 0, 2, -2, -127]
    assert sx[0] == 1
    assert x8[1].tolist() == [0] * 5
    assert sx[1] == 1
    assert x8[3].tolist()[1:3] == [127, -127]
    assert x8[4].tolist() == [127, -127, 0, 0, 42]
    assert not x8[5:].any()
    assert sx[5:].isnan().all()
    reference8, reference_s = cpu.quantize_rows_reference(x)
    assert torch.equal(x8, reference8)
    assert torch.equal(sx.nan_to_num(-1), reference_s.nan_to_num(-1))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (7, 1037)])
def test_rows_are_quantized_as_by_torch(isa: str, shape: tuple[int, int]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * 10
    for found, wanted in zip(cpu.quantize_rows(x), cpu.quantize_rows_reference(x), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("rows", [1, 8, 21])
def test_linear_is_the_product_of_quantized_rows(isa: str, rows: int):
    w = Weight(37, 131, 4)
    x = torch.randn(rows, 131, generator=torch.Generator().manual_seed(6))
    assert torch.equal(cpu.linear(w.packed, x), w.plainly(*cpu.quantize_rows_reference(x)))


def test_a_row_that_is_not_finite_makes_its_products_nan(isa: str):
    x = torch.ones(2, 64)
    x[1, 5] = torch.nan
    y = Weight(20, 64, 4).times(*cpu.quantize_rows(x))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@needs_extension
def test_python_threads_can_compute_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "threads", lambda: 2)
    w = Weight(8, 512, 4, repeat=4096)  # long enough for threads of one core to cut in
    given = [activations(rows, 512, seed=rows) for rows in (1, 2, 3)]
    expected = [w.plainly(*each) for each in given]

    def repeatedly(index: int) -> bool:
        return all(torch.equal(w.times(*given[index]), expected[index]) for _ in range(100))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(repeatedly, range(3)))


def in_lanes(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight.T in the order that `linear_bfloat16` adds: 16 lanes, then in pairs."""
    products = x_MK[:, None].float() * weight_NK.float()
    steps = torch.nn.functional.pad(products, (0, -x_MK.shape[1] % 16)).unflatten(2, (-1, 16))
    lanes = torch.zeros(*steps.shape[:2], 16)
    for step in steps.unbind(2):
        lanes = lanes + step
    while lanes.shape[2] > 1:
        first, second = lanes.chunk(2, dim=2)
        lanes = first + second
    return lanes[:, :, 0].to(x_MK.dtype)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 11, 100])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (7, 37), (130, 1536)])
def test_a_bfloat16_weight_is_multiplied_in_the_defined_order(
    isa: str, threads: int, rows: int, shape: tuple[int, int], dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    x = torch.randn(11, shape[1], generator=generator).to(dtype)
    expected = in_lanes(x, weight)
    at = torch.arange(rows) % 11
    assert torch.equal(cpu.linear_bfloat16(weight, x[at]), expected[at])


@needs_extension
def test_products_that_are_no_numbers_or_too_great_stay_so_as_bfloat16(isa: str):
    weight = torch.tensor([[1.0, -1.0, 0.0]]).T.bfloat16().expand(3, 2).contiguous()
    x = torch.tensor([[torch.nan, 1], [torch.inf, 1], [3e38, 3e38]]).bfloat16()
    y = cpu.linear_bfloat16(weight, x)
    assert y[0].isnan().all()
    assert y[1:, :2].equal(torch.tensor([[torch.inf, -torch.inf]] * 2).bfloat16())
    assert y[1, 2].isnan()
    assert y[2, 2] == 0


@needs_extension
def test_a_bfloat16_weight_that_does_not_fit_is_refused():
    weight, x = torch.zeros(5, 16, dtype=torch.bfloat16), torch.zeros(2, 16)
    with pytest.raises(WeightsError, match=r"weight is torch.float32 .* torch.bfloat16 \[5, 16\]"):
        cpu.linear_bfloat16(weight.float(), x)
    with pytest.raises(WeightsError, match=r"x is .* \[2, 15\] .* torch.float32 \[2, 16\] on cpu"):
        cpu.linear_bfloat16(weight, x[:, 1:].contiguous())
    with pytest.raises(WeightsError, match=r"weight is .* \[5, 16\].*, not contiguous"):
        cpu.linear_bfloat16(torch.zeros(16, 5, dtype=torch.bfloat16).T, x)


def test_without_the_extension_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch):
    w, stepped = Weight(37, 96, 4, 32), Weight(37, 96, 4, 32, steps=True)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(5))
    expected = w.times(*cpu.quantize_rows(x))
    assert torch.equal(cpu.linear(w.packed, x), expected)
    with_steps = cpu.linear(stepped.packed, x)
    monkeypatch.setattr(native, "extension", lambda: None)
    assert not native.available()
    assert native.isa() == "torch"
    assert native.isas() == ("torch",)
    assert torch.equal(cpu.pack_lines(packed_codes(w.q, 4), 96, 4), w.packed.lines)
    assert torch.equal(w.times(*cpu.quantize_rows(x)), expected)
    assert torch.equal(cpu.linear(w.packed, x), expected)
    assert torch.equal(cpu.linear(stepped.packed, x), with_steps)
    assert not native.advise_hugepages(torch.empty(1 << 22))
    with pytest.raises(RuntimeError, match="_native is not built, and torch cannot read memory"):
        native.read_memory(x)
    native.force_isa("torch")
    with pytest.raises(ValueError, match="instruction set 'avx2' cannot be used here; torch can"):
        native.force_isa("avx2")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lines": torch.zeros(2, 11, 64, dtype=torch.uint8)},
         r"lines is torch.uint8 \[2, 11, 64\] on cpu; it must be contiguous torch.uint8 \[2, 12,"),
        ({"lines": torch.zeros(2, 12, 64)}, r"lines is torch.float32 .* contiguous torch.uint8"),
        ({"lines": torch.zeros(2, 12, 128, dtype=torch.uint8)[..., ::2]},
         r"lines is .*, not contiguous; it must be contiguous"),
        ({"lines": torch.zeros(2, 12, 64, dtype=torch.uint8, device="meta")}, "lines .* on meta"),
        ({"scales": torch.zeros(2, 1, 16)}, r"scales is .* must be .*float32 \[2, 3, 16\]"),
        ({"scales": torch.zeros(2, 3, 16).double()}, "scales is torch.float64"),
        ({"scales": torch.zeros(2, 1, 16).bfloat16(), "group": None},
         r"scales is torch.bfloat16 .* must be contiguous torch.float32 \[2, 1, 16\]"),
        ({"bits": 3}, "weights of 3 bits cannot be packed; 2, 4 and 8 can"),
        ({"group": 48}, "groups of 48 along 96 inputs: a group must be a multiple of 32 that div"),
        ({"group": 64}, "groups of 64 along 96 inputs"),
        ({"group": 0}, "groups of 0 along 96 inputs"),
        ({"outputs": 0}, r"a weight \[0, 96\] cannot be packed: outputs must be at least 1"),
        ({"outputs": 33}, r"lines is .* must be contiguous torch.uint8 \[3, 12, 64\]"),
        ({"inputs": 65568}, r"a weight \[20, 65568\] cannot be packed: .* inputs 1 to 65536"),
    ],
)  # fmt: skip
def test_a_weight_that_does_not_fit_is_refused(change: dict[str, Any], told: str):
    fitting: dict[str, Any] = {
        "lines": torch.zeros(2, 12, 64, dtype=torch.uint8),
        "scales": torch.zeros(2, 3, 16),
        "outputs": 20,
        "inputs": 96,
        "bits": 4,
        "group": 32,
    }
    assert cpu.PackedWeight(**fitting).nbytes == 2 * 12 * 64 + 4 * 2 * 3 * 16
    with pytest.raises(WeightsError, match=told):
        cpu.PackedWeight(**{**fitting, **change})


@pytest.mark.parametrize(
    ("x8", "sx", "told"),
    [
        (torch.zeros(2, 96), torch.zeros(2), r"x8 is torch.float32"),
        (
            torch.zeros(96, dtype=torch.int8),
            torch.zeros(1),
            r"x8 is .* \[96\] .* \[96, 96\] on",
        ),
        (torch.tensor(1, dtype=torch.int8), torch.zeros(1), r"x8 is .* \[\] .* \[0, 96\] on cpu"),
        (
            torch.zeros(2, 95, dtype=torch.int8),
            torch.zeros(2),
            r"x8 .* \[2, 95\] .* \[2, 96\] on",
        ),
        (torch.zeros(96, 2, dtype=torch.int8).T, torch.zeros(2), "x8 is .* not contiguous"),
        (torch.zeros(2, 96, dtype=torch.int8), torch.zeros(3), r"sx is .* \[3\] .* \[2\] on cpu"),
    ],
)
def test_activations_that_do_not_fit_are_refused(x8: Tensor, sx: Tensor, told: str):
    w = Weight(20, 96, 4, 32).packed
    with pytest.raises(WeightsError, match=told):
        cpu.gemm(w, x8, sx)
    if told.startswith("x8") and x8.dtype == torch.int8:
        with pytest.raises(WeightsError, match=told.replace("x8", "x").replace("int8", "float32")):
            cpu.linear(w, x8.float())


def test_a_gradient_is_refused_rather_than_lost():
    w = Weight(20, 96, 4, 32).packed
    x = torch.randn(2, 96, requires_grad=True)
    with pytest.raises(WeightsError, match="x asks for a gradient, and low-bit products give none"):
        cpu.linear(w, x)
    with torch.no_grad():
        assert cpu.linear(w, x).shape == (2, 20)


def test_other_arguments_that_do_not_fit_are_refused():
    codes = torch.zeros(4, 5, dtype=torch.uint8)
    with pytest.raises(WeightsError, match=r"packed is torch.uint8 \[4, 5\] .* \[4, 6\] on cpu"):
        cpu.pack_lines(codes, 12, 4)
    with pytest.raises(WeightsError, match=r"a weight \[0, 12\] cannot be packed"):
        cpu.pack_lines(codes[0], 12, 4)
    with pytest.raises(WeightsError, match=r"scales is .* \[4, 2\] .* \[4, 1\] on cpu"):
        cpu.PackedWeight.pack(codes, torch.ones(4, 2), inputs=10, bits=4)
    with pytest.raises(WeightsError, match=r"x is torch.bfloat16 .* contiguous torch.float32"):
        cpu.quantize_rows(torch.zeros(4, 5).bfloat16())
    with pytest.raises(WeightsError, match=r"x \[4, 0\] has no inputs; rows must have at least 1"):
        cpu.quantize_rows(torch.zeros(4, 0))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("outputs", "inputs", "group", "repeat"), [
    (37, 70, None, 1), (50, 96, 32, 1), (2500, 32, None, 3), (20, 32, None, 300),
])  # fmt: skip
@pytest.mark.parametrize("bits", BITS)
def test_the_greatest_outputs_are_those_of_the_whole_product(
    isa: str, threads: int, bits: int, outputs: int, inputs: int, group: int | None, repeat: int,
    rows: int,
):  # fmt: skip
    """Repeated rows tie: of equal outputs the lowest id comes first."""
    w = Weight(outputs, inputs, bits, group, repeat=repeat)
    if repeat > 1:
        scales = w.scales_NG[:outputs].repeat(repeat, 1)
        w.packed = cpu.PackedWeight.pack(packed_codes(w.q, bits), scales, inputs=inputs, bits=bits)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(3))
    whole = cpu.linear(w.packed, x)
    skipped = torch.arange(1, outputs * repeat, 5)
    for count in (1, 9, min(200, outputs * repeat - len(skipped))):
        values, ids, most = cpu.top(w.packed, x, count, skipped)
        assert torch.equal(most, whole.amax(1))
        left = whole.index_fill(1, skipped, -torch.inf)
        expected = left.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :count])
        assert torch.equal(ids, expected.indices[:, :count])


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("inputs", "group"), [(70, None), (96, 32)])
def test_some_outputs_alone_are_those_of_the_whole_product(
    isa: str, threads: int, bits: int, inputs: int, group: int | None, rows: int
):
    w = Weight(137, inputs, bits, group)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(3))
    whole = cpu.linear(w.packed, x)
    for ids in ([], [136], [0, 1, 15, 16, 136], [99, 3, 3, 98], list(range(137))):
        chosen = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(cpu.linear_of(w.packed, x, chosen), whole[:, chosen])


def test_what_is_not_finite_reaches_the_greatest_output(isa: str):
    w = Weight(5000, 32, 4)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    x[1, 3] = torch.nan
    assert cpu.top(w.packed, x, 4)[2].isnan().tolist() == [False, True]
    w.packed.scales[200, 0, 7] = torch.nan
    assert cpu.top(w.packed, x, 4)[2].isnan().all()
    w.packed.scales[200, 0, 7] = torch.inf
    values, ids, most = cpu.top(w.packed, x[:1], 5000)
    assert most.abs().isinf().item() or values[0, -1] == -torch.inf
    assert 200 * 16 + 7 in (int(ids[0, 0]), int(ids[0, -1]))


def test_the_head_without_the_extension(monkeypatch: pytest.MonkeyPatch):
    w = Weight(100, 64, 4, repeat=2)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([7, 190, 3])
    found = *cpu.top(w.packed, x, 12, ids.sort().values), cpu.linear_of(w.packed, x, ids)
    monkeypatch.setattr(native, "extension", lambda: None)
    again = *cpu.top(w.packed, x, 12, ids.sort().values), cpu.linear_of(w.packed, x, ids)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_head_asked_for_what_it_lacks_is_refused():
    w, x = Weight(20, 96, 4, 32).packed, torch.zeros(2, 96)
    with pytest.raises(WeightsError, match="the 21 greatest of 20 outputs"):
        cpu.top(w, x, 21)
    with pytest.raises(WeightsError, match="the 19 greatest of 18 outputs"):
        cpu.top(w, x, 19, torch.tensor([0, 1]))
    with pytest.raises(WeightsError, match="the 0 greatest of 20 outputs"):
        cpu.top(w, x, 0)
    for skipped in ([3, 3], [5, 4], [-1, 4], [4, 20]):
        with pytest.raises(WeightsError, match="skipped: ids must ascend within 20 outputs"):
            cpu.top(w, x, 1, torch.tensor(skipped))
    with pytest.raises(WeightsError, match=r"skipped is torch.float32"):
        cpu.top(w, x, 1, torch.zeros(1))
    with pytest.raises(WeightsError, match=r"x is .* \[2, 95\] .* \[2, 96\] on cpu"):
        cpu.top(w, torch.zeros(2, 95), 1)
    for id in (-1, 20):
        with pytest.raises(WeightsError, match=f"output {id} of a weight of 20"):
            cpu.linear_of(w, x, torch.tensor([0, id]))


@needs_extension
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_many_rows_become_floats_on_all_threads(bits: int):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (201, 512), generator=generator, dtype=torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    packed = (codes.view(201, -1, 8 // bits) << shifts).sum(-1, dtype=torch.uint8)
    scales = torch.rand(201, 16, generator=generator)
    expected = (codes.float() - (1 << (bits - 1))).view(201, 16, 32) * scales[..., None]
    assert torch.equal(cpu.dequantize(packed, scales, bits), expected.flatten(1))


@needs_extension
def test_codes_that_do_not_fit_their_scales_are_refused():
    packed, scales = torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3, 2)
    assert cpu.dequantize(packed, scales, 4).tolist() == [[-8.0] * 16] * 3
    with pytest.raises(WeightsError, match="codes of 3 bits are not packed; 2, 4 and 8 are"):
        cpu.dequantize(packed, scales, 3)
    with pytest.raises(WeightsError, match="3 groups do not divide rows of 16 codes"):
        cpu.dequantize(packed, torch.ones(3, 3), 4)
    with pytest.raises(WeightsError, match="0 groups do not divide rows of 16 codes"):
        cpu.dequantize(packed, torch.ones(3, 0), 4)
    with pytest.raises(WeightsError, match=r"packed is torch.uint8 \[3, 8\]"):
        cpu.dequantize(packed, torch.ones(4, 2), 4)
    with pytest.raises(WeightsError, match=r"scales is torch.float64"):
        cpu.dequantize(packed, scales.double(), 4)
