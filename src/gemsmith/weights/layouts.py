"""How low-bit weights lie in a checkpoint, and what config.json says of them.

Two layouts are written and read:

  compressed-tensors   `pack-quantized`: for a module X, `X.weight_packed` int32 [N, words] (codes
                       as in quant/formats.py, each row filled up to a word), `X.weight_scale`
                       [N, G], `X.weight_shape` int64 [N, K]. For stacked experts, which are no
                       modules, `X_packed`, `X_scale`, `X_shape`: ours, others read dense models.
  gemma                Google's mobile files: `X.weight` uint8 [N, K * bits / 8], or int8 [N, K],
                       with `X.weight_scale` [N, 1]; tables `X.embedding_quantized` with
                       `X.embedding_scale` [V, G]; one scale a row, the head apart.

Formats are taken from the tensors: how many bytes a row of K weights has gives its bits, how many
scales its groups. The patterns in config.json, which are anyone's regular expressions, are written
for other readers and never run. One note of ours is read there: where `observer_kwargs` says
`steps`, scales of the modules named are multiples of a step (quant/formats.py); packing sees
whether they are, and of a format that has no steps the note says nothing. Scales of activations and
caches, trained for static rounding, are left aside: activations are rounded by the token's own
largest value here, at no loss.

What it is not: asymmetric weights (zero points), reordered columns, floats of 4 or 8 bits; each is
refused by name.

Sources: compressed-tensors 0.20 (pack_quantized), transformers 5.23 integrations/gemma_quant.py.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gemsmith.errors import ConfigError, WeightsError
from gemsmith.quant.formats import BITS, Format
from gemsmith.weights.names import Shape, is_tower, module_name

COMPRESSED, GEMMA = "compressed-tensors", "gemma"
WORD = 4
"""Bytes of a word of weight_packed."""
CODES = (".weight_packed", "_packed", ".embedding_quantized")
SCALES = {
    ".weight_packed": ".weight_scale",
    "_packed": "_scale",
    ".embedding_quantized": ".embedding_scale",
    ".weight": ".weight_scale",
}
ASIDE = re.compile(r"\.((in|out)put_activation_scale|[kv]_cache_scale)$")
SCALE_DTYPES = ("F32", "BF16", "F16")


class Header(Protocol):
    """What a file's header says of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


@dataclass(frozen=True, slots=True)
class LowBit:
    """Where the parts of one low-bit weight lie, by key."""

    format: Format
    shape: Shape
    codes: str
    scales: str
    stated_shape: str | None
    """The key of the int64 tensor that repeats the shape, where the layout has one."""


def read_section(folder: Path) -> dict[str, Any] | None:
    """quantization_config of a folder whose config.json was read before; None if there is none.

    Raises: as `check_section`.
    """
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = data.get("quantization_config")
    if section is not None:
        check_section(section)
    return section


def check_section(section: Any) -> None:
    """Refuse a quantization_config that asks for what is not read here.

    Raises:
      ConfigError: the method or its way of storing weights is unknown, named with the way out.
    """
    where = "config.json: quantization_config"
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(section).__name__}")
    method = section.get("quant_method")
    if method == GEMMA:
        return
    if method != COMPRESSED:
        raise ConfigError(
            f"{where}: quant_method {_short(method)} is not read; gemsmith reads {COMPRESSED} and "
            f"{GEMMA}, or quantizes the bfloat16 checkpoint itself (gemsmith quantize)"
        )
    groups = section.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        group = group if isinstance(group, dict) else {}
        weights = group.get("weights")
        weights = weights if isinstance(weights, dict) else {}
        wrong = [
            f"{key} {_short(weights.get(key, default))}"
            for key, default, good in (
                ("type", "int", ("int",)),
                ("num_bits", 8, BITS),
                ("symmetric", True, (True,)),
                ("strategy", "channel", ("channel", "group")),
                ("actorder", None, (None, "weight", "static")),
            )
            if not isinstance(weights.get(key, default), str | int | None)
            or weights.get(key, default) not in good
        ]
        if wrong:
            raise ConfigError(
                f"{where}: weights of {_short(name)} have {', '.join(wrong)}; read are symmetric "
                "integers of 2, 4 or 8 bits with a scale a row or a group"
            )


def _stepped(section: Mapping[str, Any] | None) -> frozenset[str]:
    """The modules whose scales a quantization_config, checked before, says to be steps."""
    groups = (section or {}).get("config_groups")
    names: set[str] = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        group = group if isinstance(group, dict) else {}
        weights, targets = group.get("weights"), group.get("targets")
        noted = weights.get("observer_kwargs") if isinstance(weights, dict) else None
        if isinstance(noted, dict) and noted.get("steps") is True and isinstance(targets, list):
            names.update(name for name in targets if isinstance(name, str))
    return frozenset(names)


def fold(
    found: Mapping[str, Header],
    expected: Mapping[str, Shape],
    section: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Shape], dict[str, LowBit]]:
    """Join the parts of each low-bit weight into the weight they stand for.

    `found` are a checkpoint's tensors by key, `expected` the shapes of the model's by name (the
    decoder's below its prefix, towers' below `model.`). Returns the shapes by key of a checkpoint
    as if it were of floats, for `names.match`, and the low-bit weights among these keys; `section`,
    of `read_section`, says whose scales are steps (none given: nobody's).

    Raises:
      WeightsError: codes without scales, or parts whose sizes are of no format; by name.
    """
    shapes = {key: tensor.shape for key, tensor in found.items() if not ASIDE.search(key)}
    low: dict[str, LowBit] = {}
    stepped = _stepped(section)
    for key, tensor in found.items():
        end = next((end for end in CODES if key.endswith(end)), None)
        if end is None and key.endswith(".weight") and tensor.dtype in ("U8", "I8"):
            end = ".weight"
        if end is None or key not in shapes:
            continue
        stem = key.removesuffix(end)
        weight = stem if end == "_packed" else f"{stem}.weight"
        shape, scales = expected.get(_name(weight)), stem + SCALES[end]
        if shape is None or (end == ".weight" and scales not in shapes):
            continue  # no weight of this model, or none of ours; named when all are accounted for
        stated = key.removesuffix("packed") + "shape" if end.endswith("packed") else None
        if scales not in shapes or (stated and stated not in shapes):
            absent = scales if scales not in shapes else stated
            raise WeightsError(f"{key} is there without {absent}; the export is incomplete")
        if weight != key and weight in found:
            raise WeightsError(f"{weight} is stored twice, as it is and as {key}; keep one")
        for part in (key, scales, stated):
            shapes.pop(part or "", None)
        format = _format(key, tensor, scales, found[scales], shape)
        if stem in stepped:
            format = format.stepped(shape[-1])
        shapes[weight] = shape
        low[weight] = LowBit(format, shape, key, scales, stated)
    return shapes, low


def codes_of(stored: Tensor, low: LowBit) -> Tensor:
    """The codes as stored -> uint8 [..., N, K * bits / 8] as in `Quantized`; a view if it can."""
    if stored.dtype == torch.int8:
        return stored.view(torch.uint8) ^ 128
    return stored.view(torch.uint8)[..., : low.shape[-1] * low.format.bits // 8]


def words(packed: Tensor) -> Tensor:
    """uint8 codes [..., N, bytes] -> int32 [..., N, words], each row filled up with zeros."""
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % WORD)).view(torch.int32)


def compressed_bytes(format: Format, shape: Shape) -> int:
    """Bytes that a weight takes in the compressed-tensors layout, all its parts together."""
    *rows, K = shape
    scales = format.groups(K) * (2 if format.group else 4)
    word_bytes = -(-K * format.bits // (8 * WORD)) * WORD
    return math.prod(rows) * (word_bytes + scales) + 8 * len(shape)


def compressed_section(formats: Mapping[str, Format], ignored: Iterable[str]) -> dict[str, Any]:
    """quantization_config of a compressed-tensors checkpoint, formats given by module name.

    Modules are listed one by one: a name says more surely than a pattern which is meant.
    """
    groups: dict[str, Any] = {}
    by_format: dict[Format, list[str]] = {}
    for name, format in formats.items():
        by_format.setdefault(format, []).append(name)
    for number, (format, names) in enumerate(by_format.items()):
        groups[f"group_{number}"] = {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": names,
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": format.group,
                "num_bits": format.bits,
                "observer": "mse",
                "observer_kwargs": {"steps": True} if format.steps else {},
                "strategy": "group" if format.group else "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "quant_method": COMPRESSED,
        "quantization_status": "compressed",
    }


def gemma_section(formats: Mapping[str, Format], ignored: Iterable[str]) -> dict[str, Any]:
    """quantization_config of a checkpoint in Google's mobile layout."""
    return {
        "quant_method": GEMMA,
        "num_bits": 8,
        "quantize_embeddings": True,
        "module_quant_configs": {
            rf"(^|\.){re.escape(name)}$": {"num_bits": format.bits}
            for name, format in formats.items()
            if format.bits != 8
        },
        "modules_to_not_convert": sorted(ignored),
    }


def _format(key: str, codes: Header, scales_key: str, scales: Header, shape: Shape) -> Format:
    """The format in which these are a weight of `shape`."""
    *rows, K = shape
    row_bytes = codes.shape[-1] * {"I32": WORD, "U8": 1, "I8": 1}.get(codes.dtype, 0)
    words = key.endswith("packed")
    kinds = ("I32",) if words else ("U8", "I8")
    for bits in BITS:
        exact = K * bits // 8
        wanted = exact + (-exact % WORD if words else 0)
        fits = words or (codes.dtype == "I8") == (bits == 8)
        if fits and K * bits % 8 == 0 and row_bytes == wanted:
            break
    else:
        bits = 0
    if not bits or codes.dtype not in kinds or list(codes.shape[:-1]) != rows:
        raise WeightsError(
            f"{key} is {codes.dtype} {list(codes.shape)}, which is not {list(shape)} in 2, 4 or 8 "
            "bits; config.json belongs to another model, or the file to another layout"
        )
    G = scales.shape[-1] if scales.shape else 0
    if scales.dtype not in SCALE_DTYPES or list(scales.shape[:-1]) != rows or not G or K % G:
        raise WeightsError(
            f"{scales_key} is {scales.dtype} {list(scales.shape)}; scales of {key} are "
            f"{', '.join(SCALE_DTYPES)} {[*rows, 'G']}, with G a divisor of {K}"
        )
    return Format(bits, None if G == 1 else K // G)


def _name(weight: str) -> str:
    return weight.removeprefix("model.") if is_tower(weight) else module_name(weight)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
