"""Drafters in checkpoint folders: saved, read back, read by Transformers, refused with reasons."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemsmith.config import PRESETS, DrafterConfig, published_drafter
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.model.drafter import MTPDrafter
from gemsmith.testing import SIZES, random_drafter, tiny_config
from gemsmith.weights.drafter import load_drafter, save_drafter
from gemsmith.weights.load import load_model

TARGETS = {size: tiny_config(size).text_config for size in SIZES}
TABLE = "model.embed_tokens.weight"
ORDERING = "masked_embedding.token_ordering"


def saved(folder, size="E2B", dtype=torch.float32) -> MTPDrafter:
    drafter = random_drafter(TARGETS[size], dtype=dtype)
    assert save_drafter(drafter, folder) == [folder / "model.safetensors"]
    return drafter


def change_tensors(folder, change) -> None:
    tensors = {n: t.clone() for n, t in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, change) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def assert_same(found: MTPDrafter, wanted: MTPDrafter) -> None:
    found_state, state = found.state_dict(), wanted.state_dict()
    assert list(found_state) == list(state)
    assert all(torch.equal(found_state[name], state[name]) for name in state)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_saved_is_read_back_bit_for_bit(tmp_path, size):
    drafter = saved(tmp_path, size)
    found = load_drafter(tmp_path, TARGETS[size])
    assert found.config == drafter.config
    assert_same(found, drafter)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


def test_dtypes_are_kept_or_converted_and_token_ids_stay_whole_numbers(tmp_path):
    saved(tmp_path, dtype=torch.bfloat16)
    for asked, got in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        found = load_drafter(tmp_path, TARGETS["E2B"], dtype=asked)
        kinds = {name: tensor.dtype for name, tensor in found.state_dict().items()}
        assert kinds.pop(ORDERING) == torch.int64
        assert set(kinds.values()) == {got}
    save_drafter(found, tmp_path, dtype=torch.bfloat16)
    assert_same(load_drafter(tmp_path, TARGETS["E2B"]), random_drafter(
        TARGETS["E2B"], dtype=torch.bfloat16))  # fmt: skip
    with pytest.raises(ConfigError, match=r"dtype torch.float16: must be torch.bfloat16"):
        save_drafter(found, tmp_path, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"dtype float16: .* use bfloat16 or float32"):
        load_drafter(tmp_path, TARGETS["E2B"], dtype=torch.float16)


def test_token_ids_of_32_bits_are_read(tmp_path):
    drafter = saved(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({ORDERING: t[ORDERING].int()}))
    assert_same(load_drafter(tmp_path, TARGETS["E2B"]), drafter)


@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_transformers_reads_what_is_written(tmp_path, monkeypatch, size):
    transformers = pytest.importorskip("transformers")
    drafter, unified = saved(tmp_path, size), size == "12B"
    # Transformers 5.23 cannot build a model whose layers all share; see tests/model.
    text = transformers.Gemma4UnifiedTextConfig if unified else transformers.Gemma4TextConfig
    modes = property(lambda self: ["reuse"] * self.num_hidden_layers)
    monkeypatch.setattr(text, "kv_sharing_modes", modes)
    [name] = json.loads((tmp_path / "config.json").read_text())["architectures"]
    theirs, found = getattr(transformers, name).from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    state = theirs.state_dict()
    assert torch.equal(state.pop("lm_head.weight"), state[TABLE])
    ours = drafter.state_dict()
    assert state.keys() == ours.keys()
    assert all(torch.equal(state[name], ours[name]) for name in ours)


def test_a_stored_copy_of_the_head_is_left_aside_and_another_head_refused(tmp_path):
    drafter = saved(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[TABLE].clone()}))
    assert_same(load_drafter(tmp_path, TARGETS["E2B"]), drafter)
    change_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from model.embed_tokens.w"):
        load_drafter(tmp_path, TARGETS["E2B"])


def test_a_released_config_is_read_and_written_alike(tmp_path):
    released = {
        "architectures": ["Gemma4AssistantForCausalLM"], "audio_token_id": 258881,
        "backbone_hidden_size": 1536, "boa_token_id": 256000, "boi_token_id": 255999,
        "centroid_intermediate_top_k": 32, "dtype": "bfloat16", "eoa_token_id": 258883,
        "eoi_token_id": 258882, "eos_token_id": [1, 106], "image_token_id": 258880,
        "model_type": "gemma4_assistant", "num_centroids": 2048, "tie_word_embeddings": True,
        "transformers_version": "5.7.0.dev0", "use_ordered_embeddings": True,
        "text_config": {
            "attention_bias": False, "attention_k_eq_v": False, "enable_moe_block": False,
            "final_logit_softcapping": None, "global_head_dim": 512, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 256,
            "hidden_size_per_layer_input": 0, "intermediate_size": 2048,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "max_position_embeddings": 131072, "model_type": "gemma4_text",
            "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 1,
            "num_kv_shared_layers": 4, "rms_norm_eps": 1e-6, "sliding_window": 512,
            "rope_parameters": {
                "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                                   "rope_type": "proportional"},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "tie_word_embeddings": True, "use_double_wide_mlp": False, "vocab_size": 262144,
            "vocab_size_per_layer_input": 0,
        },
    }  # fmt: skip
    assert DrafterConfig.from_dict(released) == published_drafter(PRESETS["E2B"].text_config)
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = DrafterConfig.load(tmp_path)
    assert config.to_dict()["text_config"]["num_kv_shared_layers"] == 4
    assert DrafterConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("size", SIZES)
def test_published_configs_survive_their_file(size):
    config = published_drafter(PRESETS[size].text_config)
    assert DrafterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(model_type="gemma4"), r"model_type is 'gemma4'; drafters are \["),
        (lambda d: d.update(tie_word_embeddings=False), "tie_word_embeddings is False"),
        (lambda d: d.update(block_size=4), "unknown key 'block_size'"),
        (lambda d: d.update(num_centroids=7), "vocab_size 96 is not a multiple of num_centroids 7"),
        (lambda d: d.update(centroid_intermediate_top_k=13), "top_k 13 exceeds num_centroids 12"),
        (lambda d: d.update(text_config=3), "text_config: expected a JSON object, got int"),
        (lambda d: d.pop("text_config"), "missing key 'text_config'"),
    ],
)
def test_a_config_that_no_drafter_has_is_refused(tmp_path, change, text):
    saved(tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(ConfigError, match=text):
        load_drafter(tmp_path, TARGETS["E2B"])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("num_kv_shared_layers", 2, "is 2; every layer of a drafter reads its model's K/V, here 4"),
        ("hidden_size_per_layer_input", 12, "is 12; a drafter has 0"),
        ("use_double_wide_mlp", True, "is True; a drafter has false"),
        ("final_logit_softcapping", 30.0, r"is 30\.0; a drafter has null"),
        ("tie_word_embeddings", False, "is False; a drafter has true"),
    ],
)
def test_layers_that_no_drafter_has_are_refused(tmp_path, key, value, text):
    saved(tmp_path)
    # A table for per-layer inputs, lest it is missed before they are refused.
    more = {"vocab_size_per_layer_input": 96, key: value}
    change_config(tmp_path, lambda d: d["text_config"].update(more))
    with pytest.raises(ConfigError, match=f"text_config: {key} {text}"):
        load_drafter(tmp_path, TARGETS["E2B"])


DRAFTER_JSON = random_drafter(TARGETS["E2B"]).config.to_dict()
LEAF = st.none() | st.booleans() | st.integers(-2, 2000) | st.floats() | st.text(max_size=5)
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(st.text(max_size=5), LEAF, max_size=2)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*DRAFTER_JSON["text_config"]]), JSON, max_size=3),
    st.dictionaries(st.sampled_from([*DRAFTER_JSON]), JSON, max_size=2),
)
def test_any_json_is_read_or_refused_with_a_config_error(text, top):
    try:
        config = DrafterConfig.from_dict(
            DRAFTER_JSON | {"text_config": DRAFTER_JSON["text_config"] | text} | top
        )
    except ConfigError:
        return
    assert len(config.text_config.layers) == config.text_config.num_hidden_layers


def test_experts_are_refused(tmp_path):
    saved(tmp_path)
    moe = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    moe["moe_intermediate_size"] = 8
    change_config(tmp_path, lambda d: d["text_config"].update(moe))
    with pytest.raises(ConfigError, match="enable_moe_block is True; a drafter has false"):
        load_drafter(tmp_path, TARGETS["E2B"])


def test_the_drafter_of_another_model_is_refused_with_its_folder(tmp_path):
    saved(tmp_path, "12B")
    with pytest.raises(ConfigError, match=rf"{tmp_path}: the drafter's global_key_value_heads is"):
        load_drafter(tmp_path, TARGETS["E4B"])


GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(GATE), rf"1 tensor missing:\n  {GATE}\n  The download or export"),
        (lambda t: t.clear(), r"no tensor of a Gemma 4 drafter is there at all"),
        (lambda t: (t.pop(ORDERING), t.pop("masked_embedding.centroids.weight")),
         r"2 tensors missing.*\n.*\n  Perhaps use_ordered_embeddings .* should be false"),
        (lambda t: t.update({GATE: torch.zeros(41, 32)}),
         r"1 tensor of another shape:\n.*is \[41, 32\], expected \[40, 32\]\n  config.json is"),
        (lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(2, 2)}),
         r"no place in this drafter:\n.*\n  A drafter has no keys and values of its own"),
        (lambda t: t.update({GATE + "_scale": torch.zeros(2)}), r"A quantized drafter is not read"),
        (lambda t: t.update({GATE: torch.zeros(40, 32, dtype=torch.int8)}),
         r"gate_proj.weight is stored as I8"),
        (lambda t: t.update({TABLE: torch.zeros(96, 32, dtype=torch.int8)}), r"stored as I8"),
        (lambda t: t.update({ORDERING: t[ORDERING].float()}), r"ordering is stored as F32; token"),
        (lambda t: t[ORDERING].zero_(), r"does not name each of the 96 tokens once"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_this_drafter_s_are_refused(tmp_path, change, text):
    saved(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(WeightsError, match=text):
        load_drafter(tmp_path, TARGETS["E2B"])


def test_centroids_without_their_setting_are_refused(tmp_path):
    saved(tmp_path)
    change_config(tmp_path, lambda d: d.update(use_ordered_embeddings=False))
    with pytest.raises(WeightsError, match=r"Perhaps use_ordered_embeddings .* should be true"):
        load_drafter(tmp_path, TARGETS["E2B"])


def test_a_drafter_given_as_a_model_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ConfigError, match=r"this is a drafter, which runs beside its model; give"):
        load_model(tmp_path)


def test_a_drafter_without_values_is_not_saved(tmp_path):
    target = TARGETS["E2B"]
    drafter = MTPDrafter(random_drafter(target).config, target, device="meta")
    with pytest.raises(WeightsError, match="has no values"):
        save_drafter(drafter, tmp_path)
