"""Guesses beside each other change the time replies take, never the replies: many at a time."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.conftest import needs_extension
from tests.engine.conftest import GREEDY, NOTE, Oracle, always, random_ids, same

from gemsmith.engine.batching import BatchEngine, EngineConfig, run_all
from gemsmith.engine.context import Next, Rows
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.reply import Reply, collect
from gemsmith.engine.request import Generation, Request, SamplingParams
from gemsmith.errors import WeightsError
from gemsmith.testing import SIZES

SMALL = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, max_model_len=200, block_tokens=4)
MIXED = (
    GREEDY,
    GREEDY.changed(temperature=0.9, seed=5, logprobs=1),
    GREEDY.changed(temperature=0.8, seed=7, repetition_penalty=1.2, max_tokens=17),
    GREEDY.changed(temperature=0.7, seed=6, top_k=30, top_p=0.9, max_tokens=25),
    GREEDY.changed(logprobs=2, max_tokens=2),
    GREEDY.changed(max_tokens=1),
)


def mixed(lm: LM, lengths: Sequence[int] = (21, 3, 40, 1, 70, 9)) -> list[Request]:
    """Prompts of several lengths, each with its own sampling."""
    vocab = lm.tokenizer.vocab_size
    return [
        Request(prompt=Prompt(random_ids(n, vocab, seed=n)), params=params, chat=False)
        for n, params in zip(lengths, MIXED, strict=True)
    ]


def replies(engine: BatchEngine, requests: Sequence[Request]) -> list[Generation]:
    """Of all; blocks are accounted for after every step."""
    ids = [engine.add(request) for request in requests]
    events = {id: [] for id in ids}
    while engine.busy:
        for id, outcome in engine.step():
            assert isinstance(outcome, list), outcome
            events[id] += outcome
        engine.check()
    engine.prefix.clear()
    assert engine.stats().kv_used_bytes == 0
    return [collect(events[id]) for id in ids]


def oracle(requests: Sequence[Request], expected: Sequence[Generation], wrong_every: int) -> Oracle:
    texts = [
        [*request.prompt.ids, *reply.token_ids]
        for request, reply in zip(requests, expected, strict=True)
    ]
    return Oracle(*texts, wrong_every=wrong_every)


@needs_extension
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrong_every", [1, 3, 1000])
def test_replies_guessed_ahead_beside_each_other_are_the_same(
    size, wrong_every, low_bit, monkeypatch
):
    asked = mixed(low_bit(size))
    expected = replies(BatchEngine(low_bit(size, speculation="off"), SMALL), asked)
    always(monkeypatch, oracle(asked, expected, wrong_every))
    engine = BatchEngine(low_bit(size), SMALL)
    ours = replies(engine, asked)
    for a, b in zip(ours, expected, strict=True):
        assert same(a, b)
    stats = engine.stats()
    assert stats.drafts > 0
    assert stats.draft_tokens == sum(reply.usage.drafted_tokens for reply in ours)
    assert stats.accepted_tokens == sum(reply.usage.accepted_tokens for reply in ours)
    assert (stats.accepted_tokens == 0) == (wrong_every == 1)
    assert stats.generated_tokens == sum(len(reply.token_ids) for reply in expected)
    assert stats.prompt_tokens == 21 + 3 + 40 + 1 + 70 + 9


@needs_extension
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [8, 150])
def test_every_choice_is_made_from_the_same_bits(size, window, low_bit, monkeypatch):
    asked = mixed(low_bit(size, window), (300, 3, 260, 1, 390, 9))
    roomy = replace(SMALL, max_num_batched_tokens=100, max_model_len=500)

    def run(**options) -> tuple[list[Generation], dict[int, list[torch.Tensor]]]:
        taken, take = {}, Reply.take

        def noted(self, following):
            if following is not None:
                taken.setdefault(len(self.prompt.ids), []).append(following.logits_V.clone())
            return take(self, following)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Reply, "take", noted)
            return replies(BatchEngine(low_bit(size, window, **options), roomy), asked), taken

    expected, plain = run(speculation="off")
    always(monkeypatch, oracle(asked, expected, 4))
    ours, ahead = run()
    assert sum(reply.usage.accepted_tokens for reply in ours) > 20
    for length, rows in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(rows, ahead[length], strict=True))


@needs_extension
def test_rows_are_told_whole_where_that_was_said(low_bit):
    model, none = low_bit("E2B").model, torch.tensor([], dtype=torch.long)
    hidden_RD = torch.randn(2, model.config.hidden_size)
    assert all(row.likeliest(1, none) for row in Rows(model, hidden_RD).all())
    for row, logits_V in zip(
        Rows(model, hidden_RD, reach=None).all(), model.logits(hidden_RD), strict=True
    ):
        assert row.likeliest(1, none) is None
        assert torch.equal(row.logits_V, logits_V)


@needs_extension
@pytest.mark.parametrize(
    ("changed", "whole"),
    [
        ({}, False),
        ({"temperature": 0.9, "top_k": 30}, False),
        ({"logprobs": 1}, True),
        ({"temperature": 0.7, "top_k": 0}, True),
    ],
)
def test_whole_rows_are_worked_out_only_if_someone_looks_at_them(changed, whole, low_bit):
    lm = low_bit("E2B", speculation="off")
    params = [GREEDY, GREEDY.changed(temperature=0.7, top_k=9, seed=3)]
    params.append(GREEDY.changed(seed=4, **changed))
    asked = [
        Request(prompt=Prompt(random_ids(9, lm.tokenizer.vocab_size, seed=n)), params=each,
                chat=False)
        for n, each in enumerate(params)
    ]  # fmt: skip
    alone = [replies(BatchEngine(lm, SMALL), [request])[0] for request in asked]
    told = []
    with pytest.MonkeyPatch.context() as patch:
        logits = lm.model.logits
        patch.setattr(lm.model, "logits", lambda rows: told.append(len(rows)) or logits(rows))
        together = replies(BatchEngine(lm, SMALL), asked)
    assert bool(told) == whole
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


@needs_extension
def test_guesses_change_nothing_where_memory_is_short(low_bit, monkeypatch):
    plain = low_bit("E4B", speculation="off")
    asked = [replace(request, params=GREEDY.changed(max_tokens=60)) for request in mixed(plain)]
    roomy = BatchEngine(plain, SMALL)
    expected = replies(roomy, asked)
    always(monkeypatch, oracle(asked, expected, 5))
    full, sliding = roomy._block_bytes
    tight = replace(
        SMALL, max_model_len=132, kv_bytes=50 * full + roomy.plan.sliding_blocks * sliding
    )
    engine = BatchEngine(low_bit("E4B"), tight)
    for a, b in zip(replies(engine, asked), expected, strict=True):
        assert same(a, b)
    assert engine.stats().preemptions > 0
    assert engine.stats().accepted_tokens > 0


@needs_extension
def test_a_reply_that_fails_among_its_guesses_takes_no_other_with_it(low_bit, monkeypatch):
    asked = mixed(low_bit("12B"))
    expected = replies(BatchEngine(low_bit("12B", speculation="off"), SMALL), asked)
    always(monkeypatch, oracle(asked, expected, 1000))
    take = Reply.take

    def damaged(self, following):
        if len(self.prompt.ids) == 40 and len(self.token_ids) == 9:
            nan_V = following.logits_V * float("nan")
            following = Next(engine.lm.model, following.hidden_1D, nan_V)
        return take(self, following)

    monkeypatch.setattr(Reply, "take", damaged)
    engine = BatchEngine(low_bit("12B"), SMALL)
    for request, outcome, b in zip(asked, run_all(engine, asked), expected, strict=True):
        if len(request.prompt.ids) == 40:
            assert isinstance(outcome, WeightsError)
        else:
            assert isinstance(outcome, list)
            assert same(collect(outcome), b)
    engine.check()


@needs_extension
def test_a_conversation_goes_on_from_what_was_accepted(low_bit, monkeypatch):
    plain, lm = low_bit("E2B", speculation="off"), low_bit("E2B")
    [first] = mixed(plain)[:1]
    [said] = replies(BatchEngine(plain, SMALL), [first])
    second = replace(
        first, prompt=Prompt([*first.prompt.ids, *said.token_ids, *random_ids(9, 300)])
    )
    [expected] = replies(BatchEngine(plain, SMALL), [second])
    always(monkeypatch, Oracle([*second.prompt.ids, *expected.token_ids], wrong_every=4))
    engine = BatchEngine(lm, SMALL)
    for request, reply in ((first, said), (second, expected)):
        [ours] = run_all(engine, [request])
        assert isinstance(ours, list)
        assert same(collect(ours), reply)
    # All but the last token, which nobody read.
    assert engine.stats().cached_tokens == len(first.prompt.ids) + len(said.token_ids) - 1


def test_thoughts_stops_and_limits_of_a_batch_act_as_without(scripted, monkeypatch):
    said = "<|channel>thought\nabcabcabcabc\n<channel|>one abcabc STOP abc<turn|>"
    changes = (
        {},
        {"stop": ("STOP",)},
        {"max_tokens": 17},
        {"thinking_budget": 4},
        {"thinking_budget": 4, "logprobs": 1},
    )
    found = []
    for speculation in ("off", "on"):
        lm = scripted(said, speculation=speculation)
        prompt = lm.encode([{"role": "user", "content": "Hi"}], enable_thinking=True)
        lm.model.start = len(prompt.ids)
        asked = [Request(prompt=prompt, params=lm.sampling.changed(**each)) for each in changes]
        always(monkeypatch)
        engine = BatchEngine(lm, replace(SMALL, max_num_seqs=5))
        found.append(replies(engine, asked))
        assert (engine.stats().accepted_tokens > 0) == (speculation == "on")
    for a, b in zip(*found, strict=True):
        assert same(a, b)


@needs_extension
def test_calls_of_a_batch_held_to_a_grammar_are_the_same(monkeypatch):
    plain = LM.load("pocket", quant="int4", speculation="off")
    held = {"tools": [NOTE], "tool_choice": "required"}
    asked, expected = [], []
    for n, text in enumerate(("Note that ducks swim, ducks swim, tag one.", "Note: tag two.")):
        messages = [{"role": "user", "content": text}]
        params = SamplingParams(temperature=n, seed=3, max_tokens=80, logprobs=n or None)
        prompt = plain.encode(messages, tools=[NOTE])
        asked.append(Request(prompt=prompt, params=params, follow=plain.follow(**held)))
        expected.append(plain.generate(messages, **held, sampling=params))
    for wrong_every in (1000, 4):
        with pytest.MonkeyPatch.context() as patch:
            always(patch, oracle(asked, expected, wrong_every))
            engine = BatchEngine(LM.load("pocket", quant="int4"), replace(SMALL, max_model_len=900))
            for a, b in zip(replies(engine, asked), expected, strict=True):
                assert same(a, b)
            assert engine.stats().accepted_tokens > 0
