"""What `gemsmith generate` is asked: the message and the tools, read and bounded. No torch."""

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from gemsmith.errors import RequestError

MAX_PROMPT_BYTES = 64 << 20
MAX_TOOLS_BYTES = 4 << 20


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
    """The last message with files beside its text: pictures before it, sounds after it.

    That order is the one that the model card advises.
    """
    if not (images or audio or videos):
        return messages
    text = {"type": "text", "text": messages[-1]["content"]}
    content: list[dict[str, Any]] = [{"type": "image", "image": name} for name in images]
    content += [{"type": "video", "video": name} for name in videos]
    content += [text, *({"type": "audio", "audio": name} for name in audio)]
    return [*messages[:-1], {**messages[-1], "content": content}]


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
    text = decode(read_file(path, MAX_TOOLS_BYTES), path)
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    if not isinstance(tools, list):
        raise RequestError(
            f"{path} holds a JSON {type(tools).__name__}; tools are a list such as "
            '[{"type": "function", "function": {"name": ..., "parameters": {...}}}]'
        )
    return tools
