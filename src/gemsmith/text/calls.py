"""Reading tool calls out of what a model wrote.

The official spelling is `<|tool_call>call:NAME{key:value,...}<tool_call|>`: keys bare, strings
between `<|"|>` markers with nothing escaped, everything else as in JSON. Models stray from it, so
the parser forgives what it can read one way only, and turns the rest into typed problems. It never
raises, and no `<|tool_call>` goes by without a call or a problem. It does not check arguments
against a schema (see `tools`) and runs nothing.

A quoted string ends at the first quote after which the grammar can go on; markers inside it are
text. So a call cannot be smuggled in through the text of an argument.

Sources: official chat template of 2026-07-09; vllm-project/vllm issues 39069, 42696, 44522, 51284
(what models really write).
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

QUOTE = '<|"|>'
CALL_OPEN, CALL_CLOSE = "<|tool_call>", "<tool_call|>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<|tool_response>", "<tool_response|>"

NAME = re.compile(r"[\w.\-/:$@]{1,256}")
"""The name of a tool."""
MAX_DEPTH = 64
"""Deepest nesting of lists and mappings read or written."""


ProblemKind = Literal[
    "truncated",  # the text ends inside a call
    "malformed",  # not a call in any known spelling
    "too_deep",  # nested deeper than MAX_DEPTH
    "duplicate_key",  # a key given twice; the call carries the last value
    "ambiguous_string",  # a string swallowed what looks like another call
    "invalid_arguments",  # the call does not fit its declared schema
    "unknown_tool",  # no such tool was declared
]


_WITHOUT_TEXT = ("truncated", "duplicate_key", "invalid_arguments", "unknown_tool")
_ANY_MARKER = re.compile(r'<\|[\w"]+\|?>|<\w+\|>')


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the model asked for."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the model's text that is no good call, and where it stands."""

    kind: ProblemKind
    message: str
    raw: str = ""
    start: int = 0
    end: int = 0

    @property
    def text(self) -> str:
        """What of it a reader is shown as text: the words of a call that could not be read, without
        markers. Nothing of a call that the end of the text cut, nor where a call came of it."""
        if self.kind in _WITHOUT_TEXT:
            return ""
        words = _ANY_MARKER.sub(" ", self.raw)
        return words if words.strip() else ""


@dataclass(frozen=True, slots=True)
class ParsedCalls:
    """Everything that was found, in the order of the text."""

    calls: list[ToolCall]
    problems: list[Problem]


def parse_calls(text: str) -> ParsedCalls:
    """Every tool call in `text`, forgivingly; never raises, never drops one without a problem.

    Besides the official spelling it reads: a missing `call:`, parentheses with `:` or `=`, JSON or
    single quotes, JSON objects, unquoted strings, quote markers inside a string, several calls in
    one pair of markers, and a missing close marker after a complete call. A call that the text cuts
    short is a problem, never a call. Time is linear in the text.
    """
    calls: list[ToolCall] = []
    problems: list[Problem] = []
    parser = CallParser(text)
    at = text.find(CALL_OPEN)
    while at >= 0:
        found = parser.block(at)
        calls += found.calls
        problems += found.problems
        at = text.find(CALL_OPEN, found.end)
    return ParsedCalls(calls, problems)


@dataclass(frozen=True, slots=True)
class CallBlock:
    """The calls of one pair of markers; `end` is where reading goes on."""

    calls: list[ToolCall]
    problems: list[Problem]
    end: int


class NeedMore(Exception):
    """More text has to come before the block can be told."""


class _Bad(Exception):
    def __init__(self, kind: ProblemKind, message: str, at: int) -> None:
        super().__init__(message)
        self.kind: ProblemKind = kind
        self.at = at


# Possessive repeats (*+) never give characters back, which keeps every match linear.
_HEADER = re.compile(rf"\s*+(?:call\s*+:|:)?\s*+({NAME.pattern}+)\s*+")
_GAP = re.compile(r"[\s,;}\])]*+")
_SPACE = re.compile(r"\s*+")
_MARKER = re.compile(r"<tool_call\|>|<\|tool_call>")
_CALL_INSIDE = re.compile(rf"<\|tool_call>{_HEADER.pattern}[({{]")
_CALL_BEGUN = re.compile(r"c(?:a(?:l(?:l\s*+(?::\s*+)?)?)?)?")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_WORDS: dict[str, Any] = {
    "null": None, "None": None, "true": True, "True": True, "false": False, "False": False,
}  # fmt: skip
_CLOSERS = {"{": "}", "(": ")", "[": "]"}
_MAX_KEY = 256
_KEY_SO_FAR = re.compile(r"[^{}\[\](),\n<]{1,256}+")
_MAX_DIGITS = 4000


class CallParser:
    """Reads blocks of calls out of one text.

    With `final=False` the text may still grow: `block` then raises NeedMore rather than decide
    something that later text could change.
    """

    def __init__(self, text: str, *, final: bool = True) -> None:
        self.text, self.final = text, final
        self.problems: list[Problem] = []
        self.block_start = 0
        # For a quote in a context: from here on no closing quote exists. Keeps the time linear.
        self.unclosed_from: dict[tuple[str, str], int] = {}

    def block(self, start: int) -> CallBlock:
        """The block whose `<|tool_call>` stands at `start`.

        Raises:
          NeedMore: only with final=False.
        """
        self.problems, self.block_start = [], start
        calls: list[ToolCall] = []
        at, begun = start + len(CALL_OPEN), start
        try:
            while True:
                at = self.skip(_GAP, at)
                begun = at if calls else start
                if self.starts(CALL_CLOSE, at):
                    at += len(CALL_CLOSE)
                    break
                if calls and at == len(self.text):
                    break  # cut before the close marker
                if calls and not self.begins_call(at):
                    if self.ends_within_marks(at):
                        raise self.truncated(at)
                    # Complete, only the close marker is missing; the rest is ordinary text.
                    return CallBlock(calls, self.problems, self.without_gap(at))
                call, at = self.call(at)
                calls.append(call)
            if not calls:
                raise _Bad("malformed", "nothing between the tool call markers", start)
        except _Bad as bad:
            marker = _MARKER.search(self.text, max(bad.at, start + len(CALL_OPEN)))
            if marker is None:
                self.need(len(self.text))
                at = len(self.text)
            else:
                at = marker.end() if marker[0] == CALL_CLOSE else marker.start()
            # A marker further on shows that the text was not cut short here.
            kind = "malformed" if bad.kind == "truncated" and marker else bad.kind
            self.report(kind, str(bad), begun, at)
        return CallBlock(calls, self.problems, at)

    def report(self, kind: ProblemKind, message: str, start: int, end: int) -> None:
        self.problems.append(Problem(kind, message, self.text[start:end], start, end))

    # Looking ahead, so that a growing text is never judged too early.

    def need(self, at: int) -> None:
        if at >= len(self.text) and not self.final:
            raise NeedMore

    def skip(self, pattern: re.Pattern[str], at: int) -> int:
        match = pattern.match(self.text, at)
        end = match.end() if match else at
        self.need(end)
        return end

    def starts(self, token: str, at: int) -> bool:
        if self.text.startswith(token, at):
            return True
        if not self.final and token.startswith(self.text[at : at + len(token)]):
            raise NeedMore
        return False

    def char(self, at: int) -> str:
        self.need(at)
        return self.text[at : at + 1]

    def truncated(self, at: int) -> _Bad:
        return _Bad("truncated", "the text ends inside a tool call", at)

    def without_gap(self, at: int) -> int:
        while at > self.block_start and self.text[at - 1] in " \t\r\n,;":
            at -= 1
        return at

    # The grammar.

    def begins_call(self, at: int) -> bool:
        """Whether one more call follows in the same pair of markers."""
        return self.starts("call", at) and self.char(self.skip(_SPACE, at + len("call"))) == ":"

    def ends_within_marks(self, at: int) -> bool:
        """Whether the text ends in the beginning of one more call, or of a marker within calls."""
        rest = self.text[at : at + len(CALL_CLOSE)]
        begun = any(marker.startswith(rest) for marker in (CALL_CLOSE, QUOTE))
        return begun or bool(_CALL_BEGUN.fullmatch(self.text, at))

    def call(self, at: int) -> tuple[ToolCall, int]:
        if self.char(at) == "{":
            return self.json_call(at)
        begun, header = at, _HEADER.match(self.text, at)
        if header is None:
            self.need(at)
            if at >= len(self.text):
                raise self.truncated(at)
            raise _Bad("malformed", "no tool name where a call should be", at)
        name, at = header[1], header.end()
        bracket = self.char(at)
        if bracket in ("{", "("):
            arguments, at = self.arguments(at, bracket)
            return ToolCall(name, arguments), at
        if self.starts(CALL_CLOSE, at):
            return ToolCall(name, {}), at
        if self.ends_within_marks(at) or self.ends_within_marks(begun):
            raise self.truncated(at)
        raise _Bad("malformed", f"no arguments after the tool name {show(name)}", at)

    def arguments(self, at: int, bracket: str) -> tuple[dict[str, Any], int]:
        if bracket == "(":
            inside = self.skip(_SPACE, at + 1)
            if self.char(inside) == "{":
                value, end = self.mapping(inside, "{", 1)
                end = self.skip(_SPACE, end)
                if self.char(end) != ")":
                    raise self.expected(")", end)
                return value, end + 1
        return self.mapping(at, bracket, 1)

    def json_call(self, at: int) -> tuple[ToolCall, int]:
        value, end = self.mapping(at, "{", 1)
        name = value.get("name")
        arguments = value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise _Bad("malformed", "an object without 'name' and 'arguments' is no call", end)
        return ToolCall(name, arguments), end

    def mapping(self, at: int, bracket: str, depth: int) -> tuple[dict[str, Any], int]:
        self.check_depth(depth, at)
        closer, result = _CLOSERS[bracket], {}
        at = self.skip(_SPACE, at + 1)
        while self.char(at) != closer:
            key_at = at
            key, at = self.key(at, bracket)
            value, at = self.value(at, bracket, depth)
            if key in result:
                self.report("duplicate_key", f"the key {show(key)} is given twice", key_at, at)
            result[key] = value
            at = self.skip(_SPACE, at)
            if self.char(at) == ",":
                at = self.skip(_SPACE, at + 1)
            elif self.char(at) != closer:
                raise self.expected(f"',' or {closer!r}", at)
        return result, at + 1

    def sequence(self, at: int, depth: int) -> tuple[list[Any], int]:
        self.check_depth(depth, at)
        result: list[Any] = []
        at = self.skip(_SPACE, at + 1)
        while self.char(at) != "]":
            value, at = self.value(at, "[", depth)
            result.append(value)
            at = self.skip(_SPACE, at)
            if self.char(at) == ",":
                at = self.skip(_SPACE, at + 1)
            elif self.char(at) != "]":
                raise self.expected("',' or ']'", at)
        return result, at + 1

    def check_depth(self, depth: int, at: int) -> None:
        if depth > MAX_DEPTH:
            raise _Bad("too_deep", f"arguments are nested more than {MAX_DEPTH} levels deep", at)

    def expected(self, what: str, at: int) -> _Bad:
        if self.ends_within_marks(at):
            return self.truncated(at)
        return _Bad("malformed", f"{what} expected, not {self.text[at]!r}", at)

    def key(self, at: int, bracket: str) -> tuple[str, int]:
        quote = self.quote_at(at)
        if quote:
            key, at = self.string(at, quote, ":")
            at = self.skip(_SPACE, at)
            if self.char(at) in self.separators(bracket):
                return key, self.skip(_SPACE, at + 1)
            raise self.expected("':' after a key", at)
        end = self.bare_key_end(at, bracket)
        if end is None:
            if _KEY_SO_FAR.fullmatch(self.text, at):
                raise self.truncated(at)
            raise self.expected("a key and ':'", at)
        return self.text[at:end].strip(), self.skip(_SPACE, end + 1)

    def separators(self, bracket: str) -> str:
        return ":=" if bracket == "(" else ":"

    def bare_key_end(self, at: int, bracket: str) -> int | None:
        """Index of the ':' that ends a bare key starting at `at`; None if none does."""
        separators = self.separators(bracket)
        for index in range(at, at + _MAX_KEY):
            char = self.char(index)
            if not char or char in "{}[](),\n<":
                return None
            if char in separators:
                return index
        return None

    def value(self, at: int, bracket: str, depth: int) -> tuple[Any, int]:
        quote = self.quote_at(at)
        if quote:
            try:
                return self.string(at, quote, bracket)
            except _Bad:
                if quote != "'":
                    raise
                return self.bare(at, bracket)
        char = self.char(at)
        if char == "{":
            return self.mapping(at, "{", depth + 1)
        if char == "[":
            return self.sequence(at, depth + 1)
        return self.bare(at, bracket)

    def quote_at(self, at: int) -> str:
        if self.starts(QUOTE, at):
            return QUOTE
        return self.char(at) if self.char(at) in ('"', "'") else ""

    def string(self, at: int, quote: str, context: str) -> tuple[str, int]:
        """A quoted string; a quote is text unless the grammar can go on after it."""
        start = at + len(quote)
        state = (quote, context)
        end = start
        while True:
            hopeless = start >= self.unclosed_from.get(state, len(self.text) + 1)
            end = -1 if hopeless else self.text.find(quote, end)
            if end < 0:
                if not self.final:
                    raise NeedMore
                self.unclosed_from[state] = min(start, self.unclosed_from.get(state, start))
                raise _Bad("truncated", "a string is never closed", start)
            escaped = quote != QUOTE and self.is_escaped(start, end)
            if not escaped and self.closes(end + len(quote), context):
                break
            end += len(quote)
        raw = self.text[start:end]
        if _CALL_INSIDE.search(raw):
            raise _Bad(
                "ambiguous_string",
                "a string runs over what looks like another tool call; its end may be missing",
                end + len(quote),
            )
        # A marker inside the string is how a model writes a quote there.
        value = raw.replace(QUOTE, '"') if quote == QUOTE else _unescape(raw)
        return value, end + len(quote)

    def is_escaped(self, start: int, at: int) -> bool:
        backslashes = at
        while backslashes > start and self.text[backslashes - 1] == "\\":
            backslashes -= 1
        return (at - backslashes) % 2 == 1

    def closes(self, at: int, context: str) -> bool:
        """Whether the grammar can go on at `at` after a string in this context."""
        at = self.skip(_SPACE, at)
        char = self.char(at)
        if context == ":":
            return char in (":", "=") and char != ""
        if char == "" or char in "}])" or self.starts(CALL_CLOSE, at):
            return True
        return char == "," and self.continues(at + 1, context)

    def continues(self, at: int, bracket: str) -> bool:
        """Whether another element follows the comma before `at`."""
        at = self.skip(_SPACE, at)
        char = self.char(at)
        if char == "" or char == _CLOSERS[bracket]:
            return True
        if bracket == "[":
            return bool(
                self.quote_at(at)
                or char in "{[-+.0123456789"
                or any(self.starts(word, at) for word in _WORDS)
            )
        return bool(self.quote_at(at)) or self.bare_key_end(at, bracket) is not None

    def bare(self, at: int, bracket: str) -> tuple[Any, int]:
        """An unquoted value: a number, a word, or text up to where the grammar can go on."""
        closer, start = _CLOSERS[bracket], at
        while True:
            char = self.char(at)
            if not char:
                raise self.truncated(at)
            if char == closer:
                break
            if char == "," and (bracket == "[" or self.continues(at + 1, bracket)):
                break
            if char == "<" and (self.starts(CALL_CLOSE, at) or self.starts(CALL_OPEN, at)):
                raise _Bad("malformed", f"{closer!r} is missing before the end of the call", at)
            at += 1
        text = self.text[start:at].strip()
        if not text:
            raise _Bad("malformed", "a key without a value", at)
        return _bare_value(text), at


def _bare_value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _NUMBER.fullmatch(text):
        if re.fullmatch(r"[-+]?\d+", text):
            return int(text) if len(text) <= _MAX_DIGITS else text
        number = float(text)
        return number if math.isfinite(number) else text
    return text


def _unescape(raw: str) -> str:
    """The text of a JSON string; where its escapes are wrong, the text as it stands."""
    if "\\" not in raw:
        return raw
    try:
        # Quotes that the grammar took for text are escaped first; json would end the string there.
        inner = re.sub(r'(\\.)|"', lambda match: match[1] or '\\"', raw, flags=re.DOTALL)
        text = json.loads(f'"{inner}"', strict=False)
    except ValueError:
        return raw
    return text.encode("utf-8", "replace").decode()


def show(value: Any) -> str:
    """A value as an error message quotes it: short, whatever it is."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested without end"
    return text if len(text) <= 80 else text[:77] + "..."
