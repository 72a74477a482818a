"""What `gemsmith generate` is asked: the message and the tools, read and bounded. No torch."""

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import IO, Any

from gemsmith.errors import RequestError

MAX_PROMPT_BYTES = 64 << 20
MAX_TOOLS_BYTES = 4 << 20

_SUFFIXES = {
    "image": ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .avif",
    "audio": ".wav .mp3 .flac .ogg .opus .m4a .aac",
    "video": ".mp4 .mov .mkv .webm .avi .m4v",
}
_MEDIA = {suffix: kind for kind, row in _SUFFIXES.items() for suffix in row.split()}
_START = re.compile(r"(?<!\S)(?<!\\\s)(?=\S)")
_AFTER = r"(?P<after>[.,;:!?)\]]*)(?!\S)"
_QUOTED = re.compile(rf"""(?:'(?P<name>[^']+)'|"(?P<also>[^"]+)"){_AFTER}""")
_WORD = re.compile(rf"(?P<name>(?:\\.|[^\s\\])*[^\s\\.,;:!?)\]]){_AFTER}")
_BRACKETS = {"(": ")", "[": "]"}


def read_messages(prompt: str | None, file: str | None, system: str | None) -> list[dict[str, Any]]:
    """The conversation to answer: from the argument, the file, or stdin.

    Raises:
      RequestError: no message, two, an unreadable or too large one, or bytes that are not UTF-8.
    """
    if prompt is not None and file is not None:
        raise RequestError("give the message as an argument or with --file, not both")
    if prompt is not None:
        text = decode(os.fsencode(prompt), "the argument")
    elif file is not None:
        text = decode(read_file(file, MAX_PROMPT_BYTES), file)
    elif sys.stdin is None or sys.stdin.isatty():
        raise RequestError("no message: give it as an argument, with --file, or on stdin")
    else:
        text = decode(_read(sys.stdin.buffer, MAX_PROMPT_BYTES, "stdin"), "stdin")
    if not text.strip():
        raise RequestError("the message is empty; say something")
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    if system is not None:
        content = decode(os.fsencode(system), "--system")
        messages.insert(0, {"role": "system", "content": content})
    return messages


def with_media(
    messages: list[dict[str, Any]], *, images: list[str], audio: list[str], videos: list[str]
) -> list[dict[str, Any]]:
    """The last message with files beside its text."""
    named = (("image", images), ("video", videos), ("audio", audio))
    parts = [{"type": kind, kind: name} for kind, names in named for name in names]
    if not parts:
        return messages
    content = _beside(messages[-1]["content"], parts)
    return [*messages[:-1], {**messages[-1], "content": content}]


def _beside(text: str, parts: list[dict[str, str]]) -> list[dict[str, str]]:
    """Pictures before the text, sounds after it: the order that the model card advises."""
    seen = [part for part in parts if part["type"] != "audio"]
    heard = [part for part in parts if part["type"] == "audio"]
    return [*seen, *([{"type": "text", "text": text}] if text else []), *heard]


def with_dropped_files(text: str) -> str | list[dict[str, Any]]:
    """A typed line; as content parts if it names picture, sound or video files that are there.

    A file dragged onto a terminal is typed as its path, in quotes or with backslashes where it
    holds spaces. One that is typed by hand may stand in brackets, or before a comma or full stop,
    which stay.
    """
    parts: list[dict[str, str]] = []
    rest, position = "", 0
    for start in _START.finditer(text):
        begin = start.end()
        if begin < position:
            continue  # inside of the last name
        bracket = _BRACKETS.get(text[begin])
        found = _named_file(text, begin)
        if found is None and bracket:
            found = _named_file(text, begin + 1)
        if found is None:
            continue
        match, part = found
        parts.append(part)
        rest += text[position:begin]
        after = match["after"]
        if bracket and match.start() > begin:
            after = after.replace(bracket, "", 1)
        rest = rest.rstrip() + after if after and rest.strip() else rest
        position = match.end()
    return _beside(" ".join((rest + text[position:]).split()), parts) if parts else text


def _named_file(text: str, begin: int) -> tuple[re.Match[str], dict[str, str]] | None:
    """The name that begins here, in quotes or not, and its content part; None if no such file."""
    for form in (_QUOTED, _WORD):
        match = form.match(text, begin)
        if match is None:
            continue
        quoted = match["name"] or match["also"] if form is _QUOTED else None
        name = quoted or re.sub(r"\\(.)", r"\1", match["name"])
        kind = _MEDIA.get(Path(name).suffix.lower())
        # A name that no system could have, or a home of nobody, is a word.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if kind and Path(name).expanduser().is_file():
                return match, {"type": kind, kind: str(Path(name).expanduser())}
    return None


def decode(data: bytes, source: str) -> str:
    """UTF-8 text.

    Raises:
      RequestError: names the first byte that is not UTF-8 and where it stands.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert it first, for example with iconv -t UTF-8"
        ) from None


def read_file(path: str, limit: int) -> bytes:
    """A file's bytes.

    Raises:
      RequestError: it cannot be read, or has more than `limit` bytes.
    """
    try:
        with Path(path).open("rb") as file:
            return _read(file, limit, path)
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(f"cannot read {path}: {reason}") from None


def _read(file: IO[bytes], limit: int, source: str) -> bytes:
    data = file.read(limit + 1)
    if len(data) > limit:
        raise RequestError(f"{source} has more than {limit >> 20} MiB, the most that is read")
    return data


def read_tools(path: str) -> list[dict[str, Any]]:
    """Tool declarations: a JSON list in OpenAI's shape.

    Raises:
      RequestError: unreadable, or not JSON. What the list holds is checked where it is used.
    """
    tools = _read_json(path)
    if not isinstance(tools, list):
        raise RequestError(
            f"{path} holds a JSON {type(tools).__name__}; tools are a list such as "
            '[{"type": "function", "function": {"name": ..., "parameters": {...}}}]'
        )
    return tools


def read_schema(path: str) -> dict[str, Any]:
    """A JSON schema.

    Raises:
      RequestError: unreadable, or no JSON object. What it says is checked where it is used.
    """
    schema = _read_json(path)
    if not isinstance(schema, dict):
        raise RequestError(
            f"{path} holds a JSON {type(schema).__name__}; a schema is an object such as "
            '{"type": "object", "properties": {...}}'
        )
    return schema


def _read_json(path: str) -> Any:
    text = decode(read_file(path, MAX_TOOLS_BYTES), path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
