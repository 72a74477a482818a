"""Quantizing on load: the model that the quantized folder gives, tensor by tensor."""

import json
from dataclasses import replace

import pytest
import torch
from tests.weights.low_bit import floats, growth_with_the_table, low_config

from gemsmith.cache.none import NoCache
from gemsmith.engine.engine import LM
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.model.text import TextModel
from gemsmith.quant.formats import Format
from gemsmith.quant.linear import QuantLinear, QuantModule
from gemsmith.quant.quantize import quantize
from gemsmith.testing import random_model
from gemsmith.weights import rounding, tensors
from gemsmith.weights.convert import quantize_checkpoint
from gemsmith.weights.load import load_model, load_towers, quantized_values
from gemsmith.weights.recipe import Recipe, recipe_on_load
from gemsmith.weights.save import save_model
from gemsmith.weights.tensors import read_checkpoint

IDS = torch.tensor([5, 9, 5, 31, 2, 77, 95, 0, 5, 64, 12, 3])


def logits(model: TextModel) -> torch.Tensor:
    kv = NoCache(model.config, [len(IDS)])
    return model.logits(model(IDS, torch.arange(len(IDS)), kv))


@pytest.mark.parametrize("ple", ["disk", "memory"])
@pytest.mark.parametrize(
    ("size", "quant"),
    [("E2B", "int4"), ("E4B", "int2"), ("12B", "int8"), ("26B-A4B", "int4"), ("31B", "int2")],
)
def test_the_result_computes_exactly_what_the_quantized_folder_does(
    tmp_path, monkeypatch, size, quant, ple
):
    monkeypatch.setattr(tensors, "PIECE_BYTES", 1024)  # many pieces to a weight
    source = floats(tmp_path / "floats", size)
    quantize_checkpoint(source, tmp_path / "low", recipe_on_load(quant))
    config, ours = load_model(source, quant=quant, ple=ple)
    same_config, theirs = load_model(tmp_path / "low", ple=ple)
    assert config == same_config
    assert torch.equal(logits(ours), logits(theirs))
    mine = {n: m.stored for n, m in ours.named_modules() if isinstance(m, QuantModule)}
    for name, module in theirs.named_modules():
        if isinstance(module, QuantModule):
            weight, found = module.stored, mine.pop(name)
            assert found.format.bits == weight.format.bits
            assert torch.equal(found.dequantize(), weight.dequantize()), name
    assert not mine


def test_weights_trained_for_a_grid_keep_it(tmp_path, monkeypatch):
    """Piece by piece and, of the table on disk, row by row: one decision for the whole weight."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", 512)
    config = low_config()
    model = random_model(config)
    formats = Recipe("4").formats(config)
    for name, tensor in model.state_dict().items():
        if name in formats:
            codes = quantize(tensor, formats[name]).codes().clamp(-6, 6)
            G = formats[name].groups(tensor.shape[-1])
            grid = 0.01 * codes.unflatten(-1, (G, -1))
            tensor.copy_(grid.flatten(-2))
    save_model(model, config, tmp_path / "floats")
    quantize_checkpoint(tmp_path / "floats", tmp_path / "low", Recipe("4"))
    ours = load_model(tmp_path / "floats", quant="int4")[1]
    theirs = load_model(tmp_path / "low")[1]
    assert torch.equal(logits(ours), logits(theirs))


def test_linear_layers_of_the_towers_are_quantized_too(tmp_path):
    source = floats(tmp_path / "floats", media=True)
    quantize_checkpoint(source, tmp_path / "low", Recipe("4"))
    config, _ = load_model(source, quant="int4")
    ours = load_towers(source, config, device="cpu", dtype=torch.float32, quant="int4")
    theirs = load_towers(tmp_path / "low", config, device="cpu", dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in ours.modules()) > 20
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in theirs.state_dict().items())


def test_progress_adds_up(tmp_path):
    source, told = floats(tmp_path / "floats", "26B-A4B"), []
    config, _ = load_model(source, quant="int4", advance=lambda key, n: told.append((key, n)))
    total = quantized_values(config, "int4")
    assert sum(n for _, n in told) == total > 100_000
    assert "model.language_model.layers.0.experts.gate_up_proj" in dict(told)


def test_lm_says_how_far_it_is():
    told: list[tuple[int, int]] = []
    lm = LM.load("pocket", quant="int4", progress=lambda *now: told.append(now))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert isinstance(lm.model.get_submodule("layers.0.mlp.up_proj"), QuantLinear)
    assert lm.memory()["weights"] < LM.load("pocket").memory()["weights"] / 3


@pytest.mark.parametrize("quant", ["int3", "4", "", "mobile"])
def test_unknown_values_are_refused(tmp_path, quant):
    with pytest.raises(ConfigError, match=rf"quant '{quant}': must be int8, int4, int2, or None"):
        load_model(floats(tmp_path / "floats"), quant=quant)


def test_a_low_bit_checkpoint_is_refused(tmp_path):
    quantize_checkpoint(floats(tmp_path / "floats"), tmp_path / "low", Recipe("8"))
    with pytest.raises(WeightsError, match="is quantized already: load it without quant='int4'"):
        load_model(tmp_path / "low", quant="int4")


def test_a_checkpoint_that_only_says_so_is_refused(tmp_path):
    source = floats(tmp_path / "floats")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gemma"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="is quantized already"):
        load_model(source, quant="int8")


def test_groups_that_do_not_divide_are_named(tmp_path):
    config = low_config()
    config = replace(config, text_config=replace(config.text_config, intermediate_size=40))
    save_model(random_model(config), config, tmp_path / "floats")
    with pytest.raises(ConfigError, match=r"layers.0.mlp.down_proj.weight has rows of 40, which"):
        load_model(tmp_path / "floats", quant="int4")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["layers.2.mlp.up_proj.weight", "embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path, name, value):
    config = low_config()
    model = random_model(config, dtype=torch.bfloat16)
    model.get_parameter(name).data[3, 3] = value
    save_model(model, config, tmp_path / "floats")
    with pytest.raises(WeightsError, match=rf"{name}: a weight is infinite or not a number"):
        load_model(tmp_path / "floats", quant="int4")


def test_a_table_on_disk_that_holds_no_numbers_is_named_when_its_row_is_read(tmp_path):
    config = low_config()
    model = random_model(config, dtype=torch.bfloat16)
    model.get_parameter("embed_tokens_per_layer.weight").data[77, 3] = torch.nan
    save_model(model, config, tmp_path / "floats")
    # Every second of 96 rows is looked at for a grid, row 77 not.
    loaded = load_model(tmp_path / "floats", quant="int4")[1]
    with pytest.raises(WeightsError, match="the per-layer table: a weight is infinite"):
        logits(loaded)


def test_a_file_cut_short_while_it_is_read_is_named(tmp_path):
    source = floats(tmp_path / "floats")
    stored = read_checkpoint(source)
    key = "model.language_model.layers.7.mlp.up_proj.weight"
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[: stored[key].offset + 100])
    with pytest.raises(WeightsError, match=r"model.safetensors was cut short while it was read"):
        list(rounding.rounded(key, stored[key], Format(4, 32), grid=False))


def test_values_at_odd_bytes_of_a_file_are_read_as_they_are(tmp_path):
    """Tensors of other files may begin anywhere; those of ours are aligned."""
    source = floats(tmp_path / "floats")
    expected = logits(load_model(source, quant="int4")[1])
    with open(source / "model.safetensors", "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header, values = file.read(size), file.read()
        file.seek(0)
        header += b" "  # the values now begin one byte later
        file.write(len(header).to_bytes(8, "little") + header + values)
    assert any(t.offset % 2 for t in read_checkpoint(source).values())
    assert torch.equal(logits(load_model(source, quant="int4")[1]), expected)


def test_memory_holds_the_codes_and_some_pieces_of_floats(tmp_path):
    """A table of 64 MiB of floats, 20 as codes: at most the codes twice, while they are packed."""
    work = "load.load_model(at, quant='int4')"
    assert growth_with_the_table(tmp_path, work) < 44 << 10
