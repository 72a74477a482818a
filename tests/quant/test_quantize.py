"""Errors are those of the methods, grids are found again, and memory is bounded."""

import pytest
import torch
from torch import Tensor

from gemsmith.errors import ConfigError, WeightsError
from gemsmith.ops import cpu
from gemsmith.quant import quantize as module
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.quantize import quantize, relative_error, round_to_nearest, search, settle

STEPPED = Format(4, 32, steps=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gauss(rows: int = 256, columns: int = 1536) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=generator())


def heavy(rows: int = 256, columns: int = 1536) -> Tensor:
    """Student's t of 5 degrees: normal over the root of a mean of 5 squares."""
    squares = torch.randn(5, rows, columns, generator=generator(1)).square().mean(0)
    return gauss(rows, columns) / squares.sqrt()


def plain_error(weight: Tensor, quantized: Quantized) -> float:
    difference = weight.double() - quantized.dequantize().double()
    return (difference.square().sum() / weight.double().square().sum()).item()


@pytest.mark.parametrize(
    ("weight", "format", "method", "expected"),
    [
        # Relative squared errors of independent prototypes of the same methods.
        (gauss, Format(4, 32), round_to_nearest, 0.0074),
        (gauss, Format(4, 32), search, 0.0066),
        (gauss, STEPPED, search, 0.00698),
        (heavy, STEPPED, search, 0.0117),
        (gauss, STEPPED, round_to_nearest, 0.0074),
        (gauss, Format(2, 32), round_to_nearest, 0.131),
        (gauss, Format(2, 32), search, 0.115),
        (gauss, Format(2), search, 0.149),
        (heavy, Format(4, 32), round_to_nearest, 0.0116),
        (heavy, Format(4, 32), search, 0.0106),
        (heavy, Format(2, 32), round_to_nearest, 0.175),
        (heavy, Format(2, 32), search, 0.147),
    ],
)
def test_the_error_is_the_known_one_of_the_method(weight, format, method, expected):
    values = weight()
    assert plain_error(values, method(values, format)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("format", [Format(4), Format(2)])
def test_a_search_over_rows_clips_what_lies_far_out(format):
    values = heavy()
    assert relative_error(values, search(values, format)) < relative_error(
        values, round_to_nearest(values, format)
    )


def test_at_8_bits_no_other_scale_would_gain_a_fiftieth():
    weight = heavy()
    found = relative_error(weight, search(weight, Format(8)))
    scales = weight.abs().amax(-1, keepdim=True) / 127
    for clip in (0.8, 0.9, 0.95, 1.0, 1.05):
        codes = (weight / (clip * scales)).round().clamp(-128, 127).to(torch.int8)
        other = Quantized.from_codes(Format(8), codes, clip * scales)
        assert relative_error(weight, other) > 0.98 * found


def test_a_small_case_by_hand():
    weight = torch.tensor([[0.8, -0.4, 0.1, 0.0]])
    found = round_to_nearest(weight, Format(4))
    assert found.scales.tolist() == [[pytest.approx(-0.1)]]
    assert found.codes().tolist() == [[-8, 4, -1, 0]]


@pytest.mark.parametrize(
    ("bits", "dtype"),
    # bfloat16 is too coarse to say which of 256 codes a weight had.
    [(2, torch.bfloat16), (4, torch.bfloat16), (4, torch.float32), (8, torch.float32)],
)
def test_trained_grids_are_found_again_code_for_code(bits, dtype):
    """Codes need not reach the ends of the grid; scales are of either kind of training."""
    format = Format(bits, None if bits == 8 else 32)
    low = -format.offset
    codes = torch.randint(low, -low, (200, 96), generator=generator()).to(torch.int8)
    if bits == 4:
        codes[::2] = codes[::2].clamp(-6, 5)
        codes[1::2, ::32] = 7
    codes[:, 1::32] = 1 - format.offset  # so that codes times 2 do not fit as well
    codes[:, 2::32] = 1
    scales = 0.01 * (0.5 + torch.rand(200, format.groups(96), generator=generator(1)))
    scales = scales if bits == 8 else scales.bfloat16().float()
    weight = Quantized.from_codes(format, codes, scales).dequantize().to(dtype)
    found = quantize(weight, format)
    assert torch.equal(found.codes(), codes)
    assert relative_error(weight, found) < 5e-6
    fresh = round_to_nearest(weight, format).codes()
    assert bits != 4 or (fresh == codes).float().mean() < 0.9


def test_the_usual_rule_loses_a_grid_trained_by_absmax_over_7():
    """Why quantize() looks for a grid at all."""
    weight = gauss()
    scale = weight.unflatten(-1, (-1, 32)).abs().amax(-1) / 7
    codes = (weight.unflatten(-1, (-1, 32)) / scale[..., None]).round().flatten(-2)
    trained = Quantized.from_codes(Format(4, 32), codes.to(torch.int8), scale).dequantize()
    assert relative_error(trained, round_to_nearest(trained, Format(4, 32))) > 5e-3
    found = quantize(trained, Format(4, 32))
    assert relative_error(trained, found) < 5e-6
    assert (found.dequantize() / trained - 1)[trained != 0].abs().max() < 0.005


def test_weights_on_no_grid_are_searched():
    weight = gauss(64, 128)
    for format in (Format(2, 32), Format(4), Format(8, 32)):
        found, wanted = quantize(weight, format), search(weight, format)
        assert torch.equal(found.packed, wanted.packed)
        assert torch.equal(found.scales, wanted.scales)


def test_scales_of_groups_are_values_of_bfloat16_and_the_codes_know():
    found = quantize(gauss(), Format(4, 32))
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert quantize(gauss(), Format(4)).scales.bfloat16().float().ne(0).all()


@pytest.mark.parametrize("format", [STEPPED, Format(2, 64, steps=True)], ids=str)
def test_scales_are_multiples_of_a_step_and_values_of_bfloat16(format):
    weight = heavy(64, 256)
    weight[5] = 0
    weight[6, 32:] = 0
    weight[7] *= 1e-28
    weight[8, :64] *= 1e-4
    found = search(weight, format)
    assert found.format == format
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    multiples, steps = cpu.steps_of(found.scales)
    assert torch.equal(multiples * steps[:, None], found.scales)
    assert (found.scales != 0).all()
    assert torch.equal(found.dequantize()[5], torch.zeros(256))
    assert torch.equal(found.dequantize()[6, 32:], torch.zeros(224))
    rows = [relative_error(weight[i : i + 1], search(weight[i : i + 1], format)) for i in (6, 7)]
    assert max(rows) < (0.03 if format.bits == 4 else 0.3)


def test_steps_make_up_for_what_counts():
    """Where one group, and every fourth column of it, counts most, its scale is nearly free."""
    weight, counts = gauss(64, 256), torch.ones(256)
    counts[:64:2], counts[:32] = 100, 1000
    counts[:32:4] *= 1000

    def error(format: Format) -> float:
        found = search(weight, format, importance_K=counts)
        return ((found.dequantize() - weight).square() * counts).sum().item()

    assert error(STEPPED) < 1.01 * error(STEPPED.free)


def test_a_weight_whose_rows_steps_would_spoil_keeps_free_scales():
    weight = gauss(64, 1536)
    assert settle(weight, STEPPED) == (STEPPED, False)
    assert quantize(weight, STEPPED).format == STEPPED
    weight[:, 5] *= 100
    errors = [relative_error(weight, search(weight, f)) for f in (STEPPED, STEPPED.free)]
    assert errors[0] > 1.1 * errors[1]
    assert settle(weight, STEPPED) == (STEPPED.free, False)
    found, wanted = quantize(weight, STEPPED), search(weight, STEPPED.free)
    assert found.format == STEPPED.free
    assert torch.equal(found.scales, wanted.scales)


def test_a_trained_grid_keeps_its_scales():
    trained = round_to_nearest(gauss(64, 256), STEPPED)
    assert trained.format == STEPPED.free
    weight = trained.dequantize()
    assert settle(weight, STEPPED) == (STEPPED.free, True)
    found = quantize(weight, STEPPED)
    assert found.format == STEPPED.free
    assert relative_error(weight, found) < 1e-6
    assert quantize(weight, STEPPED, grid=True).format == STEPPED.free


@pytest.mark.parametrize("format", [Format(8), Format(4, 32), Format(2, 32), STEPPED])
def test_stacks_chunks_and_rows_are_quantized_alike(monkeypatch, format):
    stack = gauss(12, 64).view(3, 4, 64)
    whole = search(stack, format)
    assert whole.shape == (3, 4, 64)
    monkeypatch.setattr(module, "CHUNK_WEIGHTS", 100)
    pieces = search(stack, format)
    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.scales, whole.scales)
    one = search(stack[2], format)
    assert torch.equal(one.packed, whole[2].packed)
    assert relative_error(stack, pieces) == pytest.approx(plain_error(stack, whole))


@pytest.mark.parametrize("format", [Format(8), Format(4, 32), Format(2)])
def test_zeros_and_very_small_weights_stay_what_they_are(format):
    weight = torch.zeros(3, 64)
    weight[1] = 1e-20 * torch.randn(64, generator=generator())
    weight[2, 5] = 1.0
    found = quantize(weight, format)
    assert torch.equal(found.dequantize()[0], torch.zeros(64))
    assert found.dequantize()[1].abs().max() < 1e-19
    assert torch.equal(found.dequantize()[2], weight[2])
    assert (found.scales != 0).all()


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(
        ConfigError, match=r"rows of 48, which groups of 32 do not divide; use .*16"
    ):
        quantize(gauss(4, 48), Format(4, 32))
    for value in (float("nan"), float("inf")):
        weight = gauss(4, 64)
        weight[3, 3] = value
        with pytest.raises(WeightsError, match="infinite or not a number"):
            quantize(weight, Format(4))
