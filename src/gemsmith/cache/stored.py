"""Checkpoints of the prefix cache on disk, so that they outlive the process.

One safetensors file a checkpoint: the window of sliding layers, and of full layers what its parent,
the longest stored checkpoint before it, does not have. So a conversation is stored once, however
many turns it has. A file is found by a digest of the salt and of all tokens before it; what it says
of the conversation is its K/V alone. Its folder is named after the model and the format of K/V:
files of others lie beside, and are never read.

Files are written by a thread, get their name once they are whole, and are read when a prompt begins
as they do. One whose checksum is wrong is deleted, what is not ours is left alone; both are said in
a line of the log. Beyond a number of bytes, the least recently used goes. Two processes may use one
folder: what one has deleted the other does not find.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gemsmith.errors import ConfigError

log = logging.getLogger("gemsmith.cache")
FORMAT = "gemsmith prefix 1"
"""Of the files and what they hold: another number once K/V is computed otherwise."""
SAMPLE = 4096
"""Bytes at the beginning, in the middle and at the end of each weight that tell models apart."""
MOST_WAITING = 256 << 20
"""Bytes that wait to be written; more are not kept: disks that slow lose more than they save."""
ABANDONED_S = 3600
"""A file without its name for that long belongs to no process that still writes it."""
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")

Tensors = dict[str, Tensor]


def extended(digest: bytes, keys: Sequence[Hashable]) -> bytes:
    """The digest of a sequence of keys, from that of its beginning and the rest."""
    made = hashlib.blake2b(digest, digest_size=16)
    made.update("".join([f"{key!r}," for key in keys]).encode())
    return made.digest()


def identity(model: nn.Module, *facts: object) -> str:
    """What K/V depends on, as a word: all weights, a part of each, and what else is said."""
    made = hashlib.blake2b(repr((FORMAT, *facts)).encode(), digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        middle = len(flat) // 2
        for part in (flat[:SAMPLE], flat[middle : middle + SAMPLE], flat[-SAMPLE:]):
            made.update(part.cpu().numpy().data)
    return made.hexdigest()


def private_folder(folder: Path) -> Path:
    """The folder, made if it is not there; nobody else may look into it.

    Raises:
      ConfigError: it cannot be.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "it cannot be written to")
    except OSError as error:
        raise ConfigError(
            f"--prefix-cache {folder}: {error.strerror or error}; name a folder that can be made "
            "or written to"
        ) from None
    return folder


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored checkpoint: the first `length` tokens of a sequence."""

    name: str
    """Digest of all of them, in hexadecimal."""
    last: str
    """Digest up to the last whole block."""
    length: int
    parent: str
    """The name of the one that has its first tokens of full layers; "" if it has them itself."""

    def checksum(self, tensors: Mapping[str, Tensor]) -> str:
        made = hashlib.blake2b(repr(self).encode(), digest_size=32)
        for name, tensor in sorted(tensors.items()):
            made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            made.update(tensor.view(torch.uint8).numpy().data)
        return made.hexdigest()


class Store:
    """The checkpoints of one model in a folder, and their bound together with all others there."""

    def __init__(self, folder: Path, identity: str, *, max_bytes: int, block_tokens: int) -> None:
        """Raises:
        ConfigError: the folder cannot be made or written to.
        """
        self._root, self._folder = folder, private_folder(private_folder(folder) / identity)
        self._max, self._size = max_bytes, block_tokens
        self._lock = Lock()
        self._entries: dict[str, Entry] = {}
        self._at: dict[str, list[Entry]] = {}
        """By `Entry.last`."""
        self._waiting = 0
        self._broken = False
        self._writer = ThreadPoolExecutor(1, "gemsmith-prefix-cache")
        for path in sorted(self._folder.iterdir()):
            self._look_at(path)
        self._make_room()

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Write what waits to be written."""
        self._writer.shutdown()

    # -- finding and reading ------------------------------------------------------------------

    def find(
        self, digests: Sequence[bytes], keys: Sequence[Hashable], most: int
    ) -> list[Entry] | None:
        """The longest checkpoint of at most `most` tokens that the keys begin with, its parents
        before it. digests: of the keys, see `prefix.Chain.upto`."""
        with self._lock:
            for blocks in reversed(range(len(digests))):
                last, first = digests[blocks], blocks * self._size
                found = [
                    entry
                    for entry in self._at.get(last.hex(), ())
                    if entry.length <= most
                    and entry.name == extended(last, keys[first : entry.length]).hex()
                ]
                for entry in sorted(found, key=lambda each: -each.length):
                    if line := self._line(entry):
                        return line
        return None

    def _line(self, entry: Entry) -> list[Entry] | None:
        line = [entry]
        while line[0].parent:
            parent = self._entries.get(line[0].parent)
            if parent is None or parent.length >= line[0].length:
                return None
            line.insert(0, parent)
        return line

    def read(self, line: Sequence[Entry]) -> list[Tensors] | None:
        """What is stored of each; None if something of it cannot be read."""
        found = []
        for entry in line:
            path = self._path(entry)
            try:
                tensors = load_file(path)
                with safe_open(path, "pt") as file:
                    told = (file.metadata() or {}).get("checksum")
                if told != entry.checksum(tensors):
                    raise SafetensorError("its checksum is wrong")
            except FileNotFoundError:
                self._forget(entry)
                return None
            except (OSError, SafetensorError) as error:
                log.warning("%s is passed over and deleted: %s", path, error)
                self._forget(entry)
                path.unlink(missing_ok=True)
                return None
            found.append(tensors)
        self._used(line)
        return found

    def _used(self, line: Sequence[Entry]) -> None:
        """Note that these are in use: a parent last, so that it does not go before its children."""
        for entry in reversed(line):
            now = time.time_ns()  # finer than the system's own stamp, by which several may be equal
            with suppress(FileNotFoundError):
                os.utime(self._path(entry), ns=(now, now))

    # -- writing ------------------------------------------------------------------------------

    def write(
        self,
        digests: Sequence[bytes],
        keys: Sequence[Hashable],
        length: int,
        copy: Callable[[int], Tensors],
    ) -> None:
        """Store the checkpoint of the first `length` keys, soon; once is enough.

        digests: up to the last whole block of them. copy: what is to be stored, of full layers from
        a token on; nobody else's.
        """
        line = self.find(digests, keys, length) or []
        parent, start = (line[-1].name, line[-1].length) if line else ("", 0)
        if start == length:
            return
        tail = keys[(len(digests) - 1) * self._size : length]
        name = extended(digests[-1], tail).hex()
        entry = Entry(name, digests[-1].hex(), length, parent)
        tensors = copy(start)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        with self._lock:
            if self._waiting + nbytes > MOST_WAITING or nbytes > self._max:
                return
            self._waiting += nbytes
            self._add(entry)
        self._writer.submit(self._write, [*line, entry], tensors, nbytes)

    def _write(self, line: Sequence[Entry], tensors: Tensors, nbytes: int) -> None:
        entry = line[-1]
        unnamed = self._folder / f".{entry.name}.{os.getpid()}"
        about = {
            "format": FORMAT,
            "entry": json.dumps(asdict(entry)),
            "checksum": entry.checksum(tensors),
        }
        try:
            os.close(os.open(unnamed, os.O_CREAT | os.O_WRONLY, 0o600))
            save_file(tensors, unnamed, about)
            os.replace(unnamed, self._path(entry))
            self._used(line)
            self._make_room()
        except (OSError, SafetensorError) as error:
            self._forget(entry)
            unnamed.unlink(missing_ok=True)
            if not self._broken:
                log.warning("prefixes cannot be stored in %s: %s", self._folder, error)
            self._broken = True
        finally:
            with self._lock:
                self._waiting -= nbytes

    def _make_room(self) -> None:
        """Delete the least recently used, of whatever model, until the rest fits."""
        found = []
        for path in self._root.glob("*/*.safetensors"):
            try:
                about = path.stat()
            except FileNotFoundError:
                continue
            if _NAME.fullmatch(path.name):
                found.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max:
                return
            path.unlink(missing_ok=True)
            total -= size
            entry = self._entries.get(path.stem)
            if entry is not None and path.parent == self._folder:
                self._forget(entry)

    # -- what there is ------------------------------------------------------------------------

    def _path(self, entry: Entry) -> Path:
        return self._folder / f"{entry.name}.safetensors"

    def _look_at(self, path: Path) -> None:
        """Learn of a file that was there before."""
        if path.name.startswith("."):
            with suppress(FileNotFoundError):  # it has its name by now
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()
            return
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
            if not _NAME.fullmatch(path.name) or about.get("format") != FORMAT:
                raise ValueError("it is no stored prefix")
            entry = Entry(**json.loads(about["entry"]))
            if entry.name != path.stem:
                raise ValueError(f"it is {entry.name}")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is passed over: %s", path, error)
            return
        self._add(entry)

    def _add(self, entry: Entry) -> None:
        self._drop(entry.name)  # one whose parent is gone
        self._entries[entry.name] = entry
        self._at.setdefault(entry.last, []).append(entry)

    def _forget(self, entry: Entry) -> None:
        with self._lock:
            self._drop(entry.name)

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._at[entry.last].remove(entry)
            if not self._at[entry.last]:
                del self._at[entry.last]
