"""Quantized modules compute what their codes and scales say, exactly, in the model's place."""

import math

import pytest
import torch
from torch import Tensor, nn

from gemsmith.cache.none import NoCache
from gemsmith.errors import WeightsError
from gemsmith.model.text import Experts, TextModel
from gemsmith.ops import cpu, moe
from gemsmith.ops.linear import linear
from gemsmith.quant import linear as module
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.linear import (
    QuantEmbedding,
    QuantExperts,
    QuantLinear,
    QuantModule,
    float_product,
    integer_product,
    quantize_rows,
)
from gemsmith.quant.quantize import quantize
from gemsmith.testing import assert_close, random_model, tiny_config, tolerance

FORMATS = [Format(8), Format(4), Format(2), Format(8, 32), Format(4, 32), Format(2, 64)]
FORMATS += [Format(4, 32, steps=True), Format(2, 64, steps=True)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(x8: list[list[int]], sx: Tensor, weight: Quantized) -> Tensor:
    """The definition with Python's integers; float32 only where it says so."""
    N, K = weight.shape
    u = weight.codes().to(torch.int64) + weight.format.offset
    size = weight.format.group or K
    out = torch.zeros(len(x8), N)
    for t, row in enumerate(x8):
        for n in range(N):
            total = torch.tensor(0.0)
            whole = [int(scale * 2**40) for scale in weight.scales[n].tolist()]
            divisor, exactly = math.gcd(*whole), 0
            for group, start in enumerate(range(0, K, size)):
                inputs, fields = row[start : start + size], u[n, start : start + size].tolist()
                exact = sum(a * b for a, b in zip(inputs, fields, strict=True))
                exact -= weight.format.offset * sum(inputs)
                exactly += exact * (whole[group] // divisor)
                term = weight.scales[n, group] * torch.tensor(float(exact))
                total = total + term if group else term
            if weight.format.steps:
                total = torch.tensor(float(exactly)) * (divisor / 2**40)
            out[t, n] = total * sx[t, 0]
    return out


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_integer_product_is_exact(format):
    weight, x = quantize(noise(7, 128), format), 3 * noise(3, 128, seed=1)
    x8, sx = quantize_rows(x)
    assert torch.equal(integer_product(x, weight), by_hand(x8.tolist(), sx, weight))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_kernels_give_the_same_bits(format):
    weight, x = quantize(noise(50, 256), format), 3 * noise(9, 256, seed=1)
    packed = cpu.PackedWeight.pack(
        weight.packed,
        weight.scales,
        inputs=256,
        bits=format.bits,
        group=format.group,
        steps=format.steps,
    )
    assert torch.equal(integer_product(x, weight), cpu.linear(packed, x))


def test_an_input_that_wants_a_gradient_is_refused():
    layer = QuantLinear(quantize(noise(4, 32), Format(8)), torch.float32)
    with pytest.raises(WeightsError, match="in int8 gives its input no gradient; train the"):
        layer(noise(1, 32).requires_grad_())
    with torch.no_grad():
        layer(noise(1, 32).requires_grad_())


@pytest.mark.parametrize("K", [1056, 8192])
def test_sums_beyond_24_bits_are_exact(K):
    """Which float32 would round on the way; only the sum itself is rounded, once."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, -100, (64, K), generator=generator)
    x = torch.randint(100, 128, (3, K), generator=generator)
    x[:, 0] = 127  # so that sx is 1
    weight = Quantized.from_codes(Format(8), codes.char(), torch.ones(64, 1))
    exact = x @ codes.T
    assert exact.abs().max() > 1 << 23
    assert torch.equal(integer_product(x.float(), weight), exact.float())


def test_rows_are_rounded_to_the_nearest_even_of_127_steps():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5, [1e-30, 0, 0, 0, -2e-30]])
    x8, scale = quantize_rows(x)
    assert x8.tolist() == [[127, 0, 2, -2, -127], [0] * 5, [64, 0, 0, 0, -127]]
    assert scale[:2].tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_gives_nan_and_spares_the_others(value):
    x = torch.tensor([[1.0, value], [1.0, 2.0], [1e-45, 0.0]])
    y = integer_product(
        x, Quantized.from_codes(Format(8), torch.ones(1, 2).char(), torch.ones(1, 1))
    )
    assert y[0].isnan().all()
    assert y[1].item() == pytest.approx(3, rel=0.01)
    assert y[2].item() == 0


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_products_are_near_those_of_the_float_weight(format):
    weight, x = quantize(noise(96, 256), format), noise(5, 256, seed=1)
    wanted = x @ weight.dequantize().T
    assert_close(float_product(x, weight), wanted, tolerance(torch.float32, 256))
    # int8 inputs: each is off by at most half a step of max/127.
    error = (integer_product(x, weight) - wanted).norm() / wanted.norm()
    assert error < 0.02


@pytest.mark.parametrize("product", [integer_product, float_product])
def test_blocks_of_outputs_do_not_change_the_product(monkeypatch, product):
    weight, x = quantize(noise(50, 64), Format(4, 32)), noise(4, 64, seed=1)
    whole = product(x, weight)
    monkeypatch.setattr(module, "BLOCK_WEIGHTS", 64 * 7)
    assert_close(product(x, weight), whole, tolerance(torch.float32, 64))
    if product is integer_product:
        assert torch.equal(product(x, weight), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_keeps_shape_dtype_and_bias(dtype):
    weight, bias = quantize(noise(6, 32), Format(8)), noise(6, seed=2).to(dtype)
    layer, x = QuantLinear(weight, dtype, bias), noise(2, 3, 32, seed=1).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    flat = integer_product(x.view(6, 32), weight).to(dtype) + bias
    assert torch.equal(y, flat.view(2, 3, 6))
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_table_gives_its_rows():
    table = quantize(noise(10, 64), Format(4, 32))
    embedding = QuantEmbedding(table, torch.bfloat16)
    ids = torch.tensor([[3, 3], [9, 0]])
    assert torch.equal(embedding(ids), table.dequantize()[ids].bfloat16())
    assert embedding(torch.tensor([], dtype=torch.int64)).shape == (0, 64)


def test_a_weight_is_sliced_like_the_tensor_it_replaces():
    matrix = QuantModule(quantize(noise(12, 32), Format(8)), torch.float32).weight
    x = noise(3, 32, seed=1)
    assert matrix.shape == (12, 32)
    assert torch.equal(linear(x, matrix[4:8]), linear(x, matrix)[:, 4:8])


def test_experts_compute_with_their_own_codes():
    gate_up, down = quantize(noise(4, 32, 16), Format(8)), quantize(noise(4, 16, 16), Format(8))
    x, index = noise(5, 16, seed=1), torch.tensor([[0, 2], [2, 3], [3, 0], [0, 2], [3, 2]])
    weight = torch.full((5, 2), 0.5)
    wanted = moe.experts(x, index, weight, gate_up.dequantize(), down.dequantize())
    found = QuantExperts(gate_up, down, torch.float32)(x, index, weight)
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def replace_all(model: TextModel, format: Format) -> None:
    """Quantize every linear layer, table and expert stack, as a loader does."""
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Embedding):
            model.set_submodule(name, QuantEmbedding(quantize(old.weight, format), torch.float32))
        elif isinstance(old, nn.Linear):
            model.set_submodule(name, QuantLinear(quantize(old.weight, format), torch.float32))
        elif isinstance(old, Experts):
            parts = quantize(old.gate_up_proj, format), quantize(old.down_proj, format)
            model.set_submodule(name, QuantExperts(*parts, torch.float32))


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_a_model_runs_on_quantized_modules_without_knowing(monkeypatch, size):
    """Products of floats, and weights that are the codes' floats, leave no other difference."""
    monkeypatch.setattr(module, "integer_product", float_product)
    config, ids = tiny_config(size), torch.arange(2, 22)
    low, rounded = random_model(config), random_model(config)
    replace_all(low, Format(8))
    assert not any(isinstance(m, nn.Linear | nn.Embedding | Experts) for m in low.modules())
    for tensor in rounded.parameters():
        if tensor.ndim > 1:
            tensor.data.copy_(quantize(tensor, Format(8)).dequantize())

    def logits(model: TextModel) -> Tensor:
        hidden = model(ids, torch.arange(20), NoCache(config.text_config, [20]))
        return model.logits(hidden)

    assert not torch.equal(logits(random_model(config)), logits(rounded))
    assert_close(logits(low), logits(rounded), tolerance(torch.float32, 64, steps=60))
