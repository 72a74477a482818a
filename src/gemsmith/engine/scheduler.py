"""Which tokens of which sequences the next step computes. No tensors, no token ids, no clock.

Every step has a budget of tokens. First each running sequence that is generating gets one; what is
left goes to prompts, in chunks; where somebody generates, only so much that the step stays short.
Half of it goes to the oldest, so that a long prompt gets on whatever comes, the rest to the one
with the least to do, so that a short prompt waits for no long one. A prompt that begins as an older
one does, of which this step computes more, waits for it rather than compute the same again. Known
tokens are of use for sure: drafts of the next ones get what these leave of the budget and of free
blocks. Requests are admitted in turns of their tenants (first come first served within one), while
there are seats, and blocks for all that is known of the sequence.

When a generating sequence finds no block, the prefix cache gives some back; then the sequence that
came last is preempted: it loses its blocks and computes its tokens again later, before anything new
is admitted. The oldest sequence is never preempted and always gets on, so every sequence ends.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from gemsmith.cache.block_pool import Blocks, Pages
from gemsmith.errors import ConfigError, QueueFullError, RequestError


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of a request."""

    tokens: int
    """Known ones: the prompt, and each token of the reply once it is chosen."""
    limit: int
    """Most there can ever be."""
    tenant: str = ""
    wholes: tuple[tuple[int, int], ...] = ()
    """(start, stop) of tokens that must be computed in one step, such as those of an image."""
    pages: Pages = field(default_factory=Pages)
    """Tokens that are computed, and their blocks."""
    admitted: int = -1
    """Its number in the order of (first) admission: the smaller, the older."""
    preemptions: int = 0
    begun: bool = False
    """Whether any of it was computed since it was admitted."""

    @property
    def remaining(self) -> int:
        """Known tokens that are not computed."""
        return self.tokens - self.pages.length


class Slice(NamedTuple):
    """Tokens start..stop-1 of a sequence, and drafts of those after them: its part of a step."""

    sequence: Sequence
    start: int
    stop: int
    drafts: int = 0

    @property
    def tokens(self) -> int:
        """To be computed, drafts included."""
        return self.stop - self.start + self.drafts

    @property
    def asks(self) -> bool:
        """Whether the step computes the last known token, so that its logits give the next."""
        return self.stop == self.sequence.tokens


def _nothing(sequence: Sequence) -> None:
    """Without a prefix cache a sequence begins with no tokens computed."""


def _never() -> bool:
    return False


def _alone(sequence: Sequence, other: Sequence) -> bool:
    """Without a prefix cache nobody has anything from another."""
    return False


def _unkept(slice: Slice) -> None:
    """Without a prefix cache windows are forgotten at once."""


class Scheduler:
    """Admits, slices, preempts. The caller runs what `schedule` returns, with drafts where
    `draft` has room for them, then calls `commit` for each."""

    def __init__(
        self,
        blocks: Blocks,
        *,
        queue_limit: int = 256,
        begin: Callable[[Sequence], None] = _nothing,
        awaits: Callable[[Sequence, Sequence], bool] = _alone,
        evict: Callable[[], bool] = _never,
        written: Callable[[Slice], None] = _unkept,
        pace: int | None = None,
    ) -> None:
        """queue_limit: most requests that wait. begin: told of a sequence about to be admitted, and
        of one that has waited for another; may give it pages of tokens that are computed already.
        awaits: whether the first sequence, of which nothing is computed yet, had better wait for
        what the second one computes. evict: gives some cached blocks back; False if there are none.
        written: told of each slice once it is computed, while the windows of all its tokens are
        still there. pace: about how many tokens of prompts a step has beside those that generate;
        None: all that the budget leaves.

        Raises:
          ConfigError: a step has no token for each sequence.
        """
        plan = blocks.plan
        if plan.max_num_batched_tokens <= plan.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {plan.max_num_batched_tokens}: a step needs more tokens "
                f"than max_num_seqs, {plan.max_num_seqs}, or prompts would never get on"
            )
        self.blocks, self.plan, self.queue_limit = blocks, plan, queue_limit
        self.running: list[Sequence] = []
        """The oldest first."""
        self.preemptions = 0
        self._preempted: list[Sequence] = []
        self._queues: OrderedDict[str, deque[Sequence]] = OrderedDict()
        """Of each tenant with waiting requests; the first tenant is next."""
        self._begin, self._awaits, self._evict, self._written = begin, awaits, evict, written
        self._pace = plan.max_num_batched_tokens if pace is None else pace
        self._waited: list[Sequence] = []
        """Those that the last step left waiting for another."""
        self._admissions = count()

    @property
    def waiting(self) -> int:
        """Sequences that are neither running nor done."""
        return len(self._preempted) + sum(map(len, self._queues.values()))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
          QueueFullError: too many wait; come back later.
          RequestError: it can never run.
        """
        plan = self.plan
        if sequence.limit > plan.max_model_len:
            raise RequestError(
                f"{sequence.limit} tokens of prompt and reply, but the engine was started for "
                f"sequences of at most {plan.max_model_len}; shorten the prompt, ask for fewer new "
                "tokens, or raise max_model_len"
            )
        longest = max((stop - start for start, stop in sequence.wholes), default=0)
        if longest > plan.max_num_batched_tokens - plan.max_num_seqs:
            raise RequestError(
                f"an image of {longest} tokens does not fit in a step of "
                f"{plan.max_num_batched_tokens} beside {plan.max_num_seqs} sequences; give it a "
                "smaller budget, or raise max_num_batched_tokens"
            )
        if sum(map(len, self._queues.values())) >= self.queue_limit:
            raise QueueFullError(
                f"{self.queue_limit} requests are waiting, which is the limit; try again later"
            )
        self._queues.setdefault(sequence.tenant, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, done or not, and give its blocks back; nothing if it is unknown."""
        queue = self._queues.get(sequence.tenant)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        elif queue is not None and sequence in queue:
            queue.remove(sequence)
            if not queue:
                del self._queues[sequence.tenant]
        self.blocks.release(sequence.pages)

    def schedule(self) -> list[Slice]:
        """The next step, with the blocks it needs taken; empty only if nobody is there."""
        for sequence in self._waited:
            if sequence in self.running:
                self.blocks.release(sequence.pages)
                self._begin(sequence)
        self._admit()
        generating = sum(s.remaining == 1 for s in self.running)
        self._waited = []
        left = self.plan.max_num_batched_tokens - generating
        chunks = self._chunks(left, min(left, self._pace) if generating else left)
        slices: list[Slice] = []
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # preempted by one before it
            tokens = chunks.get(sequence, 1)
            # Only those that generate, and the oldest, may take blocks from younger ones; a prompt
            # that finds none waits.
            strong = sequence not in chunks or sequence is self.running[0]
            if tokens and self._make_room(sequence, tokens, preempt=strong):
                self.blocks.extend(sequence.pages, tokens)
                sequence.begun = True
                start = sequence.pages.length
                slices.append(Slice(sequence, start, start + tokens))
            elif strong:
                self._preempt(sequence)
        assert slices or not (self.running or self.waiting), "somebody always gets on"
        return slices

    def room(self, slices: list[Slice]) -> int:
        """Tokens that the budget of a step has for drafts."""
        return self.plan.max_num_batched_tokens - sum(slice.tokens for slice in slices)

    def draft(self, slice: Slice, count: int) -> Slice:
        """The slice with so many drafts, or as many as there are blocks free for: nobody gives any
        up for a guess."""
        assert slice.asks, "drafts come after the last known token"
        pages, known = slice.sequence.pages, slice.stop - slice.start
        while count and not self.blocks.room(self.blocks.lacking(pages, known + count)):
            count -= 1
        self.blocks.extend(pages, known + count)
        return slice._replace(drafts=count)

    def commit(self, slice: Slice, accepted: int = 0) -> None:
        """Count the tokens of a slice as computed, and the first `accepted` of its drafts; those of
        the others never were."""
        pages = slice.sequence.pages
        assert pages.length == slice.start, "slices are committed once"
        assert accepted <= slice.drafts, f"{accepted} of {slice.drafts} drafts"
        pages.length = slice.stop + accepted
        self.blocks.trim(pages)
        self._written(slice)
        self.blocks.slide(pages)

    # -- parts of a step ----------------------------------------------------------------------

    def _chunks(self, most: int, left: int) -> dict[Sequence, int]:
        """How many tokens of each prompt to compute, `left` in all; at `most` where what must be
        whole asks for more."""
        prompts = [s for s in self.running if s.remaining > 1]
        if not prompts:
            return {}
        oldest = prompts[0]
        taken = dict.fromkeys(prompts, 0)
        taken[oldest] = self._chunk(oldest, 0, max(1, left // 2), most)
        left = max(0, left - taken[oldest])
        for sequence in sorted(prompts, key=lambda s: (s.remaining, s.admitted)):
            if not sequence.begun and any(
                taken[other] and self._awaits(sequence, other)
                for other in prompts[: prompts.index(sequence)]
            ):
                self._waited.append(sequence)
                continue
            more = self._chunk(sequence, taken[sequence], left, left)
            taken[sequence] += more
            left -= more
        return taken

    @staticmethod
    def _chunk(sequence: Sequence, taken: int, share: int, left: int) -> int:
        """How many tokens to take beyond the `taken`: about `share`, never more than `left`."""
        start = sequence.pages.length + taken
        stop = min(start + share, sequence.tokens)
        for first, last in sequence.wholes:
            if first < stop < last:
                # Cut before it; if it begins here, take it whole or not at all.
                stop = first if first > start else last
        return stop - start if stop - start <= left else 0

    def _make_room(self, sequence: Sequence, tokens: int, *, preempt: bool) -> bool:
        """Whether there is room for so many tokens, made at the prefix cache's expense or, with
        `preempt`, at that of younger sequences."""
        while not self.blocks.room(self.blocks.lacking(sequence.pages, tokens)):
            if self._evict():
                continue
            if not preempt or self.running[-1] is sequence:
                return False
            self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.pages)
        sequence.begun = False
        self._preempted.append(sequence)
        self._preempted.sort(key=lambda s: s.admitted)
        sequence.preemptions += 1
        self.preemptions += 1

    def _admit(self) -> None:
        while len(self.running) < self.plan.max_num_seqs:
            sequence = self._next()
            if sequence is None or not self._has_blocks_for(sequence):
                return
            if self._preempted:
                self._preempted.pop(0)
            else:
                tenant = sequence.tenant
                self._queues[tenant].popleft()
                self._queues.move_to_end(tenant)
                if not self._queues[tenant]:
                    del self._queues[tenant]
                sequence.admitted = next(self._admissions)
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.admitted)

    def _next(self) -> Sequence | None:
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._queues.values()))[0] if self._queues else None

    def _has_blocks_for(self, sequence: Sequence) -> bool:
        """Blocks of full layers for all that is known of it, beside what those that run still need
        and one more for each of them that may outgrow these. Sliding blocks are planned for every
        seat.

        Without that one more everybody would get on, too, but who came last would be preempted as
        soon as it has begun: in simulated runs with few blocks up to ten times as many were, and up
        to 28 % more tokens were computed.
        """
        self._begin(sequence)
        needed = sum(self._lacks(s, s.tokens) for s in (*self.running, sequence))
        if needed:
            # A reply's last token is never computed.
            needed += sum(
                self._lacks(s, s.limit - 1) > self._lacks(s, s.tokens) for s in self.running
            )
        while self.running and self.blocks.full.free < needed:
            if not self._evict():
                self.blocks.release(sequence.pages)
                return False
        return True

    def _lacks(self, sequence: Sequence, tokens: int) -> int:
        """Blocks of full layers to be taken until so many tokens of it are computed."""
        return self.blocks.lacking(sequence.pages, tokens - sequence.pages.length)[0]
