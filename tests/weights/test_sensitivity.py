"""Sensitivities are those of the whole model: the same as from shaking it in one piece."""

import pytest
import torch
from tests.weights.low_bit import floats, low_config
from torch import Tensor

from gemsmith.cache.none import NoCache
from gemsmith.errors import RequestError, WeightsError
from gemsmith.model.text import TextModel
from gemsmith.testing import random_model
from gemsmith.weights import sensitivity, tensors
from gemsmith.weights.load import load_model
from gemsmith.weights.mixed import units_of
from gemsmith.weights.names import EMBEDDING, PLE_TABLE, module_name
from gemsmith.weights.recipe import Recipe
from gemsmith.weights.save import save_model
from gemsmith.weights.sensitivity import probe_tokens, sensitivities
from gemsmith.weights.tensors import read_checkpoint

TOKENS = [[5, 9, 5, 31, 2, 77, 95, 0, 5, 64, 12, 3], [1, 5, 2, 40, 41, 42]]


def weights_of(folder):
    return {module_name(key): tensor for key, tensor in read_checkpoint(folder).items()}


def hidden(model: TextModel) -> Tensor:
    ids = torch.tensor([id for ids in TOKENS for id in ids])
    positions = torch.cat([torch.arange(len(ids)) for ids in TOKENS])
    return model(ids, positions, NoCache(model.config, [len(ids) for ids in TOKENS]))


def divergence(clean: Tensor, other: Tensor) -> float:
    p, q = (logits.double().log_softmax(-1) for logits in (clean, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


def shake(weight: Tensor, name: str) -> float:
    """Put on the noise; returns its relative squared error."""
    before = weight.clone()
    noisy = sensitivity._shaken(before, sensitivity._generator(name))
    weight.copy_(noisy)
    return ((noisy - before).square().sum() / before.square().sum()).item()


@pytest.mark.parametrize("size", ["E2B", "12B", "26B-A4B", "31B"])
@torch.no_grad()
def test_each_unit_counts_what_it_does_to_the_distributions(tmp_path, monkeypatch, size):
    """Attention, MLPs, experts, K/V that later layers read: wherever it acts."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", 4096)  # the head in many pieces
    folder, config = floats(tmp_path / "floats", size), low_config(size).text_config
    units = units_of(config, Recipe("mixed", budget=1).candidates(low_config(size)))
    found = dict(zip(units, sensitivities(config, weights_of(folder), units, TOKENS), strict=True))
    model = load_model(folder, dtype=torch.float32, ple="memory")[1]
    clean = model.logits(hidden(model))
    layers = [unit for unit in units if "layers." in unit[0]]
    assert len(layers) == len(units) - 1 - (PLE_TABLE in weights_of(folder))
    assert sum(map(len, layers)) == sum(
        "_proj" in name and "router" not in name and "per_layer" not in name
        for name, _ in model.named_parameters()
    )
    for unit in layers:
        before = {name: model.get_parameter(name).clone() for name in unit}
        noise = sum(shake(model.get_parameter(name), name) for name in unit) / len(unit)
        kl = divergence(clean, model.logits(hidden(model)))
        assert found[unit] == pytest.approx(kl / noise, rel=0.01, abs=1e-6), unit
        for name, values in before.items():
            model.get_parameter(name).copy_(values)
    # The tied head gets its noise piece by piece, hence other noise than the rows of the input.
    assert found[(EMBEDDING,)] > 0


@torch.no_grad()
def test_a_table_is_shaken_in_the_rows_that_are_read_the_same_for_the_same_token(tmp_path):
    folder, config = floats(tmp_path / "floats"), low_config().text_config
    units = [(PLE_TABLE,), (EMBEDDING,)]
    found = dict(zip(units, sensitivities(config, weights_of(folder), units, TOKENS), strict=True))
    model = load_model(folder, dtype=torch.float32, ple="memory")[1]
    clean = model.logits(hidden(model))
    ids = torch.tensor([id for ids in TOKENS for id in ids])
    for name in (PLE_TABLE, EMBEDDING):
        weight = model.get_parameter(name)
        before, used = weight.clone(), ids.unique()
        noisy = sensitivity._shaken(before[used], sensitivity._generator(name))
        rows = before[ids]
        weight[used] = noisy
        noise = ((weight[ids] - rows).square().sum() / rows.square().sum()).item()
        states = hidden(model)
        weight.copy_(before)
        if name == EMBEDDING:
            shake(weight, name)
        kl = divergence(clean, model.logits(states))
        weight.copy_(before)
        assert found[name,] == pytest.approx(kl / noise, rel=0.01)


def test_a_head_apart_and_its_embedding_count_each_for_itself(tmp_path):
    """As in sources that store the two apart."""
    folder, config = floats(tmp_path / "floats", "12B"), low_config("12B").text_config
    weights = weights_of(folder)
    both = sensitivities(config, weights, [(EMBEDDING,)], TOKENS)[0]
    apart = weights | {"lm_head.weight": weights[EMBEDDING]}
    units = [(EMBEDDING,), ("lm_head.weight",)]
    rows, head = sensitivities(config, apart, units, TOKENS)
    assert 0 < head < both
    assert 0 < rows < both


def test_tokens_of_data_are_beginnings_spread_over_it():
    config = low_config().text_config
    data = [[number % 90] * (300 + number) for number in range(40)]
    taken = probe_tokens(config, data)
    assert [ids[0] for ids in taken] == [0, 10, 20, 30]
    assert {len(ids) for ids in taken} == {256}
    assert probe_tokens(config, [[], [3, 4]]) == [[3, 4]]
    assert sum(map(len, probe_tokens(config, [[1] * 5] * 9999))) <= sensitivity.PROBE_TOKENS


def test_without_data_tokens_are_drawn_the_same_each_time():
    config = low_config().text_config
    drawn = probe_tokens(config, None)
    assert sum(map(len, drawn)) == sensitivity.PROBE_TOKENS
    assert drawn == probe_tokens(config, None)
    assert {id for ids in drawn for id in ids} == set(range(config.vocab_size))


def test_ids_beyond_the_vocabulary_and_weights_that_are_no_numbers_are_named(tmp_path):
    config = low_config("12B")
    folder, text = floats(tmp_path / "floats", "12B"), config.text_config
    with pytest.raises(RequestError, match="sequence 1 has the token id 96; the vocabulary"):
        sensitivities(text, weights_of(folder), [(EMBEDDING,)], [[96]])
    model = random_model(config, dtype=torch.bfloat16)
    model.get_parameter("layers.3.mlp.up_proj.weight").data[0, 0] = torch.nan
    save_model(model, config, folder)
    with pytest.raises(WeightsError, match=r"layers.3.mlp.up_proj.weight: a weight is infinite"):
        sensitivities(text, weights_of(folder), [(EMBEDDING,)], TOKENS)
