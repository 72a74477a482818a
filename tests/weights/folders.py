"""Checkpoint folders as others write them: one file, or shards with an index."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemsmith.model.text import TextModel
from gemsmith.testing import random_model, tiny_config
from gemsmith.weights.names import PREFIXES
from gemsmith.weights.ple import PLEStore


def tensors(size: str = "E2B", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A checkpoint's tensors under their written names."""
    state = random_model(tiny_config(size), dtype=dtype).state_dict()
    return {PREFIXES[0] + name: tensor for name, tensor in state.items()}


def write(folder: Path, state: dict[str, Tensor], size: str = "E2B") -> Path:
    folder.mkdir(exist_ok=True)
    tiny_config(size).save(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, parts: list[dict[str, Tensor]], size: str = "E2B") -> Path:
    folder.mkdir(exist_ok=True)
    tiny_config(size).save(folder)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def halves(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = list(state)
    return [{k: state[k] for k in names[::2]}, {k: state[k] for k in names[1::2]}]


def assert_same(model: TextModel, state: dict[str, Tensor]) -> None:
    """Every weight of the model is that of `state`, bit for bit."""
    mine = model.state_dict()
    for name, tensor in mine.items():
        assert torch.equal(tensor, state[PREFIXES[0] + name]), name
    assert len(mine) + isinstance(getattr(model, "embed_tokens_per_layer", 0), PLEStore) == len(
        state
    )
