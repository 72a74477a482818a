"""Small data sets and models for the training tests."""

from pathlib import Path

import pytest
from tests.train.copying import copy_talks, write_set

from gemsmith.config import TextConfig
from gemsmith.testing import tiny_config
from gemsmith.train.data import TokenSet


@pytest.fixture
def copy_set(tmp_path: Path) -> TokenSet:
    """300 copying conversations and 20 held out."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_set(folder, "train", copy_talks(300, 0))
    write_set(folder, "heldout", copy_talks(20, 1))
    return TokenSet(folder, "train")


@pytest.fixture
def config() -> TextConfig:
    """A tiny decoder with per-layer inputs and layers that share K/V."""
    return tiny_config("E2B", vocab_size=40).text_config
