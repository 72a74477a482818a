"""Packed weights on disk: a checkpoint of few bits is packed once, and read as it is ever after.

So is one of floats that is quantized while it is loaded: that too is done once.

One file per checkpoint folder and recipe, decoder and towers apart, in the user's cache folder:
every weight's lines and scales, one after the other, then a trailer that says which checkpoint they
are of, how they were made and what their checksum is.
The file is mapped: a start copies nothing, processes share the memory, and pages may leave when
memory is short. (Reading it into large pages instead made no product faster where the system keeps
such files in large pages itself, and a start many times slower where fresh memory is dear.) A file
that is cut short, changed, or of another checkpoint or version is made anew; without room on the
disk weights are packed at each start.

What it is not: a format to exchange. The bytes are ops/cpu.py's lines, and the checkpoint itself is
never touched.
"""

import hashlib
import math
import mmap
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemsmith import hardware
from gemsmith.errors import WeightsError
from gemsmith.ops import cpu, native
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.packed import Packed

VERSION = 3
MAGIC = b"gemsmith packed\n"
TRAILER = struct.Struct("<16s32s32sq")
"""MAGIC, fingerprint, digest of the tensors' checksums, bytes of the tensors. Between these and the
trailer lies a byte for each weight: how wide its scales are."""
SCALES = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32}
"""By that width; int8: steps."""
LEAST_BYTES = 64 << 20
"""Smaller checkpoints are packed in less time than a file takes to check."""

Layout = dict[str, tuple[Format, tuple[int, ...]]]
"""Format and shape of each weight, by name."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight lies in the file: shapes of its tensors, and their first bytes."""

    format: Format
    shape: tuple[int, ...]
    lines: tuple[int, ...]
    lines_at: int
    scales: tuple[int, ...]
    scales_at: int
    scale_bytes: int
    """As in SCALES. Known when the weight is packed."""

    def of(self, data: Tensor) -> Packed:
        lines = data[self.lines_at : self.scales_at].view(self.lines)
        stop = self.scales_at + self.scale_bytes * math.prod(self.scales)
        scales = data[self.scales_at : stop].view(SCALES[self.scale_bytes]).view(self.scales)
        return Packed(self.format, self.shape, lines, scales)


def packed_weights(
    folder: Path,
    files: Iterable[Path],
    layout: Layout,
    weights: Callable[[], Iterator[tuple[str, Quantized]]],
    part: str = "",
) -> dict[str, Packed]:
    """The weights of a checkpoint folder, packed.

    files: what the folder's weights are read from. layout: what `weights()` will give, in its
    order; it is not called where the cache has them. part: which of the folder's weights they are
    and how they are made of it, where there may be several.
    """
    _, total = _places(layout, [4] * len(layout))  # at most
    if total < LEAST_BYTES:
        return {name: _packed(name, weight) for name, weight in weights()}
    path = cached_file(folder, part)
    if path is None:
        return _packed_anew("there is no home folder to keep packed weights in", weights)
    fingerprint = _fingerprint(files, layout, part)
    found = _read(path, fingerprint, layout)
    if found is not None:
        return found
    try:
        _write(path, fingerprint, weights())
    except OSError as error:
        return _packed_anew(f"{path} cannot be written ({error.strerror or error})", weights)
    found = _read(path, fingerprint, layout)
    if found is None:
        raise WeightsError(f"{path} does not read as it was written; is the disk failing?")
    return found


def _packed_anew(
    reason: str, weights: Callable[[], Iterator[tuple[str, Quantized]]]
) -> dict[str, Packed]:
    warnings.warn(
        f"{reason}: the weights are packed anew at each start; set GEMSMITH_CACHE to a folder with "
        "room",
        RuntimeWarning,
        stacklevel=3,
    )
    return {name: _packed(name, weight) for name, weight in weights()}


def _packed(name: str, weight: Quantized) -> Packed:
    try:
        return Packed.of(weight)
    except WeightsError as error:
        raise WeightsError(
            f"{name}: {error}, as config.json says they are (observer_kwargs); the checkpoint is "
            "damaged, or it was changed and the note has to go"
        ) from None


def cached_file(folder: Path, part: str = "") -> Path | None:
    """Where the packed weights of a checkpoint folder, or a part of them, are kept; None: nowhere,
    see `hardware.cache_folder`."""
    cache = hardware.cache_folder()
    name = hashlib.sha256(f"{folder.resolve()}\n{part}".encode()).hexdigest()[:24]
    return cache and cache / "packed" / f"{name}.bin"


def _places(layout: Layout, scale_bytes: Iterable[int]) -> tuple[dict[str, _Place], int]:
    """Where each weight lies, and the bytes of all. One that was to have steps, and was given free
    scales when it was rounded, is known by how wide they are."""
    places, at = {}, 0
    for (name, (format, shape)), width in zip(layout.items(), scale_bytes, strict=True):
        *stack, N, K = shape
        lines = (*stack, *cpu.lines_shape(N, K, format.bits))
        groups = cpu.groups_of(K, format.group)
        scales = (*stack, *cpu.scales_shape(lines[-3], groups, SCALES[width]))
        scales_at = at + math.prod(lines)
        format = format if width == 1 else format.free
        places[name] = _Place(format, shape, lines, at, scales, scales_at, width)
        at = scales_at + width * math.prod(scales)
    return places, at


def _fingerprint(files: Iterable[Path], layout: Mapping[str, object], part: str) -> bytes:
    """Changes with the checkpoint's files and with how they are quantized and packed."""
    parts = [
        f"{VERSION} {sys.byteorder} {part}",
        *(f"{name} {what}" for name, what in layout.items()),
    ]
    for file in sorted(files):
        stat = file.stat()
        parts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).digest()


def _write(path: Path, fingerprint: bytes, weights: Iterator[tuple[str, Quantized]]) -> None:
    """Pack and write one weight after the other; only a whole file gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    checksums: list[int] = []
    widths = bytearray()
    total = 0
    try:
        with open(temporary, "wb") as file:
            for name, weight in weights:
                packed = _packed(name, weight)
                widths.append(packed.scales.itemsize)
                for tensor in (packed.lines, packed.scales):
                    file.write(tensor.view(torch.uint8).numpy().data)
                    checksums.append(native.checksum(tensor))
                    total += tensor.nbytes
            file.write(widths)
            file.write(TRAILER.pack(MAGIC, fingerprint, _digest(bytes(widths), checksums), total))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _digest(widths: bytes, checksums: Iterable[int]) -> bytes:
    words = (each.to_bytes(8, "little") for each in checksums)
    return hashlib.sha256(widths + b"".join(words)).digest()


def _read(path: Path, fingerprint: bytes, layout: Layout) -> dict[str, Packed] | None:
    """The weights of the file; None if it is not there, not theirs, or not whole."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            end = max(0, size - TRAILER.size)
            file.seek(end)
            magic, theirs, digest, total = TRAILER.unpack(file.read())
            if (magic, theirs, total) != (MAGIC, fingerprint, end - len(layout)):
                return None
            file.seek(total)
            widths = file.read(len(layout))
            steps = zip(widths, layout.values(), strict=True)
            if not set(widths) <= {*SCALES} or any(w == 1 and not f.steps for w, (f, _) in steps):
                return None
            places, wanted = _places(layout, widths)
            if wanted != total:
                return None
            mapping = mmap.mmap(file.fileno(), total, access=mmap.ACCESS_COPY)
    except (OSError, ValueError, struct.error):
        return None
    data = torch.frombuffer(mapping, dtype=torch.uint8)
    native.advise_hugepages(data)
    found = {name: place.of(data) for name, place in places.items()}
    tensors = (tensor for packed in found.values() for tensor in (packed.lines, packed.scales))
    return found if _digest(widths, map(native.checksum, tensors)) == digest else None
