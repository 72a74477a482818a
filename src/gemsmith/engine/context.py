"""The tokens one sequence consists of so far and their K/V; runs the model over new ones.

Kept after a request, so that a prompt which begins with the same tokens (the next message of a
conversation) computes only what is new.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gemsmith.cache.ring import FORMATS, RingCache
from gemsmith.engine.sampler import Floats, Ids, Sees
from gemsmith.errors import ConfigError
from gemsmith.model.text import Likeliest, Pass, TextModel
from gemsmith.ops.cpu_decoder import Part

CHUNK_TOKENS = 512
"""Prompt tokens run in one pass: enough for full speed, bounds the memory of activations."""

Soft = tuple[Tensor, Tensor]
"""(indices [M] into the tokens given, ascending; rows [M, D]), as `TextModel.forward` takes."""


def kv_format(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """How to store K/V of a model of `dtype` on `device`; "auto" is int8 on the CPU, where reading
    them is what a long context costs, and the model's dtype elsewhere.

    Raises:
      ConfigError: an unknown name.
    """
    if name == "auto":
        return torch.int8 if device.type == "cpu" else dtype
    if name not in FORMATS:
        raise ConfigError(f"kv {name!r}: must be one of auto, {', '.join(FORMATS)}")
    return FORMATS[name]


class Next:
    """What the model says of the next token, worked out as far as it is asked for.

    A whole row of logits is a megabyte that several passes go over; most samplers need few of them.
    """

    def __init__(
        self,
        model: TextModel,
        hidden_1D: Tensor,
        logits_V: Tensor | None = None,
        *,
        together: "Rows | None" = None,
        row: int = 0,
    ) -> None:
        """hidden_1D: of the token before. logits_V: where they are known already. together: the
        rows of one pass, of which this is `row`."""
        self._model, self.hidden_1D = model, hidden_1D
        self._logits_V = logits_V
        self._together, self._row = together, row

    @property
    @torch.inference_mode()
    def logits_V(self) -> Tensor:
        """All logits, float32 [V]."""
        if self._logits_V is None and self._together is not None:
            self._logits_V = self._together.logits(self._row)
        elif self._logits_V is None:
            self._logits_V = self._model.logits(self.hidden_1D)[0]
        return self._logits_V

    def likeliest(self, count: int, skipped: Tensor) -> tuple[Floats, Ids] | None:
        """The greatest `count` logits and their ids, or None: see `TextModel.likeliest`."""
        if self._logits_V is not None:
            return None
        rows = self._together or Rows(self._model, self.hidden_1D)
        return rows.likeliest(self._row, count, skipped)

    @torch.inference_mode()
    def logits_of(self, ids: Sequence[int]) -> Tensor:
        """The logits of some tokens alone, float32 [n]: what a step needs at which nothing else is
        allowed."""
        ids_n = torch.tensor(ids, device=self.hidden_1D.device)
        return self._model.logits_of(self.hidden_1D, ids_n)[0]


class Rows:
    """Rows of one pass, each asked for after the other: the head's weights are read once for what
    all of them are likely to be asked."""

    def __init__(
        self,
        model: TextModel,
        hidden_RD: Tensor,
        *,
        reach: int | None = 0,
        found: Likeliest | None = None,
    ) -> None:
        """reach: how many of the greatest logits some row may be asked for at least, if the same
        are skipped in all; None: some row is asked for all of them. found: those, if they are known
        already."""
        self._model, self.hidden_RD, self._reach = model, hidden_RD, reach
        self._logits_RV: Tensor | None = None
        self._likeliest: dict[int, Likeliest | None] = {}
        if reach and found is not None:
            self._likeliest[reach] = found

    def all(self) -> list[Next]:
        hidden = self.hidden_RD.split(1) if len(self.hidden_RD) > 1 else [self.hidden_RD]
        return [Next(self._model, h, together=self, row=row) for row, h in enumerate(hidden)]

    def logits(self, row: int) -> Tensor:
        if self._logits_RV is None:
            self._logits_RV = self._model.logits(self.hidden_RD)
        return self._logits_RV[row]

    def likeliest(self, row: int, count: int, skipped: Tensor) -> tuple[Floats, Ids] | None:
        if self._reach is None:
            return None
        most = max(count, self._reach)
        if most not in self._likeliest:
            self._likeliest[most] = self._find(most, skipped)
        found = self._likeliest[most]
        return None if found is None else (found[0][row, :count], found[1][row, :count])

    @torch.inference_mode()
    def _find(self, count: int, skipped: Tensor) -> Likeliest | None:
        return self._model.likeliest(self.hidden_RD, count, skipped)


def read(
    model: TextModel,
    ids: list[int],
    parts: Sequence[Part],
    kv: Pass,
    sees: Sequence[Sees | None],
    soft: Soft | None = None,
) -> Rows:
    """One pass: what follows the tokens that ask, see `TextModel.read`. sees: what their choices
    may depend on; the head's weights are to be read once."""
    first = sees[0] if sees else None
    # The same object: they are thousands, and one engine skips two sets of them at most.
    same = [each for each in sees if each and first and each.skipped is first.skipped]
    reach = max((each.reach for each in same), default=0) if len(same) == len(sees) else None
    skipped = first.skipped_n if first else None
    hidden_RD, found = model.read(ids, parts, kv, soft=soft, count=reach or 0, skipped=skipped)
    return Rows(model, hidden_RD, reach=reach, found=found)


class Context:
    """One growing sequence on one model."""

    def __init__(self, model: TextModel, kv: torch.dtype | None = None) -> None:
        """kv: how K/V are stored, see `cache.ring.FORMATS`; None: as `kv_format` chooses."""
        weight: Any = model.embed_tokens.weight
        self.model, self.device = model, weight.device
        self.keys: list[Hashable] = []
        """The tokens that K/V are held for: ids, and what else identifies a soft token."""
        self.whole = True
        """False once a pass was cut off; such a context is not to be used again."""
        self._verified: list[int] = []
        self._cache = RingCache(
            model.config,
            dtype=kv or kv_format("auto", weight.dtype, weight.device),
            device=weight.device,
            k_from_v=model.k_from_v,
        )

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @property
    def kv(self) -> RingCache:
        """What a drafter may read between two passes."""
        return self._cache

    @torch.inference_mode()
    def reserve(self, tokens: int) -> None:
        """Allocate for `tokens` tokens in all.

        Raises:
          CapacityError: no memory for them.
        """
        self._cache.reserve(tokens)

    @torch.inference_mode()
    def rewind_for(self, keys: Sequence[Hashable]) -> int:
        """Keep only what `keys` begins with, its last token excepted; returns the tokens kept.

        The last token must run again for its logits. Where sliding layers no longer hold what lies
        before the point of difference, nothing can be kept.
        """
        common = 0
        for held, new in zip(self.keys, keys[:-1], strict=False):
            if held != new:
                break
            common += 1
        if not self._cache.can_trim(common):
            common = 0
        self._cache.trim(common)
        del self.keys[common:]
        return common

    def run(
        self,
        ids: Sequence[int],
        *,
        keys: Sequence[Hashable] | None = None,
        soft: Soft | None = None,
        blocks_T: Tensor | None = None,
    ) -> Tensor:
        """`step`, and the logits [V] after the last token, float32."""
        return self.step(ids, keys=keys, soft=soft, blocks_T=blocks_T).logits_V

    @torch.inference_mode()
    def step(
        self,
        ids: Sequence[int],
        *,
        keys: Sequence[Hashable] | None = None,
        soft: Soft | None = None,
        blocks_T: Tensor | None = None,
        sees: Sees | None = None,
    ) -> Next:
        """Append tokens (at least one); returns what the model says of the one after them.

        keys: by which they are known to `rewind_for`, if not by their ids. soft: tokens that stand
        for an image or a sound. blocks_T: see `ops.attention.causal_attention`. sees: of what the
        model says, what is going to be asked for, if that is known.
        """
        rows: list[Next] = []
        for start, stop in _chunks(len(ids), blocks_T):
            last = stop == len(ids)
            # Layers without K/V of their own run at the prompt's last token only.
            rows = self._pass(
                ids[start:stop],
                (keys or ids)[start:stop],
                int(last),
                between(soft, start, stop),
                None if blocks_T is None else blocks_T[start:stop],
                sees=sees if last else None,
            ).all()
        return rows[0]

    @torch.inference_mode()
    def verify(
        self, ids: Sequence[int], drafts: Sequence[int], sees: Sees | None = None
    ) -> list[Next]:
        """Run over `ids` (at least one) and drafts (at least one) of what follows, in one pass.

        Returns what the model says after the last of ids and after each draft. The context stays
        as it was until `keep` tells how many of all these tokens are part of the text.
        """
        tokens = [*ids, *drafts]
        rows = self._pass(tokens, (), 1 + len(drafts), None, None, left_open=True, sees=sees)
        self._verified = tokens
        return rows.all()

    @torch.inference_mode()
    def keep(self, count: int) -> None:
        """Append the first `count` tokens that `verify` ran over; the others never were."""
        self.whole = False
        self._cache.commit(count)
        self.keys += self._verified[:count]
        self._verified = []
        self.whole = True

    @torch.no_grad()  # not inference mode: the caller may change what it gets
    def scan(
        self,
        ids: Sequence[int],
        *,
        block: int = CHUNK_TOKENS,
        keys: Sequence[Hashable] | None = None,
        soft: Soft | None = None,
        blocks_T: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Append tokens (at least one); yields the logits after each, float32 [<= block, V].

        No more than one block of them is in memory. keys, soft, blocks_T: as in `run`.
        """
        for start, stop in _chunks(len(ids), blocks_T):
            rows = self._pass(
                ids[start:stop],
                (keys or ids)[start:stop],
                stop - start,
                between(soft, start, stop),
                None if blocks_T is None else blocks_T[start:stop],
            )
            for hidden_RD in rows.hidden_RD.split(block):
                yield self.model.logits(hidden_RD)

    def _pass(
        self,
        ids: Sequence[int],
        keys: Sequence[Hashable],
        asks: int,
        soft: Soft | None,
        blocks_T: Tensor | None,
        *,
        left_open: bool = False,
        sees: Sees | None = None,
    ) -> Rows:
        """What follows the last of ids, as many as ask, after a pass over them."""
        self.whole = False
        with self._cache.step(len(ids), blocks_T, left_open=left_open):
            wanted = [] if sees is None else [sees]
            rows = read(self.model, list(ids), [(len(ids), asks)], self._cache, wanted, soft)
        self.keys += keys
        self.whole = True
        return rows


def _chunks(tokens: int, blocks_T: Tensor | None) -> Iterator[tuple[int, int]]:
    """Cuts 0..tokens into passes of CHUNK_TOKENS, longer where a block would be cut in two."""
    stop = 0
    while stop < tokens:
        start, stop = stop, min(stop + CHUNK_TOKENS, tokens)
        if blocks_T is not None and stop < tokens and blocks_T[stop - 1] >= 0:
            stop += int((blocks_T[stop:] == blocks_T[stop - 1]).sum())
        yield start, stop


def between(soft: Soft | None, start: int, stop: int) -> Soft | None:
    """The soft tokens among start..stop-1, counted from start."""
    if soft is None:
        return None
    at_M, rows_MD = soft
    first, last = (int(i) for i in torch.searchsorted(at_M, torch.tensor([start, stop]).to(at_M)))
    return (at_M[first:last] - start, rows_MD[first:last]) if first < last else None
