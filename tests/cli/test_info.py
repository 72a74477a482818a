"""`gemsmith info`: the figures of the presets, from sizing, for people and for programs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.weights.gguf_files import described
from tests.weights.low_bit import floats
from typer.testing import CliRunner

from gemsmith import sizing
from gemsmith.cli.info import describe, size
from gemsmith.cli.main import app
from gemsmith.config import PRESETS, preset, text_only
from gemsmith.weights.convert import quantize_checkpoint
from gemsmith.weights.recipe import Recipe

MIB, GIB = 1 << 20, 1 << 30


def info(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["info", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", PRESETS)
def test_parts_add_up_to_the_whole(name: str):
    facts = json.loads(info(name, "--json"))
    assert sum(facts["parameters"].values()) == facts["total_parameters"]
    assert facts["total_parameters"] == sum(sizing.parameters(PRESETS[name]).values())


@pytest.mark.parametrize("name", PRESETS)
def test_every_layer_is_in_one_row_of_the_plan(name: str):
    facts = describe(name, PRESETS[name])
    layers = sorted(index for run in facts["layers"] for index in run["layers"])
    assert layers == list(range(PRESETS[name].text_config.num_hidden_layers))
    assert all(run["count"] == len(run["layers"]) for run in facts["layers"])


def test_a_gguf_file_is_described_by_its_metadata(tmp_path: Path):
    described(tmp_path / "a.gguf", PRESETS["E2B"].text_config)
    facts = json.loads(info(str(tmp_path / "a.gguf"), "--json"))
    wanted = describe("E2B", text_only(PRESETS["E2B"]))
    assert facts | {"name": "E2B"} == json.loads(json.dumps(wanted))


def test_layers_that_read_layer_0_are_told_from_layers_that_own_their_kv():
    text = preset("E2B").text_config
    small = replace(
        text,
        num_hidden_layers=4,
        layer_types=("sliding_attention", "full_attention") * 2,
        num_kv_shared_layers=2,
        use_double_wide_mlp=False,
    )
    facts = describe("small", replace(text_only(preset("E2B")), text_config=small))
    sources = {run["reads_kv_of_layer"]: run["layers"] for run in facts["layers"] if run}
    assert sources[0] == [2]
    assert sources[1] == [3]


def test_kv_figures_are_those_of_sizing():
    facts = describe("31B", PRESETS["31B"])
    text = PRESETS["31B"].text_config
    assert facts["kv_bytes"]["bfloat16"] == {
        str(n): sizing.kv_bytes(text, n, 2) for n in (4096, 32_768, 131_072, 262_144)
    }


def test_the_ple_table_counts_apart():
    memory = describe("E2B", PRESETS["E2B"])["weights_bytes"]["bfloat16"]
    assert memory["text"] - memory["text_without_ple_table"] == 262_144 * 35 * 256 * 2


def test_tables_show_names_parts_and_memory():
    text = info("26B-A4B")
    for words in ("8 of 128 experts", "25,805,933,872", "V only, K rebuilt", "47.00 GiB"):
        assert words in text


def test_a_folder_is_described_like_a_preset(tmp_path: Path):
    text_only(PRESETS["E4B"]).save(tmp_path)
    facts = json.loads(info(str(tmp_path), "--json"))
    wanted = describe(str(tmp_path), text_only(PRESETS["E4B"]))
    assert facts == json.loads(json.dumps(wanted))


@pytest.mark.parametrize("name", ["e2b", "gemma-4-E2B", "google/gemma-4-E2B-it"])
def test_spellings_of_a_preset_are_one(name: str):
    assert json.loads(info(name, "--json"))["total_parameters"] == 5_104_297_504


def test_sizes_are_written_in_the_unit_that_suits():
    assert (size(3 * GIB), size(30 * MIB), size(GIB // 2)) == ("3.00 GiB", "30.00 MiB", "0.50 GiB")


@pytest.mark.parametrize("bits", ["4", "mobile"])
def test_a_low_bit_folder_says_what_its_parts_take(tmp_path: Path, bits: str):
    source = floats(tmp_path / "floats", media=True)
    rows = quantize_checkpoint(source, tmp_path / "low", Recipe(bits))
    parts = json.loads(info(str(tmp_path / "low"), "--json"))["stored"]
    with (tmp_path / "low" / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    held = (tmp_path / "low" / "model.safetensors").stat().st_size - header
    assert sum(part["bytes"] for part in parts) == held
    told = {(part["part"], part["format"]): part["bytes"] for part in parts}
    unread = sum(told.pop(key) for key in list(told) if key[0] == "not read")
    wrote = sum(row.nbytes for row in rows)
    # Two scales of activations, which are rounded by their own size here, for each but the tables.
    layers = sum(row.format is not None for row in rows) - 2
    assert unread == (8 * layers if bits == "mobile" else 0)
    assert sum(told.values()) == wrote - unread
    assert ("embedding", "int4-g32s" if bits == "4" else "int2") in told
    assert ("towers", "int8") in told
    text = info(str(tmp_path / "low"))
    assert "as stored" in text
    assert "PLE projections" in text


def test_floats_and_leftovers_that_no_layer_reads_are_told_apart(tmp_path: Path):
    source = floats(tmp_path)
    tensors = load_file(source / "model.safetensors")
    left = "model.language_model.layers.7.self_attn.k_proj.weight"
    tensors[left] = torch.zeros(32, 64, dtype=torch.bfloat16)
    save_file(tensors, source / "model.safetensors")
    parts = json.loads(info(str(source), "--json"))["stored"]
    assert {part["format"] for part in parts} == {"BF16"}
    assert [part for part in parts if part["part"] == "not read"] == [
        {"part": "not read", "format": "BF16", "weights": 2048, "bytes": 4096}
    ]


def test_damaged_weights_are_named_and_the_rest_is_shown(tmp_path: Path):
    source = floats(tmp_path)
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "cut short or damaged" in json.loads(info(str(source), "--json"))["stored"]
    text = info(str(source))
    assert "stored weights cannot be read: " in text
    assert "K/V of" in text
