"""`gemsmith choose --measure`: your tasks asked of the models here; score, seconds, memory."""

import json
from contextlib import nullcontext
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gemsmith import __version__
from gemsmith.cli.console import harmless, write
from gemsmith.errors import RequestError
from gemsmith.evals.measure import Candidate, Kept, Report, candidate, measure, read_tasks
from gemsmith.fit import gib

MAX_TOKENS = 32_768
MIB = 1 << 20


def run(path: str, models: list[str], *, max_tokens: int, as_json: bool) -> bool:
    """Ask, and print the table; False if a model could not be asked everything.

    Raises:
      RequestError: no models, no tasks, or a task that is none.
      HubError: a model is not here.
      KeyboardInterrupt: after Ctrl-C, once what is known is printed.
    """
    if not models:
        raise RequestError("--measure: name the models to ask: pocket, or folders of checkpoints")
    if not 1 <= max_tokens <= MAX_TOKENS:
        raise RequestError(f"max tokens {max_tokens}: must be from 1 to {MAX_TOKENS}")
    tasks = read_tasks(path)
    candidates = [candidate(name) for name in dict.fromkeys(models)]
    kept = Kept(path, max_tokens, __version__)
    asides = Console(stderr=True)
    before = sum(kept.get(each, task) is not None for each in candidates for task in tasks)
    if before:
        found = f"{before} of {len(candidates) * len(tasks)} answers are in {kept.path} already"
        write(asides, found + "\n")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=asides, transient=True)
    entry = bar.add_task("loading", total=len(candidates) * len(tasks))

    def advance(asked: Candidate, row: dict[str, Any]) -> None:
        bar.update(entry, advance=1, description=asked.label)

    with bar if asides.is_terminal else nullcontext():
        report = measure(tasks, candidates, kept, advance)
    if as_json:
        print(json.dumps(report.to_dict() | {"results": str(kept.path)}, ensure_ascii=False))
    else:
        show(report, Console())
        print(f"every answer is in {kept.path}; remove it to ask anew")
    if not report.complete:
        raise KeyboardInterrupt
    return not any(one.failure for one in report.measured)


def show(report: Report, console: Console) -> None:
    """Print the table: a row a model, * where no other is as good in everything."""
    whole = "" if report.complete else ", PARTIAL"
    title = f"{report.tasks} tasks{whole}"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("", overflow="fold")
    for column in ("right", "95 %", "seconds (95 %)", "first", "tok/s", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for facts in report.to_dict()["models"]:
        name = harmless(facts["model"]) + (" *" if facts["undominated"] else "")
        if not facts["asked"]:
            table.add_row(name, "-")
            continue
        low, high = facts["interval95"]
        span = facts["seconds_interval95"]
        peak = facts["peak_bytes"]
        table.add_row(
            name,
            f"{facts['correct']} of {facts['asked']}",
            f"{100 * low:.0f} - {100 * high:.0f} %",
            f"{facts['seconds']:.3g}" + (f" ({span[0]:.3g} - {span[1]:.3g})" if span else ""),
            f"{facts['first_token_s']:.3g}",
            f"{facts['tokens_per_s']:.3g}",
            "?" if peak is None else _size(peak),
        )
    console.print(table)
    console.print(
        "right: Wilson's interval. seconds of a whole reply and to its first token: medians, with "
        "an interval from 6 tasks on. memory: the process's peak, mapped files included. *: no "
        "other is as good in score, seconds and memory",
        style="dim", highlight=False,
    )  # fmt: skip
    for one in report.measured:
        if one.failure:
            text = f"{one.candidate.label}: asked {len(one.rows)} of {report.tasks}: {one.failure}"
            write(console, harmless(text) + "\n")


def _size(count: int) -> str:
    return gib(count) if count >= 1 << 30 else f"{count / MIB:.0f} MiB"
