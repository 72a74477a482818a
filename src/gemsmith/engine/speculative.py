"""Speculation: guesses of the tokens to come, verified together in one pass of the model.

Drafters guess (see `drafters`: what the grammar forces, what was said before, what a small model
says), `Speculation` decides how many guesses of which replies are worth their rows, and each reply
chooses its tokens one after the other for as long as the guesses are what it chooses. So the reply
is the judge, with everything that acts on a choice (grammar, thinking budget, penalties, stop
strings, log-probabilities), and a guess changes nothing but the time. This is rejection sampling
for a drafter that puts all its probability on one token: x stays with probability p(x), and what
comes in its place is drawn from p without x. As the number drawn for a token is the same with a
guess as without, a seed gives the same reply too, wherever a row of a pass has the same bits as the
token alone has: low-bit weights on the CPU (`weights.fuse.same_bits_in_any_pass`). Of floats a near
tie may fall otherwise, as it may between two sizes of prompt chunks.

What this is not: nothing is known of a cache or of steps, so that any engine may use it. Tokens
that the grammar leaves no choice about are no guesses but where their log-probabilities are asked
for, see `Reply`.

Source of the rejection: Leviathan et al. 2023, arXiv 2211.17192.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from gemsmith.engine.drafters import Drafter, Forced, Lookup, Text
from gemsmith.errors import ConfigError

MAX_DRAFTS = 15
"""Of one reply: with the token before them 16 rows, up to which a pass of low-bit weights is bound
by memory."""
MAX_TOGETHER = 64
"""Of all replies of a pass: each has a row of logits, a megabyte."""

GAIN = 1.05
"""Speculation must promise so much more speed: less is lost in what cannot be measured."""
SAMPLES = 9
"""Passes of a size whose median counts as its cost; other programs disturb single ones."""
PATIENCE = 64
"""Passes whose guesses were not verified because they would lose, after which some are: one that
was measured may have been disturbed."""
STALE = 512
"""Passes after which what larger ones cost is forgotten, so that they are tried: costs change."""


def check_speculation(name: str, drafter: object) -> None:
    """Check the `speculation` and the drafter that somebody asks for, see `LM.load`.

    Raises:
      ConfigError: an unknown name, or a drafter (anything but None) with nothing to do.
    """
    if name not in ("auto", "on", "off"):
        raise ConfigError(f"speculation {name!r}: must be auto, on or off")
    if name == "off" and drafter is not None:
        raise ConfigError("speculation 'off' leaves nothing to do for a drafter: drop one of them")


class Costs:
    """Seconds that passes over so many rows take on one model, as measured lately."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._added, self._latest = 0, dict[int, int]()
        """Passes measured, and which of them was the latest of a size."""
        self._points: dict[int, tuple[float, float]] = {}
        """Rows and seconds of each size's median, the smallest size first."""

    def add(self, rows: int, seconds: float) -> None:
        # Passes of about as many rows are counted together: 1, 2, 3-4, 5-8, ...
        size = (rows - 1).bit_length()
        samples = self._samples.setdefault(size, deque(maxlen=SAMPLES))
        samples.append((rows, seconds))
        each, took = zip(*samples, strict=True)
        if size not in self._points:
            self._points = dict(sorted([*self._points.items(), (size, (0.0, 0.0))]))
        self._points[size] = statistics.median(each), statistics.median(took)
        self._added += 1
        self._latest[size] = self._added
        for other, latest in list(self._latest.items()):
            if other > size and self._added - latest > STALE:
                del self._samples[other], self._latest[other], self._points[other]

    def of(self, rows: Sequence[int]) -> list[float] | None:
        """Of passes of so many rows each, in a line between those that were measured, and on in
        that of the last two; a single one is taken for all, so that others are tried. None:
        nothing was measured."""
        if not self._points:
            return None
        points = [*self._points.values()]
        (low, less), (high, more) = points[-2:] if len(points) > 1 else points * 2
        if high > low:
            far = high + max(rows)
            points.append((far, more + (far - high) * max(0.0, (more - less) / (high - low))))
        known, took = zip(*points, strict=True)
        return np.interp(rows, known, took).tolist()


class Speculation:
    """How far the replies of one engine are guessed ahead, from how often guesses were right and
    what rows cost."""

    def __init__(self, model: Drafter | None = None) -> None:
        """model: asked where nothing else has an idea."""
        self._drafters: list[Drafter] = [Forced(), Lookup(), *([model] if model else [])]
        self._passes, self._drafting = Costs(), Costs()
        """What passes cost by their rows, and steps of the drafter that is a model by its texts."""
        self._declined = 0
        """Passes in a row whose guesses were not worth their rows."""

    def propose(self, texts: Sequence[Text], rows: int, room: int = MAX_TOGETHER) -> None:
        """Set the `drafts` of texts, what of their guesses the next pass is to verify: often none.

        The pass reads the rest of these texts anyway, and perhaps more, `rows` tokens; it has room
        for so many drafts.
        """
        reaches = [self._reach(text) for text in texts]
        depths = self._depths(texts, reaches, rows, min(room, MAX_TOGETHER))
        for drafter in self._drafters:
            asked = [
                (text, depth)
                for text, depth in zip(texts, depths, strict=True)
                if depth and text.drafter is drafter
            ]
            if drafter.free or not asked:
                continue
            started = time.perf_counter()
            chosen, counts = zip(*asked, strict=True)
            for text, found in zip(chosen, drafter.propose(chosen, counts), strict=True):
                text.guesses = found[: text.reply.fitting(found)]
            self._drafting.add(len(chosen), (time.perf_counter() - started) / max(counts))
        for text, depth in zip(texts, depths, strict=True):
            text.drafts = text.guesses[:depth]

    def observe(self, rows: int, seconds: float) -> None:
        """Learn what a pass took, drafts among its rows."""
        self._passes.add(rows, seconds)

    def _reach(self, text: Text) -> int:
        """How many guesses there are, or could be had, of the first drafter that has an idea."""
        reply = text.reply
        text.drafter, text.guesses = None, []
        # The last token of a reply is chosen and never read.
        most = min(MAX_DRAFTS, reply.max_tokens - len(reply.token_ids) - 1)
        for drafter in self._drafters if most > 0 else ():
            reach = drafter.reach(text, most)
            if reach and drafter.free:
                [found] = drafter.propose([text], [reach])
                text.guesses = found[: reply.fitting(found)]
                reach = len(text.guesses)
            if reach:
                text.drafter = drafter
                return reach
        return 0

    def _depths(
        self, texts: Sequence[Text], reaches: Sequence[int], rows: int, room: int
    ) -> list[int]:
        """How many guesses of each text to verify: the likeliest of all, as many as pay."""
        chances: list[tuple[float, int]] = []
        for i, (text, reach) in enumerate(zip(texts, reaches, strict=True)):
            if text.drafter is not None:
                likelihood = text.likelihood(text.drafter)
                chances += [(likelihood**depth, i) for depth in range(1, reach + 1)]
        chances = sorted(chances, key=lambda each: -each[0])[:room]
        depths = Counter(i for _, i in chances[: self._worth(texts, chances, rows)])
        return [depths[i] for i in range(len(texts))]

    def _worth(self, texts: Sequence[Text], chances: Sequence[tuple[float, int]], rows: int) -> int:
        """How many of these guesses, (chance that it is right, which text), give the most tokens a
        second; 0 if that is hardly more than without."""
        if not chances:
            return 0
        costs = self._passes.of([len(texts), *range(rows, rows + len(chances) + 1)])
        if costs is None:
            return 0
        # What stands beside the texts, such as a prompt, has its time anyway: only what guesses add
        # to that of a pass over the texts alone is theirs to pay.
        plain, before, *after = costs
        best, best_rate, tokens = 0, 0.0, float(len(texts))
        modelled = Counter[int]()  # guesses of a model, which makes one for each text a step
        for count, ((chance, i), seconds) in enumerate(zip(chances, after, strict=True), 1):
            tokens += chance
            drafter = texts[i].drafter
            modelled[i] += drafter is not None and not drafter.free
            asked, steps = sum(n > 0 for n in modelled.values()), max(modelled.values())
            [step] = self._drafting.of([asked]) or [0.0]
            rate = tokens / (plain + max(0.0, seconds - before) + steps * step)
            if rate >= best_rate:
                best, best_rate = count, rate
        if best_rate * plain < GAIN * len(texts) and self._declined < PATIENCE:
            self._declined += 1
            return 0
        self._declined = 0
        return best
