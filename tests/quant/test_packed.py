"""Weights in the kernels' order are the same weights: products, rows, parts, stacks."""

import pytest
import torch
from tests.conftest import needs_extension
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops.linear import linear
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.linear import (
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    QuantModule,
    integer_product,
)
from gemsmith.quant.packed import Packed
from gemsmith.quant.quantize import quantize

STEPPED = [Format(4, 32, steps=True), Format(2, 64, steps=True)]
FORMATS = [Format(8), Format(4), Format(2), Format(8, 32), Format(4, 32), Format(2, 64), *STEPPED]
pytestmark = needs_extension


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products_and_rows_are_those_of_the_codes(format):
    weight, x = quantize(noise(50, 128), format), 3 * noise(3, 128, seed=1)
    packed = Packed.of(weight)
    assert weight.format == format
    assert torch.equal(packed.product(x), integer_product(x, weight))
    assert torch.equal(packed.dequantize(), weight.dequantize())
    ids = torch.tensor([[49, 0, 16], [15, 49, 31]])
    assert torch.equal(packed.rows(ids), weight.dequantize()[ids])
    assert torch.equal(packed.rows(ids), weight.rows(ids))
    assert packed.rows(ids[:0]).shape == (0, 3, 128)


@pytest.mark.parametrize("id", [-1, 50])
def test_a_row_outside_the_table_is_refused(id):
    packed = Packed.of(quantize(noise(50, 128), Format(4)))
    with pytest.raises(WeightsError, match=f"row {id} of a table of 50; the tokenizer belongs"):
        packed.rows(torch.tensor([3, id]))


@pytest.mark.parametrize("format", [Format(4, 32), Format(4, 32, steps=True)], ids=str)
@pytest.mark.parametrize(("start", "stop"), [(0, 12), (5, 44), (16, 32), (47, 50), (7, 7)])
def test_parts_of_a_weight_start_anywhere(start, stop, format):
    """Blocks have 16 rows; the model slices by its own sizes."""
    weight, x = quantize(noise(50, 64), format), noise(2, 64, seed=1)
    plain = QuantModule(weight, torch.float32).weight[start:stop]
    assert torch.equal(linear(x, plain), integer_product(x, weight)[:, start:stop])
    matrix = QuantModule(Packed.of(weight), torch.float32).weight
    part = matrix[start:stop]
    assert part.shape == (stop - start, 64)
    assert torch.equal(linear(x, part), linear(x, matrix)[:, start:stop])
    assert torch.equal(linear(x, part[1:]), linear(x, matrix)[:, start + 1 : stop])


def test_packed_rows_are_cut_at_blocks_only():
    packed = Packed.of(quantize(noise(50, 64), Format(4)))
    with pytest.raises(WeightsError, match="rows 5 to 20: a part of packed rows starts at a block"):
        packed[5:20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_compute_the_same_packed(dtype):
    weight, x, bias = quantize(noise(20, 64), Format(4, 32)), noise(2, 3, 64, seed=1), noise(20)
    plain, packed = (QuantLinear(w, dtype, bias.to(dtype)) for w in (weight, Packed.of(weight)))
    assert torch.equal(plain(x.to(dtype)), packed(x.to(dtype)))
    ids = torch.tensor([[3, 19], [0, 3]])
    plain, packed = (QuantEmbedding(w, dtype) for w in (weight, Packed.of(weight)))
    assert torch.equal(plain(ids), packed(ids))
    assert packed(ids).dtype == dtype


def test_stacks_give_their_experts():
    gate_up, down = quantize(noise(4, 40, 32), Format(8)), quantize(noise(4, 32, 20), Format(4))
    x, index = noise(5, 32, seed=1), torch.tensor([[0, 2], [2, 3], [3, 0], [0, 2], [3, 2]])
    weight = torch.full((5, 2), 0.5)
    wanted = QuantExperts(gate_up, down, torch.float32)(x, index, weight)
    packed = QuantExperts(Packed.of(gate_up), Packed.of(down), torch.float32)
    assert torch.equal(packed(x, index, weight), wanted)
    assert wanted.abs().max() > 0
    assert torch.equal(Packed.of(gate_up).dequantize(), gate_up.dequantize())
    assert Packed.of(gate_up).nbytes == 4 * (3 * 8 * 64 + 3 * 16 * 4)


def test_experts_with_steps_are_those_of_the_codes():
    gate_up, down = (quantize(noise(4, 40, 64), each) for each in (STEPPED[0], Format(8)))
    assert gate_up.format.steps
    packed = Packed.of(gate_up)
    assert packed.scales.shape == (4, 3, 8, 16)
    assert torch.equal(packed.dequantize(), gate_up.dequantize())
    x = noise(5, 64, seed=1)
    for expert in range(4):
        assert torch.equal(packed[expert].product(x), integer_product(x, gate_up[expert]))
    assert down.format == Format(8)


def test_scales_that_are_said_to_be_steps_and_are_none_are_refused():
    weight = quantize(noise(50, 64), Format(4, 32))
    lying = Quantized(Format(4, 32, steps=True), weight.shape, weight.packed, weight.scales)
    for product in (Packed.of, lambda each: integer_product(noise(1, 64), each)):
        with pytest.raises(WeightsError, match="scales of row 0 are not whole multiples, up to 15"):
            product(lying)


def test_sizes_that_no_kernel_takes_stay_with_torch():
    assert Packed.takes(Format(4, 32), (8, 64))
    assert not Packed.takes(Format(4, 48), (8, 96))
    assert not Packed.takes(Format(4), (8, 1 << 17))


def test_a_packed_weight_off_the_cpu_is_named():
    packed = Packed.of(quantize(noise(16, 32), Format(8)))
    moved = Packed(packed.format, packed.shape, packed.lines.to("meta"), packed.scales)
    with pytest.raises(WeightsError, match=r"lines is torch.uint8 .* on meta; it must be"):
        moved.product(noise(1, 32))
