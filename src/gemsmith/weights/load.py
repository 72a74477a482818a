"""A checkpoint folder of safetensors files -> a decoder, and its towers, ready to run.

Nothing is read until every tensor of every file is accounted for, from the headers alone. Then
each weight goes straight to its place, one at a time; there are never two copies of the weights:

  same dtype, on the CPU   the weight IS the file's pages, mapped copy-on-write: nothing is
                           copied, loading takes milliseconds, processes share the memory, and
                           what was never used was never read
  another dtype or device  converted or uploaded tensor by tensor; the file is mapped afresh every
                           32 MiB, so that pages already converted do not stay in memory

The per-layer table (PLE) stays on disk by default, see ple.py. A mapped file may be renamed,
replaced by renaming, or deleted; it must not be rewritten in place.

Weights of few bits (see layouts.py) never become floats: modules of quant/linear.py hold their
codes, on the CPU in the order of its kernels (see cached.py). With `quant` a checkpoint of floats
becomes such a model while it is read, some MiB of floats at a time: the one that
`gemsmith quantize` would write. On the CPU it, too, is kept packed in the user's cache folder.

What it is not: a reader of pickle (`.bin`, `.pt`), which runs code as it is read, or of GGUF. Image
and audio towers are read by `load_towers`, once they are needed.

Sources: the safetensors format description; safetensors 0.8, whose CPU tensors are views of a
private mapping.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gemsmith import hardware, sizing
from gemsmith.config import Gemma4Config
from gemsmith.errors import CapacityError, ConfigError, WeightsError
from gemsmith.model.text import Experts, TextModel
from gemsmith.model.towers import Towers
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from gemsmith.quant.packed import Packed
from gemsmith.weights.cached import packed_weights
from gemsmith.weights.fuse import fuse
from gemsmith.weights.layouts import LowBit, codes_of, fold, read_section
from gemsmith.weights.names import (
    EMBEDDING,
    HEAD,
    LAST_NORM,
    PLE_TABLE,
    Shape,
    expected_shapes,
    match,
    match_towers,
    module_name,
    unused_shapes,
)
from gemsmith.weights.ple import PLEStore, QuantPLEStore, RoundingPLEStore
from gemsmith.weights.recipe import ON_LOAD, recipe_on_load
from gemsmith.weights.rounding import ROUNDING, Advance, quantized, settled, silent
from gemsmith.weights.tensors import (
    DTYPES,
    Reader,
    StoredTensor,
    opened,
    read_checkpoint,
)

TABLE_DTYPES = DTYPES | {"I32": torch.int32, "U8": torch.uint8, "I8": torch.int8}
COMPUTE = (torch.bfloat16, torch.float32)
HEAD_ROWS_COMPARED = 256
KEPT = (32 << 20) - (64 << 10)
"""With what torch and glibc add, still no more than 32 MiB."""
STAY_BFLOAT16 = ("per_layer_model_projection.weight", HEAD)
"""Beside low-bit weights, which compute in float32 on the CPU: what `ops.linear` widens as it goes.
A token reads half the bytes, and the file's pages serve as they are."""


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ple: Literal["disk", "memory"] = "disk",
    quant: str | None = None,
    advance: Advance = silent,
) -> tuple[Gemma4Config, TextModel]:
    """Read a checkpoint folder: its config and its decoder, in evaluation mode, gradients off.

    dtype None keeps the dtype of the stored embedding, or of the last norm where that is in few
    bits (float16 is refused, see below); on the CPU weights of few bits compute in float32.
    Weights of floats on the CPU in the stored dtype are private mappings of the files: writing to
    them changes neither the file nor another process. `ple` "memory" makes the per-layer table a
    weight like the others.

    quant "int8", "int4" or "int2" quantizes a checkpoint of floats while it is read, as
    `gemsmith quantize --bits` does; rows of a table on disk are then rounded when they are read.
    `advance` is told of each piece that was quantized; `quantized_values` says how many there are.

    Raises:
      ConfigError: config.json or an option is wrong.
      WeightsError: a file is missing, damaged or refused, or its tensors are not this model's.
      CapacityError: the device has too little memory.
    """
    folder = Path(folder)
    if ple not in ("disk", "memory"):
        raise ConfigError(f"ple {ple!r}: must be disk (rows read as needed) or memory")
    device = checked_device(device)
    config = Gemma4Config.load(folder)
    formats = _formats(quant, config)
    section = read_section(folder)
    stored, text = read_checkpoint(folder), config.text_config
    expected = expected_shapes(text) | unused_shapes(text)
    shapes, low = fold(stored, expected, section)
    files = {key: stored[low[key].codes if key in low else key].file.name for key in shapes}
    chosen = match(shapes, text, files, str(folder))
    if formats and (low or section is not None):
        raise WeightsError(
            f"{folder} is quantized already: load it without quant={quant!r}, or quantize the "
            "checkpoint it was made from"
        )
    check_dtypes(stored, chosen, low, folder)
    _check_head(stored, shapes, chosen, low)
    typical = stored[chosen[LAST_NORM if formats or chosen[EMBEDDING] in low else EMBEDDING]]
    if dtype is None and (low or formats) and device.type == "cpu":
        dtype = torch.float32  # what the integer products give; few values are floats at all
    dtype = compute_dtype(dtype, typical, folder)

    _check_room(folder, config, stored, chosen, low, device, dtype, ple, quant)
    model = TextModel(text, device="meta", dtype=dtype)
    if PLE_TABLE in chosen and ple == "disk":
        key = chosen.pop(PLE_TABLE)
        table = table_on_disk(stored, key, low, formats.get(PLE_TABLE), dtype, device)
        model.set_submodule("embed_tokens_per_layer", table)
    _fill(model, stored, chosen, low, device, dtype, formats, advance, quant or "")
    model = model.eval().requires_grad_(False)
    fuse(model)
    if device.type == "cpu" and not low and not formats:
        keep_what_is_freed()
    return config, model


def keep_what_is_freed() -> None:
    """Let torch's tensors of up to 32 MiB lie where earlier ones did, instead of in fresh memory.

    glibc gives freed memory back to the system where it is more than twice the largest piece that
    was mapped by itself and freed so far; to have it again costs a fault a page, a sixth of a
    prompt's time where products are as fast as with AMX. So one piece of the most that it takes
    notice of (DEFAULT_MMAP_THRESHOLD_MAX in mallopt(3)) is had and freed, and none of it touched.
    Up to 64 MiB stay with the process then. Other C libraries, and limits that the user has set,
    stay as they are.
    """
    torch.empty(KEPT, dtype=torch.uint8)


def quantized_values(
    config: Gemma4Config, quant: str, ple: Literal["disk", "memory"] = "disk"
) -> int:
    """How many values `load_model(quant=quant)` quantizes, the sum of what `advance` is told.

    Raises:
      ConfigError: no such quant, or its groups do not fit the model.
    """
    shapes, formats = expected_shapes(config.text_config), _formats(quant, config)
    names = shapes.keys() & formats.keys() - ({PLE_TABLE} if ple == "disk" else set())
    return sum(math.prod(shapes[name]) for name in names)


def load_towers(
    folder: str | Path,
    config: Gemma4Config,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quant: str | None = None,
) -> Towers:
    """Read the image and audio towers of the checkpoint that `load_model` read, likewise.

    Raises: as `load_model`.
    """
    folder, device = Path(folder), checked_device(device)
    stored = read_checkpoint(folder)
    expected = tower_shapes(config)
    shapes, low = fold(stored, expected)
    chosen = match_towers(shapes, expected, str(folder))
    check_dtypes(stored, chosen, low, folder)
    towers = Towers(config, device="meta", dtype=dtype)
    _fill(
        towers,
        stored,
        chosen,
        low,
        device,
        dtype,
        _formats(quant, config),
        silent,
        f"towers {quant}",
    )
    return towers.eval().requires_grad_(False)


def tower_shapes(config: Gemma4Config) -> dict[str, Shape]:
    """Every tensor of the model's towers, by module name."""
    state = Towers(config, device="meta").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def table_on_disk(
    stored: dict[str, StoredTensor],
    key: str,
    low: dict[str, LowBit],
    format: Format | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PLEStore | QuantPLEStore | RoundingPLEStore:
    """A table whose rows are read as they are needed: `ple.py` says how."""

    def rows(key: str, dtype: torch.dtype | None) -> PLEStore:
        table = stored[key]
        return PLEStore(
            table.file,
            offset=table.offset,
            shape=(table.shape[0], table.shape[1]),
            stored=TABLE_DTYPES[table.dtype],
            dtype=dtype,
            device=device,
        )

    if format is not None:
        return RoundingPLEStore(rows(key, None), *settled(key, stored[key], format), dtype)
    if key not in low:
        return rows(key, dtype)
    return QuantPLEStore(low[key], rows(low[key].codes, None), rows(low[key].scales, None), dtype)


def _fill(
    model: nn.Module,
    stored: dict[str, StoredTensor],
    chosen: dict[str, str],
    low: dict[str, LowBit],
    device: torch.device,
    dtype: torch.dtype,
    formats: dict[str, Format],
    advance: Advance,
    part: str,
) -> None:
    """Stream the tensors `chosen` ({module name: key}) into the places of a meta model.

    Those that `formats` names are quantized on the way. part: see `packed_weights`.
    """
    names = {key: name for name, key in chosen.items() if key not in low and name not in formats}
    reader, done = Reader(stored), 0
    integer_products = device.type == "cpu" and len(names) < len(chosen)
    for key in sorted(names, key=lambda key: _order(stored[key])):
        its, wanted = DTYPES[stored[key].dtype], dtype
        if integer_products and its == torch.bfloat16 and names[key] in STAY_BFLOAT16:
            wanted = its
        tensor = reader.get(key, stays=device.type == "cpu" and its == wanted)
        try:
            ready = tensor.to(device, wanted)
        except torch.OutOfMemoryError:
            raise CapacityError(
                f"{device}: out of memory at {key} after {done / 2**30:.1f} GiB of weights; "
                "free memory there, or load on another device"
            ) from None
        if ready.data_ptr() % ready.element_size():
            ready = ready.clone()  # only a file that mixes odd dtypes begins values at odd bytes
        done += ready.nbytes
        _place(model, names[key], ready)
        del tensor
    weights = {name: low[key] for name, key in chosen.items() if key in low}
    if weights:
        _place_low(model, _low_bit(stored, weights, device, part), dtype)
    keys = {name: key for name, key in chosen.items() if name in formats}
    if keys:
        _place_low(model, _rounded(stored, keys, formats, device, advance, part), dtype)


def fill_floats(
    model: nn.Module,
    stored: dict[str, StoredTensor],
    chosen: dict[str, str],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """`_fill` with floats alone."""
    _fill(model, stored, chosen, {}, device, dtype, {}, silent, "")


def _rounded(
    stored: dict[str, StoredTensor],
    keys: dict[str, str],
    formats: dict[str, Format],
    device: torch.device,
    advance: Advance,
    part: str,
) -> Mapping[str, Quantized | Packed]:
    """Weights of floats in their formats by name: packed where the CPU's kernels take them all."""
    layout = {name: (formats[name], stored[key].shape) for name, key in keys.items()}
    told: set[str] = set()

    def tell(key: str, values: int) -> None:
        if key not in told:
            advance(key, values)

    def weights() -> Iterator[tuple[str, Quantized]]:
        for name, key in keys.items():
            yield name, quantized(key, stored[key], formats[name], device, tell)
            told.add(key)  # if the cache cannot be written, all are made once more

    if device.type == "cpu" and all(Packed.takes(*each) for each in layout.values()):
        files = {stored[key].file for key in keys.values()}
        folder = next(iter(files)).parent
        found = packed_weights(folder, files, layout, weights, f"{part}, rounding {ROUNDING}")
    else:
        found = dict(weights())
    for name, key in keys.items():
        tell(key, math.prod(layout[name][1]))  # what the cache had
    return found


def _low_bit(
    stored: dict[str, StoredTensor], weights: dict[str, LowBit], device: torch.device, part: str
) -> Mapping[str, Quantized | Packed]:
    """Low-bit weights by name: packed where the CPU's kernels take them all, else codes, which are
    the file's pages where they can be."""
    weights = dict(sorted(weights.items(), key=lambda item: _order(stored[item[1].codes])))
    layout = {name: (low.format, low.shape) for name, low in weights.items()}
    if device.type == "cpu" and all(Packed.takes(*each) for each in layout.values()):
        files = {stored[low.codes].file for low in weights.values()}
        folder = next(iter(files)).parent
        codes = partial(read_codes, stored, weights, device, stays=False)
        return packed_weights(folder, files, layout, codes, part)
    return dict(read_codes(stored, weights, device, stays=device.type == "cpu"))


def read_codes(
    stored: dict[str, StoredTensor],
    weights: dict[str, LowBit],
    device: torch.device,
    *,
    stays: bool,
) -> Iterator[tuple[str, Quantized]]:
    """Each weight as it is stored, in the order given; `stays`: as views of the files."""
    reader = Reader(stored)
    for name, weight in weights.items():
        if weight.stated_shape:
            stated = reader.get(weight.stated_shape, stays=False).tolist()
            if stated != list(weight.shape):
                raise WeightsError(
                    f"{stored[weight.codes].file.name}: {weight.stated_shape} says {stated[:4]}, "
                    f"this model has {list(weight.shape)}; config.json belongs to another model"
                )
        scales = reader.get(weight.scales, stays=False).to(device, torch.float32, copy=True)
        codes = reader.get(weight.codes, stays=stays)
        try:
            codes = codes_of(codes, weight).to(device)
        except torch.OutOfMemoryError:
            raise CapacityError(
                f"{device}: out of memory at {weight.codes}; free memory there, or load on another "
                "device"
            ) from None
        yield name, Quantized(weight.format, weight.shape, codes, scales)


def _formats(quant: str | None, config: Gemma4Config) -> dict[str, Format]:
    return {} if quant is None else recipe_on_load(quant).formats(config)


def _place_low(
    model: nn.Module, weights: Mapping[str, Quantized | Packed], dtype: torch.dtype
) -> None:
    """Put modules of few bits where the model has modules of floats."""
    for name, weight in weights.items():
        at, _, leaf = name.rpartition(".")
        old = model.get_submodule(at)
        if isinstance(old, nn.Embedding):
            new = QuantEmbedding(weight, dtype)
        elif isinstance(old, nn.Linear):
            new = QuantLinear(weight, dtype, old.bias)
        elif isinstance(old, Experts):
            down = weights.get(f"{at}.down_proj")
            if leaf == "down_proj" or down is None:
                raise WeightsError(f"{at}: one of its two weights is of floats, the other is not")
            new = QuantExperts(weight, down, dtype)
        elif leaf == "down_proj":
            continue  # placed with gate_up_proj
        else:
            raise WeightsError(f"{name} is stored in {weight.format}; it is no matrix of a layer")
        model.set_submodule(at, new)


def _order(tensor: StoredTensor) -> tuple[Path, int]:
    return tensor.file, tensor.offset


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the model has a meta parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module.register_buffer(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def check_dtypes(
    stored: dict[str, StoredTensor], chosen: dict[str, str], low: dict[str, LowBit], folder: Path
) -> None:
    floats = [key for key in chosen.values() if key not in low]
    wrong = [key for key in floats if stored[key].dtype not in DTYPES]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise WeightsError(
            f"{folder}: {wrong[0]} is stored as {stored[wrong[0]].dtype}{more}; this version "
            f"reads {', '.join(DTYPES)}. Use the bfloat16 checkpoint of the same model."
        )


def _check_head(
    stored: dict[str, StoredTensor],
    keys: Iterable[str],
    chosen: dict[str, str],
    low: dict[str, LowBit],
) -> None:
    """A stored output head must be the embedding it is tied to; some rows are compared."""

    def some_rows(key: str) -> Tensor:
        tensor = stored[key]
        step = -(-tensor.shape[0] // HEAD_ROWS_COMPARED)
        return opened(tensor.file).get_tensor(key)[::step]

    for key in keys:
        if module_name(key) != HEAD or HEAD in chosen:
            continue
        pairs = [(key, chosen[EMBEDDING])]
        if key in low and chosen[EMBEDDING] in low:
            head, table = low[key], low[chosen[EMBEDDING]]
            pairs = [(head.codes, table.codes), (head.scales, table.scales)]
        if any(
            ours not in stored
            or theirs not in stored
            or not torch.equal(some_rows(ours), some_rows(theirs))
            for ours, theirs in pairs
        ):
            raise WeightsError(
                f"{key} differs from {chosen[EMBEDDING]}; Gemma 4 ties the two. "
                "The head was trained apart and cannot be kept; export with tied embeddings."
            )


def _check_room(
    folder: Path,
    config: Gemma4Config,
    stored: dict[str, StoredTensor],
    chosen: dict[str, str],
    low: dict[str, LowBit],
    device: torch.device,
    dtype: torch.dtype,
    ple: str,
    quant: str | None,
) -> None:
    """Refuse weights that the memory cannot hold, and say what it could.

    Mapped files need no memory of their own: where they are more than there is, the system reads
    them from the disk over and over, which is slow and no error.
    """
    place = "cpu" if device.type == "cpu" else "gpu"
    if quant is not None:
        parts = sizing.weight_bytes(
            config, quant, place, towers=False, ple_in_memory=ple == "memory"
        )
        need, mapped = sum(parts.values()), False
    else:
        need, mapped = 0, device.type == "cpu"
        for name, key in chosen.items():
            if name == PLE_TABLE and ple == "disk":
                continue
            if key in low:
                format = low[key].format
                its = low[key].shape, format.bits, format.group, place
                need += sizing.held_bytes(*its, steps=format.steps)
            else:
                need += math.prod(stored[key].shape) * dtype.itemsize
                mapped &= bool(low) or DTYPES[stored[key].dtype] == dtype
    free = hardware.free_bytes(device)
    if free is None or need <= free:
        return
    what = f"{folder.name} needs {need / 2**30:.2f} GiB for its weights"
    have = f"{free / 2**30:.2f} GiB are free on {device}"
    if mapped:
        warnings.warn(
            f"{what} and {have}: they will be read from the disk again and again, which is slow",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    way = "`gemsmith fit` lists what fits"
    for format in ON_LOAD if not low else ():
        smaller = sum(sizing.weight_bytes(config, format, place, towers=False).values())
        if smaller <= min(free, need - 1):
            way = f"quant={format!r} needs {smaller / 2**30:.2f} GiB, and {way}"
            break
    raise CapacityError(f"{what} and {have}; {way}")


def compute_dtype(asked: torch.dtype | None, embedding: StoredTensor, folder: Path) -> torch.dtype:
    dtype = DTYPES[embedding.dtype] if asked is None else asked
    if asked is None and dtype == torch.float16:
        raise WeightsError(
            f"{folder} is stored in float16, in which Gemma 4's MLP overflows (above 65504); "
            "pass dtype=torch.bfloat16 or torch.float32 to convert while loading"
        )
    if dtype == torch.float16:
        raise ConfigError(
            "dtype float16: Gemma 4's MLP outputs exceed its largest value, 65504; "
            "use bfloat16 or float32"
        )
    if dtype not in COMPUTE:
        raise ConfigError(f"dtype {dtype}: must be torch.bfloat16 or torch.float32")
    return dtype


def checked_device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r}: must be cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device}: must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device {device}: this PyTorch ({torch.__version__}) sees {count} CUDA devices; "
            "use device='cpu'"
        )
    return device
