"""Lark grammars of llguidance's dialect: their syntax, and whether llguidance can hold to one.

What is asked of a model is no business of this module (see `grammar`).

Sources of the syntax: guidance-ai/llguidance docs/syntax.md, docs/parametric.md.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

MAX_PATTERN = 10_000
"""Characters of a regular expression."""
TRIED = 64
"""Bytes of a text that are written to try its grammar."""
CLOSING = b"}],:"
"""What ends or parts values: written before other bytes, so that a trial comes to its end."""


# -- writing ----------------------------------------------------------------------------------


def times(body: str, low: int, high: int | None) -> str:
    """`body` from `low` to `high` times."""
    return '""' if high == 0 else f"{body}{{{low},{'' if high is None else high}}}"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def escaped(pattern: str) -> str:
    """A regular expression between slashes."""
    return re.sub(r"(\\.)|/", lambda match: match[1] or r"\/", pattern, flags=re.DOTALL).replace(
        "\n", r"\n"
    )


def without(words: Sequence[str]) -> str:
    """A regular expression of the texts that contain none of `words`.

    Each word has one `<`, in front. Spelled out rather than negated: the parser takes such a string
    in microseconds a token instead of milliseconds.
    """

    def rest(tails: set[str]) -> str:
        following: dict[str, set[str]] = {}
        for tail in tails:
            following.setdefault(tail[0], set()).add(tail[1:])
        no = "".join("\\" + char if char in '|"^-]\\' else char for char in sorted(following))
        # The text ends here, or goes on with another letter, or with a word's letter but not on.
        ways = [rf"[^<{no}][^<]*"]
        ways += [
            re.escape(char).replace('\\"', '"') + rest(tails)
            for char, tails in sorted(following.items())
            if "" not in tails
        ]
        return f"({'|'.join(ways)})?"

    return f"[^<]*(<{rest({word[1:] for word in words})})*"


def anchored(pattern: str) -> str:
    """A JSON schema's pattern, which matches anywhere, as one that matches the whole text.

    Letters, digits and spaces are ASCII's, which every reading of `\\w`, `\\d` and `\\s` takes in.
    """
    from llguidance import regex_to_lark

    # regex_to_lark escapes slashes for Lark; the grammar here does so itself.
    pattern = regex_to_lark(pattern, "dws").replace(r"\/", "/")
    ways = []
    for way in _branches(pattern):
        start, end = way.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$$", way))
        way = way[start : len(way) - end]
        ways.append(f"{'' if start else '(?s:.*)'}({way}){'' if end else '(?s:.*)'}")
    return "|".join(ways) if len(ways) == 1 else f"({'|'.join(ways)})"


def _branches(pattern: str) -> list[str]:
    """The alternatives of an expression, cut at each | outside groups and classes."""
    ways, start, depth, in_class, at = [], 0, 0, False, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
            at += pattern[at + 1 : at + 2] == "^"
            at += pattern[at + 1 : at + 2] == "]"
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
        elif char == "|" and depth == 0:
            ways.append(pattern[start:at])
            start = at + 1
        at += 1
    return [*ways, pattern[start:]]


# -- trying -----------------------------------------------------------------------------------


@cache
def byte_vocabulary() -> Any:
    """A vocabulary of the 256 bytes, to try a grammar with."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def complaint(grammar: str) -> str:
    """The first line of what llguidance finds wrong with a grammar; "" if nothing is."""
    from llguidance import LLMatcher

    lines = [line.strip() for line in LLMatcher.validate_grammar(grammar).splitlines()]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (reasons or [line for line in lines if line] or [""])[0]


def matcher(vocabulary: Any, grammar: str) -> Any:
    """An `llguidance.LLMatcher` within the bounds that a request of anybody's may take up.

    Whatever goes wrong shows in its `is_error`. One mask takes tens of milliseconds at most, what
    it remembers 100 MB.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_items_in_row=10_000, max_lexer_states=50_000, verbose_errors=False)
    return LLMatcher(vocabulary, grammar, limits=limits, log_level=0)


def reason(failed: Any) -> str:
    """Why a matcher can go no further, in a line."""
    return (failed.get_error().strip().splitlines() or ["unknown"])[0]


def stumble(grammar: str) -> str:
    """What goes wrong when a text is written by this grammar, as short as it goes; "" if nothing.

    The vocabulary is the 256 bytes, 256 and 257 two markers; 257 ends the text.

    Some grammars are too large only once their parser gets to work: this is found before a reply.
    """
    tried = matcher(byte_vocabulary(), grammar)
    for _ in range(TRIED):
        bits = tried.compute_bitmask()
        if tried.is_error() or tried.is_stopped():
            break
        may = [id for id in (257, 256, *CLOSING, *range(256)) if bits[id // 8] >> id % 8 & 1]
        if not may or not tried.consume_token(may[0]):
            break
    return reason(tried) if tried.is_error() else ""
