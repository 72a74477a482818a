"""Held-out items: prompts with what must come next, in text, about pictures, and heard.

Two files come with the package, written by recipes/pocket (the format is in its README.md):
  heldout.jsonl.gz    text; an item a line
  heldout_media.zip   items.jsonl, and beside it the pictures and sounds that its items name

Nothing is asked here and nothing decided: see pocket.py and scoring.py.
"""

import gzip
import json
import random
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from gemsmith.config import Gemma4Config
from gemsmith.errors import RequestError
from gemsmith.text.boxes import Box

KINDS: dict[str, type | tuple[type, ...]] = {
    "calls": list,
    "answer": (str, int),
    "no_tool": str,
    "json": object,
    "text": str,
    "boxes": list,
    "points": list,
    "transcript": str,
    "reading": str,
}
"""What an item may expect, and of which type its `calls` or `value` is."""
MEDIA = ("image", "audio")
MAX_BYTES = 64 << 20
"""Of an unpacked media file; the one of the package has a twentieth of it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt and what must come next."""

    id: str
    category: str
    messages: list[dict[str, Any]]
    """Content is text or parts; pictures and sounds are bytes."""
    tools: list[dict[str, Any]] | None
    enable_thinking: bool
    expected: dict[str, Any]
    """`type` (one of KINDS) with `calls` or `value`."""

    @property
    def media(self) -> list[dict[str, Any]]:
        """Its parts that are seen or heard."""
        contents = (message.get("content") for message in self.messages)
        parts = (part for content in contents if isinstance(content, list) for part in content)
        return [part for part in parts if part["type"] in MEDIA]


def held_out(
    config: Gemma4Config, *, limit: int | None = None
) -> tuple[list[Item], dict[str, int]]:
    """The items that a model of this config can be asked, mixed, and how many of each medium not.

    Raises:
      RequestError: as `read_items` and `read_media_items`.
    """
    has = {"image": config.vision_config is not None, "audio": config.audio_config is not None}
    items, left_out = read_items(), Counter[str]()
    for item in read_media_items():
        lacking = [part["type"] for part in item.media if not has[part["type"]]]
        if lacking:
            left_out[lacking[0]] += 1
        else:
            items.append(item)
    return _mixed(items, limit), dict(left_out)


def read_items(path: str | Path | None = None, *, limit: int | None = None) -> list[Item]:
    """Items of a gzipped JSON-lines file, by default the one shipped with the package, mixed.

    Raises:
      RequestError: the file is missing, damaged, or a line is no item.
    """
    source = _shipped("heldout.jsonl.gz") if path is None else Path(path)
    try:
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            items = [_item(line, f"{source}:{n}") for n, line in enumerate(lines, 1)]
    except FileNotFoundError:
        raise RequestError(f"{source} does not exist; there are no items to ask") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise RequestError(f"{source}: not a gzipped text file ({error})") from None
    return _mixed(items, limit)


def read_media_items(path: str | Path | None = None) -> list[Item]:
    """Items of a zip file with their pictures and sounds, by default the one shipped, as they come.

    Raises:
      RequestError: the file is missing or damaged, a line is no item, or names what is not there.
    """
    source = _shipped("heldout_media.zip") if path is None else Path(path)
    try:
        with zipfile.ZipFile(source) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_BYTES:
                raise RequestError(f"{source}: {size} bytes unpacked, more than {MAX_BYTES}")
            found = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        lines = found.pop("items.jsonl").decode().splitlines()
    except FileNotFoundError:
        raise RequestError(f"{source} does not exist; there are no items to ask") from None
    except KeyError:
        raise RequestError(f"{source}: there is no items.jsonl in it") from None
    except (
        OSError,
        EOFError,
        RuntimeError,
        UnicodeDecodeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as e:
        raise RequestError(f"{source}: not a whole zip file ({e})") from None
    return [_item(line, f"{source}:{n}", found) for n, line in enumerate(lines, 1)]


def _shipped(name: str) -> Path:
    return Path(str(files("gemsmith.pocket") / name))


def _mixed(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Always in the same order, categories mixed: the first `limit` of them stand for all."""
    if limit is not None and limit < 1:
        raise RequestError(f"limit {limit}: at least one item has to be asked")
    return random.Random(0).sample(items, len(items))[:limit]


def _item(line: str, where: str, found: dict[str, bytes] | None = None) -> Item:
    """found: pictures and sounds by the name under which parts ask for them."""
    try:
        data = json.loads(line)
        item = Item(**{name: data[name] for name in Item.__slots__})
        kind = item.expected["type"]
        wanted = item.expected["calls" if kind == "calls" else "value"]
        if kind in ("boxes", "points"):
            boxes(wanted)
        for part in item.media:
            name = part[part["type"]]
            if name not in (found or {}):
                raise ValueError(f"{name!r} is not in the file")
            part[part["type"]] = (found or {})[name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{where}: not an item ({type(error).__name__}: {error})") from None
    if kind not in KINDS or not isinstance(wanted, KINDS[kind]):
        raise RequestError(
            f"{where}: expected type {kind!r} with {type(wanted).__name__}; allowed are "
            + ", ".join(KINDS)
        )
    return item


def boxes(value: list[dict[str, Any]]) -> list[Box]:
    """What `boxes` and `points` items expect, as boxes."""
    return [Box(*one["box_2d"], label=one["label"]) for one in value]
