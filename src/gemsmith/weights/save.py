"""A decoder and its towers -> a checkpoint folder that transformers and `load` read bit for bit.

Writes config.json and model.safetensors, or numbered shards with their index. Each tensor goes
from its device to the file in pieces; no second copy of the weights is made, and a PLEStore's
table is copied from file to file by rows. Every file is written under a temporary name, and all
are renamed once the last is whole on disk: a crash or a full disk leaves the old checkpoint, and
a model may be saved into the folder it is mapped from. Weight files of an earlier save are then
removed; other files of the folder (tokenizer, template) stay.

Tensors whose size is a multiple of 64 bytes come first in a file: then those are aligned to 64
bytes when mapped, which files written in name order are not.

Without towers the checkpoint is the decoder's alone, and its config.json says so.

Source: the safetensors format description.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import torch
from torch import Tensor

from gemsmith.config import Gemma4Config, text_only
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.weights.files import INDEX, SINGLE
from gemsmith.weights.load import COMPUTE
from gemsmith.weights.names import PLE_TABLE, expected_shapes, written_key
from gemsmith.weights.ple import PLEStore
from gemsmith.weights.tensors import DTYPES

ALIGNMENT = 64
PIECE_BYTES = 32 << 20
SHARD = r"model-\d{5}-of-\d{5}\.safetensors"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
WRITTEN_DTYPES = _DTYPE_NAMES | {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}


class Piecewise(Protocol):
    """A tensor that can be written: its values in order, contiguous on the CPU."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def pieces(self) -> Iterator[Tensor]: ...


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=_Sized)


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor to be written: whole, or a store that gives rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    data: Tensor | PLEStore

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """The values in order, some rows at a time, contiguous on the CPU, as self.dtype."""
        if not self.shape and isinstance(self.data, Tensor):
            yield self.data.detach().to("cpu", self.dtype).reshape(1)
            return
        rows = max(1, PIECE_BYTES * self.shape[0] // max(1, self.nbytes))
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            part = self.data
            part = part.rows(start, stop) if isinstance(part, PLEStore) else part[start:stop]
            yield part.detach().to("cpu", self.dtype).contiguous()


def save_model(
    model: TextModel,
    config: Gemma4Config,
    folder: str | Path,
    *,
    towers: Towers | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Write config.json and the weights into `folder`, made if absent; returns the weight files.

    dtype None keeps each tensor's own. A tensor larger than `max_shard_bytes` gets a file alone.

    Raises:
      ConfigError: dtype is neither bfloat16 nor float32; max_shard_bytes is not positive.
      WeightsError: the model is not the one that config describes, or a file cannot be written.
    """
    if dtype is not None and dtype not in COMPUTE:
        raise ConfigError(f"dtype {dtype}: must be torch.bfloat16 or torch.float32")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes {max_shard_bytes}: must be positive")
    folder = Path(folder)
    config = config if towers is not None else text_only(config)
    sources = _sources(model, config, dtype) + _tower_sources(towers, config, dtype)
    return write_checkpoint(sources, config.to_dict(), folder, max_shard_bytes)


def write_checkpoint(
    sources: list[Source], config: dict[str, Any], folder: Path, max_shard_bytes: int
) -> list[Path]:
    """Write these tensors and config.json, all or nothing; returns the weight files."""
    sources.sort(key=lambda source: source.nbytes % ALIGNMENT != 0)
    shards = split_shards(sources, max_shard_bytes)
    count = len(shards)
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    temporary: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            with new_file(folder, name, temporary) as file:
                write_tensors(file, shard)
        if count > 1:
            with new_file(folder, INDEX, temporary) as file:
                file.write(to_json(index_of(names, shards)))
        with new_file(folder, "config.json", temporary) as file:
            file.write(to_json(config))
    except OSError as error:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise WeightsError(
            f"{folder}: cannot be written ({error.strerror}); what was there is as it was"
        ) from None
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
    for name, path in temporary.items():
        os.replace(path, folder / name)
    for path in folder.iterdir():
        stale = path.name in (SINGLE, INDEX) or re.fullmatch(SHARD, path.name)
        if stale and path.name not in temporary:
            path.unlink()
    return [folder / name for name in names]


def _sources(model: TextModel, config: Gemma4Config, dtype: torch.dtype | None) -> list[Source]:
    """The decoder's tensors, checked against config."""
    tensors: dict[str, Tensor | PLEStore] = dict(model.state_dict())
    table = getattr(model, "embed_tokens_per_layer", None)
    if isinstance(table, PLEStore):
        tensors[PLE_TABLE] = table
    sources, shapes = [], {}
    for name, data in tensors.items():
        if isinstance(data, PLEStore):
            shape, own = (data.num_embeddings, data.embedding_dim), data.stored
        else:
            shape, own = tuple(data.shape), data.dtype
            check_savable(name, data)
        shapes[name] = shape
        sources.append(Source(written_key(name), shape, dtype or own, data))
    expected = expected_shapes(config.text_config)
    if shapes != expected:
        name = next(n for n in {**expected, **shapes} if shapes.get(n) != expected.get(n))
        raise WeightsError(
            f"the model and the config to be saved disagree: {name} is {shapes.get(name)} in the "
            f"model, {expected.get(name)} by the config; pass the config it was made from"
        )
    return sources


def _tower_sources(
    towers: Towers | None, config: Gemma4Config, dtype: torch.dtype | None
) -> list[Source]:
    """The towers' tensors, checked against config."""
    if towers is None:
        return []
    tensors: dict[str, Tensor] = towers.state_dict()
    expected = {name: t.shape for name, t in Towers(config, device="meta").state_dict().items()}
    if {name: t.shape for name, t in tensors.items()} != expected:
        raise WeightsError(
            "the towers and the config to be saved disagree; pass the config they were made from"
        )
    for name, tensor in tensors.items():
        check_savable(name, tensor)
    return [
        Source(f"model.{name}", tuple(tensor.shape), dtype or tensor.dtype, tensor)
        for name, tensor in tensors.items()
    ]


def check_savable(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise WeightsError(f"{name} has no values (meta device); load or fill the model")
    if tensor.dtype not in _DTYPE_NAMES:
        raise WeightsError(f"{name} is {tensor.dtype}; only float weights are saved")


def split_shards(sources: Sequence[S], most: int) -> list[list[S]]:
    """Runs of tensors of at most `most` bytes, or of one tensor."""
    shards: list[list[S]] = []
    size = 0
    for source in sources:
        if not shards or size + source.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.nbytes
    return shards


def index_of(names: Sequence[str], shards: Sequence[Sequence[Piecewise]]) -> dict[str, Any]:
    """model.safetensors.index.json of these files."""
    pairs = list(zip(names, shards, strict=True))
    return {
        "metadata": {"total_size": sum(s.nbytes for shard in shards for s in shard)},
        "weight_map": {source.name: name for name, shard in pairs for source in shard},
    }


def write_tensors(file: BinaryIO, sources: Sequence[Piecewise]) -> None:
    """One safetensors file: length of the header, the header padded with spaces, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for source in sources:
        header[source.name] = {
            "dtype": WRITTEN_DTYPES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [at, at + source.nbytes],
        }
        at += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for source in sources:
        for piece in source.pieces():
            file.write(piece.view(torch.uint8).numpy().data)


@contextmanager
def new_file(folder: Path, name: str, temporary: dict[str, Path]) -> Iterator[BinaryIO]:
    """A file to be renamed to `name` later, on disk for certain when the block ends."""
    temporary[name] = folder / f".{name}.{os.getpid()}.tmp"
    with open(temporary[name], "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    temporary: dict[str, Path] = {}
    try:
        with new_file(folder, name, temporary) as file:
            file.write(data)
        os.replace(temporary[name], folder / name)
    except BaseException:
        temporary[name].unlink(missing_ok=True)
        raise


def to_json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"
