"""Calibration layer by layer: its inputs are the model's, its results are what is written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.weights.low_bit import floats, low_config
from tests.weights.test_convert import SPOILT, with_outliers
from torch import Tensor

from gemsmith.cache.none import NoCache
from gemsmith.errors import ConfigError, RequestError, WeightsError
from gemsmith.model.text import TextModel
from gemsmith.quant import linear
from gemsmith.quant.calibrate import gptq, gram, output_error
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.linear import float_product
from gemsmith.quant.packed import Packed
from gemsmith.quant.quantize import search
from gemsmith.testing import assert_close, random_model, tolerance
from gemsmith.weights import calibrate, streaming
from gemsmith.weights.calibrate import Calibration
from gemsmith.weights.convert import PROGRESS, quantize_checkpoint
from gemsmith.weights.load import load_model
from gemsmith.weights.names import module_name
from gemsmith.weights.recipe import Recipe
from gemsmith.weights.save import save_model
from gemsmith.weights.tensors import read_checkpoint

SIZES = ["E2B", "12B", "26B-A4B", "31B"]


def sequences(count: int = 24, length: int = 40) -> list[list[int]]:
    """Of unequal lengths; random ids."""
    generator = torch.Generator().manual_seed(5)
    draw = torch.randint(0, 90, (count, length), generator=generator).tolist()
    return [ids[: length - number] for number, ids in enumerate(draw)]


def logits(model: TextModel, ids: list[int]) -> Tensor:
    kv = NoCache(model.config, [len(ids)])
    return model.logits(model(torch.tensor(ids), torch.arange(len(ids)), kv))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def calibration(folder: Path, size: str, recipe: Recipe, **options) -> Calibration:
    config = low_config(size)
    stored = {module_name(key): tensor for key, tensor in read_checkpoint(folder).items()}
    return Calibration(config.text_config, stored, recipe.formats(config), sequences(), **options)


@pytest.mark.parametrize("size", SIZES)
def test_hidden_states_are_those_of_the_model_that_is_written(tmp_path, monkeypatch, size):
    """All layers, their norms, shared K/V, experts, per-layer inputs: nothing is left out."""
    monkeypatch.setattr(linear, "integer_product", float_product)
    monkeypatch.setattr(Packed, "takes", lambda *_: False)
    monkeypatch.setattr(streaming, "BATCH_TOKENS", 100)
    source = floats(tmp_path / "floats", size)
    quantize_checkpoint(source, tmp_path / "low", Recipe("4"), tokens=sequences())
    run = calibration(source, size, Recipe("4"))
    last = [name for name in run.weights if run.covers(name)][-1]
    run.take(last)
    while run._next < run.config.num_hidden_layers:
        run._run_layer(run._next)
        run._next += 1
    model = load_model(tmp_path / "low", dtype=torch.float32)[1]
    final = torch.cat([batch.x_TD for batch in run._batches])
    assert len(run._batches) > 3
    at = 0
    for ids in sequences()[:5]:
        hidden = model.norm(final[at : at + len(ids)])
        limit = tolerance(torch.float32, 64, steps=60)
        assert_close(model.logits(hidden), logits(model, ids), limit)
        at += len(ids)


@pytest.mark.parametrize(("size", "bits"), [*((s, "4") for s in SIZES), ("E2B", "mobile")])
def test_every_weight_is_better_on_its_inputs_than_without_data(tmp_path, monkeypatch, size, bits):
    """The sum over a model of random weights says little: its router alone may flip."""
    ratios: list[float] = []

    def watched(weight: Tensor, H_KK: Tensor, format: Format) -> Quantized:
        found = gptq(weight, H_KK, format)
        errors = [output_error(weight, q, H_KK)[0] for q in (found, search(weight, format))]
        ratios.append(errors[0] / errors[1])
        return found

    monkeypatch.setattr(calibrate, "gptq", watched)
    source = floats(tmp_path / "floats", size)
    rows = quantize_checkpoint(source, tmp_path / "low", Recipe(bits), tokens=sequences())
    load_model(tmp_path / "low")
    assert max(ratios) < 1
    assert sum(ratios) < 0.9 * len(ratios)
    assert len(ratios) == sum(row.calibrated for row in rows)
    told = {row.name: (row.calibrated, row.matrices) for row in rows}
    assert told["layers.0.mlp.up_proj.weight"] == told["layers.5.self_attn.o_proj.weight"] == (1, 1)
    assert told["embed_tokens.weight"] == (0, 1)
    if size == "26B-A4B":
        assert told["layers.0.experts.gate_up_proj"] == (6, 6)


def test_an_expert_that_saw_too_few_tokens_is_searched_and_the_row_says_so(tmp_path, monkeypatch):
    source = floats(tmp_path / "floats", "26B-A4B")
    plain = quantize_checkpoint(source, tmp_path / "plain", Recipe("4"))
    monkeypatch.setattr(calibrate, "MIN_EXPERT_TOKENS", 2)
    few = quantize_checkpoint(source, tmp_path / "few", Recipe("4"), tokens=sequences()[:12])
    at = [row.name for row in plain].index("layers.0.experts.gate_up_proj")
    assert 0 < few[at].calibrated < few[at].matrices == 6
    low, other = (load_model(tmp_path / name)[1].layers[0].experts for name in ("plain", "few"))
    same = [
        torch.equal(
            low.gate_up_proj.stored[e].dequantize(), other.gate_up_proj.stored[e].dequantize()
        )  # pyright: ignore
        for e in range(6)
    ]
    assert sum(same) == 6 - few[at].calibrated


def test_grids_of_training_and_8_bit_weights_are_left_alone(tmp_path):
    source = floats(tmp_path / "floats")
    quantize_checkpoint(source, tmp_path / "low", Recipe("4"))
    config, low = load_model(tmp_path / "low", dtype=torch.float32)
    trained = random_model(config, dtype=torch.bfloat16).float()
    weight = low.get_submodule("layers.1.mlp.up_proj").stored.dequantize()  # pyright: ignore
    trained.get_parameter("layers.1.mlp.up_proj.weight").data.copy_(weight)
    save_model(trained, config, tmp_path / "trained")
    rows = quantize_checkpoint(
        tmp_path / "trained", tmp_path / "new", Recipe("4"), tokens=sequences()
    )
    told = {row.name: row for row in rows}
    row = told["layers.1.mlp.up_proj.weight"]
    assert (row.calibrated, row.wrong < 1e-5 * row.whole) == (0, True)
    assert told["layers.1.mlp.gate_proj.weight"].calibrated == 1
    assert told["layers.1.per_layer_projection.weight"].calibrated == 0


def test_a_weight_that_steps_would_spoil_keeps_free_scales(tmp_path):
    source = with_outliers(tmp_path / "floats")
    rows = quantize_checkpoint(source, tmp_path / "low", Recipe("4"), tokens=sequences())
    (row,) = (row for row in rows if row.name == SPOILT)
    assert (str(row.format), row.calibrated) == ("int4-g32", 1)
    stepped = [row for row in rows if str(row.format) == "int4-g32s" and row.calibrated]
    assert len(stepped) > 10
    load_model(tmp_path / "low")


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_a_killed_process_is_gone_on_with_to_the_same_bytes(tmp_path, size):
    source, target = floats(tmp_path / "floats", size), tmp_path / "low"
    ids = sequences(3, 12)
    options = {"tokens": ids, "shard_bytes": 20_000}
    code = (
        "import json, sys, time\n"
        "from gemsmith.weights.convert import Recipe, quantize_checkpoint\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], Recipe('4'), shard_bytes=20_000,\n"
        "                    tokens=json.loads(sys.argv[3]),\n"
        "                    advance=lambda name, values: time.sleep(0.02))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(target), str(ids)])
    while len(list(target.glob("*.safetensors"))) < 4 and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (target / PROGRESS).exists()
    with pytest.raises(
        WeightsError, match="an unfinished quantization of another checkpoint or with"
    ):
        quantize_checkpoint(source, target, Recipe("4"), tokens=ids[:-1], shard_bytes=20_000)
    rows = quantize_checkpoint(source, target, Recipe("4"), **options)
    once = quantize_checkpoint(source, tmp_path / "once", Recipe("4"), **options)
    assert rows == once
    assert contents(target) == contents(tmp_path / "once")


def test_layers_that_were_written_are_read_and_not_chosen_again(tmp_path, monkeypatch):
    source = floats(tmp_path / "floats")
    whole = calibration(source, "E2B", Recipe("4"))
    names = [name for name in whole.weights if whole.covers(name)]
    first = {name: whole.take(name) for name in sorted(names) if name.startswith("layers.0.")}
    name, seen = "layers.1.mlp.up_proj.weight", []
    theirs = whole.take(name)
    monkeypatch.setattr(calibrate, "gram", lambda x, into=None: seen.append(0) or gram(x, into))
    again = calibration(source, "E2B", Recipe("4"), found=first.get)
    ours = again.take(name)
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.scales, theirs.scales)
    assert len(seen) == 4  # of layer 1 alone
    assert not any(name.startswith("layers.0.") for name in again._ready)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["layers.2.mlp.up_proj.weight", "layers.2.input_layernorm.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path, name, value):
    config = low_config()
    model = random_model(config, dtype=torch.bfloat16)
    model.get_parameter(name).data.view(-1)[3] = value
    save_model(model, config, tmp_path / "floats")
    with pytest.raises(WeightsError, match=rf"{name}: a weight is infinite or not a number"):
        quantize_checkpoint(tmp_path / "floats", tmp_path / "low", Recipe("4"), tokens=sequences(2))


def test_data_that_cannot_serve_is_refused_before_anything_is_written(tmp_path):
    source, target = floats(tmp_path / "floats"), tmp_path / "low"
    for tokens, message in (
        ([], "calibration data holds no tokens"),
        ([[]], "calibration data holds no tokens"),
        ([[1, 2], [3, 96]], "sequence 2 has the token id 96; the vocabulary .* ends at 95"),
    ):
        with pytest.raises(RequestError, match=message):
            quantize_checkpoint(source, target, Recipe("4"), tokens=tokens)
    with pytest.raises(ConfigError, match="calibration data: 8 bits are as good without"):
        quantize_checkpoint(source, target, Recipe("8"), tokens=sequences())
    assert not target.exists()
