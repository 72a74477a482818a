"""A toy task, copying, and a toy model, for the tests of training."""

from pathlib import Path

import numpy as np
import torch

from gemsmith.config import TextConfig
from gemsmith.model.text import TextModel


def write_set(folder: Path, split: str, talks: list[tuple[list[int], list[int]]]) -> None:
    """Write conversations of (ids, mask) in the format of `TokenSet`."""
    np.save(folder / f"{split}.ids.npy", np.concatenate([np.uint16(i) for i, _ in talks]))
    np.save(folder / f"{split}.mask.npy", np.concatenate([np.uint8(m) for _, m in talks]))
    offsets = np.cumsum([0] + [len(ids) for ids, _ in talks])
    np.save(folder / f"{split}.offsets.npy", offsets.astype(np.int64))


def copy_talks(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Conversations to copy: a few random ids, a marker, the same ids again, which are learned."""
    rng = np.random.default_rng(seed)
    talks = []
    for _ in range(count):
        n = int(rng.integers(3, 7))
        word = rng.integers(10, 30, n).tolist()
        talks.append(([2, *word, 5, *word, 1], [0] * (n + 2) + [1] * (n + 1)))
    return talks


def fresh_model(config: TextConfig) -> TextModel:
    """Float32 weights, the same at every call."""
    model = TextModel(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model
