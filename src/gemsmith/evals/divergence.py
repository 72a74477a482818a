"""How far the next-token distributions of one build are from those of another.

`at_positions` takes the logits of both and keeps five numbers a position; `Divergence` sums them
up. What the positions are is said in fidelity.py; no model runs here.

Per position, p being the reference's distribution, q the build's, x the token that stands there:
  KL          sum p log(p / q), in nats: what a reader who counts on p loses on q
  top-1       both have the same likeliest token: greedy decoding goes on alike
  in top 5    the reference's likeliest token is among the build's five
  log p(x), log q(x)   of which come the perplexities, and the change of the probability of x

Positions of one text are not independent of each other, texts are: standard errors are those of a
ratio of sums over texts (linearized), not those of as many coin tosses as there are positions.
Intervals are 95 %. Wilson's of top-1 is taken as if there were as few positions as have the same
error, so that 100 % of few is not certain.

Shapes: R positions, V vocabulary.
Sources: the figures are those of llama.cpp's `llama-perplexity --kl-divergence`; W. G. Cochran,
Sampling Techniques (1977), sections 6.4 (ratios) and 9.5 (clusters); L. Kish, Survey Sampling
(1965), section 8.2 (design effect).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.evals.scoring import wilson

TOP = 5
Z = 1.959964
"""Standard errors on either side of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Some positions of one text; every array is [R]."""

    kl: np.ndarray
    """float64, at least 0."""
    same: np.ndarray
    """bool: the likeliest token is the same."""
    in_top: np.ndarray
    """bool: the reference's likeliest token is among the build's TOP."""
    log_p: np.ndarray
    """float64: log-probability that the reference gives the token that stands there."""
    log_q: np.ndarray
    """float64: the same of the build."""

    def __len__(self) -> int:
        return len(self.kl)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Parts (at least one), one after the other."""
        return cls(*map(np.concatenate, zip(*(part.arrays for part in parts), strict=True)))

    def only(self, which: np.ndarray) -> Self:
        """Those at which the bools [R] are True."""
        return type(self)(*(array[which] for array in self.arrays))

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.kl, self.same, self.in_top, self.log_p, self.log_q


def at_positions(p_RV: Tensor, q_RV: Tensor, targets_R: Tensor) -> Positions:
    """Compare logits [R, V] of the reference and the build, where targets_R are what stands there.

    Computed in float64, so that equal logits give 0 and what float32 rounds away is still seen.

    Raises:
      WeightsError: logits that are no finite numbers; says whose.
    """
    for logits, whose in ((p_RV, "the reference"), (q_RV, "the build under test")):
        if not torch.isfinite(logits).all():
            raise WeightsError(f"{whose} gives logits that are no finite numbers; it is damaged")
    best_R1 = p_RV.argmax(-1, keepdim=True)
    same_R = best_R1[:, 0] == q_RV.argmax(-1)
    in_top_R = (q_RV > q_RV.gather(-1, best_R1)).sum(-1) < TOP
    log_p_RV, log_q_RV = (logits.double().log_softmax(-1) for logits in (p_RV, q_RV))
    at_R1 = targets_R[:, None]
    log_p_R, log_q_R = (logs.gather(-1, at_R1)[:, 0] for logs in (log_p_RV, log_q_RV))
    # In place: at a vocabulary of 262144 each of these is 2 MiB a position.
    kl_R = log_q_RV.neg_().add_(log_p_RV).mul_(log_p_RV.exp_()).sum(-1).clamp_(min=0)
    arrays = (t.cpu().numpy() for t in (kl_R, same_R, in_top_R, log_p_R, log_q_R))
    return Positions(*arrays)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over positions; `error` is its standard error, None where it cannot be told."""

    value: float
    error: float | None

    @classmethod
    def of(cls, sums: np.ndarray, counts: np.ndarray) -> Self:
        """Of texts with these sums over these numbers (at least one) of positions."""
        value = float(sums.sum() / counts.sum())
        texts = len(sums)
        if texts < 2:
            return cls(value, None)
        squares = float(((sums - value * counts) ** 2).sum()) * texts / (texts - 1)
        return cls(value, math.sqrt(squares) / float(counts.sum()))

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.error is None:
            return None
        return self.value - Z * self.error, self.value + Z * self.error


@dataclass(frozen=True, slots=True)
class Divergence:
    """Over `positions` (at least one) of `texts` texts. Probabilities are of 1, KL in nats."""

    texts: int
    positions: int
    top1: float
    top1_interval: tuple[float, float]
    in_top: float
    kl: Mean
    kl_median: float
    kl_90: float
    kl_99: float
    kl_999: float
    kl_max: float
    rms_change: float
    """Root mean square of q(x) - p(x)."""
    mean_change: float
    perplexity_p: float
    perplexity_q: float
    log_ratio: Mean
    """Of the perplexities, build over reference: mean of log p(x) - log q(x)."""

    @classmethod
    def of(cls, texts: Iterable[Positions]) -> Self | None:
        """None where there is no position."""
        texts = [text for text in texts if len(text)]
        if not texts:
            return None
        every = Positions.join(texts)
        counts = np.array([len(text) for text in texts], float)

        def mean(values: Iterable[np.ndarray]) -> Mean:
            return Mean.of(np.array([value.sum() for value in values]), counts)

        same = mean(text.same for text in texts)
        quantiles = np.quantile(every.kl, (0.5, 0.9, 0.99, 0.999))
        change = np.exp(every.log_q) - np.exp(every.log_p)
        return cls(
            texts=len(texts),
            positions=len(every),
            top1=same.value,
            top1_interval=_proportion(same, len(every)),
            in_top=float(every.in_top.mean()),
            kl=mean(text.kl for text in texts),
            kl_median=float(quantiles[0]),
            kl_90=float(quantiles[1]),
            kl_99=float(quantiles[2]),
            kl_999=float(quantiles[3]),
            kl_max=float(every.kl.max()),
            rms_change=float(np.sqrt((change**2).mean())),
            mean_change=float(change.mean()),
            perplexity_p=_exp(-float(every.log_p.mean())),
            perplexity_q=_exp(-float(every.log_q.mean())),
            log_ratio=mean(text.log_p - text.log_q for text in texts),
        )

    @property
    def identical(self) -> bool:
        """Not one of the distributions differs."""
        return self.kl_max == 0 and self.top1 == 1

    @property
    def ratio(self) -> float:
        """Perplexity of the build over that of the reference."""
        return _exp(self.log_ratio.value)

    @property
    def ratio_interval(self) -> tuple[float, float] | None:
        interval = self.log_ratio.interval
        return None if interval is None else (_exp(interval[0]), _exp(interval[1]))

    def to_dict(self) -> dict[str, Any]:
        """For programs. What is infinite or cannot be told is None."""
        return {
            "texts": self.texts,
            "positions": self.positions,
            "top1": self.top1,
            "top1_interval95": list(self.top1_interval),
            f"in_top{TOP}": self.in_top,
            "kl": {
                "mean": self.kl.value,
                "standard_error": self.kl.error,
                "median": self.kl_median,
                "p90": self.kl_90,
                "p99": self.kl_99,
                "p99.9": self.kl_999,
                "max": self.kl_max,
            },
            "rms_probability_change": self.rms_change,
            "mean_probability_change": self.mean_change,
            "perplexity": {
                "reference": _finite(self.perplexity_p),
                "build": _finite(self.perplexity_q),
                "ratio": _finite(self.ratio),
                "ratio_interval95": None
                if self.ratio_interval is None
                else [_finite(end) for end in self.ratio_interval],
            },
        }


def _proportion(share: Mean, count: int) -> tuple[float, float]:
    """Wilson's interval for as many independent positions as have the standard error of `share`."""
    spread = share.value * (1 - share.value)
    if share.error and spread:
        count_alike = spread / share.error**2
        effective = min(float(count), count_alike)
    else:
        effective = float(count)
    return wilson(share.value * effective, effective)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
