"""Quantizing a checkpoint: what is written, in how much memory, and what a kill leaves behind."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.weights.low_bit import floats, growth_with_the_table, low_config
from torch import nn

from gemsmith.cache.none import NoCache
from gemsmith.config import Gemma4Config
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.model.text import Experts, TextModel
from gemsmith.quant import linear
from gemsmith.quant.formats import Format
from gemsmith.quant.linear import QuantLinear, float_product
from gemsmith.quant.packed import Packed
from gemsmith.quant.quantize import quantize
from gemsmith.testing import assert_close, random_model, random_towers, tolerance
from gemsmith.weights.convert import (
    PROGRESS,
    Recipe,
    left_as_floats,
    quantize_checkpoint,
    stored_weights,
)
from gemsmith.weights.load import load_model, load_towers
from gemsmith.weights.names import EMBEDDING, PLE_TABLE, expected_shapes
from gemsmith.weights.ple import QuantPLEStore
from gemsmith.weights.save import save_model
from gemsmith.weights.tensors import read_checkpoint

IDS = torch.tensor([5, 9, 5, 31, 2, 77, 95, 0, 5, 64, 12, 3])


def logits(model: TextModel) -> torch.Tensor:
    kv = NoCache(model.config, [len(IDS)])
    return model.logits(model(IDS, torch.arange(len(IDS)), kv))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rounded(config: Gemma4Config, recipe: Recipe) -> TextModel:
    """The float model with every weight replaced by what its codes say, in float32."""
    model = random_model(config, dtype=torch.bfloat16)
    state = model.state_dict()
    formats = recipe.formats(config)
    wide = TextModel(config.text_config)
    for name, tensor in state.items():
        value = quantize(tensor, formats[name]).dequantize() if name in formats else tensor
        wide.state_dict()[name].copy_(value)
    return wide.eval().requires_grad_(False)


def with_float_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing but the weights' codes differs from floats."""
    monkeypatch.setattr(linear, "integer_product", float_product)
    monkeypatch.setattr(Packed, "takes", lambda *_: False)


@pytest.mark.parametrize("ple", ["disk", "memory"])
@pytest.mark.parametrize(
    ("size", "recipe"),
    [
        ("E2B", Recipe("4")),
        ("E2B", Recipe("8")),
        ("E4B", Recipe("2")),
        ("12B", Recipe("4")),
        ("31B", Recipe("8", 64)),
        ("26B-A4B", Recipe("4", 32)),
        ("E2B", Recipe("4", float_tables=True)),
    ],
    ids=str,
)
def test_the_written_model_computes_with_its_codes(tmp_path, monkeypatch, size, recipe, ple):
    with_float_products(monkeypatch)
    config = low_config(size)
    quantize_checkpoint(floats(tmp_path / "floats", size), tmp_path / "low", recipe)
    loaded_config, model = load_model(tmp_path / "low", dtype=torch.float32, ple=ple)
    assert loaded_config == config
    assert_close(
        logits(model), logits(rounded(config, recipe)), tolerance(torch.float32, 64, steps=60)
    )
    replaced = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | Experts)]
    assert len(replaced) == (
        config.text_config.num_hidden_layers * config.text_config.enable_moe_block  # routers
        + (1 + (ple == "memory") if recipe.float_tables else 0)
    )
    if ple == "disk" and size == "E2B" and not recipe.float_tables:
        assert isinstance(model.embed_tokens_per_layer, QuantPLEStore)


def test_the_mobile_layout_has_its_head_apart_and_its_mix(tmp_path, monkeypatch):
    with_float_products(monkeypatch)
    quantize_checkpoint(floats(tmp_path / "floats"), tmp_path / "low", Recipe("mobile"))
    config, model = load_model(tmp_path / "low", dtype=torch.float32)
    assert not config.text_config.tie_word_embeddings
    formats = {n: str(m.format) for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert formats["lm_head"] == formats["layers.4.mlp.up_proj"] == "int2"
    assert formats["layers.3.mlp.up_proj"] == formats["layers.7.self_attn.o_proj"] == "int4"
    assert formats["layers.0.per_layer_input_gate"] == "int8"
    assert "per_layer_model_projection" not in formats
    assert model.per_layer_model_projection.weight.dtype == torch.bfloat16  # as it is stored
    assert {p.dtype for p in model.layers.parameters()} == {torch.float32}
    reference = rounded(low_config(), Recipe("mobile"))
    assert_close(logits(model), logits(reference), tolerance(torch.float32, 64, steps=60))


@pytest.mark.parametrize("recipe", [Recipe("4"), Recipe("mobile")])
def test_linear_layers_of_the_towers_are_int8(tmp_path, recipe):
    quantize_checkpoint(floats(tmp_path / "floats", media=True), tmp_path / "low", recipe)
    config, _ = load_model(tmp_path / "low")
    towers = load_towers(tmp_path / "low", config, device="cpu", dtype=torch.float32)
    assert not any(isinstance(m, nn.Linear) for m in towers.modules())
    found = {n: m for n, m in towers.named_modules() if isinstance(m, QuantLinear)}
    assert {str(m.format) for m in found.values()} == {"int8"}
    original = random_towers(config, dtype=torch.bfloat16)
    for name, module in found.items():
        weight = original.get_submodule(name).weight
        wanted = quantize(weight, Format(8)).dequantize()  # pyright: ignore[reportArgumentType]
        assert torch.equal(module.stored.dequantize(), wanted), name
    # Biases and everything else are as they were.
    state = {**dict(towers.named_parameters()), **dict(towers.named_buffers())}
    kept = {n: t for n, t in original.state_dict().items() if n in state}
    assert any(n.endswith("bias") for n in kept)
    assert all(torch.equal(state[n].bfloat16(), t.bfloat16()) for n, t in kept.items())


def test_nothing_is_left_in_floats_unnamed(tmp_path):
    source = floats(tmp_path / "floats", media=True)
    quantize_checkpoint(source, tmp_path / "low", Recipe("4"))
    assert left_as_floats(tmp_path / "low") == []
    quantize_checkpoint(source, tmp_path / "tables", Recipe("4", float_tables=True))
    prefix = "model.language_model."
    assert left_as_floats(tmp_path / "tables") == [prefix + EMBEDDING, prefix + PLE_TABLE]
    assert len(left_as_floats(source)) > 50


def test_the_rows_tell_of_every_weight(tmp_path):
    rows = quantize_checkpoint(floats(tmp_path / "floats"), tmp_path / "low", Recipe("4"))
    assert [row.name for row in rows] == list(expected_shapes(low_config().text_config))
    low = [row for row in rows if row.format]
    assert {str(row.format) for row in low} == {"int4-g32s", "int8", "int8-g32"}
    for row in low:
        bits = row.format.bits if row.format else 0
        assert row.nbytes * 8 >= row.weights * bits
        assert row.wrong / row.whole < (0.01 if bits == 4 else 1e-4)
    stored = read_checkpoint(tmp_path / "low")
    assert all(tensor.dtype in ("BF16", "F32", "I32", "I64") for tensor in stored.values())


def with_outliers(folder: Path) -> Path:
    """A checkpoint one weight of which has few columns far larger than all others."""
    config = low_config("12B")
    model = random_model(config, dtype=torch.bfloat16)
    model.get_parameter(SPOILT).data[:, 5] *= 1000
    save_model(model, config, folder)
    return folder


SPOILT = "layers.2.mlp.up_proj.weight"


def test_a_weight_that_steps_would_spoil_keeps_free_scales_and_the_config_says_so(tmp_path):
    source, target = with_outliers(tmp_path / "floats"), tmp_path / "low"
    interrupted(source, target, 60, shard_bytes=20_000)
    rows = quantize_checkpoint(source, target, Recipe("4"), shard_bytes=20_000)
    assert [row.name for row in rows if str(row.format) == "int4-g32"] == [SPOILT]
    _, model = load_model(target)
    found = {n: str(m.format) for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert [name for name, format in found.items() if format == "int4-g32"] == [SPOILT[:-7]]
    assert [row for row in stored_weights(target) if str(row.format) == "int4-g32"]
    once = quantize_checkpoint(source, tmp_path / "once", Recipe("4"), shard_bytes=20_000)
    assert once == rows
    assert contents(target) == contents(tmp_path / "once")


def test_companions_are_copied_and_leftovers_of_shared_layers_dropped(tmp_path):
    source = floats(tmp_path / "floats")
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.bin").write_bytes(b"x")
    (source / "fidelity.json").write_text("{}")  # says nothing of other weights
    quantize_checkpoint(source, tmp_path / "low", Recipe("8"))
    names = set(contents(tmp_path / "low"))
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_codes_are_aligned_in_the_file(tmp_path):
    quantize_checkpoint(floats(tmp_path / "floats"), tmp_path / "low", Recipe("4"))
    stored = read_checkpoint(tmp_path / "low")
    packed = [t for key, t in stored.items() if key.endswith("_packed")]
    assert len(packed) > 50
    assert all(tensor.offset % 64 == 0 for tensor in packed)


# -- resuming ---------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a quantization in the middle."""


def interrupted(source: Path, target: Path, after: int, **options) -> None:
    """Quantize until `after` weights were advanced."""
    left = [after]

    def advance(name: str, values: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, target, Recipe("4"), advance=advance, **options)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    source, size = floats(tmp_path / "floats"), 20_000
    whole = quantize_checkpoint(source, tmp_path / "once", Recipe("4"), shard_bytes=size)
    interrupted(source, tmp_path / "twice", 60, shard_bytes=size)
    finished = sorted(p.name for p in (tmp_path / "twice").glob("*.safetensors"))
    assert 1 < len(finished) < len(list((tmp_path / "once").glob("*.safetensors")))
    assert not list((tmp_path / "twice").glob(".*"))
    assert not (tmp_path / "twice" / "config.json").exists()
    before = {n: (tmp_path / "twice" / n).stat().st_mtime_ns for n in finished}
    told = []
    rows = quantize_checkpoint(
        source,
        tmp_path / "twice",
        Recipe("4"),
        shard_bytes=size,
        begin=lambda total, done: told.append((total, done)),
    )
    assert rows == whole
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")
    assert {n: (tmp_path / "twice" / n).stat().st_mtime_ns for n in finished} == before
    assert 0 < told[0][1] < told[0][0] == sum(row.weights for row in rows)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "note"])
def test_a_finished_file_that_is_not_as_it_was_is_made_anew(tmp_path, damage):
    source, target = floats(tmp_path / "floats"), tmp_path / "low"
    quantize_checkpoint(source, tmp_path / "once", Recipe("4"), shard_bytes=20_000)
    interrupted(source, target, 60, shard_bytes=20_000)
    file = sorted(target.glob("*.safetensors"))[0]
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-100])
    elif damage == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    else:
        (target / PROGRESS).write_text((target / PROGRESS).read_text()[:-30])
    quantize_checkpoint(source, target, Recipe("4"), shard_bytes=20_000)
    assert contents(target) == contents(tmp_path / "once")


def test_a_killed_process_leaves_what_can_be_gone_on_with(tmp_path):
    source, target = floats(tmp_path / "floats"), tmp_path / "low"
    code = (
        "import sys, time\n"
        "from gemsmith.weights.convert import Recipe, quantize_checkpoint\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], Recipe('4'), shard_bytes=20_000,\n"
        "                    advance=lambda name, values: time.sleep(0.02))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(target)])
    for _ in range(1000):
        if len(list(target.glob("*.safetensors"))) > 2 or process.poll() is not None:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ConfigError, match=r"config.json does not exist"):
        load_model(target)
    quantize_checkpoint(source, target, Recipe("4"), shard_bytes=20_000)
    quantize_checkpoint(source, tmp_path / "once", Recipe("4"), shard_bytes=20_000)
    assert contents(target) == contents(tmp_path / "once")


def test_a_full_disk_is_named_and_the_work_goes_on_later(tmp_path, monkeypatch):
    source, target = floats(tmp_path / "floats"), tmp_path / "low"
    real, calls = os.fsync, [0]

    def full(fd: int) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match=r"No space left on device\); 1 of \d+ files are done"):
        quantize_checkpoint(source, target, Recipe("4"), shard_bytes=20_000)
    assert not list(target.glob(".*"))
    quantize_checkpoint(source, target, Recipe("4"), shard_bytes=20_000)
    load_model(target)


# -- refusals ---------------------------------------------------------------------------------


def test_a_target_of_something_else_is_not_touched(tmp_path):
    source, target = floats(tmp_path / "floats"), tmp_path / "low"
    for folder, message in ((source, "holds a checkpoint already"), (target, "choose another")):
        target.mkdir(exist_ok=True)
        (target / "model-00001-of-00002.safetensors").write_bytes(b"precious")
        before = contents(folder)
        with pytest.raises(WeightsError, match=message):
            quantize_checkpoint(source, folder, Recipe("4"))
        assert contents(folder) == before


def test_an_unfinished_target_of_other_options_or_another_source_is_refused(tmp_path):
    source = floats(tmp_path / "floats")
    interrupted(source, tmp_path / "low", 60, shard_bytes=20_000)
    with pytest.raises(WeightsError, match="unfinished quantization of another checkpoint or with"):
        quantize_checkpoint(source, tmp_path / "low", Recipe("8"), shard_bytes=20_000)
    floats(source)  # written anew: perhaps other weights
    with pytest.raises(WeightsError, match="unfinished quantization of another checkpoint"):
        quantize_checkpoint(source, tmp_path / "low", Recipe("4"), shard_bytes=20_000)


def test_a_low_bit_source_is_refused(tmp_path):
    quantize_checkpoint(floats(tmp_path / "floats"), tmp_path / "low", Recipe("8"))
    with pytest.raises(WeightsError, match="is quantized already; start from the checkpoint"):
        quantize_checkpoint(tmp_path / "low", tmp_path / "lower", Recipe("4"))


def test_groups_that_do_not_divide_are_refused_by_name_before_anything_is_written(tmp_path):
    source = floats(tmp_path / "floats")
    with pytest.raises(
        ConfigError, match=r"q_proj.weight has rows of 64, which groups of 128 .*64, 32, 16, 8"
    ):
        quantize_checkpoint(source, tmp_path / "low", Recipe("4", 128, float_tables=True))
    assert not (tmp_path / "low").exists()


def test_experts_have_no_mobile_layout(tmp_path):
    source = floats(tmp_path / "floats", "26B-A4B")
    with pytest.raises(ConfigError, match="has no place for experts; use 4"):
        quantize_checkpoint(source, tmp_path / "low", Recipe("mobile"))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (("3",), "bits '3': choose 8, 4, 2, mobile"),
        (("4", 40), "group 40: choose 32, 64, 128"),
        (("mobile", 32), "group 32: the mobile layout has one scale a row"),
        (("mobile", None, True), "float tables: the mobile mix includes its tables"),
    ],
)
def test_recipes_that_are_not_offered_are_refused(recipe, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(*recipe)


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    config = low_config()
    model = random_model(config)
    model.get_parameter("layers.2.mlp.up_proj.weight").data[3, 3] = torch.nan
    save_model(model, config, tmp_path / "floats")
    with pytest.raises(WeightsError, match=r"layers.2.mlp.up_proj.weight: a weight is infinite"):
        quantize_checkpoint(tmp_path / "floats", tmp_path / "low", Recipe("4"))


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """A table of 64 MiB costs its 32 of codes, mapped, and 32 of lines, and no copy beside them."""
    work = "convert.quantize_checkpoint(at, f'{at}-low', convert.Recipe('8')); "
    work += "load.load_model(f'{at}-low')"
    # A copy of either, or floats of the table, would be 30 or more on top.
    assert growth_with_the_table(tmp_path, work) < 88 << 10
