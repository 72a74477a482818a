"""K/V kept after use, for prompts that begin like an earlier one: the next turn, a retry, a branch.

What is kept are checkpoints: the first `length` tokens of a sequence, as the blocks of full layers
before that point and the blocks of sliding layers that hold the window before it. Blocks are held
by count, never copied (save the last, half full, when a sequence goes on from there), so that ten
checkpoints of a conversation cost little more than the longest. A checkpoint is found by the exact
tokens before it, and by a salt: whoever has another salt finds nothing. Full layers alone would do
between checkpoints, but sliding layers have forgotten what a token there saw; that is a miss, and
said to be one.

A hit gives the K/V that a cold run would compute: where kernels give a token the same bits in any
chunk, logits are equal to the bit, whatever other requests ran beside either. That is on the CPU
with int8 K/V, and weights of few bits, or bfloat16 ones where `ops.linear.bfloat16_rows_are_alone`.
Elsewhere (a GPU, float K/V, float32 weights, a CPU whose bfloat16 products are torch's) they may
differ as sums in another order do.

Legend: keys are token ids, and what tells one picture from another where soft tokens stand.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from gemsmith.cache.block_pool import Pages
from gemsmith.cache.paged import PagedCache
from gemsmith.cache.stored import Store, extended
from gemsmith.errors import CapacityError

REMEMBERED = 65536
"""Digests of blocks whose checkpoints were given up: only to say so."""


class Miss(StrEnum):
    """Why a prompt, or the rest of it, has to be computed."""

    NEW = "new"
    """Nothing that begins so was ever kept under this salt."""
    DIVERGED = "diverged"
    """It goes on other than what is kept, and no checkpoint is where they part."""
    EVICTED = "evicted"
    """It was kept, and given up for the room."""
    FULL = "full"
    """No block is free to go on in the middle of a block."""


WHY = {
    Miss.NEW: "nothing that begins so is kept for this key",
    Miss.DIVERGED: "what is kept goes on otherwise, and no turn ends where they part",
    Miss.EVICTED: "it was kept, and given up when others needed the room",
    Miss.FULL: "no block of K/V was free to go on from what is kept",
}


@dataclass(slots=True, eq=False)
class _Checkpoint:
    digests: tuple[bytes, ...]
    """Of the whole blocks before it, each of all tokens up to there."""
    tail: tuple[Hashable, ...]
    """Keys beyond the last whole block."""
    pages: Pages
    hits: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What a prompt need not compute, and why not more."""

    pages: Pages
    """Held for the caller, `pages.length` tokens; empty if nothing was found."""
    miss: Miss | None
    """None if there is nothing left but what is new in this prompt."""
    known: int
    """Tokens at the beginning that are kept under this salt, or were, in whole blocks: the next
    differs, or was never there. More than `pages.length` where no turn ends there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """What the cache had for one request, to tell people; nothing of what the request says."""

    at: float
    """Seconds, see `time.time`."""
    tenant: str
    prompt_tokens: int
    cached_tokens: int
    """Those that needed no computing."""
    known_tokens: int
    """See `Found.known`."""
    miss: Miss | None


class Chain:
    """Digests of a growing sequence of keys, a block at a time: each covers all before it."""

    def __init__(self, salt: str, block_tokens: int) -> None:
        self._size = block_tokens
        self._digests = [hashlib.blake2b(salt.encode(), digest_size=16).digest()]

    def upto(self, keys: Sequence[Hashable], blocks: int) -> list[bytes]:
        """That of nothing, and those of the first `blocks` blocks; earlier keys must not change."""
        for block in range(len(self._digests) - 1, blocks):
            next_keys = keys[block * self._size : (block + 1) * self._size]
            self._digests.append(extended(self._digests[-1], next_keys))
        return self._digests[: blocks + 1]

    def same(
        self,
        keys: Sequence[Hashable],
        other: "Chain",
        others: Sequence[Hashable],
        length: int,
    ) -> bool:
        """Whether another sequence has the same first `length` keys and salt; both have so many."""
        whole = length // self._size
        rest = slice(whole * self._size, length)
        same_blocks = self.upto(keys, whole)[-1] == other.upto(others, whole)[-1]
        return same_blocks and keys[rest] == others[rest]


class PrefixCache:
    """Checkpoints; the first to go are those that a prompt has passed and that no two went on from,
    then the least recently used.

    So of a conversation that grows the newest ends stay, which its next turn goes on from, and what
    many begin with. By last use alone many conversations that take turns, a little more than there
    is room for, would each find its own just given up.
    """

    def __init__(
        self, cache: PagedCache, *, max_checkpoints: int = 4096, store: Store | None = None
    ) -> None:
        """max_checkpoints: bounds the time of `evict` and the memory beside the blocks. store: what
        is kept is written to, and looked for where memory has less."""
        self._cache, self._max, self._store = cache, max_checkpoints, store
        self._checkpoints: OrderedDict[_Checkpoint, None] = OrderedDict()
        self._at: dict[bytes, list[_Checkpoint]] = {}
        """By the digest of their last whole block."""
        self._kept: Counter[bytes] = Counter()
        """How many checkpoints reach beyond each block."""
        self._gone: OrderedDict[bytes, None] = OrderedDict()
        self.evictions = self.restored = 0

    def __len__(self) -> int:
        return len(self._checkpoints)

    def pages(self) -> list[Pages]:
        """What checkpoints hold, to check that blocks are conserved."""
        return [checkpoint.pages for checkpoint in self._checkpoints]

    def keep(
        self,
        keys: Sequence[Hashable],
        chain: Chain,
        pages: Pages,
        length: int,
        *,
        passed: bool = True,
    ) -> bool:
        """Keep the first `length` tokens of a sequence that has computed them; False where its
        sliding layers no longer hold the window before that point.

        keys, chain: of the sequence, at least as far. passed: whether shorter beginnings of the
        same are needed less from now on; not so at the end of a reply, which the next prompt may
        leave out.
        """
        if not 0 < length <= pages.length or not self._cache.blocks.reaches(pages, length):
            return False
        size = self._cache.plan.block_tokens
        digests = chain.upto(keys, length // size)
        tail = tuple(keys[length // size * size : length])
        if passed:
            self._pass(digests, keys, length)
        for same in self._at.get(digests[-1], ()):
            if same.tail == tail:
                self._checkpoints.move_to_end(same)
                return True
        held = self._cache.blocks.share(pages, length)
        self._add(_Checkpoint(tuple(digests), tail, held))
        if self._store is not None:
            self._store.write(digests, keys, length, partial(self._cache.copy_out, held))
        return True

    def _pass(self, digests: list[bytes], keys: Sequence[Hashable], length: int) -> None:
        """Let those before `length` go before others, but for what two or more went on from: the
        longest first, as fewest begin so."""
        size = self._cache.plan.block_tokens
        for blocks, digest in enumerate(digests):
            for each in self._at.get(digest, ()):
                stop = each.pages.length
                begins = each.tail == tuple(keys[blocks * size : stop])
                if stop < length and each.hits < 2 and begins:
                    self._checkpoints.move_to_end(each, last=False)

    def _add(self, checkpoint: _Checkpoint) -> None:
        if len(self._checkpoints) >= self._max:
            self.evict()
        self._checkpoints[checkpoint] = None
        self._at.setdefault(checkpoint.digests[-1], []).append(checkpoint)
        self._kept.update(checkpoint.digests[1:])

    def find(self, keys: Sequence[Hashable], chain: Chain, *, stored: bool = True) -> Found:
        """The longest checkpoint that the keys begin with, at least one key left to compute.

        Its pages are the caller's to release. stored: whether to look in the store as well.
        """
        size, most = self._cache.plan.block_tokens, len(keys) - 1
        digests = chain.upto(keys, max(0, most) // size)
        best = self._longest(digests, keys, most)
        if self._store is not None and stored:
            best = self._restore(self._store, digests, keys, most, best)
        return self._hit(best, digests) if best else Found(Pages(), *self._missed(digests, 0))

    def _longest(
        self, digests: list[bytes], keys: Sequence[Hashable], most: int
    ) -> _Checkpoint | None:
        """The longest checkpoint in memory of at most `most` keys that these begin with."""
        size = self._cache.plan.block_tokens
        for blocks in reversed(range(len(digests))):
            best, rest = None, keys[blocks * size : most]
            for checkpoint in self._at.get(digests[blocks], ()):
                tail = checkpoint.tail
                longer = best is None or len(tail) > len(best.tail)
                if longer and tail == tuple(rest[: len(tail)]):
                    best = checkpoint
            if best is not None and best.pages.length:
                return best
        return None

    def _restore(
        self,
        store: Store,
        digests: list[bytes],
        keys: Sequence[Hashable],
        most: int,
        best: _Checkpoint | None,
    ) -> _Checkpoint | None:
        """The longest checkpoint that can be read from the store, in memory again; what memory has
        where that is as long, or where there is no room."""
        blocks, size = self._cache.blocks, self._cache.plan.block_tokens
        while True:
            line = store.find(digests, keys, most)
            if not line or line[-1].length <= (best.pages.length if best else 0):
                return best
            stored = store.read(line)
            if stored is not None:
                break  # what cannot be read is not found again
        length = line[-1].length
        while (pages := blocks.claim(length)) is None:
            if not self.evict():
                return None
        start = 0
        for entry, tensors in zip(line, stored, strict=True):
            self._cache.copy_in(pages, start, entry.length, tensors)
            start = entry.length
        whole = length // size
        tail = tuple(keys[whole * size : length])
        restored = _Checkpoint(tuple(digests[: whole + 1]), tail, pages)
        self._add(restored)
        self.restored += 1
        return restored

    def _hit(self, checkpoint: _Checkpoint, digests: list[bytes]) -> Found:
        length = checkpoint.pages.length
        self._checkpoints.move_to_end(checkpoint)
        while True:
            try:
                pages = self._cache.branch(checkpoint.pages, length)
            except CapacityError:
                if len(self) == 1:  # itself
                    return Found(Pages(), Miss.FULL, length)
                self.evict()
            else:
                checkpoint.hits += 1
                return Found(pages, *self._missed(digests, length))

    def _missed(self, digests: list[bytes], length: int) -> tuple[Miss | None, int]:
        """Why the whole blocks of a prompt beyond `length` were not found, and `Found.known`."""
        size = self._cache.plan.block_tokens
        for blocks in range(len(digests) - 1, length // size, -1):
            if digests[blocks] in self._kept:
                return Miss.DIVERGED, blocks * size
            if digests[blocks] in self._gone:
                return Miss.EVICTED, blocks * size
        return (None if length else Miss.NEW), length

    def evict(self) -> bool:
        """Give up the checkpoint that was not used for longest; False if there is none."""
        if not self._checkpoints:
            return False
        checkpoint, _ = self._checkpoints.popitem(last=False)
        self._cache.blocks.release(checkpoint.pages)
        last = checkpoint.digests[-1]
        self._at[last].remove(checkpoint)
        if not self._at[last]:
            del self._at[last]
        for digest in checkpoint.digests[1:]:
            self._kept[digest] -= 1
            if not self._kept[digest]:
                del self._kept[digest]
                self._gone[digest] = None
        while len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        self.evictions += 1
        return True

    def clear(self) -> None:
        """Give everything up."""
        while self.evict():
            pass
