"""Where a picture, a sound or a video is: its bytes or its path.

Nothing is fetched from the network, and what stands at a path is looked at before it is opened.
"""

import base64
import io
import os
import re
import stat
import urllib.parse
from pathlib import Path
from typing import BinaryIO, Literal

from gemsmith.errors import MediaError

Kind = Literal["image", "sound", "video"]
EXAMPLES: dict[Kind, str] = {
    "image": "data:image/png;base64,",
    "sound": "data:audio/wav;base64,",
    "video": "data:video/mp4;base64,",
}
NAMES: dict[Kind, str] = {"image": "an image", "sound": "a sound", "video": "a video"}
FORMS: dict[Kind, str] = {
    "image": "a path, bytes, a data URL, a PIL image or a numpy array",
    "sound": "a path, bytes, a data URL, or an array",
    "video": "a path, bytes or a data URL",
}


class Named(bytes):
    """The bytes of a file that may be gone since; errors call them by its path."""

    name: str

    def __new__(cls, data: bytes, name: str = "") -> "Named":
        made = super().__new__(cls, data)
        made.name = name
        return made


def locate(source: object, kind: Kind, *, max_bytes: int | None = None) -> tuple[bytes | Path, str]:
    """The bytes or the path of a media file, and what to call it in an error.

    source: a path, bytes, or a `data:` URL with base64.

    Raises:
      MediaError: a path without a file, nothing in it, more than max_bytes, a damaged data URL, an
        address of the network, or another type.
    """
    if isinstance(source, Named):
        found, name = source, short(source.name)
    elif isinstance(source, bytes | bytearray | memoryview):
        found, name = bytes(source), f"the {kind} bytes"
    elif isinstance(source, str) and source[:5].lower() == "data:":
        found, name = _from_data_url(source, kind, max_bytes), "the data URL"
    elif isinstance(source, str) and re.match("[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
        raise MediaError(
            f"{short(source)}: nothing is fetched from the network; download the {kind} and give "
            "its path, its bytes or a data URL"
        )
    elif isinstance(source, str | os.PathLike):
        name = short(os.fspath(source))
        return _file(source, name, kind, max_bytes), name
    else:
        raise MediaError(f"{NAMES[kind]} is given as {FORMS[kind]}, not as {type(source).__name__}")
    _check_size(len(found), name, max_bytes)
    return found, name


def reader(found: bytes | Path, name: str) -> BinaryIO:
    """The file that `locate` found, open.

    Raises:
      MediaError: it cannot be opened, as for lack of permission.
    """
    try:
        return io.BytesIO(found) if isinstance(found, bytes) else found.open("rb")
    except OSError as error:
        raise MediaError(f"{name} cannot be read: {error.strerror}") from error


def _from_data_url(url: str, kind: Kind, max_bytes: int | None) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise MediaError(
            f"data URL {short(url)} holds no base64; it must begin like {EXAMPLES[kind]}"
        )
    if text:
        _check_size(max(1, len(text) * 3 // 4), "the data URL", max_bytes)
    try:
        return base64.b64decode("".join(urllib.parse.unquote(text).split()), validate=True)
    except ValueError as error:
        raise MediaError(
            f"the base64 of the data URL is damaged ({error}); was it sent whole?"
        ) from error


def _file(source: str | os.PathLike[str], name: str, kind: Kind, max_bytes: int | None) -> Path:
    try:
        found = os.stat(source)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise MediaError(
            f"{name} cannot be read: {why}; give the path of {NAMES[kind]} file "
            f"(base64 text needs {EXAMPLES[kind]} in front)"
        ) from error
    # A pipe or a device may never end.
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a file"
        raise MediaError(f"{name} is {what}; give the path of {NAMES[kind]} file")
    _check_size(found.st_size, name, max_bytes)
    return Path(os.fsdecode(source))


def _check_size(size: int, name: str, max_bytes: int | None) -> None:
    if not size:
        raise MediaError(f"{name} is empty: 0 bytes; was it saved or sent whole?")
    if max_bytes is not None and size > max_bytes:
        raise MediaError(
            f"{name} has {size / 2**20:.1f} MiB, more than the {max_bytes >> 20} MiB that are "
            "read; make it smaller"
        )


def short(text: str | bytes) -> str:
    """A name for an error's one line, whatever a caller took for a path."""
    text = os.fsdecode(text)
    # Paths are rarely longer, and end in what tells them apart.
    return text if len(text) <= 250 else f"{text[:60]}... ({len(text):,} characters)"
