"""Training for low bits: what is learned, what is kept, what is written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.copying import fresh_model
from tests.train.test_trainer import TINY, one_thread

from gemsmith.cache.none import NoCache
from gemsmith.config import TextConfig
from gemsmith.errors import ConfigError
from gemsmith.model.text import TextModel
from gemsmith.quant.formats import Format
from gemsmith.quant.quantize import on_grid, quantize, relative_error, round_to_nearest
from gemsmith.testing import tiny_config, whole_groups
from gemsmith.train.data import TokenSet
from gemsmith.train.rounding import decoder_formats, nearest, rounded
from gemsmith.train.trainer import Trainer

__all__ = ["one_thread"]


@pytest.fixture
def config() -> TextConfig:
    text = whole_groups(tiny_config("E2B", vocab_size=64)).text_config
    half = text.layer_types[: text.num_hidden_layers // 2]
    return replace(
        text, num_hidden_layers=len(half), layer_types=half, num_kv_shared_layers=len(half) // 2
    )


def weights(model: TextModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_inside_the_weights_lie_on_the_grid_and_after_they_are_as_before(config) -> None:
    model = fresh_model(config)
    before, formats = weights(model), decoder_formats(model, "4")
    assert {"embed_tokens.weight", "layers.0.mlp.up_proj.weight"} <= formats.keys()
    with rounded(model, formats):
        inside = weights(model)
    for name, weight in inside.items():
        if name in formats:
            wanted = round_to_nearest(before[name], formats[name]).dequantize()
            torch.testing.assert_close(weight, wanted, rtol=0, atol=0)
            assert not torch.equal(weight, before[name])
        else:
            torch.testing.assert_close(weight, before[name], rtol=0, atol=0)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [Format(2, 32), Format(4, 32), Format(8, 64), Format(4)])
def test_nearest_are_the_values_of_the_codes_that_quantize_writes(format, dtype) -> None:
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    weight[1], weight[2, :32], weight[3] = 0, 0, weight[3] * 1e-38
    weight[4, :2], weight[5, :2] = torch.tensor([9.0, -9.0]), torch.tensor([-9.0, 9.0])
    weight = weight.to(dtype)
    wanted = round_to_nearest(weight, format).dequantize()
    torch.testing.assert_close(nearest(weight, format), wanted, rtol=0, atol=0)


def test_gradients_are_those_at_the_rounded_weights(config) -> None:
    model = fresh_model(config)
    ids = torch.arange(9)
    formats = decoder_formats(model, "2")

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model.logits(model(ids, ids, NoCache(config, [9]))).square().mean().backward()
        grad = dict(model.named_parameters())["layers.0.mlp.up_proj.weight"].grad
        assert grad is not None
        return grad.clone()

    exact = gradient()
    with rounded(model, formats):
        passed = gradient()
    with torch.no_grad():
        for name, format in formats.items():
            weight = dict(model.named_parameters())[name]
            weight.copy_(round_to_nearest(weight, format).dequantize())
    torch.testing.assert_close(passed, gradient(), rtol=0, atol=0)
    assert not torch.allclose(passed, exact, rtol=0.05)


def test_what_was_trained_for_low_bits_loses_less_by_them(
    config, copy_set: TokenSet, tmp_path: Path
) -> None:
    losses = {}
    for bits in (None, "2"):
        tiny = replace(TINY, batch_tokens=64, bits=bits)
        trainer = Trainer(fresh_model(config), tiny, copy_set, tmp_path / str(bits))
        batch = next(trainer.packer)
        for _ in range(60):
            trainer.train_step(batch)
        trainer.formats = decoder_formats(trainer.model, "2")
        losses[bits], _ = trainer.train_step(batch)
    assert losses["2"] < 0.5 * losses[None], losses


def test_rounded_weights_are_found_on_their_grid_as_bfloat16(config) -> None:
    """So a checkpoint written inside `rounded` loses nothing when it is quantized."""
    model = fresh_model(config)
    formats = decoder_formats(model, "4")
    with rounded(model, formats):
        stored = {name: w.bfloat16() for name, w in weights(model).items() if name in formats}
    for name, weight in stored.items():
        assert on_grid(weight, formats[name]), name
        assert relative_error(weight, quantize(weight, formats[name])) < 1e-5


def test_bits_that_cannot_be_are_refused(copy_set: TokenSet, tmp_path: Path) -> None:
    model = fresh_model(tiny_config("E2B", vocab_size=40).text_config)
    with pytest.raises(ConfigError, match="groups of 32 do not divide"):
        Trainer(model, replace(TINY, bits="4"), copy_set, tmp_path)
    with pytest.raises(ConfigError, match="bits '3': choose"):
        Trainer(model, replace(TINY, bits="3"), copy_set, tmp_path)
