"""What each drafter guesses: of the text before, of the grammar, of a small model."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import needs_extension
from tests.engine.conftest import GREEDY, NOTE, always, random_ids, same
from tests.engine.test_speculative import Endless, Fixed

import gemsmith
from gemsmith.engine import speculative
from gemsmith.engine.batching import BatchEngine, EngineConfig, run_all
from gemsmith.engine.context import Context
from gemsmith.engine.drafters import CANDIDATES, KEY, MTP_REACH, REACH, Index, Lookup, Mtp, Text
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.reply import collect
from gemsmith.engine.request import Request
from gemsmith.engine.speculative import Speculation
from gemsmith.errors import ConfigError, GemsmithError
from gemsmith.model.drafter import MTPDrafter
from gemsmith.testing import SIZES, random_drafter, tiny_config
from gemsmith.weights.drafter import save_drafter

# -- what stands in the text -------------------------------------------------------------------


def best_by_rescan(ids: list[int]) -> int:
    """Most tokens that some earlier place shares with the end."""
    most = 0
    for place in range(KEY, len(ids)):
        count = 0
        while count < place and ids[place - 1 - count] == ids[-1 - count]:
            count += 1
        most = max(most, count)
    return min(most, REACH)


@settings(max_examples=200, deadline=None)
@given(
    start=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    parts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=8),
)
def test_the_index_kept_by_the_token_finds_what_a_rescan_finds(start, parts):
    index, ids = Index(), list(start)
    for part in [[], *parts]:
        ids += part
        found, agreed = index.find(ids, 5), best_by_rescan(ids)
        if agreed < KEY:
            assert found == []
            continue
        # What is guessed followed as many of the last tokens somewhere; of many places that end
        # alike only the latest are looked at.
        assert KEY <= index.agreed <= agreed
        assert len(found) == min(5, index.agreed)
        if ids_of(ids) <= CANDIDATES:
            assert index.agreed == agreed
        whole = [*ids, *found]
        place = index.place
        assert whole[place - index.agreed : place] == ids[-index.agreed :]
        assert all(whole[place + i] == guess for i, guess in enumerate(found))


def ids_of(ids: list[int]) -> int:
    """How often the last KEY tokens came before."""
    tail = ids[-KEY:]
    return sum(ids[i : i + KEY] == tail for i in range(len(ids) - KEY))


def test_a_place_that_goes_on_as_guessed_is_followed_past_many_that_look_alike():
    key, story = [7, 8, 9], list(range(100, 140))
    ids = [*story[:10], *key, *story[10:], *[t for n in range(40) for t in (*key, 200 + n)]]
    index = Index()
    ids += story[:10]
    assert index.find(ids, 3) == key
    ids += key
    assert index.find(ids, 3) == story[10:13]


def test_nothing_is_guessed_of_new_text_nor_beyond_what_is_asked():
    index = Index()
    assert index.find([1, 2], 5) == []
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert index.find(ids, 5) == []
    ids += [1, 2, 3]
    assert index.find(ids, 5) == [4, 5, 6]
    assert index.find(ids, 2) == [4, 5]
    ids += [4]
    assert index.find(ids, 9) == [5, 6, 7, 8]


def test_text_that_repeats_itself_is_guessed_beyond_its_own_end():
    assert Index().find([5, 6] * 6, 9) == [5, 6, 5, 6, 5, 6, 5, 6, 5]


# -- what is forced -----------------------------------------------------------------------------


@needs_extension
def test_forced_tokens_whose_probability_is_asked_for_are_read_together(monkeypatch):
    monkeypatch.setattr(Lookup, "propose", lambda self, texts, counts: [[] for _ in texts])
    plain = LM.load("pocket", quant="int4", speculation="off")
    lm = LM.load("pocket", quant="int4")
    asked: dict[str, Any] = {
        "tools": [NOTE],
        "tool_choice": "required",
        "logprobs": 2,
        "max_tokens": 60,
    }
    expected = plain.generate("Note: ducks swim.", **asked, temperature=0)
    lm.generate("Hi", max_tokens=4)  # passes are measured before any is guessed ahead
    ours = lm.generate("Note: ducks swim.", **asked, temperature=0)
    assert same(ours, expected)
    usage = ours.usage
    assert usage.drafted_tokens == usage.accepted_tokens > 5


# -- what a small model says ------------------------------------------------------------------


def with_drafter(low_bit, size: str, **options) -> LM:
    plain = low_bit(size, **options)
    return low_bit(size, **options, drafter=random_drafter(plain.config.text_config))


def from_scratch(lm: LM, ids: list[int], count: int) -> list[int]:
    """What the drafter says of a text that the model reads from its beginning."""
    assert lm.drafter is not None
    context = Context(lm.model)
    hidden_1D = context.step(ids[:-1]).hidden_1D
    newest, at = torch.tensor(ids[-1:]), torch.tensor([len(ids) - 1])
    draft = lm.drafter.propose(lm.model, newest, hidden_1D, at, context.kv, count)
    return draft.ids_BJ[0].tolist()


@needs_extension
@pytest.mark.parametrize("size", SIZES)
def test_a_small_model_guesses_from_what_the_large_one_has_read(size, low_bit, monkeypatch):
    always(monkeypatch)
    lm, propose, seen = with_drafter(low_bit, size), Mtp.propose, []

    def checked(self, texts, counts):
        found = propose(self, texts, counts)
        for text, count, ids in zip(texts, counts, found, strict=True):
            alike = [a == b for a, b in zip(ids, from_scratch(lm, text.ids, count), strict=True)]
            # Several texts together round otherwise, which the last of many steps may show.
            assert all(alike[:4])
            seen.append((len(texts), count))
        return found

    monkeypatch.setattr(Mtp, "propose", checked)
    prompts = [random_ids(n, lm.tokenizer.vocab_size, seed=n) for n in (21, 1, 40)]
    params = GREEDY.changed(max_tokens=20)
    plain = low_bit(size, speculation="off")
    expected = [plain.complete(ids, sampling=params) for ids in prompts]
    ours = [lm.complete(ids, sampling=params) for ids in prompts]
    engine = BatchEngine(lm, EngineConfig(max_num_seqs=3, max_model_len=200, block_tokens=4))
    asked = [Request(prompt=Prompt(ids), params=params, chat=False) for ids in prompts]
    for outcome, alone, plainly in zip(run_all(engine, asked), ours, expected, strict=True):
        assert isinstance(outcome, list)
        assert same(collect(outcome), plainly)
        assert same(alone, plainly)
        assert alone.usage.drafted_tokens > 0
    assert {texts for texts, _ in seen} >= {1, 3}
    assert max(count for _, count in seen) == MTP_REACH


class Slow:
    """Guesses right ones only, for a while a step on a clock of its own."""

    free, first_guess = False, 0.7

    def __init__(self, step_s: float) -> None:
        self.step_s, self.now, self.steps = step_s, 0.0, 0

    def reach(self, text, most):
        return min(most, 8)

    def propose(self, texts, counts):
        self.steps += max(counts)
        self.now += self.step_s * max(counts)
        return [[text.ids[-1] + 1 + i for i in range(n)] for text, n in
                zip(texts, counts, strict=True)]  # fmt: skip


@pytest.mark.parametrize(("step_s", "at_most"), [(0.02, 0.4), (0.3, 1.0), (2.0, 1.06)])
def test_a_small_model_is_asked_only_while_its_own_time_pays(step_s, at_most, monkeypatch):
    monkeypatch.setattr(Lookup, "propose", lambda self, texts, counts: [[] for _ in texts])
    slow = Slow(step_s)
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=lambda: slow.now))
    ahead, row = Speculation(slow), Fixed(torch.zeros(1))
    text = Text(Endless(0.9, random.Random(0)))  # pyright: ignore
    while len(text.ids) < 3000:
        ahead.propose([text], 1)
        rows = 1 + len(text.drafts)
        text.take([row] * rows)
        took = 1 + 0.02 * rows
        ahead.observe(rows, took)
        slow.now += took
    assert slow.now < at_most * 1.02 * 3000
    assert slow.steps > 0


@needs_extension
def test_a_drafter_is_loaded_beside_its_model_and_another_models_is_refused(tmp_path):
    text = LM.load("pocket").config.text_config
    save_drafter(random_drafter(text), tmp_path / "ours")
    lm = gemsmith.load("pocket", quant="int4", drafter=tmp_path / "ours")
    assert lm.speculates
    assert isinstance(lm.drafter, MTPDrafter)
    alone = gemsmith.load("pocket", quant="int4")
    more = sum(p.nbytes for p in (*lm.drafter.parameters(), *lm.drafter.buffers()))
    assert lm.memory()["weights"] == alone.memory()["weights"] + more
    asked: dict[str, Any] = {"prompt": "What is 3 + 4?", "temperature": 0, "max_tokens": 30}
    assert lm.generate(**asked).text == alone.generate(**asked).text
    save_drafter(random_drafter(tiny_config("31B").text_config), tmp_path / "another")
    for folder, message in (
        ("another", "the drafter's backbone_hidden_size is .*it is another model's"),
        ("absent", "absent"),
    ):
        with pytest.raises(GemsmithError, match=message):
            gemsmith.load("pocket", drafter=tmp_path / folder)
    with pytest.raises(ConfigError, match="model_type is 'gemma4'; drafters are"):
        gemsmith.load("pocket", drafter="pocket")
    with pytest.raises(ConfigError, match="speculation 'off' leaves nothing to do for a drafter"):
        gemsmith.load("pocket", drafter=tmp_path / "ours", speculation="off")
