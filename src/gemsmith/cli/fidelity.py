"""`gemsmith eval fidelity`: one build of a model judged by another; tables, a chart, a gate."""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gemsmith import __version__
from gemsmith.cli.console import write
from gemsmith.cli.plot import drawable
from gemsmith.engine.engine import LM
from gemsmith.errors import RequestError
from gemsmith.evals import fidelity
from gemsmith.evals.cases import pocket_cases, read_cases
from gemsmith.evals.divergence import TOP, Divergence
from gemsmith.evals.fidelity import Gate, Outcome, Pairs, Report
from gemsmith.weights.hub import FIDELITY, POCKET

FEW = 30
"""Texts below which a category's figures are hardly more than an anecdote."""


def run(
    names: tuple[str, str],
    loading: tuple[dict[str, Any], dict[str, Any]],
    *,
    data: str | None,
    limit: int | None,
    bounds: dict[str, float | None],
    plot: str | None,
    save: bool,
    as_json: bool,
) -> bool:
    """Compare build names[1] with reference names[0] and report; False if a bound is broken.

    loading: options of `LM.load` for each of the two. Everything that can be refused is, before
    the comparison begins.

    Raises:
      RequestError: see `fidelity.compare`; nowhere to save, or nothing to draw with.
      HubError, ConfigError, WeightsError, TokenizerError: a build cannot be loaded.
    """
    gate = Gate(**bounds)
    folder = _writable(names[1]) if save else None
    target = drawable(plot) if plot else None
    # A build is a checkpoint and how it is loaded: the same folder twice, loaded otherwise, is two.
    a, b = (LM.load(name, **how) for name, how in zip(names, loading, strict=True))
    fidelity.check_builds(a, b)
    if data is None:
        cases, source = pocket_cases(a, b, limit), "pocket's held-out items"
    else:
        cases, source = read_cases(data, limit), Path(data).name
    gate.check(cases)
    asides = Console(stderr=True)
    with _progress(asides, len(cases)) as advance:
        report = fidelity.compare(a, b, cases, data=source, on_case=advance)
    facts = report.to_dict()
    broken = gate.broken(report) if report.complete else []
    if any(bound is not None for bound in bounds.values()) and report.complete:
        facts["gate"] = {"bounds": bounds, "broken": broken}
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        show(report, Console())
    if report.outcomes and target is not None:
        draw(facts, target)
    if not report.complete:
        if folder is not None:
            asides.print(f"{FIDELITY} is not written: the report is partial", highlight=False)
        raise KeyboardInterrupt
    if folder is not None:
        _write(facts, folder)
    if broken:
        print(f"fidelity: {'; '.join(broken)}", file=sys.stderr)
    return not broken


def _writable(name: str) -> Path:
    folder = Path(name)
    if name == POCKET or not folder.is_dir():
        raise RequestError(
            f"--save writes {FIDELITY} into the folder of B, and {name!r} is no local folder; use "
            "--json to keep the report elsewhere"
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(
            f"--save: {folder} cannot be written to ({error.strerror}); use --json to keep the "
            "report elsewhere"
        ) from None
    return folder


def _write(facts: dict[str, Any], folder: Path) -> None:
    """All of the report or none of it; of local folders the last name only, not where they lie."""
    shared = {"gemsmith": __version__, **facts}
    for key in ("reference", "build"):
        if Path(facts[key]).is_dir():
            shared[key] = Path(facts[key]).resolve().name
    part = folder / (FIDELITY + ".part")
    part.write_text(json.dumps(shared, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, folder / FIDELITY)


@contextmanager
def _progress(console: Console, cases: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal, with the figures so far; gives what to call after each case."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("reading", total=cases)
    positions, same, kl = 0, 0, 0.0

    def advance(outcome: Outcome) -> None:
        nonlocal positions, same, kl
        positions += len(outcome.reply)
        same += int(outcome.reply.same.sum())
        kl += float(outcome.reply.kl.sum())
        text = f"top-1 {same / positions:.2%}, KL {kl / positions:.2g}"
        bar.update(task, advance=1, description=text)

    with bar if console.is_terminal else nullcontext():
        yield advance


# -- tables -----------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Print the tables of a report, the verdict first."""
    count = len(report.outcomes)
    whole = "" if report.complete else f", PARTIAL: stopped after {count}"
    line = f"{report.build} beside {report.reference}, {report.data}: {count} conversations{whole}"
    write(console, line + "\n", style="bold")
    replies = report.replies()
    if replies is None:
        console.print("nothing was compared", highlight=False)
        return
    if replies.identical:
        text = f"no difference at any of {replies.positions:,} reply positions: KL 0, top-1 100 %"
        console.print(text, highlight=False)
    rows: list[tuple[str, Divergence]] = []
    for category in report.categories:
        if (found := report.replies(category)) is not None:
            rows.append((category, found))
    last = [("all replies", replies)]
    if (prompts := report.prompts()) is not None:
        last.append(("all prompts", prompts))
    _table(
        console,
        "agreement on the likeliest token",
        ("", "positions", "top-1", "95 % interval", f"in top {TOP}"),
        rows,
        last,
        lambda d: (
            f"{d.positions:,}",
            f"{d.top1:.2%}",
            f"{d.top1_interval[0]:.2%} - {d.top1_interval[1]:.2%}",
            f"{d.in_top:.2%}",
        ),
    )
    _table(
        console,
        "KL divergence, nats (±: standard error)",
        ("", "mean", "±", "median", "90 %", "99 %", "99.9 %", "max"),
        rows,
        last,
        lambda d: (
            _small(d.kl.value),
            "" if d.kl.error is None else _small(d.kl.error),
            *map(_small, (d.kl_median, d.kl_90, d.kl_99, d.kl_999, d.kl_max)),
        ),
    )
    _table(
        console,
        "the token that stands there: change of its probability, and perplexity",
        ("", "RMS", "A", "B", "B / A", "95 % interval"),
        rows,
        last,
        lambda d: (
            f"{d.rms_change:.3%}",
            f"{d.perplexity_p:#.4g}",
            f"{d.perplexity_q:#.4g}",
            f"{d.ratio:.5f}",
            ""
            if d.ratio_interval is None
            else f"{d.ratio_interval[0]:.5f} - {d.ratio_interval[1]:.5f}",
        ),
    )
    _show_tools(report, console)
    few = [category for category, found in rows if found.texts < FEW]
    if few:
        text = f"fewer than {FEW} conversations, so hardly more than a hint: {', '.join(few)}"
        write(console, text + "\n")


def _show_tools(report: Report, console: Console) -> None:
    every = report.tools()
    if every is None:
        console.print("no conversation declares tools: calls were not compared", highlight=False)
        return
    table = _new("tool calls, greedy", ("", "of", "A", "B", "points", "lost", "gained", "p"))

    def add(name: str, pairs: Pairs) -> None:
        figures = (pairs.count, pairs.a, pairs.b, f"{pairs.points:+.1f}", pairs.lost, pairs.gained)
        table.add_row(name, *map(str, figures), f"{pairs.p_value:.2g}")

    scored = [(c, s) for c in report.categories if (s := report.tools(c)) is not None]
    for name, score in [*((escape(c), s) for c, s in scored), ("all", every)]:
        if score is every:
            table.add_section()
        add(f"{name}: valid", score.valid)
        if score.right.count:
            add(f"{name}: right", score.right)
    console.print(table)
    text = f"the same reply, token by token: {every.same} of {every.valid.count}"
    console.print(text, highlight=False)


def _table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Divergence]],
    last: Sequence[tuple[str, Divergence]],
    cells: Callable[[Divergence], Sequence[str]],
) -> None:
    table = _new(title, columns)
    for name, found in rows:
        table.add_row(escape(name), *cells(found))
    table.add_section()
    for name, found in last:
        table.add_row(name, *cells(found))
    console.print(table)


def _new(title: str, columns: Sequence[str]) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "padding": 0}
    table = Table(box=SIMPLE_HEAD, title=title, **look)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    return table


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 1e-4 else f"{value:.4f}"


# -- a chart ----------------------------------------------------------------------------------


def draw(facts: dict[str, Any], path: Path) -> None:
    """Save top-1 agreement and KL of each category, from what `Report.to_dict` gives."""
    from matplotlib.figure import Figure

    replies, prompts = facts["replies"], facts["prompts"]
    found = [*replies["categories"].items(), ("all replies", replies["all"])]
    if prompts:
        found.append(("all prompts", prompts["all"]))
    names = [name for name, _ in found]
    scores = [score for _, score in found]
    places = range(len(found))
    figure = Figure(figsize=(10, 1.6 + 0.32 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    partial = "" if facts["complete"] else " (partial)"
    figure.suptitle(f"{facts['build']} beside {facts['reference']}{partial}", parse_math=False)

    shares = [100 * score["top1"] for score in scores]
    ends = [[100 * end for end in score["top1_interval95"]] for score in scores]
    left.hlines(places, *zip(*ends, strict=True), color="tab:blue", alpha=0.4, linewidth=4)
    left.plot(shares, places, "o", color="tab:blue")
    for place, share in zip(places, shares, strict=True):
        left.annotate(f"{share:.2f}", (share, place), (0, 6), textcoords="offset points",
                      ha="center", fontsize="x-small")  # fmt: skip
    left.set(xlabel="same likeliest token, % (bar: 95 % interval)")
    left.margins(x=0.08)
    left.set_yticks(places, names, parse_math=False)
    left.invert_yaxis()

    kls = [score["kl"] for score in scores]
    positive = [v for kl in kls for v in (kl["mean"], kl["median"], kl["p99"]) if v > 0]
    right.hlines(
        places, [kl["median"] for kl in kls], [kl["p99"] for kl in kls],
        color="tab:orange", alpha=0.4, linewidth=4,
    )  # fmt: skip
    right.plot([kl["mean"] for kl in kls], places, "o", color="tab:orange")
    if positive:
        right.set_xscale("symlog", linthresh=10.0 ** max(-9, math.floor(math.log10(min(positive)))))
    right.set(xlabel="KL divergence, nats: mean (bar: median to 99 %)", xlim=(0, None))
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.06)
    figure.savefig(path, dpi=120)
