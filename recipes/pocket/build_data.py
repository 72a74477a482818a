"""Writes a data set: rendered, tokenized, with a mask of what the model itself emits.

Files: see gemsmith.train.data and gemsmith.train.media. Prints tokens and media per kind.

Run: python -m recipes.pocket.build_data TOKENIZER_FOLDER OUT_FOLDER --count 60000 [--of media]

What the conversations are of is said by MIXTURES: text alone, unless --of names another. Speech
needs espeak-ng.
"""

import argparse
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from recipes.pocket import films, generator, letters, pictures, speech
from recipes.pocket.generator import Conversation
from recipes.pocket.train import POCKET
from recipes.pocket.words import Draw, Split

from gemsmith.engine import media
from gemsmith.media.video import load_video
from gemsmith.text import chat
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.train.data import model_turn_mask
from gemsmith.train.media import IMAGE, SOUND, MediaWriter, Medium, pcm

MAX_TOKENS = 1024
"""Of a conversation of text; pictures and sounds may come on top."""
SEED = 0
GENERATORS: dict[str, Callable[[Split, int, int], Conversation]] = {
    "text": generator.generate,
    "kin": generator.kin,
    "picture": pictures.generate,
    "speech": speech.generate,
    "film": films.generate,
    "look": pictures.look,
    "sheet": letters.generate,
}
MIXTURES = {
    "text": {"text": 1.0},
    "tools": {"kin": 1.0},
    "media": {"text": 0.34, "picture": 0.39, "speech": 0.24, "film": 0.03},
    "pictures": {"look": 0.4, "sheet": 0.6},
}
"""Shares of conversations. By tokens, the text that the decoder knows already is about half of
"media", so that it is not forgotten."""
DECISION_WEIGHT = 10
"""Of the token that begins a reply where tools are declared. Each reply has one such and about 30
others, most of them copied. Held out, a call had probability 0.55 where no tool fits and 0.69 where
one does after 17 million tokens at weight 1; 0.19 and 0.83 after 2.6 million more at 10."""
VALUE_WEIGHT = 4
"""Of the token that begins an argument's value: which part of the request belongs there."""
PLACED = ("picture/detect", "picture/buttons")
PLACE_WEIGHT = 8
"""Of a digit of a box or point: brackets, quotes and labels around it are soon known."""
_tokenizer: Tokenizer


@dataclass(frozen=True)
class Encoded:
    kind: str
    ids: np.ndarray
    mask: np.ndarray
    media: list[Medium]


def encode(tokenizer: Tokenizer, talk: Conversation) -> list[int]:
    """Token ids of a whole conversation, with one placeholder for a picture or sound."""
    return tokenizer.encode(
        chat.render(talk.messages, talk.tools, variant="edge", enable_thinking=talk.enable_thinking)
    )


def encode_media(tokenizer: Tokenizer, talk: Conversation) -> tuple[list[int], list[Medium]]:
    """Token ids as inference makes them, soft tokens included, and what those stand for."""
    budget = talk.budget if isinstance(talk, pictures.Picture) else films.BUDGET
    runs = media.collect(talk.messages, POCKET, image_budget=budget)
    prompt = media.expand(encode(tokenizer, talk), runs, POCKET, tokenizer)
    parts = [
        part
        for message in talk.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] != "text"
    ]
    stored = [medium for part in parts for medium in _stored(part)]
    made = [
        Medium(kind, data, span.start, span.run.tokens, budget)
        for (kind, data), span in zip(stored, prompt.spans, strict=True)
    ]
    return prompt.ids, made


def _stored(part: dict[str, Any]) -> list[tuple[int, bytes]]:
    """Kind and bytes of a picture, a sound, or the frames of a film."""
    if part["type"] == "audio":
        return [(SOUND, pcm(part["audio"]))]
    if part["type"] == "video":
        return [(IMAGE, _png(f)) for f in load_video(part["video"], frames=part["frames"]).frames]
    return [(IMAGE, _png(part["image"]))]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


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


def weigh_decisions(tokenizer: Tokenizer, ids: Sequence[int], mask: np.ndarray) -> None:
    """Raise, in place, the weight of the tokens in which something is chosen, not copied.

    With tools declared these are the first of each turn (or of its thought), which decides between
    a call, a refusal and an answer; the first of a called tool's name; the first of each value.
    """
    special = tokenizer.special
    turn, thought = (tokenizer.encode(text) for text in ("<|turn>model\n", "<|channel>thought\n"))
    for i in range(len(turn), len(ids)):
        if list(ids[i - len(turn) : i]) == turn:
            first = i + len(thought) if list(ids[i : i + len(thought)]) == thought else i
            mask[first] *= DECISION_WEIGHT
        if ids[i] == special.tool_call_open and mask[i]:
            _weigh_call(tokenizer, ids, mask, i + 1)


def weigh_places(tokenizer: Tokenizer, ids: Sequence[int], mask: np.ndarray) -> None:
    """Raise, in place, the weight of digits in replies that say where things are."""
    digits = [tokenizer.encode(digit)[-1] for digit in "0123456789"]
    mask[np.isin(ids, digits)] *= PLACE_WEIGHT


def _weigh_call(tokenizer: Tokenizer, ids: Sequence[int], mask: np.ndarray, start: int) -> None:
    """The same inside one call, whose `call:` begins at token `start`."""
    special = tokenizer.special
    stop = next(i for i in range(start, len(ids)) if ids[i] == special.tool_call_close)
    quoted, before = False, ""
    for i in range(start, stop):
        if ids[i] == special.quote:
            quoted = not quoted
            before = before if quoted else ""
            continue
        if before == "call:":
            mask[i] *= DECISION_WEIGHT
        elif before.endswith(":"):
            mask[i] *= VALUE_WEIGHT
        piece = tokenizer.decode([int(ids[i])])
        before = "" if quoted else (before + piece)[-40:]
        if "{" in piece or "," in piece:
            before = re.split("[{,]", before)[-1]


def _start(folder: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(folder)


def _make(
    job: tuple[int, int], *, split: Split, shares: dict[str, float]
) -> tuple[int, list[Encoded]]:
    """Conversations of an interval of numbers, and how many of it were too long."""
    made = []
    for index in range(*job):
        source = Draw(split, f"mixture/{split}/{SEED}/{index}").weighted(shares)
        talk = GENERATORS[source](split, SEED, index)
        ids, found = encode_media(_tokenizer, talk)
        if len(ids) - sum(medium.tokens for medium in found) <= MAX_TOKENS:
            mask = loss_mask(_tokenizer, ids)
            if talk.tools:
                weigh_decisions(_tokenizer, ids, mask)
            if talk.kind in PLACED:
                weigh_places(_tokenizer, ids, mask)
            made.append(Encoded(talk.kind, np.array(ids, np.uint16), mask, found))
    return len(range(*job)) - len(made), made


def build(
    tokenizer: Path,
    out: Path,
    *,
    start: int,
    count: int,
    workers: int,
    split: Split = "train",
    shares: dict[str, float],
) -> None:
    """Writes conversations start..start+count-1 of a split and prints their statistics.

    shares: of sources, as in MIXTURES.
    """
    make = partial(_make, split=split, shares=shares)
    stop = start + count
    jobs = [(i, min(i + 200, stop)) for i in range(start, stop, 200)]
    out.mkdir(parents=True, exist_ok=True)
    talks: list[tuple[str, np.ndarray, np.ndarray]] = []
    rows: dict[str, list[tuple[int, int, int, int]]] = defaultdict(list)
    at = too_long = 0
    with MediaWriter(out, split) as writer, Pool(workers, _start, (tokenizer,)) as pool:
        for left_out, made in pool.imap(make, jobs):
            too_long += left_out
            for talk in made:
                for medium in talk.media:
                    writer.add(medium, start=at)
                at += len(talk.ids)
                talks.append((talk.kind, talk.ids, talk.mask))
                soft = sum(medium.tokens for medium in talk.media)
                row = (len(talk.ids), int((talk.mask > 0).sum()), len(talk.media), soft)
                rows[talk.kind].append(row)
                rows["all"].append(row)
    offsets = np.cumsum([0] + [len(ids) for _, ids, _ in talks], dtype=np.int64)
    np.save(out / f"{split}.ids.npy", np.concatenate([ids for _, ids, _ in talks]))
    np.save(out / f"{split}.mask.npy", np.concatenate([mask for _, _, mask in talks]))
    np.save(out / f"{split}.offsets.npy", offsets)
    names = sorted({kind for kind, _, _ in talks})
    (out / f"{split}.kinds.json").write_text(
        json.dumps({"names": names, "kinds": [names.index(kind) for kind, _, _ in talks]})
    )
    print(
        f"{'kind':22} {'talks':>7} {'tokens':>10} {'mean':>6} {'max':>5} {'learned':>8} "
        f"{'media':>7} {'soft':>6}"
    )
    for kind, sizes in sorted(rows.items(), key=lambda item: -sum(row[0] for row in item[1])):
        tokens, learned, media_count, soft = (sum(column) for column in zip(*sizes, strict=True))
        longest = max(row[0] for row in sizes)
        print(
            f"{kind:22} {len(sizes):7} {tokens:10} {tokens / len(sizes):6.0f} {longest:5} "
            f"{learned / tokens:8.1%} {media_count:7} {soft / tokens:6.1%}"
        )
    print(f"left out, longer than {MAX_TOKENS} tokens: {too_long}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--of", choices=tuple(MIXTURES), default="text")
    options = parser.parse_args()
    build(
        options.tokenizer,
        options.out,
        start=options.start,
        count=options.count,
        workers=options.workers,
        split=options.split,
        shares=MIXTURES[options.of],
    )
