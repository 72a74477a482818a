"""config.json: read in both spellings, written back, and refused with a reason when wrong."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsmith.config import PRESETS, Gemma4Config, preset
from gemsmith.errors import ConfigError
from gemsmith.testing import SIZES, tiny_config


def json_of(size: str = "31B", **text) -> dict:
    data = json.loads(json.dumps(tiny_config(size).to_dict()))
    data["text_config"] |= text
    return data


@pytest.mark.parametrize("size", SIZES)
def test_written_config_reads_back_the_same(size, tmp_path):
    for config in (PRESETS[size], tiny_config(size)):
        config.save(tmp_path)
        assert Gemma4Config.load(tmp_path) == config


@pytest.mark.parametrize("size", SIZES)
def test_transformers_reads_what_is_written_and_the_other_way_round(size):
    transformers = pytest.importorskip("transformers")
    config = PRESETS[size]
    unified = config.model_type == "gemma4_unified"
    cls = transformers.Gemma4UnifiedConfig if unified else transformers.Gemma4Config
    theirs = cls(**config.to_dict())
    for plan in config.text_config.layers:
        layer = theirs.text_config.per_layer_config[plan.index]
        assert layer.head_dim == plan.head_dim
        assert layer.num_key_value_heads == plan.num_key_value_heads
    # Transformers writes the per-layer spelling.
    data = json.loads(theirs.to_json_string(use_diff=False))
    assert "per_layer_config" in data["text_config"]
    back = Gemma4Config.from_dict(data)
    assert back.text_config.layers == config.text_config.layers
    assert (back.vision_config, back.audio_config) == (config.vision_config, config.audio_config)


def test_plan_of_e2b():
    layers = PRESETS["E2B"].text_config.layers
    assert [p.index for p in layers if p.window is None] == [4, 9, 14, 19, 24, 29, 34]
    assert {p.kv_source for p in layers[15:] if p.window} == {13}
    assert {p.kv_source for p in layers[15:] if p.window is None} == {14}
    assert [layers[i].intermediate_size for i in (0, 14, 15, 34)] == [6144, 6144, 12288, 12288]
    assert [layers[i].head_dim for i in (0, 4)] == [256, 512]


def test_plan_of_31b():
    layers = PRESETS["31B"].text_config.layers
    assert [(p.k_eq_v, p.num_key_value_heads, p.window) for p in layers[4:6]] == [
        (False, 16, 1024),
        (True, 4, None),
    ]
    assert all(p.owns_kv for p in layers)


def test_bare_decoder_config_is_read():
    data = tiny_config("E2B").text_config.to_dict()
    assert Gemma4Config.from_dict(data).text_config == tiny_config("E2B").text_config


def test_aliases_are_read():
    data = json_of("26B-A4B")
    data["text_config"]["expert_intermediate_size"] = data["text_config"].pop(
        "moe_intermediate_size"
    )
    data["eoa_token_id"] = data.pop("eoa_token_index")
    assert Gemma4Config.from_dict(data) == tiny_config("26B-A4B")


@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_the_budget_of_an_image_is_read_under_both_names(size, tmp_path):
    data = json_of(size)
    data["vision_config"] = {"patch_size": 16}
    assert Gemma4Config.from_dict(data).vision_config.default_output_length == 280
    data["vision_soft_tokens_per_image"] = 70
    config = Gemma4Config.from_dict(data)
    assert config.vision_config.default_output_length == 70
    config.save(tmp_path)
    assert Gemma4Config.load(tmp_path) == config
    data["vision_config"] = {"default_output_length": 140}
    with pytest.raises(ConfigError, match="per_image 70 contradicts default_output_length 140 of"):
        Gemma4Config.from_dict(data)
    for wrong in (0, "70", True):
        data["vision_config"] = {"default_output_length": wrong}
        data["vision_soft_tokens_per_image"] = wrong
        with pytest.raises(ConfigError, match=f"default_output_length is {wrong!r}; must be an in"):
            Gemma4Config.from_dict(data)


BAD = [
    ({"hidden_sise": 64}, r"unknown key 'hidden_sise'. Did you mean hidden_size"),
    ({"zzz": 1}, r"unknown key 'zzz'. No known key is near it"),
    ({"hidden_size": "64"}, r"hidden_size is '64'; must be an integer from 1 to 65536"),
    ({"hidden_size": True}, r"hidden_size is True; must be an integer"),
    ({"hidden_size": 10**9}, r"hidden_size is 1000000000; must be an integer from 1 to 65536"),
    ({"hidden_size": None}, r"hidden_size is None; a value is required"),
    ({"num_hidden_layers": 10**6}, r"num_hidden_layers is 1000000"),
    ({"vocab_size": -1}, r"vocab_size is -1"),
    ({"rms_norm_eps": float("nan")}, r"rms_norm_eps is nan; must be a finite number"),
    ({"rms_norm_eps": 0.0}, r"rms_norm_eps 0.0 must be positive"),
    ({"final_logit_softcapping": -1}, r"final_logit_softcapping -1.0 must be positive or null"),
    ({"layer_types": ["sliding_attention"] * 6}, r"last of layer_types must be full_attention"),
    ({"layer_types": ["full_attention"]}, r"layer_types has 1 entries but num_hidden_layers is 6"),
    ({"layer_types": ["global"] * 6}, r"layer_types\[0\] is 'global'"),
    ({"layer_types": "full"}, r"layer_types is 'full'; must be a list"),
    ({"num_key_value_heads": 3}, r"num_attention_heads 4 is not a multiple of .* 3"),
    ({"head_dim": 15}, r"head_dim 15 is odd"),
    ({"num_kv_shared_layers": 6}, r"num_kv_shared_layers 6 leaves no layer of 6"),
    ({"num_kv_shared_layers": 5}, r"layers 1\.\. share K/V but no full_attention layer"),
    ({"num_kv_shared_layers": 2}, r"never used together"),
    ({"enable_moe_block": True}, r"enable_moe_block needs num_experts"),
    ({"use_bidirectional_attention": "all"}, r"'all'; only null and \"vision\""),
    ({"tie_word_embeddings": "yes"}, r"must be true or false"),
    ({"attention_bias": True}, r"no Gemma 4 decoder has biases"),
    ({"hidden_activation": "silu"}, r"must be gelu_pytorch_tanh"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, r"default or proportional"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 0}}}, r"must be positive"),
    ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
    ({"sliding_rope": 5}, r"write rope_parameters instead"),
    ({"eos_token_id": "1"}, r"eos_token_id is '1'; must be a token id"),
    ({"per_layer_config": {"0": {"head_dim": 8}}}, r"per_layer_config\['0'\].*only"),
    ({"per_layer_config": {"5": {"head_dim": 8}}}, r"contradicts global_head_dim 32"),
    ({"moe_intermediate_size": 9, "expert_intermediate_size": 8}, r"8 contradicts .* 9"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[next(iter(c)) for c, _ in BAD])
def test_wrong_values_are_named_with_the_way_out(change, text):
    with pytest.raises(ConfigError, match=text):
        Gemma4Config.from_dict(json_of(**change))


def test_experts_must_be_enough():
    with pytest.raises(ConfigError, match="top_k_experts 9 exceeds num_experts 6"):
        Gemma4Config.from_dict(json_of("26B-A4B", top_k_experts=9))


def test_a_head_apart_is_said_in_either_place():
    text = json_of()["text_config"] | {"tie_word_embeddings": False}
    for data in (json_of() | {"tie_word_embeddings": False}, json_of() | {"text_config": text}):
        config = Gemma4Config.from_dict(data)
        assert not config.text_config.tie_word_embeddings
        assert config.to_dict()["tie_word_embeddings"] is False
    assert Gemma4Config.from_dict(json_of()).to_dict()["tie_word_embeddings"] is True


def test_other_families_are_refused():
    with pytest.raises(ConfigError, match=r"model_type is 'llama'.*gemsmith runs gemma4"):
        Gemma4Config.from_dict({"model_type": "llama"})
    with pytest.raises(ConfigError, match="missing key 'text_config'"):
        Gemma4Config.from_dict({"model_type": "gemma4"})
    with pytest.raises(ConfigError, match="eoa_token_id 1 contradicts eoa_token_index 258883"):
        Gemma4Config.from_dict(json_of() | {"eoa_token_id": 1})


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist; is .* a checkpoint folder"):
        Gemma4Config.load(tmp_path)
    path = tmp_path / "config.json"
    for bad in ("{", "[1]", "", "[" * 100_000, '"x"'):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=r"not valid JSON|expected a JSON object"):
            Gemma4Config.load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid JSON"):
        Gemma4Config.load(tmp_path)
    path.write_text(" " * (5 << 20))
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        Gemma4Config.load(tmp_path)


def test_presets_by_any_usual_name():
    assert preset("google/gemma-4-E2B-it") is preset("e2b") is PRESETS["E2B"]
    with pytest.raises(ConfigError, match=r"no preset '27B'; presets are E2B, .*Did you mean"):
        preset("27B")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = st.sampled_from([*json_of()["text_config"], *json_of(), "per_layer_config"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=4), st.dictionaries(KEYS, JSON, max_size=2))
def test_any_json_is_read_or_refused_with_a_config_error(text, top):
    try:
        config = Gemma4Config.from_dict(json_of(**text) | top)
    except ConfigError:
        return
    assert len(config.text_config.layers) == config.text_config.num_hidden_layers
