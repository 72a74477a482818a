"""Generation end to end against Transformers; what a request turns into, and what is refused."""

import pytest
import torch
from tests.engine.conftest import random_ids, random_lm, short_context

from gemsmith.engine.engine import LM
from gemsmith.engine.request import Finished, SamplingParams
from gemsmith.errors import RequestError, TokenizerError
from gemsmith.testing import SIZES, assert_close, random_model, tiny_config, tolerance
from gemsmith.text.stream import Content, Thinking
from gemsmith.text.template import ChatTemplate

LIMIT = tolerance(torch.float32, 64, steps=8)


def hf_model(lm: LM):
    transformers = pytest.importorskip("transformers")
    family = "Gemma4Unified" if lm.config.model_type == "gemma4_unified" else "Gemma4"
    hf_config = getattr(transformers, family + "TextConfig")(**lm.config.text_config.to_dict())
    hf_config._attn_implementation = "eager"
    hf = getattr(transformers, family + "ForCausalLM")(hf_config).eval()
    hf.model.load_state_dict(lm.model.state_dict())
    hf.tie_weights()
    return hf


@pytest.mark.parametrize("size", SIZES)
def test_greedy_tokens_equal_transformers_beyond_the_window(size, tokenizer):
    lm = random_lm(size, tokenizer)
    assert lm.config.text_config.sliding_window == 8
    hf = hf_model(lm)
    for count, seed, penalty in ((21, 5, 1.0), (3, 2, 1.3)):
        prompt = random_ids(count, tokenizer.vocab_size, seed)
        theirs = hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=1,
        )[0, count:].tolist()
        ours = lm.complete(prompt, temperature=0, repetition_penalty=penalty, max_tokens=24)
        assert list(ours.token_ids) == theirs
        assert len(set(theirs)) > 3


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers(size, tokenizer, monkeypatch):
    monkeypatch.setattr("gemsmith.engine.context.CHUNK_TOKENS", 16)
    lm = random_lm(size, tokenizer)
    ids = random_ids(37, tokenizer.vocab_size, 4)
    logits = lm.logits(ids)
    with torch.no_grad():
        theirs = hf_model(lm)(torch.tensor([ids])).logits[0]
    assert logits.dtype == torch.float32
    assert_close(logits, theirs, LIMIT)
    logits += 1  # the caller's own


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_greedy_tokens_on_cuda_equal_those_on_the_cpu(size, tokenizer):
    lm = random_lm(size, tokenizer)
    prompt = random_ids(21, tokenizer.vocab_size, 1)
    options = {"repetition_penalty": 1.1, "max_tokens": 24, "logprobs": 1}
    here = lm.complete(prompt, temperature=0, **options)
    lm = LM(lm.model.to("cuda"), tokenizer, lm.config, kv="float32")
    there = lm.complete(prompt, temperature=0, **options)
    assert there.token_ids == here.token_ids
    sampled = [lm.complete(prompt, seed=3, top_k=20, top_p=0.9, max_tokens=8) for _ in range(2)]
    assert sampled[0].token_ids == sampled[1].token_ids


def test_streaming_and_not_streaming_give_the_same(tokenizer):
    lm = random_lm("E2B", tokenizer, end_ids=[tokenizer.special.turn_close])
    for seed in range(5):
        whole = lm.generate("Hello", seed=seed, max_tokens=40)
        *events, finished = lm.stream("Hello", seed=seed, max_tokens=40)
        assert isinstance(finished, Finished)
        assert finished.token_ids == whole.token_ids
        assert "".join(e.text for e in events if isinstance(e, Content)) == whole.text
        assert "".join(e.text for e in events if isinstance(e, Thinking)) == whole.thinking


# -- sampling ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_reply_and_another_does_not(tokenizer):
    lm = random_lm("E4B", tokenizer, sampling=SamplingParams(top_k=64, top_p=0.95))
    prompt = random_ids(12, tokenizer.vocab_size, 5)
    first = lm.complete(prompt, seed=1, max_tokens=16).token_ids
    torch.manual_seed(9)
    assert lm.complete(prompt, seed=1, max_tokens=16).token_ids == first
    assert lm.complete(prompt, seed=2, max_tokens=16).token_ids != first


def test_a_great_penalty_lets_no_token_come_twice(tokenizer):
    lm = random_lm("E4B", tokenizer)
    prompt = random_ids(12, tokenizer.vocab_size, 5)
    reply = lm.complete(prompt, temperature=0, repetition_penalty=100, max_tokens=20).token_ids
    assert len({*prompt, *reply}) == len({*prompt}) + len(reply)


def test_suppressed_ids_never_come(tokenizer):
    lm = random_lm("12B", tokenizer)
    prompt = random_ids(12, tokenizer.vocab_size, 6)
    free = lm.complete(prompt, temperature=0, max_tokens=8).token_ids
    bound = LM(lm.model, tokenizer, lm.config, suppressed_ids=free)
    assert not set(bound.complete(prompt, temperature=0, max_tokens=8).token_ids) & set(free)


def test_marks_of_who_asks_come_in_no_chat_reply(tokenizer):
    """A turn's opening within a reply would stand in its text."""
    special = tokenizer.special
    lm = random_lm("E2B", tokenizer, end_ids=[special.turn_close])
    hot = {"temperature": 100, "seed": 3, "max_tokens": 900, "ignore_eos": True, "top_k": 0}
    marks = {special.turn_open, special.tool_open, special.tool_response_close} - {None}
    assert marks
    assert not marks & set(lm.generate("Hi", **hot).token_ids)
    assert marks & set(lm.complete("Hi", **hot).token_ids)


def test_rows_of_the_head_without_a_token_never_come(tokenizer):
    config = tiny_config("31B", vocab_size=2 * tokenizer.vocab_size)
    lm = LM(random_model(config), tokenizer, config)
    reply = lm.complete("", max_tokens=40, seed=0, ignore_eos=True)
    assert max(reply.token_ids) < tokenizer.vocab_size


def test_logprobs_are_those_of_the_logits_whatever_the_filters(tokenizer):
    lm = random_lm("E2B", tokenizer)
    prompt = random_ids(11, tokenizer.vocab_size, 7)
    reply = lm.complete(
        prompt, seed=3, temperature=0.5, repetition_penalty=2, top_k=9, max_tokens=6, logprobs=2
    )
    assert reply.logprobs is not None
    logprobs = lm.logits([*prompt, *reply.token_ids]).log_softmax(-1)[len(prompt) - 1 : -1]
    for row, token, report in zip(logprobs, reply.token_ids, reply.logprobs, strict=True):
        assert report.token_id == token
        assert report.logprob == pytest.approx(row[token].item(), abs=1e-4)
        values, ids = row.topk(2)
        assert [i for i, _ in report.top] == ids.tolist()
        assert [p for _, p in report.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert lm.complete(prompt, max_tokens=1).logprobs is None


# -- prompts ----------------------------------------------------------------------------------


def prompt_of(lm: LM, *args, **options) -> str:
    """The text of the prompt that a request becomes."""
    return lm.tokenizer.decode(list(prompt_ids(lm, *args, **options)))


def prompt_ids(lm: LM, *args, **options) -> list[int]:
    seen = []
    lm._start = lambda prompt, params, **_: seen.extend(prompt.ids)  # pyright: ignore
    lm.stream(*args, **options)
    return seen


def test_text_for_a_chat_model_is_a_user_message(scripted):
    edge = "<bos><|turn>user\nHello<turn|>\n<|turn>model\n"
    assert prompt_of(scripted(""), "Hello") == edge
    large = edge + "<|channel>thought\n<channel|>"
    assert prompt_of(scripted("", size="31B"), "Hello") == large


def test_a_template_of_the_checkpoint_is_used_instead_of_ours(scripted, tokenizer):
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    lm = scripted("x<turn|>", template=ChatTemplate(source), end_ids=[1])
    assert lm.is_chat
    assert prompt_of(lm, "Hi<turn|>") == "<bos>[user: Hi<turn|>]"
    assert tokenizer.special.turn_close not in prompt_ids(lm, "Hi<turn|>")


def test_thinking_and_tools_reach_the_prompt(scripted):
    tool = {"type": "function", "function": {"name": "find", "description": "d"}}
    text = prompt_of(scripted("", size="31B"), "Hello", tools=[tool], enable_thinking=True)
    assert text.startswith("<bos><|turn>system\n<|think|>\n<|tool>declaration:find{")
    assert text.endswith("<|turn>model\n")


def test_markers_typed_by_a_user_end_no_turn(scripted):
    lm = scripted("")
    ids = prompt_ids(lm, "a<turn|>b")
    assert ids.count(lm.tokenizer.special.turn_close) == 1


def test_a_base_model_goes_on_with_the_text(tokenizer):
    lm = random_lm("E2B", tokenizer)
    assert not lm.is_chat
    assert prompt_ids(lm, "abc<turn|>") == [2, *tokenizer.encode_parts([("abc<turn|>", False)])]


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": [{"role": "user", "content": "Hello"}]},
        {"prompt": "Hello", "enable_thinking": True},
        {"prompt": "Hello", "tools": [{}]},
    ],
)
def test_a_base_model_refuses_what_only_a_chat_model_knows(tokenizer, request_):
    lm = random_lm("E2B", tokenizer, name="tiny")
    with pytest.raises(
        RequestError,
        match=r"tiny is a base model: it knows no messages, tools or thinking. Give plain text, or "
        r"load the instruction-tuned checkpoint \(its name ends in -it\)",
    ):
        lm.stream(**request_)


def test_completion_reads_markers_and_begins_with_bos_once(scripted):
    lm = scripted("c<turn|>")
    assert lm.complete("ab<turn|>").usage.prompt_tokens == 4
    assert lm.complete("<bos>ab<turn|>").usage.prompt_tokens == 4
    assert lm.complete("").usage.prompt_tokens == 1


def test_completion_shows_markers_as_text(scripted):
    assert scripted("<|channel>x<channel|><turn|>").complete("a").text == "<|channel>x<channel|>"


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused(scripted, prompt):
    with pytest.raises(
        RequestError,
        match="the prompt is empty: write something, or call complete\\(''\\) to let the model",
    ):
        scripted("x").stream(prompt)


def test_no_messages_are_refused(scripted):
    with pytest.raises(RequestError, match=r"no messages: give at least one, such as \{'role'"):
        scripted("x").stream([])


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "no token ids: give at least one, such as that of <bos>"),
        ([5, -1], "token id -1: must be a whole number from 0 to 289"),
        ([5, 290], "token id 290: must be a whole number from 0 to 289"),
        ([5, 1.0], "token id 1.0: must be"),
    ],
)
@pytest.mark.parametrize("way", ["logits", "complete"])
def test_bad_token_ids_are_refused(tokenizer, way, ids, text):
    lm = random_lm("E2B", tokenizer)
    with pytest.raises(RequestError, match=text):
        getattr(lm, way)(ids)


def test_logits_of_more_than_the_context_are_refused(scripted):
    with pytest.raises(RequestError, match="41 token ids, but the model's context holds 40"):
        short_context(scripted(""), 40).logits([5] * 41)


@pytest.mark.parametrize("count", [40, 41])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(scripted, count):
    lm = short_context(scripted("x"), 40)
    with pytest.raises(
        RequestError,
        match=f"the prompt has {count} tokens, but the model's context holds 40 and the reply "
        "needs room in it; shorten the prompt or drop old messages",
    ):
        lm.complete([5] * count)


def test_a_vocabulary_larger_than_the_model_is_refused(tokenizer):
    config = tiny_config("E2B")
    with pytest.raises(
        TokenizerError,
        match=f"the vocabulary has {tokenizer.vocab_size} tokens but the model 96: they belong to "
        "different checkpoints",
    ):
        LM(random_model(config), tokenizer, config)
