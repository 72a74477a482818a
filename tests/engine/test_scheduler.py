"""The scheduler through thousands of random arrivals: what must hold after every step."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsmith import sizing
from gemsmith.cache.block_pool import Blocks
from gemsmith.engine.scheduler import Scheduler, Sequence, Slice
from gemsmith.errors import ConfigError, QueueFullError, RequestError
from gemsmith.testing import tiny_config

CONFIG = tiny_config("E2B").text_config


def plan_of(*, full_blocks=30, seqs=4, budget=24, length=64):
    plan = sizing.kv_plan(
        CONFIG,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        block_tokens=4,
    )
    return replace(plan, full_blocks=full_blocks)


def new_scheduler(
    queue_limit=1000, awaits=lambda sequence, other: False, pace=None, **options
) -> Scheduler:
    blocks = Blocks(plan_of(**options))
    return Scheduler(blocks, queue_limit=queue_limit, awaits=awaits, pace=pace)


class Run:
    """Drives a scheduler as the engine does, and checks each step. With a seed, sequences that
    generate ask for drafts, of which some are accepted."""

    def __init__(self, scheduler: Scheduler, drafting: int | None = None) -> None:
        self.scheduler, self.alive, self.steps = scheduler, [], 0
        self.draw = None if drafting is None else random.Random(drafting)
        self.drafted = self.cut_short = 0
        self.first_token: dict[Sequence, int] = {}

    def add(self, tokens: int, limit: int, **options) -> Sequence:
        sequence = Sequence(tokens, limit, **options)
        self.scheduler.add(sequence)
        self.alive.append(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.alive.remove(sequence)

    def step(self) -> None:
        scheduler, plan = self.scheduler, self.scheduler.plan
        oldest = min((s.admitted for s in scheduler.running), default=None)
        slices = scheduler.schedule()
        preemptions = scheduler.preemptions
        for i, slice in enumerate(slices):
            slices[i] = self.with_drafts(slice, scheduler.room(slices))
        assert scheduler.preemptions == preemptions, "nobody gives way to a guess"
        self.steps += 1
        assert sum(slice.tokens for slice in slices) <= plan.max_num_batched_tokens
        assert len(scheduler.running) <= plan.max_num_seqs
        assert len({id(slice.sequence) for slice in slices}) == len(slices)
        # Whoever is the oldest gets on.
        if oldest is not None:
            assert slices[0].sequence.admitted == oldest
        for sequence, start, stop, _ in slices:
            assert sequence in scheduler.running
            assert start == sequence.pages.length < stop <= sequence.tokens
            for first, last in sequence.wholes:
                assert stop <= first or last <= start or start <= first < last <= stop
        scheduler.blocks.check(s.pages for s in self.alive)
        for slice in slices:
            sequence, pages = slice.sequence, slice.sequence.pages
            accepted = self.draw.randint(0, slice.drafts) if self.draw else 0
            asks = slice.asks
            scheduler.commit(slice, accepted)
            assert pages.length == slice.stop + accepted
            # What drafts took and did not need is free again.
            blocks = -(-pages.length // plan.block_tokens)
            assert (pages.full.stop, pages.sliding.stop) == (blocks, blocks)
            if not asks:
                continue
            self.first_token.setdefault(sequence, self.steps)
            sequence.tokens += 1 + accepted
            if sequence.tokens == sequence.limit:
                self.abort(sequence)
        scheduler.blocks.check(s.pages for s in self.alive)

    def with_drafts(self, slice: Slice, room: int) -> Slice:
        if self.draw is None or not slice.asks:
            return slice
        left = slice.sequence.limit - slice.sequence.tokens - 1
        wanted = min(self.draw.randint(0, 15), left, room)
        slice = self.scheduler.draft(slice, wanted)
        self.drafted += slice.drafts
        self.cut_short += slice.drafts < wanted
        return slice

    def until_idle(self, most: int) -> None:
        while self.alive:
            self.step()
            assert self.steps < most, "somebody starves"
        blocks = self.scheduler.blocks
        assert (blocks.full.held, blocks.sliding.held) == (0, 0)
        assert blocks.full.free == blocks.plan.full_blocks
        assert (self.scheduler.running, self.scheduler.waiting) == ([], 0)
        assert self.scheduler.schedule() == []


@st.composite
def arrivals(draw):
    """(step, prompt, reply, tenant, whole, aborted after so many steps)"""
    found = []
    for _ in range(draw(st.integers(1, 40))):
        prompt = draw(st.integers(1, 60))
        whole = None
        if draw(st.booleans()) and prompt > 3:
            start = draw(st.integers(0, prompt - 2))
            whole = (start, min(prompt, start + draw(st.integers(2, 18))))
        found.append(
            (
                draw(st.integers(0, 60)),
                prompt,
                draw(st.integers(1, 64 - prompt)),
                draw(st.sampled_from("abc")),
                whole,
                draw(st.none() | st.integers(0, 30)),
            )
        )
    return sorted(found, key=lambda arrival: arrival[0])


@settings(max_examples=200, deadline=None)
@given(
    arrivals(),
    st.sampled_from([16, 17, 24, 48]),
    st.sampled_from([24, 33]),
    st.none() | st.integers(0, 99),
    st.sampled_from([1, 2, 3, 1000]),
    st.none() | st.integers(1, 40),
)
def test_budget_blocks_and_everyones_end_hold_for_any_arrivals(
    wanted, full_blocks, budget, drafting, alike, pace
):
    def awaits(sequence, other):
        assert not sequence.begun
        assert other.admitted < sequence.admitted
        return (sequence.admitted - other.admitted) % alike == 0

    scheduler = new_scheduler(full_blocks=full_blocks, budget=budget, awaits=awaits, pace=pace)
    run = Run(scheduler, drafting)
    aborts: list[tuple[int, Sequence]] = []
    wanted = list(wanted)
    while wanted or run.alive:
        while wanted and wanted[0][0] <= run.steps:
            _, prompt, reply, tenant, whole, abort = wanted.pop(0)
            wholes = (whole,) if whole else ()
            sequence = run.add(prompt, prompt + reply, tenant=tenant, wholes=wholes)
            if abort is not None:
                aborts.append((run.steps + abort, sequence))
        for when, sequence in aborts:
            if when <= run.steps and sequence in run.alive:
                run.abort(sequence)
        run.step()
        assert run.steps < 8000, "somebody starves"
    run.until_idle(8001)


def test_too_few_blocks_for_all_preempt_the_youngest_and_everyone_ends():
    run = Run(new_scheduler(full_blocks=16, budget=24))
    first = run.add(4, 64)
    others = [run.add(4, 60) for _ in range(3)]
    run.until_idle(400)
    assert run.scheduler.preemptions > 0
    assert first.preemptions == 0
    assert sum(s.preemptions for s in others) == run.scheduler.preemptions


@pytest.mark.parametrize(("limit", "together"), [(9, 4), (10, 3)])
def test_a_block_is_kept_free_for_those_alone_that_may_outgrow_theirs(limit, together):
    """Prompts of two blocks; a reply's last token is never computed."""
    run = Run(new_scheduler(full_blocks=8, budget=64))
    for _ in range(4):
        run.add(8, limit)
    slices = run.scheduler.schedule()
    assert len(slices) == together
    assert run.scheduler.waiting == 4 - together


def test_drafts_get_what_is_left_and_nobody_gives_way_to_them():
    run = Run(new_scheduler(full_blocks=16, budget=24), drafting=3)
    for _ in range(3):
        run.add(4, 60)
    run.until_idle(400)
    assert run.drafted > run.cut_short > 0
    # A prompt that takes all there is leaves nothing to guess with.
    scheduler = new_scheduler(budget=24, full_blocks=64)
    generating = Sequence(1, 60)
    scheduler.add(generating)
    [slice] = scheduler.schedule()
    scheduler.commit(slice)
    generating.tokens += 1
    scheduler.add(Sequence(40, 60))
    assert scheduler.room(scheduler.schedule()) == 0


def test_a_prompt_waits_for_one_that_begins_as_it_does_and_looks_again():
    looked: list[Sequence] = []
    scheduler = Scheduler(
        Blocks(plan_of(budget=24, full_blocks=64)),
        begin=looked.append,
        awaits=lambda sequence, other: other.pages.length < 40,
    )
    first, second, third = (Sequence(60, 62) for _ in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    steps = []
    while scheduler.running or not steps:
        slices = scheduler.schedule()
        steps.append({slice.sequence.admitted: slice.tokens for slice in slices})
        for slice in slices:
            scheduler.commit(slice)
            if slice.asks:
                scheduler.remove(slice.sequence)
    # All of each step is the first one's until it has come to 40 tokens, then everybody's.
    assert steps[:2] == [{0: 24}, {0: 24}]
    assert 1 in steps[2]
    # Once when it came, and again before each step after one that it waited in.
    assert [looked.count(first), looked.count(second)] == [1, 3]


def test_a_short_prompt_waits_for_no_long_one():
    run = Run(new_scheduler(budget=24, full_blocks=64))
    long, short = run.add(60, 62), run.add(8, 10)
    run.until_idle(100)
    assert run.first_token[short] == 1
    # Half of each step is the long one's whatever comes.
    assert run.first_token[long] <= 5


def test_a_stream_of_short_prompts_does_not_starve_a_long_one():
    run = Run(new_scheduler(budget=24, full_blocks=64))
    run.add(1, 2)
    long = run.add(60, 61)
    for _ in range(8):
        for _ in range(4):
            run.add(12, 13)
        run.step()
    assert run.first_token[long] <= 8


def test_prompts_take_few_tokens_of_a_step_in_which_somebody_generates():
    scheduler = new_scheduler(budget=24, pace=6, full_blocks=64)
    scheduler.add(long := Sequence(30, 50))
    scheduler.add(short := Sequence(8, 20))
    scheduler.add(picture := Sequence(20, 25, wholes=((0, 18),)))
    steps = []
    for _ in range(5):
        slices = scheduler.schedule()
        steps.append({slice.sequence: slice.tokens for slice in slices})
        for slice in slices:
            scheduler.commit(slice)
            slice.sequence.tokens += slice.asks
    # Nobody generates yet in the first; what must be whole takes more once it is the oldest prompt.
    assert steps == [
        {long: 16, short: 8},
        {long: 6, short: 1},
        {long: 6, short: 1},
        {long: 2, short: 1},
        {long: 1, short: 1, picture: 18},
    ]


def test_tenants_take_turns():
    run = Run(new_scheduler(seqs=2, budget=24))
    crowd = [run.add(4, 12, tenant="crowd") for _ in range(20)]
    guest = run.add(4, 12, tenant="guest")
    run.until_idle(1000)
    assert sum(run.first_token[s] < run.first_token[guest] for s in crowd) <= 2


def test_the_queue_has_a_limit_and_has_room_again_once_requests_run():
    run = Run(new_scheduler(queue_limit=3, seqs=2))
    for _ in range(3):
        run.add(4, 8)
    with pytest.raises(QueueFullError, match="3 requests are waiting, which is the limit"):
        run.add(4, 8)
    run.step()
    run.add(4, 8)
    run.until_idle(100)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (Sequence(60, 65), "65 tokens of prompt and reply, but .* at most 64"),
        (Sequence(40, 50, wholes=((5, 26),)), "an image of 21 tokens does not fit in a step of 24"),
    ],
)
def test_what_can_never_run_is_refused(sequence, message):
    with pytest.raises(RequestError, match=message):
        new_scheduler().add(sequence)


def test_a_step_smaller_than_its_seats_is_refused():
    with pytest.raises(ConfigError, match="max_num_batched_tokens 4: a step needs more tokens"):
        new_scheduler(budget=4)


def test_cached_blocks_are_given_back_before_anybody_is_preempted():
    blocks = Blocks(plan_of(full_blocks=16))
    cached = blocks.full.take(10)

    def evict() -> bool:
        if cached:
            blocks.full.release([cached.pop()])
            return True
        return False

    scheduler = Scheduler(blocks, evict=evict)
    scheduler.add(Sequence(4, 40))
    for _ in range(30):
        slices = scheduler.schedule()
        scheduler.commit(slices[0])
        slices[0].sequence.tokens += 1
    assert scheduler.preemptions == 0
    assert len(cached) == 7
