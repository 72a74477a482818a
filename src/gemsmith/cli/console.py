"""What a model or a file says, put on a terminal safely."""

import json
import re
from typing import Any

from rich.console import Console
from rich.segment import Segment, Segments

from gemsmith.text.calls import ToolCall

# Foreign text may hold anything; what could steer the terminal is not shown.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write(console: Console, text: str, style: str | None = None) -> None:
    """Text as it is: every character, and on a terminal nothing that could steer it.

    As a finished segment, because rich's own text has emoji in place of :x: and spaces in place of
    tabs, off a terminal, too.
    """
    if console.is_terminal:
        text = harmless(text)
    console.print(Segments([Segment(text)]), style=style, soft_wrap=True)


def harmless(text: str) -> str:
    """Text without characters that could steer a terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def spell(call: ToolCall) -> str:
    """A call as one would write it in Python."""
    given = ", ".join(f"{key}={short(value)}" for key, value in call.arguments.items())
    return f"{call.name}({given})"


def short(value: Any, limit: int = 300) -> str:
    """A value as JSON, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
