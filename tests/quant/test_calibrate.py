"""GPTQ: less error where the inputs are, in the formats as they are."""

import pytest
import torch
from torch import Tensor

from gemsmith.errors import ConfigError, WeightsError
from gemsmith.quant.calibrate import gptq, gram, output_error
from gemsmith.quant.formats import Format
from gemsmith.quant.quantize import search


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 600, K: int = 192) -> Tensor:
    """Correlated, some columns much larger than others, as hidden states are."""
    mix = drawn(K, K, seed=1) / K**0.5
    return drawn(tokens, K, seed=2) @ (mix + 0.5 * torch.eye(K)) * (1 + 5 * drawn(K, seed=3) ** 4)


def real_error(weight: Tensor, quantized, x: Tensor) -> float:
    wrong = x.double() @ (weight - quantized.dequantize()).double().T
    return (wrong.square().sum() / (x.double() @ weight.double().T).square().sum()).item()


@pytest.mark.parametrize(
    "format", [Format(4, 32), Format(2, 32), Format(2), Format(4, 64)], ids=str
)
def test_the_output_error_is_far_less_on_inputs_it_has_never_seen(format):
    weight, x = drawn(96, 192), inputs(1200)
    seen, unseen = x[:800], x[800:]
    found = gptq(weight, gram(seen), format)
    assert real_error(weight, found, unseen) < 0.8 * real_error(
        weight, search(weight, format), unseen
    )
    assert found.format == format
    assert found.shape == (96, 192)


def test_nothing_that_was_given_is_changed():
    weight, H = drawn(8, 64), gram(drawn(40, 64))
    before = weight.clone(), H.clone()
    gptq(weight, H, Format(4, 32))
    assert torch.equal(weight, before[0])
    assert torch.equal(H, before[1])


def test_inputs_without_correlation_and_of_one_size_change_nothing_but_ties():
    weight = drawn(16, 64)
    found = gptq(weight, torch.eye(64), Format(4, 32))
    assert torch.equal(found.codes(), search(weight, Format(4, 32)).codes())


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_fewer_tokens_than_inputs_are_enough_to_compute_with(tokens):
    weight, x = drawn(16, 64), drawn(tokens, 64, seed=4)
    found = gptq(weight, gram(x), Format(2, 32))
    assert real_error(weight, found, x) < real_error(weight, search(weight, Format(2, 32)), x)


def test_inputs_that_are_all_zero_are_as_without_data():
    weight = drawn(16, 64)
    found = gptq(weight, torch.zeros(64, 64), Format(4, 32))
    assert torch.equal(found.codes(), search(weight, Format(4, 32)).codes())


def test_the_gram_of_parts_is_that_of_the_whole():
    x = drawn(50, 16)
    parts = gram(x[30:], gram(x[:30]))
    assert torch.allclose(parts, x.T @ x, atol=1e-5)


def test_the_output_error_is_that_of_the_outputs():
    weight, x = drawn(16, 64), drawn(40, 64, seed=4)
    found = search(weight, Format(2, 32))
    wrong, whole = output_error(weight, found, gram(x))
    assert wrong / whole == pytest.approx(real_error(weight, found, x), rel=1e-4)


def test_what_cannot_be_is_refused():
    weight, H = drawn(4, 64), torch.eye(64)
    with pytest.raises(ConfigError, match="rows of 64, which groups of 128 do not divide"):
        gptq(weight, H, Format(4, 128))
    with pytest.raises(WeightsError, match="inputs on the calibration data are infinite or not"):
        gptq(weight, H * torch.nan, Format(4, 32))
    weight[1, 1] = torch.inf
    with pytest.raises(WeightsError, match="a weight is infinite or not a number"):
        gptq(weight, H, Format(4, 32))
