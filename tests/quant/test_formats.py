"""Codes are packed as documented, and formats refuse what they cannot hold."""

import pytest
import torch
from tests.conftest import needs_extension

from gemsmith.errors import ConfigError, WeightsError
from gemsmith.ops import native
from gemsmith.quant.formats import BITS, Format, Quantized, pack, unpack
from gemsmith.quant.quantize import quantize


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(16,), (3, 8), (2, 5, 24)])
def test_unpacking_gives_back_every_code(bits, shape):
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, shape, generator=torch.Generator().manual_seed(0))
    codes.view(-1)[:2] = torch.tensor([low, -low - 1])
    codes = codes.to(torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [-128, 0, 127], [0, 128, 255]),
        (4, [-8, 7, 0, -1], [0xF0, 0x78]),
        (2, [-2, -1, 0, 1], [0b11_10_01_00]),
    ],
)
def test_the_first_code_is_in_the_lowest_bits_offset_by_half(bits, codes, expected):
    assert pack(torch.tensor(codes, dtype=torch.int8), bits).tolist() == expected


def test_a_weight_is_its_code_times_the_scale_of_its_group():
    codes = torch.tensor([[1, 2, 3, 4], [-1, -2, -3, -4]], dtype=torch.int8)
    scales = torch.tensor([[1.0, 10.0], [0.5, -2.0]])
    weight = Quantized.from_codes(Format(4, 2), codes, scales)
    assert weight.dequantize().tolist() == [[1, 2, 30, 40], [-0.5, -1, 6, 8]]
    assert weight[1:].dequantize().tolist() == [[-0.5, -1, 6, 8]]
    assert weight[1:].packed.data_ptr() == weight.packed[1:].data_ptr()


@needs_extension
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_extension_and_torch_give_the_same_bits(monkeypatch, bits, group):
    values = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(bits))
    stack = quantize(values, Format(bits, group))
    parts = [stack, stack[1], stack[0][1:], stack[0][:0]]
    found = [part.dequantize() for part in parts]
    found.append(stack[1].rows(torch.tensor(2)))
    monkeypatch.setattr(native, "available", lambda: False)
    for one, part in zip(found, parts, strict=False):
        assert torch.equal(one, part.dequantize())
    assert torch.equal(found[-1], stack[1].rows(torch.tensor(2)))


def test_an_expert_of_a_stack_is_a_matrix():
    codes = torch.arange(-8, 8, dtype=torch.int8).view(2, 2, 4)
    stack = Quantized.from_codes(Format(4), codes, torch.ones(2, 2, 1))
    assert stack[1].shape == (2, 4)
    assert torch.equal(stack[1].dequantize(), codes[1].float())


@pytest.mark.parametrize(
    ("format", "text", "size"),
    [
        (Format(8), "int8", 100 * (64 + 4)),
        (Format(4), "int4", 100 * (32 + 4)),
        (Format(4, 32), "int4-g32", 100 * (32 + 4)),
        (Format(2, 64), "int2-g64", 100 * (16 + 2)),
        (Format(4, 32, steps=True), "int4-g32s", 100 * (32 + 2 + 4)),
    ],
)
def test_a_format_says_its_name_and_size(format, text, size):
    assert str(format) == text
    assert format.bytes(100, 64) == format.bytes(4, 25, 64) == size
    codes = torch.zeros(100, 64, dtype=torch.int8)
    weight = Quantized.from_codes(format, codes, torch.ones(100, format.groups(64)))
    if not format.steps:
        assert weight.nbytes == size + 2 * weight.scales.numel() * (format.group is not None)


def test_what_no_format_can_hold_is_refused():
    with pytest.raises(ConfigError, match="bits 3: weights are stored in 2, 4 or 8"):
        Format(3)
    with pytest.raises(ConfigError, match="group 0: must be positive"):
        Format(4, 0)
    with pytest.raises(ConfigError, match=r"o_proj has rows of 48, which groups of 32 do not .*16"):
        Format(4, 32).groups(48, "o_proj")
    with pytest.raises(ConfigError, match=r"rows of 13, which groups of 4 .*use one scale a row"):
        Format(8, 4).groups(13)
    with pytest.raises(ConfigError, match="rows of 6: at 2 bits not whole bytes"):
        Format(2).groups(6)
    for bits, group in ((4, None), (4, 64), (8, 32), (2, 256)):
        with pytest.raises(ConfigError, match=rf"int{bits}.* has no scale steps; 4 bits have them"):
            Format(bits, group, steps=True)
    with pytest.raises(ConfigError, match="a weight has rows of 32, one group, whose scale is no"):
        Format(4, 32, steps=True).groups(32)


def test_steps_are_where_they_can_be():
    assert Format(4, 32).stepped(64) == Format(4, 32, steps=True)
    assert Format(2, 128).stepped(256) == Format(2, 128, steps=True)
    for format, K in (
        (Format(4, 32), 32),
        (Format(4, 64), 128),
        (Format(4), 64),
        (Format(8, 32), 64),
    ):
        assert format.stepped(K) == format
    assert Format(4, 32, steps=True).free == Format(4, 32)


def test_codes_and_scales_must_fit_the_shape():
    codes, scales = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1)
    Quantized(Format(4), (4, 16), codes, scales)
    for shape, packed, scale in [
        ((4, 15), codes, scales),
        ((4, 18), codes, scales),
        ((4, 16), codes, torch.ones(4, 2)),
        ((4, 16), codes.char(), scales),
        ((4, 16), codes, scales.double()),
    ]:
        with pytest.raises((WeightsError, ConfigError), match=r"weight .*(codes|bytes)"):
            Quantized(Format(4), shape, packed, scale)
