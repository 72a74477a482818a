"""A vocabulary compiled once into a file that is mapped into memory from then on.

The `tokenizers` library builds its tables anew at every start: a second and 300 MB for Gemma's
262,144 entries. Here they are built once, by the C++ extension, into a block that it then encodes
and decodes from where it lies: native/tokenizer.h has the layout. What cannot be compiled (another
kind of vocabulary, no extension) is None to the caller, who has `tokenizers` for it; so is nothing
here an error. Reading tokenizer.json or GGUF is not done here (see `vocabulary`).

Files, in `hardware.cache_folder()`:

    vocabulary-V/DIGEST.bin    a block; DIGEST is the SHA-256 of what it was made from
    vocabulary-V/PATH.json     a note: the block of the file at a path, and that file's state

A block is checked to the last bit (version, byte order, size, digest, checksum) whenever it is
opened, which takes milliseconds, and made again where anything differs. Its source would take 20
to 100 ms to hash, so it is hashed only where size, times or inode are not those noted. git goes by
the same: what keeps size and time of writing still moves the time of change, while a hash of head
and tail would miss an edit between them. A file younger than `SETTLED` seconds is not noted at all,
because a second write within the clock's grain would look the same.

Files are written beside their place and renamed: a reader sees an old one, a new one or none, and
two writers write the same. Where nothing can be written the block is kept in memory.
"""

import array
import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from gemsmith import hardware

SMALLEST = 2**20
"""Bytes of a source file from which on compiling pays; `tokenizers` reads less in milliseconds."""
SETTLED = 3.0
"""Seconds; the coarsest clock of a file system in use counts twos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """What a vocabulary of Gemma's kind is made of; ids are places in `tokens`."""

    tokens: list[str]
    merges: dict[tuple[int, int], int]
    """(left, right) to what they merge into, the first to be merged first."""
    markers: list[int]
    added: list[int]
    """Tokens that are cut out of a text before all else; no markers."""
    lines: bool
    """Whether runs of newlines stand apart; otherwise a text is one word."""


class CompactVocabulary:
    """A compiled vocabulary, a `vocabulary.Vocabulary`. Safe to share between threads."""

    def __init__(self, block: bytes | mmap.mmap) -> None:
        """block: as `compile_entries` gives it, in memory or mapped.

        Raises:
          ValueError: it is no such block.
        """
        self._native = import_module("gemsmith._native")
        self._block = block
        self.size: int = self._native.vocabulary_size(block)
        ids = self._native.vocabulary_markers(block)
        self.markers = {token: id for id in ids if (token := self.token(id)) is not None}

    def __reduce__(self) -> tuple[Any, ...]:
        return CompactVocabulary, (bytes(self._block),)

    def encode(self, text: str) -> list[int]:
        return self._native.vocabulary_encode(self._block, text.encode())

    def decode(self, ids: Iterable[int]) -> bytes | None:
        try:
            return self._native.vocabulary_decode(self._block, array.array("I", ids))
        except (OverflowError, TypeError):
            return None

    def token_id(self, token: str) -> int | None:
        with suppress(UnicodeEncodeError):
            return self._native.vocabulary_find(self._block, token.encode())
        return None

    def token(self, id: int) -> str | None:
        spelling = self._native.vocabulary_spelling(self._block, id)
        return None if spelling is None else spelling.decode(errors="replace")


@cache
def _native() -> ModuleType | None:
    """None where no C++ compiler was found when gemsmith was installed."""
    try:
        found = import_module("gemsmith._native")
    except ImportError:
        return None
    return found if hasattr(found, "vocabulary_build") else None


def compile_entries(entries: Entries, digest: bytes) -> bytes | None:
    """The block; None where the entries do not fit it or the extension is missing.

    digest: SHA-256 of what the entries were read from.
    """
    native = _native()
    if native is None:
        return None
    try:
        spelled = [token.encode() for token in entries.tokens]
    except UnicodeEncodeError:
        return None
    offsets = array.array("I", [0])
    for token in spelled:
        offsets.append(offsets[-1] + len(token))
    merges = array.array("I")
    for (left, right), merged in entries.merges.items():
        merges.extend((left, right, merged))
    markers, added = array.array("I", entries.markers), array.array("I", entries.added)
    return native.vocabulary_build(
        b"".join(spelled), offsets, merges, markers, added, entries.lines, digest
    )


# -- on disk ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """A vocabulary file, as it was when it was looked at."""

    path: Path
    state: list[int]
    """Size, times of writing and of change in nanoseconds, inode."""

    @property
    def note(self) -> str:
        """Name of the file that tells which block is this file's."""
        return hashlib.sha256(os.fsencode(self.path)).hexdigest()[:32] + ".json"


def look_at(path: Path) -> Source | None:
    """The source at a path; None where the compact form cannot serve it."""
    if _native() is None:
        return None
    try:
        path = path.resolve()
        found = path.stat()
    except (OSError, RuntimeError):
        return None
    if found.st_size < SMALLEST:
        return None
    return Source(path, [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino])


def find(source: Source) -> CompactVocabulary | None:
    """The vocabulary compiled earlier from this file, if the file is noted and unchanged."""
    folder = _folder()
    if folder is None:
        return None
    try:
        with (folder / source.note).open("rb") as file:
            note = json.loads(file.read(4096))
        digest = bytes.fromhex(note["digest"]) if note["state"] == source.state else b""
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return _open(folder, digest)


def obtain(
    source: Source, digest: bytes, entries: Callable[[], Entries | None]
) -> CompactVocabulary | None:
    """The vocabulary of a source whose content has been hashed: opened, or compiled and kept.

    entries: asked for only if no block is there; None from it means that none can be made.
    """
    folder = _folder()
    found = _open(folder, digest)
    if found is None:
        made = entries()
        block = None if made is None else compile_entries(made, digest)
        if block is None:
            return None
        _write(folder, digest.hex() + ".bin", block)
        # Kept in memory where it could not be written.
        found = _open(folder, digest) or CompactVocabulary(block)
    _, written, changed, _ = source.state
    settled = max(written, changed) / 1e9 < time.time() - SETTLED
    # The content that was hashed is what was looked at only if the file is still the same.
    if settled and look_at(source.path) == source:
        note = {"path": str(source.path), "state": source.state, "digest": digest.hex()}
        _write(folder, source.note, json.dumps(note).encode())
    return found


def _folder() -> Path | None:
    native, folder = _native(), hardware.cache_folder()
    return native and folder and folder / f"vocabulary-{native.VOCABULARY_VERSION}"


def _open(folder: Path | None, digest: bytes) -> CompactVocabulary | None:
    native = _native()
    if folder is None or native is None or len(digest) != 32:
        return None
    try:
        with (folder / f"{digest.hex()}.bin").open("rb") as file:
            block = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not native.vocabulary_verify(block, digest):
            return None
        # The check has read every page; those that no text needs are given back.
        if hasattr(block, "madvise"):
            block.madvise(mmap.MADV_DONTNEED)
        return CompactVocabulary(block)
    except (OSError, ValueError):
        return None


def _write(folder: Path | None, name: str, content: bytes) -> None:
    """Puts a file into place as a whole; does nothing where that cannot be done."""
    if folder is None:
        return
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=name + ".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, folder / name)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
