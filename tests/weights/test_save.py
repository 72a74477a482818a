"""What is saved is what was there, in a layout that transformers and load_model read."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gemsmith.cache.none import NoCache
from gemsmith.config import PRESETS, Gemma4Config
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.model.text import TextModel
from gemsmith.sizing import parameters, text_parameters
from gemsmith.testing import SIZES, random_model, tiny_config
from gemsmith.weights import save
from gemsmith.weights.load import load_model
from gemsmith.weights.names import WRITTEN_PREFIX
from gemsmith.weights.ple import PLEStore
from gemsmith.weights.save import save_model
from gemsmith.weights.tensors import read_header

IDS = torch.tensor([5, 9, 5, 31, 2, 77, 95, 0, 5, 64, 12, 3])


def logits(model: TextModel) -> torch.Tensor:
    kv = NoCache(model.config, [len(IDS)])
    return model.logits(model(IDS, torch.arange(len(IDS)), kv))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(first: TextModel, second: TextModel) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert list(one) == list(two)
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_saved_and_loaded_is_bitwise_the_same(tmp_path, size, dtype, max_shard_bytes):
    config = tiny_config(size)
    model = random_model(config, dtype=dtype)
    files = save_model(model, config, tmp_path / "new" / "folder", max_shard_bytes=max_shard_bytes)
    assert (len(files) > 1) == (max_shard_bytes < 10**9)
    loaded_config, loaded = load_model(tmp_path / "new" / "folder", ple="memory")
    assert loaded_config == config
    assert_equal(loaded, model)


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 25])
def test_a_model_whose_table_is_on_disk_saves_by_rows(tmp_path, monkeypatch, piece_bytes):
    config = tiny_config("E2B")
    model = random_model(config, dtype=torch.bfloat16)
    save_model(model, config, tmp_path / "one")
    _, backed = load_model(tmp_path / "one")
    assert isinstance(backed.embed_tokens_per_layer, PLEStore)
    monkeypatch.setattr(save, "PIECE_BYTES", piece_bytes)
    save_model(backed, config, tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert sorted(read_header(one)) == sorted(read_header(two))
    assert_equal(load_model(tmp_path / "two", ple="memory")[1], model)


def test_pieces_are_small(tmp_path, monkeypatch):
    config = tiny_config("E2B")
    model = random_model(config)
    monkeypatch.setattr(save, "PIECE_BYTES", 4096)
    largest = 0
    for source in save._sources(model, config, None):
        row = source.nbytes // source.shape[0]
        pieces = [piece.nbytes for piece in source.pieces()]
        assert sum(pieces) == source.nbytes
        assert max(pieces) <= max(4096, row)
        largest = max(largest, source.nbytes)
    assert largest > 4 * 4096


@pytest.mark.parametrize("ple", ["disk", "memory"])
def test_dtype_converts_everything(tmp_path, ple):
    config = tiny_config("E4B")
    save_model(random_model(config), config, tmp_path / "wide")
    _, model = load_model(tmp_path / "wide", ple=ple)
    save_model(model, config, tmp_path / "narrow", dtype=torch.bfloat16)
    header = read_header(tmp_path / "narrow" / "model.safetensors")
    assert {tensor.dtype for tensor in header.values()} == {"BF16"}
    _, loaded = load_model(tmp_path / "narrow", ple="memory")
    assert_equal(loaded, random_model(config).to(torch.bfloat16))


def test_shards_hold_at_most_what_was_asked_and_the_index_counts_all(tmp_path):
    config = tiny_config("31B")
    model = random_model(config)
    most = 30_000
    files = save_model(model, config, tmp_path, max_shard_bytes=most)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = 0
    for number, file in enumerate(files, 1):
        assert file.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        with safe_open(file, "pt") as handle:
            sizes = [handle.get_tensor(key).nbytes for key in handle.keys()]  # noqa: SIM118
            assert handle.metadata() == {"format": "pt"}
            assert {index["weight_map"][key] for key in handle.keys()} == {file.name}  # noqa: SIM118
        assert sum(sizes) <= most or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == {WRITTEN_PREFIX + name for name in model.state_dict()}


def test_tensors_of_aligned_size_are_aligned(tmp_path):
    config = tiny_config("26B-A4B")
    save_model(random_model(config, dtype=torch.bfloat16), config, tmp_path)
    header = read_header(tmp_path / "model.safetensors").values()
    aligned = [tensor for tensor in header if torch.Size(tensor.shape).numel() * 2 % 64 == 0]
    assert len(aligned) > 40
    assert all(tensor.offset % 64 == 0 for tensor in aligned)


def test_config_says_that_there_are_no_towers(tmp_path):
    config = Gemma4Config(
        text_config=tiny_config("E2B").text_config,
        vision_config=PRESETS["E2B"].vision_config,
        audio_config=PRESETS["E2B"].audio_config,
    )
    save_model(random_model(config), config, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["vision_config"] is None
    assert saved["audio_config"] is None
    assert load_model(tmp_path)[0] == tiny_config("E2B")


def test_saving_again_removes_the_earlier_layout_and_keeps_other_files(tmp_path):
    config = tiny_config("31B")
    model = random_model(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    many = save_model(model, config, tmp_path, max_shard_bytes=50_000)
    fewer = save_model(model, config, tmp_path, max_shard_bytes=150_000)
    assert 1 < len(fewer) < len(many)
    expected = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert names(tmp_path) == sorted([*expected, *(file.name for file in fewer)])
    save_model(model, config, tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]
    save_model(model, config, tmp_path, max_shard_bytes=50_000)
    assert names(tmp_path) == sorted([*expected, *(file.name for file in many)])
    assert_equal(load_model(tmp_path)[1], model)


def test_a_model_saves_into_the_folder_it_is_mapped_from(tmp_path):
    config = tiny_config("E2B")
    save_model(random_model(config), config, tmp_path)
    _, model = load_model(tmp_path)
    save_model(model, config, tmp_path, dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(random_model(config)))
    _, again = load_model(tmp_path, ple="memory")
    assert_equal(again, random_model(config).to(torch.bfloat16))


def broken_fsync(monkeypatch, failure: BaseException) -> None:
    """Let the third file of a save fail when it is flushed to disk."""
    calls = []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 3:
            raise failure

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    config = tiny_config("31B")
    save_model(random_model(config, 1), config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken_fsync(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(WeightsError, match=r"cannot be written \(No space left .* is as it was"):
        save_model(random_model(config, 2), config, tmp_path, max_shard_bytes=30_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    config = tiny_config("31B")
    save_model(random_model(config, 1), config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken_fsync(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_model(random_model(config, 2), config, tmp_path, max_shard_bytes=30_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    config = tiny_config("31B")
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"file: cannot be written \(\w+.*; what was there is"):
        save_model(random_model(config), config, tmp_path / "file")


def test_wrong_arguments_are_refused(tmp_path):
    config = tiny_config("31B")
    model = random_model(config)
    with pytest.raises(ConfigError, match=r"dtype torch.float16: must be torch.bfloat16"):
        save_model(model, config, tmp_path, dtype=torch.float16)
    with pytest.raises(ConfigError, match="max_shard_bytes 0: must be positive"):
        save_model(model, config, tmp_path, max_shard_bytes=0)
    with pytest.raises(
        WeightsError, match=r"disagree: embed_tokens.weight is \(96, 64\) in the model, \(97, 64\)"
    ):
        save_model(model, tiny_config("31B", vocab_size=97), tmp_path)
    with pytest.raises(WeightsError, match=r"embed_tokens.weight has no values \(meta device\)"):
        save_model(TextModel(config.text_config, device="meta"), config, tmp_path)
    model.norm.weight = torch.nn.Parameter(model.norm.weight.double())
    with pytest.raises(WeightsError, match=r"norm.weight is torch.float64; only float weights"):
        save_model(model, config, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_transformers_reads_what_is_saved(tmp_path, size, max_shard_bytes):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    config = tiny_config(size)
    model = random_model(config)
    save_model(model, config, tmp_path, max_shard_bytes=max_shard_bytes)
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = {name.split("language_model.")[-1]: tensor for name, tensor in hf.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        theirs = hf(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(model), theirs, atol=2e-4, rtol=1e-4)


def test_a_head_of_its_own_is_saved_loaded_and_used(tmp_path):
    tied = tiny_config("E2B")
    config = replace(tied, text_config=replace(tied.text_config, tie_word_embeddings=False))
    model = random_model(config)
    save_model(model, config, tmp_path)
    assert "lm_head.weight" in read_header(tmp_path / "model.safetensors")
    loaded_config, loaded = load_model(tmp_path, ple="memory")
    assert not loaded_config.text_config.tie_word_embeddings
    assert_equal(loaded, model)
    before = logits(loaded)
    loaded.lm_head.weight.data.mul_(0.5)
    assert not torch.equal(logits(loaded), before)
    assert parameters(config)["head"] == parameters(config)["embedding"]
    assert text_parameters(config.text_config) == sum(p.numel() for p in model.parameters())
