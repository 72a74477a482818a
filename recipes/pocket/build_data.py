"""Writes the training set: rendered, tokenized, with a mask of what the model itself emits.

Files (see gemsmith.train.data): train.ids.npy, train.mask.npy, train.offsets.npy and
train.kinds.json. Prints tokens per kind.

Run: python -m recipes.pocket.build_data TOKENIZER_FOLDER OUT_FOLDER --count 60000
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from recipes.pocket.generator import Conversation, generate
from recipes.pocket.words import Split

from gemsmith.text import chat
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.train.data import model_turn_mask

MAX_TOKENS = 1024
SEED = 0
_tokenizer: Tokenizer


def encode(tokenizer: Tokenizer, talk: Conversation) -> list[int]:
    """Token ids of a whole conversation."""
    return tokenizer.encode(
        chat.render(talk.messages, talk.tools, variant="edge", enable_thinking=talk.enable_thinking)
    )


def loss_mask(tokenizer: Tokenizer, ids: Sequence[int]) -> np.ndarray:
    """uint8 [N], 1 where the token is one that the model has to emit."""
    special = tokenizer.special
    if (
        special.turn_close is None
        or special.tool_response_open is None
        or special.tool_response_close is None
    ):
        raise ValueError("the tokenizer lacks the markers of a turn or of a tool response")
    return model_turn_mask(
        ids,
        model_prefix=tokenizer.encode("<|turn>model\n"),
        turn_end=special.turn_close,
        response_start=special.tool_response_open,
        response_end=special.tool_response_close,
    )


def _start(folder: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(folder)


def _make(job: tuple[Split, int, int, int]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    split, seed, start, stop = job
    made = []
    for index in range(start, stop):
        talk = generate(split, seed, index)
        ids = encode(_tokenizer, talk)
        if len(ids) <= MAX_TOKENS:
            made.append((talk.kind, np.array(ids, np.uint16), loss_mask(_tokenizer, ids)))
    return made


def build(tokenizer: Path, out: Path, *, start: int, count: int, workers: int) -> None:
    """Writes conversations start..start+count-1 and prints their statistics."""
    jobs: list[tuple[Split, int, int, int]] = [
        ("train", SEED, i, min(i + 200, start + count)) for i in range(start, start + count, 200)
    ]
    parts: list[tuple[str, np.ndarray, np.ndarray]] = []
    with Pool(workers, _start, (tokenizer,)) as pool:
        for made in pool.imap(_make, jobs):
            parts += made
    out.mkdir(parents=True, exist_ok=True)
    offsets = np.cumsum([0] + [len(ids) for _, ids, _ in parts], dtype=np.int64)
    np.save(out / "train.ids.npy", np.concatenate([ids for _, ids, _ in parts]))
    np.save(out / "train.mask.npy", np.concatenate([mask for _, _, mask in parts]))
    np.save(out / "train.offsets.npy", offsets)
    names = sorted({kind for kind, _, _ in parts})
    (out / "train.kinds.json").write_text(
        json.dumps({"names": names, "kinds": [names.index(kind) for kind, _, _ in parts]})
    )
    table: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for kind, ids, mask in parts:
        table[kind].append((len(ids), int(mask.sum())))
        table["all"].append((len(ids), int(mask.sum())))
    print(f"{'kind':22} {'talks':>7} {'tokens':>10} {'mean':>6} {'max':>5} {'learned':>8}")
    for kind, rows in sorted(table.items(), key=lambda item: -sum(n for n, _ in item[1])):
        tokens, learned = (sum(column) for column in zip(*rows, strict=True))
        longest = max(n for n, _ in rows)
        print(
            f"{kind:22} {len(rows):7} {tokens:10} {tokens / len(rows):6.0f} {longest:5} "
            f"{learned / tokens:8.1%}"
        )
    print(f"left out, longer than {MAX_TOKENS} tokens: {count - len(parts)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    build(
        options.tokenizer,
        options.out,
        start=options.start,
        count=options.count,
        workers=options.workers,
    )
