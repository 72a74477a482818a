"""Costs are the published integers, and what files, modules and caches really hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemsmith import shapes, sizing
from gemsmith.config import PRESETS, Gemma4Config
from gemsmith.engine import context
from gemsmith.errors import ConfigError
from gemsmith.model.text import TextModel
from gemsmith.ops import native
from gemsmith.quant.formats import Format
from gemsmith.quant.packed import Packed
from gemsmith.quant.quantize import search
from gemsmith.testing import (
    SIZES,
    random_model,
    random_towers,
    tiny_config,
    tiny_media_config,
    whole_groups,
)
from gemsmith.weights.convert import quantize_checkpoint
from gemsmith.weights.load import load_model, load_towers
from gemsmith.weights.recipe import Recipe
from gemsmith.weights.save import save_model

# Released files, from their headers: unique trainable values, and all stored values.
TRAINABLE = {
    "E2B": 5_104_297_504,
    "E4B": 7_941_100_832,
    "12B": 11_959_730_176,
    "26B-A4B": 25_805_933_872,
    "31B": 31_273_086_512,
}
STORED = {
    "E2B": 5_123_178_051,
    "E4B": 7_996_156_490,
    "12B": 11_959_730_224,
    "26B-A4B": 25_805_936_206,
    "31B": 31_273_088_876,
}
# Values of the drafters published beside them.
DRAFTERS = {
    "E2B": 77_731_328,
    "E4B": 78_517_760,
    "12B": 422_856_960,
    "26B-A4B": 419_711_232,
    "31B": 469_518_592,
}
BITS = {"int8": "8", "int4": "4", "int2": "2", "mobile": "mobile"}
"""The recipe of each format of few bits."""
GIB = 1 << 30


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_published_integers(size):
    assert sum(sizing.parameters(PRESETS[size]).values()) == TRAINABLE[size]
    assert sizing.stored_values(PRESETS[size]) == STORED[size]


def test_moe_activates_the_published_count():
    assert sizing.active_parameters(PRESETS["26B-A4B"].text_config) == 3_822_530_560


@pytest.mark.parametrize("config", [tiny_config(size) for size in SIZES], ids=SIZES)
def test_text_parameters_are_what_the_module_has(config):
    model = TextModel(config.text_config, device="meta")
    assert sizing.text_parameters(config.text_config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "per_token", "fixed_mib", "at_32k", "at_max"),
    [
        ("E2B", 6 * 1024, 6, 0.19, 0.76),
        ("E4B", 16 * 1024, 20, 0.52, 2.02),
        ("12B", 8 * 1024, 320, 0.56, 2.31),
        ("26B-A4B", 10 * 1024, 200, 0.51, 2.70),
        ("31B", 40 * 1024, 800, 2.03, 10.78),
    ],
)
def test_kv_bytes_by_hand(size, per_token, fixed_mib, at_32k, at_max):
    # Two-copy arithmetic of the K = V sizes is halved here: one copy is stored.
    config = PRESETS[size].text_config
    deep, longest = 32_768, config.max_position_embeddings
    assert sizing.kv_bytes(config, deep) == deep * per_token + fixed_mib * 2**20
    assert round(sizing.kv_bytes(config, deep) / GIB, 2) == pytest.approx(at_32k, abs=0.011)
    assert sizing.kv_bytes(config, longest) / GIB == pytest.approx(at_max, abs=0.01)


def test_slabs_grow_in_steps_of_at_most_an_eighth():
    assert sizing.slab_tokens(0) == 0
    for n in (1, 255, 256, 257, 4096, 5000, 100_000, 131_072):
        held = sizing.slab_tokens(n)
        assert n <= held < n + max(256, n / 8)
        assert sizing.slab_tokens(held) == held


@pytest.mark.parametrize("size", SIZES)
def test_drafters_have_the_published_counts(size):
    assert sizing.drafter_parameters(PRESETS[size]) == DRAFTERS[size]
    with_it = sizing.weight_bytes(PRESETS[size], "int4", drafter=True)
    scalars, ordering = 4, 262_144 if size in ("E2B", "E4B") else 0
    assert with_it["drafter"] == 2 * (DRAFTERS[size] + scalars) + 8 * ordering


@pytest.mark.parametrize("part", ["embedding", "ple_table", "ple_projection", "vision", "experts"])
def test_parts_are_the_published_integers(part):
    published = {
        "embedding": {"E2B": 402_653_184, "E4B": 671_088_640, "31B": 1_409_286_144},
        "ple_table": {"E2B": 2_348_810_240, "E4B": 2_818_572_288},
        "ple_projection": {"E2B": 13_762_816, "E4B": 27_525_376},
        "vision": {"E2B": 167_364_608, "26B-A4B": 569_548_080, "31B": 569_548_080},
        "experts": {"26B-A4B": 22_837_985_280},
    }[part]
    assert {size: sizing.parameters(PRESETS[size])[part] for size in published} == published


# Both K and V stored, bfloat16, as other engines do: GiB at 32K and at the longest context, and how
# many times too much the usual formula gives there.
KV_TABLE = {
    "E2B": (6 << 10, 6, 0.19, 0.76, 5.8),
    "E4B": (16 << 10, 20, 0.52, 2.02, 5.2),
    "12B": (16 << 10, 320, 0.81, 4.31, 22),
    "26B-A4B": (20 << 10, 200, 0.82, 5.20, 11.5),
    "31B": (80 << 10, 800, 3.28, 20.8, 11.5),
}


@pytest.mark.parametrize("size", SIZES)
def test_the_table_of_kv_with_both_copies(size):
    per_token, fixed_mib, deep, longest, naive = KV_TABLE[size]
    config = PRESETS[size].text_config
    most = config.max_position_embeddings
    assert (
        sizing.kv_twice_bytes(config, 40_000) - sizing.kv_twice_bytes(config, 39_999) == per_token
    )
    assert sizing.kv_twice_bytes(config, 32_768) == 32_768 * per_token + fixed_mib * 2**20
    assert round(sizing.kv_twice_bytes(config, 32_768) / GIB, 2) == deep
    at_most = sizing.kv_twice_bytes(config, most)
    assert at_most / GIB == pytest.approx(longest, abs=0.02)
    assert sizing.kv_naive_bytes(config, most) / at_most == pytest.approx(naive, rel=0.015)


def test_one_copy_is_half_of_what_global_layers_hold():
    config = PRESETS["31B"].text_config
    fixed = 800 * 2**20
    twice, once = (f(config, 262_144) - fixed for f in (sizing.kv_twice_bytes, sizing.kv_bytes))
    assert twice == 2 * once


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sequences", [1, 8])
def test_the_largest_context_is_the_largest(size, sequences):
    config = PRESETS[size].text_config
    for memory in (0, 1 << 24, 1 << 29, 3 << 29):
        most = sizing.largest_context(config, memory, 2, sequences)
        assert sizing.kv_bytes(config, most, 2, sequences) <= memory
        if most < config.max_position_embeddings:
            assert sizing.kv_bytes(config, most + 1, 2, sequences) > memory
    assert sizing.largest_context(config, 1 << 40) == config.max_position_embeddings


def payload(folder: Path) -> int:
    """Bytes of the tensors in a folder's weight files, headers left out."""
    total = 0
    for path in folder.glob("*.safetensors"):
        header = int.from_bytes(path.read_bytes()[:8], "little")
        total += path.stat().st_size - 8 - header
    return total


def saved(config: Gemma4Config, folder: Path, dtype: torch.dtype) -> Path:
    towers = random_towers(config) if config.vision_config or config.audio_config else None
    save_model(random_model(config), config, folder, towers=towers, dtype=dtype)
    return folder


def held(config: Gemma4Config, folder: Path, quant: str | None) -> int:
    """Bytes of everything that the loaded model and its towers keep in memory."""
    read, model = load_model(folder, quant=quant)
    dtype: torch.dtype = model.embed_tokens.weight.dtype  # pyright: ignore
    modules: list[torch.nn.Module] = [model]
    if config.vision_config or config.audio_config:
        modules.append(load_towers(folder, read, device="cpu", dtype=dtype, quant=quant))
    return sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))


CONFIGS = {size: whole_groups(tiny_media_config(size)) for size in SIZES}
CONFIGS["odd"] = whole_groups(tiny_config("E2B", vocab_size=101))  # rows that fill no block


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_bytes_are_those_of_every_file_that_can_be_written(name: str, tmp_path: Path):
    config = CONFIGS[name]
    source = saved(config, tmp_path / "source", torch.bfloat16)
    assert payload(source) == sum(sizing.weight_bytes(config, "bfloat16").values())
    wide = saved(config, tmp_path / "wide", torch.float32)
    assert payload(wide) == sum(sizing.weight_bytes(config, "float32").values())
    for format, bits in BITS.items():
        if format == "mobile" and config.text_config.enable_moe_block:
            with pytest.raises(ConfigError, match="no place for experts"):
                sizing.weight_bytes(config, format)
            continue
        target = tmp_path / bits
        quantize_checkpoint(source, target, Recipe(bits))
        assert payload(target) == sum(sizing.weight_bytes(config, format).values()), format


@pytest.mark.skipif(not native.available(), reason="sizes are of the extension's layout")
@pytest.mark.parametrize("name", CONFIGS)
def test_weight_bytes_are_those_in_memory(name: str, tmp_path: Path):
    config = CONFIGS[name]
    source = saved(config, tmp_path / "source", torch.bfloat16)
    for format in ("bfloat16", "int8", "int4", "int2"):
        quant = None if format == "bfloat16" else format
        said = sum(sizing.weight_bytes(config, format, "cpu").values())
        assert held(config, source, quant) == said, format
    if not config.text_config.enable_moe_block:
        quantize_checkpoint(source, tmp_path / "mobile", Recipe("mobile"))
        said = sum(sizing.weight_bytes(config, "mobile", "cpu").values())
        assert held(config, tmp_path / "mobile", None) == said


@pytest.mark.skipif(not native.available(), reason="sizes are of the extension's layout")
@pytest.mark.parametrize("shape", [(16, 64), (101, 96), (1, 96), (112, 160), (3, 17, 32)])
@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("format", [Format(8), Format(4, 32), Format(2, 32), Format(4)])
def test_a_low_bit_weight_has_the_bytes_of_its_place(
    shape: tuple[int, ...], format: Format, steps: bool
):
    format = format.stepped(shape[-1]) if steps else format
    weight = search(torch.randn(shape), format)
    weight = replace(weight, scales=weight.scales.bfloat16().float())  # as a file has them
    assert sizing.held_bytes(shape, format.bits, format.group, "gpu") == weight.nbytes
    packed = Packed.of(weight)
    told = shape, format.bits, format.group
    assert sizing.held_bytes(*told, "cpu", steps=format.steps) == packed.nbytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("format", BITS)
def test_formats_are_those_of_the_recipe(size: str, format: str):
    config = PRESETS[size]
    if format == "mobile":
        if config.text_config.enable_moe_block:
            return
        text = replace(config.text_config, tie_word_embeddings=False)
        config = replace(config, text_config=text)
    ours = {
        tensor.name: bits
        for tensor in (*shapes.decoder(config.text_config), *shapes.towers(config))
        if (bits := sizing.low_bits(tensor, config.text_config, format))
    }
    recipe = Recipe(BITS[format]).formats(config)
    assert ours == {name: (each.bits, each.group) for name, each in recipe.items()}
    stepped = {name for name, (bits, group) in ours.items() if bits < 8 and group}
    assert stepped == {name for name, each in recipe.items() if each.steps}


def test_an_unknown_format_or_kv_is_refused():
    with pytest.raises(ConfigError, match="format 'int3': must be one of float32, bfloat16, int8"):
        sizing.weight_bytes(PRESETS["E2B"], "int3")
    with pytest.raises(ConfigError, match="kv 'int4': must be one of float32, bfloat16, int8"):
        sizing.memory(PRESETS["E2B"], "int4", 1024, kv="int4")


def test_the_chunk_is_the_engine_s():
    assert sizing.CHUNK_TOKENS == context.CHUNK_TOKENS


def test_memory_is_the_sum_of_its_parts():
    found = sizing.memory(PRESETS["E4B"], "int4", 32_768, kv="int8", sequences=4)
    assert "ple_table" not in found.weights
    assert found.kv == 4 * sizing.kv_bytes(PRESETS["E4B"].text_config, 32_768, 1)
    parts = sum(found.weights.values()) + found.kv + found.activations + found.runtime
    assert found.total == parts
