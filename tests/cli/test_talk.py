"""Loading for the command line: as many threads as the model has work for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gemsmith
from gemsmith.cli.talk import SMALL_BYTES, load
from gemsmith.ops import native


@pytest.fixture(autouse=True)
def _keep_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Commands that ran in this process before may have left torch one thread.
    monkeypatch.setattr(native, "_own_threads", None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("weights", "threads"), [(SMALL_BYTES - 1, 1), (SMALL_BYTES, 2)])
def test_a_small_model_runs_on_one_thread_of_torch_and_all_of_the_extension(
    monkeypatch: pytest.MonkeyPatch, weights: int, threads: int
):
    class Model:
        def memory(self) -> dict[str, int]:
            return {"weights": weights, "kv": 0}

    def loaded(name: str, **given: Any) -> Model:
        return Model()

    monkeypatch.setattr(gemsmith, "load", loaded)
    monkeypatch.setattr(native, "_cores", lambda: 8)
    torch.set_num_threads(2)
    for _ in range(2):
        load("any")
        assert torch.get_num_threads() == threads
        assert native.threads() == 2
