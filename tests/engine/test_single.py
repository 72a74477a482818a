"""One sequence at a time: what is computed for a request, and what the next finds of it."""

from typing import Any

import pytest
from tests.engine.conftest import random_ids, random_lm

from gemsmith import sizing
from gemsmith.engine.context import CHUNK_TOKENS
from gemsmith.engine.media import Prompt
from gemsmith.engine.request import SamplingParams
from gemsmith.errors import RequestError
from gemsmith.testing import SIZES


def test_a_prompt_run_in_chunks_gives_the_same_tokens(tokenizer, monkeypatch):
    lm = random_lm("E2B", tokenizer)
    prompt = random_ids(33, tokenizer.vocab_size, 3)
    whole = lm.complete(prompt, temperature=0, max_tokens=12).token_ids
    lm._engine.kept = None
    monkeypatch.setattr("gemsmith.engine.context.CHUNK_TOKENS", 5)
    assert lm.complete(prompt, temperature=0, max_tokens=12).token_ids == whole


def test_prompts_run_in_chunks_then_tokens_one_by_one(scripted):
    lm = scripted("abc<turn|>")
    ids = lm.tokenizer.encode("x" * (2 * CHUNK_TOKENS + 7))
    lm.complete(ids)
    assert lm.model.passes == [CHUNK_TOKENS, CHUNK_TOKENS, 7, 1, 1, 1]


# -- between requests -------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_of_a_stream_leaves_the_model_usable(scripted):
    lm = scripted("abcdefgh<turn|>")
    prompt = [5] * 20
    lm.model.interrupt_at = 23
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen += lm._start(Prompt(prompt), lm.sampling, chat=False)
    assert lm.complete(prompt).text == "abcdefgh<turn|>"[:8]


@pytest.mark.parametrize("size", ["E2B", "31B"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_reply_after_ctrl_c_inside_a_pass_equals_a_fresh_one(size, layer, tokenizer):
    lm = random_lm(size, tokenizer)
    prompt = random_ids(19, tokenizer.vocab_size, 8)
    expected = random_lm(size, tokenizer).complete(prompt, temperature=0, max_tokens=10).token_ids
    calls = 0

    def strike(*_):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = lm.model.layers[layer].register_forward_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        lm.complete(prompt, temperature=0, max_tokens=10)
    hook.remove()
    # One token less than was held: a ring has room for that, had the broken pass not used it.
    shorter = [*prompt, expected[0], 5]
    again = lm.complete(shorter, temperature=0, max_tokens=10).token_ids
    fresh = random_lm(size, tokenizer).complete(shorter, temperature=0, max_tokens=10).token_ids
    assert again == fresh
    assert lm.complete(prompt, temperature=0, max_tokens=10).token_ids == expected


def test_a_stream_dropped_half_way_leaves_what_it_read_for_the_next(tokenizer):
    lm = random_lm("E2B", tokenizer)
    prompt = random_ids(19, tokenizer.vocab_size, 9)
    whole = random_lm("E2B", tokenizer).complete(prompt, temperature=0, max_tokens=10)
    dropped: Any = lm._start(Prompt(prompt), SamplingParams(temperature=0), chat=False)
    next(dropped)
    dropped.close()
    again = lm.complete([*prompt, *whole.token_ids[:4]], temperature=0, max_tokens=6)
    assert again.token_ids == whole.token_ids[4:]
    assert again.usage.cached_tokens >= len(prompt)


def test_two_streams_side_by_side_do_not_disturb_each_other(tokenizer):
    lm = random_lm("E4B", tokenizer)
    prompts = [random_ids(15, tokenizer.vocab_size, seed) for seed in (10, 11)]
    alone = [lm.complete(p, temperature=0, max_tokens=9).token_ids for p in prompts]
    params = SamplingParams(temperature=0, max_tokens=9)
    streams = [lm._start(Prompt(p), params, chat=False) for p in prompts]
    last: list[Any] = [None, None]
    for _ in range(20):
        for i, stream in enumerate(streams):
            last[i] = next(stream, last[i])
    assert [event.token_ids for event in last] == alone


@pytest.mark.parametrize("size", SIZES)
def test_the_next_turn_computes_only_what_is_new_and_gives_the_same(size, tokenizer):
    lm = random_lm(size, tokenizer)
    prompt = random_ids(19, tokenizer.vocab_size, 12)
    first = lm.complete(prompt, temperature=0, max_tokens=7)
    assert first.usage.cached_tokens == 0
    longer = [*prompt, *first.token_ids, *random_ids(6, tokenizer.vocab_size, 13)]
    second = lm.complete(longer, temperature=0, max_tokens=7)
    # All that was run: the last token of a reply never is.
    assert second.usage.cached_tokens == len(prompt) + 6
    fresh = random_lm(size, tokenizer).complete(longer, temperature=0, max_tokens=7)
    assert second.token_ids == fresh.token_ids


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [0, 3, 18])
def test_a_prompt_that_turns_off_from_the_last_one_gives_the_same_as_a_fresh_one(
    size, shared, tokenizer
):
    lm = random_lm(size, tokenizer)
    prompt = random_ids(19, tokenizer.vocab_size, 14)
    lm.complete(prompt, temperature=0, max_tokens=2)
    other = prompt[:shared] + random_ids(9, tokenizer.vocab_size, 15)
    reply = lm.complete(other, temperature=0, max_tokens=7)
    fresh = random_lm(size, tokenizer).complete(other, temperature=0, max_tokens=7)
    assert reply.token_ids == fresh.token_ids


def test_going_back_and_forth_between_two_prompts_mixes_nothing(tokenizer):
    lm = random_lm("E2B", tokenizer)
    one = random_ids(6, tokenizer.vocab_size, 17)
    other = one[:2] + random_ids(4, tokenizer.vocab_size, 18)
    replies = [lm.complete(p, temperature=0, max_tokens=1, logprobs=5) for p in (one, other, one)]
    assert replies[1].usage.cached_tokens == replies[2].usage.cached_tokens == 2
    first, last = (dict(reply.logprobs[0].top) for reply in replies[::2] if reply.logprobs)
    assert last == pytest.approx(first, abs=1e-4)


def test_the_same_prompt_again_computes_its_last_token_only(tokenizer):
    lm = random_lm("E2B", tokenizer)
    prompt = random_ids(6, tokenizer.vocab_size, 16)
    first = lm.complete(prompt, temperature=0, max_tokens=1)
    second = lm.complete(prompt, temperature=0, max_tokens=1)
    assert second.usage.cached_tokens == 5
    assert second.token_ids == first.token_ids


@pytest.mark.parametrize(("kv", "value_bytes"), [("float32", 4), ("bfloat16", 2), ("auto", 1)])
def test_memory_counts_weights_and_the_kept_kv(kv, value_bytes, tokenizer):
    lm = random_lm("E2B", tokenizer, kv=kv)
    weights = sum(p.nbytes for p in lm.model.parameters()) + 4 * len(lm.model.layers)
    assert lm.memory() == {"weights": weights, "kv": 0}
    lm.complete([5] * 10, max_tokens=2)
    assert lm.memory()["kv"] == sizing.kv_bytes(lm.config.text_config, 12, value_bytes)


# -- one of given texts -----------------------------------------------------------------------


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_the_choice_is_what_a_masked_greedy_reply_would_be(size, tokenizer):
    lm = random_lm(size, tokenizer, end_ids=[1])
    choices = ["abc", "abd", "ab", "b", "bfgh", "cad"]
    for prompt in ("a", "hi there", "jjjj"):
        ids = lm.encode_text(prompt, markers=False).ids
        live: dict[tuple[int, ...], str] = {
            (*tokenizer.encode(text), min(lm.end_ids)): text for text in choices
        }
        said: tuple[int, ...] = ()
        while len(live) > 1 or said not in live:
            allowed = sorted({reply[len(said)] for reply in live})
            row = lm.logits([*ids, *said])[-1]
            said += (max(allowed, key=lambda id: row[id]),)
            live = {reply: text for reply, text in live.items() if reply[: len(said)] == said}
        assert lm.choose(prompt, choices) == live[said]


def test_a_chat_model_chooses_what_it_would_have_said(scripted):
    for reply, expected in (("no<turn|>", "no"), ("nothing", "nothing"), ("yes<turn|>", "yes")):
        lm = scripted(reply)
        messages = [{"role": "user", "content": "Is it?"}]
        lm.model.start = len(lm.encode(messages).ids)
        assert lm.choose("Is it?", ["yes", "no", "nothing"]) == expected
        assert lm.choose(messages, ["nothing", "yes", "no"]) == expected


def test_a_choice_that_begins_another_ends_as_a_turn_does(scripted, monkeypatch):
    lm, asked = scripted("no<turn|>"), []
    plain = lm.model.logits_of
    monkeypatch.setattr(lm.model, "logits_of", lambda h, ids: asked.append(ids) or plain(h, ids))
    lm.choose("Is it?", ["no", "not"])
    assert asked[0].tolist() == sorted([*lm.tokenizer.encode("t"), lm.tokenizer.special.turn_close])


def test_a_lone_choice_and_tokens_that_all_choices_share_cost_nothing(scripted):
    lm = scripted("no")
    assert lm.choose("Is it?", ["whatever"]) == "whatever"
    assert lm.model.passes == []
    lm.choose("Is it?", ["abcdef", "abcdeg"])
    prompt = len(lm.encode([{"role": "user", "content": "Is it?"}]).ids)
    assert lm.model.passes == [prompt, 5]


@pytest.mark.parametrize("choices", [[], ["a", "b", "a"], ["a", ""], "ab", [1]])
def test_choices_that_are_none_are_refused(scripted, choices):
    with pytest.raises(RequestError, match=r"choices .*: give a list of one text or more, none"):
        scripted("no").choose("Is it?", choices)


def test_choices_that_do_not_fit_the_context_are_refused(scripted):
    lm = scripted("no")
    limit = lm.config.text_config.max_position_embeddings
    with pytest.raises(RequestError, match=f"the longest choice {limit}, but the .* holds {limit}"):
        lm.choose("Is it?", ["a" * limit, "b"])
