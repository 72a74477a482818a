"""Transformers loads what is written, towers included, and computes the same logits."""

from pathlib import Path

import pytest
import torch
from tests.weights.low_bit import floats
from torch import Tensor

from gemsmith.cache.none import NoCache
from gemsmith.quant import linear
from gemsmith.quant.packed import Packed
from gemsmith.weights.convert import Recipe, quantize_checkpoint
from gemsmith.weights.load import load_model

IDS = torch.tensor([5, 9, 5, 31, 2, 77, 88, 0, 5, 64, 12, 3])


def ours(folder: Path) -> Tensor:
    _, model = load_model(folder, dtype=torch.float32)
    hidden = model(IDS, torch.arange(len(IDS)), NoCache(model.config, [len(IDS)]))
    return model.logits(hidden)


def theirs(folder: Path) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model, found = transformers.Gemma4ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    with torch.no_grad():
        return model.eval()(input_ids=IDS[None]).logits[0]


@pytest.mark.parametrize(
    "recipe", [Recipe("mobile"), Recipe("4", float_tables=True), Recipe("8", 64, float_tables=True)]
)
def test_logits_of_a_low_bit_checkpoint_equal_those_of_transformers(tmp_path, monkeypatch, recipe):
    """Both multiply with the codes' floats here; ours would round inputs to int8 otherwise."""
    if not recipe.mobile:
        pytest.importorskip("compressed_tensors")
    monkeypatch.setattr(linear, "integer_product", linear.float_product)
    monkeypatch.setattr(Packed, "takes", lambda *_: False)
    quantize_checkpoint(floats(tmp_path / "floats", media=True), tmp_path / "low", recipe)
    low = ours(tmp_path / "low")
    assert low.abs().max() > 0.1
    torch.testing.assert_close(theirs(tmp_path / "low"), low, rtol=1e-5, atol=1e-5)
