"""Pictures and sounds of a data set: kept small, made into features when a batch is.

Two files beside the four of a split (see train.data); a set of text alone has neither:
  {split}.media.bin        the media one after another: a picture as a PNG file, a sound as
                           little-endian int16 samples, mono, 16 kHz
  {split}.media_index.npy  RECORD [M]        one for each, in the order of their soft tokens

Features come from the functions that inference uses, so what is learned is what users will send.
The ids hold the soft tokens already. The towers are in model/towers.py.

Shapes: M media, C conversations, T packed tokens of a batch, P patches, S soft tokens, F mel bins.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
from torch import Tensor

from gemsmith.errors import MediaError, TrainError
from gemsmith.media import audio, image

IMAGE, SOUND = 0, 1
"""Kinds of media. A frame of a video is an image."""

RECORD = np.dtype(
    [
        ("at", "<i8"),  # index in the split's ids of its first soft token
        ("tokens", "<i8"),  # soft tokens
        ("begin", "<i8"),  # bytes begin..end of the .bin file
        ("end", "<i8"),
        ("kind", "<i8"),
        ("budget", "<i8"),  # of an image: soft tokens at most; 0 for a sound
    ]
)
PATCHES_PER_TOKEN = 9
"""A soft token of an image stands for 3 x 3 patches."""


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture or sound of a conversation; the fields are those of RECORD."""

    kind: int
    data: bytes
    at: int
    """Counted from the conversation's first token."""
    tokens: int
    budget: int = 0


@dataclass(frozen=True, slots=True)
class SoftInputs:
    """What the towers take for one batch, and where their rows go: first images, then clips."""

    values_PC: Tensor
    """float32; P is 0 without images."""
    positions_P2: Tensor
    """int64"""
    lengths: tuple[int, ...]
    """Patches of each image."""
    clips: tuple[tuple[Tensor, Tensor], ...]
    """Mel frames [frames, F] and which of them are valid, of each clip."""
    at_S: Tensor
    """int64: places of the soft tokens among the T tokens."""
    image_S: Tensor
    """int64: number of the image that a soft token belongs to, -1 for sound."""

    def to(self, device: torch.device) -> "SoftInputs":
        values, positions, at, of_image = (
            t.to(device, non_blocking=True)
            for t in (self.values_PC, self.positions_P2, self.at_S, self.image_S)
        )
        clips = tuple((mel.to(device), valid.to(device)) for mel, valid in self.clips)
        return SoftInputs(values, positions, self.lengths, clips, at, of_image)


class MediaSet:
    """The media of one split, memory-mapped."""

    def __init__(self, folder: Path, split: str, ids: np.ndarray, offsets: np.ndarray) -> None:
        """Open the two files; ids and offsets are those of the split.

        Raises:
          TrainError: a file is missing or damaged, or they belong to another set.
        """
        self.name, self._ids, self._offsets = f"{folder}/{split}", ids, offsets
        try:
            self.index = np.load(folder / f"{split}.media_index.npy", allow_pickle=False)
            self._bytes = np.memmap(folder / f"{split}.media.bin", np.uint8, "r")
        except FileNotFoundError as error:
            raise TrainError(f"{error.filename} does not exist; build the data set again") from None
        except (ValueError, EOFError) as error:
            raise TrainError(
                f"{self.name}: media files are damaged ({error}); build the data set again"
            ) from None
        if self.index.dtype != RECORD or self.index.ndim != 1 or not len(self.index):
            raise TrainError(
                f"{self.name}.media_index.npy is not an index of media but {self.index.dtype} "
                f"{list(self.index.shape)}; build the data set again"
            )
        at, tokens, begin, end, kind = (
            self.index[name] for name in ("at", "tokens", "begin", "end", "kind")
        )
        owners = np.searchsorted(offsets, at, "right") - 1
        self._check(kind, (kind == IMAGE) | (kind == SOUND), "is neither image nor sound")
        whole = (begin == np.append(0, end[:-1])) & (end > begin) & (end <= len(self._bytes))
        self._check(end, whole & ((kind == IMAGE) | ((end - begin) % 2 == 0)), "lies elsewhere")
        inside = (at >= 0) & (at < len(ids)) & (tokens > 0)
        inside &= at + tokens <= offsets[np.clip(owners + 1, 0, len(offsets) - 1)]
        inside &= at >= np.append(0, (at + tokens)[:-1])
        self._check(at, inside, "stands outside its conversation")
        if end[-1] != len(self._bytes):
            raise TrainError(
                f"{self.name}.media.bin has {len(self._bytes)} bytes and its index {end[-1]}; "
                "build the data set again"
            )
        count = len(offsets) - 1
        self._first = np.searchsorted(owners, np.arange(count + 1))
        seen = kind == IMAGE
        patches = np.bincount(owners[seen], tokens[seen] * PATCHES_PER_TOKEN, minlength=count)
        self.patches = patches.astype(np.int64)
        """[C]: patches of each conversation."""
        self.kinds: set[int] = set(np.unique(kind).tolist())

    def _check(self, values: np.ndarray, right: np.ndarray, what: str) -> None:
        if not right.all():
            wrong = int((~right).argmax())
            raise TrainError(
                f"{self.name}: medium {wrong} {what} ({values[wrong]}); the files do not belong "
                "together, build the data set again"
            )

    def of(self, conversation: int) -> Iterator[Medium]:
        """The media of one conversation."""
        offset = int(self._offsets[conversation])
        records = self.index[self._first[conversation] : self._first[conversation + 1]]
        for at, tokens, begin, end, kind, budget in records.tolist():
            yield Medium(kind, self._bytes[begin:end].tobytes(), at - offset, tokens, budget)

    def soft_inputs(self, conversations: Iterable[int], starts: Iterable[int]) -> SoftInputs | None:
        """Features of the conversations' media; starts: where each conversation begins in T.

        None where they have none.

        Raises:
          TrainError: a medium that cannot be read, or makes another number of soft tokens than
            the ids hold.
        """
        shown: list[image.Patches] = []
        clips: list[tuple[Tensor, Tensor]] = []
        places: dict[int, list[np.ndarray]] = {IMAGE: [], SOUND: []}
        for conversation, start in zip(conversations, starts, strict=True):
            offset = int(self._offsets[conversation])
            for number, medium in enumerate(self.of(conversation), self._first[conversation]):
                try:
                    if medium.kind == IMAGE:
                        made = image.patches(image.load_image(medium.data), medium.budget)
                        shown.append(made)
                        count = made.soft_tokens
                    else:
                        samples = audio.load_audio(
                            np.frombuffer(medium.data, "<i2"), sample_rate=audio.SAMPLE_RATE
                        )
                        mel, valid = audio.mel(samples)
                        clips.append((torch.from_numpy(mel), torch.from_numpy(valid)))
                        count = audio.soft_tokens(len(samples))
                except MediaError as error:
                    raise TrainError(
                        f"{self.name}: medium {number} cannot be read ({error}); build the data "
                        "set again"
                    ) from None
                first = offset + medium.at
                held = self._ids[first : first + medium.tokens]
                if count != medium.tokens or (held != held[0]).any():
                    raise TrainError(
                        f"{self.name}: medium {number} makes {count} soft tokens, its index says "
                        f"{medium.tokens} of {len(np.unique(held))} ids; build the data set again"
                    )
                places[medium.kind].append(np.arange(medium.tokens) + start + medium.at)
        runs = places[IMAGE] + places[SOUND]
        if not runs:
            return None
        numbers = [*range(len(shown)), *[-1] * len(clips)]
        values = [made.values for made in shown] or [np.zeros((0, 0), np.float32)]
        positions = [made.positions for made in shown] or [np.zeros((0, 2), np.int64)]
        return SoftInputs(
            torch.from_numpy(np.concatenate(values)),
            torch.from_numpy(np.concatenate(positions)),
            tuple(len(made.values) for made in shown),
            tuple(clips),
            torch.from_numpy(np.concatenate(runs)),
            torch.from_numpy(np.repeat(numbers, [len(run) for run in runs])),
        )


class MediaWriter:
    """Writes the two files of a split anew; of a split without media, none.

    A context manager; a block that fails leaves no index, and so no set that can be opened.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._index, self._blob = folder / f"{split}.media_index.npy", folder / f"{split}.media.bin"
        self._records: list[tuple[int, ...]] = []
        self._file: BinaryIO | None = None
        for path in (self._index, self._blob):
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def add(self, medium: Medium, *, start: int) -> None:
        """Append a medium, in order, of the conversation whose first token is number `start`."""
        begin = self._records[-1][3] if self._records else 0
        end = begin + len(medium.data)
        at = start + medium.at
        self._records.append((at, medium.tokens, begin, end, medium.kind, medium.budget))
        if self._file is None:
            self._file = self._blob.open("wb")
        self._file.write(medium.data)

    def close(self) -> None:
        """Write the index. Nothing can be added after that."""
        if self._file is not None:
            self._file.close()
            np.save(self._index, np.array(self._records, RECORD))


def pcm(samples: np.ndarray) -> bytes:
    """A sound as it is kept: float samples of full scale 1 at 16 kHz to int16."""
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes()
