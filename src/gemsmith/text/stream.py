"""Model output, as it comes, split into thought, answer and tool calls.

Takes pieces of decoded text in which the special markers are visible, and gives typed events. What
it emits is final: a piece that might be the beginning of a marker waits for the next one, and a
tool call waits until it is whole. However the text is cut into pieces, the events joined are the
same; `parse_output` is one piece. It checks no call against a schema (see `tools`).

The format: `<|channel>thought\\nTHOUGHT\\n<channel|>ANSWER` and calls between `<|tool_call>` and
`<tool_call|>`. `<turn|>`, `<eos>` and `<|tool_response>` end the output; what follows is ignored.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from gemsmith.text.calls import (
    CALL_CLOSE,
    CALL_OPEN,
    RESPONSE_OPEN,
    CallParser,
    NeedMore,
    Problem,
    ToolCall,
)

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
_LABEL = "thought"
_ENDS = ("<turn|>", "<eos>", RESPONSE_OPEN)
MARKERS = (CHANNEL_OPEN, CHANNEL_CLOSE, CALL_OPEN, CALL_CLOSE, *_ENDS)
"""What an output is split at, however it came: as one token or in ordinary letters."""
_LONGEST = max(map(len, MARKERS))
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))


@dataclass(frozen=True, slots=True)
class Thinking:
    """A piece of the thought."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """One whole tool call."""

    call: ToolCall


@dataclass(frozen=True, slots=True)
class ToolProblem:
    """Something that was meant as a tool call and is none."""

    problem: Problem


Event = Thinking | Content | ToolCallEvent | ToolProblem


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A whole output, taken apart."""

    thinking: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def parse_output(text: str, *, started_in_thinking: bool = False) -> ParsedOutput:
    """Take a finished output apart; the same events as `Splitter`, joined."""
    splitter = Splitter(started_in_thinking=started_in_thinking)
    events = splitter.feed(text) + splitter.finish()
    return ParsedOutput(
        thinking="".join(event.text for event in events if isinstance(event, Thinking)),
        content="".join(event.text for event in events if isinstance(event, Content)),
        calls=[event.call for event in events if isinstance(event, ToolCallEvent)],
        problems=[event.problem for event in events if isinstance(event, ToolProblem)],
    )


class Splitter:
    """Splits one output. Feed it pieces, then call `finish` once.

    started_in_thinking: the prompt already opened the thought (it ends in `<|channel>thought\\n`).
    """

    def __init__(self, *, started_in_thinking: bool = False) -> None:
        self._state: Literal["content", "label", "thinking", "call", "ended"] = (
            "thinking" if started_in_thinking else "content"
        )
        self._pieces: list[str] = []
        """Fed and not yet looked at."""
        self._buffer = ""
        self._at = 0
        """The buffer is dealt with up to here."""
        self._offset = 0
        """Characters of the output before the buffer."""
        self._newline = False
        """A line end of the thought is held back: before the close it is part of the frame."""
        self._tail, self._close_at, self._work = "", -1, 0
        self._cut = False

    @property
    def ended(self) -> bool:
        """Whether an end marker has been seen; what is fed from now on is ignored."""
        return self._state == "ended"

    def feed(self, piece: str) -> list[Event]:
        """Events that `piece` makes certain; often none."""
        if self._state == "ended":
            return []
        self._pieces.append(piece)
        if self._state == "call" and self._close_at < 0:
            # A long call is joined and parsed when its close marker has come, not at every piece.
            self._tail = self._tail[-len(CALL_CLOSE) :] + piece
            if CALL_CLOSE not in self._tail:
                return []
        return self._advance(final=False)

    def finish(self, *, cut: bool = False) -> list[Event]:
        """Events left when the output is over: text held back, a call cut short.

        cut: the model had more to say. Then what may begin a marker is no text; but a `<` alone,
        which in text is common, is.
        """
        self._cut = cut
        events = self._advance(final=True)
        if self._newline:
            self._newline = False
            events.append(Thinking("\n"))
        self._state = "ended"
        return events

    def _advance(self, *, final: bool) -> list[Event]:
        events: list[Event] = []
        if self._at:
            self._offset += self._at
            self._close_at = -1
        self._buffer = self._buffer[self._at :] + "".join(self._pieces)
        self._at, self._pieces = 0, []
        parser = CallParser(self._buffer, final=final)
        moved = True
        while moved and self._at < len(self._buffer) and self._state != "ended":
            if self._state == "label":
                moved = self._label(final)
            elif self._state == "call":
                moved = self._call(events, parser)
            else:
                moved = self._text(events, final)
        return events

    def _text(self, events: list[Event], final: bool) -> bool:
        """Emit text up to the next marker and act on it; False if more has to come first."""
        marker = _MARKER.search(self._buffer, self._at)
        end = marker.start() if marker else len(self._buffer) - self._held(final)
        self._emit(events, self._buffer[self._at : end])
        self._at = end
        if marker is None:
            return False
        if marker[0] == CALL_OPEN:
            # The marker is left to the parser of calls.
            self._leave_thinking(events)
            self._state, self._work = "call", 0
            return True
        self._at = marker.end()
        if marker[0] == CHANNEL_OPEN:
            self._state = "label"
        elif marker[0] == CHANNEL_CLOSE:
            self._newline = False
            self._state = "content"
        elif marker[0] == CALL_CLOSE:
            start, end = self._offset + marker.start(), self._offset + marker.end()
            message = "a tool call is closed that was never opened"
            events.append(ToolProblem(Problem("malformed", message, CALL_CLOSE, start, end)))
        else:
            self._leave_thinking(events)
            self._state = "ended"
        return True

    def _held(self, final: bool) -> int:
        """Length of the longest end of the buffer that a marker begins with; once final, 0 unless
        it was cut there."""
        if final and not self._cut:
            return 0
        start = self._buffer.rfind("<", max(self._at, len(self._buffer) - _LONGEST))
        if start < 0:
            return 0
        tail = self._buffer[start:]
        if final and tail == "<":
            return 0
        return len(tail) if any(marker.startswith(tail) for marker in MARKERS) else 0

    def _emit(self, events: list[Event], text: str) -> None:
        if not text:
            return
        if self._state == "content":
            events.append(Content(text))
            return
        if self._newline:
            text = "\n" + text
        self._newline = text.endswith("\n")
        text = text.removesuffix("\n")
        if text:
            events.append(Thinking(text))

    def _leave_thinking(self, events: list[Event]) -> None:
        """A thought that something else than its close marker ends keeps its last line end."""
        if self._newline:
            self._newline = False
            events.append(Thinking("\n"))

    def _label(self, final: bool) -> bool:
        """Drop the channel's name, `thought` and a line end; without it all is thought."""
        for label in (_LABEL + "\n", _LABEL + CHANNEL_CLOSE):
            if self._buffer.startswith(label, self._at):
                self._at += len(label.removesuffix(CHANNEL_CLOSE))
                break
            if label.startswith(self._buffer[self._at : self._at + len(label)]):
                if not final:
                    return False
                self._at = min(self._at + len(_LABEL), len(self._buffer))
                break
        self._state = "thinking"
        return True

    def _call(self, events: list[Event], parser: CallParser) -> bool:
        """Parse the block of calls that begins here once its end is in sight."""
        if not parser.final:
            if self._close_at < self._at:
                self._close_at = self._buffer.find(CALL_CLOSE, self._at)
            if self._close_at < 0:
                self._tail = self._buffer[-len(CALL_CLOSE) :]
                return False
            # A close marker inside a string leaves the end open; trying again at every piece
            # would take quadratic time.
            size = len(self._buffer) - self._at
            if self._work > 8 * size:
                return False
            self._work += size
        try:
            block = parser.block(self._at)
        except NeedMore:
            return False
        events += [ToolCallEvent(call) for call in block.calls]
        for problem in block.problems:
            start, end = problem.start + self._offset, problem.end + self._offset
            events.append(ToolProblem(replace(problem, start=start, end=end)))
        self._at, self._state = block.end, "content"
        return True
