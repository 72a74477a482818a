"""JSON-lines files that a user gives: each line with its place, and errors that name it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemsmith.errors import RequestError


def read_lines(path: str | Path, *, option: str, kind: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of one line after the other, where a place is `file:number`; empty lines are
    passed over. option: how the file was named. kind: what a line is, for the error of a file
    without any.

    Raises:
      RequestError: no such file, no text, a line that is not JSON, or none at all.
    """
    empty = True
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    empty = False
                    yield f"{path}:{number}", _value(line, f"{path}:{number}")
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist; {option} takes a JSON-lines file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: not a text file ({error})") from None
    if empty:
        raise RequestError(f"{path} is empty; give at least one {kind}, one a line")


def _value(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON ({error})") from None
