"""The per-layer embedding table as a store on disk, not a tensor in memory.

The table is half of E2B and a third of E4B, and a token needs one row of it. `PLEStore` stands
where the model has `nn.Embedding` and reads rows out of the checkpoint file itself. It is not a
parameter: it is in no state dict, no optimizer, no accelerator's memory, and hardly in this
process: only the rows asked for are, while they are used.

Rows are read with pread(2), not through a memory map. Both are served from the page cache at the
same speed, but a map counts what lies around a row as this process's memory too (64 KiB, or 2 MiB
where the cache holds large pages: a prompt's rows would seem to weigh gigabytes), and a file cut
short under it ends the process instead of raising an error. The kernel hears of all rows of a
call before the first is read, so that a cold disk serves them side by side.

A table that is small beside what Python itself takes is read once and kept: there the calls are
what rows cost.

Measured on an SSD, 512 random rows of 17.5 KiB: 3.6 ms cached (mapped 3.4), 29 ms cold (mapped
22, mapped without the announcement 300), no memory (mapped 103 MiB).
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gemsmith.errors import RequestError, WeightsError
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.quantize import quantize
from gemsmith.weights.layouts import LowBit, codes_of

KEPT_BYTES = 4 << 20
"""Up to so many a table is kept in memory."""
_AS_INTEGERS = {1: np.uint8, 2: np.int16, 4: np.int32}


class PLEStore(nn.Module):
    """Rows of a table in a file, by id. A drop-in for a frozen nn.Embedding."""

    def __init__(
        self,
        file: Path,
        *,
        offset: int,
        shape: tuple[int, int],
        stored: torch.dtype,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Read `shape` values of dtype `stored`, which begin at byte `offset` of `file`.

        Rows come out as `dtype` (None: as stored) on `device`; `.to()` changes both later.

        Raises:
          WeightsError: the file cannot be opened or ends before the table does.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.stored = stored
        self._file, self._offset = _ReadOnlyFile(file), offset
        self._row_bytes = self.embedding_dim * stored.itemsize
        end, size = offset + self.num_embeddings * self._row_bytes, os.fstat(self._file.fd).st_size
        if size < end:
            raise WeightsError(
                f"{file}: the per-layer table ends at byte {end} but the file at {size}; "
                "it is cut short, delete it and fetch it anew"
            )
        self.register_buffer(
            "_like", torch.empty(0, dtype=dtype or stored, device=device), persistent=False
        )
        self._like: Tensor
        small = end - offset <= KEPT_BYTES
        self._kept = self._read(range(self.num_embeddings)) if small else None

    def forward(self, ids_T: Tensor) -> Tensor:
        """Rows of int64 ids of any shape [...]: [..., L*P]. Each distinct row is read once.

        Raises:
          RequestError: an id is negative or not below num_embeddings.
          WeightsError: the file can no longer be read.
        """
        ids = ids_T.flatten().tolist()
        low, high = min(ids, default=0), max(ids, default=0)
        if not 0 <= low <= high < self.num_embeddings:
            raise RequestError(
                f"token id {low if low < 0 else high}: the per-layer table has "
                f"rows 0 to {self.num_embeddings - 1}; the tokenizer belongs to another model"
            )
        if self._kept is not None:
            rows = self._kept.index_select(0, ids_T.flatten().cpu()).to(self._like)
            return rows.view(*ids_T.shape, self.embedding_dim)
        index = sorted(set(ids))
        rows = self._read(index).to(self._like)
        if ids != index:
            place = {id: row for row, id in enumerate(index)}
            rows = rows[torch.tensor([place[id] for id in ids], device=rows.device)]
        return rows.view(*ids_T.shape, self.embedding_dim)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 on the CPU, as stored."""
        return self._read(range(start, stop))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, stored={self.stored}"

    def _read(self, index: list[int] | range) -> Tensor:
        fd, size = self._file.fd, self._row_bytes
        if len(index) > 1 and hasattr(os, "posix_fadvise"):
            for row in index:
                os.posix_fadvise(fd, self._offset + row * size, size, os.POSIX_FADV_WILLNEED)
        # As integers, because numpy has no bfloat16.
        values = np.empty((len(index), self.embedding_dim), _AS_INTEGERS[self.stored.itemsize])
        try:
            for place, row in enumerate(index):
                if os.preadv(fd, [values[place].data], self._offset + row * size) != size:
                    raise OSError(0, "it was cut short while in use")
        except OSError as error:
            raise WeightsError(
                f"{self._file.path}: reading the per-layer table failed ({error.strerror}); "
                "fetch the file anew"
            ) from None
        return torch.from_numpy(values).view(self.stored)


class QuantPLEStore(nn.Module):
    """Rows of a table of few bits: codes and scales are read, and what comes out are floats."""

    def __init__(
        self, table: LowBit, codes: PLEStore, scales: PLEStore, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.table, self.codes, self.scales, self.dtype = table, codes, scales, dtype
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, ids_T: Tensor) -> Tensor:
        """As `PLEStore.forward`."""
        codes = codes_of(self.codes(ids_T), self.table)
        scales = self.scales(ids_T).float()
        shape = (*ids_T.shape, self.embedding_dim)
        return Quantized(self.table.format, shape, codes, scales).dequantize().to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.table.format}"


class RoundingPLEStore(nn.Module):
    """Rows of a table of floats as they would be in few bits: rounded each time they are read."""

    def __init__(self, floats: PLEStore, format: Format, grid: bool, dtype: torch.dtype) -> None:
        """grid: whether the table lies on a grid, see `quant.quantize.on_grid`."""
        super().__init__()
        self.floats, self.format, self.grid, self.dtype = floats, format, grid, dtype
        self.num_embeddings, self.embedding_dim = floats.num_embeddings, floats.embedding_dim

    def forward(self, ids_T: Tensor) -> Tensor:
        """As `PLEStore.forward`."""
        unique_U, place_T = torch.unique(ids_T, return_inverse=True)
        try:
            rows = quantize(self.floats(unique_U), self.format, grid=self.grid).dequantize()
        except WeightsError as error:
            raise WeightsError(f"the per-layer table: {error}") from None
        return rows.to(self.dtype)[place_T]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"


class _ReadOnlyFile:
    """A file descriptor that closes with its last user; a copied or pickled one is opened anew."""

    def __init__(self, path: Path) -> None:
        self.path, self.fd = path, -1
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be opened ({error.strerror})") from None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.path,)
