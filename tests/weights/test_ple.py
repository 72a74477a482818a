"""The per-layer table on disk gives the rows nn.Embedding gives."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from gemsmith.errors import RequestError, WeightsError
from gemsmith.weights import ple as ple_module
from gemsmith.weights.ple import PLEStore

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables as large as those of models, but for the one that is kept."""
    monkeypatch.setattr(ple_module, "KEPT_BYTES", 0)


def store(tmp_path, table: torch.Tensor, offset: int = 0, **options) -> PLEStore:
    path = tmp_path / f"table{offset}"
    path.write_bytes(b"\xff" * offset + table.view(torch.uint8).numpy().tobytes() + b"\xff" * 99)
    shape = (table.shape[0], table.shape[1])
    return PLEStore(path, offset=offset, shape=shape, stored=table.dtype, **options)


def table(dtype: torch.dtype = torch.float32, rows: int = 50, width: int = 24) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 2, 4098, 70_001])
def test_rows_equal_those_of_an_embedding(tmp_path, dtype, offset):
    values = table(dtype)
    ids = torch.tensor([3, 49, 0, 3, 3, 17])
    rows = store(tmp_path, values, offset)(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, nn.functional.embedding(ids, values))


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_come_in_the_requested_dtype(tmp_path, dtype):
    values = table(torch.bfloat16)
    ple = store(tmp_path, values, dtype=dtype)
    ids = torch.tensor([[1, 2], [2, 0]])
    assert torch.equal(ple(ids), values[ids].to(dtype))
    assert torch.equal(ple.to(torch.float32)(ids), values[ids].float())
    assert ple(torch.tensor([], dtype=torch.int64)).shape == (0, 24)


def test_each_distinct_row_is_read_once(tmp_path, monkeypatch):
    ple = store(tmp_path, table(), 12)
    real, read = os.preadv, []

    def preadv(fd, buffers, offset):
        read.append((offset, sum(b.nbytes for b in buffers)))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    ple(torch.tensor([7, 3, 7, 7, 3]))
    row = 24 * 4
    assert read == [(12 + 3 * row, row), (12 + 7 * row, row)]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_small_table_is_read_once_and_has_the_same_rows(tmp_path, monkeypatch, dtype):
    values, ids = table(dtype), torch.tensor([[3, 49], [0, 3]])
    monkeypatch.setattr(ple_module, "KEPT_BYTES", values.nbytes)
    kept = store(tmp_path, values, 70_001, dtype=torch.float32)
    monkeypatch.setattr(ple_module, "KEPT_BYTES", values.nbytes - 1)
    large = store(tmp_path, values, 70_001)
    monkeypatch.setattr(os, "preadv", None)
    assert torch.equal(kept(ids), values[ids].float())
    assert kept(torch.tensor([], dtype=torch.int64)).shape == (0, 24)
    for wrong in (-1, 50):
        with pytest.raises(RequestError, match=rf"token id {wrong}: .* rows 0 to 49"):
            kept(torch.tensor([2, wrong]))
    with pytest.raises(TypeError):
        large(ids)


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_an_id_outside_the_table_is_refused(tmp_path, wrong):
    ple = store(tmp_path, table())
    with pytest.raises(RequestError, match=rf"token id {wrong}: .* rows 0 to 49"):
        ple(torch.tensor([4, wrong, 5]))


def test_the_table_is_no_state_and_no_parameter(tmp_path):
    ple = store(tmp_path, table())
    assert not list(ple.state_dict())
    assert not list(ple.parameters())


def test_a_file_that_ends_before_the_table_does_is_refused(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"\0" * 5000)
    PLEStore(path, offset=0, shape=(50, 50), stored=torch.bfloat16)
    for offset, rows in ((1, 50), (0, 51), (0, 2**60)):
        with pytest.raises(WeightsError, match=r"table ends at byte \d+ but the file at 5000"):
            PLEStore(path, offset=offset, shape=(rows, 50), stored=torch.bfloat16)
    with pytest.raises(WeightsError, match=r"cannot be opened \(No such file"):
        PLEStore(tmp_path / "none", offset=0, shape=(1, 1), stored=torch.bfloat16)


def test_a_file_cut_short_while_in_use_is_an_error_not_a_crash(tmp_path):
    values = table()
    ple = store(tmp_path, values)
    with (tmp_path / "table0").open("r+b") as file:
        file.truncate(49 * 24 * 4 + 5)
    assert torch.equal(ple(torch.tensor([48])), values[[48]])
    with pytest.raises(
        WeightsError, match=r"reading the per-layer table failed \(it was cut short"
    ):
        ple(torch.tensor([49]))


def test_the_file_may_be_replaced_while_it_is_read(tmp_path):
    values = table()
    ple = store(tmp_path, values)
    other = tmp_path / "other"
    other.write_bytes(b"\0" * 10)
    other.rename(tmp_path / "table0")
    assert torch.equal(ple(torch.tensor([5])), values[[5]])


def test_rows_are_copies(tmp_path):
    values = table()
    ple = store(tmp_path, values)
    ple(torch.tensor([5])).fill_(0)
    ple.rows(4, 9).fill_(0)
    assert torch.equal(ple.rows(4, 9), values[4:9])


def test_a_copy_outlives_its_original(tmp_path):
    values = table()
    ple = store(tmp_path, values)
    copies = [copy.deepcopy(ple), pickle.loads(pickle.dumps(ple))]
    del ple
    for other in copies:
        assert torch.equal(other(torch.tensor([5])), values[[5]])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_the_file_closes_with_the_store(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    ple = store(tmp_path, table())
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del ple
    assert len(os.listdir("/proc/self/fd")) == before
