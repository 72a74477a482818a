"""Pictures pocket learns from: deterministic, split, and showing exactly what is answered."""

import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recipes.pocket import drawing, pictures
from recipes.pocket.drawing import COLORS, SHAPES
from recipes.pocket.pictures import KINDS, Picture, generate
from recipes.pocket.words import side

from gemsmith.text import chat

COUNT = 25
"""Pictures of each kind."""


@pytest.fixture(scope="module")
def train() -> list[Picture]:
    return [generate("train", 0, i, kind=kind) for kind in KINDS for i in range(COUNT)]


@pytest.fixture(scope="module")
def heldout() -> list[Picture]:
    return [generate("heldout", 0, i, kind=kind) for kind in KINDS for i in range(COUNT)]


@pytest.fixture(scope="module")
def both(train: list[Picture], heldout: list[Picture]) -> list[Picture]:
    return train + heldout


def of(made: list[Picture], *kinds: str) -> list[Picture]:
    return [p for p in made if p.kind.removeprefix("picture/") in kinds]


def reply(picture: Picture, upto: int) -> str:
    return picture.messages[upto]["content"]


def question(picture: Picture, upto: int) -> str:
    content = picture.messages[upto - 1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def parsed(text: str) -> list[dict[str, Any]]:
    """The objects in a fence."""
    fenced = re.fullmatch(r"```json\n(.*)\n```", text)
    assert fenced, text
    return json.loads(fenced[1])


def patches(inked: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, each as a mask: runs of a row join those they touch above."""
    parts: list[list[tuple[int, int, int]]] = []
    above: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    for y, row in enumerate(np.pad(inked, ((0, 0), (1, 1))).astype(np.int8)):
        turns = np.flatnonzero(np.diff(row))
        runs = []
        for start, stop in zip(turns[::2], turns[1::2], strict=True):
            part: list[tuple[int, int, int]] = []
            for first, last, touched in above:
                if first < stop and start < last and touched is not part:
                    part += touched
                    parts = [p for p in parts if p is not touched]
                    above = [(f, t, part if p is touched else p) for f, t, p in above]
                    runs = [(f, t, part if p is touched else p) for f, t, p in runs]
            part.append((y, start, stop))
            parts = [p for p in parts if p is not part] + [part]
            runs.append((start, stop, part))
        above = runs
    masks = []
    for part in parts:
        masks.append(np.zeros_like(inked))
        for y, start, stop in part:
            masks[-1][y, start:stop] = True
    return masks


def islands(image: Image.Image) -> list[tuple[str, str, list[float]]]:
    """(color, shape, box_2d) of each connected patch that is not background, from pixels alone."""
    pixels = np.asarray(image, np.int16)
    found = []
    for patch in patches(np.abs(pixels - pixels[0, 0]).sum(2) > 0):
        rows, columns = np.flatnonzero(patch.any(1)), np.flatnonzero(patch.any(0))
        top, bottom, first, last = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        middle = np.median(pixels[patch], axis=0)
        color = min(COLORS, key=lambda c: float(np.abs(middle - COLORS[c]).sum()))
        crop = Image.fromarray(patch[top:bottom, first:last])
        name = min(SHAPES, key=lambda s: difference(s, crop))
        h, w = patch.shape
        box = [1000 * top / h, 1000 * first / w, 1000 * bottom / h, 1000 * last / w]
        found.append((color, name, [float(v) for v in box]))
    return found


def difference(name: str, crop: Image.Image) -> int:
    """Pixels in which a patch differs from a shape of its size."""
    length = max(crop.size)
    canvas = Image.new("RGB", (length, length), (255, 255, 255))
    drawing.shape(canvas, name, 0, 0, length, (0, 0, 0))
    drawn = np.asarray(canvas.resize(crop.size).convert("L")) < 255
    return int((drawn != np.asarray(crop)).sum())


def same_box(a: list[float], b: list[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 5  # at most one pixel


def test_same_seed_gives_same_bytes() -> None:
    for kind in KINDS:
        one, two = (generate("train", 3, 5, kind=kind) for _ in range(2))
        assert one.image.tobytes() == two.image.tobytes()
        for made in (one, two):
            made.messages[0]["content"].pop(0)
        assert (one.messages, one.tools, one.checks) == (two.messages, two.tools, two.checks)


def test_another_index_gives_another_picture() -> None:
    seen = {generate("train", 0, i, kind="scene").image.tobytes() for i in range(30)}
    assert len(seen) == 30


def test_every_conversation_shows_one_picture_and_renders(both: list[Picture]) -> None:
    for picture in both:
        text = chat.render(picture.messages, picture.tools, variant="edge")
        assert text.count("<|image|>") == 1
        assert picture.checks


def test_boxes_enclose_exactly_the_pixels_of_what_they_name(both: list[Picture]) -> None:
    for picture in of(both, "scene", "count", "detect"):
        shown = islands(picture.image)
        for check in picture.checks:
            if check.expected["type"] not in ("boxes", "points"):
                continue
            assert check.expected["value"]
            for box in check.expected["value"]:
                near = [s for s in shown if same_box(s[2], box["box_2d"])]
                assert len(near) == 1, (picture.messages, box, shown)
                assert box["label"] == f"{near[0][0]} {near[0][1]}"


def test_all_things_that_are_asked_for_are_boxed(both: list[Picture]) -> None:
    asked = 0
    for picture in of(both, "scene", "count", "detect"):
        for check in picture.checks:
            text = question(picture, check.upto)
            if check.expected["type"] != "boxes" or not (named := re.search(r"all (.*?)\.", text)):
                continue
            asked += 1
            wanted = [s for s in islands(picture.image) if matches(s, named[1])]
            assert len(wanted) == len(check.expected["value"]), text
    assert asked >= 5


def matches(shown: tuple[str, str, list[float]], plural: str) -> bool:
    """Whether a thing is one of 'circles', 'red circles', 'red shapes' or 'shapes'."""
    *color, noun = plural.split()
    return (not color or color == [shown[0]]) and noun in ("shapes", pictures.plural(shown[1]))


def test_counts_are_those_of_the_pixels(both: list[Picture]) -> None:
    counted = 0
    for picture in of(both, "scene", "count"):
        for check in picture.checks:
            if check.category != "picture_count":
                continue
            counted += 1
            text = question(picture, check.upto)
            named = re.search(r"(?:How many|Count the) (.*?)(?: are there| do you see|\.|\?)", text)
            assert named
            number = sum(matches(s, named[1]) for s in islands(picture.image))
            assert number == check.expected["value"], text
            assert str(number) in reply(picture, check.upto)
    assert counted >= 2 * COUNT


def test_each_number_is_asked_about_as_often() -> None:
    first = [generate("train", 1, i, kind="count").checks[0].expected["value"] for i in range(300)]
    for number in range(1, 7):
        assert 25 <= first.count(number) <= 80, number


def test_colors_and_shapes_are_those_of_the_pixels(both: list[Picture]) -> None:
    for picture in of(both, "scene"):
        shown = islands(picture.image)
        for check in picture.checks:
            if check.category == "picture_shape":
                fact = re.fullmatch(r"The (\w+) is (\w+)\.", reply(picture, check.upto))
                assert fact
                assert [(c, n) for c, n, _ in shown].count((fact[2], fact[1])) == 1
                # What is asked by has one bearer, or the question had two answers.
                given = fact[2] if check.expected["value"] == fact[1] else fact[1]
                assert sum(given in (c, n) for c, n, _ in shown) == 1
            if check.category == "picture_description":
                order = [f"{c} {n}" for c, n, _ in sorted(shown, key=lambda s: s[2][1])]
                named = re.findall(r"(?:\b[Aa]n?) (\w+ \w+)", reply(picture, check.upto))
                assert named == order


def test_no_reply_gives_a_later_one_away(both: list[Picture]) -> None:
    for picture in of(both, "scene"):
        replies = [reply(picture, c.upto) for c in picture.checks if "shape" in c.category]
        assert len(set(replies)) == len(replies)
        assert not (replies and any(c.category == "picture_description" for c in picture.checks))


def test_boxes_and_points_are_fenced_json_and_points_lie_in_their_boxes(
    both: list[Picture],
) -> None:
    kinds = set()
    for picture in both:
        for check in picture.checks:
            kind = check.expected["type"]
            if kind not in ("boxes", "points"):
                continue
            kinds.add((picture.kind, kind))
            value = parsed(reply(picture, check.upto))
            if kind == "boxes":
                assert value == check.expected["value"]
                continue
            for made, box in zip(value, check.expected["value"], strict=True):
                (y, x), (y0, x0, y1, x1) = made["point"], box["box_2d"]
                assert made["label"] == box["label"]
                assert y0 < y < y1
                assert x0 < x < x1
    assert {("picture/buttons", "points"), ("picture/buttons", "boxes")} <= kinds
    assert {("picture/detect", "points"), ("picture/detect", "boxes")} <= kinds


def test_coordinates_lie_on_the_grid(both: list[Picture]) -> None:
    for picture in both:
        for check in picture.checks:
            if check.expected["type"] in ("boxes", "points"):
                for box in check.expected["value"]:
                    assert all(0 <= v <= 1000 and v % 10 == 0 for v in box["box_2d"])
                for made in parsed(reply(picture, check.upto)):
                    assert all(v % 5 == 0 for v in made.get("point", ()))


def test_buttons_fill_their_boxes_and_nothing_beside_them(both: list[Picture]) -> None:
    for picture in of(both, "buttons"):
        pixels = np.asarray(picture.image, np.int16)
        height, width, _ = pixels.shape
        background = pixels[-1, -1]
        for check in picture.checks:
            if check.expected["type"] == "answer":
                continue
            for box in check.expected["value"]:
                y0, x0, y1, x1 = (
                    round(v * side / 1000)
                    for v, side in zip(box["box_2d"], (height, width) * 2, strict=True)
                )
                inside = pixels[y0:y1, x0:x1]
                middle = ((y1 - y0) // 2, (x1 - x0) // 2)
                for edge in (inside[0, middle[1]], inside[-1, middle[1]]):
                    assert (edge != background).any()
                for edge in (inside[middle[0], 0], inside[middle[0], -1]):
                    assert (edge != background).any()
                for outside in (pixels[y0 - 1, x0:x1], pixels[y0:y1, x0 - 1]):
                    assert (outside == background).all()


def test_text_stays_inside_the_picture(both: list[Picture]) -> None:
    for picture in of(both, "read") + of(both, "page"):
        pixels = np.asarray(picture.image)
        for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert (edge == pixels[0, 0]).all(), picture.messages


def test_lines_of_text_are_as_many_as_are_answered(both: list[Picture]) -> None:
    for picture in of(both, "read") + of(both, "page"):
        pixels = np.asarray(picture.image, np.int16)
        inked = (np.abs(pixels - pixels[0, 0]).sum(2) > 60).any(1)
        starts = int((inked[1:] & ~inked[:-1]).sum())
        # The dot of an i and the descender of a line above may split or join rows of ink.
        lines = reply(picture, 1).count("\n") + 1
        assert starts >= 1
        assert lines <= starts + 1
        assert starts <= 2 * lines


@pytest.mark.parametrize("budget", [70, 140, 280, 560, 1120])
def test_letters_can_be_told_apart_at_the_budget_they_are_made_for(budget: int) -> None:
    for index in range(8):
        picture = generate("heldout", 0, index, kind="read", budget=budget)
        pixels = np.asarray(picture.image, np.int16)
        inked = np.flatnonzero((np.abs(pixels - pixels[0, 0]).sum(2) > 60).any(1))
        lines = reply(picture, 1).count("\n") + 1
        row = (inked[-1] + 1 - inked[0]) / (lines + 0.35 * (lines - 1))
        scale = (budget * 48**2 / (picture.image.width * picture.image.height)) ** 0.5
        assert row * scale >= 8
        if budget == 1120:
            assert row * scale / 4 <= 12, "legible at 70 soft tokens"


def test_long_pictures_reach_the_patches_of_the_largest_budget() -> None:
    """1,120 soft tokens of a 4:3 picture are 38 in a row and 28 in a column."""
    across, down = 0.0, 0.0
    for index in range(300):
        size = generate("train", 0, index, kind="read", budget=70).image.size
        across = max(across, (70 * size[0] / size[1]) ** 0.5)
        down = max(down, (70 * size[1] / size[0]) ** 0.5)
    assert across > 35
    assert down > 26


def test_text_read_is_held_out() -> None:
    texts: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        made = [generate(split, 0, i, kind="read") for i in range(400)]
        texts[split] = {line for p in made for line in reply(p, 1).split("\n")}
    assert len(texts["heldout"]) > 300
    assert not {t.lower() for t in texts["train"]} & {t.lower() for t in texts["heldout"]}


def test_labels_of_buttons_are_held_out() -> None:
    labels: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        made = [generate(split, 0, i, kind="buttons") for i in range(200)]
        labels[split] = {
            box["label"]
            for p in made
            for c in p.checks
            if c.expected["type"] != "answer"
            for box in c.expected["value"]
        }
    assert len(labels["heldout"]) > 50
    assert not labels["train"] & labels["heldout"]


def test_cells_of_tables_are_held_out_but_for_numbers_and_words_of_the_split(
    both: list[Picture],
) -> None:
    cells: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for number, picture in enumerate(of(both, "table")):
        split = "train" if number < COUNT else "heldout"
        for check in picture.checks:
            cells[split] |= set(str(check.expected["value"]).split(", "))
    assert not cells["train"] & cells["heldout"]


def test_color_shape_and_place_are_held_out_together(
    train: list[Picture], heldout: list[Picture]
) -> None:
    for split, made in (("train", train), ("heldout", heldout)):
        for picture in of(made, "scene", "count", "detect"):
            for color, name, (y0, x0, y1, x1) in islands(picture.image):
                place = int(3 * (y0 + y1) / 2000) * 3 + int(3 * (x0 + x1) / 2000)
                assert side(f"{color} {name} {place}") == split


def test_a_note_calls_a_declared_tool_with_what_is_expected(both: list[Picture]) -> None:
    names = set()
    for picture in of(both, "note"):
        [check] = picture.checks
        call = picture.messages[check.upto]["tool_calls"][0]["function"]
        assert check.expected == {"type": "calls", "calls": [call]}
        assert picture.tools
        assert call["name"] in {t["function"]["name"] for t in picture.tools}
        names.add(call["name"])
    assert len(names) > 10


def test_every_value_of_a_call_stands_on_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = drawing.write

    def spy(on: Image.Image, text: str, *rest: Any) -> drawing.Box:
        written.append(text)
        box = write(on, text, *rest)
        assert 0 <= box[0] < box[2] <= on.width, text
        assert 0 <= box[1] < box[3] <= on.height, text
        return box

    monkeypatch.setattr(drawing, "write", spy)
    for index in range(60):
        written.clear()
        picture = generate("train", 2, index, kind="note")
        for value in picture.checks[0].expected["calls"][0]["arguments"].values():
            assert str(value) in " ".join(written)


def test_a_table_says_what_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, drawing.Box]] = []
    centred = drawing.write_centred

    def spy(on: Image.Image, text: str, box: drawing.Box, *rest: Any) -> None:
        written.append((text, box))
        centred(on, text, box, *rest)

    monkeypatch.setattr(drawing, "write_centred", spy)
    asked = 0
    for index in range(40):
        written.clear()
        picture = generate("train", 2, index, kind="table")
        for check in picture.checks:
            named = re.search(r"row (\w), column (\d)", question(picture, check.upto))
            if not named:
                continue
            asked += 1
            row = next(b for t, b in written if t == named[1] and b[0] == 4)
            column = next(b for t, b in written if t == named[2] and b[1] == 4)
            [cell] = [t for t, b in written if b[1] == row[1] and b[0] == column[0]]
            assert cell == check.expected["value"]
    assert asked > 30


def test_each_shape_touches_all_four_sides_of_its_box() -> None:
    for name in SHAPES:
        for length in (36, 48, 75, 108):
            image = Image.new("RGB", (140, 140), (255, 255, 255))
            drawing.shape(image, name, 16, 12, length, (0, 0, 0))
            inked = np.asarray(image.convert("L")) < 255
            rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
            assert (columns[0], rows[0]) == (16, 12), name
            assert (columns[-1], rows[-1]) == (15 + length, 11 + length), name


def test_colors_stay_apart_after_they_are_moved() -> None:
    """Twice the most that two colors move is less than their distance."""
    names = list(COLORS)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            gaps = [abs(a - b) for a, b in zip(COLORS[one], COLORS[two], strict=True)]
            assert max(gaps) > 2 * drawing.JITTER, (one, two)


def test_letters_that_look_alike_are_left_out_of_codes() -> None:
    assert not set(pictures.CODE_LETTERS) & set("01IOQ")
