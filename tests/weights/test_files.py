"""Which files a checkpoint's weights are read from, and which folders and indices are refused."""

import json
import random

import pytest
from tests.weights.folders import assert_same, halves, tensors, write, write_shards

from gemsmith.errors import ConfigError, GemsmithError, WeightsError
from gemsmith.testing import tiny_config
from gemsmith.weights.load import load_model
from gemsmith.weights.tensors import read_checkpoint


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    first, second = halves(tensors())
    key = next(iter(first))
    write_shards(tmp_path, [first, second | {key: first[key].clone()}])
    with pytest.raises(WeightsError, match=f"{key} is in both model-00001-of-00002.* and .*00002"):
        load_model(tmp_path)


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, halves(tensors()))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of 2 files are missing: model-00002-of-00002\.safe"):
        load_model(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path):
    write_shards(tmp_path, halves(tensors()))
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=f"says that model-00002.* holds {key}, which it does"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "model.safetensors\n",
        "pytorch_model.bin",
        "x" * 5000 + ".safetensors",
        "..",
        "",
        7,
        None,
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    outside = write(tmp_path / "outside", tensors())
    folder = tmp_path / "folder"
    folder.mkdir()
    (outside / "config.json").rename(folder / "config.json")
    (outside / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"names the file .*only .safetensors files in the same"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ("{}", "no weight_map"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, match):
    write_shards(tmp_path, halves(tensors()))
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(WeightsError, match=match):
        load_model(tmp_path)


def test_an_index_of_absurd_size_is_not_read(tmp_path):
    write_shards(tmp_path, halves(tensors()))
    with (tmp_path / "model.safetensors.index.json").open("r+b") as file:
        file.truncate(65 << 20)
    with pytest.raises(WeightsError, match="larger than 64 MiB; not an index"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is a pickle file, and reading one runs the code"),
        ("pytorch_model.bin.index.json", "is a pickle file"),
        ("model.pt", "is a pickle file"),
        ("model.pth", "is a pickle file"),
        ("gemma.gguf", "gemma.gguf is a GGUF file"),
        ("adapter_model.safetensors", "belongs to an adapter; merge it"),
        ("model-00001-of-00002.safetensors", "There is model-00001.*is its index missing"),
        ("notes.txt", "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_folders_without_safetensors_say_what_is_there(tmp_path, name, text):
    tiny_config("E2B").save(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(WeightsError, match=text):
        load_model(tmp_path)


def test_a_pickle_beside_safetensors_is_not_touched(tmp_path):
    write(tmp_path, tensors())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    assert_same(load_model(tmp_path)[1], tensors())


def test_a_folder_with_two_checkpoints_is_refused(tmp_path):
    write_shards(tmp_path, halves(tensors()))
    write(tmp_path, tensors())
    with pytest.raises(
        WeightsError, match=r"has both model\.safetensors and model\.safetensors\.index"
    ):
        load_model(tmp_path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(tmp_path / "none")
    with pytest.raises(WeightsError, match="is not a folder"):
        read_checkpoint(tmp_path / "none")


def test_damaged_indices_never_give_anything_but_a_weights_error(tmp_path):
    state = tensors("31B")
    write_shards(tmp_path, halves(state), "31B")
    path = tmp_path / "model.safetensors.index.json"
    raw, rng = path.read_bytes(), random.Random(6)
    refused = 0
    for _ in range(120):
        at = rng.randrange(len(raw))
        cut = rng.choice([raw[:at], raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]])
        path.write_bytes(cut)
        try:
            _, model = load_model(tmp_path)
        except WeightsError:
            refused += 1
        else:
            assert_same(model, state)
    assert refused > 80


def test_a_shard_that_is_a_folder_or_unreadable_is_refused(tmp_path):
    write(tmp_path, tensors())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(GemsmithError, match="has neither"):
        load_model(tmp_path)
