"""Boxes and points in a model's answer: where in the picture it found what was asked.

Gemma writes JSON, coordinates in thousandths of the picture with y first:
  [{"box_2d": [y0, x0, y1, x1], "label": "red kettle"}]        [{"point": [y, x], "label": "..."}]
often in a ```json fence, with words around it. `parse_boxes` reads that and what else comes out in
practice: one object without a list, other names of the keys, single quotes, trailing commas, lists
of bare numbers, an answer cut short. What cannot be read is a problem, never silence.

What this is not: it draws nothing (see cli.detect) and knows no picture sizes.
"""

import ast
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

SCALE = 1000
MAX_CHARACTERS = 1 << 20
"""Of an answer that is read at all; a list of a thousand boxes has a hundredth of it."""

BOX_KEYS = ("box_2d", "bbox_2d", "bbox", "box", "bounding_box", "boundingBox", "coordinates")
POINT_KEYS = ("point", "point_2d", "center", "click")
LABEL_KEYS = ("label", "name", "class", "object", "text", "description")

_NUMBER = r"[-+]?\d+(?:\.\d*)?"
_OBJECT = re.compile(r"\{[^{}]*\}")
_BARE = re.compile(rf"\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER}){{1,3}}\s*,?\s*\]")
_NUMBERS_IN_WORDS = re.compile(rf"^[\s\[(]*{_NUMBER}(?:[\s,]+{_NUMBER})+[\s\])]*$")

ProblemKind = Literal["none_found", "unreadable", "cut_off", "wrong_numbers", "outside"]


@dataclass(frozen=True, slots=True)
class Box:
    """A region, in thousandths of the picture's height and width; top <= bottom, left <= right."""

    top: float
    left: float
    bottom: float
    right: float
    label: str = ""

    def pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """left, top, right, bottom in a picture of this size."""
        x, y = width / SCALE, height / SCALE
        return self.left * x, self.top * y, self.right * x, self.bottom * y


@dataclass(frozen=True, slots=True)
class Point:
    """A place, in thousandths of the picture's height and width."""

    y: float
    x: float
    label: str = ""

    def pixels(self, width: int, height: int) -> tuple[float, float]:
        """x, y in a picture of this size."""
        return self.x * width / SCALE, self.y * height / SCALE


@dataclass(frozen=True, slots=True)
class BoxProblem:
    """Something in the answer that gives no place, and the text it stands in."""

    kind: ProblemKind
    message: str
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """Everything that was found, in the order of the answer."""

    boxes: list[Box]
    points: list[Point]
    problems: list[BoxProblem]


def parse_boxes(text: str) -> Places:
    """Every box and point in `text`; never raises, and is never silent about what it cannot read.

    Corners in the wrong order are put right. An empty list is an answer ("there is none") and no
    problem; a text without any list or object is one.
    """
    places = Places([], [], [])
    if len(text) > MAX_CHARACTERS:
        message = f"the answer has {len(text)} characters, more than the {MAX_CHARACTERS} read"
        places.problems.append(BoxProblem("unreadable", message))
        text = text[:MAX_CHARACTERS]
    objects = list(_json_objects(text))
    for found in objects:
        _read_object(found, json.dumps(found), places)
    if objects:
        return places
    end = 0
    for match in _OBJECT.finditer(text):
        end = match.end()
        _read_object(_loaded(match[0]), match[0], places)
    rest = text[end:]
    if "{" in rest:
        raw = rest[rest.index("{") :]
        message = "the answer ends inside an object; ask for more tokens"
        places.problems.append(BoxProblem("cut_off", message, _short(raw)))
    elif end == 0:
        bare = list(_BARE.finditer(text))
        for match in bare:
            _add(
                json.loads(re.sub(r",\s*\]", "]", match[0].replace("+", ""))), "", match[0], places
            )
        if not bare and not re.search(r"\[\s*\]", text):
            message = "no box or point in the answer"
            places.problems.append(BoxProblem("none_found", message, _short(text)))
    return places


def _json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The innermost objects of the first list or object of `text`, if it is JSON as it should."""
    start = re.search(r"[\[{]\s*[\[{\"]", text)
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start.start() if start else len(text))
    except (ValueError, RecursionError):
        return
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            inner = [v for v in value.values() if _holds_objects(v)]
            if inner:
                waiting += reversed(inner)
            else:
                yield value
        elif isinstance(value, list):
            waiting += reversed(value)


def _holds_objects(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def _read_object(found: dict[str, Any] | None, raw: str, places: Places) -> None:
    if found is None:
        message = "an object that is neither JSON nor like it"
        places.problems.append(BoxProblem("unreadable", message, _short(raw)))
        return
    values = next((found[key] for key in (*BOX_KEYS, *POINT_KEYS) if key in found), None)
    if values is None:
        values = _named_corners(found)
    label = next((str(found[key]) for key in LABEL_KEYS if isinstance(found.get(key), str)), "")
    _add(values, label, raw, places)


def _loaded(raw: str) -> dict[str, Any] | None:
    """A flat object: JSON, or a Python literal with single quotes and trailing commas."""
    for attempt in _spellings(raw):
        try:
            value = json.loads(attempt)
        except ValueError:
            try:
                value = ast.literal_eval(attempt)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
        if isinstance(value, dict):
            return value
    return None


def _spellings(raw: str) -> Iterator[str]:
    yield raw
    without_commas = re.sub(r",\s*([\]}])", r"\1", raw)
    yield without_commas
    yield re.sub(r"([{,]\s*)([A-Za-z_]\w*)\s*:", r'\1"\2":', without_commas)


def _named_corners(found: dict[str, Any]) -> list[Any] | None:
    for names in (("ymin", "xmin", "ymax", "xmax"), ("y0", "x0", "y1", "x1"), ("y", "x")):
        if all(name in found for name in names):
            return [found[name] for name in names]
    return None


def _add(values: Any, label: str, raw: str, places: Places) -> None:
    """One box of four numbers, one point of two; anything else is a problem."""
    if isinstance(values, str) and _NUMBERS_IN_WORDS.match(values):
        values = [float(n) for n in re.findall(_NUMBER, values)]
    if isinstance(values, list | tuple) and len(values) == 1:
        values = values[0]  # [[y0, x0, y1, x1]]
    numbers = [v for v in values if _is_number(v)] if isinstance(values, list | tuple) else []
    if (
        not isinstance(values, list | tuple)
        or len(numbers) != len(values)
        or (len(numbers) not in (2, 4))
    ):
        message = "a place needs four numbers [y0, x0, y1, x1], or two [y, x]"
        places.problems.append(BoxProblem("wrong_numbers", message, _short(raw)))
        return
    if not all(0 <= n <= SCALE for n in numbers):
        message = f"coordinates must be from 0 to {SCALE}, thousandths of the picture"
        places.problems.append(BoxProblem("outside", message, _short(raw)))
        return
    if len(numbers) == 2:
        places.points.append(Point(numbers[0], numbers[1], label))
        return
    top, left, bottom, right = numbers
    top, bottom = sorted((top, bottom))
    left, right = sorted((left, right))
    places.boxes.append(Box(top, left, bottom, right, label))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 200 else text[:197] + "..."
