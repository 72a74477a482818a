"""Many sequences in blocks against each alone without a cache; blocks conserved always."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import needs_extension

from gemsmith import sizing
from gemsmith.cache.block_pool import BlockPool, Blocks, Pages
from gemsmith.cache.none import NoCache
from gemsmith.cache.paged import Chunk, PagedCache
from gemsmith.cache.ring import RingCache
from gemsmith.errors import CapacityError, ConfigError
from gemsmith.testing import SIZES, assert_close, random_model, tiny_config, tolerance

# Eight reductions a layer in eight layers.
LIMIT = tolerance(torch.float32, 64, steps=64)
WINDOW, BLOCK = 8, 4
CONFIGS = {size: tiny_config(size, sliding_window=WINDOW) for size in SIZES}
MODELS = {size: random_model(config) for size, config in CONFIGS.items()}
IDS = torch.randint(3, 96, (4, 200), generator=torch.Generator().manual_seed(7))


def plan_of(size: str, *, seqs: int = 4, length: int = 200, bytes_per_value: int = 4):
    return sizing.kv_plan(
        CONFIGS[size].text_config,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=64,
        bytes_per_value=bytes_per_value,
        block_tokens=BLOCK,
    )


def new_cache(size: str, dtype: torch.dtype = torch.float32) -> PagedCache:
    model = MODELS[size]
    plan = plan_of(size, bytes_per_value=dtype.itemsize)
    return PagedCache(model.config, plan, dtype=dtype, k_from_v=model.k_from_v)


def run(size: str, cache: PagedCache, wanted: list[tuple[int, Pages, int]], rows=None):
    """One pass over (row of IDS, pages, tokens) each; logits of all tokens or of `rows`."""
    for _, pages, tokens in wanted:
        cache.blocks.extend(pages, tokens)
    step = cache.step([Chunk(pages, tokens) for _, pages, tokens in wanted])
    ids = torch.cat([IDS[row, p.length : p.length + n] for row, p, n in wanted])
    rows_R = None if rows is None else torch.tensor(rows, dtype=torch.long)
    logits = MODELS[size].logits(MODELS[size](ids, step.positions_T, step, rows_R=rows_R))
    for _, pages, tokens in wanted:
        cache.blocks.commit(pages, tokens)
    return logits


def alone(size: str, row: int, count: int) -> torch.Tensor:
    model = MODELS[size]
    store = NoCache(model.config, [count])
    return model.logits(model(IDS[row, :count], torch.arange(count), store))


@pytest.mark.parametrize("size", SIZES)
def test_packed_chunks_of_several_sequences_equal_each_alone(size):
    cache = new_cache(size)
    pages = [Pages() for _ in range(3)]
    got: list[list[torch.Tensor]] = [[], [], []]
    # Prefills beside decodes, chunks longer than the window, blocks left half full.
    for counts in ((5, 0, 17), (1, 9, 1), (1, 1, 1), (0, 30, 1), (11, 1, 1), (1, 1, 0), (3, 2, 6)):
        wanted = [(i, pages[i], n) for i, n in enumerate(counts) if n]
        parts = run(size, cache, wanted).split([n for n in counts if n])
        for (i, _, _), part in zip(wanted, parts, strict=True):
            got[i].append(part)
    for i in range(3):
        assert_close(torch.cat(got[i]), alone(size, i, pages[i].length), LIMIT)
    cache.blocks.check(pages)


@pytest.mark.parametrize("size", SIZES)
def test_rows_asked_for_are_those_of_the_whole(size):
    cache = new_cache(size)
    pages = [Pages() for _ in range(3)]
    wanted = [(0, pages[0], 11), (1, pages[1], 6), (2, pages[2], 1)]
    rows = run(size, cache, wanted, rows=[10, 17])
    assert_close(rows[:1], alone(size, 0, 11)[-1:], LIMIT)
    assert_close(rows[1:], alone(size, 2, 1)[-1:], LIMIT)
    # Nothing asked: K/V are stored all the same.
    assert run(size, cache, [(0, pages[0], 4)], rows=[]).shape[0] == 0
    assert_close(run(size, cache, [(0, pages[0], 1)]), alone(size, 0, 16)[-1:], LIMIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_values_are_stored_as_the_cache_of_one_sequence_stores_them(dtype):
    # Within the first window the ring has not turned: both read the same keys in one order.
    for size in SIZES:
        model, cache, pages = MODELS[size], new_cache(size, dtype), Pages()
        ring = RingCache(model.config, dtype=dtype, k_from_v=model.k_from_v)
        for count in (5, 1, 1):
            ids = IDS[0, ring.length : ring.length + count]
            with ring.step(count) as positions:
                theirs = model.logits(model(ids, positions, ring))
            assert torch.equal(run(size, cache, [(0, pages, count)]), theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("point", [1, 8, 12, 13, 30])
def test_a_branch_goes_on_like_a_sequence_of_its_own(size, point):
    cache, trunk = new_cache(size), Pages()
    run(size, cache, [(0, trunk, point)])
    branch = cache.branch(trunk, point)
    assert (branch.length, cache.blocks.full.held <= len(trunk.full.blocks) + 1) == (point, True)
    run(size, cache, [(0, trunk, 9)])
    other = IDS[1, point : point + 9]
    cache.blocks.extend(branch, 9)
    step = cache.step([Chunk(branch, 9)])
    ours = MODELS[size].logits(MODELS[size](other, step.positions_T, step))
    cache.blocks.commit(branch, 9)
    ids = torch.cat((IDS[0, :point], other))
    store = NoCache(MODELS[size].config, [point + 9])
    whole = MODELS[size].logits(MODELS[size](ids, torch.arange(point + 9), store))
    assert_close(ours, whole[point:], LIMIT)
    assert_close(run(size, cache, [(0, trunk, 1)]), alone(size, 0, point + 10)[-1:], LIMIT)
    cache.blocks.check([trunk, branch])
    cache.blocks.release(trunk)
    cache.blocks.release(branch)
    cache.blocks.check([])
    assert cache.blocks.full.held == cache.blocks.sliding.held == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_the_plans(size, dtype):
    cache = new_cache(size, dtype)
    assert cache.nbytes == cache.plan.nbytes


def test_tokens_that_are_not_committed_never_were():
    cache, pages = new_cache("E2B"), Pages()
    run("E2B", cache, [(0, pages, 13)])
    cache.blocks.extend(pages, 7)
    step = cache.step([Chunk(pages, 7)])
    MODELS["E2B"](IDS[3, :7], step.positions_T, step)
    assert_close(run("E2B", cache, [(0, pages, 2)]), alone("E2B", 0, 15)[-2:], LIMIT)


def test_windows_never_need_more_sliding_blocks_than_planned():
    plan = plan_of("E2B", seqs=3)
    blocks = Blocks(plan)
    pages = [Pages() for _ in range(3)]
    for step in range(60):
        counts = [(62, 1, 1), (1, 62, 1), (21, 21, 22), (1, 1, 1)][step % 4]
        for page, count in zip(pages, counts, strict=True):
            blocks.extend(page, min(count, 200 - page.length))
        for page, count in zip(pages, counts, strict=True):
            blocks.commit(page, min(count, 200 - page.length))
    blocks.check(pages)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_blocks_are_conserved_through_any_history(data):
    plan = replace(plan_of("E2B"), full_blocks=12, sliding_blocks=14)
    blocks, held = Blocks(plan), []
    for _ in range(data.draw(st.integers(1, 30))):
        act = data.draw(st.sampled_from(["new", "grow", "share", "release"]))
        if act == "new" or not held:
            held.append(Pages())
            continue
        pages = data.draw(st.sampled_from(held))
        if act == "grow":
            tokens = data.draw(st.integers(1, 12))
            before = (blocks.full.free, blocks.sliding.free)
            if blocks.room(blocks.lacking(pages, tokens)):
                blocks.extend(pages, tokens)
                blocks.commit(pages, data.draw(st.integers(0, tokens)))
                if data.draw(st.booleans()):
                    blocks.trim(pages)
                    assert blocks.lacking(pages, 0) == (0, 0)
                    whole = -(-pages.length // BLOCK)
                    assert (pages.full.stop, pages.sliding.stop) == (whole, whole)
            else:
                with pytest.raises(CapacityError, match="more blocks of full and sliding K/V"):
                    blocks.extend(pages, tokens)
                assert before == (blocks.full.free, blocks.sliding.free)
        elif act == "share":
            length = data.draw(st.integers(0, pages.length))
            if blocks.reaches(pages, length):
                held.append(blocks.share(pages, length))
        else:
            blocks.release(pages)
            held.remove(pages)
        blocks.check(held)
    for pages in held:
        blocks.release(pages)
    assert (blocks.full.free, blocks.sliding.free) == (12, 14)


def test_a_pool_gives_no_block_that_it_has_not():
    pool = BlockPool(3)
    taken = pool.take(2)
    with pytest.raises(CapacityError, match="2 blocks of K/V are needed and 1 of 3 are free"):
        pool.take(2)
    pool.hold(taken)
    pool.release(taken)
    assert pool.free == 1
    pool.release(taken)
    with pytest.raises(AssertionError, match=f"block {taken[0]} is free"):
        pool.release(taken[:1])


def test_other_formats_are_refused():
    with pytest.raises(ConfigError, match=r"K/V cannot be stored as torch\.float64"):
        PagedCache(MODELS["E2B"].config, plan_of("E2B"), dtype=torch.float64)


def test_a_budget_too_small_for_one_sequence_is_refused():
    with pytest.raises(CapacityError, match="cannot hold one sequence of 200 tokens"):
        sizing.kv_plan(
            CONFIGS["E2B"].text_config,
            max_model_len=200,
            max_num_seqs=2,
            max_num_batched_tokens=64,
            budget_bytes=20_000,
        )


def test_a_budget_is_never_exceeded_and_well_used():
    config = CONFIGS["12B"].text_config
    for budget in range(600_000, 6_000_000, 77_777):
        plan = sizing.kv_plan(
            config,
            max_model_len=200,
            max_num_seqs=3,
            max_num_batched_tokens=64,
            budget_bytes=budget,
            block_tokens=BLOCK,
        )
        block = sizing.kv_block_bytes(config, sliding=False, block_tokens=BLOCK)
        assert plan.nbytes <= budget
        assert plan.full_blocks == 150 or budget - plan.nbytes < block


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_attention_gives_a_token_the_same_bits_in_any_chunk(dtype):
    config = tiny_config("E2B", sliding_window=150).text_config  # wider than a kernel block
    plan = sizing.kv_plan(
        config,
        max_model_len=300,
        max_num_seqs=1,
        max_num_batched_tokens=300,
        bytes_per_value=dtype.itemsize,
        block_tokens=BLOCK,
    )
    generator = torch.Generator().manual_seed(3)
    for layer in (0, 1):
        heads = config.layers[layer].num_key_value_heads, config.layers[layer].head_dim
        q = torch.randn(300, config.num_attention_heads, heads[1], generator=generator) / 3
        k, v = (torch.randn(300, *heads, generator=generator) for _ in range(2))
        results = []
        for chunk in (30, 1, 7):
            cache, pages, outs = PagedCache(config, plan, dtype=dtype), Pages(), []
            for first in range(0, 300, chunk):
                part = slice(first, min(first + chunk, 300))
                tokens = part.stop - first
                cache.blocks.extend(pages, tokens)
                step = cache.step([Chunk(pages, tokens)])
                outs.append(step.attend(layer, q[part], k[part], v[part], None))
                cache.blocks.commit(pages, tokens)
            results.append(torch.cat(outs))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
