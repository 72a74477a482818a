"""The mixed recipe: which weight gets which bits, so that a budget of bytes does the least harm.

Each unit (weights that share their inputs get one format, as readers that join them need it) has a
few formats to choose from. What one costs is its bytes in the file; what it harms is

    harm = sensitivity of the unit * relative squared error of the format on the unit's weights

in nats of KL divergence of the whole model, see sensitivity.py; errors of independent roundings
add up. The error is that of the rounding itself, on SAMPLED_ROWS rows of each weight: a grid that
the weights were trained on is found, and harms nothing.

Then, as for a knapsack: all units begin with their smallest format; the steps along each unit's
lower convex hull of (bytes, harm) are taken by harm removed per byte, the best first; one that no
longer fits ends its unit, and cheaper ones of others go on. Without the last unit's remainder this
is the optimum for the bytes it takes. Equal steps go by the model's order: nothing is by chance.

What was measured is kept in the target folder, so that a run taken up again chooses the same, and
as a record of why.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gemsmith.config import Gemma4Config, TextConfig
from gemsmith.errors import ConfigError
from gemsmith.quant.formats import Format
from gemsmith.quant.quantize import quantize, squares
from gemsmith.weights.layouts import compressed_bytes
from gemsmith.weights.recipe import Recipe
from gemsmith.weights.rounding import settled
from gemsmith.weights.save import replace_file, to_json
from gemsmith.weights.sensitivity import Unit, probe_tokens, sensitivities
from gemsmith.weights.streaming import STAGES
from gemsmith.weights.tensors import StoredTensor, read_rows

SAMPLED_ROWS = 128
MEASURED = "sensitivity.json"
VERSION = 2
MAX_MEASURED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Option:
    """A format that a unit may get."""

    format: Format
    nbytes: int
    harm: float
    """Nats of KL divergence."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a unit got, and why."""

    unit: Unit
    option: Option
    paid: float | None
    """Nats that the last step removed per byte; None: it has the smallest format."""
    next: Option | None
    """The step that was not taken; None: there is no better format."""

    @property
    def offer(self) -> float:
        """Nats per byte that the next step would have removed; 0 if there is none."""
        if self.next is None:
            return 0.0
        return (self.option.harm - self.next.harm) / (self.next.nbytes - self.option.nbytes)


def choose(units: Sequence[tuple[Unit, Sequence[Option]]], budget: int) -> list[Choice]:
    """The option of each unit: within `budget` bytes together, with as little harm as can be.

    Raises:
      ConfigError: the smallest options together are larger.
    """
    hulls = [hull(options) for _, options in units]
    least = sum(path[0].nbytes for path in hulls)
    if least > budget:
        raise ConfigError(f"a budget of {budget:,} bytes: the smallest is {least:,}")
    steps = [
        (-(low.harm - high.harm) / (high.nbytes - low.nbytes), at, place)
        for at, path in enumerate(hulls)
        for place, (low, high) in enumerate(pairwise(path))
    ]
    place = [0] * len(hulls)
    paid: list[float | None] = [None] * len(hulls)
    left = budget - least
    for price, at, start in sorted(steps):
        path = hulls[at]
        cost = path[start + 1].nbytes - path[start].nbytes
        if place[at] == start and cost <= left:
            place[at], paid[at], left = start + 1, -price, left - cost
    return [
        Choice(unit, path[p], paid[at], path[p + 1] if p + 1 < len(path) else None)
        for at, ((unit, _), path, p) in enumerate(zip(units, hulls, place, strict=True))
    ]


def hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull, smallest first: each step removes less harm per byte than the last."""
    path: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.harm)):
        if path and (option.harm >= path[-1].harm or option.nbytes == path[-1].nbytes):
            continue
        while len(path) > 1 and _slope(path[-2], option) >= _slope(path[-2], path[-1]):
            path.pop()
        path.append(option)
    return path


def _slope(low: Option, high: Option) -> float:
    return (low.harm - high.harm) / (high.nbytes - low.nbytes)


def units_of(text: TextConfig, names: Mapping[str, object]) -> list[Unit]:
    """The weights decided on, in the model's order; those with the same inputs together."""
    joined = {
        f"layers.{plan.index}.{path}.weight": f"layers.{plan.index}.{stage[0]}"
        for plan in text.layers
        for stage in STAGES
        for path in stage
    }
    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(joined.get(name, name), []).append(name)
    return [tuple(unit) for unit in units.values()]


def fit(
    recipe: Recipe,
    config: Gemma4Config,
    weights: dict[str, StoredTensor],
    fixed: int,
    target: Path,
    tokens: Sequence[Sequence[int]] | None,
    advance: Callable[[str], None],
) -> tuple[Recipe, list[Choice]]:
    """The recipe with its formats chosen, and why.

    weights: where each of the decoder's lies. fixed: bytes of all tensors that are not decided on.

    Raises:
      ConfigError: the budget cannot be reached; it names the smallest that can.
      WeightsError: the source is damaged, or the target cannot be written.
    """
    candidates = recipe.candidates(config)
    units = units_of(config.text_config, candidates)
    # Whether it can be done at all is known before hours are spent.
    sizes = {unit: _sizes(unit, candidates, weights) for unit in units}
    least = fixed + sum(min(sizes[unit].values()) for unit in units)
    if least > (recipe.budget or 0):
        raise ConfigError(
            f"a budget of {recipe.budget:,} bytes: the smallest that this model can be made is "
            f"{least:,} ({least / 1e9:.2f} GB); nothing is below 2 bits, nor PLE and towers below "
            "what they need"
        )
    measured = _measured(config, weights, units, candidates, target, tokens, advance)
    options = [
        (unit, [Option(f, n, measured[unit[0]][str(f)]) for f, n in sizes[unit].items()])
        for unit in units
    ]
    choices = choose(options, (recipe.budget or 0) - fixed)
    chosen = tuple((name, each.option.format) for each in choices for name in each.unit)
    return replace(recipe, chosen=chosen), choices


def common_formats(unit: Unit, candidates: dict[str, tuple[Format, ...]]) -> list[Format]:
    """Those that all weights of the unit may get."""
    return [f for f in candidates[unit[0]] if all(f in candidates[name] for name in unit)]


def _sizes(
    unit: Unit, candidates: dict[str, tuple[Format, ...]], weights: dict[str, StoredTensor]
) -> dict[Format, int]:
    """Bytes of the unit in each format that all its weights may get."""
    return {
        f: sum(compressed_bytes(f, weights[name].shape) for name in unit)
        for f in common_formats(unit, candidates)
    }


def _measured(
    config: Gemma4Config,
    weights: dict[str, StoredTensor],
    units: list[Unit],
    candidates: dict[str, tuple[Format, ...]],
    target: Path,
    tokens: Sequence[Sequence[int]] | None,
    advance: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Harm of each format, by the unit's first name; read from the target if it is there."""
    text = config.text_config
    ids = probe_tokens(text, tokens)
    plan = _fingerprint(weights, units, candidates, ids)
    path = target / MEASURED
    found = _read(path, plan)
    if found is not None:
        return found
    sensitive = sensitivities(text, weights, units, ids, advance)
    harm: dict[str, dict[str, float]] = {}
    for unit, nats in zip(units, sensitive, strict=True):
        advance(unit[0])
        harm[unit[0]] = {
            str(format): nats
            * sum(rounding_error(name, weights[name], format) for name in unit)
            / len(unit)
            for format in _sizes(unit, candidates, weights)
        }
    target.mkdir(parents=True, exist_ok=True)
    record = {"plan": plan, "data": tokens is not None, "digest": _digest(harm), "nats": harm}
    replace_file(target, MEASURED, to_json(record))
    return harm


def rounding_error(name: str, stored: StoredTensor, format: Format) -> float:
    """Relative squared error of rounding without data, on SAMPLED_ROWS rows spread evenly.

    Raises:
      WeightsError: a weight is infinite or not a number, or the file is cut short.
    """
    format, grid = settled(name, stored, format)
    rows = math.prod(stored.shape[:-1])
    wrong = whole = 0.0
    for sample_NK in _sample(stored, -(-rows // SAMPLED_ROWS)):
        part = squares(sample_NK, quantize(sample_NK, format, grid=grid))
        wrong, whole = wrong + part[0], whole + part[1]
    return wrong / whole if whole else 0.0


def _sample(stored: StoredTensor, every: int) -> Iterator[torch.Tensor]:
    if every == 1:
        yield from read_rows(stored)
    else:
        yield torch.cat([*read_rows(stored, every)])


def _fingerprint(
    weights: dict[str, StoredTensor],
    units: list[Unit],
    candidates: dict[str, tuple[Format, ...]],
    ids: list[list[int]],
) -> str:
    files = {tensor.file for tensor in weights.values()}
    facts = [
        VERSION,
        units,
        [[name, *map(str, formats)] for name, formats in candidates.items()],
        ids,
        sorted([str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files),
    ]
    return _digest(facts)


def _read(path: Path, plan: str) -> dict[str, dict[str, float]] | None:
    """What an earlier call measured for the same plan; None if there is none, or it is damaged."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(MAX_MEASURED_BYTES))
        if record["plan"] != plan:
            return None
        whole = record["digest"] == _digest(record["nats"])
        return record["nats"] if whole else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
