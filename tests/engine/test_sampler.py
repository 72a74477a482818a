"""The choice of the next token against slow, obvious definitions and against Transformers."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsmith.engine.request import SamplingParams
from gemsmith.engine.sampler import (
    AHEAD,
    Sampler,
    candidates,
    draw,
    penalize_repetition,
    token_logprob,
)
from gemsmith.errors import WeightsError

VOCAB = 40


@pytest.fixture(scope="module")
def warpers():
    return pytest.importorskip("transformers.generation.logits_process")


def random_logits(seed: int, size: int = VOCAB) -> torch.Tensor:
    return 4 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def slow_candidates(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> dict[int, float]:
    """Probabilities of the tokens that are left, filter after filter, in plain Python."""

    def softmax(scores: dict[int, float]) -> dict[int, float]:
        top = max(scores.values())
        weights = {i: math.exp(s - top) for i, s in scores.items()}
        total = sum(weights.values())
        return {i: w / total for i, w in weights.items()}

    scores = {i: value / temperature for i, value in enumerate(logits)}
    if top_k:
        best = sorted(scores, key=lambda i: -scores[i])[:top_k]
        scores = {i: scores[i] for i in best}
    if top_p < 1:
        probs, kept, total = softmax(scores), [], 0.0
        for i in sorted(probs, key=lambda i: -probs[i]):
            if kept and total >= top_p:
                break
            kept.append(i)
            total += probs[i]
        scores = {i: scores[i] for i in kept}
    if min_p:
        probs = softmax(scores)
        most = max(probs.values())
        scores = {i: scores[i] for i in scores if probs[i] >= min_p * most}
    return softmax(scores)


FILTERS = {
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    "top_k": st.sampled_from([0, 1, 5, VOCAB, 10 * VOCAB]),
    "top_p": st.sampled_from([0.0, 0.4, 0.95, 1.0]),
    "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
}


@settings(deadline=None)
@given(seed=st.integers(0, 1000), **FILTERS)
def test_candidates_equal_the_definition(seed, temperature, top_k, top_p, min_p):
    logits = random_logits(seed)
    probs, ids = candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = slow_candidates(logits.tolist(), temperature, top_k, top_p, min_p)
    assert dict(zip(ids.tolist(), probs.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_over_a_large_vocabulary_equals_the_definition(spread):
    logits = spread * random_logits(3, 9000) / 4
    probs, ids = candidates(logits, temperature=1.0, top_p=0.9)
    expected = slow_candidates(logits.tolist(), 1.0, 0, 0.9, 0.0)
    assert dict(zip(ids.tolist(), probs.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)


@settings(deadline=None)
@given(seed=st.integers(0, 1000), **FILTERS)
def test_candidates_equal_transformers(warpers, seed, temperature, top_k, top_p, min_p):
    logits = random_logits(seed)
    scores = warpers.TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    expected = scores[0].softmax(0)
    probs, ids = candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = torch.zeros(VOCAB, dtype=torch.float64)
    ours[torch.from_numpy(ids)] = torch.from_numpy(probs)
    torch.testing.assert_close(ours.float(), expected, rtol=1e-5, atol=1e-7)


def test_top_k_keeps_exactly_k_of_equal_logits_the_lowest_ids():
    probs, ids = candidates(torch.zeros(10), temperature=1.0, top_k=3)
    assert ids.tolist() == [0, 1, 2]
    assert probs.tolist() == pytest.approx([1 / 3] * 3)
    _, ids = candidates(torch.tensor([1.0, 5.0, 7.0, 5.0, 7.0, 5.0]), temperature=1.0, top_k=4)
    assert ids.tolist() == [2, 4, 1, 3]


def test_top_p_alone_takes_of_equal_logits_the_lowest_ids():
    logits = torch.zeros(1000)
    _, ids = candidates(logits, temperature=1.0, top_p=0.0045)
    assert ids.tolist() == [0, 1, 2, 3, 4]
    logits[5::7] = 9.0
    _, ids = candidates(logits, temperature=1.0, top_p=0.02)
    assert ids.tolist() == [5, 12, 19]


def test_smallest_temperature_takes_the_likeliest_without_overflow():
    probs, ids = candidates(torch.tensor([30.0, -30.0, 29.9]), temperature=1e-6)
    assert dict(zip(ids.tolist(), probs.tolist(), strict=True)) == {0: 1.0, 1: 0.0, 2: 0.0}


@settings(deadline=None)
@given(seed=st.integers(0, 1000), penalty=st.sampled_from([0.5, 1.2, 3.0]))
def test_repetition_penalty_equals_transformers(warpers, seed, penalty):
    logits, prompt = random_logits(seed), [3, 3, 7, seed % VOCAB]
    expected = warpers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt]), logits[None]
    )
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[prompt] = True
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected[0])


def test_repetition_penalty_counts_the_prompt_and_every_observed_token():
    params = SamplingParams(temperature=0, repetition_penalty=10.0)
    sampler = Sampler(params, vocab_size=4, prompt_ids=[1])
    logits = torch.tensor([1.0, 4.0, 3.0, 2.0])
    assert sampler.choose(logits) == 2  # 1 is in the prompt
    sampler.observe(2)
    assert sampler.choose(logits) == 3


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_suppressed_ids_are_never_chosen(temperature):
    sampler = Sampler(
        SamplingParams(temperature=temperature, seed=0),
        vocab_size=3,
        prompt_ids=[],
        suppressed=(2, 0),
    )
    logits = torch.tensor([5.0, -20.0, 9.0])
    assert {sampler.choose(logits) for _ in range(50)} == {1}


def test_greedy_takes_the_likeliest():
    sampler = Sampler(SamplingParams(temperature=0), vocab_size=VOCAB, prompt_ids=[])
    for seed in range(20):
        logits = random_logits(seed)
        assert sampler.choose(logits) == max(range(VOCAB), key=lambda i: logits[i])


def test_draws_have_the_probabilities_asked_for():
    probs = np.array([0.5, 0.0, 0.2, 0.3])
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(1)).tolist()
    counts = Counter(draw(probs, each) for each in uniform)
    assert counts[1] == 0
    for index, prob in enumerate(probs.tolist()):  # four standard deviations
        assert abs(counts[index] / 4000 - prob) <= 4 * math.sqrt(prob * (1 - prob) / 4000)


def test_a_token_of_no_probability_is_not_drawn_at_the_edge_either():
    assert draw(np.array([0.0, 0.0, 1.0]), 0.0) == 2


def test_numbers_drawn_ahead_are_those_drawn_one_by_one():
    sampler = Sampler(SamplingParams(seed=3), vocab_size=VOCAB, prompt_ids=[])
    generator = torch.Generator().manual_seed(3)
    for step in range(2 * AHEAD + 3):
        probs_C, ids_C = candidates(random_logits(step), temperature=1.0)
        uniform = torch.rand(1, dtype=torch.float64, generator=generator).item()
        assert sampler.choose(random_logits(step)) == ids_C[draw(probs_C, uniform)]


def choices(seed: int | None) -> list[int]:
    sampler = Sampler(SamplingParams(seed=seed), vocab_size=VOCAB, prompt_ids=[])
    return [sampler.choose(random_logits(0) / 4) for _ in range(24)]


def test_choices_depend_on_the_seed_alone():
    first = choices(7)
    torch.manual_seed(0)
    torch.rand(1000)
    assert choices(7) == first
    assert choices(8) != first


def test_no_seed_gives_other_choices_each_time_whatever_the_process_seed():
    torch.manual_seed(0)
    first = choices(None)
    torch.manual_seed(0)
    assert choices(None) != first


def test_logprobs_are_of_the_softmax_of_the_logits_as_given():
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0])
    total = sum(math.exp(x) for x in logits.tolist())
    report = token_logprob(logits, 3, 2)
    assert report.token_id == 3
    assert report.logprob == pytest.approx(-math.log(total))
    assert [i for i, _ in report.top] == [1, 2]
    assert [p for _, p in report.top] == pytest.approx([3 - math.log(total), 2 - math.log(total)])
    assert token_logprob(logits, 3, 0).top == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    sampler = Sampler(SamplingParams(temperature=temperature), vocab_size=3, prompt_ids=[])
    with pytest.raises(WeightsError, match="logits are not finite: its weights are damaged"):
        sampler.choose(torch.tensor([0.0, bad, 1.0]))
