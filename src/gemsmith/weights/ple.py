"""The per-layer embedding table as a store on disk, not a tensor in memory.

The table is half of E2B and a third of E4B, and a token needs one row of it. `PLEStore` stands
where the model has `nn.Embedding` and reads rows out of the checkpoint file itself through a
memory map. It is not a parameter: it is in no state dict, no optimizer, no accelerator's memory.

The kernel is told that access is random, so that a fault reads a page and not the table around
it, and is told of all rows of a call before the first is read, so that a cold disk serves them
side by side. What was read stays in the page cache, which the system takes back when it needs to.
A file that another process cuts short while it is mapped ends this one (SIGBUS): replace
checkpoints by renaming, as `save_model` does.

Source: mmap(2), madvise(2).
"""

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gemsmith.errors import RequestError, WeightsError

_AS_INTEGERS = {2: np.int16, 4: np.int32}


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
        """Map `shape` values of dtype `stored`, which begin at byte `offset` of `file`.

        Rows come out as `dtype` (None: as stored) on `device`; `.to()` changes both later.

        Raises:
          WeightsError: the file cannot be mapped or ends before the table does.
        """
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.stored = stored
        row_bytes = self.embedding_dim * stored.itemsize
        end = offset + self.num_embeddings * row_bytes
        base = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            with open(file, "rb") as handle:
                self._map = mmap.mmap(
                    handle.fileno(), end - base, access=mmap.ACCESS_READ, offset=base
                )
        except (OSError, ValueError, OverflowError) as error:
            raise WeightsError(
                f"{file}: cannot map the per-layer table, bytes {offset} to {end} ({error}); "
                "the file is damaged or was replaced, fetch it anew"
            ) from None
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)
        # As integers: numpy has no bfloat16, and takes rows from any byte offset.
        self._table = np.ndarray(
            shape, _AS_INTEGERS[stored.itemsize], buffer=self._map, offset=offset - base
        )
        self._first_byte, self._row_bytes = offset - base, row_bytes
        self.register_buffer(
            "_like", torch.empty(0, dtype=dtype or stored, device=device), persistent=False
        )
        self._like: Tensor

    def forward(self, ids_T: Tensor) -> Tensor:
        """Rows of int64 ids of any shape [...]: [..., L*P]. Each distinct row is read once.

        Raises:
          RequestError: an id is negative or not below num_embeddings.
        """
        unique_U, place_T = torch.unique(ids_T.cpu(), return_inverse=True)
        if unique_U.numel() and not 0 <= int(unique_U[0]) <= int(unique_U[-1]) < len(self._table):
            wrong = unique_U[0] if unique_U[0] < 0 else unique_U[-1]
            raise RequestError(
                f"token id {int(wrong)}: the per-layer table has rows 0 to {len(self._table) - 1}; "
                "the tokenizer belongs to another model"
            )
        index_U = unique_U.numpy()
        self._announce(index_U)
        rows_UC = torch.from_numpy(self._table[index_U]).view(self.stored)
        return rows_UC.to(self._like)[place_T.to(self._like.device)]

    def rows(self, start: int, stop: int) -> Tensor:
        """A copy of rows start..stop-1 on the CPU, as stored."""
        return torch.from_numpy(self._table[start:stop].copy()).view(self.stored)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, stored={self.stored}"

    def _announce(self, index_U: np.ndarray) -> None:
        """Ask the kernel to fetch these rows now, without waiting for them."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        for row in index_U.tolist():
            start = self._first_byte + row * self._row_bytes
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + self._row_bytes - page)
