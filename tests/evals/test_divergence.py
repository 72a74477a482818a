"""Figures of two distributions, against ones worked out by hand."""

import math

import numpy as np
import pytest
import torch

from gemsmith.errors import WeightsError
from gemsmith.evals.divergence import Divergence, Mean, Positions, at_positions
from gemsmith.evals.scoring import wilson

LN2 = math.log(2)


def logits(*rows: tuple[float, ...]) -> torch.Tensor:
    """Logits of which these are the probabilities, moved by a constant as a model may."""
    return torch.tensor(rows).log() + 3.0


def positions(kl: list[float], same: list[bool] | None = None) -> Positions:
    n = len(kl)
    agree = np.array([True] * n if same is None else same)
    return Positions(np.array(kl), agree, np.ones(n, bool), np.zeros(n), np.zeros(n))


def divergence(*texts: Positions) -> Divergence:
    made = Divergence.of(texts)
    assert made is not None
    return made


def test_kl_ranks_and_log_probabilities_are_those_worked_out_by_hand() -> None:
    p = logits((1 / 2, 1 / 4, 1 / 4), (1 / 8, 3 / 4, 1 / 8))
    q = logits((1 / 4, 1 / 4, 1 / 2), (1 / 4, 1 / 2, 1 / 4))
    made = at_positions(p, q, torch.tensor([1, 0]))
    first = 0.5 * LN2 - 0.25 * LN2
    second = -0.25 * LN2 + 0.75 * math.log(1.5)
    assert made.kl == pytest.approx([first, second], rel=1e-6)
    assert made.same.tolist() == [False, True]
    assert made.in_top.tolist() == [True, True]
    assert np.exp(made.log_p) == pytest.approx([1 / 4, 1 / 8], rel=1e-6)
    assert np.exp(made.log_q) == pytest.approx([1 / 4, 1 / 4], rel=1e-6)


@pytest.mark.parametrize(("rank", "inside"), [(1, True), (5, True), (6, False)])
def test_the_reference_s_best_is_looked_for_among_five(rank: int, inside: bool) -> None:
    p = torch.zeros(1, 8)
    p[0, 7] = 1
    q = torch.arange(8, dtype=torch.float32)[None]
    q[0, 7] = 7 - rank + 0.5  # between the tokens that are 6, 5, 4 ...
    assert at_positions(p, q, torch.tensor([0])).in_top.tolist() == [inside]


def test_equal_logits_differ_by_nothing_at_all() -> None:
    p = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)) * 8
    targets = torch.arange(40)
    made = divergence(at_positions(p, p.clone(), targets), at_positions(p, p, targets))
    assert made.identical
    assert (made.kl.value, made.kl.error, made.kl_max, made.rms_change) == (0, 0, 0, 0)
    assert (made.ratio, made.ratio_interval) == (1, (1, 1))
    assert made.top1 == 1
    assert made.top1_interval == wilson(80, 80)


def test_a_difference_that_float32_would_lose_is_seen() -> None:
    p = torch.full((1, 4), 20.0, dtype=torch.float64)
    q = p.clone()
    q[0, 0] += 1e-4
    made = at_positions(p, q, torch.tensor([0]))
    assert made.kl[0] == pytest.approx(0.25 * 0.75 * 1e-8 / 2, rel=1e-3)


@pytest.mark.parametrize(("at", "whose"), [(0, "the reference"), (1, "the build under test")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(at: int, whose: str, value: float) -> None:
    both = [torch.zeros(2, 3), torch.zeros(2, 3)]
    both[at][1, 2] = value
    with pytest.raises(WeightsError, match=f"{whose} gives logits that are no finite numbers"):
        at_positions(both[0], both[1], torch.tensor([0, 0]))


def test_percentiles_are_of_all_positions_together() -> None:
    kl = [float(n) for n in range(1001)]
    made = divergence(positions(kl[::2]), positions(kl[1::2]))
    assert (made.kl_median, made.kl_90, made.kl_99, made.kl_999) == (500, 900, 990, 999)
    assert (made.kl.value, made.kl_max) == (500, 1000)
    assert (made.texts, made.positions) == (2, 1001)


def test_perplexities_and_changes_of_probability_are_those_worked_out_by_hand() -> None:
    text = Positions(
        np.zeros(2),
        np.ones(2, bool),
        np.ones(2, bool),
        np.log([1 / 2, 1 / 8]),
        np.log([1 / 4, 1 / 16]),
    )
    made = divergence(text)
    assert (made.perplexity_p, made.perplexity_q) == pytest.approx((4, 8))
    assert made.ratio == pytest.approx(2)
    assert made.ratio_interval is None
    assert made.mean_change == pytest.approx(-(1 / 4 + 1 / 16) / 2)
    assert made.rms_change == pytest.approx(math.sqrt((1 / 16 + 1 / 256) / 2))


def test_the_error_of_a_mean_is_that_of_texts_and_not_of_positions() -> None:
    mean = Mean.of(np.array([0.0, 4.0]), np.array([1.0, 3.0]))
    # Residuals -1 and 1; their squares times 2 / (2 - 1), the root over 4 positions.
    assert (mean.value, mean.error) == (1, 0.5)
    assert mean.interval == pytest.approx((1 - 0.979982, 1 + 0.979982))
    assert Mean.of(np.array([3.0]), np.array([2.0])) == Mean(1.5, None)
    # Every position twice in its text: nothing new is known.
    twice = Mean.of(np.array([0.0, 8.0]), np.array([2.0, 6.0]))
    assert twice == mean


def test_top1_is_less_certain_where_errors_stand_together() -> None:
    spread = [positions([0.0] * 10, [False] + [True] * 9) for _ in range(10)]
    together = [positions([0.0] * 10, [n > 0] * 10) for n in range(10)]
    a, b = divergence(*spread), divergence(*together)
    assert a.top1 == b.top1 == 0.9
    assert a.top1_interval == wilson(90, 100)
    # The standard error is sqrt(10 / 9 * (81 + 9)) / 100 = 0.1, that of 9 positions.
    assert b.top1_interval == pytest.approx(wilson(8.1, 9))


def test_nothing_to_compare_is_none_and_empty_texts_do_not_count() -> None:
    assert Divergence.of([]) is None
    assert Divergence.of([positions([])]) is None
    made = divergence(positions([]), positions([1.0]))
    assert (made.texts, made.positions) == (1, 1)


def test_a_dictionary_has_no_value_that_json_lacks() -> None:
    text = positions([0.5])
    text.log_q[0] = -1000.0
    made = divergence(text).to_dict()
    assert made["perplexity"] == {
        "reference": 1.0,
        "build": None,
        "ratio": None,
        "ratio_interval95": None,
    }
    assert made["kl"] == {
        "mean": 0.5,
        "standard_error": None,
        "median": 0.5,
        "p90": 0.5,
        "p99": 0.5,
        "p99.9": 0.5,
        "max": 0.5,
    }
