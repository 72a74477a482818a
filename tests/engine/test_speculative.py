"""Guesses change the time a reply takes, never the reply: against the same model without them."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import needs_extension
from tests.engine.conftest import GREEDY, NOTE, Oracle, always, random_ids, same

from gemsmith.engine.context import Context, Next
from gemsmith.engine.drafters import Lookup, Text
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.reply import Reply
from gemsmith.engine.request import SamplingParams
from gemsmith.engine.speculative import Costs, Speculation
from gemsmith.errors import ConfigError
from gemsmith.testing import SIZES, random_model, tiny_config
from gemsmith.text.tokenizer import Tokenizer

# -- the reply is the same ------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        GREEDY.changed(temperature=0.9, seed=5),
        GREEDY.changed(temperature=0.7, seed=6, top_k=30, top_p=0.9),
        GREEDY.changed(temperature=0.8, seed=7, repetition_penalty=1.2),
        GREEDY.changed(logprobs=2),
    ],
    ids=["greedy", "free", "filtered", "penalized", "logprobs"],
)
@pytest.mark.parametrize("wrong_every", [1, 3, 1000])
def test_a_reply_guessed_ahead_is_the_same(size, params, wrong_every, low_bit, monkeypatch):
    plain = low_bit(size, speculation="off")
    prompt = random_ids(21, plain.tokenizer.vocab_size)
    expected = plain.complete(prompt, sampling=params)
    always(monkeypatch, Oracle([*prompt, *expected.token_ids], wrong_every=wrong_every))
    lm = low_bit(size)
    ours = lm.complete(prompt, sampling=params)
    assert same(ours, expected)
    assert ours.usage.drafted_tokens > 0
    assert (ours.usage.accepted_tokens == 0) == (wrong_every == 1)
    # What is kept for the next request is what a reply without guesses leaves.
    assert lm._engine.kept is not None
    assert plain._engine.kept is not None
    assert lm._engine.kept.keys == plain._engine.kept.keys
    assert torch.equal(lm._engine.kept.run([40]), plain._engine.kept.run([40]))


@needs_extension
def test_lookup_finds_what_repeats_and_saves_passes(low_bit, monkeypatch):
    plain, lm = low_bit("E2B", speculation="off"), low_bit("E2B")
    prompt = random_ids(30, lm.tokenizer.vocab_size) * 2
    params = GREEDY.changed(max_tokens=150)
    expected = plain.complete(prompt, sampling=params)
    always(monkeypatch)
    ours = lm.complete(prompt, sampling=params)
    assert same(ours, expected)
    assert 0 < ours.usage.accepted_tokens <= ours.usage.drafted_tokens
    assert (expected.usage.drafted_tokens, expected.usage.accepted_tokens) == (0, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [3, 7, 20])
def test_a_float_model_says_what_it_would_up_to_its_rounding(
    size, length, tokenizer: Tokenizer, monkeypatch
):
    config = tiny_config(size, vocab_size=tokenizer.vocab_size)
    model = random_model(config)
    plain = LM(model, tokenizer, config, kv="float32", speculation="off")
    prompt = random_ids(length, tokenizer.vocab_size)
    expected = plain.complete(prompt, sampling=GREEDY)
    logits = plain.logits([*prompt, *expected.token_ids])[len(prompt) - 1 : -1]
    best = logits.topk(2).values
    # Where two tokens are as likely up to rounding either may come, and all is another text then.
    near = (best[:, 0] - best[:, 1] < 1e-3).nonzero()[:, 0].tolist()
    sure = near[0] if near else len(expected.token_ids)
    assert sure > 5
    always(monkeypatch, Oracle([*prompt, *expected.token_ids[:sure]]))
    lm = LM(model, tokenizer, config, kv="float32", speculation="on")
    ours = lm.complete(prompt, sampling=GREEDY.changed(max_tokens=sure))
    assert ours.token_ids == expected.token_ids[:sure]
    assert ours.usage.accepted_tokens > 0


def test_stop_strings_thoughts_and_limits_act_as_without(scripted, tokenizer, monkeypatch):
    said = "<|channel>thought\nabcabcabcabc\n<channel|>one abcabc STOP abc<turn|>"
    for options in (
        {},
        {"stop": ("STOP",)},
        {"stop": ("bcab",)},
        {"max_tokens": 17},
        {"thinking_budget": 4},
        {"thinking_budget": 0},
        {"thinking_budget": 4, "logprobs": 1},
        {"ignore_eos": True, "max_tokens": 60},
    ):
        plain = scripted(said, speculation="off")
        expected = plain.generate("Hi", enable_thinking=True, **options)
        lm = scripted(said, speculation="on")
        prompt = lm.encode([{"role": "user", "content": "Hi"}], enable_thinking=True).ids
        with pytest.MonkeyPatch.context() as patch:
            always(patch, Oracle([*prompt, *expected.token_ids], wrong_every=5))
            ours = lm.generate("Hi", enable_thinking=True, **options)
        assert same(ours, expected)
        assert ours.usage.accepted_tokens > 0
        assert lm._engine.kept is not None
        assert plain._engine.kept is not None
        assert lm._engine.kept.keys == plain._engine.kept.keys


def test_guesses_save_passes_and_never_reach_beyond_the_reply(scripted, monkeypatch):
    always(monkeypatch)
    lm = scripted("abcdefgh " * 20 + "<turn|>", speculation="on")
    reply = lm.generate("Hi", max_tokens=100)
    usage = reply.usage
    assert usage.completion_tokens == 100
    # The prompt's pass gives one token; every other gives one and what was guessed right.
    assert len(lm.model.passes) - 1 + usage.accepted_tokens == 99
    assert usage.accepted_tokens > 60
    assert sum(lm.model.passes[1:]) == 99 + usage.drafted_tokens - usage.accepted_tokens


def test_a_stream_dropped_in_the_middle_leaves_what_was_accepted(scripted, monkeypatch):
    always(monkeypatch)
    lm = scripted("abcdefgh " * 20 + "<turn|>", speculation="on")
    stream = lm.stream("Hi")
    for _ in range(40):
        next(stream)
    stream.close()
    assert lm._engine.kept is not None
    prompt = lm.encode([{"role": "user", "content": "Hi"}]).ids
    said = lm.tokenizer.encode("abcdefgh " * 20)
    assert lm._engine.kept.keys == [*prompt, *said][: len(lm._engine.kept.keys)]
    assert lm._engine.kept._cache.length == len(lm._engine.kept.keys)
    assert lm.generate("Hi").text == "abcdefgh " * 20


@needs_extension
@pytest.mark.parametrize("temperature", [0, 1])
def test_calls_held_to_a_grammar_are_the_same(temperature, monkeypatch):
    messages = [{"role": "user", "content": "Note that ducks swim, ducks swim, tag one."}]
    asked = {
        "tools": [NOTE], "tool_choice": "required", "seed": 3, "temperature": temperature,
        "max_tokens": 80,
    }  # fmt: skip
    plain = LM.load("pocket", quant="int4", speculation="off")
    expected = plain.generate(messages, **asked)
    lm = LM.load("pocket", quant="int4")
    prompt = lm.encode(messages, tools=[NOTE]).ids
    for wrong_every in (1000, 4):
        with pytest.MonkeyPatch.context() as patch:
            always(patch, Oracle([*prompt, *expected.token_ids], wrong_every=wrong_every))
            ours = lm.generate(messages, **asked)
        assert same(ours, expected)
        assert ours.usage.accepted_tokens > 0
    with pytest.MonkeyPatch.context() as patch:
        always(patch)
        assert same(lm.generate(messages, **asked), expected)


@needs_extension
def test_guesses_are_cut_where_the_grammar_lets_none_through(monkeypatch):
    lm = LM.load("pocket", quant="int4")
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["sun", "rain"]}}}
    follow = lm.follow(response_format=form)
    reply = lm.reply(lm.encode([{"role": "user", "content": "x"}]), GREEDY, follow=follow)
    constraint = reply._constraint
    assert constraint is not None
    quote, good = lm.tokenizer.encode('"'), lm.tokenizer.encode('"sun"')
    while reply.knows_next:
        reply.take(None)
    if not reply.token_ids:
        constraint.accept(good[0])
        good = good[1:]
    else:
        good = lm.tokenizer.encode('"sun"')[len(reply.token_ids) :]
    before = constraint.allowed_ids(10_000)
    bad = lm.tokenizer.encode("zebra")
    assert reply.fitting([*good, *bad]) <= len(good)
    assert reply.fitting([*good, *bad]) >= 1
    assert reply.fitting(bad) == 0
    assert reply.fitting([10**6]) == 0
    assert constraint.allowed_ids(10_000) == before
    assert json.loads(lm.tokenizer.decode(quote) + 'sun"') == "sun"


# -- drawing ----------------------------------------------------------------------------------


class Fixed(Next):
    """Says the same of every next token."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        self._logits_V, self.hidden_1D = logits_V, logits_V

    @property
    def logits_V(self) -> torch.Tensor:
        return self._logits_V

    def likeliest(self, count, skipped):
        return None

    def logits_of(self, ids):
        return self._logits_V[list(ids)]


@settings(max_examples=10, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=5),
    guess=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_what_is_drawn_with_a_guess_has_the_distribution_of_what_is_drawn_without(
    tokenizer, weights, guess, seed
):
    first, vocab = 40, tokenizer.vocab_size
    probs = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    logits = torch.full((vocab,), float("-inf"))
    logits[first : first + len(weights)] = probs.log().float()
    row, draws = Fixed(logits), 1500
    reply = Reply(
        Prompt([2]), SamplingParams(seed=seed, ignore_eos=True), tokenizer, vocab_size=vocab,
        max_tokens=10**6, end_ids=frozenset({1}), chat=False,
    )  # fmt: skip
    text = Text(reply)
    firsts: list[int] = []
    pairs = 0
    for _ in range(draws):
        before = len(reply.token_ids)
        text.drafts = [first + guess]
        _, accepted = text.take([row, row])
        new = reply.token_ids[before:]
        assert len(new) == accepted + 1
        assert (new[0] == first + guess) == (accepted == 1)
        firsts.append(new[0] - first)
        pairs += accepted
    counts = Counter(firsts)
    for i, p in enumerate(probs.tolist()):
        # Five standard deviations.
        assert abs(counts[i] - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5 + 1
    # The token after an accepted guess is drawn like any other.
    after = Counter(reply.token_ids)
    for i, p in enumerate(probs.tolist()):
        n = len(reply.token_ids)
        assert abs(after[first + i] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1
    assert (reply.drafted, reply.accepted) == (draws, pairs)


# -- the cache --------------------------------------------------------------------------------

PLAN = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 15), st.integers(0, 15)), min_size=1, max_size=6
)


def guessed(model, kv: torch.dtype, prefill: int, plan) -> Context:
    """A context in which of each plan's guesses some were kept."""
    ids = random_ids(300, model.config.vocab_size, seed=3)
    context = Context(model, kv)
    context.run(ids[:prefill])
    at = prefill
    for unread, drafts, kept in plan:
        before, kept = stored(context), min(kept, drafts)
        text = ids[at : at + unread + kept]
        context.verify(text[:unread], [*text[unread:], *[29] * (drafts - kept)])
        assert stored(context).keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in stored(context).items())
        context.keep(len(text))
        at += len(text)
    assert context.keys == ids[:at]
    assert context._cache.length == at
    return context


def stored(context: Context) -> dict[str, torch.Tensor]:
    """What the cache holds that counts."""
    cache = context._cache
    return {
        name: tensor[: cache.length].clone()
        for layer in cache._layers.values()
        for name, tensor in layer.tensors.items()
    }


@needs_extension
@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=10, deadline=None)
@given(plan=PLAN, prefill=st.integers(1, 25))
def test_guesses_that_are_not_kept_leave_the_bits_of_a_cache_that_never_saw_them(
    size, plan, prefill, low_bit
):
    model = low_bit(size).model
    ours, fresh = guessed(model, torch.int8, prefill, plan), Context(model, torch.int8)
    for id in ours.keys:
        assert isinstance(id, int)
        fresh.run([id])
    theirs = stored(fresh)
    for name, tensor in stored(ours).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=10, deadline=None)
@given(plan=PLAN, prefill=st.integers(1, 25))
def test_a_float_cache_holds_the_same_up_to_rounding(size, plan, prefill):
    model = random_model(tiny_config(size))
    ours, fresh = guessed(model, torch.float32, prefill, plan), Context(model, torch.float32)
    fresh.run([id for id in ours.keys if isinstance(id, int)])
    theirs = stored(fresh)
    for name, tensor in stored(ours).items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=1e-3)


@needs_extension
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [8, 150])
@pytest.mark.parametrize("past", [140, 250, 390])
def test_logits_have_the_same_bits_in_a_pass_of_guesses_as_in_one_of_their_own(
    size, window, past, low_bit
):
    lm = low_bit(size, window)
    ids = random_ids(past + 14, lm.tokenizer.vocab_size)
    one, many = Context(lm.model), Context(lm.model)
    one.run(ids[:past])
    many.run(ids[:past])
    rows = many.verify(ids[past : past + 2], ids[past + 2 :])
    one.run(ids[past : past + 1])
    for id, row in zip(ids[past + 1 :], rows, strict=True):
        assert torch.equal(one.run([id]), row.logits_V)
    many.keep(len(ids) - past)
    assert all(torch.equal(t, stored(many)[name]) for name, t in stored(one).items())
    assert torch.equal(one.run([50]), many.run([50]))


# -- how far ----------------------------------------------------------------------------------


class Endless:
    """Stands in for a reply whose tokens are as guessed in a share `right` of cases."""

    max_tokens = 10**9
    params = GREEDY
    ended = False

    def __init__(self, right: float, draw: random.Random) -> None:
        self.prompt, self.token_ids, self.right, self.draw = Prompt([0]), [], right, draw
        self.drafted = self.accepted = 0

    def fitting(self, ids):
        return len(ids)

    def forced(self):
        return []

    def take(self, row):
        guess = [0, *self.token_ids][-1] + 1
        right = self.draw.random() < self.right
        self.token_ids.append(guess if right else guess + 10**6)
        return []


def known(self, texts, counts):
    """Guesses the next numbers."""
    return [[text.ids[-1] + 1 + i for i in range(n)] for text, n in zip(texts, counts, strict=True)]


def run_clocked(
    seconds_of: Callable[[int], float], right: Sequence[float], tokens: int, seed: int = 0
) -> tuple[float, int, int, list[Text]]:
    """Seconds until replies beside each other have so many tokens each on average, in the clock of
    a machine; passes, and those with guesses. Of each a share of its tokens is as guessed."""
    draw, ahead = random.Random(seed), Speculation()
    texts = [Text(Endless(each, draw)) for each in right]  # pyright: ignore
    passes, seconds, verified = 0, 0.0, 0
    row = Fixed(torch.zeros(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lookup, "propose", known)
        while sum(len(text.ids) for text in texts) < tokens * len(texts):
            ahead.propose(texts, len(texts))
            drafts = sum(len(text.drafts) for text in texts)
            for text in texts:
                text.take([row] * (1 + len(text.drafts)))
            took = seconds_of(len(texts) + drafts)
            ahead.observe(len(texts) + drafts, took * draw.uniform(0.9, 1.1))
            seconds, passes, verified = seconds + took, passes + 1, verified + (drafts > 0)
    return seconds, passes, verified, texts


def test_guesses_go_far_where_they_are_right_and_rows_are_cheap():
    seconds, passes, _, _ = run_clocked(lambda rows: 1 + 0.02 * rows, [0.95], 3000)
    assert passes < 600
    assert seconds < 0.25 * 3000 * 1.02


@pytest.mark.parametrize("right", [0.0, 0.1, 0.5, 0.95])
def test_guesses_stop_where_they_lose_whatever_the_reason(right):
    # Every row costs a whole pass: nothing can be won.
    seconds, _, verified, _ = run_clocked(float, [right], 3000)
    assert verified < 3000 / 30
    assert seconds < 1.06 * 3000
    if right == 0:  # or rows are cheap, and no guess is right
        seconds, *_ = run_clocked(lambda rows: 1 + 0.1 * rows, [0.0], 3000)
        assert seconds < 1.06 * 3000 * 1.1


def test_guesses_are_tried_again_when_costs_have_changed():
    passes = 0

    def first_dear(rows: int) -> float:
        nonlocal passes
        passes += 1
        return float(rows) if passes < 500 else 1.0

    seconds, _, verified, _ = run_clocked(first_dear, [0.95], 20_000)
    assert verified > 500
    assert seconds < 0.4 * 20_000


def linear_beyond_16(rows: int) -> float:
    """Bound by memory first, then by products: a processor."""
    return 1 + 0.02 * rows if rows <= 16 else 1.32 * rows / 16


def test_many_replies_leave_less_room_for_guesses_and_none_is_lost():
    alone, _, _, _ = run_clocked(linear_beyond_16, [0.9], 2000)
    assert alone < 0.35 * 2000
    for replies in (4, 16, 40):
        plain = linear_beyond_16(replies) * 2000
        seconds, _, _, texts = run_clocked(linear_beyond_16, [0.5] * replies, 2000)
        assert seconds < 1.06 * plain
        if replies == 4:
            assert seconds < 0.75 * plain
        else:  # a row for a guess costs what one for a reply does, and is right half the time
            assert sum(t.reply.drafted for t in texts) < 0.1 * sum(len(t.ids) for t in texts)


def test_the_likelier_reply_gets_the_rows():
    _, _, _, (sure, vague) = run_clocked(lambda rows: 1 + 0.06 * rows, [0.95, 0.3], 2000)
    assert sure.reply.accepted > 0.7 * len(sure.ids)
    assert vague.reply.drafted < 0.5 * len(vague.ids)
    assert sure.reply.accepted > 5 * vague.reply.accepted


@pytest.mark.parametrize(("row_s", "worth"), [(0.001, False), (0.0001, True)])
def test_guesses_beside_a_prompt_pay_for_their_own_rows_alone(row_s, worth, monkeypatch):
    monkeypatch.setattr(Lookup, "propose", known)
    ahead, draw = Speculation(), random.Random(0)
    texts = [Text(Endless(0.5, draw)) for _ in range(4)]  # pyright: ignore
    for rows in (4, 500, 560):
        ahead.observe(rows, 0.001 * min(rows, 500) + row_s * max(0, rows - 500))
    ahead.propose(texts, 500)
    assert any(text.drafts for text in texts) == worth


def test_costs_are_medians_that_one_slow_pass_does_not_move():
    costs = Costs()
    assert costs.of([1]) is None
    for seconds in (1.0, 1.1, 50.0, 0.9, 1.0):
        costs.add(1, seconds)
    assert costs.of([1, 9]) == [1, 1], "what was never measured may cost no more"
    costs.add(4, 2.5)
    assert costs.of([1, 2, 3, 4, 5, 16]) == [1, 1.5, 2, 2.5, 3, 8.5]
    costs.add(16, 2.0)
    assert costs.of([4, 10, 16, 40]) == [2.5, 2.25, 2, 2], "more rows never cost less"


# -- choices ----------------------------------------------------------------------------------


@needs_extension
def test_replies_are_guessed_ahead_by_default_where_they_stay_the_same(low_bit, tokenizer):
    config = tiny_config("E2B", vocab_size=tokenizer.vocab_size)
    floats = random_model(config)
    assert [low_bit("E2B", speculation=s).speculates for s in ("auto", "on", "off")] == [
        True, True, False,
    ]  # fmt: skip
    assert not LM(floats, tokenizer, config).speculates
    assert LM(floats, tokenizer, config, speculation="on").speculates
    for size in SIZES:
        assert low_bit(size).speculates


def test_an_unknown_choice_is_refused_before_anything_is_read(tokenizer):
    for make in (
        lambda: LM.load("pocket", speculation="always"),
        lambda: LM(None, tokenizer, tiny_config("E2B", vocab_size=500), speculation="always"),  # pyright: ignore
    ):
        with pytest.raises(ConfigError, match="speculation 'always': must be auto, on or off"):
            make()
