"""Many requests at a time on one model: continuous batching, a step at a time. One thread calls it.

    engine = BatchEngine(lm)
    id = engine.add(Request(prompt=lm.encode(messages), params=lm.sampling))
    while engine.busy:
        for id, outcome in engine.step(): ...       # events, the last `Finished`; or an error

A request joins a running batch at any step, leaves it when it is done, and can be aborted between
any two. One that fails takes no other with it: a pass that raises is run again, each sequence
alone, and nothing was written that matters (see `cache.paged`).

Where kernels give a row the same bits whatever rows stand beside it, so does the batch (which ones
do: see `cache.prefix`); elsewhere floats may differ in the last bits.
"""

import time
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch

from gemsmith import hardware, sizing
from gemsmith.cache.paged import PagedCache
from gemsmith.cache.prefix import Chain, Found, Lookup, PrefixCache
from gemsmith.cache.stored import Store, identity
from gemsmith.engine.context import Next, Soft, between
from gemsmith.engine.drafters import Text
from gemsmith.engine.engine import LM
from gemsmith.engine.reply import Event, Reply
from gemsmith.engine.request import Request
from gemsmith.engine.runner import Runner, Work
from gemsmith.engine.scheduler import Scheduler, Sequence, Slice
from gemsmith.errors import CapacityError, ConfigError, GemsmithError

LONGEST_BY_DEFAULT = 32768
"""Tokens of a sequence that a plan makes room for where nobody says; fewer if memory is short."""
PACE = 192
"""Tokens of prompts beside those that generate, in a step on a CPU. A row of so many takes it no
longer than one of 512, and with steps of 512 prompts that came together would keep coming together:
each waited for the step of those before it, and that one for theirs."""
LOOKUPS = 64
"""Latest requests of which is known what the prefix cache had for them."""
SHARE_OF_MEMORY = 0.5
"""Of the memory that is free once the model is loaded, what K/V may take where nobody says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How much is done at a time, and how much memory that may take."""

    max_num_seqs: int = 16
    """Sequences decoded together; others wait."""
    max_num_batched_tokens: int | None = None
    """Tokens of a step. None: 512, or what the largest image asks for where it must be whole."""
    max_model_len: int | None = None
    """Longest prompt and reply. None: the model's context or 32768, or what fits."""
    kv_bytes: int | None = None
    """Memory for K/V. None: what max_num_seqs sequences can use, at most half of what is free."""
    queue_limit: int = 256
    """Requests that may wait; one more is refused."""
    prefix_caching: bool = True
    """Keep K/V of the ends of turns, for prompts that go on from there."""
    prefix_folder: Path | None = None
    """Where they are kept on disk as well, see `cache.stored`. None: nowhere."""
    prefix_bytes: int = 2 * 10**9
    """Most bytes there."""
    block_tokens: int = sizing.BLOCK_TOKENS
    """Tokens of a block of K/V."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_bytes",
                     "queue_limit", "prefix_bytes", "block_tokens"):  # fmt: skip
            value = getattr(self, name)
            optional = value is None and name in ("max_num_batched_tokens", "max_model_len",
                                                  "kv_bytes")  # fmt: skip
            if not optional and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(f"{name} {value!r}: must be a whole number of at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """The engine at a moment, and what it has done since it was made."""

    running: int
    waiting: int
    kv_used_bytes: int
    """Of blocks that sequences hold, or the prefix cache, which gives them back when asked."""
    kv_bytes: int
    """Of all blocks."""
    steps: int
    prompt_tokens: int
    """Computed ones, those computed again after a preemption included."""
    cached_tokens: int
    """Of prompts, those that the prefix cache had."""
    prefix_hits: int
    prefix_misses: dict[str, int]
    """By reason, see `cache.prefix.Miss`; a hit that could have been longer counts in both."""
    lookups: tuple[Lookup, ...]
    """What the prefix cache had for the latest requests, the latest last."""
    checkpoints: int
    """Ends of turns that the prefix cache holds now."""
    checkpoints_restored: int
    """Those that came from disk, in all."""
    generated_tokens: int
    drafts: int
    """Times that a reply was guessed ahead in a step."""
    draft_tokens: int
    """Guesses that the model verified, see `engine.speculative`."""
    accepted_tokens: int
    """Those that were right."""
    accepted_by_place: tuple[int, ...]
    """The same by their place among the guesses of a step, the first at 0."""
    preemptions: int
    finished: int
    aborted: int
    failed: int
    busy_s: float
    """Time spent in steps."""

    @property
    def kv_usage(self) -> float:
        return self.kv_used_bytes / self.kv_bytes if self.kv_bytes else 0.0

    @property
    def generated_tokens_per_s(self) -> float:
        """Over the time in which there was something to do."""
        return self.generated_tokens / self.busy_s if self.busy_s else 0.0


Outcome = list[Event] | GemsmithError
"""What a step did for a request: events, or why there will be no more."""


@dataclass(slots=True, eq=False)
class _Job:
    """A request and where it stands."""

    id: int
    text: Text
    sequence: Sequence
    keys: list[Hashable]
    """Of the prompt and the reply so far, see `Prompt.keys`."""
    chain: Chain
    boundaries: list[int]
    """Where turns of the prompt end, the last token's place at last."""
    blocks: list[int] | None
    """`Prompt.blocks` where tokens of an image see each other."""
    cached: int | None = None
    """Tokens of the prompt that had not to be computed; None before admission."""
    found: Found | None = None
    """What the prefix cache had for it; its pages are the sequence's."""
    soft: Soft | None = None
    """Rows of the soft tokens, while some of them are still to be computed."""
    soft_from: int = field(default=-1)
    """Rows are there of soft tokens from this one on; -1: of none yet."""

    @property
    def reply(self) -> Reply:
        return self.text.reply


class BatchEngine:
    """Runs requests together. `add`, `abort` and `step` are for one thread at a time."""

    def __init__(self, lm: LM, config: EngineConfig | None = None) -> None:
        """lm: not used by anybody else meanwhile.

        Raises:
          ConfigError: settings that contradict each other, or no place for stored prefixes.
          CapacityError: K/V of one sequence of max_model_len tokens do not fit.
        """
        self.lm, self.config = lm, config or EngineConfig()
        self.plan = kv_plan(lm, self.config)
        text = lm.config.text_config
        self.cache = PagedCache(
            text, self.plan, dtype=lm.kv, device=lm.device, k_from_v=lm.model.k_from_v
        )
        self._store = self._stored_prefixes()
        self.prefix = PrefixCache(self.cache, store=self._store)
        self.scheduler = Scheduler(
            self.cache.blocks,
            queue_limit=self.config.queue_limit,
            begin=self._begin,
            awaits=self._awaits,
            evict=self.prefix.evict,
            written=self._written,
            pace=PACE if lm.device.type == "cpu" else None,
        )
        self._runner = Runner(lm.model, self.cache)
        self._speculation = lm.speculation(
            lambda texts: self.cache.reader([text.past.pages for text in texts])
        )
        self._jobs: dict[int, _Job] = {}
        self._by_sequence: dict[Sequence, _Job] = {}
        self._ids = count(1)
        self._block_bytes = tuple(
            sizing.kv_block_bytes(
                text,
                sliding=sliding,
                bytes_per_value=lm.kv.itemsize,
                block_tokens=self.plan.block_tokens,
            )
            for sliding in (False, True)
        )
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated = 0
        self._hits, self._misses = 0, Counter[str]()
        self._lookups: deque[Lookup] = deque(maxlen=LOOKUPS)
        self._drafts = self._draft_tokens = 0
        self._accepted = Counter[int]()
        self._finished = self._aborted = self._failed = 0
        self._busy_s = 0.0

    def _stored_prefixes(self) -> Store | None:
        config, lm = self.config, self.lm
        if config.prefix_folder is None or not config.prefix_caching:
            return None
        size = self.plan.block_tokens
        return Store(
            config.prefix_folder,
            identity(lm.model, lm.config.text_config, lm.kv, size),
            max_bytes=config.prefix_bytes,
            block_tokens=size,
        )

    def close(self) -> None:
        """Write down what is still to be kept; nothing is to be asked after that."""
        if self._store is not None:
            self._store.close()

    @property
    def busy(self) -> bool:
        """Whether there is a request that is not done."""
        return bool(self._jobs)

    def add(self, request: Request) -> int:
        """Queue a request; its id.

        Raises:
          QueueFullError: too many wait.
          RequestError: it can never be served.
        """
        lm, prompt = self.lm, request.prompt
        reply = lm.reply(
            prompt,
            request.params,
            chat=request.chat,
            follow=request.follow,
            max_model_len=self.plan.max_model_len,
        )
        together = lm.soft.see_each_other(prompt)
        wholes = tuple((span.start, span.stop) for span in prompt.spans if span.run.kind != "audio")
        sequence = Sequence(
            len(prompt.ids),
            len(prompt.ids) + reply.max_tokens,
            tenant=request.tenant,
            wholes=wholes if together else (),
        )
        self.scheduler.add(sequence)
        blocks = prompt.blocks() if together else None
        turn_close = lm.tokenizer.special.turn_close
        boundaries = [i + 1 for i, id in enumerate(prompt.ids[:-2]) if id == turn_close]
        chain = Chain(request.tenant, self.plan.block_tokens)
        job = _Job(next(self._ids), Text(reply, sequence), sequence, prompt.keys(), chain,
                   [*boundaries, len(prompt.ids) - 1], blocks)  # fmt: skip
        self._jobs[job.id] = self._by_sequence[sequence] = job
        return job.id

    def abort(self, id: int) -> bool:
        """Drop a request wherever it stands, and free what it holds; False if there is none."""
        if id not in self._jobs:
            return False
        self._forget(self._jobs[id])
        self._aborted += 1
        return True

    def step(self) -> list[tuple[int, Outcome]]:
        """Compute the next step; for each request that got on, its events, if any."""
        started = time.perf_counter()
        slices = self.scheduler.schedule()
        for slice in slices:
            self._count_cached(self._by_sequence[slice.sequence])
        slices = self._with_drafts(slices)
        computing = time.perf_counter()
        outcomes: list[tuple[int, Outcome]] = []
        for slice, result in zip(slices, self._compute(slices), strict=True):
            job = self._by_sequence[slice.sequence]
            try:
                if isinstance(result, GemsmithError):
                    raise result
                events = self._take(job, slice, result)
            except GemsmithError as error:
                outcomes.append((job.id, self._fail(slice, error)))
            else:
                if result:
                    outcomes.append((job.id, events))
        now = time.perf_counter()
        if self._speculation and slices:
            self._speculation.observe(sum(slice.tokens for slice in slices), now - computing)
        self._steps += bool(slices)
        self._busy_s += now - started
        return outcomes

    def stats(self) -> Stats:
        blocks = self.cache.blocks
        used = [pool.blocks - pool.free for pool in (blocks.full, blocks.sliding)]
        return Stats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting,
            kv_used_bytes=sum(n * size for n, size in zip(used, self._block_bytes, strict=True)),
            kv_bytes=self.plan.nbytes,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            prefix_hits=self._hits,
            prefix_misses=dict(self._misses),
            lookups=tuple(self._lookups),
            checkpoints=len(self.prefix),
            checkpoints_restored=self.prefix.restored,
            generated_tokens=self._generated,
            drafts=self._drafts,
            draft_tokens=self._draft_tokens,
            accepted_tokens=self._accepted.total(),
            accepted_by_place=tuple(self._accepted[at] for at in range(len(self._accepted))),
            preemptions=self.scheduler.preemptions,
            finished=self._finished,
            aborted=self._aborted,
            failed=self._failed,
            busy_s=self._busy_s,
        )

    def check(self) -> None:
        """Assert that every block is free, or held by a request that is here or a checkpoint."""
        jobs = [job.sequence.pages for job in self._jobs.values()]
        self.cache.blocks.check([*jobs, *self.prefix.pages()])

    # -- parts of a step ----------------------------------------------------------------------

    def _begin(self, sequence: Sequence) -> None:
        """Give a sequence that is about to be admitted what is known of its tokens."""
        if not self.config.prefix_caching:
            return
        job = self._by_sequence[sequence]
        # It may begin many times before there is room: files are read for the first alone.
        job.found = self.prefix.find(job.keys, job.chain, stored=job.found is None)
        sequence.pages = job.found.pages

    def _awaits(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether the other comes to an end of a turn that spares this one half of its work."""
        if not self.config.prefix_caching:
            return False
        job, ahead = self._by_sequence[sequence], self._by_sequence[other]
        have = sequence.pages.length
        for boundary in reversed(ahead.boundaries):
            if boundary <= other.pages.length or 2 * (boundary - have) < sequence.remaining:
                return False
            if boundary < len(job.keys) and job.chain.same(
                job.keys, ahead.chain, ahead.keys, boundary
            ):
                return True
        return False

    def _count_cached(self, job: _Job) -> None:
        """Once a request, when it is first seen in a step."""
        if job.cached is not None:
            return
        job.cached = job.sequence.pages.length
        self._cached_tokens += job.cached
        self._hits += job.cached > 0
        if job.found is None:
            return
        if job.found.miss is not None:
            self._misses[job.found.miss] += 1
        self._lookups.append(
            Lookup(
                at=time.time(),
                tenant=job.sequence.tenant,
                prompt_tokens=len(job.reply.prompt.ids),
                cached_tokens=job.cached,
                known_tokens=job.found.known,
                miss=job.found.miss,
            )
        )

    def _written(self, slice: Slice) -> None:
        """Keep the ends of turns that a slice has passed."""
        if not self.config.prefix_caching:
            return
        job = self._by_sequence[slice.sequence]
        for boundary in job.boundaries:
            if slice.start < boundary <= slice.stop:
                self.prefix.keep(job.keys, job.chain, job.sequence.pages, boundary)

    def _with_drafts(self, slices: list[Slice]) -> list[Slice]:
        """The step with guesses of what follows, of as many tokens as pay."""
        if self._speculation is None:
            return slices
        # Those that only add to what they have read; not one that computes its tokens again.
        texts = {
            slice.sequence: job.text
            for slice in slices
            if slice.asks
            and 0 < slice.start == (job := self._by_sequence[slice.sequence]).text.read
        }
        rows = sum(slice.tokens for slice in slices)
        self._speculation.propose([*texts.values()], rows, self.scheduler.room(slices))
        drafted = []
        for slice in slices:
            text = texts.get(slice.sequence)
            if text is not None and text.drafts:
                slice = self.scheduler.draft(slice, len(text.drafts))
                text.drafts = text.drafts[: slice.drafts]
            drafted.append(slice)
        return drafted

    def _compute(self, slices: list[Slice]) -> list[list[Next] | GemsmithError]:
        """What follows in those that ask. If the pass fails each runs alone, and has its own
        error."""
        if not slices:
            return []
        try:
            return [*self._runner.run([self._work(slice) for slice in slices])]
        except Exception as error:
            if len(slices) > 1:
                return [result for slice in slices for result in self._compute([slice])]
            if isinstance(error, GemsmithError):
                return [error]
            wrapped = GemsmithError(f"the model failed on this request: {error!r}")
            wrapped.__cause__ = error
            return [wrapped]

    def _work(self, slice: Slice) -> Work:
        job = self._by_sequence[slice.sequence]
        start, stop = slice.start, slice.stop
        blocks_T = None
        if job.blocks is not None and start < len(job.blocks):
            blocks = job.blocks[start:stop]
            blocks += [-1] * (slice.tokens - len(blocks))
            blocks_T = torch.tensor(blocks, device=self.lm.device)
        ids = [*job.text.ids[start:stop], *job.text.drafts]
        return Work(slice.sequence.pages, ids, slice.asks * (1 + slice.drafts), job.reply.sees,
                    self._soft(job, start, stop), blocks_T)  # fmt: skip

    def _soft(self, job: _Job, start: int, stop: int) -> Soft | None:
        """Rows of the soft tokens among start..stop-1; the towers run once a prompt, unless the
        sequence is preempted in the middle of it."""
        spans = job.reply.prompt.spans
        if not any(span.start < stop and start < span.stop for span in spans):
            return None
        if not 0 <= job.soft_from <= start:
            soft = self.lm.soft.rows(job.reply.prompt, start)
            assert soft is not None, "there are soft tokens here"
            job.soft, job.soft_from = (soft[0] + start, soft[1]), start
        found = between(job.soft, start, stop)
        if stop >= spans[-1].stop:
            job.soft, job.soft_from = None, -1
        return found

    def _take(self, job: _Job, slice: Slice, following: list[Next]) -> list[Event]:
        """Let a reply go on with what follows, and count what was computed for it."""
        reply, before = job.reply, len(job.reply.token_ids)
        self._prompt_tokens += max(0, min(slice.stop, len(reply.prompt.ids)) - slice.start)
        if not slice.asks:
            self.scheduler.commit(slice)
            return []
        events, accepted = job.text.take(following)
        self.scheduler.commit(slice, accepted)
        self._drafts += slice.drafts > 0
        self._draft_tokens += slice.drafts
        self._accepted.update(range(accepted))
        events += reply.take_known()
        new = reply.token_ids[before:]
        self._generated += len(new)
        job.keys += new
        job.sequence.tokens += len(new)
        if reply.ended:
            events += reply.finish(job.cached or 0)
            self._finished += 1
            if self.config.prefix_caching:
                pages = job.sequence.pages
                self.prefix.keep(job.keys, job.chain, pages, pages.length, passed=False)
            self._forget(job)
        else:
            reply.prepare()
        return events

    def _fail(self, slice: Slice, error: GemsmithError) -> GemsmithError:
        self._failed += 1
        self._forget(self._by_sequence[slice.sequence])
        return error

    def _forget(self, job: _Job) -> None:
        self.scheduler.remove(job.sequence)
        del self._jobs[job.id], self._by_sequence[job.sequence]


def kv_plan(lm: LM, config: EngineConfig) -> sizing.KVPlan:
    """The K/V that an engine of these settings allocates.

    Raises:
      ConfigError: max_model_len beyond the model's context.
      CapacityError: one sequence of max_model_len tokens does not fit.
    """
    text, seqs = lm.config.text_config, config.max_num_seqs
    context = text.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > context:
        raise ConfigError(
            f"max_model_len {config.max_model_len}: the model's context holds {context} tokens"
        )
    step = config.max_num_batched_tokens
    if step is None:
        whole = text.use_bidirectional_attention == "vision"
        step = max(512, 2 * seqs, (1120 + seqs) * whole)
    longest = config.max_model_len or min(context, LONGEST_BY_DEFAULT)
    budget = config.kv_bytes
    if budget is None:
        on_gpu = lm.device.type == "cuda"
        free = (
            torch.cuda.mem_get_info(lm.device)[0] if on_gpu else hardware.machine().available_bytes
        )
        budget = None if free is None else int(free * SHARE_OF_MEMORY)
    while True:
        try:
            return sizing.kv_plan(
                text,
                max_model_len=longest,
                max_num_seqs=seqs,
                max_num_batched_tokens=step,
                cached_windows=2 * seqs if config.prefix_caching else 0,
                budget_bytes=budget,
                bytes_per_value=lm.kv.itemsize,
                block_tokens=config.block_tokens,
            )
        except CapacityError:
            if config.max_model_len is not None or longest <= config.block_tokens:
                raise
            longest //= 2


def run_all(engine: BatchEngine, requests: Iterable[Request]) -> list[list[Event] | GemsmithError]:
    """All requests to their end, in the order given: offline batches, tests."""
    ids = [engine.add(request) for request in requests]
    events: dict[int, list[Event]] = {id: [] for id in ids}
    failed: dict[int, GemsmithError] = {}
    while engine.busy:
        for id, outcome in engine.step():
            if isinstance(outcome, GemsmithError):
                failed[id] = outcome
            else:
                events[id] += outcome
    return [failed.get(id, events[id]) for id in ids]
