import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks import random_checkpoint
from gemsmith.config import PRESETS
from gemsmith.errors import CapacityError, ConfigError
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.weights.convert import Recipe, left_as_floats, quantize_checkpoint
from gemsmith.weights.load import load_model
from gemsmith.weights.tensors import read_checkpoint


def test_a_random_checkpoint_loads_and_reads_any_text(tmp_path: Path) -> None:
    config = random_checkpoint.config_of("tiny-E2B")
    folder = random_checkpoint.write(config, tmp_path / "new" / "folder")
    loaded, model = load_model(folder)
    assert loaded == config
    weight = model.layers[0].mlp.up_proj.weight.float()
    assert weight.std().item() == pytest.approx(random_checkpoint.DEVIATION, rel=0.1)
    assert torch.equal(model.norm.weight, torch.ones_like(model.norm.weight))
    assert model.layers[1].self_attn.k_norm.weight.tolist() == [pytest.approx(32**-0.25, 0.01)] * 32
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == config.text_config.vocab_size
    text = "Grüße, 世界\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", ["tiny-E2B", "tiny-26B-A4B", "tiny-31B"])
@pytest.mark.parametrize("bits", ["8", "4", "2", "mobile"])
def test_a_low_bit_folder_is_what_quantize_would_have_written(
    size: str, bits: str, tmp_path: Path
) -> None:
    if bits == "mobile" and "A4B" in size:
        with pytest.raises(ConfigError, match="its layout has no place for experts"):
            random_checkpoint.made(size, bits, tmp_path / "straight")
        return
    straight = random_checkpoint.made(size, bits, tmp_path / "straight")
    floats = random_checkpoint.made(size, None, tmp_path / "floats")
    quantize_checkpoint(floats, tmp_path / "quantized", Recipe(bits))
    straight_config, quantized_config = (
        json.loads((folder / "config.json").read_text())
        for folder in (straight, tmp_path / "quantized")
    )
    assert straight_config == quantized_config
    found, expected = (read_checkpoint(folder) for folder in (straight, tmp_path / "quantized"))
    assert {key: (t.dtype, t.shape) for key, t in found.items()} == {
        key: (t.dtype, t.shape) for key, t in expected.items()
    }
    assert not left_as_floats(straight) or bits == "mobile"


@pytest.mark.parametrize("bits", ["8", "4", "2"])
def test_low_bit_noise_has_the_same_spread(bits: str, tmp_path: Path) -> None:
    _, model = load_model(random_checkpoint.made("tiny-E2B", bits, tmp_path), dtype=torch.float32)
    weight: Any = model.layers[0].mlp.up_proj.weight
    spread = weight.stored.dequantize().std().item()
    assert spread == pytest.approx(random_checkpoint.DEVIATION, rel=0.25)


def test_rows_of_a_random_matrix_differ(tmp_path: Path) -> None:
    folder = random_checkpoint.write(random_checkpoint.config_of("tiny-E2B"), tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        table = file.get_tensor("model.language_model.embed_tokens.weight")
    assert len(table.unique(dim=0)) == len(table)


def test_a_complete_folder_is_kept_and_a_damaged_one_written_again(tmp_path: Path) -> None:
    config = random_checkpoint.config_of("tiny-E2B")
    path = random_checkpoint.write(config, tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"\1" * len(whole))
    random_checkpoint.write(config, tmp_path)
    assert path.read_bytes() == b"\1" * len(whole)
    path.write_bytes(whole[:-1])
    random_checkpoint.write(config, tmp_path)
    assert path.read_bytes() == whole
    random_checkpoint.write(random_checkpoint.config_of("tiny-31B"), tmp_path)
    assert path.read_bytes() != whole


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = random_checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        random_checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=9 * 2**30)
    )
    with pytest.raises(CapacityError, match=r"needs 8\.6 GiB and 1 GiB to spare, 9\.0 GiB are"):
        random_checkpoint.write(random_checkpoint.text_only(PRESETS["E2B"]), tmp_path / "x")
    assert list(tmp_path.rglob("*.*")) == []
