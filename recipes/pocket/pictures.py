"""Conversations about pictures: what they show, how many, where, and what they say.

`generate(split, seed, index)` is a pure function, as in generator.py. A picture stands in the
first user message and several questions follow, so that one run of the vision tower is paid back
by several answers. What is hard is meant to be the looking: questions and answers are short and
of few forms.

- scene, count, detect: one to nine shapes that never touch. Corners of shapes and of buttons lie
  on a grid of one hundredth of the picture, so a coordinate (0-1000) of a box ends in 0.
- read: one to four lines. Letter size is set in pixels of the picture as resized for its
  `budget`: legible there. Made for 1,120 it is 4 to 12 pixels high at 70, a whole text in about
  one soft token.
- table, buttons: cells and labels to read, buttons to point at.
- note: a note is all that says what a tool is to be called with.

Boxes and points are written as Gemma writes them: a list of objects in a ```json fence, 0-1000,
y before x.

Held out: one in eight combinations of color, shape and place (nine places), and one in eight
texts, labels and values. Fonts, colors, shapes and the wording of questions are shared. What is
not claimed: photographs, handwriting, other fonts, rotated text, overlapping things.

`expected` of a check, beyond the types in README.md:
- `boxes`: `value` [{box_2d, label}], all that must be found;
- `points`: `value` [{box_2d, label}], one point must lie in each box.

Run: python -m recipes.pocket.pictures --show OUT.png
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from recipes.pocket import drawing, tasks
from recipes.pocket.domains import TOOLS
from recipes.pocket.drawing import COLORS, FONTS, SHAPES, Box
from recipes.pocket.generator import Conversation
from recipes.pocket.schemas import as_is, fill, listed, replaced
from recipes.pocket.tasks import BY_NAME, Check
from recipes.pocket.words import Draw, Split, _words, side

KINDS = {
    "scene": 0.22,
    "count": 0.10,
    "detect": 0.12,
    "read": 0.12,
    "page": 0.24,
    "table": 0.07,
    "buttons": 0.07,
    "note": 0.06,
}
BUDGETS = {70: 0.76, 140: 0.14, 280: 0.08, 560: 0.015, 1120: 0.005}
"""Share of soft-token budgets among pictures to read; the others are made for 70."""
LOOKED_AT = {
    "read": 0.34,
    "detect": 0.28,
    "buttons": 0.10,
    "page": 0.10,
    "table": 0.07,
    "count": 0.04,
    "note": 0.04,
    "scene": 0.03,
}
LOOKED_BUDGETS = {70: 0.5, 140: 0.18, 280: 0.14, 560: 0.08, 1120: 0.1}
"""The same of `look`: more to read and to find, and more of the pictures whose text is small in
them."""
TOKEN = 48
"""Side in pixels of what becomes one soft token."""
CANVASES = ((400, 300), (400, 300), (300, 400), (300, 300), (300, 200), (200, 300))
GRID = 100
CODE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"
"""Without 0, 1, I, O and Q: no font tells all of them apart."""
BUTTON = "button"
"""Name of a button among things; the others have names of SHAPES."""
LABELS = _words(
    "save cancel open send delete next back help print share copy edit close login start stop "
    "play pause search reset apply accept reply upload update submit add remove undo redo yes "
    "no home menu settings exit buy pay call skip sort filter zoom retry join leave follow like"
)
NOTES: dict[str, tuple[str, str]] = {
    "add_event": ("{title}|{date}|{time}", "Add this to my calendar."),
    "add_contact": ("{name}|{phone}", "Save this contact."),
    "track_order": ("Order|{order_id}", "Where is this order?"),
    "add_to_cart": ("{quantity} {product}", "Put this in my cart."),
    "get_weather": ("{city}", "What is the weather there?"),
    "set_timer": ("{minutes} minutes", "Set this timer."),
    "transfer_money": ("{recipient}|{amount} {currency}", "Pay this."),
    "define_word": ("{word}", "What does this word mean?"),
    "find_train": ("from {origin}|to {destination}", "Find this train."),
    "set_birthday": ("{person}|{date}", "Save this birthday."),
    "complete_task": ("Task {task_id}", "This one is done."),
}
"""Tools that a note can fill: what stands on it, line by line, and what the user says."""
READ_ALL = ("Read the text.", "What does it say?", "What is written here?")
PAGE_LINES = 8
COUNTED = ("name", "color", "all")
NOTE_WIDTH = 17
"""Most characters of a line on a note."""


@dataclass(frozen=True)
class Picture(Conversation):
    budget: int = 70
    """Soft-token budget at which the picture can be read."""

    @property
    def image(self) -> Image.Image:
        return next(
            part["image"]
            for message in self.messages
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image"
        )


@dataclass(frozen=True)
class Thing:
    """A shape or a button in a picture."""

    color: str
    name: str
    box: Box

    @property
    def label(self) -> str:
        return f"{self.color} {self.name}"


Wanted = list[tuple[str | None, str | None]]
"""Color and name of each thing that is to be drawn, None meaning any."""
Turn = tuple[str, str, Check | None]
"""Question, reply, and the check of the reply (its `upto` is filled in later)."""
Made = tuple[Image.Image, list[Turn]]


def generate(
    split: Split, seed: int, index: int, *, kind: str | None = None, budget: int | None = None
) -> Picture:
    """One conversation; kind (a key of KINDS) and budget override the mixture.

    The budget is used by pictures to read, whose letters are made for it.
    """
    d = Draw(split, f"picture/{split}/{seed}/{index}/{kind or ''}/{budget or ''}")
    kind = kind or d.weighted(KINDS)
    if kind == "note":
        return _note(d)
    if kind == "read":
        budget = budget or d.weighted(BUDGETS)
        return talk(kind, *_read(d, budget), budget)
    return talk(kind, *MAKERS[kind](d), 70)


def look(split: Split, seed: int, index: int) -> Picture:
    """As `generate`, by LOOKED_AT."""
    d = Draw(split, f"look/{split}/{seed}/{index}")
    kind, budget = d.weighted(LOOKED_AT), d.weighted(LOOKED_BUDGETS)
    return generate(split, seed, index, kind=kind, budget=budget)


def conversations(split: Split, seed: int, start: int, stop: int) -> Iterator[Picture]:
    """The conversations start..stop-1 of a split."""
    for index in range(start, stop):
        yield generate(split, seed, index)


def talk(kind: str, image: Image.Image, turns: list[Turn], budget: int) -> Picture:
    messages: list[dict[str, Any]] = []
    checks: list[Check] = []
    for question, reply, check in turns:
        content: Any = question
        if not messages:
            content = shown(image, question)
        messages.append({"role": "user", "content": content})
        if check:
            checks.append(replace(check, upto=len(messages)))
        messages.append({"role": "assistant", "content": reply})
    return Picture(f"picture/{kind}", messages, None, False, tuple(checks), budget)


def shown(image: Image.Image, text: str) -> list[dict[str, Any]]:
    """Content of a message that shows a picture and says something."""
    return [{"type": "image", "image": image}, {"type": "text", "text": text}]


def answer(question: str, reply: str, category: str, value: str | int) -> Turn:
    return question, reply, Check(0, category, {"type": "answer", "value": value})


# -- shapes -----------------------------------------------------------------------------------


def thousandths(box: Box, width: int, height: int) -> list[int]:
    """[y0, x0, y1, x1] in 0-1000, as Gemma writes boxes."""
    left, top, right, bottom = box
    return [
        round(1000 * top / height),
        round(1000 * left / width),
        round(1000 * bottom / height),
        round(1000 * right / width),
    ]


def fenced(value: list[dict[str, Any]]) -> str:
    """JSON in the fence that Gemma puts around boxes and points."""
    return f"```json\n{json.dumps(value)}\n```"


def place(box: Box, width: int, height: int) -> int:
    """Which of nine places (0-8, row by row) the middle of a box lies in."""
    left, top, right, bottom = box
    return 3 * (3 * (top + bottom) // (2 * height)) + 3 * (left + right) // (2 * width)


def _apart(box: Box, others: list[Box], gap: int) -> bool:
    return all(
        box[2] + gap <= o[0] or o[2] + gap <= box[0] or box[3] + gap <= o[1] or o[3] + gap <= box[1]
        for o in others
    )


def _scatter(d: Draw, width: int, height: int, wanted: Wanted, least: float) -> list[Thing] | None:
    """Things that do not touch, as wanted; None where no room was found.

    least: side of the smallest in parts of the shorter side of the picture.
    """
    step = math.lcm(width // GRID, height // GRID)
    shorter = min(width, height)
    low, high = math.ceil(least * shorter / step), int((least + 0.18) * shorter / step)
    things: list[Thing] = []
    for color_wanted, name_wanted in wanted:
        for _ in range(60):
            color = color_wanted or d.pick(tuple(COLORS))
            name = name_wanted or d.pick(tuple(SHAPES))
            length = d.between(low, high) * step
            left = d.between(1, (width - length) * GRID // width - 1) * width // GRID
            top = d.between(1, (height - length) * GRID // height - 1) * height // GRID
            box = (left, top, left + length, top + length)
            if side(f"{color} {name} {place(box, width, height)}") != d.split:
                continue
            if _apart(box, [t.box for t in things], shorter // 25):
                things.append(Thing(color, name, box))
                break
        else:
            return None
    return things


def _scene(d: Draw, wanted: Callable[[], Wanted], least: float) -> tuple[Image.Image, list[Thing]]:
    """A picture of scattered shapes, listed from left to right."""
    while True:
        width, height = d.pick(CANVASES)
        things = _scatter(d, width, height, wanted(), least)
        if things is not None and len({t.box[0] for t in things}) == len(things):
            break
    image = drawing.paper(d, width, height)
    image.info["things"] = things
    for thing in things:
        left, top, right, _ = thing.box
        color = drawing.shade(d, COLORS[thing.color])
        drawing.shape(image, thing.name, left, top, right - left, color)
    return image, sorted(things, key=lambda t: t.box[0])


def _shapes(d: Draw) -> Made:
    """Colors of shapes, shapes of colors, how many; or all there is.

    No reply gives a later one away.
    """
    image, things = _scene(d, lambda: [(None, None)] * d.between(1, 4), 0.2)
    if d.chance(0.3):
        turns = [_description(d, things)]
        return image, [*turns, _detect(d, image, things)] if d.chance(0.4) else turns
    colors, names = [t.color for t in things], [t.name for t in things]
    turns = []
    for thing in things:
        forms = []
        if names.count(thing.name) == 1:
            forms = [("What color is the {}?", thing.name), ("Which color is the {}?", thing.name)]
        if colors.count(thing.color) == 1:
            forms += [("What shape is {}?", thing.color), ("Which shape is {}?", thing.color)]
        if forms:
            form, given = d.pick(forms)
            value = thing.name if given == thing.color else thing.color
            reply = f"The {thing.name} is {thing.color}."
            turns.append(answer(form.format(given), reply, "picture_shape", value))
    d.rng.shuffle(turns)
    if not turns or d.chance(0.4):
        turns.append(_count(d, things, d.pick(COUNTED)))
    if d.chance(0.4):
        turns.append(_detect(d, image, things))
    return image, turns


def _description(d: Draw, things: list[Thing]) -> Turn:
    """All there is, from left to right."""
    text = listed([f"{'an' if t.color[0] == 'o' else 'a'} {t.label}" for t in things])
    question = d.pick(("Describe the picture.", "What do you see?", "What is in the picture?"))
    reply = text[0].upper() + text[1:] + "."
    return answer(question, reply, "picture_description", text.split(" ", 1)[1])


def _count(d: Draw, things: list[Thing], by: str) -> Turn:
    """How many have the name or the color of one of the things, or how many there are."""
    one = d.pick(things)
    if by == "name":
        singular, number = one.name, sum(t.name == one.name for t in things)
    elif by == "color":
        singular, number = f"{one.color} shape", sum(t.color == one.color for t in things)
    else:
        singular, number = "shape", len(things)
    many = plural(singular)
    reply = f"There is 1 {singular}." if number == 1 else f"There are {number} {many}."
    question = d.pick(("How many {} are there?", "Count the {}.", "How many {} do you see?"))
    return answer(question.format(many), reply, "picture_count", number)


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _counting(d: Draw) -> Made:
    """One to six things of a kind, each number as likely, and up to three others."""
    number, by = d.between(1, 6), d.pick(COUNTED)
    name, color = d.pick(tuple(SHAPES)), d.pick(tuple(COLORS))
    names, colors = [n for n in SHAPES if n != name], [c for c in COLORS if c != color]

    def wanted() -> Wanted:
        if by == "all":
            return [(None, None)] * number
        others = range(d.between(0, 3))
        if by == "name":
            return [*[(None, name)] * number, *((None, d.pick(names)) for _ in others)]
        return [*[(color, None)] * number, *((d.pick(colors), None) for _ in others)]

    image, things = _scene(d, wanted, 0.15)
    kept = things
    if by == "name":
        kept = [t for t in things if t.name == name]
    elif by == "color":
        kept = [t for t in things if t.color == color]
    turns = [_count(d, kept, by)]
    if d.chance(0.5):
        turns.append(_count(d, things, d.pick([b for b in COUNTED if b != by])))
    if d.chance(0.3):
        turns.append(_detect(d, image, things))
    return image, turns


def _named(d: Draw, things: list[Thing]) -> tuple[str, list[Thing]]:
    """A way to name some of the things, and which they are."""
    one = d.pick(things)
    same = [t for t in things if t.label == one.label]
    if len(same) == 1:
        alike = [t for t in things if t.name == one.name]
        if len(alike) == 1 and d.chance(0.3):
            return f"the {one.name}", alike
        if len(alike) > 1 and d.chance(0.4):
            return f"all {plural(one.name)}", alike
        return f"the {one.label}", same
    return f"all {plural(one.label)}", same


def _detect(d: Draw, image: Image.Image, things: list[Thing], point: bool = False) -> Turn:
    """Boxes, or points in the middle of them, from left to right."""
    text, found = _named(d, things)
    boxes = [
        {"box_2d": thousandths(t.box, image.width, image.height), "label": t.label} for t in found
    ]
    if point:
        question = d.pick(("Point to {}.", "Point at {}.")).format(text)
        return question, fenced(_points(boxes)), _points_check(boxes)
    question = d.pick(("Detect {}.", "Detect {}.", "Find {}.", "Locate {}.")).format(text)
    return question, fenced(boxes), Check(0, "picture_box", {"type": "boxes", "value": boxes})


def _points(boxes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    middles = [((y0 + y1) // 2, (x0 + x1) // 2) for y0, x0, y1, x1 in (b["box_2d"] for b in boxes)]
    return [{"point": list(m), "label": b["label"]} for m, b in zip(middles, boxes, strict=True)]


def _points_check(boxes: list[dict[str, Any]]) -> Check:
    return Check(0, "picture_point", {"type": "points", "value": boxes})


def _detecting(d: Draw) -> Made:
    image, things = _scene(d, lambda: [(None, None)] * d.between(1, 5), 0.18)
    turns = [_detect(d, image, things, point=d.chance(0.2)) for _ in range(d.between(1, 3))]
    return image, list({t[0].split(" ", 1)[1]: t for t in turns}.values())


# -- text -------------------------------------------------------------------------------------


def string(d: Draw, low: int, high: int) -> str:
    """A text of low..high characters: a code, a number, or a word that may mean nothing.

    Words have four letters at least, so high has to be 4 or more.
    """
    kind = d.between(0, 9)
    if kind < 6:
        return _code(d, low, high, CODE_LETTERS if kind < 5 else "0123456789")
    word = next(w for w in iter(d.word, "") if low <= len(w) <= high)
    # On the side of the word without its capital: CRCs of the two are not independent.
    return word.capitalize() if kind < 8 else word


def _code(d: Draw, low: int, high: int, letters: str = CODE_LETTERS) -> str:
    length = d.between(low, high)
    return d.until(lambda: "".join(d.pick(letters) for _ in range(length)))


def inks(d: Draw) -> tuple[drawing.Color, drawing.Color]:
    """Colors of paper and ink, far apart; one picture in four is light on dark."""
    light = drawing.shade(d, d.pick(drawing.PAPERS), 8)
    dark = (d.between(0, 90), d.between(0, 80), d.between(0, 100))
    return (dark, light) if d.chance(0.25) else (light, dark)


def _read(d: Draw, budget: int) -> Made:
    """One to four lines of text, large enough for the budget and often too small for less."""
    lines = [string(d, 4, 8) for _ in range(d.weighted({1: 0.6, 2: 0.2, 3: 0.15, 4: 0.05}))]
    name = d.pick(FONTS)
    while True:
        # Long and tall pictures at a small budget show the tower patch positions that it meets
        # at the largest: up to 37 soft tokens in a row.
        ratio = d.pick((4 / 3, 4 / 3, 3 / 4, 1.0, 16 / 9, 2.5))
        if d.chance(0.25):
            ratio = math.exp(d.rng.uniform(math.log(1 / 12), math.log(20)))
        area = 0.85 * budget * TOKEN**2
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        shrink = math.sqrt(0.85)
        size = round(d.between(18, 60 if budget == 70 else 40) * shrink)
        longest = max(lines, key=lambda text: drawing.extent(text, name, 32)[2])
        # A line takes 1.35 times its letter size, whatever letters it has.
        size = min(size, int((height - 8) / len(lines) / 1.35))
        size = drawing.fitting(longest, name, width - 8, height - 8, size)
        if size >= 15 * shrink:
            break
    background, ink = inks(d)
    image = Image.new("RGB", (width, height), background)
    step = round(1.35 * size)
    wide = drawing.extent(longest, name, size)[2]
    left = d.between(4, max(4, width - 4 - wide))
    top = d.between(4, max(4, height - 4 - step * len(lines)))
    for row, text in enumerate(lines):
        drawing.write(image, text, left, top + row * step, name, size, ink)
    question = d.pick(READ_ALL)
    category = "picture_read" if len(lines) == 1 else "picture_lines"
    return image, [answer(question, "\n".join(lines), category, "\n".join(lines))]


def _page(d: Draw) -> Made:
    """A picture full of text: as many letters a soft token as can be told apart, to learn them."""
    ratio = d.pick((4 / 3, 3 / 4, 1.0, 16 / 9, 2.5))
    area = 0.85 * 70 * TOKEN**2
    width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    name, size = d.pick(FONTS), d.between(17, 34)
    step = round(d.rng.uniform(1.35, 1.9) * size)
    lines: list[str] = []
    while len(lines) < PAGE_LINES and 8 + (len(lines) + 1) * step <= height:
        line = string(d, 4, 8)
        for _ in range(d.between(0, 4)):
            longer = f"{line} {string(d, 4, 8)}"
            if drawing.extent(longer, name, size)[2] > width - 16:
                break
            line = longer
        lines.append(line)
    background, ink = inks(d)
    image = Image.new("RGB", (width, height), background)
    left = d.between(4, 12)
    top = d.between(4, max(4, height - 4 - step * len(lines)))
    for row, text in enumerate(lines):
        drawing.write(image, text, left, top + row * step, name, size, ink)
    question = d.pick(READ_ALL)
    text = "\n".join(lines)
    return image, [answer(question, text, "picture_lines", text)]


def _table(d: Draw) -> Made:
    """Rows A, B, ... and columns 1, 2, ...; several cells are asked for."""
    width, height = d.pick(((400, 300), (400, 300), (300, 300), (300, 200)))
    rows, columns = d.between(2, 4), d.between(2, 4)
    cells = [[_cell(d) for _ in range(columns)] for _ in range(rows)]
    background, ink = inks(d)
    image = Image.new("RGB", (width, height), background)
    on = ImageDraw.Draw(image)
    # The first row and column hold the names and are narrower.
    across = [4, *(34 + c * (width - 38) // columns for c in range(columns + 1))]
    down = [4, *(34 + r * (height - 38) // rows for r in range(rows + 1))]
    line = drawing.shade(d, (128, 128, 128), 30)
    for x in across[1:]:
        on.line((x, down[0], x, down[-1]), line)
    for y in down[1:]:
        on.line((across[0], y, across[-1], y), line)
    name = d.pick(FONTS)
    room = across[2] - across[1] - 8, down[2] - down[1] - 8
    longest = max((c for row in cells for c in row), key=lambda c: drawing.extent(c, name, 32)[2])
    size = drawing.fitting(longest, name, *room, d.between(22, 34))
    for r in range(rows + 1):
        for c in range(columns + 1):
            if r == c == 0:
                continue
            text = str(c) if r == 0 else "ABCD"[r - 1] if c == 0 else cells[r - 1][c - 1]
            box = (across[c], down[r], across[c + 1], down[r + 1])
            fits = drawing.fitting(text, name, box[2] - box[0] - 4, box[3] - box[1] - 4, size)
            drawing.write_centred(image, text, box, name, fits, ink)
    if d.chance(0.2):
        r = d.between(0, rows - 1)
        value = ", ".join(cells[r])
        return image, [answer(f"Read row {'ABCD'[r]}.", value, "picture_row", value)]
    turns: list[Turn] = []
    form = d.pick(("What is in row {}, column {}?", "Read row {}, column {}."))
    for r, c in d.some([(r, c) for r in range(rows) for c in range(columns)], d.between(2, 4)):
        value = cells[r][c]
        turns.append(answer(form.format("ABCD"[r], c + 1), value, "picture_table", value))
    return image, turns


def _cell(d: Draw) -> str:
    kind = d.between(0, 9)
    if kind < 5:
        return str(d.integer(10, 999))
    return _code(d, 2, 3) if kind < 7 else string(d, 4, 5)


# -- buttons ----------------------------------------------------------------------------------


def _buttons(d: Draw) -> Made:
    """A window with a title and buttons to point at, to find and to read."""
    width, height = d.pick(((400, 300), (300, 400), (300, 300)))
    across, down = width // GRID, height // GRID
    labels: list[str] = []
    while len(labels) < d.between(2, 5):
        label = (d.own(LABELS) if d.chance(0.4) else d.word()).capitalize()
        if label not in labels and len(label) <= 9:
            labels.append(label)
    name = d.pick(FONTS)
    boxes: list[Box] = []
    high = 2 * d.between(6, 8) * down
    for attempt in count():
        if len(boxes) == len(labels):
            break
        if attempt % 100 == 99:
            boxes = []  # there is room for all, but not the way the first ones were put
        # Even sizes in grid steps, so the middle lies on the grid too.
        steps = 2 * (d.between(0, 4) + max(10, 2 + len(labels[len(boxes)]) * 2))
        left = d.between(2, GRID - 2 - steps) * across
        top = d.between(16, GRID - 2 - high // down) * down
        box = (left, top, left + steps * across, top + high)
        if _apart(box, boxes, 8):
            boxes.append(box)
    colors = [d.pick(tuple(COLORS)) for _ in labels]
    image = drawing.paper(d, width, height)
    image.info["things"] = [
        Thing(color, BUTTON, box) for color, box in zip(colors, boxes, strict=True)
    ]
    on = ImageDraw.Draw(image)
    bar = drawing.shade(d, (70, 80, 100), 30)
    on.rectangle((0, 0, width, 12 * down - 1), fill=bar)
    title = d.word().capitalize()
    drawing.write(image, title, 8, 3 * down, name, round(6.5 * down), (255, 255, 255))
    round_by = d.pick((0, 6, 12))
    for label, (left, top, right, bottom), color in zip(labels, boxes, colors, strict=True):
        fill_color = drawing.shade(d, COLORS[color])
        on.rounded_rectangle((left, top, right - 1, bottom - 1), round_by, fill=fill_color)
        light = color in ("yellow", "pink", "orange")
        size = drawing.fitting(label, name, right - left - 12, bottom - top - 12, 28)
        ink = (20, 20, 20) if light else (255, 255, 255)
        drawing.write_centred(image, label, (left, top, right, bottom), name, size, ink)
    found = [
        [{"box_2d": thousandths(box, width, height), "label": label}]
        for label, box in zip(labels, boxes, strict=True)
    ]
    turns: list[Turn] = []
    for one, label, color in zip(found, labels, colors, strict=True):
        kind = d.between(0, 9)
        if kind < 6:
            question = d.pick(("Point to the {} button.", "Point at the {} button."))
            turns.append((question.format(label), fenced(_points(one)), _points_check(one)))
        elif kind < 8:
            check = Check(0, "picture_box", {"type": "boxes", "value": one})
            turns.append((f"Detect the {label} button.", fenced(one), check))
        elif colors.count(color) == 1:
            question = f"What does the {color} button say?"
            turns.append(answer(question, label, "picture_button", label))
    if not turns:
        turns.append(answer("What is the title?", title, "picture_button", title))
    return image, d.some(turns, min(len(turns), 3))


# -- notes ------------------------------------------------------------------------------------


def _note(d: Draw) -> Picture:
    """A written note and a tool that it says how to call."""
    name = d.pick(tuple(NOTES))
    tool, (form, request) = BY_NAME[name], NOTES[name]
    required = tuple(p for p in tool.params if p.opt is None)
    while True:
        values, said = fill(d, required)
        lines = form.format(**said).split("|")
        if max(map(len, lines)) <= NOTE_WIDTH:
            break
    style = d.pick(("seen", "replaced"))
    talk = tasks.Talk(d, style, thinking=False)
    chosen = [tool]
    while len(chosen) < d.between(1, 3):
        other = d.pick(TOOLS)
        if other.group not in {t.group for t in chosen}:
            chosen.append(other)
    d.rng.shuffle(chosen)
    while True:
        talk.tools = [
            as_is(d, t, bare=False) if style == "seen" else replaced(d, t) for t in chosen
        ]
        if len({t.name for t in talk.tools}) == len(talk.tools):
            break
    image = _noted(d, lines)
    talk.messages.append({"role": "user", "content": shown(image, request)})
    [result] = talk.call("picture_call", [(tool, values)], "")
    talk.say("assistant", tasks.answer(tool, said, result))
    tools = [t.schema(d) for t in talk.tools]
    return Picture("picture/note", talk.messages, tools, False, tuple(talk.checks), 70)


def _noted(d: Draw, lines: list[str]) -> Image.Image:
    width, height = d.pick(((400, 300), (300, 300), (300, 200)))
    image = drawing.paper(d, width, height)
    margin = d.between(4, 14)
    sheet = drawing.shade(d, d.pick(((255, 250, 170), (255, 255, 255), (210, 245, 210))), 8)
    ImageDraw.Draw(image).rectangle(
        (margin, margin, width - margin - 1, height - margin - 1), sheet, (120, 120, 120)
    )
    name, ink = d.pick(FONTS), (d.between(0, 80), d.between(0, 60), d.between(0, 120))
    wide, high = width - 2 * margin - 12, height - 2 * margin - 12
    longest = max(lines, key=lambda text: drawing.extent(text, name, 32)[2])
    size = min(d.between(24, 44), int(high / len(lines) / 1.3))
    size = drawing.fitting(longest, name, wide, high, size)
    top = margin + 6 + d.between(0, high - math.ceil(1.3 * size * len(lines)))
    for row, text in enumerate(lines):
        drawing.write(image, text, margin + 6, top + round(1.3 * size * row), name, size, ink)
    return image


MAKERS: dict[str, Callable[[Draw], Made]] = {
    "scene": _shapes,
    "page": _page,
    "count": _counting,
    "detect": _detecting,
    "table": _table,
    "buttons": _buttons,
}


# -- looking at them --------------------------------------------------------------------------


def contact_sheet(pictures: list[Picture], columns: int = 4) -> Image.Image:
    """All pictures with what is asked and answered below, expected boxes drawn in."""
    wide, high = 330, 470
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * wide, rows * high), (255, 255, 255))
    for number, picture in enumerate(pictures):
        left, top = number % columns * wide, number // columns * high
        seen = picture.image.copy()
        on = ImageDraw.Draw(seen)
        for check in picture.checks:
            if check.expected["type"] in ("boxes", "points"):
                for found in check.expected["value"]:
                    y0, x0, y1, x1 = (v / 1000 for v in found["box_2d"])
                    w, h = seen.size
                    on.rectangle((x0 * w, y0 * h, x1 * w - 1, y1 * h - 1), outline=(255, 0, 255))
        seen.thumbnail((wide - 10, 250))
        sheet.paste(seen, (left + 5, top + 5))
        text = (
            f"{picture.kind}  budget {picture.budget}  {picture.image.width}x{picture.image.height}"
        )
        lines = [text]
        for message in picture.messages:
            content = message["content"]
            said = content if isinstance(content, str) else content[-1]["text"]
            if message.get("tool_calls"):
                said = json.dumps(message["tool_calls"][0]["function"])
            start = ">" if message["role"] == "user" else "   "
            said = said.replace("\n", " / ")
            lines += [f"{start} {said[i : i + 52]}" for i in range(0, len(said), 52)]
        ImageDraw.Draw(sheet).text(
            (left + 5, top + 262), "\n".join(lines[:16]), (0, 0, 0), drawing.font("DejaVuSans", 11)
        )
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--show", type=Path, required=True, help="where to write a contact sheet")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--kind", choices=tuple(KINDS))
    parser.add_argument("--count", type=int, default=16)
    options = parser.parse_args()
    contact_sheet(
        [generate(options.split, 0, i, kind=options.kind) for i in range(options.count)]
    ).save(options.show)
    print(f"wrote {options.show}")
