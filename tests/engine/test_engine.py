"""Generation end to end: against Transformers on random weights, and on scripted replies."""

from dataclasses import replace
from itertools import groupby

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemsmith import sizing
from gemsmith.engine.context import CHUNK_TOKENS
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.request import Finished, FinishReason, SamplingParams
from gemsmith.errors import RequestError, TokenizerError
from gemsmith.testing import SIZES, assert_close, random_model, tiny_config, tolerance
from gemsmith.text.calls import ToolCall
from gemsmith.text.stream import Content, Thinking, ToolCallEvent
from gemsmith.text.template import ChatTemplate
from gemsmith.text.tokenizer import Tokenizer

LIMIT = tolerance(torch.float32, 64, steps=8)


def random_lm(size: str, tokenizer: Tokenizer, **options) -> LM:
    """K/V are kept in float32: what others compute is compared to the last bits."""
    config = tiny_config(size, vocab_size=tokenizer.vocab_size)
    return LM(random_model(config), tokenizer, config, **{"kv": "float32", **options})


def tokens(count: int, seed: int, vocab: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(30, vocab, (count,), generator=generator).tolist()


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
    for count, seed, penalty in ((21, 1, 1.0), (3, 2, 1.3)):
        prompt = tokens(count, seed, tokenizer.vocab_size)
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


def test_a_prompt_run_in_chunks_gives_the_same_tokens(tokenizer, monkeypatch):
    lm = random_lm("E2B", tokenizer)
    prompt = tokens(33, 3, tokenizer.vocab_size)
    whole = lm.complete(prompt, temperature=0, max_tokens=12).token_ids
    lm._engine.kept = None
    monkeypatch.setattr("gemsmith.engine.context.CHUNK_TOKENS", 5)
    assert lm.complete(prompt, temperature=0, max_tokens=12).token_ids == whole


def test_prompts_run_in_chunks_then_tokens_one_by_one(scripted):
    lm = scripted("abc<turn|>")
    ids = lm.tokenizer.encode("x" * (2 * CHUNK_TOKENS + 7))
    lm.complete(ids)
    assert lm.model.passes == [CHUNK_TOKENS, CHUNK_TOKENS, 7, 1, 1, 1]


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers(size, tokenizer, monkeypatch):
    monkeypatch.setattr("gemsmith.engine.context.CHUNK_TOKENS", 16)
    lm = random_lm(size, tokenizer)
    ids = tokens(37, 4, tokenizer.vocab_size)
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
    prompt = tokens(21, 1, tokenizer.vocab_size)
    options = {"repetition_penalty": 1.1, "max_tokens": 24, "logprobs": 1}
    here = lm.complete(prompt, temperature=0, **options)
    lm.model.to("cuda")
    lm._engine.kept = None
    there = lm.complete(prompt, temperature=0, **options)
    assert there.token_ids == here.token_ids
    sampled = [lm.complete(prompt, seed=3, top_k=20, top_p=0.9, max_tokens=8) for _ in range(2)]
    assert sampled[0].token_ids == sampled[1].token_ids


# -- sampling ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_reply_and_another_does_not(tokenizer):
    lm = random_lm("E4B", tokenizer, sampling=SamplingParams(top_k=64, top_p=0.95))
    prompt = tokens(12, 5, tokenizer.vocab_size)
    first = lm.complete(prompt, seed=1, max_tokens=16).token_ids
    torch.manual_seed(9)
    assert lm.complete(prompt, seed=1, max_tokens=16).token_ids == first
    assert lm.complete(prompt, seed=2, max_tokens=16).token_ids != first


def test_a_great_penalty_lets_no_token_come_twice(tokenizer):
    lm = random_lm("E4B", tokenizer)
    prompt = tokens(12, 5, tokenizer.vocab_size)
    reply = lm.complete(prompt, temperature=0, repetition_penalty=100, max_tokens=20).token_ids
    assert len({*prompt, *reply}) == len({*prompt}) + len(reply)


def test_suppressed_ids_never_come(tokenizer):
    lm = random_lm("12B", tokenizer)
    prompt = tokens(12, 6, tokenizer.vocab_size)
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
    prompt = tokens(11, 7, tokenizer.vocab_size)
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


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["<eos>", "<turn|>", "<|tool_response>"])
def test_every_end_token_ends_the_reply_unseen(scripted, end):
    lm = scripted(f"Good day.{end}more")
    reply = lm.generate("Hello")
    assert reply.text == "Good day."
    assert reply.finish_reason is FinishReason.STOP
    assert reply.token_ids[-1] == lm.tokenizer.token_id(end)
    assert reply.usage.completion_tokens == len("Good day.") + 1


def test_end_tokens_of_a_chat_end_it_even_where_the_checkpoint_forgot_them(scripted):
    lm = scripted("Yes.<|tool_response>more", end_ids=[scripted("").tokenizer.special.turn_close])
    assert lm.generate("Hello").text == "Yes."


def test_end_tokens_are_passed_over_where_asked(scripted):
    lm = scripted("one<eos>two<turn|>three<turn|>")
    reply = lm.generate("Hello", ignore_eos=True, max_tokens=12)
    assert reply.text == "onetwothre"
    assert reply.finish_reason is FinishReason.LENGTH


def test_an_end_marker_spelled_out_in_letters_ends_the_reply(scripted):
    lm = scripted("")
    lm.model.script = lm.tokenizer.encode_parts([("Yes.<turn|>more", False)])
    reply = lm.generate("Hello")
    assert (reply.text, reply.finish_reason) == ("Yes.", FinishReason.STOP)
    assert len(reply.token_ids) == len("Yes.<turn|>")


CALL = "<|tool_call>call:find{x:1}<tool_call|>"


@pytest.mark.parametrize("end", ["<|tool_response>", "<turn|>"])
def test_a_turn_that_calls_tools_ends_for_them(scripted, end):
    reply = scripted(f"Let me see.{CALL}{end}").generate("Find 1")
    assert reply.finish_reason is FinishReason.TOOL_CALLS
    assert reply.tool_calls == (ToolCall("find", {"x": 1}),)
    assert reply.text == "Let me see."


def test_a_call_cut_off_by_max_tokens_is_a_problem_and_no_call(scripted):
    reply = scripted(f"{CALL}<turn|>").generate("Find 1", max_tokens=13)
    assert reply.finish_reason is FinishReason.LENGTH
    assert reply.tool_calls == ()
    assert [problem.kind for problem in reply.problems] == ["truncated"]


def test_a_reply_cut_off_after_a_call_did_not_end_for_tools(scripted):
    reply = scripted(f"{CALL} and so on<turn|>").generate(
        "Find 1", max_tokens=len("call:find{x:1}") + 4
    )
    assert reply.finish_reason is FinishReason.LENGTH
    assert reply.tool_calls


def test_a_call_that_cannot_be_read_is_no_reason_to_run_tools(scripted):
    reply = scripted("<|tool_call>no call at all<tool_call|><|tool_response>").generate("Find 1")
    assert reply.finish_reason is FinishReason.STOP
    assert reply.tool_calls == ()
    assert reply.problems


def test_max_tokens_is_exact(scripted):
    reply = scripted("Good day.<turn|>").generate("Hello", max_tokens=4)
    assert (reply.text, reply.finish_reason) == ("Good", FinishReason.LENGTH)
    assert reply.usage.completion_tokens == 4


def test_an_unfinished_character_comes_out_as_a_replacement(scripted):
    assert scripted("né").generate("Hello", max_tokens=2).text == "n\N{REPLACEMENT CHARACTER}"


def short_context(lm: LM, limit: int) -> LM:
    text = replace(lm.config.text_config, max_position_embeddings=limit)
    lm.config = replace(lm.config, text_config=text)
    lm.model.config = text
    return lm


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_the_reply_ends_where_the_context_does(scripted, max_tokens):
    lm = short_context(scripted("x" * 50), 40)
    reply = lm.complete([5] * 30, max_tokens=max_tokens)
    assert reply.usage.completion_tokens == 10
    assert reply.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("count", [40, 41])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(scripted, count):
    lm = short_context(scripted("x"), 40)
    with pytest.raises(
        RequestError,
        match=f"the prompt has {count} tokens, but the model's context holds 40 and the reply "
        "needs room in it; shorten the prompt or drop old messages",
    ):
        lm.complete([5] * count)


def test_stop_strings_cut_the_answer_exactly(scripted):
    reply = scripted("One. Two. Three.<turn|>").generate("Count", stop=[". T", "Three"])
    assert (reply.text, reply.finish_reason) == ("One", FinishReason.STOP)
    assert len(reply.token_ids) == len("One. T")


def test_stop_strings_neither_read_thoughts_nor_calls_nor_reach_over_them(scripted):
    lm = scripted(f"<|channel>thought\nSTOP\n<channel|>ST{CALL}OP<turn|>")
    reply = lm.generate("Hello", stop="STOP")
    assert reply.thinking == "STOP"
    assert reply.tool_calls
    assert reply.text == "STOP"


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(text="a<b", stops=["<"], max_tokens=2)  # complete only once nothing more can come
@given(
    text=st.text("ab<é", max_size=12),
    stops=st.lists(st.text("ab<é", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 20),
)
def test_no_event_ever_shows_what_a_stop_string_takes_away(scripted, text, stops, max_tokens):
    lm = scripted("")
    lm.model.script = [*lm.tokenizer.encode_parts([(text, False)]), 1]
    events = list(lm.stream("Hello", stop=stops, max_tokens=max_tokens))
    shown = "".join(event.text for event in events if isinstance(event, Content))
    made = bytes(
        byte for id in lm.model.script[:-1][:max_tokens] for byte in lm.tokenizer.piece(id)
    ).decode(errors="replace")
    ends = {made.find(stop) + len(stop): stop for stop in sorted(stops, key=len) if stop in made}
    expected = made[: min(ends) - len(ends[min(ends)])] if ends else made
    assert shown == expected
    finished = events[-1]
    assert isinstance(finished, Finished)
    cut_short = not ends and max_tokens < len(lm.model.script)
    assert finished.finish_reason == ("length" if cut_short else "stop")


# -- thinking ---------------------------------------------------------------------------------

THOUGHT = "<|channel>thought\nabcdefghij\n<channel|>Done.<turn|>"


def test_a_thought_within_its_budget_is_left_alone(scripted):
    reply = scripted(THOUGHT).generate("Hello", enable_thinking=True, thinking_budget=11)
    assert (reply.thinking, reply.text) == ("abcdefghij", "Done.")
    assert reply.usage.thinking_tokens == 11


@pytest.mark.parametrize(
    ("budget", "thought"), [(0, ""), (1, ""), (2, "a"), (5, "abcd"), (10, "abcdefghi")]
)
def test_a_spent_budget_closes_the_thought_cleanly_and_the_answer_follows(
    scripted, budget, thought
):
    lm = scripted(THOUGHT)
    # The script answers the position, so after a forced close it goes on in the old thought.
    reply = lm.generate("Hello", enable_thinking=True, thinking_budget=budget)
    frame = f"<|channel>thought\n{thought}" + ("\n" if thought else "") + "<channel|>"
    assert lm.tokenizer.decode(reply.token_ids).startswith(frame)
    assert reply.thinking == thought
    assert reply.usage.thinking_tokens == min(budget, len(thought) + 1) * bool(thought)
    assert reply.text.endswith("Done.")
    assert reply.finish_reason is FinishReason.STOP


def test_a_thought_that_the_prompt_opened_is_counted_and_closed(scripted):
    lm = scripted("abcdefghij<turn|>")
    messages = [
        {"role": "user", "content": "Find"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "find", "arguments": {}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    reply = lm.generate(messages, enable_thinking=True, thinking_budget=4)
    assert reply.thinking == "abc"
    assert reply.text == "fghij"  # d and e gave way to the newline and the marker


def test_a_call_ends_a_thought_that_was_not_closed_and_stays_whole(scripted):
    lm = scripted(f"<|channel>thought\nabc{CALL}<|tool_response>")
    reply = lm.generate("Hello", enable_thinking=True, thinking_budget=6)
    assert reply.thinking == "abc"
    assert reply.tool_calls == (ToolCall("find", {"x": 1}),)
    assert reply.usage.thinking_tokens == 3


# -- streaming --------------------------------------------------------------------------------


def test_events_come_in_order_and_end_with_the_usage(scripted):
    lm = scripted(f"<|channel>thought\nWhy\n<channel|>Né.{CALL}<|tool_response>")
    events = list(lm.stream("Hello"))
    kinds = [kind for kind, _ in groupby(type(event) for event in events)]
    assert kinds == [Thinking, Content, ToolCallEvent, Finished]
    assert [event.text for event in events if isinstance(event, Content)] == ["N", "é", "."]
    usage = events[-1].usage
    assert usage.completion_tokens == len(lm.model.script)
    assert usage.thinking_tokens == len("Why\n")
    assert 0 < usage.time_to_first_token_s <= usage.total_s


def test_streaming_and_not_streaming_give_the_same(tokenizer):
    lm = random_lm("E2B", tokenizer, end_ids=[tokenizer.special.turn_close])
    for seed in range(5):
        whole = lm.generate("Hello", seed=seed, max_tokens=40)
        events = list(lm.stream("Hello", seed=seed, max_tokens=40))
        assert events[-1].token_ids == whole.token_ids
        assert "".join(e.text for e in events if isinstance(e, Content)) == whole.text
        assert "".join(e.text for e in events if isinstance(e, Thinking)) == whole.thinking


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
    prompt = tokens(19, 8, tokenizer.vocab_size)
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
    prompt = tokens(19, 9, tokenizer.vocab_size)
    whole = random_lm("E2B", tokenizer).complete(prompt, temperature=0, max_tokens=10)
    dropped = lm._start(Prompt(prompt), SamplingParams(temperature=0), chat=False)
    next(dropped)
    dropped.close()
    again = lm.complete([*prompt, *whole.token_ids[:4]], temperature=0, max_tokens=6)
    assert again.token_ids == whole.token_ids[4:]
    assert again.usage.cached_tokens >= len(prompt)


def test_two_streams_side_by_side_do_not_disturb_each_other(tokenizer):
    lm = random_lm("E4B", tokenizer)
    prompts = [tokens(15, seed, tokenizer.vocab_size) for seed in (10, 11)]
    alone = [lm.complete(p, temperature=0, max_tokens=9).token_ids for p in prompts]
    params = SamplingParams(temperature=0, max_tokens=9)
    streams = [lm._start(Prompt(p), params, chat=False) for p in prompts]
    last = [None, None]
    for _ in range(20):
        for i, stream in enumerate(streams):
            last[i] = next(stream, last[i])
    assert [event.token_ids for event in last] == alone


@pytest.mark.parametrize("size", SIZES)
def test_the_next_turn_computes_only_what_is_new_and_gives_the_same(size, tokenizer):
    lm = random_lm(size, tokenizer)
    prompt = tokens(19, 12, tokenizer.vocab_size)
    first = lm.complete(prompt, temperature=0, max_tokens=7)
    assert first.usage.cached_tokens == 0
    longer = [*prompt, *first.token_ids, *tokens(6, 13, tokenizer.vocab_size)]
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
    prompt = tokens(19, 14, tokenizer.vocab_size)
    lm.complete(prompt, temperature=0, max_tokens=2)
    other = prompt[:shared] + tokens(9, 15, tokenizer.vocab_size)
    reply = lm.complete(other, temperature=0, max_tokens=7)
    fresh = random_lm(size, tokenizer).complete(other, temperature=0, max_tokens=7)
    assert reply.token_ids == fresh.token_ids


def test_going_back_and_forth_between_two_prompts_mixes_nothing(tokenizer):
    lm = random_lm("E2B", tokenizer)
    one = tokens(6, 17, tokenizer.vocab_size)
    other = one[:2] + tokens(4, 18, tokenizer.vocab_size)
    replies = [lm.complete(p, temperature=0, max_tokens=1, logprobs=5) for p in (one, other, one)]
    assert replies[1].usage.cached_tokens == replies[2].usage.cached_tokens == 2
    first, last = (dict(replies[i].logprobs[0].top) for i in (0, 2))
    assert last == pytest.approx(first, abs=1e-4)


def test_the_same_prompt_again_computes_its_last_token_only(tokenizer):
    lm = random_lm("E2B", tokenizer)
    prompt = tokens(6, 16, tokenizer.vocab_size)
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


def test_a_vocabulary_larger_than_the_model_is_refused(tokenizer):
    config = tiny_config("E2B")
    with pytest.raises(
        TokenizerError,
        match=f"the vocabulary has {tokenizer.vocab_size} tokens but the model 96: they belong to "
        "different checkpoints",
    ):
        LM(random_model(config), tokenizer, config)


# -- one of given texts -----------------------------------------------------------------------


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_the_choice_is_what_a_masked_greedy_reply_would_be(size, tokenizer):
    lm = random_lm(size, tokenizer, end_ids=[1])
    choices = ["abc", "abd", "ab", "b", "bfgh", "cad"]
    for prompt in ("a", "hi there", "jjjj"):
        ids = lm.encode_text(prompt, markers=False).ids
        live = {(*tokenizer.encode(text), min(lm.end_ids)): text for text in choices}
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
