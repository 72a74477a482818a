"""Choice of the next token from the logits of one position.

Pure functions on logits [V] float32, and `Sampler`, which holds what one request needs between
tokens. Order of the filters as in Transformers: repetition penalty, suppressed ids, temperature,
top-k, top-p, min-p; then one draw.

Candidates are few, and torch takes microseconds to begin anything: from the greatest logits on,
filters are NumPy's.

The draw inverts the cumulative distribution at one uniform number of a CPU generator seeded by the
request. So a reply depends on the seed and the logits alone: not on the device, nor on what else
the process draws. Of equal logits the lowest id comes first, also at the border of top-k.

A sampler that is greedy or has a top-k needs the greatest logits alone, and asks for no others.

Shapes: V vocabulary, C candidates that the filters leave.
Source of the definitions: transformers 5.23 generation/logits_process.py.
"""

from collections.abc import Collection, Sequence
from math import isfinite
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemsmith.engine.request import SamplingParams, TokenLogprob
from gemsmith.errors import WeightsError

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]

AHEAD = 16
"""Uniform numbers drawn together; they are those that would be drawn one by one."""
MAX_REACH = 256
"""Most logits that are asked for by rank; beyond, the whole row."""


class Sees(NamedTuple):
    """The part of a row of logits that a choice may depend on: the greatest."""

    reach: int
    """How many of them."""
    skipped: tuple[int, ...]
    """Ids that are not among them, however great."""
    skipped_n: Tensor
    """The same, as a model takes them."""


class Next(Protocol):
    """What a model says of the next token; see `context.Next`."""

    @property
    def logits_V(self) -> Tensor: ...

    def likeliest(self, count: int, skipped: Tensor) -> tuple[Floats, Ids] | None: ...

    def logits_of(self, ids: Sequence[int]) -> Tensor: ...


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of seen tokens (bool [V])."""
    penalized = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return torch.where(seen_V, penalized, logits_V)


def candidates(
    logits_V: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Floats, Ids]:
    """Probabilities [C] of the tokens that the filters leave, and their ids [C], likeliest first.

    Probabilities are float64 and sum to 1. Without top_k and top_p the order is that of the ids.
    """
    if top_k:
        logits_C, ids_C = map(_array, greatest(logits_V, min(top_k, logits_V.shape[0])))
    else:
        logits_C, ids_C = _array(logits_V), np.arange(logits_V.shape[0])
    probs_C = softmax(logits_C, temperature)
    if top_p < 1 and not top_k:
        probs_C, ids_C = map(_array, _likeliest(torch.from_numpy(probs_C), top_p))
    return kept(probs_C, ids_C, top_p=top_p, min_p=min_p)


def softmax(logits_C: Floats, temperature: float) -> Floats:
    """Probabilities in float64 of float32 logits over a temperature.

    The largest is taken away first: a small temperature must not overflow.
    """
    weights_C = np.exp(((logits_C - logits_C.max()) / temperature).astype(np.float64))
    return weights_C / weights_C.sum()


def kept(probs_C: Floats, ids_C: Ids, *, top_p: float, min_p: float) -> tuple[Floats, Ids]:
    """What top-p and min-p leave of candidates, for top-p the likeliest first."""
    if top_p < 1:
        # A token stays while those before it have not reached the sum; the first always does.
        before = probs_C.cumsum() - probs_C
        stop = max(1, int((before < top_p).sum()))
        probs_C, ids_C = probs_C[:stop], ids_C[:stop]
    if min_p > 0:
        likely = probs_C >= min_p * probs_C.max()
        probs_C, ids_C = probs_C[likely], ids_C[likely]
    return probs_C / probs_C.sum(), ids_C


def greatest(logits_V: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest logits and their ids, [count] each, of equal ones the lowest id first."""
    values, ids = _at_least(logits_V, logits_V.topk(count).values[-1])
    return values[:count], ids[:count]


def _likeliest(probs_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """At least as many of the likeliest tokens as reach the sum, sorted; mostly far fewer than V.

    Sorting a vocabulary of 262144 takes longer than a small model's forward pass.
    """
    count = min(256, probs_V.shape[0])
    probs_C = probs_V.topk(count).values
    while count < probs_V.shape[0] and probs_C.sum() < top_p:
        count = min(16 * count, probs_V.shape[0])
        probs_C = probs_V.topk(count).values
    return _at_least(probs_V, probs_C[-1])


def _at_least(values_V: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Values that are no less, the greatest first, of equal ones the lowest id; and their ids."""
    ids = (values_V >= least).nonzero()[:, 0]
    values, order = values_V[ids].sort(descending=True, stable=True)
    return values, ids[order]


def draw(probs_C: Floats, uniform: float) -> int:
    """Index drawn from probabilities [C] with a uniform number from 0 to 1."""
    sums_C = probs_C.cumsum()
    # side="right" passes over candidates of no probability when the number falls on their border.
    index = int(np.searchsorted(sums_C, uniform * sums_C[-1], side="right"))
    return min(index, len(probs_C) - 1)


def _array(values: Tensor) -> Any:
    return values.numpy(force=True)


def token_logprob(logits_V: Tensor, token_id: int, alternatives: int) -> TokenLogprob:
    """Log-probability of one token and of the likeliest ones, of the logits as they are."""
    logprobs_V = logits_V.log_softmax(0)
    values, ids = logprobs_V.topk(min(alternatives, logits_V.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, logprobs_V[token_id].item(), top)


class Sampler:
    """Chooses the tokens of one request.

    prompt_ids: what the repetition penalty has seen at the start. suppressed: ids never chosen,
    ascending, but where they are among few that are allowed.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        prompt_ids: list[int],
        suppressed: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.params, self._device = params, device
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._uniforms: list[float] = []
        """Numbers drawn ahead, the next one last."""
        self._seen_V: Tensor | None = None
        if params.repetition_penalty != 1:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[torch.tensor(prompt_ids, device=device)] = True
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)
        reach = 1 if params.temperature == 0 else params.top_k
        few = self._seen_V is None and params.logprobs is None and 0 < reach <= MAX_REACH
        self.sees = Sees(reach, suppressed, self._suppressed) if few else None
        """What a choice among all ids may depend on; None: on all logits."""

    def observe(self, token_id: int) -> None:
        """Count a token of the reply, chosen or forced, among the seen ones."""
        if self._seen_V is not None:
            self._seen_V[token_id] = True

    def choose(self, logits_V: Tensor) -> int:
        """The next token.

        Raises:
          WeightsError: logits are not finite.
        """
        return self._choice(logits_V, None)

    def choose_next(self, row: Next, allowed: Collection[int] | None = None) -> int:
        """As `choose` of the row's logits, to the bit; of which no more are asked for than needed.

        allowed: the only ids that may come, where they are few; logits of others are not asked for.

        Raises: as `choose`.
        """
        if allowed is not None:
            ids = sorted(allowed)
            return self._choice(row.logits_of(ids), torch.tensor(ids, device=self._device))
        sees = self.sees
        found = row.likeliest(sees.reach, self._suppressed) if sees else None
        if found is None:
            return self._choice(row.logits_V, None)
        params, (values_C, ids_C) = self.params, found
        if params.temperature == 0:
            return int(ids_C[0])
        probs_C = softmax(values_C, params.temperature)
        return self._drawn(*kept(probs_C, ids_C, top_p=params.top_p, min_p=params.min_p))

    def _drawn(self, probs_C: Floats, ids_C: Ids) -> int:
        if not self._uniforms:
            ahead = torch.rand(AHEAD, dtype=torch.float64, generator=self._generator)
            self._uniforms = ahead.tolist()[::-1]
        return int(ids_C[draw(probs_C, self._uniforms.pop())])

    def _choice(self, logits_C: Tensor, ids_C: Tensor | None) -> int:
        """One of the ids that the logits are of; None: of all."""
        if not isfinite(logits_C.max().item()):
            raise WeightsError(
                "the model's logits are not finite: its weights are damaged, or overflow in "
                "this dtype; check the checkpoint's files, or load with dtype='float32'"
            )
        params = self.params
        if self._seen_V is not None:
            seen_C = self._seen_V if ids_C is None else self._seen_V[ids_C]
            logits_C = penalize_repetition(logits_C, seen_C, params.repetition_penalty)
        if self._suppressed.numel() and ids_C is None:
            logits_C = logits_C.index_fill(0, self._suppressed, float("-inf"))
        if params.temperature == 0:
            at = int(logits_C.argmax())
        else:
            at = self._drawn(
                *candidates(
                    logits_C,
                    temperature=params.temperature,
                    top_k=params.top_k,
                    top_p=params.top_p,
                    min_p=params.min_p,
                )
            )
        return at if ids_C is None else int(ids_C[at])
