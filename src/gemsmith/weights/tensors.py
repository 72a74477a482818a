"""Tensors as they lie in the safetensors files of a checkpoint: where, and how they are read.

Every header is read by the safetensors library, which checks it. A tensor is given as a view of its
file, or as rows read without a map; converting is for whoever asks.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.weights.files import joined, short, weight_files

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
REMAP_BYTES = 32 << 20
PIECE_BYTES = 16 << 20
FETCH_ANEW = "the file is cut short or damaged; delete it and fetch it anew"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """The format's name, such as BF16."""
    shape: tuple[int, ...]
    offset: int
    """Its first byte in the file."""
    nbytes: int = 0


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files by key; headers only.

    Raises:
      WeightsError: no such files, a damaged one, an index that leads elsewhere, a tensor twice.
    """
    files, index = weight_files(folder)
    return joined(((file.name, read_header(file)) for file in files), index, str(folder))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order they are stored.

    Raises:
      WeightsError: missing, cut short, or not such a file; every check is the safetensors
        library's (sizes agree, ranges neither overlap nor leave holes, header below 100 MB).
    """
    with opened(file) as handle:
        keys = handle.offset_keys()
    with open(file, "rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    return {
        key: StoredTensor(
            file,
            header[key]["dtype"],
            tuple(header[key]["shape"]),
            8 + size + header[key]["data_offsets"][0],
            header[key]["data_offsets"][1] - header[key]["data_offsets"][0],
        )
        for key in keys
    }


def read_tensor(tensor: StoredTensor, key: str) -> Tensor:
    """One tensor as a view of its file."""
    return Reader({key: tensor}).get(key, stays=True)


class Reader:
    """Gives tensors as views of their files; quickest in stored order.

    A view that `stays`, as a weight, keeps its mapping alive; once a file's mapping has served
    REMAP_BYTES of tensors that are copied, it is dropped with all the pages it brought in.
    """

    def __init__(self, stored: dict[str, StoredTensor]) -> None:
        self._stored = stored
        self._file: Path | None = None
        self._handle: safe_open | None = None
        self._copied = 0

    def get(self, key: str, *, stays: bool) -> Tensor:
        tensor = self._stored[key]
        if self._handle is None or tensor.file != self._file or self._copied > REMAP_BYTES:
            self._handle, self._file, self._copied = opened(tensor.file), tensor.file, 0
        try:
            view = self._handle.get_tensor(key)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{tensor.file}: {key}: {short(str(error))}; {FETCH_ANEW}") from None
        if not stays:
            self._copied += view.nbytes
        return view


def read_rows(tensor: StoredTensor, every: int = 1) -> Iterator[Tensor]:
    """The tensor [..., K], or each `every`-th row of it, as rows [n, K] of some MiB.

    Read without a map: no page of the file becomes this process's memory.

    Raises:
      WeightsError: the file was cut short.
    """
    dtype = DTYPES[tensor.dtype]
    K = tensor.shape[-1] if tensor.shape else 1
    rows, row_bytes = math.prod(tensor.shape) // max(1, K), K * dtype.itemsize
    step = max(1, PIECE_BYTES // max(1, row_bytes)) if every == 1 else 1
    with open(tensor.file, "rb") as file:
        for start in range(0, rows, step * every):
            buffer = bytearray(min(step, rows - start) * row_bytes)
            file.seek(tensor.offset + start * row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise WeightsError(f"{tensor.file} was cut short while it was read; fetch it anew")
            yield torch.frombuffer(buffer, dtype=dtype).view(-1, K)


def opened(file: Path) -> safe_open:
    """A safetensors file, its header read.

    Raises:
      WeightsError: it is not there, cut short, or no such file.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise WeightsError(f"{file} does not exist") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{file}: {short(str(error))}; {FETCH_ANEW}") from None
