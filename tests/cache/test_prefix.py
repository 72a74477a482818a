"""What the prefix cache finds, why it does not, and that it holds no block too many."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsmith import sizing
from gemsmith.cache.block_pool import Pages
from gemsmith.cache.none import NoCache
from gemsmith.cache.paged import Chunk, PagedCache
from gemsmith.cache.prefix import Chain, Miss, PrefixCache
from gemsmith.testing import SIZES, assert_close, random_model, tiny_config, tolerance

# Eight reductions a layer in eight layers.
LIMIT = tolerance(torch.float32, 64, steps=64)
WINDOW, BLOCK = 8, 4
CONFIGS = {size: tiny_config(size, sliding_window=WINDOW) for size in SIZES}
MODELS = {size: random_model(config) for size, config in CONFIGS.items()}


def new_cache(size: str = "E2B", **changes) -> PagedCache:
    plan = sizing.kv_plan(
        CONFIGS[size].text_config,
        max_model_len=100,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        cached_windows=8,
        bytes_per_value=4,
        block_tokens=BLOCK,
    )
    model = MODELS[size]
    plan = replace(plan, **changes)
    return PagedCache(model.config, plan, dtype=torch.float32, k_from_v=model.k_from_v)


class Conversation:
    """Keys, their chain and their pages; tokens are counted, not computed."""

    def __init__(self, cache: PagedCache, keys, salt: str = "") -> None:
        self.cache, self.keys, self.pages = cache, list(keys), Pages()
        self.chain = Chain(salt, BLOCK)

    def compute(self, stop: int | None = None) -> "Conversation":
        tokens = (len(self.keys) if stop is None else stop) - self.pages.length
        self.cache.blocks.extend(self.pages, tokens)
        self.pages.length += tokens
        return self

    def keep(self, prefix: PrefixCache, length: int) -> bool:
        return prefix.keep(self.keys, self.chain, self.pages, length)

    def leave(self) -> None:
        self.cache.blocks.release(self.pages)


def kept(cache: PagedCache, prefix: PrefixCache, keys, *lengths: int, salt: str = "") -> None:
    conversation = Conversation(cache, keys, salt).compute()
    for length in lengths or (len(conversation.keys),):
        assert conversation.keep(prefix, length)
    conversation.leave()


def found(cache: PagedCache, prefix: PrefixCache, keys, salt: str = "") -> tuple[int, Miss | None]:
    result = prefix.find(list(keys), Chain(salt, BLOCK))
    length = result.pages.length
    cache.blocks.check([*prefix.pages(), result.pages])
    cache.blocks.release(result.pages)
    return length, result.miss


def test_the_longest_checkpoint_is_found_and_the_last_token_is_left():
    cache = new_cache()
    prefix = PrefixCache(cache)
    kept(cache, prefix, range(30), 9, 17, 30)
    assert found(cache, prefix, range(40)) == (30, None)
    assert found(cache, prefix, range(30)) == (17, Miss.DIVERGED)
    assert found(cache, prefix, [*range(16), 99, 98]) == (9, Miss.DIVERGED)
    assert found(cache, prefix, range(17)) == (9, Miss.DIVERGED)
    assert found(cache, prefix, range(18)) == (17, None)


def test_every_miss_says_why():
    cache = new_cache()
    prefix = PrefixCache(cache)
    assert found(cache, prefix, range(40)) == (0, Miss.NEW)
    kept(cache, prefix, range(30))
    assert found(cache, prefix, range(1, 40)) == (0, Miss.NEW)
    assert found(cache, prefix, [*range(20), 99, 98]) == (0, Miss.DIVERGED)
    prefix.clear()
    assert found(cache, prefix, range(40)) == (0, Miss.EVICTED)
    assert prefix.evictions == 1
    kept(cache, prefix, range(30))
    cache.blocks.full.take(cache.blocks.full.free)
    result = prefix.find(range(40), Chain("", BLOCK))
    assert (result.pages.length, result.miss) == (0, Miss.FULL)


def test_others_give_way_to_whoever_goes_on_in_the_middle_of_a_block():
    cache = new_cache()
    prefix = PrefixCache(cache)
    kept(cache, prefix, range(30))
    kept(cache, prefix, range(100, 120))
    cache.blocks.full.take(cache.blocks.full.free)
    assert prefix.find(range(40), Chain("", BLOCK)).pages.length == 30
    assert prefix.evictions == 1


def test_what_a_prompt_has_passed_goes_first_unless_two_went_on_from_it():
    cache = new_cache()
    prefix = PrefixCache(cache)
    kept(cache, prefix, range(200, 230))  # used longest ago, and the end of what it is
    kept(cache, prefix, range(50), 9, 17, 30, 50)
    for _ in range(2):
        assert found(cache, prefix, [*range(9), 99, 98])[0] == 9
    left = []
    while prefix.evict():
        ends = [(range(200, 240), 30), (range(60), 50), (range(31), 30), (range(18), 17),
                ([*range(9), 99, 98], 9)]  # fmt: skip
        left.append([length for keys, length in ends if known(prefix, keys) == length])
    assert left == [[30, 50, 17, 9], [30, 50, 9], [50, 9], [9], []]


def known(prefix: PrefixCache, keys) -> int:
    """Tokens of the longest checkpoint that `find` would find; it is not used by that."""
    keys, most = list(keys), len(keys) - 1
    best = prefix._longest(Chain("", BLOCK).upto(keys, most // BLOCK), keys, most)
    return best.pages.length if best else 0


def test_the_end_of_a_reply_does_not_push_out_the_prompt_before_it():
    cache = new_cache()
    prefix = PrefixCache(cache)
    conversation = Conversation(cache, range(40)).compute()
    kept(cache, prefix, range(100, 120))
    assert conversation.keep(prefix, 30)
    assert prefix.keep(conversation.keys, conversation.chain, conversation.pages, 40, passed=False)
    conversation.leave()
    assert prefix.evict()
    assert (known(prefix, range(130)), known(prefix, range(31))) == (40, 30)
    assert known(prefix, range(100, 130)) == 0


def test_conversations_that_take_turns_find_their_newest_ends_in_little_room():
    """Eight of them, with room for about two checkpoints of each and no more."""
    cache = new_cache(full_blocks=400, sliding_blocks=8 * 6)
    prefix = PrefixCache(cache)
    shared = list(range(20))
    ends = [[*shared, 100 + i] for i in range(8)]
    for _turn in range(5):
        for i, keys in enumerate(ends):
            hit = prefix.find([*keys, 7], Chain("", BLOCK))
            grown = Conversation(cache, keys + [7] * 9 + [8] * 8)
            assert hit.pages.length in ((len(keys),) if _turn else (0, 20)), (_turn, i)
            grown.pages = hit.pages
            while not cache.blocks.room(
                cache.blocks.lacking(grown.pages, len(grown.keys) - grown.pages.length)
            ):
                assert prefix.evict()
            start = grown.pages.length
            grown.compute()
            for end in (20, len(keys) + 9, len(grown.keys)):
                if start < end:
                    grown.keep(prefix, end)
            grown.leave()
            ends[i] = grown.keys
    prefix.clear()
    assert (cache.blocks.full.held, cache.blocks.sliding.held) == (0, 0)


def test_a_miss_says_up_to_where_it_is_known():
    cache = new_cache()
    prefix = PrefixCache(cache)

    def known(keys) -> tuple[int, int]:
        result = prefix.find(list(keys), Chain("", BLOCK))
        length = result.pages.length
        cache.blocks.release(result.pages)
        return length, result.known

    kept(cache, prefix, range(40), 9, 30)
    # In whole blocks, of which the last key of a prompt is in none.
    for keys, expected in (
        (range(50), (30, 30)),
        ([*range(21), 99, 98, 97], (9, 20)),
        (range(25), (9, 24)),
        ([0, 99, 98, 97, 96], (0, 0)),
    ):
        assert known(keys) == expected, keys
    prefix.evict()
    prefix.evict()
    assert known(range(50)) == (0, 28)


def test_another_salt_or_another_picture_finds_nothing():
    cache = new_cache()
    prefix = PrefixCache(cache)
    keys = [*range(10), *((b"cat", i) for i in range(8)), *range(6)]
    kept(cache, prefix, keys, salt="anna")
    assert found(cache, prefix, [*keys, 1], salt="anna") == (24, None)
    assert found(cache, prefix, [*keys, 1], salt="otto") == (0, Miss.NEW)
    other = [*range(10), *((b"dog", i) for i in range(8)), *range(6), 1]
    assert found(cache, prefix, other, salt="anna") == (0, Miss.DIVERGED)


def test_a_window_that_is_gone_cannot_be_kept():
    cache = new_cache()
    prefix, conversation = PrefixCache(cache), Conversation(cache, range(60)).compute()
    cache.blocks.slide(conversation.pages)
    assert conversation.keep(prefix, 60)
    assert conversation.keep(prefix, 30) is False
    assert conversation.keep(prefix, 61) is False
    assert len(prefix) == 1


def test_checkpoints_of_a_conversation_share_their_blocks():
    cache = new_cache()
    prefix = PrefixCache(cache)
    kept(cache, prefix, range(80), *range(8, 81, 8))
    assert cache.blocks.full.held == 20
    assert cache.blocks.sliding.held == 20


def test_the_least_recently_used_goes_first_and_all_can_go():
    cache = new_cache()
    prefix = PrefixCache(cache, max_checkpoints=3)
    for first in (0, 100, 200):
        kept(cache, prefix, range(first, first + 20))
    found(cache, prefix, range(30))
    kept(cache, prefix, range(300, 320))
    assert found(cache, prefix, range(100, 130)) == (0, Miss.EVICTED)
    assert [found(cache, prefix, range(f, f + 30))[0] for f in (0, 200, 300)] == [20, 20, 20]
    prefix.clear()
    assert not prefix.evict()
    assert (cache.blocks.full.held, cache.blocks.sliding.held) == (0, 0)


def test_keeping_the_same_point_again_keeps_it_once():
    cache = new_cache()
    prefix = PrefixCache(cache)
    for _ in range(3):
        kept(cache, prefix, range(20), 13)
    assert len(prefix) == 1
    assert prefix.evict()
    assert cache.blocks.full.held == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("point", [6, 8, 13, 29])
def test_going_on_from_a_checkpoint_equals_the_whole(size, point):
    model, cache = MODELS[size], new_cache(size)
    prefix = PrefixCache(cache)
    ids = torch.randint(3, 96, (2, 45), generator=torch.Generator().manual_seed(point))
    ids[1, :point] = ids[0, :point]

    def run(pages: Pages, row: int, stop: int) -> torch.Tensor:
        tokens = stop - pages.length
        cache.blocks.extend(pages, tokens)
        step = cache.step([Chunk(pages, tokens)])
        logits = model.logits(model(ids[row, pages.length : stop], step.positions_T, step))
        pages.length = stop
        prefix.keep(ids[row].tolist(), Chain("", BLOCK), pages, min(stop, point))
        cache.blocks.slide(pages)
        return logits

    # The point lies inside a longer chunk: its window is kept as the chunk passes.
    first = Pages()
    run(first, 0, 40)
    cache.blocks.release(first)
    hit = prefix.find(ids[1].tolist(), Chain("", BLOCK))
    assert hit.pages.length == point
    ours = run(hit.pages, 1, 45)
    store = NoCache(model.config, [45])
    assert_close(ours, model.logits(model(ids[1], torch.arange(45), store))[point:], LIMIT)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_history_finds_the_longest_that_is_kept_and_conserves_blocks(data):
    cache = new_cache(full_blocks=60, sliding_blocks=60)
    prefix = PrefixCache(cache, max_checkpoints=1000)
    texts = [[0] * n + [b] * m + [c] * 6 for n in (0, 5, 9) for b in (1, 2) for m in (4, 7)
             for c in (3, 4)]  # fmt: skip
    known: set[tuple[int, ...]] = set()
    for _ in range(data.draw(st.integers(1, 12))):
        keys = data.draw(st.sampled_from(texts))
        act = data.draw(st.sampled_from(["keep", "find", "clear"]))
        if act == "keep":
            length = data.draw(st.integers(1, len(keys)))
            conversation = Conversation(cache, keys)
            while not cache.blocks.room(cache.blocks.lacking(conversation.pages, len(keys))):
                prefix.evict()
                known = {tuple(_keys(c, texts)) for c in prefix._checkpoints}
            conversation.compute()
            assert conversation.keep(prefix, length)
            conversation.leave()
            known.add(tuple(keys[:length]))
        elif act == "find":
            best = max(
                (len(k) for k in known if len(k) < len(keys) and tuple(keys[: len(k)]) == k),
                default=0,
            )
            assert found(cache, prefix, keys)[0] == best
        elif data.draw(st.booleans()):
            prefix.clear()
            known.clear()
        cache.blocks.check(prefix.pages())


def _keys(checkpoint, texts) -> list[int]:
    """The keys of a checkpoint, from the text whose chain it has."""
    length = checkpoint.pages.length
    for text in texts:
        digests = Chain("", BLOCK).upto(text, length // BLOCK)
        tail = tuple(text[length // BLOCK * BLOCK : length])
        if tuple(digests) == checkpoint.digests and tail == checkpoint.tail:
            return text[:length]
    raise AssertionError("a checkpoint of no text")
