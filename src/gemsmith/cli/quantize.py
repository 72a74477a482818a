"""`gemsmith quantize`: a low-bit copy of a checkpoint, and what became of each kind of weight."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gemsmith.cli.console import write
from gemsmith.cli.info import size
from gemsmith.config import Gemma4Config
from gemsmith.errors import GemsmithError, RequestError, WeightsError
from gemsmith.evals.lines import read_lines
from gemsmith.text import chat
from gemsmith.text.template import ChatTemplate
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.weights.convert import UNREAD, Recipe, Row, left_as_floats, quantize_checkpoint
from gemsmith.weights.hub import POCKET, resolve
from gemsmith.weights.mixed import Choice
from gemsmith.weights.names import EMBEDDING, HEAD, PLE_TABLE

MAX_TOKENS = 32_768
"""Of calibration data: their hidden states, 352 MB in E2B and 700 MB in 31B, stay in memory."""
MAX_SEQUENCE = 2048
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
KINDS = (
    # What a name contains, and what such weights are called; the first that fits.
    (UNREAD, "not read"),
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
    matrices: int = 0
    calibrated: int = 0
    """How many of the matrices were chosen with data; a stack of experts has many."""

    @property
    def error(self) -> float:
        """Relative squared error; 0 of weights that stayed as they were."""
        wrong, whole = self.squares
        return wrong / whole if whole else 0.0


def run(
    source: str,
    target: str,
    *,
    bits: str,
    group: int | None,
    float_tables: bool,
    as_json: bool,
    data: str | None = None,
    budget: str | None = None,
) -> None:
    """Quantize, with progress on stderr, then report. data: see `read_tokens`; budget:
    `parse_bytes`.

    Raises:
      RequestError: the data cannot be read, or the budget is no size.
      WeightsError: a matrix stayed floats that was not meant to.
    """
    recipe = Recipe(bits, group, float_tables, parse_bytes(budget) if budget else None)
    folder = resolve(source)
    tokens = read_tokens(data, folder) if data else None
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

        rows = quantize_checkpoint(
            folder, target, recipe, tokens=tokens, begin=begin, advance=advance
        )
    kinds = summarize(rows)
    verdict = judge(target, recipe)
    if as_json:
        facts: dict[str, Any] = {"verdict": verdict, "weights": [_facts(kind) for kind in kinds]}
        if tokens is not None:
            facts["calibration_tokens"] = sum(map(len, tokens))
        if recipe.mixed:
            facts["budget"] = recipe.budget
            facts["choices"] = [_choice_facts(choice) for choice in choices(rows)]
        print(json.dumps(facts))
        return
    console = Console()
    if recipe.mixed:
        console.print(choice_table(choices(rows), calibrated=tokens is not None))
    console.print(table(kinds))
    if recipe.budget is not None:
        used = sum(row.nbytes for row in rows)
        console.print(
            f"{used:,} bytes of the {recipe.budget:,} there were.", markup=False, highlight=False
        )
    if tokens is not None:
        console.print(
            f"Calibrated on {sum(map(len, tokens)):,} tokens of {data}; what was not (tables, "
            "8 bits, experts that saw too few tokens, grids of training) was searched without.",
            markup=False,
            highlight=False,
            emoji=False,
        )
    write(console, f"{target}: {verdict}\n")


def parse_bytes(text: str, what: str = "budget") -> int:
    """3.2GB (GB = 10^9), 900MiB (MiB = 2^20), or a number of bytes. what: it is, in errors.

    Raises:
      RequestError: neither.
    """
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMG]I?B)?\s*", text.upper())
    size = int(Decimal(found[1]) * UNITS.get(found[2], 1)) if found else 0
    if size < 1:
        raise RequestError(
            f"{what} {text!r}: a size such as 3.2GB (GB = 10^9 bytes) or 900MiB (MiB = 2^20)"
        )
    return size


def read_tokens(path: str, folder: Path) -> list[list[int]]:
    """Token ids of the conversations of a JSONL file, as the checkpoint in `folder` writes them.

    A line is an object: `messages`, and perhaps `tools` and `enable_thinking`; other keys are left
    aside. A conversation counts up to its first MAX_SEQUENCE tokens; the file is read until there
    are MAX_TOKENS.

    Raises:
      RequestError: as `read_lines`, or a line is no conversation; by number.
    """
    tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
    text = Gemma4Config.load(folder).text_config
    variant = "edge" if text.hidden_size_per_layer_input else "large"
    encode = template.encode if template else partial(chat.encode, variant=variant)
    if path == POCKET and not Path(path).exists():
        # The only ones in the package are those that evaluations ask: they would flatter the build.
        raise RequestError(
            f"--data {path}: gemsmith brings no conversations to calibrate on; give a file, a line "
            f"of which is {EXAMPLE}"
        )
    tokens: list[list[int]] = []
    for where, data in read_lines(path, option="--data", kind=f"conversation, {EXAMPLE}"):
        ids = _encoded(encode, data, where, tokenizer)
        room = MAX_TOKENS - sum(map(len, tokens))
        tokens.append(ids[: min(room, MAX_SEQUENCE)])
        if room <= len(ids):
            break
    return tokens


def _encoded(
    encode: Callable[..., list[int]], data: Any, where: str, tokenizer: Tokenizer
) -> list[int]:
    if not isinstance(data, dict) or not isinstance(data.get("messages"), list):
        raise RequestError(f"{where}: no messages; a line is {EXAMPLE}")
    try:
        return encode(
            data["messages"],
            data.get("tools"),
            tokenizer,
            enable_thinking=bool(data.get("enable_thinking")),
            preserve_thinking=True,
            add_generation_prompt=False,
        )
    except GemsmithError as error:
        raise RequestError(f"{where}: {error}") from None


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
        entry.matrices += row.matrices
        entry.calibrated += row.calibrated
        entry.squares[0] += row.wrong
        entry.squares[1] += row.whole
    return list(kinds.values())


def choices(rows: Iterable[Row]) -> list[Choice]:
    """Each of a mixed recipe's decisions once, in the model's order."""
    return list({row.choice.unit: row.choice for row in rows if row.choice}.values())


def choice_table(chosen: Iterable[Choice], *, calibrated: bool) -> Table:
    out = _eighty_columns(["", "format", "", "harm", "bought", "next", "offered"])
    for each in chosen:
        names = [name.removesuffix(".weight").rpartition(".") for name in each.unit]
        parts = [names[0][0].removeprefix("layers."), *(n[2].removesuffix("_proj") for n in names)]
        out.add_row(
            " ".join(filter(None, parts)),
            str(each.option.format),
            size(each.option.nbytes),
            f"{each.option.harm:.1e}",
            "" if each.paid is None else f"{each.paid * (1 << 20):.1e}",
            "" if each.next is None else str(each.next.format),
            f"{each.offer * (1 << 20):.1e}" if each.next else "",
        )
    out.caption = (
        "harm: KL divergence that the format adds, in nats, measured on "
        + ("the data" if calibrated else "random tokens, for there is no data")
        + "; bought, offered: what the last step removed of it, and the next would, per MiB"
    )
    return out


def judge(target: str | Path, recipe: Recipe) -> str:
    """What the checkpoint may be called, from its files.

    Raises:
      WeightsError: it may not be called what was asked for; the matrices are named.
    """
    article, kind = ("an", "8-bit") if recipe.bits == "8" else ("a", f"{recipe.bits}-bit")
    name = f"{article} {recipe.bits if recipe.mobile or recipe.mixed else kind} checkpoint"
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
    kinds = list(kinds)
    data = any(kind.calibrated for kind in kinds)
    count = "calibrated" if data else "tensors"
    out = _eighty_columns(["", "format", count, "weights", "bits", "", "error"])
    weights = nbytes = 0
    for kind in kinds:
        error = f"{kind.error:.1e}" if kind.squares[1] else ""
        calibrated = f"{kind.calibrated:,}/{kind.matrices:,}" if kind.calibrated else ""
        weights, nbytes = weights + kind.weights, nbytes + kind.nbytes
        out.add_row(
            kind.kind,
            kind.format,
            calibrated if data else f"{kind.tensors:,}",
            f"{kind.weights:,}",
            f"{8 * kind.nbytes / kind.weights:.2f}",
            size(kind.nbytes),
            error,
        )
    out.add_section()
    out.add_row("all", "", "", f"{weights:,}", f"{8 * nbytes / weights:.2f}", size(nbytes), "")
    out.caption = "error: sum of squared differences over sum of squared weights"
    if any(kind.format.endswith("s") for kind in kinds):
        out.caption += "; formats that end in s: scales are multiples of a step, for fast products"
    return out


def _eighty_columns(columns: Iterable[str]) -> Table:
    """An empty table for which 80 columns do even with billions of weights: only names wrap."""
    out = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        justify, whole = ("right", True) if index > 1 else ("left", index > 0)
        out.add_column(column, justify=justify, no_wrap=whole, overflow="fold")
    return out


def _facts(kind: Kind) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "format": kind.format,
        "tensors": kind.tensors,
        "weights": kind.weights,
        "bytes": kind.nbytes,
        "relative_squared_error": kind.error,
        "matrices": kind.matrices,
        "calibrated": kind.calibrated,
    }


def _choice_facts(choice: Choice) -> dict[str, Any]:
    return {
        "weights": choice.unit,
        "format": str(choice.option.format),
        "bytes": choice.option.nbytes,
        "harm": choice.option.harm,
        "removed_per_byte": choice.paid,
        "next": choice.next and str(choice.next.format),
        "offered_per_byte": choice.offer,
    }
