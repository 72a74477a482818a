"""Towers in checkpoint files: saved, read back, read by Transformers, refused with reasons."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemsmith.config import text_only
from gemsmith.errors import WeightsError
from gemsmith.model.towers import Towers
from gemsmith.testing import (
    SIZES,
    assert_close,
    random_model,
    random_towers,
    tiny_media_config,
    tolerance,
)
from gemsmith.weights.load import load_model, load_towers
from gemsmith.weights.save import save_model


def saved(folder, size="E2B", dtype=torch.float32):
    config = tiny_media_config(size)
    towers = random_towers(config, dtype=dtype)
    save_model(random_model(config, dtype=dtype), config, folder, towers=towers)
    return config, towers


def read(folder, config) -> Towers:
    return load_towers(folder, config, device="cpu", dtype=torch.float32)


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_towers_come_back_bitwise(tmp_path, size, dtype):
    config, towers = saved(tmp_path, size, dtype)
    loaded_config, _ = load_model(tmp_path)
    assert loaded_config == config
    loaded = load_towers(tmp_path, loaded_config, device="cpu", dtype=dtype)
    there = loaded.state_dict()
    assert list(there) == list(towers.state_dict())
    for name, tensor in towers.state_dict().items():
        assert torch.equal(tensor, there[name]), name
        assert there[name].dtype == dtype


@pytest.mark.parametrize("size", ["E2B", "31B", "12B"])
def test_transformers_reads_what_is_saved_and_sees_the_same(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    _, towers = saved(tmp_path, size)
    hf = transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(0)
    values = 6912 if size == "12B" else 768
    side = 2 if size == "12B" else 6
    grid = torch.stack(
        torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1
    ).view(-1, 2)
    patches = torch.rand(side * side, values, generator=generator)
    ours = towers.see(patches, grid, [len(grid)])
    with torch.no_grad():
        found = hf.model.get_image_features(patches[None], grid[None], return_dict=True)
    theirs = found.pooler_output if hasattr(found, "pooler_output") else found
    theirs = theirs[0] if isinstance(theirs, tuple | list) else theirs
    assert_close(ours, theirs.reshape(ours.shape), tolerance(torch.float32, 768, steps=32))


def test_a_text_only_save_says_so_when_towers_are_asked(tmp_path):
    config = tiny_media_config("E2B")
    save_model(random_model(config), config, tmp_path)
    assert load_model(tmp_path)[0] == text_only(config)
    with pytest.raises(
        WeightsError, match=r"no image or audio input, though config\.json describes"
    ):
        read(tmp_path, config)


def test_tensors_missing_misshapen_and_in_excess_are_named(tmp_path):
    config, _ = saved(tmp_path)
    table = "model.vision_tower.patch_embedder.position_embedding_table"

    def change(tensors):
        del tensors["model.embed_audio.embedding_projection.weight"]
        tensors[table] = tensors[table][:, :5].clone()
        tensors["model.vision_tower.std_bias"] = torch.zeros(32)

    rewrite(tmp_path, change)
    with pytest.raises(WeightsError) as error:
        read(tmp_path, config)
    text = str(error.value)
    assert "1 tensor missing:\n  model.embed_audio.embedding_projection.weight" in text
    assert f"{table} is [2, 5, 32], expected [2, 512, 32]" in text
    assert "1 tensor of the towers with no place in this model:\n  model.vision_tower.std" in text


def test_the_decoder_loads_without_touching_damaged_towers(tmp_path):
    saved(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.audio_tower.output_proj.bias"))
    load_model(tmp_path)
