"""Names and shapes of a decoder's tensors, and the account of every key of a checkpoint."""

import json
import math
from pathlib import Path

import pytest

from gemsmith.config import PRESETS, TextConfig
from gemsmith.errors import WeightsError
from gemsmith.model.text import TextModel
from gemsmith.testing import SIZES, tiny_config
from gemsmith.weights.names import (
    PREFIXES,
    Shape,
    expected_shapes,
    is_tower,
    match,
    module_name,
    unused_shapes,
)

STORED = json.loads((Path(__file__).parents[1] / "data/decoder_shapes.json").read_text())
TEXT_PARAMETERS = {
    "E2B": 4_628_569_344,
    "E4B": 7_463_013_376,
    "12B": 11_907_350_272,
    "26B-A4B": 25_233_141_760,
    "31B": 30_697_345_280,
}


def stored_shapes(size: str) -> dict[str, Shape]:
    """The decoder's tensors as transformers lists them; layers of one shape stand together."""
    shapes: dict[str, Shape] = {}
    for name, by_shape in STORED[size].items():
        for shape, runs in by_shape.items():
            for run in (runs or "").split() or [None]:
                first, _, last = (run or "0").partition("-")
                for layer in range(int(first), int(last or first) + 1):
                    key = name.replace("layers.N.", f"layers.{layer}.")
                    shapes[key] = tuple(json.loads(shape))
    return shapes


def under(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def account(found: dict[str, Shape], config: TextConfig) -> dict[str, str]:
    return match(found, config, dict.fromkeys(found, "model.safetensors"), "here")


@pytest.mark.parametrize("size", SIZES)
def test_expected_shapes_are_those_of_the_released_models(size):
    shapes = expected_shapes(PRESETS[size].text_config)
    assert shapes == stored_shapes(size)
    counted = sum(math.prod(s) for name, s in shapes.items() if not name.endswith("layer_scalar"))
    assert counted == TEXT_PARAMETERS[size]


@pytest.mark.parametrize("size", SIZES)
def test_expected_shapes_are_those_of_the_module_in_its_order(size):
    config = tiny_config(size).text_config
    state = TextModel(config, device="meta").state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == expected_shapes(config)


@pytest.mark.parametrize(("size", "values"), [("E2B", 18_880_512), ("E4B", 55_055_616), ("31B", 0)])
def test_unused_shapes_hold_as_many_values_as_released_files_do(size, values):
    config = PRESETS[size].text_config
    head = config.vocab_size * config.hidden_size
    assert sum(math.prod(s) for s in unused_shapes(config).values()) - head == values


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_leads_to_the_same_names(prefix):
    config = tiny_config("26B-A4B").text_config
    expected = expected_shapes(config)
    chosen = account(under(prefix, expected), config)
    assert chosen == {name: prefix + name for name in expected}


@pytest.mark.parametrize(
    "key",
    [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
        "model.audio_tower.output_proj.bias",
        "model.embed_vision.embedding_projection.weight",
        "embed_audio.embedding_projection.weight",
        "vision_tower.std_bias",
    ],
)
def test_towers_are_skipped_knowingly(key):
    config = tiny_config("E2B").text_config
    expected = expected_shapes(config)
    assert is_tower(key)
    assert key not in account({**under(PREFIXES[0], expected), key: (7,)}, config).values()


def test_a_decoder_name_is_no_tower():
    for name in expected_shapes(tiny_config("E2B").text_config):
        assert not any(is_tower(prefix + name) for prefix in PREFIXES)
        assert module_name("model.language_model." + name) == name


def test_unused_kv_and_a_tied_head_are_accepted_but_not_chosen():
    config = tiny_config("E2B").text_config
    found = under(PREFIXES[0], expected_shapes(config))
    unused = unused_shapes(config)
    assert "layers.4.self_attn.k_proj.weight" in unused
    assert "layers.3.self_attn.k_proj.weight" not in unused
    extra = under(PREFIXES[0], unused)
    extra["lm_head.weight"] = extra.pop(PREFIXES[0] + "lm_head.weight")
    chosen = account(found | extra, config)
    assert set(chosen.values()) == set(found)


@pytest.mark.parametrize("name", ["lm_head.weight", "layers.7.self_attn.k_proj.weight"])
def test_unused_tensors_of_another_shape_are_refused(name):
    config = tiny_config("E2B").text_config
    found = under(PREFIXES[0], expected_shapes(config))
    with pytest.raises(WeightsError, match=rf"{name} is \[9, 9\], expected \[\d+, 64\]"):
        account(found | {name: (9, 9)}, config)


def test_missing_tensors_are_named_and_counted_beyond_the_first_few():
    config = tiny_config("31B").text_config
    found = under(PREFIXES[0], expected_shapes(config))
    kept = {key: shape for key, shape in found.items() if ".layers.5." not in key}
    gone = len(found) - len(kept)
    with pytest.raises(WeightsError) as error:
        account(kept, config)
    text = str(error.value)
    assert text.startswith(f"here: {gone} tensors missing:")
    assert "model.language_model.layers.5.self_attn.q_proj.weight" in text
    assert f"... and {gone - 8} more" in text
    assert "download or export is incomplete" in text


def drop(found: dict[str, Shape], *parts: str) -> dict[str, Shape]:
    return {k: v for k, v in found.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
    ("size", "change", "cause"),
    [
        ("E2B", lambda f: {}, "no tensor of a Gemma 4 decoder is there at all"),
        ("E2B", lambda f: drop(f, "3.self_attn.k_", "3.self_attn.v_"), "num_kv_shared_layers"),
        ("E2B", lambda f: drop(f, "per_layer"), "hidden_size_per_layer_input .* must be 0"),
        ("31B", lambda f: drop(f, "0.self_attn.v_proj"), "attention_k_eq_v .* should be true"),
        ("31B", lambda f: f | {"layers.6.layer_scalar": (1,)}, "7 layers, config.json 6"),
        (
            "31B",
            lambda f: f | {"layers.2.self_attn.v_proj.weight": (32, 64)},
            "attention_k_eq_v .* should be false",
        ),
        (
            "31B",
            lambda f: f | {"layers.0.experts.down_proj": (6, 64, 20)},
            "enable_moe_block .* should be true",
        ),
        (
            "31B",
            lambda f: f | {"layers.0.self_attn.q_proj.lora_A.weight": (4, 64)},
            "LoRA adapter; merge it",
        ),
        (
            "31B",
            lambda f: {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 64)},
            "no tensor of a Gemma 4 decoder .*(\n.*)*LoRA adapter",
        ),
        (
            "31B",
            lambda f: f | {"layers.0.mlp.up_proj.weight_scale": (48, 1)},
            "quantized in a way that is not read here",
        ),
        ("31B", lambda f: f | {"pre_projection.weight": (64, 128)}, "drafter"),
        ("31B", lambda f: f | {"optimizer.step": (1,)}, "left over from another model"),
    ],
)
def test_the_likely_cause_is_named(size, change, cause):
    config = tiny_config(size).text_config
    with pytest.raises(WeightsError, match=cause):
        account(change(expected_shapes(config)), config)


def test_another_shape_names_both_shapes_and_the_model_it_looks_like():
    found = under(PREFIXES[0], expected_shapes(PRESETS["E4B"].text_config))
    with pytest.raises(WeightsError) as error:
        account(found, PRESETS["E2B"].text_config)
    text = str(error.value)
    assert "embed_tokens.weight is [262144, 2560], expected [262144, 1536]" in text
    assert "The weights look like E4B's and config.json is another model's." in text
    tiny = tiny_config("31B").text_config
    with pytest.raises(WeightsError, match="fetch both anew"):
        account(expected_shapes(tiny) | {"norm.weight": (65,)}, tiny)


def test_the_same_tensor_under_two_prefixes_is_refused():
    config = tiny_config("31B").text_config
    found = under(PREFIXES[0], expected_shapes(config))
    with pytest.raises(WeightsError, match=r"1 tensor stored twice:\n.*norm.weight and model.lang"):
        account(found | {"model.norm.weight": (64,)}, config)


def test_hostile_names_are_cut_short():
    config = tiny_config("31B").text_config
    found = expected_shapes(config) | {f"{i}" + "x" * 100_000: (1,) for i in range(50)}
    with pytest.raises(WeightsError, match=r"50 tensors .*with no place") as error:
        account(found, config)
    assert len(str(error.value)) < 3000
    found = expected_shapes(config) | {"layers." + "9" * 5000 + ".x": (1,), "layers": ()}
    with pytest.raises(WeightsError, match=r"2 tensors .*with no place"):
        account(found, config)
