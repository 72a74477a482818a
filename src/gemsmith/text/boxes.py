"""Boxes and points in a model's answer: where in the picture it found what was asked.

Gemma writes JSON, coordinates in thousandths of the picture with y first:
  [{"box_2d": [y0, x0, y1, x1], "label": "red kettle"}]        [{"point": [y, x], "label": "..."}]
often in a ```json fence, with words around it. `parse_boxes` reads that and what else comes out in
practice: one object without a list, several lists, other names of the keys, single quotes, trailing
commas, bare numbers, an answer cut short. What cannot be read is a problem, never silence.

It is a reader of its own because json reads none of that and raises on depth: one pass over the
text, each character looked at once, whatever a model wrote.

What this is not: it draws nothing (see cli.detect) and knows no picture sizes.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

SCALE = 1000
MAX_CHARACTERS = 1 << 20
"""Of an answer that is read at all; a list of a thousand boxes has a hundredth of it."""

MAX_DEPTH = 64
"""Lists and objects inside each other."""

BOX_KEYS = ("box_2d", "bbox_2d", "bbox", "box", "bounding_box", "boundingBox", "coordinates")
POINT_KEYS = ("point", "point_2d", "center", "click")
LABEL_KEYS = ("label", "name", "class", "object", "text", "description")

# ASCII digits alone: what float() reads of others is nothing that a model was taught to write.
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_OPENER = re.compile(r"[\[{]")
_TOKEN = re.compile(
    rf"""\s*(?:(?P<mark>[\[\](){{}},:])|(?P<number>{_NUMBER})|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<string>"[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*')|(?P<other>\S))""",
    re.DOTALL,
)
_REST = {"{": re.compile(r"[^{}]*\}?"), "[": re.compile(r"[^\[\]{}]*\]?")}
"""Of an object or list that is not read on: to its end, or to what begins next."""
_WORDS: dict[str, bool | None] = {
    "true": True, "True": True, "false": False, "False": False,
    "null": None, "None": None, "NaN": None, "Infinity": None,
}  # fmt: skip

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
    problem; a text without any list or object is one. Of an object with a place of its own, what
    else it holds is read where it holds places; a label without a place goes to what is inside.
    x, y, width and height are a box with its top left corner there.
    """
    places = Places([], [], [])
    if len(text) > MAX_CHARACTERS:
        message = f"the answer has {len(text)} characters, more than the {MAX_CHARACTERS} read"
        places.problems.append(BoxProblem("unreadable", message))
        text = text[:MAX_CHARACTERS]
    answered = _read(text, places)
    if not (answered or places.boxes or places.points or places.problems):
        message = "no box or point in the answer"
        places.problems.append(BoxProblem("none_found", message, _short(text)))
    return places


# -- text to lists and objects ----------------------------------------------------------------


@dataclass(slots=True)
class _Open:
    """A list or object whose end has not come yet."""

    start: int
    made: list[Any] | dict[str, Any]
    expects: Literal["key", "colon", "value", "comma"]
    key: str = ""


def _read(text: str, places: Places) -> bool:
    """Read every list and object of `text` into `places`; whether any was whole."""
    answered = False
    stack: list[_Open] = []
    position = 0
    while True:
        if not stack:
            opener = _OPENER.search(text, position)
            if opener is None:
                return answered
            position = opener.start()
            stack.append(_opened(opener[0], position))
            position += 1
            continue
        token = _TOKEN.match(text, position)
        if token is None or token["other"] in ('"', "'"):  # a string without an end
            message = "the answer ends inside a list or object; ask for more tokens"
            _give_up(stack, "cut_off", message, text, len(text), places)
            return answered
        top, mark = stack[-1], token["mark"]
        if mark and mark in "[{(" and top.expects == "value":
            if len(stack) == MAX_DEPTH:
                message = f"more than {MAX_DEPTH} lists inside each other; the rest is not read"
                _give_up(stack, "unreadable", message, text, position, places)
                return answered
            stack.append(_opened(mark, token.end() - 1))
        elif mark and _closes(mark, top):
            stack.pop()
            if stack:
                _put(stack[-1], top.made)
            else:
                _read_value(top.made, "", places)
                answered = True
        elif not _takes(top, token):
            # Words in brackets are no place. Anything else here was meant to be one.
            if len(stack) > 1 or top.made or isinstance(top.made, dict) or token[0][-1].isdigit():
                message = "neither JSON nor like it"
                position = _give_up(stack, "unreadable", message, text, position, places)
            stack.clear()
            continue
        position = token.end()


def _opened(mark: str, start: int) -> _Open:
    return _Open(start, {}, "key") if mark == "{" else _Open(start, [], "value")


def _closes(mark: str, top: _Open) -> bool:
    """With a trailing comma, too."""
    if isinstance(top.made, dict):
        return mark == "}" and top.expects in ("key", "comma")
    return mark in "])" and top.expects in ("value", "comma")


def _takes(top: _Open, token: re.Match[str]) -> bool:
    """Take a token that neither opens nor closes anything; False if none such belongs here."""
    if token["mark"]:
        if token["mark"] == ":" and top.expects == "colon":
            top.expects = "value"
        elif token["mark"] == "," and top.expects == "comma":
            top.expects = "key" if isinstance(top.made, dict) else "value"
        else:
            return False
        return True
    if token["string"]:
        value: Any = _string(token["string"])
    elif token["number"]:
        value = _number(token["number"])
    elif token["word"] and (top.expects == "key" or token["word"] in _WORDS):
        value = token["word"] if top.expects == "key" else _WORDS[token["word"]]
    else:
        return False
    if top.expects == "key":
        top.key, top.expects = str(value), "colon"
        return True
    if top.expects == "value":
        _put(top, value)
        return True
    return False


def _put(top: _Open, value: Any) -> None:
    if isinstance(top.made, dict):
        top.made[top.key] = value
    else:
        top.made.append(value)
    top.expects = "comma"


def _string(token: str) -> str:
    inner = token[1:-1]
    if token[0] == "'":
        inner = re.sub(r"""\\.|\"""", _in_double_quotes, inner, flags=re.DOTALL)
    try:
        value = json.loads(f'"{inner}"', strict=False)
    except ValueError:  # an escape that JSON has not
        value = inner
    # Half a surrogate pair cannot be printed.
    return value.encode("utf-8", "replace").decode("utf-8")


def _in_double_quotes(match: re.Match[str]) -> str:
    return {"\\'": "'", '"': '\\"'}.get(match[0], match[0])


def _number(token: str) -> float:
    return int(token) if len(token) < 20 and token.lstrip("+-").isdigit() else float(token)


def _give_up(
    stack: list[_Open], kind: ProblemKind, message: str, text: str, position: int, places: Places
) -> int:
    """Read what was whole inside of what is not, and report the rest; where that ends."""
    for level in stack:
        if isinstance(level.made, dict):
            whole = [value for value in level.made.values() if _holds_objects(value)]
        else:
            whole = [value for value in level.made if isinstance(value, list | dict)]
        for value in whole:
            _read_value(value, "", places)
    start = next((o.start for o in reversed(stack) if isinstance(o.made, dict)), stack[-1].start)
    rest = _REST["{" if text[start] == "{" else "["].match(text, position)
    end = rest.end() if rest else position
    places.problems.append(BoxProblem(kind, message, _short(text[start:end])))
    return end


# -- lists and objects to places --------------------------------------------------------------


def _read_value(value: list[Any] | dict[str, Any], label: str, places: Places) -> None:
    if isinstance(value, dict):
        _read_object(value, label, places)
        return
    inner = [item for item in value if isinstance(item, list | dict)]
    if value and not inner:
        _add(value, label, value, places)
        return
    if len(inner) < len(value):
        loose = [item for item in value if not isinstance(item, list | dict)]
        message = "a list with something beside its places"
        places.problems.append(BoxProblem("unreadable", message, _dumped(loose)))
    for item in inner:
        _read_value(item, label, places)


def _read_object(found: dict[str, Any], label: str, places: Places) -> None:
    """label: of what it is in; its own goes first."""
    label = next((found[key] for key in LABEL_KEYS if isinstance(found.get(key), str)), label)
    own = _own_places(found)
    keys = (*BOX_KEYS, *POINT_KEYS)
    inner = [v for key, v in found.items() if key not in keys and _holds_objects(v)]
    for values in own:
        if isinstance(values, dict):
            _read_object(values, label, places)
        elif _holds_objects(values):
            _read_value(values, label, places)
        elif isinstance(values, list) and all(isinstance(v, list) and len(v) == 4 for v in values):
            for four in values or [values]:
                _add(four, label, found, places)
        else:
            _add(values, label, found, places)
    if own:
        inner, label = [v for v in inner if _has_places(v)], ""
    elif not inner:
        _add(None, label, found, places)
    for value in inner:
        _read_value(value, label, places)


def _own_places(found: dict[str, Any]) -> list[Any]:
    """What its keys for boxes and points hold, each value once; or its corners by name."""
    own: list[Any] = []
    for key in (*BOX_KEYS, *POINT_KEYS):
        if key in found and found[key] not in own:
            own.append(found[key])
    corners = None if own else _named_corners(found)
    return own if corners is None else [corners]


def _named_corners(found: dict[str, Any]) -> list[Any] | None:
    for names in (("ymin", "xmin", "ymax", "xmax"), ("y0", "x0", "y1", "x1")):
        if all(name in found for name in names):
            return [found[name] for name in names]
    if "y" not in found or "x" not in found:
        return None
    y, x = found["y"], found["x"]
    height, width = (found.get(name, found.get(name[0])) for name in ("height", "width"))
    if height is None and width is None:
        return [y, x]
    if all(_is_number(value) for value in (y, x, height, width)):
        return [y, x, y + height, x + width]
    return [y, x, height, width]  # which is no place, and told


def _holds_objects(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(_holds_objects(item) for item in value)
    )


def _has_places(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(_own_places(value)) or any(map(_has_places, value.values()))
    return isinstance(value, list) and any(map(_has_places, value))


def _add(values: Any, label: str, found: Any, places: Places) -> None:
    """One box of four numbers, one point of two; anything else is a problem of `found`."""
    if isinstance(values, str) and not re.sub(_NUMBER, "", values).strip(" \t\n,[]()"):
        values = [_number(n) for n in re.findall(_NUMBER, values)]
    if isinstance(values, list) and len(values) == 1:
        values = values[0]  # [[y, x]]
    numbers = [v for v in values if _is_number(v)] if isinstance(values, list) else []
    if not isinstance(values, list) or len(numbers) != len(values) or len(numbers) not in (2, 4):
        message = "a place needs four numbers [y0, x0, y1, x1], or two [y, x]"
        places.problems.append(BoxProblem("wrong_numbers", message, _dumped(found)))
        return
    if not all(0 <= n <= SCALE for n in numbers):
        message = f"coordinates must be from 0 to {SCALE}, thousandths of the picture"
        places.problems.append(BoxProblem("outside", message, _dumped(found)))
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


def _dumped(found: Any) -> str:
    return _short(json.dumps(found, ensure_ascii=False))


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 200 else text[:197] + "..."
