"""`gemsmith quantize`: a low-bit copy of a checkpoint, and what became of each kind of weight."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gemsmith.cli.info import size
from gemsmith.errors import WeightsError
from gemsmith.weights.convert import Recipe, Row, left_as_floats, quantize_checkpoint
from gemsmith.weights.hub import resolve
from gemsmith.weights.names import EMBEDDING, HEAD, PLE_TABLE

KINDS = (
    # What a name contains, and what such weights are called; the first that fits.
    (EMBEDDING, "embedding"),
    (HEAD, "head"),
    (PLE_TABLE, "PLE table"),
    ("_tower.", "towers"),
    ("embed_vision.", "towers"),
    ("embed_audio.", "towers"),
    ("norm", "norms and scalars"),
    ("scal", "norms and scalars"),
    ("per_layer", "PLE projections"),
    ("router.", "router"),
    ("experts.", "experts"),
    (".mlp.", "MLP"),
    (".self_attn.", "attention"),
)


@dataclass(slots=True)
class Kind:
    """All weights of one kind in one format."""

    kind: str
    format: str
    tensors: int = 0
    weights: int = 0
    nbytes: int = 0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def error(self) -> float:
        """Relative squared error; 0 of weights that stayed as they were."""
        wrong, whole = self.squares
        return wrong / whole if whole else 0.0


def run(
    source: str, target: str, *, bits: str, group: int | None, float_tables: bool, as_json: bool
) -> None:
    """Quantize, with progress on stderr, then report.

    Raises:
      WeightsError: a matrix stayed floats that was not meant to.
    """
    recipe = Recipe(bits, group, float_tables)
    folder = resolve(source)
    columns = (
        TextColumn("{task.fields[name]}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
    )
    asides = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=asides, transient=True) as bar:
        task = bar.add_task("", total=None, name="reading")

        def begin(total: int, done: int) -> None:
            bar.update(task, total=total, completed=done)

        def advance(name: str, values: int) -> None:
            bar.update(task, advance=values, name=name)

        rows = quantize_checkpoint(folder, target, recipe, begin=begin, advance=advance)
    kinds = summarize(rows)
    verdict = judge(target, recipe)
    if as_json:
        print(json.dumps({"verdict": verdict, "weights": [_facts(kind) for kind in kinds]}))
        return
    console = Console()
    console.print(table(kinds))
    console.print(f"{target}: {verdict}", markup=False, highlight=False, soft_wrap=True)


def summarize(rows: Iterable[Row]) -> list[Kind]:
    """One line for each kind of weight and format, in the model's order."""
    kinds: dict[tuple[str, str], Kind] = {}
    for row in rows:
        kind = next((kind for part, kind in KINDS if part in row.name), "other")
        format = str(row.format or row.dtype)
        entry = kinds.setdefault((kind, format), Kind(kind, format))
        entry.tensors += 1
        entry.weights += row.weights
        entry.nbytes += row.nbytes
        entry.squares[0] += row.wrong
        entry.squares[1] += row.whole
    return list(kinds.values())


def judge(target: str | Path, recipe: Recipe) -> str:
    """What the checkpoint may be called, from its files.

    Raises:
      WeightsError: it may not be called what was asked for; the matrices are named.
    """
    article, kind = ("an", "8-bit") if recipe.bits == "8" else ("a", f"{recipe.bits}-bit")
    name = f"{article} {'mobile' if recipe.mobile else kind} checkpoint"
    left = left_as_floats(target)
    surprising = [key for key in left if not recipe.leaves(key)]
    if surprising:
        more = f" and {len(surprising) - 8} more" if len(surprising) > 8 else ""
        raise WeightsError(
            f"{target} is not {name}: {len(surprising)} matrices stayed floats: "
            f"{', '.join(surprising[:8])}{more}"
        )
    if recipe.float_tables:
        return f"not {name}: as asked, {' and '.join(left)} stayed floats; all else is"
    if left:
        return f"{name}; {', '.join(left)} stayed floats, as in Google's"
    return f"{name}; every matrix is in few bits, routers of experts apart"


def table(kinds: Iterable[Kind]) -> Table:
    out = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(("", "format", "tensors", "weights", "bits each", "", "error")):
        out.add_column(column, justify="right" if index > 1 else "left", no_wrap=True)
    weights = nbytes = 0
    for kind in kinds:
        error = f"{kind.error:.1e}" if kind.squares[1] else ""
        weights, nbytes = weights + kind.weights, nbytes + kind.nbytes
        out.add_row(
            kind.kind,
            kind.format,
            f"{kind.tensors:,}",
            f"{kind.weights:,}",
            f"{8 * kind.nbytes / kind.weights:.2f}",
            size(kind.nbytes),
            error,
        )
    out.add_section()
    out.add_row("all", "", "", f"{weights:,}", f"{8 * nbytes / weights:.2f}", size(nbytes), "")
    out.caption = "error: sum of squared differences over sum of squared weights"
    return out


def _facts(kind: Kind) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "format": kind.format,
        "tensors": kind.tensors,
        "weights": kind.weights,
        "bytes": kind.nbytes,
        "relative_squared_error": kind.error,
    }
