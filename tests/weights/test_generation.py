"""generation_config.json: what is read, defaulted, ignored and refused."""

import json

import pytest

from gemsmith.config import PRESETS
from gemsmith.errors import ConfigError
from gemsmith.testing import tiny_config
from gemsmith.weights.generation import (
    IGNORED_KEYS,
    OFF,
    GenerationConfig,
    load_generation_config,
)

CONFIG = tiny_config("E2B")
RELEASED = {
    "bos_token_id": 2,
    "do_sample": True,
    "eos_token_id": [1, 106, 50],
    "pad_token_id": 0,
    "suppress_tokens": [258883, 258882],
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "5.10.0.dev0",
}


def test_a_released_file_is_read_whole(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(RELEASED))
    read = load_generation_config(tmp_path, CONFIG)
    assert read == GenerationConfig(
        eos_token_id=(1, 106, 50), suppress_tokens=(258883, 258882), top_k=64, top_p=0.95
    )
    assert read.do_sample
    assert read.max_new_tokens is None


def test_without_a_file_the_releases_values_and_the_configs_ends_hold(tmp_path):
    config = type(CONFIG)(text_config=CONFIG.text_config, eos_token_id=(1, 106))
    read = load_generation_config(tmp_path, config)
    assert (read.do_sample, read.temperature, read.top_p, read.top_k) == (True, 1.0, 0.95, 64)
    assert read.eos_token_id == (1, 106)
    assert read.suppress_tokens == ()
    assert load_generation_config(tmp_path, PRESETS["31B"]).eos_token_id == (1,)


def test_ends_that_the_file_leaves_out_or_nulls_come_from_the_config(tmp_path):
    config = type(CONFIG)(text_config=CONFIG.text_config, eos_token_id=(7, 8))
    for data in ({"top_k": 3}, {"top_k": 3, "eos_token_id": None}):
        (tmp_path / "generation_config.json").write_text(json.dumps(data))
        read = load_generation_config(tmp_path, config)
        assert (read.top_k, read.eos_token_id) == (3, (7, 8))


def test_saved_and_read_is_the_same(tmp_path):
    for config in (
        GenerationConfig(),
        GenerationConfig(do_sample=False, eos_token_id=(3, 4), suppress_tokens=(9,), min_p=0.1),
        GenerationConfig(max_new_tokens=5, temperature=0.7, repetition_penalty=1.2, top_k=0),
    ):
        config.save(tmp_path)
        assert load_generation_config(tmp_path, CONFIG) == config


def test_single_ids_lists_and_repeats_are_read():
    read = GenerationConfig.from_dict({"eos_token_id": 106, "suppress_tokens": [4, 4, 5]})
    assert read.eos_token_id == (106,)
    assert read.suppress_tokens == (4, 5)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("do_sample", "yes", "do_sample is 'yes'; must be true or false"),
        ("do_sample", 1, "do_sample is 1; must be true or false"),
        ("temperature", -0.1, "temperature is -0.1; must be a number from 0 to 100"),
        ("temperature", float("nan"), "temperature is nan; must be a number"),
        ("temperature", True, "temperature is True; must be a number"),
        ("top_p", 1.5, "top_p is 1.5; must be a number from 0 to 1"),
        ("min_p", "0", "min_p is '0'; must be a number"),
        ("repetition_penalty", 0, "repetition_penalty is 0; must be a number from 0.01"),
        ("top_k", -1, "top_k is -1; must be a whole number from 0"),
        ("top_k", 2.0, r"top_k is 2\.0; must be a whole number"),
        ("top_k", 10**30, "top_k is 10+; must be a whole number"),
        ("max_new_tokens", 0, "max_new_tokens is 0; must be a whole number from 1"),
        ("pad_token_id", -1, "pad_token_id is -1; must be a whole number"),
        ("bos_token_id", [2], r"bos_token_id is \[2\]; must be a whole number"),
        ("eos_token_id", [], r"eos_token_id is \[\]; must name at least one token"),
        ("eos_token_id", [1, "2"], "must be a token id or a list of at most"),
        ("eos_token_id", -1, "must be a token id"),
        ("eos_token_id", True, "must be a token id"),
        ("suppress_tokens", {"a": 1}, "must be a token id"),
        ("suppress_tokens", list(range(5000)), "must be a token id or a list of at most 4096"),
        ("num_beams", 4, "num_beams is 4; gemsmith does not generate that way; remove the key"),
        ("no_repeat_ngram_size", 3, "does not generate that way"),
        ("stop_strings", ["x"], "does not generate that way"),
        ("watermarking_config", {}, "does not generate that way"),
        ("temprature", 1, r"unknown key 'temprature'\. Did you mean temperature\?"),
        ("zzz", 1, r"unknown key 'zzz'\. No known key is near it\."),
    ],
)
def test_wrong_values_and_unknown_keys_are_named(key, value, text):
    with pytest.raises(ConfigError, match=rf"generation_config\.json: .*{text}") as error:
        GenerationConfig.from_dict({key: value})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ("\xff\xfe", "not valid JSON"),
        (" " * (1 << 20) + "{}", "larger than 1 MiB"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path, content, text):
    (tmp_path / "generation_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=text):
        load_generation_config(tmp_path, CONFIG)


def test_every_key_transformers_can_write_is_known(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    ours = set(GenerationConfig.__dataclass_fields__) | IGNORED_KEYS | set(OFF)
    assert set(vars(transformers.GenerationConfig())) <= ours
    assert not IGNORED_KEYS & set(OFF)
    hf = transformers.GenerationConfig(
        do_sample=True, top_k=7, eos_token_id=[1, 106], max_new_tokens=9, num_beams=1
    )
    hf.save_pretrained(tmp_path)
    read = load_generation_config(tmp_path, CONFIG)
    assert (read.top_k, read.eos_token_id, read.max_new_tokens) == (7, (1, 106), 9)


def test_transformers_reads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    GenerationConfig(eos_token_id=(1, 106, 50), suppress_tokens=(5,)).save(tmp_path)
    hf = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert hf.eos_token_id == [1, 106, 50]
    assert (hf.do_sample, hf.top_k, hf.top_p, hf.suppress_tokens) == (True, 64, 0.95, [5])
