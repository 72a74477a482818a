"""A checkpoint folder becomes a model with its own habits."""

import json

import pytest
import torch

import gemsmith
from gemsmith.engine.context import kv_format
from gemsmith.engine.engine import LM
from gemsmith.errors import ConfigError, HubError, TokenizerError
from gemsmith.testing import random_model, tiny_config
from gemsmith.weights.save import save_model


@pytest.fixture
def folder(tmp_path, tokenizer):
    config = tiny_config("E2B", vocab_size=tokenizer.vocab_size)
    save_model(random_model(config, dtype=torch.bfloat16), config, tmp_path)
    tokenizer._core.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def habits(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_a_folder_generates_as_its_parts_do(folder, tokenizer):
    lm = gemsmith.load(folder, dtype="float32", device="cpu")
    assert isinstance(lm, LM)
    assert lm.model.embed_tokens.weight.dtype == torch.float32
    parts = LM(lm.model, tokenizer, lm.config)
    expected = parts.complete("abc", temperature=0, max_tokens=9).token_ids
    assert lm.complete("abc", temperature=0, max_tokens=9).token_ids == expected


def test_the_stored_dtype_is_kept_unless_asked_otherwise(folder):
    assert LM.load(folder, device="cpu").model.embed_tokens.weight.dtype == torch.bfloat16


def test_kv_are_int8_on_the_cpu_unless_asked_otherwise(folder):
    assert LM.load(folder, device="cpu").kv == torch.int8
    assert gemsmith.load(folder, device="cpu", kv="bfloat16").kv == torch.bfloat16
    assert kv_format("auto", torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_an_unknown_kv_format_is_refused_before_anything_is_read():
    known = "kv 'fp8': must be one of auto, float32, bfloat16, int8"
    with pytest.raises(ConfigError, match=known):
        LM.load("no such folder", kv="fp8")


def test_sampling_defaults_come_from_generation_config(folder, tokenizer):
    ends = [1, tokenizer.special.turn_close]
    habits(folder, temperature=0.7, top_k=5, eos_token_id=ends, suppress_tokens=[7, 10**6])
    lm = LM.load(folder, device="cpu")
    assert lm.sampling == gemsmith.SamplingParams(temperature=0.7, top_k=5, top_p=0.95)
    assert lm.is_chat
    assert lm.end_ids == {*ends, tokenizer.special.tool_response_open}
    assert 7 not in lm.complete("abc", seed=1, max_tokens=50, ignore_eos=True).token_ids


@pytest.mark.parametrize("values", [{"do_sample": False}, {"temperature": 0}])
def test_a_greedy_generation_config_is_greedy(folder, values):
    habits(folder, **values)
    assert LM.load(folder, device="cpu").sampling.temperature == 0


def test_sampling_is_the_default_without_generation_config(folder):
    assert LM.load(folder, device="cpu").sampling.temperature == 1


def test_without_chat_ends_or_template_it_is_a_base_model(folder):
    assert not LM.load(folder, device="cpu").is_chat
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert LM.load(folder, device="cpu").is_chat


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(ConfigError, match="dtype 'int8': must be one of auto, float32, bfloat16"):
        LM.load(folder, dtype="int8")


def test_a_missing_vocabulary_is_refused_before_the_weights_are_read(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(TokenizerError, match="no vocabulary at"):
        LM.load(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(HubError, match="no folder"):
        LM.load(tmp_path / "nothing")
