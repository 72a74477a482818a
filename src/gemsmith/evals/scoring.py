"""What is right: a reply beside what its item expects. No model runs here.

By the kind of `expected`:
  calls       the same calls with equal names and arguments as JSON values, in any order; no
              problems
  answer      no call; the value stands in the reply as a whole word or number (an integer: is the
              last number of it), and the reply is short enough not to be a recital of the prompt
  no_tool     no call; the reply is the sentence that says so
  json        no call; the whole reply is JSON and equals the value
  text        no call; the reply is the value, letter by letter
  boxes       as many boxes as wanted, each over a wanted one with an IoU of 0.7 and its label
  points      as many points as wanted, each in a wanted box and with its label
  transcript  no call; the words of the value, case and punctuation aside
  reading     a long recording: no 4 words in a row, or more, are missing or other words
A reply that ran into the token limit is wrong.

Beside right and wrong, words are counted: errors are the fewest words to put in, take out or
change that make one text the other (Levenshtein); their share of the words said is the word error
rate, above 1 where much was made up. Intervals are Wilson's, 95 %.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from gemsmith.evals.items import Item, boxes
from gemsmith.text.boxes import Box, Point, parse_boxes

MAX_TOKENS = 384
"""Most tokens of one reply; the longest right one (a word problem worked out) has half as many."""
SLACK = 160
"""Characters that an answer may have beyond the value asked for."""
MIN_IOU = 0.7
DROPPED = 4
"""Words in a row, none of them heard, that make a dropped segment and not a misheard word. Other
words in their place do not make it better: a loop, or what a model makes up, fills every gap."""
BORDER = 5
"""Words on either side of a border between two windows that are near it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model did, as far as scoring needs it. Travels between processes."""

    text: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    problems: tuple[str, ...] = ()
    finish_reason: str = "stop"
    segments: tuple[str, ...] = ()
    """Of a long recording: the text of each window."""


def judge(item: Item, reply: Reply) -> str | None:
    """None if the reply is what the item expects, otherwise why not, in one line."""
    expected, kind = item.expected, item.expected["type"]
    if reply.finish_reason == "length":
        return f"no end within {MAX_TOKENS} tokens"
    if reply.problems:
        return "unreadable call: " + "; ".join(reply.problems)
    if kind == "calls":
        wanted = [(call["name"], call["arguments"]) for call in expected["calls"]]
        return None if _same_calls(wanted, reply.calls) else "other calls"
    if reply.calls:
        return f"called {', '.join(name for name, _ in reply.calls)}"
    if kind == "json":
        try:
            value = json.loads(reply.text)
        except (ValueError, RecursionError):
            return "not JSON"
        return None if same_json(value, expected["value"]) else "other JSON"
    if kind in ("boxes", "points"):
        return _misplaced(boxes(expected["value"]), reply.text, kind)
    if kind == "transcript":
        score = word_errors(expected["value"], reply.text)
        return f"{score.errors} word errors in {score.count} words" if score.errors else None
    if kind == "reading":
        missing = dropped(expected["value"], reply.text)
        return f"{missing} runs of {DROPPED} words or more were not heard" if missing else None
    if kind in ("no_tool", "text"):
        return None if reply.text.strip() == expected["value"] else "other words"
    return None if _answers(reply.text, expected["value"]) else "other answer"


def _same_calls(
    wanted: Sequence[tuple[str, Any]], made: Sequence[tuple[str, Mapping[str, Any]]]
) -> bool:
    left = list(made)
    for name, arguments in wanted:
        for call in left:
            if call[0] == name and same_json(call[1], arguments):
                left.remove(call)
                break
        else:
            return False
    return not left


def same_json(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true, order counts in lists and not in objects."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return a == b


def _answers(text: str, value: Any) -> bool:
    if len(text) > len(str(value)) + SLACK:
        return False
    if isinstance(value, int):
        numbers = re.findall(r"(?<!\d)-?\d+(?:[.,]\d+)*", text)
        return bool(numbers) and numbers[-1] == str(value)
    # As a whole: 4 is not in 14, 4.5, 4:30 or x4, but is in "4." and "(4)".
    whole = rf"(?<![\w])(?<!\d[.,:-]){re.escape(str(value))}(?!\w)(?![.,:-]\d)"
    return re.search(whole, text) is not None


# -- places -----------------------------------------------------------------------------------


def _misplaced(wanted: Sequence[Box], text: str, kind: str) -> str | None:
    """None if the boxes or points of the text are the wanted ones; the best pairs go first."""
    read = parse_boxes(text)
    if read.problems:
        return read.problems[0].message
    found = read.boxes if kind == "boxes" else read.points
    others = read.points if kind == "boxes" else read.boxes
    if len(found) != len(wanted) or others:
        return f"{len(found)} {kind} where {len(wanted)} are wanted" + ", and others" * bool(others)
    pairs = sorted(
        ((_fit(w, f), i, j) for i, w in enumerate(wanted) for j, f in enumerate(found)),
        reverse=True,
    )
    partner: dict[int, int] = {}
    for fit, i, j in pairs:
        if fit >= MIN_IOU and i not in partner and j not in partner.values():
            partner[i] = j
    if len(partner) < len(wanted):
        return f"{len(wanted) - len(partner)} of {len(wanted)} {kind} are elsewhere"
    same = (wanted[i].label.casefold() == found[j].label.casefold() for i, j in partner.items())
    return None if all(same) else "other labels"


def _fit(wanted: Box, found: Box | Point) -> float:
    """IoU of a box; of a point 1 inside and 0 outside."""
    if isinstance(found, Box):
        return iou(wanted, found)
    within_y = wanted.top <= found.y <= wanted.bottom
    return float(within_y and wanted.left <= found.x <= wanted.right)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0 where neither has an area."""
    high = max(0.0, min(a.bottom, b.bottom) - max(a.top, b.top))
    wide = max(0.0, min(a.right, b.right) - max(a.left, b.left))
    both = high * wide
    either = sum((box.bottom - box.top) * (box.right - box.left) for box in (a, b)) - both
    return both / either if either else 0.0


# -- words ------------------------------------------------------------------------------------

Step = tuple[str | None, str | None]
"""A word said and the word heard for it; None where there is none."""


@dataclass(frozen=True, slots=True)
class WordErrors:
    """Word errors among `count` words said."""

    errors: int
    count: int

    @property
    def rate(self) -> float:
        return self.errors / self.count

    @classmethod
    def of(cls, steps: Iterable[Step]) -> "WordErrors":
        steps = list(steps)
        return cls(sum(a != b for a, b in steps), sum(a is not None for a, _ in steps))

    def __add__(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(self.errors + other.errors, self.count + other.count)


def words(text: str) -> list[str]:
    """Without case and punctuation; 16:05, 4.5 and don't are one word each."""
    return re.findall(r"\w+(?:[:.']\w+)*", text.casefold())


def align(said: Sequence[str], heard: Sequence[str]) -> list[Step]:
    """One of the alignments with the fewest errors."""
    # costs[i][j]: errors between the first i words said and the first j heard
    costs = [list(range(len(heard) + 1))]
    for i, word in enumerate(said, 1):
        above, row = costs[-1], [i]
        for j, other in enumerate(heard, 1):
            row.append(min(above[j - 1] + (word != other), above[j] + 1, row[-1] + 1))
        costs.append(row)
    steps: list[Step] = []
    i, j = len(said), len(heard)
    while i or j:
        cost = costs[i][j]
        if i and j and cost == costs[i - 1][j - 1] + (said[i - 1] != heard[j - 1]):
            i, j = i - 1, j - 1
            steps.append((said[i], heard[j]))
        elif i and cost == costs[i - 1][j] + 1:
            i -= 1
            steps.append((said[i], None))
        else:
            j -= 1
            steps.append((None, heard[j]))
    return steps[::-1]


def word_errors(said: str, heard: str) -> WordErrors:
    return WordErrors.of(align(words(said), words(heard)))


def border_errors(said: str, segments: Sequence[str]) -> WordErrors:
    """Word errors within BORDER words of where one segment's text ends and the next begins."""
    heard = [words(segment) for segment in segments]
    steps = align(words(said), [word for segment in heard for word in segment])
    borders = set(accumulate(map(len, heard[:-1])))
    at_heard = [0, *accumulate(b is not None for _, b in steps)]
    at_said = [0, *accumulate(a is not None for a, _ in steps)]
    # Words missing at a border may belong to either side: the border is as wide as they are.
    edges = [at_said[n] for n, count in enumerate(at_heard) if count in borders]
    near = (
        step
        for n, step in enumerate(steps)
        if any(edge - BORDER <= at_said[n] < edge + BORDER for edge in edges)
    )
    return WordErrors.of(near)


def dropped(said: str, heard: str) -> int:
    """How many runs of DROPPED words or more that were said have none that was heard."""
    steps = align(words(said), words(heard))
    right = "".join("+" if a == b else "-" for a, b in steps if a is not None)
    return len(re.findall(f"-{{{DROPPED},}}", right))


def wilson(correct: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a rate, 95 % unless z says otherwise; (0, 1) where nothing was counted.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209.
    """
    if count == 0:
        return 0.0, 1.0
    rate, shrink = correct / count, 1 + z * z / count
    centre = (rate + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
