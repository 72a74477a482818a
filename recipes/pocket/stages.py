"""Chooses from data sets what one stage of training is to learn, and how much of it weighs what.

  python -m recipes.pocket.stages seeing runs/seeing runs/media
  python -m recipes.pocket.stages all runs/all runs/media
  python -m recipes.pocket.stages text runs/text runs/media
  python -m recipes.pocket.stages reading runs/reading runs/media runs/pictures

Why stages: a decoder that reads text must find out that the rows of a picture say something, and
where it has little else to learn it finds out soon. In a mixture of everything its answers about
shapes were guesses after 3 million tokens; after 1.5 million that were nearly all pictures they
were read. So "seeing" comes first; "all" and "text" bring back what was pushed aside. "reading" is
for a decoder that has all of that, and is to read letters and to say where things are.

Files: see gemsmith.train.data and gemsmith.train.media. Each time the same conversations are
chosen.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
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
    "reading": Stage(
        shares=dict.fromkeys(SHAPES, 1.0)
        | dict.fromkeys(("picture/sheet", "picture/read", "picture/page", "picture/table"), 1.0)
        | {"picture/note": 1.0, "film": 0.8, "speech/answer": 0.75, "speech/call": 0.75}
        | {"speech/transcribe": 0.75, "speech/reading": 0.75},
        rest=0.62,
        weights={"picture/read": 8, "picture/table": 5, "picture/page": 3, "picture/sheet": 2}
        | {"picture/note": 3, "picture/scene": 4, "picture/count": 5, "film": 3}
        | {"speech/transcribe": 2, "speech/reading": 2, "speech/answer": 2},
    ),
}
HEAVIEST = np.iinfo(np.uint8).max
"""A token's weight is a byte."""


def choose(sets: Sequence[TokenSet], out: Path, stage: Stage, *, seed: int = 0) -> None:
    """Writes the parts of the sets that `stage` names as one data set, and prints what it holds.

    Raises:
      TrainError: the stage names a kind that no set has, or nothing is kept.
    """
    names = sorted({name for data in sets for name in data.kind_names})
    if unknown := (stage.shares.keys() | stage.weights.keys()) - set(names):
        listed = ", ".join(data.name for data in sets)
        raise TrainError(f"{listed}: no conversations of the kinds {sorted(unknown)}")
    rng = np.random.default_rng(seed)
    ids, masks, lengths, kinds = [], [], [], []
    out.mkdir(parents=True, exist_ok=True)
    at = 0
    with MediaWriter(out, SPLIT) as writer:
        for data in sets:
            share, weight = (
                np.array([table.get(name, other) for name in data.kind_names])[data.kinds]
                for table, other in ((stage.shares, stage.rest), (stage.weights, 1))
            )
            kept = rng.random(len(data)) < share
            tokens = np.repeat(kept, data.lengths)
            mask = np.asarray(data.mask, np.int64) * np.repeat(weight, data.lengths)
            ids.append(np.asarray(data.ids)[tokens])
            masks.append(np.minimum(mask[tokens], HEAVIEST).astype(np.uint8))
            lengths.append(data.lengths[kept])
            kinds.append(np.array([names.index(n) for n in data.kind_names])[data.kinds[kept]])
            for conversation in np.flatnonzero(kept).tolist():
                for medium in data.media.of(conversation) if data.media else ():
                    writer.add(medium, start=at)
                at += int(data.lengths[conversation])
    if not at:
        raise TrainError(f"nothing is kept of {sum(map(len, sets))} conversations")
    length, kind, mask = (np.concatenate(parts) for parts in (lengths, kinds, masks))
    np.save(out / f"{SPLIT}.ids.npy", np.concatenate(ids))
    np.save(out / f"{SPLIT}.mask.npy", mask)
    np.save(out / f"{SPLIT}.offsets.npy", np.append(0, np.cumsum(length)))
    (out / f"{SPLIT}.kinds.json").write_text(
        json.dumps({"names": names, "kinds": kind.tolist()}), encoding="utf-8"
    )
    print(f"{'kind':22} {'talks':>7} {'tokens':>10} {'weight':>10}")
    for number, name in enumerate(names):
        mine = kind == number
        heavy = int(mask[np.repeat(mine, length)].sum(dtype=np.int64))
        print(f"{name:22} {mine.sum():7} {length[mine].sum():10} {heavy:10}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path, nargs="+", help="folders that build_data wrote")
    options = parser.parse_args()
    choose([TokenSet(data, SPLIT) for data in options.data], options.out, STAGES[options.stage])
