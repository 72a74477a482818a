"""Which blocks of K/V are free, and who holds the others. No tensors: see `paged` for those.

There are two pools, since a sliding layer forgets and a full layer does not. A block is
`block_tokens` consecutive tokens of one sequence in every layer of its kind. Blocks are written
once, at the end of a sequence, and never overwritten while somebody holds them: so any number of
sequences, or a prefix cache, may hold the same block.

    free + held = blocks, in each pool, at any time; at idle nothing is held.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gemsmith.errors import CapacityError
from gemsmith.sizing import KVPlan


class BlockPool:
    """Counts the holders of each of `blocks` blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        # Taken from the end: the same few blocks over and over, so that memory that was never
        # needed is never touched.
        self._free = list(reversed(range(blocks)))
        self._holders = [0] * blocks

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks with a holder, counted from the holders' side."""
        return sum(count > 0 for count in self._holders)

    def take(self, count: int) -> list[int]:
        """Blocks that were free, now held once.

        Raises:
          CapacityError: there are not so many; none is taken then.
        """
        if count > len(self._free):
            raise CapacityError(
                f"{count} blocks of K/V are needed and {len(self._free)} of {self.blocks} are free"
            )
        if not count:
            return []
        taken = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold blocks that somebody holds already once more."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Hold blocks once less; those that nobody holds are free."""
        # The first on top, so that whoever takes them has them in a row again.
        for block in reversed([*blocks]):
            assert self._holders[block] > 0, f"block {block} is free"
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def alone(self, block: int) -> bool:
        """Whether one holder has the block for itself."""
        return self._holders[block] == 1


@dataclass(slots=True)
class Table:
    """The blocks of one sequence in one pool: `blocks[i]` is number `first + i` of the sequence."""

    blocks: list[int] = field(default_factory=list)
    first: int = 0

    @property
    def stop(self) -> int:
        return self.first + len(self.blocks)


@dataclass(slots=True)
class Pages:
    """The K/V of one sequence: `length` tokens, in blocks of full and of sliding layers."""

    length: int = 0
    full: Table = field(default_factory=Table)
    sliding: Table = field(default_factory=Table)


class Blocks:
    """Gives sequences the blocks that their next tokens need, and takes back what left a window."""

    def __init__(self, plan: KVPlan) -> None:
        self.plan = plan
        self.full, self.sliding = BlockPool(plan.full_blocks), BlockPool(plan.sliding_blocks)

    def _kinds(self, pages: Pages) -> list[tuple[BlockPool, Table]]:
        kinds = [(self.full, pages.full), (self.sliding, pages.sliding)]
        return [(pool, table) for pool, table in kinds if pool.blocks]

    def lacking(self, pages: Pages, tokens: int) -> tuple[int, int]:
        """Blocks that `tokens` more tokens need beyond those held: full and sliding."""
        need = -(-(pages.length + tokens) // self.plan.block_tokens)
        full = need - pages.full.stop if self.full.blocks else 0
        return max(0, full), max(0, need - pages.sliding.stop) if self.sliding.blocks else 0

    def room(self, lacking: tuple[int, int]) -> bool:
        """Whether so many blocks, full and sliding, are free."""
        return lacking[0] <= self.full.free and lacking[1] <= self.sliding.free

    def extend(self, pages: Pages, tokens: int) -> None:
        """Take the blocks that `tokens` more tokens need.

        Raises:
          CapacityError: there are not so many; nothing is taken then.
        """
        lacking = self.lacking(pages, tokens)
        if not self.room(lacking):
            raise CapacityError(
                f"{tokens} tokens need {lacking} more blocks of full and sliding K/V, and "
                f"{(self.full.free, self.sliding.free)} are free"
            )
        pages.full.blocks += self.full.take(lacking[0])
        pages.sliding.blocks += self.sliding.take(lacking[1])

    def commit(self, pages: Pages, tokens: int) -> None:
        """Count `tokens` tokens, now written, and give back what no later token can see."""
        pages.length += tokens
        self.slide(pages)

    def trim(self, pages: Pages) -> None:
        """Give back the blocks beyond the last token, taken for some that were not kept."""
        stop = -(-pages.length // self.plan.block_tokens)
        for pool, table in self._kinds(pages):
            kept = max(0, stop - table.first)
            pool.release(table.blocks[kept:])
            del table.blocks[kept:]

    def slide(self, pages: Pages) -> None:
        """Give back the sliding blocks that no later token can see."""
        first = self.window_start(pages.length)
        slid = first - pages.sliding.first
        if slid > 0:
            self.sliding.release(pages.sliding.blocks[:slid])
            del pages.sliding.blocks[:slid]
            pages.sliding.first = first

    def window_start(self, length: int) -> int:
        """The first block of sliding layers that token number `length` or a later one sees."""
        if self.plan.window is None:
            return 0
        return max(0, length - self.plan.window + 1) // self.plan.block_tokens

    def release(self, pages: Pages) -> None:
        """Give everything back; the pages are empty then."""
        for pool, table in self._kinds(pages):
            pool.release(table.blocks)
            table.blocks, table.first = [], 0
        pages.length = 0

    def share(self, pages: Pages, length: int) -> Pages:
        """Hold the blocks that a sequence needs to go on after the first `length` tokens.

        They are not copied: whoever goes on in a block that is not full must copy it first, see
        `paged.PagedCache.branch`. Sliding blocks must reach back far enough, see `reaches`.
        """
        assert self.reaches(pages, length), "the window before that point is gone"
        shared, stop = Pages(length), -(-length // self.plan.block_tokens)
        firsts = (0, self.window_start(length))
        tables = ((shared.full, pages.full), (shared.sliding, pages.sliding))
        for pool, (new, old), first in zip((self.full, self.sliding), tables, firsts, strict=True):
            if pool.blocks:
                new.blocks, new.first = old.blocks[first - old.first : stop - old.first], first
                pool.hold(new.blocks)
        return shared

    def claim(self, length: int) -> Pages | None:
        """Pages for the first `length` tokens of a sequence, to be filled; of sliding layers for
        the window before that point alone. None if there are not so many blocks."""
        pages, stop, first = Pages(length), -(-length // self.plan.block_tokens), 0
        if self.sliding.blocks:
            first = pages.sliding.first = self.window_start(length)
        full, sliding = stop * bool(self.full.blocks), (stop - first) * bool(self.sliding.blocks)
        if not self.room((full, sliding)):
            return None
        pages.full.blocks, pages.sliding.blocks = self.full.take(full), self.sliding.take(sliding)
        return pages

    def reaches(self, pages: Pages, length: int) -> bool:
        """Whether sliding blocks still hold the window before token `length`."""
        return not self.sliding.blocks or pages.sliding.first <= self.window_start(length)

    def check(self, held: Iterable[Pages]) -> None:
        """Assert that blocks are conserved, with everybody who holds some.

        Prints the equation when it does not hold.
        """
        held = list(held)
        for name, pool in (("full", self.full), ("sliding", self.sliding)):
            counts = [0] * pool.blocks
            for pages in held:
                for block in getattr(pages, name).blocks:
                    counts[block] += 1
            assert counts == pool._holders, f"{name}: holders {pool._holders}, found {counts}"
            equation = f"{name}: {pool.free} free + {pool.held} held = {pool.blocks}"
            assert pool.free + pool.held == pool.blocks, equation
