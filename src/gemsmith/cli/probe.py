"""`gemsmith probe`: does an OpenAI-compatible endpoint keep its word? A table, or JSON."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from gemsmith.cli.console import harmless, write
from gemsmith.errors import RequestError
from gemsmith.evals.conformance import GROUPS, Outcome, Probe, Report, run, select
from gemsmith.evals.endpoint import Endpoint, read_key

MAX_TIMEOUT_S = 3600
STYLES = {"pass": "green", "fail": "bold red", "skip": "dim"}


def ask(
    url: str,
    *,
    only: Sequence[str],
    model: str | None,
    api_key_file: Path | None,
    timeout_s: float,
    every: bool,
    as_json: bool,
) -> bool:
    """Probe, and print what was found; False if a probe failed.

    Raises:
      RequestError: nothing answers there, or bad options. OSError: no such file of keys.
      KeyboardInterrupt: after Ctrl-C, once what is known is printed.
    """
    if not 1 <= timeout_s <= MAX_TIMEOUT_S:
        raise RequestError(f"--timeout {timeout_s:g}: must be from 1 to {MAX_TIMEOUT_S} seconds")
    probes = select(only)
    key = read_key(api_key_file) if api_key_file else None
    with Endpoint(url, key=key, model=model, timeout_s=timeout_s) as endpoint:
        report = watched(endpoint, probes)
    if as_json:
        print(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        show(report, Console(), every=every)
    if not report.complete:
        raise KeyboardInterrupt
    return not report.count("fail")


def watched(endpoint: Endpoint, probes: Sequence[Probe]) -> Report:
    """Connect and `run`, with a bar on stderr where that is a terminal; raises as `connect`."""
    endpoint.connect()
    asides = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    bar = Progress(*columns, console=asides, transient=True)
    entry = bar.add_task("probing", total=len(probes))

    def advance(outcome: Outcome) -> None:
        bar.update(entry, advance=1, description=outcome.group)

    with bar if asides.is_terminal else nullcontext():
        return run(endpoint, probes, advance)


def show(report: Report, console: Console, *, every: bool = False) -> None:
    """Print counts by group; then what failed with its bytes, and what was skipped and why.

    every: name what passed, too.
    """
    whole = "" if report.complete else ", PARTIAL"
    title = harmless(f"{report.model} at {report.url}{whole}")
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for status in STYLES:
        table.add_column(status, justify="right")
    table.add_column("")
    for group, what in GROUPS.items():
        found = [each.status for each in report.outcomes if each.group == group]
        if found:
            counts = {status: found.count(status) for status in STYLES}
            shown = [f"[{STYLES[s]}]{n}[/]" if n else "" for s, n in counts.items()]
            table.add_row(group, *shown, what)
    console.print(table)
    for one in report.outcomes:
        if one.status == "pass" and not every:
            continue
        reason = f": {one.reason}" if one.reason else ""
        _line(console, one.status, STYLES[one.status], end=" ")
        _line(console, f"{one.group} {one.name}{reason}")
        if one.status == "fail":
            _line(console, f"     should hold: {one.what}")
            _line(console, f"     sent: {one.request or '(no body)'}", "dim")
            _line(console, f"     came: {one.evidence or '(nothing)'}", "dim")
    counts = {status: report.count(status) for status in STYLES}
    console.print(
        f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped",
        highlight=False, style="bold red" if counts["fail"] else "bold",
    )  # fmt: skip


def _line(console: Console, text: str, style: str | None = None, end: str = "\n") -> None:
    write(console, harmless(text.replace("\n", "\\n")) + end, style)
