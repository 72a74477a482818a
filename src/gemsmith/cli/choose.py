"""`gemsmith choose`: which Gemma 4 for a job on a machine, with reasons; or by asking your tasks.

The rules are in gemsmith/choose.py, the asking in evals/measure.py. Without --measure no torch is
imported.
"""

import json
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gemsmith import fit
from gemsmith.choose import BENCHMARKS, Decision, Needs, decide, to_dict, verdict
from gemsmith.cli.console import write
from gemsmith.cli.fit import FREE_SCALES, target_of
from gemsmith.errors import ConfigError
from gemsmith.fit import gib


def run(
    asked: dict[str, Any],
    *,
    quality: list[str],
    device: str,
    memory: str | None,
    as_json: bool,
) -> bool:
    """Decide and print; False if no size will do. asked: fields of `Needs`.

    Raises:
      ConfigError: a need or a machine that cannot be meant.
    """
    asked = asked | {"context": fit.tokens_of(asked["context"])}
    needs = Needs(**asked)
    needs = Needs(**asked, floors=floors(quality, needs.benchmarks[0]))
    decision = decide(needs, target_of(device, memory))
    if as_json:
        print(json.dumps(to_dict(decision), ensure_ascii=False))
    else:
        show(decision, Console())
    return decision.choice is not None


def floors(quality: list[str], leading: str) -> dict[str, float] | None:
    """`NAME=SCORE` each, or a score alone for the leading benchmark of the job."""
    found: dict[str, float] = {}
    for text in quality:
        name, equals, value = text.partition("=")
        name, value = (name.strip(), value) if equals else (leading, text)
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(
                f"quality {text[:60]!r}: give a score such as 70, or a name with it such as tau2=60"
            ) from None
    return found or None


def show(decision: Decision, console: Console) -> None:
    """Print the decision, its reasons, what would change it, and every size beside."""

    def line(text: str, style: str | None = None) -> None:
        write(console, text + "\n", style)

    choice, runner_up = decision.choice, decision.runner_up
    line(f"on {decision.machine.name}: {gib(decision.machine.memory)} to use")
    if choice is None:
        line("no size of Gemma 4 will do. What comes closest:", "bold")
        for option in decision.closest:
            line(f"  {option}")
            for what in option.missing:
                line(f"    {what}")
    else:
        line(f"{choice}  (google/gemma-4-{choice.size}-it)", "bold")
        for reason in decision.reasons():
            line(f"  {reason}")
        line(f"runner-up: {runner_up}" if runner_up else "there is no runner-up")
    if decision.changes:
        line("what would change the answer:")
        for change in decision.changes:
            line(f"  {change.what}: {change.then}")
    console.print(_table(decision))
    sources = dict.fromkeys(
        BENCHMARKS[name].source(option.size)
        for name in decision.needs.benchmarks
        for option in decision.options
        if option.size in BENCHMARKS[name].scores
    )
    line(f"scores: {'; '.join(sources)}", "dim")
    if decision.machine.place == "cpu" and any(o.format == "int4" for o in decision.options):
        line(FREE_SCALES, "dim")
    if guess := next((option.guess for option in decision.options if option.guess), None):
        line(f"~ a guess: {guess}", "dim")


def _table(decision: Decision) -> Table:
    table = Table(box=SIMPLE_HEAD)
    names = decision.needs.benchmarks
    table.add_column("")
    for column in ("K/V", "memory", "tok/s", *(BENCHMARKS[name].title for name in names)):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for option in decision.options:
        scores = (BENCHMARKS[name].scores.get(option.size) for name in names)
        table.add_row(
            f"{option.size} {option.format}",
            option.kv,
            gib(option.memory_bytes),
            "?" if option.speed is None else f"{'~' if option.guess else ''}{option.speed:.3g}",
            *("not known" if score is None else f"{score:g}" for score in scores),
            verdict(decision, option),
        )
    return table
