"""Teaches the towers to see and to hear before they meet the decoder.

In a conversation a picture or a clip is asked about in a few words, and everything between these
and the pixels has to be learned from them. Here every soft token has labels of its own, which the
generators know: which letters stand in each of its nine patches, which shape of which color it
lies in, whether that shape's middle is here and the box as the decoder will have to say it; for
sound the letters that are spoken, and the tokens, in order (CTC).

What says colors, shapes and spoken tokens are the decoder's own embeddings, held still: a row says
the token that it stands nearest to. So a command that is heard looks to the decoder much like one
that is written. The rest is said by matrices on the same rows, which are thrown away.

  python -m recipes.pocket.towers see  --decoder CHECKPOINT --out runs/towers.pt --minutes 60
  python -m recipes.pocket.towers hear --decoder CHECKPOINT --out runs/towers.pt --minutes 60
  python -m recipes.pocket.train fit ... --towers runs/towers.pt

A file begins with the checkpoint's own towers, if it has any. Each stretch goes on where the file
stands; `--decay` lets the rate fall to zero at its end.

Shapes: S soft tokens, D width of the decoder, L letters, W tokens that can be said.
"""

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from recipes.pocket import drawing, pictures, speech
from recipes.pocket.train import POCKET, TEXT, init_towers
from torch import Tensor, nn

from gemsmith.media import audio
from gemsmith.media.image import Patches, patches, target_size
from gemsmith.model.towers import Towers
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.train.optim import lr_scale, make_optimizers, set_lr, training_dtype
from gemsmith.weights.load import load_model, load_towers

PATCH, POOL = 16, 3
CELL = PATCH * POOL
LETTERS = " 0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:-'$/"
"""Number 0 is no letter: paper, and in CTC the blank; a letter's number is its place here + 1."""
COLORS, SHAPES = tuple(drawing.COLORS), tuple(drawing.SHAPES)
PICTURES, CLIPS = 16, 16
"""Of a step."""
RATE, WARMUP = 3e-3, 100
SHARPNESS = 25.0
"""Logit by which a row that is a token's embedding is nearer to it than to none."""
SEED = 1
SAVE_SECONDS = 300


@dataclass(frozen=True)
class Labels:
    """What the soft tokens of a picture show, row by row."""

    letters_S9: np.ndarray
    color_S: np.ndarray
    """0: paper."""
    shape_S: np.ndarray
    middle_S: np.ndarray
    """1: the shape's middle lies here. Each has one, so that shapes can be counted."""
    box_S4: np.ndarray
    """Top, left, bottom and right of the shape in hundredths of the picture."""


def labels_of(image: Image.Image, budget: int) -> Labels:
    """From what the generators note in image.info; at most one letter a patch, the last."""
    width, height = target_size(*image.size, budget)
    across, down = width / image.width, height / image.height
    columns, rows = width // CELL, height // CELL
    made = Labels(
        np.zeros((rows * columns, POOL * POOL), np.int64),
        np.zeros(rows * columns, np.int64),
        np.zeros(rows * columns, np.int64),
        np.zeros(rows * columns, np.int64),
        np.zeros((rows * columns, 4), np.int64),
    )
    for letter, x, y in image.info.get("letters", ()):
        column, row = int(x * across / PATCH), int(y * down / PATCH)
        if 0 <= column < POOL * columns and 0 <= row < POOL * rows and letter != " ":
            cell = row // POOL * columns + column // POOL
            made.letters_S9[cell, row % POOL * POOL + column % POOL] = LETTERS.find(letter) + 1
    for thing in image.info.get("things", ()):
        left, top, right, bottom = np.array(thing.box) * [across, down, across, down] / CELL
        middle = int((top + bottom) / 2) * columns + int((left + right) / 2)
        box = [box / 10 for box in pictures.thousandths(thing.box, *image.size)]
        for row, column in itertools.product(range(rows), range(columns)):
            x, y, cell = column + 0.5, row + 0.5, row * columns + column
            # A cell whose middle the shape covers, or that holds the middle of the shape.
            if (left <= x <= right and top <= y <= bottom) or cell == middle:
                made.color_S[cell] = COLORS.index(thing.color) + 1
                made.shape_S[cell] = SHAPES.index(thing.name) + 1
                made.middle_S[cell] = cell == middle
                made.box_S4[cell] = np.round(box)
    return made


class Decoder:
    """What the decoder that the rows are for reads: its tokens and their embeddings."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        config, model = load_model(folder, dtype=torch.float32, ple="memory")
        every = torch.arange(model.config.vocab_size)
        self.embedding_WD = model.embed(every).detach()
        self.towers: Towers | None = None
        if config.vision_config is not None:
            self.towers = load_towers(folder, config, device="cpu", dtype=torch.float32)

    def first(self, words: Sequence[str]) -> Tensor:
        """Embeddings of the tokens that words begin with."""
        return self.embedding_WD[[self.tokenizer.encode(word)[0] for word in words]]


class Words(nn.Module):
    """Logits of tokens by how near a row [S, D] is to their embeddings; 0 is none of them."""

    near_WD: Tensor

    def __init__(self, near_WD: Tensor) -> None:
        super().__init__()
        self.register_buffer("near_WD", near_WD, persistent=False)
        self.none_D = nn.Parameter(torch.zeros(near_WD.shape[1]))
        self.sharpness = SHARPNESS / near_WD.square().sum(1).mean().item()

    def forward(self, rows_SD: Tensor) -> Tensor:
        near_WD = torch.cat([self.none_D[None], self.near_WD])
        return self.sharpness * (rows_SD @ near_WD.T - near_WD.square().sum(1) / 2)


class Eyes(nn.Module):
    """What reads the labels off rows [S, D]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        D = TEXT.hidden_size
        self.letters = nn.Linear(D, POOL * POOL * (len(LETTERS) + 1))
        self.color = Words(decoder.first(COLORS))
        self.shape = Words(decoder.first(SHAPES))
        self.middle = nn.Linear(D, 2)
        self.box = nn.Linear(D, 4 * (pictures.GRID + 1))

    def loss(self, rows_SD: Tensor, labels: list[Labels]) -> tuple[Tensor, dict[str, float]]:
        """The sum of losses, and shares of what is right; a side may be a hundredth off."""
        letters, color, shape, middle, box = (
            torch.from_numpy(np.concatenate([getattr(each, name) for each in labels]))
            for name in ("letters_S9", "color_S", "shape_S", "middle_S", "box_S4")
        )
        said = self.letters(rows_SD).view(-1, len(LETTERS) + 1)
        colors, shapes = self.color(rows_SD), self.shape(rows_SD)
        written, on = letters.flatten() > 0, color > 0
        # Most patches are paper: letters weigh as much as all paper together.
        weight = torch.where(written, 1.0, 0.1)
        each = F.cross_entropy(said, letters.flatten(), reduction="none")
        loss = (each * weight).sum() / weight.sum()
        loss = loss + F.cross_entropy(colors, color) + F.cross_entropy(shapes, shape)
        boxes = self.box(rows_SD[on]).view(-1, pictures.GRID + 1)
        if on.any():
            loss = loss + F.cross_entropy(self.middle(rows_SD[on]), middle[on])
            loss = loss + F.cross_entropy(boxes, box[on].flatten())
        right = {
            "letters": (said.argmax(1) == letters.flatten())[written],
            "colors": (colors.argmax(1) == color)[on],
            "shapes": (shapes.argmax(1) == shape)[on],
            "sides": (boxes.argmax(1) - box[on].flatten()).abs() <= 1,
        }
        return loss, {name: hits.float().mean().item() for name, hits in right.items() if len(hits)}


class Ears(nn.Module):
    """Letters and tokens of what is said, from rows [S, D]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.encode = decoder.tokenizer.encode
        self.letters = nn.Linear(TEXT.hidden_size, len(LETTERS) + 1)
        self.words = Words(decoder.embedding_WD)

    def loss(self, clips: list[tuple[Tensor, str]]) -> tuple[Tensor, dict[str, float]]:
        """CTC; and the shares of letters and tokens that the likeliest paths have right."""
        losses, wrong, whole = [], Counter[str](), Counter[str]()
        for rows_SD, text in clips:
            letters = [LETTERS.find(c) + 1 for c in text.lower() if c in LETTERS]
            for name, said_SL, wanted in (
                ("letters", self.letters(rows_SD), letters),
                ("words", self.words(rows_SD), [token + 1 for token in self.encode(text)]),
            ):
                losses.append(_ctc(said_SL, wanted))
                path = [c for c, _ in itertools.groupby(said_SL.argmax(1).tolist()) if c]
                wrong[name] += _distance(path, wanted)
                whole[name] += len(wanted)
        right = {name: 1 - wrong[name] / whole[name] for name in wrong}
        return torch.stack(losses).mean() * 2, right


def _ctc(said_SL: Tensor, wanted: list[int]) -> Tensor:
    size = torch.tensor([len(said_SL)]), torch.tensor([len(wanted)])
    log_SL = said_SL.log_softmax(-1)
    return F.ctc_loss(log_SL[:, None], torch.tensor(wanted), *size, zero_infinity=True)


def _distance(a: list[int], b: list[int]) -> int:
    """Insertions, deletions and replacements between two lists."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def shown(start: int) -> Iterator[tuple[int, Patches, Labels]]:
    """Number, patches and labels of the pictures from number `start` on."""
    for index in itertools.count(start):
        picture = pictures.generate("train", SEED, index)
        # Large budgets are for the decoder; letters look the same at the smallest.
        if picture.budget == 70:
            yield index, patches(picture.image, 70), labels_of(picture.image, 70)


def heard(start: int, cache: Path | None) -> Iterator[tuple[int, np.ndarray, str]]:
    """Number, samples and words of the clips from number `start` on."""
    for index in itertools.count(start):
        talk = speech.generate("train", SEED, index, kind="transcribe", cache=cache)
        for asked, said in zip(talk.messages[::2], talk.messages[1::2], strict=True):
            sound = next(p["audio"] for p in asked["content"] if p["type"] == "audio")
            yield index, sound, said["content"]


def _products() -> torch.autocast:
    """The towers' products in the dtype of training; what they are told is judged in float32."""
    dtype = training_dtype(torch.device("cpu"))
    return torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)


def see_step(towers: Towers, head: Eyes, batch: list[Any]) -> tuple[Tensor, dict[str, float]]:
    values = torch.from_numpy(np.concatenate([p.values for _, p, _ in batch]))
    positions = torch.from_numpy(np.concatenate([p.positions for _, p, _ in batch]))
    with _products():
        rows_SD = towers.see(values, positions, [len(p.values) for _, p, _ in batch])
    return head.loss(rows_SD.float(), [labels for *_, labels in batch])


def hear_step(towers: Towers, head: Ears, batch: list[Any]) -> tuple[Tensor, dict[str, float]]:
    clips = []
    for _, samples, text in batch:
        mel, valid = (torch.from_numpy(array) for array in audio.mel(samples))
        with _products():
            rows_SD = towers.hear(mel, valid)
        clips.append((rows_SD.float(), text))
    return head.loss(clips)


def fit(
    kind: str, decoder: Path, out: Path, minutes: float, *, decay: bool, cache: Path | None
) -> None:
    """One stretch for one of the two towers; the other stays as the file has it."""
    torch.manual_seed(SEED)
    towers = Towers(POCKET)
    init_towers(towers, SEED)
    eyes = kind == "see"
    taught = Decoder(decoder)
    head = Eyes(taught) if eyes else Ears(taught)
    state = torch.load(out, weights_only=True) if out.is_file() else {}
    if state:
        towers.load_state_dict(state["towers"])
    elif taught.towers is not None:
        towers.load_state_dict(taught.towers.state_dict())
    else:
        for name, weight in towers.named_parameters():
            if name.endswith("embedding_projection.weight"):
                # Rows as long as the embeddings that they are to stand among.
                weight.data.mul_(taught.embedding_WD.square().mean().sqrt())
    if kind in state:
        head.load_state_dict(state[kind]["head"])
    part = nn.ModuleDict(
        {"tower": towers.vision_tower, "embed": towers.embed_vision, "head": head}
        if eyes
        else {"tower": towers.audio_tower, "embed": towers.embed_audio, "head": head}
    )
    optimizers = make_optimizers(part, lr=RATE, weight_decay=0.05)
    step, seen = state[kind]["step"] if kind in state else 0, 0
    if kind in state:
        seen = state[kind]["seen"]
        for optimizer, saved in zip(optimizers, state[kind]["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    examples: Iterator[Any] = shown(seen) if eyes else heard(seen, cache)
    count = PICTURES if eyes else CLIPS
    advance = see_step if eyes else hear_step

    def save() -> None:
        state["towers"] = towers.state_dict()
        state[kind] = {
            "head": head.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "step": step,
            "seen": seen,
        }
        part = out.with_suffix(".part")
        torch.save(state, part)
        part.replace(out)

    out.parent.mkdir(parents=True, exist_ok=True)
    start = saved_at = time.monotonic()
    first_step, means = step, dict[str, float]()
    with ThreadPoolExecutor(1) as ahead:
        batch = ahead.submit(lambda: list(itertools.islice(examples, count)))
        while (passed := time.monotonic() - start) < 60 * minutes:
            ready, batch = (
                batch.result(),
                ahead.submit(lambda: list(itertools.islice(examples, count))),
            )
            left = max(0.0, 1 - passed / (60 * minutes)) if decay else 1.0
            scale = lr_scale(step - first_step, warmup_steps=WARMUP, decay=None)
            set_lr(optimizers, RATE * left * scale)
            loss, right = advance(towers, head, ready)  # pyright: ignore[reportArgumentType]
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step, seen = step + 1, ready[-1][0] + 1
            for name, value in ({"loss": loss.item()} | right).items():
                means[name] = means.get(name, value) * 0.95 + 0.05 * value
            if step % 20 == 0:
                shown_means = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
                print(f"{kind} {step}: {shown_means}  {passed / 60:.1f} min", flush=True)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
        batch.result()
    save()


def main() -> None:
    parser = argparse.ArgumentParser(description="teach the towers by themselves")
    parser.add_argument("kind", choices=("see", "hear"))
    parser.add_argument("--decoder", type=Path, required=True, help="checkpoint to teach for")
    parser.add_argument("--out", type=Path, required=True, help="file, begun or gone on with")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--decay", action="store_true", help="let the rate fall to zero")
    parser.add_argument("--cache", type=Path, help="folder where spoken clips are kept")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # sharp attention makes many, and they are slow
    fit(
        options.kind,
        options.decoder,
        options.out,
        options.minutes,
        decay=options.decay,
        cache=options.cache,
    )


if __name__ == "__main__":
    main()
