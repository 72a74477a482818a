"""Which letters stand where in a picture, and small pictures that are full of them.

A soft token is 48 pixels wide: two to five letters of one line or of two. What it shows is labelled
as it will have to be read, in order: the letters of its upper half from the left, then those of its
lower half, each on places of their own.

A letter belongs where its middle lies. Where that is the border of two soft tokens, no tower can
tell on which side, and each used to decide for itself: half of the letters there were said twice or
by nobody, three quarters of all that was read wrong. So such a letter belongs to the side that says
it louder, and a line between two halves to the half in which its letters are said louder: what is
learned is that both sides agree. (As hard EM does: the label that is the likeliest so far.)

Patches have labels too: they tell the layers below what a letter is long before the last one has
learned to put letters in order.

Shapes: S soft tokens, P patches of each, H halves, K letters of a half, N letters of a patch,
W letters of a picture, B boxes (halves of soft tokens, or patches), L letters there are, and none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from recipes.pocket import drawing, pictures
from recipes.pocket.words import Draw, Split

LETTERS = " 0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:-'$/"
"""Number 0 is no letter: paper, and in CTC the blank; a letter's number is its place here + 1."""
PATCH, POOL = 16, 3
CELL = PATCH * POOL
HALVES, PLACES, NEAR = 2, 5, 2
"""Of a soft token; letters of a half and of a patch at most. Those beyond are not labelled."""
UNJUDGED = -1
"""Label where lines lie closer than can be told apart."""
CLOSE = 3
"""Pixels from a border within which a letter may belong to either side."""
SIDE = 4
"""Soft tokens a side of a sheet. Letters need no more around them, and attention is cheap."""
BUDGET = 20
"""Soft tokens of a sheet that a decoder is shown: room for SIDE x SIDE and a side of one more."""
SIZES = (16, 46)
"""Letter sizes in pixels, each power as likely: those of `pictures`, and some more."""


@dataclass(frozen=True)
class Written:
    """Letters of a picture: their numbers, and their middles in pixels of the resized picture."""

    number_W: np.ndarray
    x_W: np.ndarray
    y_W: np.ndarray
    """The same for all letters of a line."""


def written(noted: Sequence[tuple[str, float, float]], scale: tuple[float, float]) -> Written:
    """noted: letters and middles as drawing.py notes them; scale: of resizing, across and down."""
    at_W2 = np.array([at for _, *at in noted], np.float64).reshape(-1, 2) * scale
    numbers = [LETTERS.index(letter) + 1 for letter, _, _ in noted]
    return Written(np.array(numbers, np.int64), at_W2[:, 0], at_W2[:, 1])


def of_tokens(letters: Written, cells_S2: np.ndarray, said_SHL: np.ndarray) -> np.ndarray:
    """[S, H, K]: what soft tokens at these columns and rows show.

    said: how likely each letter stands in each half, by what the tower says so far.
    """
    halves = np.arange(HALVES)
    boxes = np.stack(
        np.broadcast_arrays(cells_S2[:, :1], HALVES * cells_S2[:, 1:] + halves), axis=-1
    )
    size = CELL, CELL // HALVES
    labels = _settle(
        letters, boxes.reshape(-1, 2), size, PLACES, said_SHL.reshape(boxes[..., 0].size, -1)
    )
    return labels.reshape(len(cells_S2), HALVES, PLACES)


def of_patches(letters: Written, cells_S2: np.ndarray, said_SPL: np.ndarray) -> np.ndarray:
    """[S, P, N]: what the patches of the same soft tokens show."""
    inside = np.stack(np.divmod(np.arange(POOL**2), POOL)[::-1], axis=1)
    boxes = POOL * cells_S2[:, None] + inside
    labels = _settle(
        letters,
        boxes.reshape(-1, 2),
        (PATCH, PATCH),
        NEAR,
        said_SPL.reshape(boxes[..., 0].size, -1),
    )
    return labels.reshape(len(cells_S2), POOL**2, NEAR)


def _settle(
    letters: Written,
    boxes_B2: np.ndarray,
    size: tuple[int, int],
    places: int,
    said_BL: np.ndarray,
) -> np.ndarray:
    """[B, places]: the letters in each box, from the left; boxes: columns and rows."""
    labels = np.zeros((len(boxes_B2), places), np.int64)
    (width, height), number_W, end = size, letters.number_W, boxes_B2.max(0) + 1
    grid = np.full(end[::-1] + 2, -1)  # what lies outside has boxes -1, on all sides
    grid[boxes_B2[:, 1], boxes_B2[:, 0]] = np.arange(len(boxes_B2))

    def loudness(row_W: np.ndarray, column_W: np.ndarray) -> np.ndarray:
        box_W = grid[row_W, column_W]
        return np.where(box_W < 0, -1.0, said_BL[box_W, number_W])

    def sides(at_W: np.ndarray, length: int, end: int) -> list[np.ndarray]:
        return [((at_W + by) // length).astype(int).clip(-1, end) for by in (-CLOSE, CLOSE)]

    left_W, right_W = sides(letters.x_W, width, end[0])
    line_W = np.unique(letters.y_W, return_inverse=True)[1]
    upper, lower = (
        (row_W, np.bincount(line_W, np.maximum(loudness(row_W, left_W), loudness(row_W, right_W))))
        for row_W in sides(letters.y_W, height, end[1])
    )
    row_W = np.where((lower[1] > upper[1])[line_W], lower[0], upper[0])
    column_W = np.where(loudness(row_W, right_W) > loudness(row_W, left_W), right_W, left_W)
    # From the left, and no letter before one that stands to its left.
    order = np.lexsort((letters.x_W, line_W))
    line_W, row_W, number_W = line_W[order], row_W[order], number_W[order]
    beyond = end[0] + 2
    column_W = np.maximum.accumulate(line_W * beyond + column_W[order] + 1) % beyond - 1
    box_W = grid[row_W, column_W]
    order = np.argsort(box_W, kind="stable")
    order = order[box_W[order] >= 0]
    box_W, line_W, number_W = box_W[order], line_W[order], number_W[order]
    place_W = np.arange(len(box_W)) - np.searchsorted(box_W, box_W)
    fits = place_W < places
    labels[box_W[fits], place_W[fits]] = number_W[fits]
    first = np.searchsorted(box_W, box_W)
    labels[box_W[line_W != line_W[first]]] = UNJUDGED
    return labels


def generate(split: Split, seed: int, index: int) -> pictures.Picture:
    """A sheet and all of its lines, of few soft tokens: how a decoder learns to read.

    Of a picture made for 70 or more it learns as much from each letter, and waits for more rows.
    """
    image = sheet(seed, index, split)
    lines: dict[float, str] = {}
    for letter, _, y in image.info["letters"]:
        lines[y] = lines.get(y, "") + letter
    text = "\n".join(line.strip() for line in lines.values() if line.strip())
    question = Draw(split, f"sheetq/{seed}/{index}").pick(pictures.READ_ALL)
    turn = pictures.answer(question, text, "picture_lines", text)
    return pictures.talk("sheet", image, [turn], BUDGET)


def sheet(seed: int, index: int, split: Split = "train") -> Image.Image:
    """A small picture full of text, to be resized to SIDE x SIDE soft tokens.

    Each line has a font and a size of its own. One sheet in five is shrunk, one in three has
    colors of any kind, the others those of pages.
    """
    d = Draw(split, f"sheet/{seed}/{index}")
    shrink = d.rng.uniform(0.5, 1) if d.chance(0.2) else 1.0
    # Pictures are drawn a little too small for their budget and stretched to whole cells.
    across, down = (1.085 * shrink * math.exp(d.rng.uniform(-0.05, 0.05)) for _ in range(2))
    side = SIDE * CELL
    image = Image.new("RGB", (round(side / across), round(side / down)))
    paper, ink = _colors(d) if d.chance(0.3) else pictures.inks(d)
    image.paste(paper, (0, 0, *image.size))
    top = d.between(0, 8)
    while True:
        size = round(math.exp(d.rng.uniform(*map(math.log, SIZES))) / max(min(down, 1.0), 0.7))
        if top + 1.1 * size > image.height:
            break
        name, left = d.pick(drawing.FONTS), 2 + d.between(0, image.width // 5)
        text = " ".join(pictures.string(d, 4, 8) for _ in range(3))
        font = drawing.font(name, size)
        while left + font.getlength(text) > image.width - 2:
            text = text[:-1]
        drawing.write(image, text.strip(), left, top, name, size, ink)
        top += round(d.rng.uniform(1.3, 1.8) * size)
    return image


def _colors(d: Draw) -> tuple[drawing.Color, drawing.Color]:
    """Any two that are not alike."""
    while True:
        paper, ink = ((d.between(0, 255), d.between(0, 255), d.between(0, 255)) for _ in range(2))
        if abs(sum(paper) - sum(ink)) > 240:
            return paper, ink
