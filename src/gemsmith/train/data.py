"""Training data: which tokens are learned, and packed batches of whole conversations.

A data set is four flat files a split, memory-mapped, written once by a recipe:
  {split}.ids.npy      uint16 or int32 [N]   token ids, conversations one after another
  {split}.mask.npy     uint8 [N]             weight of the token's loss, 0 where it is not learned
  {split}.offsets.npy  int64 [C + 1]         conversation c is ids[offsets[c]:offsets[c + 1]]
  {split}.kinds.json   (optional)            {"names": [...], "kinds": [C indices into names]}
and two more where conversations have pictures or sounds; see train.media.

A batch is `batch_tokens` packed tokens: whole conversations and, in the little room that is left,
padding as a sequence of its own. Its size never changes, which torch.compile needs. Tokenizing
and rendering happen elsewhere.

Its pictures have at most MAX_PATCHES patches, so that steps stay even in memory and time.

Shapes: T packed tokens of a batch, R rows whose next token is learned, C conversations.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gemsmith.errors import TrainError
from gemsmith.train.media import MediaSet, SoftInputs

OPEN_BINS = 16
"""Batches filled side by side; more waste less padding and shuffle a little less."""
MAX_PATCHES = 10_080
"""Patches of a batch: one picture of the largest budget, 1120 soft tokens, or 16 of the smallest,
which with their questions fill 4096 tokens."""


def model_turn_mask(
    ids: Sequence[int],
    *,
    model_prefix: Sequence[int],
    turn_end: int,
    response_start: int,
    response_end: int,
) -> np.ndarray:
    """uint8 [N], 1 where the token is one that the model has to emit.

    That is all that follows `<|turn>model\\n` (`model_prefix`) up to and including `<turn|>`:
    thoughts, calls and the `<|tool_response>` that ends a call. What the runtime writes is left
    out: bodies of tool responses and their `<tool_response|>`. A response that directly follows
    another was opened by the runtime too, so its opener is left out as well.
    """
    prefix = tuple(model_prefix)
    mask = np.zeros(len(ids), np.uint8)
    in_turn = in_response = False
    start = 0  # first token after the newest model prefix
    for i, token in enumerate(ids):
        if not in_turn:
            if tuple(ids[i + 1 - len(prefix) : i + 1]) == prefix:
                in_turn, in_response, start = True, False, i + 1
            continue
        if in_response:
            in_response = token != response_end
            continue
        by_runtime = token == response_start and i > start and ids[i - 1] == response_end
        mask[i] = not by_runtime
        in_response = token == response_start
        in_turn = token != turn_end
    return mask


class TokenSet:
    """One split of a data set, memory-mapped."""

    def __init__(self, folder: str | Path, split: str) -> None:
        """Open the files of `split`.

        Raises:
          TrainError: a file is missing, or the three do not belong together.
        """
        folder = Path(folder)
        self.name = f"{folder}/{split}"
        try:
            self.ids, self.mask, self.offsets = (
                np.load(folder / f"{split}.{part}.npy", mmap_mode="r", allow_pickle=False)
                for part in ("ids", "mask", "offsets")
            )
        except FileNotFoundError as error:
            raise TrainError(f"{error.filename} does not exist; build the data set first") from None
        except (ValueError, EOFError) as error:
            raise TrainError(f"{self.name}: not .npy arrays ({error})") from None
        ends = self.offsets[-1] if len(self.offsets) else -1
        if not len(self.ids) == len(self.mask) == ends or (np.diff(self.offsets) < 1).any():
            raise TrainError(
                f"{self.name}: {len(self.ids)} ids, {len(self.mask)} mask entries and offsets up "
                f"to {ends} do not belong together; build the data set again"
            )
        self.lengths = np.diff(self.offsets)
        media = (folder / f"{split}.{part}" for part in ("media.bin", "media_index.npy"))
        self.media: MediaSet | None = None
        if any(path.exists() for path in media):
            self.media = MediaSet(folder, split, self.ids, self.offsets)
        self.patches = self.media.patches if self.media else np.zeros(len(self), np.int64)
        self.kind_names: list[str] = ["all"]
        self.kinds = np.zeros(len(self), np.int64)
        kinds = folder / f"{split}.kinds.json"
        if kinds.exists():
            data = json.loads(kinds.read_text(encoding="utf-8"))
            self.kind_names, self.kinds = data["names"], np.asarray(data["kinds"], np.int64)
            if len(self.kinds) != len(self):
                raise TrainError(
                    f"{kinds}: {len(self.kinds)} kinds for {len(self)} conversations; "
                    "build the data set again"
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed conversations, ready for the model."""

    ids_T: torch.Tensor
    """int64 [T]"""
    positions_T: torch.Tensor
    """int64 [T]; restarts at 0 in each sequence."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, in order; they sum to T."""
    rows_R: torch.Tensor
    """int64 [R], ascending: positions in T whose next token is learned, and a few that are not."""
    targets_R: torch.Tensor
    """int64 [R]: the next token, or -100 at rows that only round R up."""
    weights_R: torch.Tensor
    """float32 [R]: what its loss counts, 0 at rows that only round R up."""
    soft: SoftInputs | None = None
    """Pictures and sounds; None where the batch has none."""

    def to(self, device: torch.device) -> "Batch":
        ids, positions, rows, targets, weights = (
            t.to(device, non_blocking=True)
            for t in (self.ids_T, self.positions_T, self.rows_R, self.targets_R, self.weights_R)
        )
        soft = self.soft.to(device) if self.soft else None
        return Batch(ids, positions, self.lengths, rows, targets, weights, soft)


def make_batch(
    data: TokenSet, conversations: Sequence[int], *, batch_tokens: int, row_multiple: int = 1
) -> Batch:
    """Pack `conversations` into `batch_tokens` tokens, padded with id 0 at the end.

    R is rounded up to `row_multiple` (at most T) by rows that are not learned, so that a compiled
    model sees few distinct shapes.
    """
    ids = np.zeros(batch_tokens, np.int64)
    weights = np.zeros(batch_tokens + 1, np.float32)
    positions = np.empty(batch_tokens, np.int64)
    lengths: list[int] = []
    at = 0
    for c in conversations:
        begin, end = int(data.offsets[c]), int(data.offsets[c + 1])
        n = end - begin
        ids[at : at + n] = data.ids[begin:end]
        # No row comes before a first token, so nothing can be asked to predict it.
        weights[at + 1 : at + n] = data.mask[begin + 1 : end]
        positions[at : at + n] = np.arange(n)
        lengths.append(n)
        at += n
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    soft = data.media.soft_inputs(conversations, starts) if data.media and lengths else None
    if at < batch_tokens:
        positions[at:] = np.arange(batch_tokens - at)
        lengths.append(batch_tokens - at)
    keep = weights[1:] > 0
    spare = np.flatnonzero(~keep)
    missing = -int(keep.sum()) % row_multiple if keep.any() else row_multiple
    keep[spare[:missing]] = True
    rows = np.flatnonzero(keep)
    weights = weights[rows + 1]
    targets = np.where(weights > 0, np.append(ids, 0)[rows + 1], -100)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        tuple(lengths),
        torch.from_numpy(rows),
        torch.from_numpy(targets),
        torch.from_numpy(weights),
        soft,
    )


def plan_epoch(
    lengths: np.ndarray,
    *,
    batch_tokens: int,
    seed: int,
    epoch: int,
    patches: np.ndarray | None = None,
) -> list[list[int]]:
    """Conversations of each batch of one epoch: each conversation once, in an order of its own.

    Best fit over a few open batches, so that little padding is left. lengths, patches: tokens and
    patches of each conversation; a batch has at most MAX_PATCHES.

    Raises:
      TrainError: a conversation is longer than a batch, or has more patches.
    """
    patches = np.zeros_like(lengths) if patches is None else patches
    if len(lengths) and int(lengths.max()) > batch_tokens:
        raise TrainError(
            f"conversation {int(lengths.argmax())} has {int(lengths.max())} tokens but a batch "
            f"holds {batch_tokens}; raise batch_tokens or cut the conversation"
        )
    if len(patches) and int(patches.max()) > MAX_PATCHES:
        raise TrainError(
            f"conversation {int(patches.argmax())} has {int(patches.max())} patches but a batch "
            f"holds {MAX_PATCHES}; give its pictures smaller budgets or leave some out"
        )
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    plan: list[list[int]] = []
    bins: list[tuple[int, int, list[int]]] = []  # room left for tokens, for patches; conversations
    for c in order.tolist():
        n, p = int(lengths[c]), int(patches[c])
        fits = [i for i, (room, area, _) in enumerate(bins) if room >= n and area >= p]
        if fits:
            i = min(fits, key=lambda i: bins[i][0])
            room, area, members = bins[i]
            bins[i] = (room - n, area - p, [*members, c])
            continue
        if len(bins) == OPEN_BINS:
            plan.append(bins.pop(min(range(OPEN_BINS), key=lambda i: bins[i][0]))[-1])
        bins.append((batch_tokens - n, MAX_PATCHES - p, [c]))
    return plan + [members for *_, members in bins]


class Packer:
    """Endless batches of a split, the same for the same seed; `state` says where it stands."""

    def __init__(
        self, data: TokenSet, *, batch_tokens: int, seed: int, row_multiple: int = 1
    ) -> None:
        self.data, self.batch_tokens, self.seed = data, batch_tokens, seed
        self.row_multiple = row_multiple
        self.seek(0, 0)

    @property
    def state(self) -> tuple[int, int]:
        """(epoch, cursor): the next batch is number `cursor` of `epoch`."""
        return self._epoch, self._cursor

    def seek(self, epoch: int, cursor: int) -> None:
        """Go to batch `cursor` of `epoch`."""
        self._epoch, self._cursor = epoch, cursor
        self._plan = plan_epoch(
            self.data.lengths,
            batch_tokens=self.batch_tokens,
            seed=self.seed,
            epoch=epoch,
            patches=self.data.patches,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._cursor >= len(self._plan):
            self.seek(self._epoch + 1, 0)
        members = self._plan[self._cursor]
        self._cursor += 1
        return make_batch(
            self.data, members, batch_tokens=self.batch_tokens, row_multiple=self.row_multiple
        )
