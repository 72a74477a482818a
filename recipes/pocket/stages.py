"""Chooses from a data set what one stage of training is to learn, and how much of it weighs what.

  python -m recipes.pocket.stages runs/media runs/seeing seeing
  python -m recipes.pocket.stages runs/media runs/all all
  python -m recipes.pocket.stages runs/media runs/text text

Why stages: a decoder that reads text must find out that the rows of a picture say something, and
where it has little else to learn it finds out soon. In a mixture of everything its answers about
shapes were guesses after 3 million tokens; after 1.5 million that were nearly all pictures they
were read. So "seeing" comes first; "all" and "text" bring back what was pushed aside.

Files: see gemsmith.train.data and gemsmith.train.media. Each time the same conversations are
chosen.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemsmith.errors import TrainError
from gemsmith.train.data import TokenSet
from gemsmith.train.media import MediaWriter

SPLIT = "train"


@dataclass(frozen=True)
class Stage:
    shares: Mapping[str, float]
    """By kind of conversation: how many of them are kept; of kinds not named, `rest`."""
    rest: float
    weights: Mapping[str, int]
    """By kind: what the loss of its tokens is multiplied by. Where the words around it are soon
    known, a whole reply teaches what one of its tokens says."""


SHAPES = ("picture/scene", "picture/detect", "picture/count", "picture/buttons")
STAGES = {
    "seeing": Stage(
        shares=dict.fromkeys((*SHAPES, "film"), 1.0) | {"speech/transcribe": 0.12},
        rest=0.07,
        weights=dict.fromkeys(SHAPES, 5) | {"film": 5, "picture/note": 4},
    ),
    "all": Stage(
        shares=dict.fromkeys(SHAPES, 1.0)
        | {"film": 0.6, "picture/note": 0.6, "picture/read": 0.3, "picture/table": 0.3}
        | {"picture/page": 0.05, "speech/answer": 1.0, "speech/call": 0.2}
        | {"speech/transcribe": 0.5, "speech/reading": 0.5, "which": 0.5, "choices": 0.3},
        rest=0.25,
        weights=dict.fromkeys(SHAPES, 4)
        | {"film": 3, "picture/note": 3, "speech/transcribe": 3, "speech/reading": 3}
        | {"speech/answer": 2},
    ),
    "text": Stage(
        shares={"picture/scene": 0.5, "picture/read": 0.1, "picture/table": 0.1}
        | {"picture/page": 0.0, "film": 0.4, "speech/call": 0.5, "speech/transcribe": 0.4},
        rest=1.0,
        weights=dict.fromkeys(SHAPES, 3)
        | {"film": 2, "picture/note": 2, "speech/transcribe": 2, "speech/reading": 2}
        | {"speech/answer": 2},
    ),
}
HEAVIEST = np.iinfo(np.uint8).max
"""A token's weight is a byte."""


def choose(data: TokenSet, out: Path, stage: Stage, *, seed: int = 0) -> None:
    """Writes the part of `data` that `stage` names as a data set, and prints what it holds.

    Raises:
      TrainError: the stage names a kind that `data` has not, or nothing is kept.
    """
    if unknown := (stage.shares.keys() | stage.weights.keys()) - set(data.kind_names):
        raise TrainError(f"{data.name} has no conversations of the kinds {sorted(unknown)}")
    share, weight = (
        np.array([table.get(name, other) for name in data.kind_names])[data.kinds]
        for table, other in ((stage.shares, stage.rest), (stage.weights, 1))
    )
    kept = np.random.default_rng(seed).random(len(data)) < share
    if not kept.any():
        raise TrainError(f"{data.name}: nothing is kept of {len(data)} conversations")
    tokens = np.repeat(kept, data.lengths)
    mask = np.asarray(data.mask, np.int64) * np.repeat(weight, data.lengths)
    mask = np.minimum(mask, HEAVIEST).astype(np.uint8)
    offsets = np.append(0, np.cumsum(data.lengths[kept]))
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / f"{SPLIT}.ids.npy", np.asarray(data.ids)[tokens])
    np.save(out / f"{SPLIT}.mask.npy", mask[tokens])
    np.save(out / f"{SPLIT}.offsets.npy", offsets)
    kinds = {"names": data.kind_names, "kinds": data.kinds[kept].tolist()}
    (out / f"{SPLIT}.kinds.json").write_text(json.dumps(kinds), encoding="utf-8")
    with MediaWriter(out, SPLIT) as writer:
        for conversation, start in zip(
            np.flatnonzero(kept).tolist(), offsets[:-1].tolist(), strict=True
        ):
            for medium in data.media.of(conversation) if data.media else ():
                writer.add(medium, start=start)
    print(f"{'kind':22} {'talks':>7} {'tokens':>10} {'weight':>10}")
    for number, name in enumerate(data.kind_names):
        mine = kept & (data.kinds == number)
        heavy = int(mask[np.repeat(mine, data.lengths)].sum(dtype=np.int64))
        print(f"{name:22} {mine.sum():7} {data.lengths[mine].sum():10} {heavy:10}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder that build_data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("stage", choices=tuple(STAGES))
    options = parser.parse_args()
    choose(TokenSet(options.data, SPLIT), options.out, STAGES[options.stage])
