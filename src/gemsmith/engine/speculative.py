"""Speculation: guesses of the tokens to come, verified together in one pass of the model.

A `Drafter` guesses, `Speculation` decides how many guesses are worth their rows, `accept` lets the
reply choose its tokens one after the other for as long as the guesses are what it chooses. So the
reply is the judge, with everything that acts on a choice (grammar, thinking budget, penalties, stop
strings, log-probabilities), and a guess changes nothing but the time. This is rejection sampling
for a drafter that puts all its probability on one token: x stays with probability p(x), and what
comes in its place is drawn from p without x. As the number drawn for a token is the same with a
guess as without, a seed gives the same reply too, wherever a row of a pass has the same bits as the
token alone has: low-bit weights on the CPU (`weights.fuse.same_bits_in_any_pass`). Of floats a near
tie may fall otherwise, as it may between two sizes of prompt chunks.

What this is not: tokens that the grammar leaves no choice about are no guesses, see `Reply`; no
model drafts here, and nothing is known of a cache, so that any engine may use it.

Sources: prompt lookup as in github.com/apoorvumang/prompt-lookup-decoding, the index as in LZ77
with hash chains; rejection: Leviathan et al. 2023, arXiv 2211.17192.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from gemsmith.engine.context import Next
from gemsmith.engine.reply import Event, Reply

KEY = 3
"""Tokens that must have come before in the same order; two are alike by chance in any JSON."""
CANDIDATES = 16
"""Earlier places that are compared, the latest first."""
REACH = 64
"""Tokens over which they are compared."""
MAX_DRAFTS = 15
"""With the token before them 16 rows, up to which a pass of low-bit weights is bound by memory."""

GAIN = 1.05
"""Speculation must promise so much more speed: less is lost in what cannot be measured."""
SAMPLES = 9
"""Passes of a size whose median counts as its cost; other programs disturb single ones."""
PATIENCE = 64
"""Guesses not verified because they would lose, after which one is: costs change with time."""
FIRST_GUESS = 0.7
"""How likely a guess is right before any was seen."""
MEMORY = 0.08
"""Weight of the latest guess in that likelihood."""


class Drafter(Protocol):
    """Guesses how one text goes on."""

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens that may follow all of `ids`, prompt and reply; none if it has no
        idea. From call to call ids only grow."""
        ...


class Lookup:
    """Guesses what followed the last tokens where they came before, in the prompt or the reply.

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

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        self._index(ids)
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
        drafts: list[int] = []
        for at in range(place, place + min(most, agreed)) if place >= 0 else ():
            # A text that repeats itself goes on beyond its own end.
            drafts.append(ids[at] if at < length else drafts[at - length])
        return drafts

    def _index(self, ids: Sequence[int]) -> None:
        for place in range(len(self._before), len(ids)):
            before = -1
            if place >= KEY:
                key = tuple(ids[place - KEY : place])
                before = self._latest.get(key, -1)
                self._latest[key] = place
            self._before.append(before)


def _agreement(ids: Sequence[int], place: int) -> int:
    """How many tokens before `place` are those at the end of ids, up to REACH."""
    count, most = 0, min(REACH, place)
    while count < most and ids[place - 1 - count] == ids[-1 - count]:
        count += 1
    return count


class Costs:
    """Seconds that passes over so many rows take on one model, as measured lately."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self.declined = 0
        """Times in a row that guesses were not worth their rows."""

    def add(self, rows: int, seconds: float) -> None:
        size = _size(rows)
        samples = self._samples.setdefault(size, deque(maxlen=SAMPLES))
        samples.append(seconds)
        self._medians[size] = statistics.median(samples)

    def of(self, rows: int) -> float | None:
        """As the next smaller size that was measured, where this one never was: so it will be."""
        known = [size for size in self._medians if size <= _size(rows)]
        return self._medians[max(known)] if known else None


def _size(rows: int) -> int:
    """Passes of about as many rows are counted together: 1, 2, 3-4, 5-8, ..."""
    return (rows - 1).bit_length()


class Speculation:
    """How far one reply is guessed ahead, from how often guesses were right and what rows cost."""

    def __init__(self, drafter: Drafter, costs: Costs) -> None:
        """costs: of the model, shared by its replies."""
        self.likelihood = FIRST_GUESS
        """That a guess is right if those before it were."""
        self._drafter, self._costs = drafter, costs
        self._guessed: list[int] = []

    def propose(self, reply: Reply, ids: Sequence[int], unread: int) -> list[int]:
        """The guesses to verify in the next pass, which runs over `unread` tokens anyway.

        ids: of prompt and reply so far.
        """
        # The last token of a reply is chosen and never read.
        most = min(MAX_DRAFTS, reply.max_tokens - len(reply.token_ids) - 1)
        found = self._drafter.propose(ids, most) if most > 0 else []
        self._guessed = found[: reply.fitting(found)]
        return self._guessed[: self._depth(unread, len(self._guessed))]

    def observe(self, token_ids: Sequence[int], rows: int, drafted: int, seconds: float) -> None:
        """Learn from a pass: the tokens chosen after it, its rows, guesses among them, its time."""
        self._costs.add(rows, seconds)
        # A guess that was not verified has come true or not all the same.
        for guess, token in zip(self._guessed[: max(drafted, 1)], token_ids, strict=False):
            self.likelihood += MEMORY * ((guess == token) - self.likelihood)
            if guess != token:
                break

    def _depth(self, unread: int, most: int) -> int:
        costs, plain = self._costs, self._costs.of(unread)
        if not most or plain is None:
            return 0
        best, best_rate, tokens, chance = 0, 0.0, 1.0, 1.0
        for depth in range(1, most + 1):
            chance *= self.likelihood
            tokens += chance
            rate = tokens / (costs.of(unread + depth) or plain)
            if rate >= best_rate:
                best, best_rate = depth, rate
        if best_rate * plain < GAIN and costs.declined < PATIENCE:
            costs.declined += 1
            return 0
        costs.declined = 0
        return best


def accept(
    reply: Reply, following: Sequence[Next], drafts: Sequence[int]
) -> tuple[list[Event], int]:
    """Let the reply choose for as long as it chooses the drafts, and the token after them.

    following: what the model says before the first draft and after each. Returns the events, and
    how many drafts are part of the reply now and are followed by another token of it.
    """
    events: list[Event] = []
    accepted = 0
    for row, draft in zip(following, [*drafts, None], strict=True):
        events += reply.take(row)
        if reply.ended or reply.token_ids[-1] != draft:
            break
        accepted += 1
    reply.drafted += len(drafts)
    reply.accepted += accepted
    return events, accepted
