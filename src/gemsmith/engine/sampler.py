"""Choice of the next token from the logits of one position.

Pure functions on logits [V] float32, and `Sampler`, which holds what one request needs between
tokens. Order of the filters as in Transformers: repetition penalty, suppressed ids, temperature,
top-k, top-p, min-p; then one draw.

The draw inverts the cumulative distribution at one uniform number of a CPU generator seeded by the
request. So a reply depends on the seed and the logits alone: not on the device, nor on what else
the process draws. Where logits tie at the border of top-k, exactly k tokens are kept.

Shapes: V vocabulary, C candidates that the filters leave.
Source of the definitions: transformers 5.23 generation/logits_process.py.
"""

import torch
from torch import Tensor

from gemsmith.engine.request import SamplingParams, TokenLogprob
from gemsmith.errors import WeightsError


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of seen tokens (bool [V])."""
    penalized = torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty)
    return torch.where(seen_V, penalized, logits_V)


def candidates(
    logits_V: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Token ids [C] that the filters leave, likeliest first, and their probabilities [C].

    Probabilities are float64 and sum to 1. Without top_k and top_p the order is that of the ids.
    """
    # The largest is taken away first: a small temperature must not overflow.
    scores = (logits_V - logits_V.max()) / temperature
    if top_k:
        scores, ids = scores.topk(min(top_k, scores.shape[0]))
        probs_C = scores.double().softmax(0)
    elif top_p < 1:
        probs_C, ids = _likeliest(scores.double().softmax(0), top_p)
    else:
        probs_C, ids = scores.double().softmax(0), torch.arange(len(scores), device=scores.device)
    if top_p < 1:
        # A token stays while those before it have not reached the sum; the first always does.
        before = probs_C.cumsum(0) - probs_C
        kept = max(1, int((before < top_p).sum()))
        probs_C, ids = probs_C[:kept], ids[:kept]
    if min_p > 0:
        likely = probs_C >= min_p * probs_C.max()
        probs_C, ids = probs_C[likely], ids[likely]
    return ids, probs_C / probs_C.sum()


def _likeliest(probs_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """At least as many of the likeliest tokens as reach the sum, sorted; mostly far fewer than V.

    Sorting a vocabulary of 262144 takes longer than a small model's forward pass.
    """
    count = min(256, probs_V.shape[0])
    probs_C, ids_C = probs_V.topk(count)
    while count < probs_V.shape[0] and probs_C.sum() < top_p:
        count = min(16 * count, probs_V.shape[0])
        probs_C, ids_C = probs_V.topk(count)
    return probs_C, ids_C


def draw(probs_C: Tensor, generator: torch.Generator) -> int:
    """Index drawn from probabilities [C] with one float64 uniform number of a CPU generator."""
    sums_C = probs_C.cumsum(0)
    uniform = torch.rand(1, dtype=torch.float64, generator=generator).to(sums_C.device)
    # right=True passes over candidates of no probability when the number falls on their border.
    index = torch.searchsorted(sums_C, uniform * sums_C[-1], right=True)
    return min(int(index), probs_C.shape[0] - 1)


def token_logprob(logits_V: Tensor, token_id: int, alternatives: int) -> TokenLogprob:
    """Log-probability of one token and of the likeliest ones, of the logits as they are."""
    logprobs_V = logits_V.log_softmax(0)
    values, ids = logprobs_V.topk(min(alternatives, logits_V.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, logprobs_V[token_id].item(), top)


class Sampler:
    """Chooses the tokens of one request.

    prompt_ids: what the repetition penalty has seen at the start. suppressed: ids never chosen.
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
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen_V: Tensor | None = None
        if params.repetition_penalty != 1:
            self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen_V[torch.tensor(prompt_ids, device=device)] = True
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=device)

    def observe(self, token_id: int) -> None:
        """Count a token of the reply, chosen or forced, among the seen ones."""
        if self._seen_V is not None:
            self._seen_V[token_id] = True

    def choose(self, logits_V: Tensor) -> int:
        """The next token.

        Raises:
          WeightsError: logits are not finite.
        """
        if not torch.isfinite(logits_V.max()):
            raise WeightsError(
                "the model's logits are not finite: its weights are damaged, or overflow in "
                "this dtype; check the checkpoint's files, or load with dtype='float32'"
            )
        params = self.params
        if self._seen_V is not None:
            logits_V = penalize_repetition(logits_V, self._seen_V, params.repetition_penalty)
        if self._suppressed.numel():
            logits_V = logits_V.index_fill(0, self._suppressed, float("-inf"))
        if params.temperature == 0:
            return int(logits_V.argmax())
        ids_C, probs_C = candidates(
            logits_V,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        return int(ids_C[draw(probs_C, self._generator)])
