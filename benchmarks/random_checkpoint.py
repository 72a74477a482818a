"""Writes a checkpoint folder with random weights at a model's real dimensions.

Speed and memory do not depend on what the weights are, so benchmarks need no download. The folder
looks like a released one: config.json, model.safetensors with the released names, in bfloat16 or
straight away in few bits as `gemsmith quantize` lays them out, and a tokenizer.json that holds the
special tokens and the 256 bytes. What it says is noise.

Written piece by piece: memory stays at a few MiB whatever the size of the model, and a model whose
bfloat16 weights no disk here holds (26B-A4B: 50 GB) is there at 4 bits. Low-bit weights are the
same bell curve rounded, with one scale for all; they are not those of the bfloat16 folder. A folder
that is already there, complete and of the same config is kept.

Run: python -m benchmarks.random_checkpoint SIZE FOLDER [--bits 4]
"""

import argparse
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor

from gemsmith.config import PRESETS, Gemma4Config, text_only
from gemsmith.errors import CapacityError
from gemsmith.quant.formats import Format, pack
from gemsmith.testing import tiny_config, whole_groups
from gemsmith.text.tokenizer import MARKERS
from gemsmith.weights import layouts
from gemsmith.weights.files import SINGLE
from gemsmith.weights.hub import POCKET, resolve
from gemsmith.weights.names import EMBEDDING, PLE_TABLE, Shape, expected_shapes, written_key
from gemsmith.weights.recipe import BITS, Recipe
from gemsmith.weights.save import ALIGNMENT, new_file, to_json, write_tensors

SIZES = (*PRESETS, *(f"tiny-{size}" for size in PRESETS), POCKET)
DEVIATION = 0.02
SCALES = {2: 2.0**-5, 4: 2.0**-7, 8: 2.0**-11}
"""Between two codes, by bits: the outermost lies about three deviations out. Powers of two, so that
each low-bit weight is exact in every float."""
POOL = 4_194_301
"""Random values drawn; a prime, so that no two rows of a matrix are alike."""
FIRST_IDS = {"pad": 0, "eos": 1, "bos": 2, "unk": 3, "turn_open": 105, "turn_close": 106}
FIRST_BYTE = 256


def config_of(size: str) -> Gemma4Config:
    """The decoder of a preset, with the prefix `tiny-` its few-layer likeness for a dry run, or the
    embedded model's."""
    if size == POCKET:
        return text_only(Gemma4Config.load(resolve(POCKET)))
    if not size.startswith("tiny-"):
        return text_only(PRESETS[size])
    return whole_groups(tiny_config(size.removeprefix("tiny-"), vocab_size=1024))


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the file; a `save.Piecewise`."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[int], Iterator[Tensor]]
    """Told the number of values, gives them in order."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        return self.make(math.prod(self.shape))


class _Noise:
    """The pool in each form weights are stored in, gone round and round."""

    def __init__(self, seed: int) -> None:
        values = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
        self._values = values * DEVIATION
        self._pools: dict[object, Tensor] = {}
        self._at = 0

    def floats(self, count: int) -> Iterator[Tensor]:
        if "floats" not in self._pools:
            self._pools["floats"] = self._values.bfloat16()
        return self._turn(self._pools["floats"], count)

    def codes(self, bits: int, dtype: torch.dtype) -> Callable[[int], Iterator[Tensor]]:
        """Maker of codes in bytes or words, or as they are in int8."""
        pool = self._pools.get((bits, dtype))
        if pool is None:
            # Codes of 8 bits are 16 times those of 4, so that a file of 4 bits can hold them too.
            fine, least = min(bits, 4), 1 << (min(bits, 4) - 1)
            q = (self._values / SCALES[fine]).round().clamp(-least, least - 1).to(torch.int8)
            q <<= bits - fine
            whole = len(q) // 16 * 16  # so many codes of 2 bits are a word
            pool = q if dtype == torch.int8 else pack(q[:whole], bits).view(dtype)
            self._pools[bits, dtype] = pool
        return lambda count: self._turn(pool, count)

    def _turn(self, pool: Tensor, count: int) -> Iterator[Tensor]:
        while count:
            at = self._at % len(pool)
            piece = pool[at : at + count]
            yield piece
            count -= len(piece)
            self._at = at + len(piece)


def write(
    config: Gemma4Config,
    folder: Path,
    *,
    bits: str | None = None,
    group: int | None = None,
    seed: int = 0,
) -> Path:
    """Make `folder` a checkpoint of `config` with random weights; returns the folder.

    bits and group as `gemsmith quantize` takes them; None bits: bfloat16.

    Raises:
      ConfigError: the recipe does not fit the model.
      CapacityError: the disk has no room for it.
    """
    noise, recipe = _Noise(seed), Recipe(bits, group) if bits else None
    if recipe and recipe.mobile:
        text = replace(config.text_config, tie_word_embeddings=False)
        config = replace(config, text_config=text, tie_word_embeddings=False)
    formats = recipe.formats(config) if recipe else {}
    parts = [
        part
        for name, shape in expected_shapes(config.text_config).items()
        for part in _parts(name, shape, formats.get(name), recipe, noise)
    ]
    parts.sort(key=lambda part: part.nbytes % ALIGNMENT != 0)
    header = io.BytesIO()
    write_tensors(header, [replace(part, make=lambda _: iter(())) for part in parts])
    size = header.tell() + sum(part.nbytes for part in parts)
    section = {"quantization_config": _section(config, formats, recipe)} if recipe else {}
    wanted = to_json(config.to_dict() | section)
    path, config_path = folder / SINGLE, folder / "config.json"
    kept = path.is_file() and path.stat().st_size == size and config_path.is_file()
    if kept and config_path.read_bytes() == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size + (1 << 30):
        raise CapacityError(
            f"{folder}: the checkpoint needs {size / 2**30:.1f} GiB and 1 GiB to spare, "
            f"{free / 2**30:.1f} GiB are free; name another --folder"
        )
    config_path.write_bytes(wanted)
    _tokenizer(config.text_config.vocab_size).save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106]}\n')
    temporary: dict[str, Path] = {}
    with new_file(folder, SINGLE, temporary) as file:
        write_tensors(file, parts)
    os.replace(temporary[SINGLE], path)
    return folder


def made(size: str, bits: str | None, folder: Path | None) -> Path:
    """The checkpoint of a size in `folder`, by default below the system's temporary folder."""
    name = f"gemsmith-random-{size}" + (f"-{bits}" if bits else "")
    return write(config_of(size), folder or Path(tempfile.gettempdir()) / name, bits=bits)


def _parts(
    name: str, shape: Shape, format: Format | None, recipe: Recipe | None, noise: _Noise
) -> Iterator[_Part]:
    """The tensors that stand for one weight, as `weights.layouts` describes them."""
    key = written_key(name)
    if recipe is None or format is None:
        if "norm" in name or name.endswith(("layer_scalar", "scale")):
            # Query and key norms shrink scores to about 1, as training does: at 1 their softmax
            # would jump from key to key on a rounding error, and no two runs would agree.
            qk = name.endswith(("q_norm.weight", "k_norm.weight"))
            yield _constant(key, shape, torch.bfloat16, shape[0] ** -0.25 if qk else 1.0)
        else:
            yield _Part(key, shape, torch.bfloat16, noise.floats)
        return
    *rows, K = shape
    stem, row_bytes = key.removesuffix(".weight"), K * format.bits // 8
    scales, scale = (*rows, format.groups(K, key)), SCALES[format.bits]
    if recipe.mobile:
        table = name in (EMBEDDING, PLE_TABLE)
        what, kind = (
            "embedding" if table else "weight",
            torch.int8 if format.bits == 8 else torch.uint8,
        )
        codes = noise.codes(format.bits, kind)
        yield _Part(
            f"{stem}.{'embedding_quantized' if table else 'weight'}",
            (*rows, row_bytes),
            kind,
            codes,
        )
        yield _constant(f"{stem}.{what}_scale", scales, torch.float32, scale)
        for side in () if table else ("input", "output"):
            yield _constant(f"{stem}.{side}_activation_scale", (), torch.float32, 0.0)
        return
    words, kind = (
        (*rows, -(-row_bytes // layouts.WORD)),
        torch.bfloat16 if format.group else torch.float32,
    )
    yield _Part(f"{key}_packed", words, torch.int32, noise.codes(format.bits, torch.int32))
    yield _constant(f"{key}_scale", scales, kind, scale)
    stated = torch.tensor(shape)
    yield _Part(f"{key}_shape", (len(shape),), torch.int64, lambda _: iter([stated]))


def _constant(key: str, shape: Shape, dtype: torch.dtype, value: float) -> _Part:
    def make(count: int) -> Iterator[Tensor]:
        pool = torch.full((min(count, POOL),), value, dtype=dtype)
        for start in range(0, count, POOL):
            yield pool[: count - start]

    return _Part(key, shape, dtype, make)


def _section(config: Gemma4Config, formats: dict[str, Format], recipe: Recipe) -> dict[str, Any]:
    """quantization_config, as `gemsmith quantize` writes it."""
    named = {written_key(name).removesuffix(".weight"): format for name, format in formats.items()}
    matrices = (n for n, shape in expected_shapes(config.text_config).items() if len(shape) > 1)
    left = {written_key(name).removesuffix(".weight") for name in matrices} - {*named}
    if recipe.mobile:
        return layouts.gemma_section(named, left)
    return layouts.compressed_section(named, {*left, "lm_head"})


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Special tokens and bytes, so that every text can be read; the other entries are unused."""
    spelled = {id: MARKERS[role] for role, id in FIRST_IDS.items()}
    others = (marker for role, marker in MARKERS.items() if role not in FIRST_IDS)
    spelled |= {200 + n: marker for n, marker in enumerate(others)}
    spelled |= {FIRST_BYTE + byte: f"<0x{byte:02X}>" for byte in range(256)}
    spelled[FIRST_BYTE + 256] = "▁"
    vocab = {spelled.get(id, f"<unused{id}>"): id for id in range(vocab_size)}
    made = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    markers = [AddedToken(m, normalized=False, special=True) for m in MARKERS.values()]
    made.add_special_tokens(markers)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", choices=BITS, help="straight in few bits; bfloat16 without")
    options = parser.parse_args()
    print(write(config_of(options.size), options.folder, bits=options.bits))
