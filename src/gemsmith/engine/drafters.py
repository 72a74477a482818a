"""Who guesses the next tokens of a reply: its grammar, the text before it, or a small model.

A `Text` is a prompt and its reply so far; a `Drafter` guesses how some of them go on. What this is
not: how many guesses are worth verifying is decided in `speculative`, whether they are right by the
reply alone.

Sources: prompt lookup as in github.com/apoorvumang/prompt-lookup-decoding, the index as in LZ77
with hash chains.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gemsmith.engine.context import Next
from gemsmith.engine.reply import Event, Reply
from gemsmith.model.drafter import MTPDrafter, TargetKV
from gemsmith.model.text import TextModel

KEY = 3
"""Tokens that must have come before in the same order; two are alike by chance in any JSON."""
CANDIDATES = 16
"""Earlier places that are compared, the latest first."""
REACH = 64
"""Tokens over which they are compared."""
MTP_REACH = 8
"""Tokens that a model guesses at a time; each takes a step of it."""

FIRST_GUESS = 0.7
"""How likely a guess is right before any was seen."""
MEMORY = 0.08
"""Weight of the latest guess in that likelihood."""


class Index:
    """Where the last tokens of a growing text came before.

    Of the latest such places the one wins that agrees over the most tokens; it is trusted for as
    many tokens as agree. Results of tools, JSON and code come back like this.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}
        """Where the token stands that followed these KEY tokens last."""
        self._before: list[int] = []
        """Of such a place the one before it with the same KEY tokens; -1: none."""
        self.place, self.agreed = -1, 0
        """Where the last guess was taken from (-1: there was none), and over how many tokens before
        it that place agreed with the end of the text."""
        self._length = 0
        """Of the text then."""

    def find(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that followed. From call to call ids only grow."""
        self._add(ids)
        length, tail = len(ids), tuple(ids[-KEY:])
        # A place that went on as guessed may lie further back than the candidates.
        place = self.place + length - self._length
        agreed = _agreement(ids, place) if self.place >= 0 and place < length else 0
        if agreed < KEY:
            place, agreed = -1, KEY - 1
        candidate = self._latest.get(tail, -1)
        for _ in range(CANDIDATES):
            if candidate < 0 or agreed == REACH:
                break
            agrees = _agreement(ids, candidate)
            if agrees > agreed:
                place, agreed = candidate, agrees
            candidate = self._before[candidate]
        self.place, self.agreed, self._length = place, agreed, length
        found: list[int] = []
        for at in range(place, place + min(most, agreed)) if place >= 0 else ():
            # A text that repeats itself goes on beyond its own end.
            found.append(ids[at] if at < length else found[at - length])
        return found

    def _add(self, ids: Sequence[int]) -> None:
        first = len(self._before)
        if first < KEY:
            self._before += [-1] * (min(KEY, len(ids)) - first)
            first = len(self._before)
        new = ids[first - KEY : len(ids) - 1] if first < len(ids) else []
        latest, before = self._latest, self._before
        for place, key in enumerate(zip(*(new[i:] for i in range(KEY)), strict=False), first):
            before.append(latest.get(key, -1))
            latest[key] = place


def _agreement(ids: Sequence[int], place: int) -> int:
    """How many tokens before `place` are those at the end of ids, up to REACH."""
    count, most = 0, min(REACH, place)
    while count < most and ids[place - 1 - count] == ids[-1 - count]:
        count += 1
    return count


@dataclass(slots=True, eq=False)
class Text:
    """A prompt and its reply so far, and what was guessed of the rest."""

    reply: Reply
    past: Any = None
    """Whose K/V are the model's of this text, as `Mtp.kv_of` knows them."""
    read: int = 0
    """Tokens that the model has read."""
    hidden_1D: Tensor | None = None
    """What the model made of the last of these."""
    drafter: "Drafter | None" = None
    """Whose guesses come next."""
    guesses: list[int] = field(default_factory=list)
    """What may follow all of `ids`."""
    drafts: list[int] = field(default_factory=list)
    """Those of them, the first ones, that the next pass verifies."""
    index: Index = field(init=False)
    likelihoods: "dict[Drafter, float]" = field(default_factory=dict)
    _ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.index, self._ids = Index(), list(self.reply.prompt.ids)

    @property
    def ids(self) -> list[int]:
        """Of all tokens; the same list always, not to be changed."""
        self._ids += self.reply.token_ids[len(self._ids) - len(self.reply.prompt.ids) :]
        return self._ids

    def likelihood(self, drafter: "Drafter") -> float:
        """That a guess of this text is right if those before it were."""
        return self.likelihoods.get(drafter, drafter.first_guess)

    def take(self, following: Sequence[Next]) -> tuple[list[Event], int]:
        """Let the reply choose for as long as it chooses the drafts, and the token after them.

        following: what the model says before the first draft and after each. Returns the events,
        and how many drafts are part of the reply now and are followed by another token of it.
        """
        reply, drafts = self.reply, self.drafts
        known, before = len(self.ids), len(reply.token_ids)
        events: list[Event] = []
        accepted = 0
        for row, draft in zip(following, [*drafts, None], strict=True):
            events += reply.take(row)
            if reply.ended or reply.token_ids[-1] != draft:
                break
            accepted += 1
        self.read, self.hidden_1D = known + accepted, following[accepted].hidden_1D
        reply.drafted += len(drafts)
        reply.accepted += accepted
        self._learn(reply.token_ids[before:])
        self.drafter, self.guesses, self.drafts = None, [], []
        return events, accepted

    def _learn(self, token_ids: Sequence[int]) -> None:
        """From the tokens that came where others, or these, were guessed."""
        if self.drafter is None:
            return
        likelihood = self.likelihood(self.drafter)
        # A guess that was not verified has come true or not all the same.
        for guess, token in zip(self.guesses[: max(len(self.drafts), 1)], token_ids, strict=False):
            likelihood += MEMORY * ((guess == token) - likelihood)
            if guess != token:
                break
        self.likelihoods[self.drafter] = likelihood


class Drafter(Protocol):
    """Guesses how texts go on."""

    @property
    def free(self) -> bool:
        """Whether guesses cost nothing: then all are made, and learned from, however few are
        verified."""
        ...

    @property
    def first_guess(self) -> float:
        """How likely a guess is right before any was seen."""
        ...

    def reach(self, text: Text, most: int) -> int:
        """How many tokens to ask of it, at most `most`; 0: it cannot say anything now."""
        ...

    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        """For each text up to so many tokens that may follow all of its ids; fewer, or none, if it
        has no idea."""
        ...


class Forced:
    """Says what the grammar and the thinking budget leave no choice about.

    Mostly such tokens are known without the model (`Reply.knows_next`). What is left for guesses
    are those whose log-probability is asked for.
    """

    free, first_guess = True, 1.0

    def reach(self, text: Text, most: int) -> int:
        return most

    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        return [text.reply.forced()[:n] for text, n in zip(texts, counts, strict=True)]


class Lookup:
    """Guesses what followed the last tokens where they came before: see `Index`."""

    free, first_guess = True, FIRST_GUESS

    def reach(self, text: Text, most: int) -> int:
        return most

    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        return [text.index.find(text.ids, n) for text, n in zip(texts, counts, strict=True)]


class Mtp:
    """Asks the small model that was trained beside the large one, for all texts together.

    Each of its tokens is the likeliest, also where the reply draws: see `speculative`.
    """

    free, first_guess = False, FIRST_GUESS

    def __init__(
        self,
        drafter: MTPDrafter,
        target: TextModel,
        kv_of: Callable[[Sequence[Text]], TargetKV],
    ) -> None:
        """kv_of: finds what the model has stored of texts."""
        self._drafter, self._target, self._kv_of = drafter, target, kv_of

    def reach(self, text: Text, most: int) -> int:
        # It goes on from what the model made of the token before the newest.
        ready = text.hidden_1D is not None and text.read == len(text.ids) - 1
        return min(most, MTP_REACH) if ready else 0

    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        hidden = [text.hidden_1D for text in texts if text.hidden_1D is not None]
        device = hidden[0].device
        draft = self._drafter.propose(
            self._target,
            torch.tensor([text.ids[-1] for text in texts], device=device),
            torch.cat(hidden),
            torch.tensor([text.read for text in texts], device=device),
            self._kv_of(texts),
            max(counts),
        )
        return [ids[:n] for ids, n in zip(draft.ids_BJ.tolist(), counts, strict=True)]
