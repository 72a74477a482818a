"""Teaches the towers to see and to hear before they meet the decoder.

In a conversation a picture or a clip is asked about in a few words, and everything between these
and the pixels has to be learned from them. Here every soft token has labels of its own, which the
generators know: which letters stand in it, in order (see letters.py), which shape of which color it
lies in, whether that shape's middle is here and the box as the decoder will have to say it; for
sound the letters that are spoken, and the tokens, in order (CTC).

What says colors, shapes and spoken tokens are the decoder's own embeddings, held still: a row says
the token that it stands nearest to. So a command that is heard looks to the decoder much like one
that is written. Letters and sides of boxes are said by short codes in parts of the row, the same
codes in each: the layers of the decoder that see the whole picture look at 128 values of a row.
What reads the codes is thrown away.

Most letters are learned from sheets, small pictures that are full of them: at first from these
alone, then pictures join.

  python -m recipes.pocket.towers see  --decoder CHECKPOINT --out runs/towers.pt --minutes 60
  python -m recipes.pocket.towers hear --decoder CHECKPOINT --out runs/towers.pt --minutes 60
  python -m recipes.pocket.train fit ... --towers runs/towers.pt

A file begins with the checkpoint's own towers, where it has any of POCKET's shape. Each stretch
goes on where the file stands; `--decay` lets the rate fall to zero at its end.

Shapes: B pictures, S soft tokens, P patches, of a soft token or of a picture, C values of one,
D width of the decoder, L letters, W tokens that can be said; H, K and N as in letters.py.
"""

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from recipes.pocket import drawing, letters, pictures, seeing, speech
from recipes.pocket.letters import CELL, PATCH, POOL
from recipes.pocket.train import POCKET, TEXT, VISION, init_towers
from torch import Tensor, nn

from gemsmith.media import audio
from gemsmith.media.image import target_size
from gemsmith.model.text import rms_norm
from gemsmith.model.towers import Towers
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.train.optim import lr_scale, make_optimizers, set_lr, training_dtype
from gemsmith.weights.load import load_model, load_towers

COLORS, SHAPES = tuple(drawing.COLORS), (*drawing.SHAPES, pictures.BUTTON)
BUDGET = 70
"""Soft tokens of a picture at most. More are for the decoder; letters look the same with fewer."""
LARGE = (140, 280, 560, 1120, 1120)
"""Budgets of large pictures."""
SHEETS, PICTURES, CLIPS = 24, 8, 16
"""Of a step, each shown once: shown three times, in other colors, pictures were learned by heart
(sides of boxes 70 % right where new pictures had 19)."""
SHEETS_ALONE = 1_400
"""Steps before pictures join. With both from the start letters were five times as slow."""
RATES = {"see": (3e-3, 4e-3), "hear": (3e-3, 3e-3)}
"""Of vectors and embeddings, and of matrices."""
ALONE_RATE = 15e-3
"""Of matrices while sheets are alone: five times the usual rate and three times as fast."""
WARMUP = 50
LETTER_VALUES, SIDE_VALUES = 12, 12
"""Of a code."""
LETTERS_FIRST = 3_200
"""Steps in which losses on shapes weigh LITTLE: they would drown letters that are not known yet."""
LITTLE = 0.3
SHARPNESS = 25.0
"""Logit by which a row that is a token's embedding is nearer to it than to none."""
SEED = 1
SAVE_SECONDS = 300


@dataclass(frozen=True)
class Labels:
    """What the soft tokens of a picture show but for letters; UNJUDGED where unknown."""

    color_S: np.ndarray
    """0: paper."""
    shape_S: np.ndarray
    middle_S: np.ndarray
    """1: the shape's middle lies here. Each has one, so that shapes can be counted."""
    box_S4: np.ndarray
    """Top, left, bottom and right of the shape in hundredths of the picture."""


def labels_of(image: Image.Image, size: tuple[int, int]) -> Labels:
    """From what the generators note in image.info; size: to which the picture is resized."""
    across, down = size[0] / image.width, size[1] / image.height
    columns, rows = size[0] // CELL, size[1] // CELL
    made = Labels(
        np.zeros(rows * columns, np.int64),
        np.zeros(rows * columns, np.int64),
        np.zeros(rows * columns, np.int64),
        np.zeros((rows * columns, 4), np.int64),
    )
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


@dataclass(frozen=True)
class Shown:
    """Soft tokens of a picture as the tower takes them, and what they show."""

    values_SPC: np.ndarray
    """uint8, the patches of each soft token row by row."""
    cells_S2: np.ndarray
    """Column and row of each in the picture."""
    count_S: np.ndarray
    """How many soft tokens each stands for: 1, or more where others like it are left out."""
    labels: Labels
    written: letters.Written


def shown(image: Image.Image, size: tuple[int, int]) -> Shown:
    """All of a picture."""
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    columns, rows = size[0] // CELL, size[1] // CELL
    patches = pixels.reshape(rows, POOL, PATCH, columns, POOL, PATCH * 3)
    values = patches.transpose(0, 3, 1, 4, 2, 5).reshape(rows * columns, POOL**2, -1)
    y, x = np.divmod(np.arange(rows * columns), columns)
    cells = np.stack([x, y], axis=1)
    scale = size[0] / image.width, size[1] / image.height
    written = letters.written(image.info.get("letters", []), scale)
    return Shown(values, cells, np.ones(len(cells)), labels_of(image, size), written)


def part_of(whole: Shown, rng: np.random.Generator) -> Shown:
    """BUDGET soft tokens of a large picture: those with letters, most of those around them, and of
    the rest a few that stand for all of it.

    So letters of a picture of a thousand soft tokens, nearly all of them paper, are learned at the
    price of a small one. Half a million pairs of patches that see each other become a sixth of it.
    """
    written = np.stack([whole.written.x_W, whole.written.y_W], axis=1) // CELL
    # Without a letter all is as far.
    far = np.abs(whole.cells_S2[:, None] - written).max(2).min(1, initial=len(whole.cells_S2))
    near = np.lexsort((rng.random(len(far)), far))[: min((far < 2).sum(), BUDGET * 6 // 7)]
    rest = rng.permutation(np.setdiff1d(np.arange(len(far)), near))
    few = rest[: BUDGET - len(near)]
    chosen = np.sort(np.concatenate([near, few]))
    count = np.where(np.isin(chosen, few), len(rest) / max(1, len(few)), 1.0)
    return Shown(
        whole.values_SPC[chosen],
        whole.cells_S2[chosen],
        count,
        Labels(**{f.name: getattr(whole.labels, f.name)[chosen] for f in fields(Labels)}),
        whole.written,
    )


@dataclass(frozen=True)
class Lesson:
    """Pictures of one length for `seeing.see`, and what they show, one after another."""

    values_BPC: np.ndarray
    """uint8"""
    places_BP2: np.ndarray
    positions_BP2: np.ndarray
    bias_BP: np.ndarray | None
    labels: Labels
    written: list[tuple[letters.Written, np.ndarray]]
    """Letters of each picture, and columns and rows of its soft tokens."""
    tokens: int
    """Soft tokens to which each is filled up."""


class Decoder:
    """What the decoder that the rows are for reads: its tokens and their embeddings."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        config, model = load_model(folder, dtype=torch.float32, ple="memory")
        every = torch.arange(model.config.vocab_size)
        self.embedding_WD = model.embed(every).detach()
        self.length = self.embedding_WD.square().mean().sqrt().item()
        """Root mean square of their values; rows are to be as long."""
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


class Codes(nn.Module):
    """Logits of what stands on several places, read off rows [..., D] by one matrix a place."""

    def __init__(self, places: int, things: int, values: int, length: float) -> None:
        super().__init__()
        self.shape, self.length = (places, values), length
        self.part = nn.Linear(TEXT.hidden_size, places * values)
        # Parameters of one dimension more than a matrix, so that they take AdamW's steps.
        self.code = nn.Parameter(torch.randn(1, things, values) / 2)
        self.bias = nn.Parameter(torch.zeros(places, things))

    def forward(self, rows: Tensor) -> Tensor:
        """[..., places, things]"""
        return self.part(rows / self.length).unflatten(-1, self.shape) @ self.code[0].T + self.bias


class Eyes(nn.Module):
    """What reads the labels off soft tokens and patches."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        count = len(letters.LETTERS) + 1
        self.letters = Codes(letters.HALVES * letters.PLACES, count, LETTER_VALUES, decoder.length)
        self.near = nn.Linear(VISION.hidden_size, letters.NEAR * count)
        self.color = Words(decoder.first(COLORS))
        self.shape = Words(decoder.first(SHAPES))
        self.middle = nn.Linear(TEXT.hidden_size, 2)
        self.box = Codes(4, pictures.GRID + 1, SIDE_VALUES, decoder.length)

    def loss(
        self, seen: list[tuple[Tensor, Tensor, Lesson]], things_weight: float = 1.0
    ) -> tuple[Tensor, dict[str, float]]:
        """The sum of losses, and shares of what is right; a side may be a hundredth off.

        seen: soft tokens [B, S, D], patches below the last layer [B, P, .] and what they show.
        """
        rows_SD = torch.cat([rows.float().flatten(0, 1) for rows, _, _ in seen])
        below_PD = torch.cat([below.float().flatten(0, 1) for _, below, _ in seen])
        color, shape, middle, box = (
            torch.from_numpy(np.concatenate([getattr(each.labels, name) for *_, each in seen]))
            for name in ("color_S", "shape_S", "middle_S", "box_S4")
        )
        said = self.letters(rows_SD).unflatten(1, (letters.HALVES, -1))
        patch = self.near(rms_norm(below_PD, None, VISION.rms_norm_eps))
        patch = patch.unflatten(1, (letters.NEAR, -1)).unflatten(0, (-1, POOL**2))
        spelled, near = _letters_of([each for *_, each in seen], said, patch)
        loss = _letters_loss(said, spelled) + _letters_loss(patch, near)
        found = (said.argmax(-1) == spelled).flatten(1)
        spelled = spelled.flatten(1)
        judged, on = color >= 0, color > 0
        colors, shapes = self.color(rows_SD[judged]), self.shape(rows_SD[judged])
        right = {
            "letters": found[spelled > 0],
            "tokens": found.all(1)[(spelled > 0).any(1)],
            "colors": (colors.argmax(1) == color[judged])[on[judged]],
            "shapes": (shapes.argmax(1) == shape[judged])[on[judged]],
        }
        things = 2 * F.cross_entropy(colors, color[judged])
        things = things + 2 * F.cross_entropy(shapes, shape[judged])
        if on.any():
            boxes = self.box(rows_SD[on])
            things = things + F.cross_entropy(self.middle(rows_SD[on]), middle[on])
            things = things + 2 * F.cross_entropy(boxes.flatten(0, 1), box[on].flatten())
            right["sides"] = (boxes.argmax(-1) - box[on]).abs() <= 1
        shares = {name: hits.float().mean().item() for name, hits in right.items() if len(hits)}
        return loss + things_weight * things, shares


def _letters_of(seen: list[Lesson], said: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [S, H, K] of soft tokens and [S, P, N] of patches, by logits [..., places, L]."""
    with torch.no_grad():
        said_SHL, said_SPL = (one.softmax(-1).amax(-2).numpy() for one in (said, patch))
    token, near, start = [], [], 0
    for lesson in seen:
        for written, cells_S2 in lesson.written:
            own, filled = slice(start, start + len(cells_S2)), lesson.tokens - len(cells_S2)
            for labels, made in (
                (token, letters.of_tokens(written, cells_S2, said_SHL[own])),
                (near, letters.of_patches(written, cells_S2, said_SPL[own])),
            ):
                rest = np.full((filled, *made.shape[1:]), letters.UNJUDGED)
                labels += [made, rest]
            start += lesson.tokens
    return torch.from_numpy(np.concatenate(token)), torch.from_numpy(np.concatenate(near))


def _letters_loss(said: Tensor, wanted: Tensor) -> Tensor:
    """Of logits [..., places, L]; most places are empty, and weigh a tenth.

    But not those said to hold a letter: else, in doubt between two places, both would say it.
    """
    counts = (wanted > 0) | (said.argmax(-1) > 0)
    weight = torch.where(counts, 1.0, 0.1) * (wanted >= 0)
    each = F.cross_entropy(said.flatten(0, -2), wanted.flatten().clamp(min=0), reduction="none")
    return (each * weight.flatten()).sum() / weight.sum()


class Ears(nn.Module):
    """Letters and tokens of what is said, from rows [S, D]."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.encode = decoder.tokenizer.encode
        self.letters = nn.Linear(TEXT.hidden_size, len(letters.LETTERS) + 1)
        self.words = Words(decoder.embedding_WD)

    def loss(self, clips: list[tuple[Tensor, str]]) -> tuple[Tensor, dict[str, float]]:
        """CTC; and the shares of letters and tokens that the likeliest paths have right."""
        losses, wrong, whole = [], Counter[str](), Counter[str]()
        for rows_SD, text in clips:
            spelled = [letters.LETTERS.find(c) + 1 for c in text.lower() if c in letters.LETTERS]
            for name, said_SL, wanted in (
                ("letters", self.letters(rows_SD), spelled),
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


def sheets(start: int) -> Iterator[Shown]:
    side = letters.SIDE * CELL
    for index in itertools.count(start):
        yield shown(letters.sheet(SEED, index), (side, side))


def drawn(start: int) -> Iterator[Shown]:
    """Pictures as they come; in place of one in four a large one, to read."""
    for index in itertools.count(start):
        if index % 4 == 0:
            budget = LARGE[index // 4 % len(LARGE)]
            image = pictures.generate("train", SEED, index, kind="read", budget=budget).image
            whole = shown(image, target_size(*image.size, budget))
            yield part_of(whole, np.random.default_rng((SEED, index)))
            continue
        picture = pictures.generate("train", SEED, index)
        if picture.budget == BUDGET:
            yield shown(picture.image, target_size(*picture.image.size, BUDGET))


def lessons(start: int) -> Iterator[tuple[int, list[Lesson]]]:
    """What is learned in step `start` and in those after it, with the number of the step."""
    rng = np.random.default_rng((SEED, start))
    full, mixed = sheets(start * SHEETS), drawn(start * PICTURES)
    for step in itertools.count(start):
        lesson = [of_sheets(list(itertools.islice(full, SHEETS)), rng)]
        if step >= SHEETS_ALONE:
            lesson.append(of_pictures(list(itertools.islice(mixed, PICTURES))))
        yield step, lesson


def of_sheets(seen: list[Shown], rng: np.random.Generator) -> Lesson:
    """Each lies somewhere else, so that places are learned that small pictures never have."""
    lesson = _together(seen, letters.SIDE**2)
    corners = rng.integers(
        0, VISION.position_embedding_size // POOL - letters.SIDE + 1, (len(seen), 2)
    )
    return replace(lesson, places_BP2=lesson.places_BP2 + POOL * corners[:, None], bias_BP=None)


def of_pictures(seen: list[Shown]) -> Lesson:
    """Filled up to the length of the longest that there can be."""
    return _together(seen, BUDGET)


def _together(seen: list[Shown], tokens: int) -> Lesson:
    """Each filled up to so many soft tokens, which nobody sees and nobody judges."""

    def filled(arrays: list[np.ndarray], value: float) -> np.ndarray:
        wide = [[(0, tokens - len(a)), *[(0, 0)] * (a.ndim - 1)] for a in arrays]
        return np.stack(
            [np.pad(a, w, constant_values=value) for a, w in zip(arrays, wide, strict=True)]
        )

    values = filled([each.values_SPC for each in seen], 0)
    cells = filled([each.cells_S2 for each in seen], 0)
    inside = np.stack(np.divmod(np.arange(POOL**2), POOL)[::-1], axis=1)
    positions = (POOL * cells[:, :, None] + inside).reshape(len(seen), -1, 2)
    bias = filled([np.log(each.count_S) for each in seen], seeing.HIDDEN)
    labels = {
        f.name: np.concatenate(
            filled([getattr(each.labels, f.name) for each in seen], letters.UNJUDGED)
        )
        for f in fields(Labels)
    }
    return Lesson(
        values.reshape(len(seen), tokens * POOL**2, -1),
        positions,
        positions,
        bias.repeat(POOL**2, 1).astype(np.float32),
        Labels(**labels),
        [(each.written, each.cells_S2) for each in seen],
        tokens,
    )


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


def see_step(
    towers: Towers, head: Eyes, batch: list[Any], *, see: Callable[..., Any] = seeing.see
) -> tuple[Tensor, dict[str, float]]:
    [(step, lesson)] = batch
    seen = []
    for part in lesson:
        values, places, positions = (
            torch.from_numpy(array)
            for array in (part.values_BPC, part.places_BP2, part.positions_BP2)
        )
        bias = None if part.bias_BP is None else torch.from_numpy(part.bias_BP)
        with _products():
            seen.append((*see(towers, values / 255, places, positions, bias), part))
    return head.loss(seen, LITTLE if step < LETTERS_FIRST else 1.0)


def hear_step(towers: Towers, head: Ears, batch: list[Any]) -> tuple[Tensor, dict[str, float]]:
    clips = []
    for _, samples, text in batch:
        mel, valid = (torch.from_numpy(array) for array in audio.mel(samples))
        with _products():
            rows_SD = towers.hear(mel, valid)
        clips.append((rows_SD.float(), text))
    return head.loss(clips)


@torch.no_grad()
def begin(towers: Towers, decoder: Decoder) -> None:
    """Fresh towers: those of the decoder's checkpoint, each if its shape is POCKET's.

    Rows as long as the embeddings that they are to stand among; places that lie a soft token apart
    begin alike but for slow waves, so that what is learned of one is soon known of all.
    """
    own = towers.state_dict()
    theirs = {} if decoder.towers is None else decoder.towers.state_dict()
    for tower, projection in (("vision_tower", "embed_vision"), ("audio_tower", "embed_audio")):
        names = [name for name in own if name.split(".")[0] in (tower, projection)]
        if all(name in theirs and theirs[name].shape == own[name].shape for name in names):
            for name in names:
                own[name].copy_(theirs[name])
            continue
        own[f"{projection}.embedding_projection.weight"].mul_(decoder.length)
        if tower == "vision_tower":
            table = own["vision_tower.patch_embedder.position_embedding_table"]
            _, places, width = table.shape
            at = torch.arange(places)
            waves = at[:, None] * torch.logspace(-2, -0.3, width // 2)
            slow = torch.cat([waves.sin(), waves.cos()], 1)[:, torch.randperm(width)] / 4
            table.copy_(torch.randn(2, POOL, width)[:, at % POOL] / 2 + slow)


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
    else:
        begin(towers, taught)
    if kind in state:
        head.load_state_dict(state[kind]["head"])
    part = nn.ModuleDict(
        {"tower": towers.vision_tower, "embed": towers.embed_vision, "head": head}
        if eyes
        else {"tower": towers.audio_tower, "embed": towers.embed_audio, "head": head}
    )
    optimizers = make_optimizers(part, lr=max(RATES[kind]), weight_decay=0.05)
    step, seen = state[kind]["step"] if kind in state else 0, 0
    if kind in state:
        seen = state[kind]["seen"]
        for optimizer, saved in zip(optimizers, state[kind]["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    examples: Iterator[Any] = lessons(seen) if eyes else heard(seen, cache)
    count = 1 if eyes else CLIPS
    advance = hear_step
    if eyes:
        advance = partial(see_step, see=torch.compile(seeing.see, dynamic=False))

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
            vectors, matrices = RATES[kind]
            if eyes and step < SHEETS_ALONE:
                matrices = ALONE_RATE
            for optimizer, rate in zip(optimizers, (vectors, matrices), strict=True):
                set_lr([optimizer], rate * left * scale)
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
