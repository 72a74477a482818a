"""A checkpoint of floats -> one of low-bit weights, tensor by tensor.

Rows are read, quantized and written some MiB at a time, so memory holds neither a whole table nor a
whole layer, only the scales of the tensor in work. Files are finished one by one; what is finished
is noted in `quantizing.json` with its SHA-256. Started again after a crash, a full disk or a kill,
the work goes on after the last file that is noted and intact. config.json comes last: until then
the folder is no checkpoint.

Which bits a weight gets is the recipe's business, see recipe.py.

With calibration data, weights below 8 bits of the decoder's layers are chosen by calibrate.py,
layer by layer; the others, and all without data, by quant/quantize.py.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gemsmith.config import Gemma4Config
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.quantize import squares
from gemsmith.weights import layouts
from gemsmith.weights.calibrate import Calibration
from gemsmith.weights.files import INDEX, SINGLE
from gemsmith.weights.hub import FIDELITY
from gemsmith.weights.load import read_codes, tower_shapes
from gemsmith.weights.mixed import MEASURED, Choice, fit
from gemsmith.weights.names import (
    EMBEDDING,
    HEAD,
    PLE_TABLE,
    Shape,
    expected_shapes,
    is_tower,
    match,
    match_towers,
    unused_shapes,
    written_key,
)
from gemsmith.weights.recipe import Recipe
from gemsmith.weights.rounding import Advance, rounded, settled, silent
from gemsmith.weights.save import (
    ALIGNMENT,
    index_of,
    new_file,
    replace_file,
    split_shards,
    to_json,
    write_tensors,
)
from gemsmith.weights.tensors import DTYPES, StoredTensor, read_checkpoint, read_header, read_rows

SHARD_BYTES = 512 << 20
"""Bytes of a file, and so the most work a kill can cost: a few minutes."""
PROGRESS = "quantizing.json"
UNREAD = "unread: "
"""Begins the name of a tensor that is in the files and no weight of the model."""
COMPANIONS = (".json", ".jinja", ".model", ".txt")
MAX_COMPANION_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one weight."""

    name: str
    format: Format | None
    """None: as it was."""
    dtype: str
    """Of floats that stayed: the file's name for it."""
    weights: int
    nbytes: int
    """In the file, scales included."""
    wrong: float
    whole: float
    """Sums of squares: of the error, and of the weight."""
    matrices: int = 1
    """More than 1 in a stack of experts."""
    calibrated: int = 0
    """How many of them were chosen with data."""
    choice: Choice | None = None
    """Of a mixed recipe: why it has this format."""


@dataclass(slots=True)
class _Part:
    """A tensor of the new file."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        return self.make()


@dataclass(slots=True)
class _Job:
    """One weight: read from `source`, written as one tensor or several."""

    name: str
    key: str
    source: StoredTensor
    format: Format | None
    """Once its codes are made: the one that it settled on."""
    mobile: bool
    advance: Advance
    calibration: Calibration | None = None
    """What chooses the codes, if data does."""
    choice: Choice | None = None
    wrong: float = 0.0
    whole: float = 0.0
    calibrated: int = 0
    scales: list[Tensor] = field(default_factory=list)
    parts: list[_Part] = field(init=False)

    def __post_init__(self) -> None:
        shape, format, stem = self.source.shape, self.format, self.key.removesuffix(".weight")
        if format is None:
            self.parts = [_Part(self.key, shape, DTYPES[self.source.dtype], self._floats)]
            return
        *rows, K = shape
        row_bytes, groups = K * format.bits // 8, format.groups(K, self.key)
        scale = torch.bfloat16 if format.group and not self.mobile else torch.float32
        scales, codes = (*rows, groups), (*rows, row_bytes)
        if self.mobile:
            table = self.name in (EMBEDDING, PLE_TABLE)
            first = "embedding_quantized" if table else "weight"
            second = "embedding_scale" if table else "weight_scale"
            kind = torch.int8 if format.bits == 8 else torch.uint8
            self.parts = [
                _Part(f"{stem}.{first}", codes, kind, self._codes),
                _Part(f"{stem}.{second}", scales, scale, lambda: self._scales(scale)),
            ]
            if not table:
                # 0 says that activations have no static scale.
                self.parts += [
                    _Part(f"{stem}.{side}_activation_scale", (), torch.float32, _nothing)
                    for side in ("input", "output")
                ]
            return
        stem += ".weight" if stem != self.key else ""
        filled = (*rows, -(-row_bytes // layouts.WORD))
        self.parts = [
            _Part(f"{stem}_packed", filled, torch.int32, self._codes),
            _Part(f"{stem}_scale", scales, scale, lambda: self._scales(scale)),
            _Part(f"{stem}_shape", (len(shape),), torch.int64, lambda: iter([torch.tensor(shape)])),
        ]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def aligned(self) -> bool:
        """Whether what follows its codes and scales is aligned as they are."""
        return all(part.nbytes % ALIGNMENT == 0 for part in self.parts[:2])

    def row(self) -> Row:
        weights = math.prod(self.source.shape)
        dtype = self.source.dtype
        matrices = self.source.shape[0] if len(self.source.shape) == 3 else 1
        sums = self.wrong, self.whole
        told = matrices, self.calibrated, self.choice
        return Row(self.name, self.format, dtype, weights, self.nbytes, *sums, *told)

    def note(self) -> tuple[float, float, int, bool]:
        """What is kept of a weight whose codes were made."""
        steps = self.format is not None and self.format.steps
        return self.wrong, self.whole, self.calibrated, steps

    def take_note(self, noted: Sequence[Any] | None) -> None:
        if noted is None or self.format is None:
            return
        self.wrong, self.whole, self.calibrated, steps = noted
        self.format = self.format if steps else self.format.free

    def _floats(self) -> Iterator[Tensor]:
        for rows in read_rows(self.source):
            yield rows
            self.advance(self.key, rows.numel())

    def _codes(self) -> Iterator[Tensor]:
        assert self.format is not None
        self.scales.clear()
        self.wrong = self.whole = 0.0
        for rows, found in self._pieces(self.format):
            wrong, whole = squares(rows, found)
            self.wrong, self.whole = self.wrong + wrong, self.whole + whole
            self.scales.append(found.scales)
            self.format = found.format
            if not self.mobile:
                yield layouts.words(found.packed)
            elif found.format.bits == 8:
                yield (found.packed ^ 128).view(torch.int8)
            else:
                yield found.packed
            self.advance(self.key, rows.numel())

    def _pieces(self, format: Format) -> Iterator[tuple[Tensor, Quantized]]:
        """Rows as they are, and in the format."""
        if self.calibration is None or not self.calibration.covers(self.name):
            yield from rounded(self.key, self.source, *settled(self.key, self.source, format))
            return
        chosen, start = self.calibration.take(self.name).flat(), 0
        self.calibrated = self.calibration.calibrated[self.name]
        for rows in read_rows(self.source):
            yield rows, chosen[start : start + len(rows)]
            start += len(rows)

    def _scales(self, dtype: torch.dtype) -> Iterator[Tensor]:
        for scales in self.scales:
            yield scales.to(dtype).contiguous()
        self.scales.clear()


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: Recipe,
    *,
    tokens: Sequence[Sequence[int]] | None = None,
    begin: Callable[[int, int], None] = lambda total, done: None,
    advance: Advance = silent,
    shard_bytes: int = SHARD_BYTES,
) -> list[Row]:
    """Write `target`, or finish it; returns what became of each weight, in the model's order.

    tokens: calibration data, sequences of token ids, see calibrate.py; None: without.
    `begin` is told once how many values there are and how many were done by an earlier call.

    Raises:
      ConfigError: the recipe does not fit the model, or has no use for data.
      RequestError: the data is not this model's.
      WeightsError: the source is damaged, not a Gemma 4 of floats, or the target holds another
        checkpoint, or cannot be written.
    """
    source, target = Path(source), Path(target)
    config, jobs = _plan(source, recipe, advance)
    if tokens is not None and recipe.bits == "8":
        raise ConfigError("calibration data: 8 bits are as good without; leave it out")
    _check_target(target)
    if recipe.mixed:
        recipe, choices = _fit(recipe, config, jobs, target, tokens)
        config, jobs = _plan(source, recipe, advance)
        for job in jobs:
            job.choice = choices.get(job.name)
    shards = split_shards(jobs, shard_bytes)
    count = len(shards)
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    done = _done_before(target, _digest(recipe, jobs, shards, tokens))
    done["files"] = {n: f for n, f in done["files"].items() if _intact(target / n, f)}
    if tokens is not None:
        _calibrate(jobs, config, tokens, [target / name for name in done["files"]])
    kept = [job for n, s in zip(names, shards, strict=True) if n in done["files"] for job in s]
    for name in (".model*.safetensors", f".{INDEX}", f".{PROGRESS}", ".config.json"):
        for path in target.glob(f"{name}.*.tmp"):
            path.unlink()  # half a file, of a process that was killed
    begin(sum(_values(job) for job in jobs), sum(_values(job) for job in kept))
    current = ""
    try:
        for current, shard in zip(names, shards, strict=True):
            if current not in done["files"]:
                files = done["files"] | {current: _finish(target, current, shard)}
                replace_file(target, PROGRESS, to_json(done | {"files": files}))
                done["files"] = files
            noted = done["files"][current]["squares"]
            for job in shard:
                job.take_note(noted.get(job.name))
        if count > 1:
            parts = [[part for job in shard for part in job.parts] for shard in shards]
            replace_file(target, INDEX, to_json(index_of(names, parts)))
        _copy_companions(source, target)
        formats = {job.name: job.format for job in jobs if job.format}
        section = _section(recipe, config, formats)
        replace_file(
            target, "config.json", to_json(config.to_dict() | {"quantization_config": section})
        )
        (target / PROGRESS).unlink()
    except OSError as error:
        raise WeightsError(
            f"{target}: cannot be written ({error.strerror}); {len(done['files'])} of {count} "
            "files are done. Make room and run the same command again to go on."
        ) from None
    return [job.row() for job in jobs]


def _calibrate(
    jobs: list[_Job], config: Gemma4Config, tokens: Sequence[Sequence[int]], done: list[Path]
) -> None:
    """Have data choose the codes of jobs; `done` are files of an earlier call, with theirs."""
    decoder = [job for job in jobs if not is_tower(job.name)]
    stored = {key: tensor for file in done for key, tensor in read_header(file).items()}
    low = layouts.fold(stored, expected_shapes(config.text_config))[1]
    keys = {job.name: job.key for job in decoder if job.key in low}

    def found(name: str) -> Quantized | None:
        weight = {name: low[keys[name]]} if name in keys else {}
        return dict(read_codes(stored, weight, torch.device("cpu"), stays=False)).get(name)

    calibration = Calibration(
        config.text_config,
        {job.name: job.source for job in decoder},
        {job.name: job.format for job in decoder if job.format},
        tokens,
        found,
        lambda name: jobs[0].advance(written_key(name), 0),
    )
    for job in decoder:
        job.calibration = calibration


def _fit(
    recipe: Recipe,
    config: Gemma4Config,
    jobs: list[_Job],
    target: Path,
    tokens: Sequence[Sequence[int]] | None,
) -> tuple[Recipe, dict[str, Choice]]:
    """The mixed recipe with its formats chosen, and why each weight has its own."""
    candidates = recipe.candidates(config)
    try:
        recipe, choices = fit(
            recipe,
            config,
            {job.name: job.source for job in jobs if not is_tower(job.name)},
            sum(job.nbytes for job in jobs if job.name not in candidates),
            target,
            tokens,
            lambda name: jobs[0].advance(written_key(name), 0),
        )
    except OSError as error:
        raise WeightsError(f"{target}: cannot be written ({error.strerror})") from None
    return recipe, {name: choice for choice in choices for name in choice.unit}


def left_as_floats(folder: str | Path) -> list[str]:
    """Matrices of the checkpoint that no format was given, by key; the router is not counted.

    Read from the files themselves: what a checkpoint is called is one thing, what it holds another.
    """
    folder = Path(folder)
    config = Gemma4Config.load(folder)
    stored = read_checkpoint(folder)
    text = config.text_config
    known = expected_shapes(text) | unused_shapes(text) | tower_shapes(config)
    low = layouts.fold(stored, known)[1]
    linear = {f"model.{name}" for name in Recipe("8").formats(config) if is_tower(name)}
    linear |= {
        written_key(name)
        for name, shape in expected_shapes(text).items()
        if len(shape) > 1 and ".router." not in name
    }
    return sorted(key for key in stored if key in linear and key not in low)


def stored_weights(folder: str | Path) -> list[Row]:
    """What the checkpoint's files hold, in the model's order, and last what the model never reads.

    The sum of their bytes is that of the files without their headers.

    Raises:
      WeightsError: a file is missing or damaged, or the tensors are not this model's.
    """
    folder = Path(folder)
    config, section = Gemma4Config.load(folder), layouts.read_section(folder)
    stored, text = read_checkpoint(folder), config.text_config
    towers = tower_shapes(config)
    expected = expected_shapes(text) | unused_shapes(text) | towers
    shapes, low = layouts.fold(stored, expected, section)
    files = {key: stored[low[key].codes if key in low else key].file.name for key in shapes}
    chosen = match(shapes, text, files, str(folder))
    if towers:
        chosen |= match_towers(shapes, towers, str(folder))
    rows, left = [], dict(stored)
    for name in [name for name in (*expected_shapes(text), *towers) if name in chosen]:
        key = chosen[name]
        weight = low.get(key)
        keys = [key] if weight is None else [weight.codes, weight.scales, weight.stated_shape]
        tensors = [left.pop(key) for key in keys if key is not None]
        nbytes, format = sum(tensor.nbytes for tensor in tensors), weight and weight.format
        count = math.prod(shapes[key])
        rows.append(Row(name, format, tensors[0].dtype, count, nbytes, 0.0, 0.0))
    for key, tensor in left.items():
        count = math.prod(tensor.shape)
        rows.append(Row(UNREAD + key, None, tensor.dtype, count, tensor.nbytes, 0.0, 0.0))
    return rows


def _plan(source: Path, recipe: Recipe, advance: Advance) -> tuple[Gemma4Config, list[_Job]]:
    """The new checkpoint's config, and a job for each of its weights, in order."""
    config = Gemma4Config.load(source)
    if layouts.read_section(source) is not None:
        raise WeightsError(
            f"{source} is quantized already; start from the checkpoint it was made from, because "
            "errors of two roundings add up"
        )
    stored = read_checkpoint(source)
    shapes = {key: tensor.shape for key, tensor in stored.items()}
    files = {key: tensor.file.name for key, tensor in stored.items()}
    chosen = match(shapes, config.text_config, files, str(source))
    towers = tower_shapes(config)
    if towers:
        chosen |= match_towers(shapes, towers, str(source))
    wrong = [key for key in chosen.values() if stored[key].dtype not in DTYPES]
    if wrong:
        raise WeightsError(
            f"{source}: {wrong[0]} is stored as {stored[wrong[0]].dtype}; quantized are "
            f"{', '.join(DTYPES)}"
        )
    if recipe.mobile and config.text_config.tie_word_embeddings:
        chosen[HEAD] = chosen[EMBEDDING]
        text = replace(config.text_config, tie_word_embeddings=False)
        config = replace(config, text_config=text, tie_word_embeddings=False)
    formats = recipe.formats(config)
    jobs = [
        _Job(
            name,
            f"model.{name}" if is_tower(name) else written_key(name),
            stored[key],
            formats.get(name),
            recipe.mobile,
            advance,
        )
        for name, key in chosen.items()
    ]
    order = {
        name: place for place, name in enumerate([*expected_shapes(config.text_config), *towers])
    }
    return config, sorted(jobs, key=lambda job: order[job.name])


def _section(recipe: Recipe, config: Gemma4Config, formats: dict[str, Format]) -> dict[str, Any]:
    """quantization_config, with modules under the names they have in transformers."""

    def module(name: str) -> str:
        key = f"model.{name}" if is_tower(name) else written_key(name)
        return key.removesuffix(".weight")

    named = {module(name): format for name, format in formats.items()}
    shapes = expected_shapes(config.text_config)
    ignored = {
        module(name) for name in shapes if len(shapes[name]) > 1 and module(name) not in named
    }
    if recipe.mobile:
        return layouts.gemma_section(named, ignored)
    return layouts.compressed_section(named, {*ignored, "lm_head"})


def _finish(target: Path, name: str, shard: list[_Job]) -> dict[str, Any]:
    """Write one file whole; returns what is noted of it."""
    jobs = sorted(shard, key=lambda job: not job.aligned)
    parts = [part for job in jobs for part in job.parts[:2]]
    parts += [part for job in jobs for part in job.parts[2:]]
    target.mkdir(parents=True, exist_ok=True)
    temporary: dict[str, Path] = {}
    try:
        with new_file(target, name, temporary) as file:
            hashing = _Hashing(file)
            write_tensors(hashing, parts)  # pyright: ignore[reportArgumentType]
        os.replace(temporary[name], target / name)
    except BaseException:
        temporary[name].unlink(missing_ok=True)
        raise
    noted = {job.name: job.note() for job in shard if job.format}
    return {"sha256": hashing.digest.hexdigest(), "squares": noted}


class _Hashing:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _check_target(target: Path) -> None:
    """Refuse a folder that holds something else."""
    if (target / "config.json").exists():
        raise WeightsError(
            f"{target} holds a checkpoint already; remove it or choose another folder"
        )
    if not (target / PROGRESS).exists():
        for part in target.glob("*.safetensors"):
            raise WeightsError(
                f"{target} holds {part.name}, which is not of an unfinished quantization; "
                "choose another folder"
            )


def _done_before(target: Path, plan: str) -> dict[str, Any]:
    """What an earlier call for the same plan noted; nothing if there was none."""
    path = target / PROGRESS
    fresh = {"plan": plan, "files": {}}
    if not path.exists():
        return fresh
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(done["files"], dict) and isinstance(done["plan"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        return fresh
    if not good:
        return fresh
    if done["plan"] != plan:
        raise WeightsError(
            f"{target} holds an unfinished quantization of another checkpoint or with other "
            "options; remove it or choose another folder"
        )
    return done


def _intact(file: Path, noted: Any) -> bool:
    """Whether a file is what was noted of it; a note of another form counts for nothing."""
    if not isinstance(noted, dict) or not isinstance(noted.get("squares"), dict):
        return False
    try:
        with open(file, "rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest() == noted.get("sha256")
    except OSError:
        return False


def _digest(
    recipe: Recipe,
    jobs: list[_Job],
    shards: list[list[_Job]],
    tokens: Sequence[Sequence[int]] | None,
) -> str:
    """Identifies what is made of what: recipe, source files and data as they are, the division."""
    files = {job.source.file for job in jobs}
    facts = [
        repr(recipe),
        [list(ids) for ids in tokens] if tokens is not None else None,
        [len(shard) for shard in shards],
        [[job.key, job.source.dtype, job.source.shape, str(job.format)] for job in jobs],
        sorted([str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, template and settings: small files beside the weights."""
    for path in sorted(source.iterdir()):
        own = path.name in ("config.json", INDEX, PROGRESS, FIDELITY, MEASURED)
        companion = path.suffix in COMPANIONS and not own
        if companion and path.is_file() and path.stat().st_size <= MAX_COMPANION_BYTES:
            shutil.copyfile(path, target / path.name)


def _values(job: _Job) -> int:
    return math.prod(job.source.shape)


def _nothing() -> Iterator[Tensor]:
    yield torch.zeros(1)
