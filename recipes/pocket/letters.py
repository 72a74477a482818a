"""Which letters stand where in a picture, and small pictures that are full of them.

A soft token is 48 pixels wide: two to five letters of one line or of two. What it shows is labelled
as it will have to be read, in order: the letters of its upper half from the left, then those of its
lower half, each on places of their own. A letter belongs where its middle lies: a line stays in one
half, and lines half a soft token high or more never share one.

Patches have labels too: they tell the layers below what a letter is long before the last one has
learned to put letters in order.

Shapes: S soft tokens, P patches of each, H halves, K letters of a half, N letters of a patch.
"""

import math
from collections import defaultdict

import numpy as np
from PIL import Image
from recipes.pocket import drawing, pictures
from recipes.pocket.words import Draw

LETTERS = " 0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:-'$/"
"""Number 0 is no letter: paper, and in CTC the blank; a letter's number is its place here + 1."""
PATCH, POOL = 16, 3
CELL = PATCH * POOL
HALVES, PLACES, NEAR = 2, 5, 2
"""Of a soft token; letters of a half and of a patch at most. Those beyond are not labelled."""
UNJUDGED = -1
"""Label where lines lie closer than can be told apart."""
SIDE = 4
"""Soft tokens a side of a sheet. Letters need no more around them, and attention is cheap."""
SIZES = (16, 46)
"""Letter sizes in pixels, each power as likely: those of `pictures`, and some more."""

Noted = list[tuple[str, float, float]]
"""Letters and their middles in pixels of the picture, as drawing.py notes them."""


def of_tokens(noted: Noted, scale: tuple[float, float], columns: int, rows: int) -> np.ndarray:
    """[S, H, K] of a picture of so many soft tokens; scale: of its resizing, across and down."""
    labels = _from_left(noted, scale, (CELL, CELL / HALVES), (columns, rows * HALVES), PLACES)
    halves = labels.reshape(rows, HALVES, columns, PLACES)
    return halves.transpose(0, 2, 1, 3).reshape(-1, HALVES, PLACES)


def of_patches(noted: Noted, scale: tuple[float, float], columns: int, rows: int) -> np.ndarray:
    """[S, P, N] of the same picture."""
    grid = columns * POOL, rows * POOL
    labels = _from_left(noted, scale, (PATCH, PATCH), grid, NEAR)
    patches = labels.reshape(rows, POOL, columns, POOL, NEAR)
    return patches.transpose(0, 2, 1, 3, 4).reshape(-1, POOL**2, NEAR)


def _from_left(
    noted: Noted,
    scale: tuple[float, float],
    box: tuple[float, float],
    boxes: tuple[int, int],
    places: int,
) -> np.ndarray:
    """[boxes, places]: the letters with their middle in each box, from the left."""
    found = defaultdict[int, list[tuple[float, float, str]]](list)
    for letter, x, y in noted:
        column, row = int(x * scale[0] // box[0]), int(y * scale[1] // box[1])
        if 0 <= column < boxes[0] and 0 <= row < boxes[1]:
            found[row * boxes[0] + column].append((x, y, letter))
    labels = np.zeros((boxes[0] * boxes[1], places), np.int64)
    for at, letters in found.items():
        if len({y for _, y, _ in letters}) > 1:
            labels[at] = UNJUDGED
            continue
        for place, (_, _, letter) in enumerate(sorted(letters)[:places]):
            labels[at, place] = LETTERS.index(letter) + 1
    return labels


def sheet(seed: int, index: int) -> Image.Image:
    """A small picture full of text, to be resized to SIDE x SIDE soft tokens.

    Each line has a font and a size of its own. One sheet in five is shrunk, one in three has
    colors of any kind, the others those of pages.
    """
    d = Draw("train", f"sheet/{seed}/{index}")
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
