"""Tensors by name are those of the modules: names, shapes, order, and which are trained."""

import pytest
from torch import nn

from gemsmith import shapes
from gemsmith.config import PRESETS
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.testing import SIZES, tiny_config, tiny_media_config


@pytest.mark.parametrize("size", SIZES)
def test_decoders_are_the_module_s(size):
    config = tiny_config(size).text_config
    model = TextModel(config, device="meta")
    found = {tensor.name: tensor for tensor in shapes.decoder(config)}
    assert [(n, tuple(t.shape)) for n, t in model.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in found.items()
    ]
    assert {n for n, t in found.items() if t.trained} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("config", [*PRESETS.values(), *map(tiny_media_config, SIZES)])
def test_towers_are_the_module_s(config):
    module = Towers(config, device="meta")
    found = {tensor.name: tensor for tensor in shapes.towers(config)}
    state = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.items()} == state
    assert {n for n, t in found.items() if t.trained} == {n for n, _ in module.named_parameters()}
    linear = {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, tensor in found.items() if tensor.linear} == linear
