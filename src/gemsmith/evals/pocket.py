"""The held-out test of the embedded model: it is asked, and what it can do is counted.

Text: tool calls, answers, JSON, and when no tool fits. Pictures: what they show, how many, where,
and what they say, the last at every budget of soft tokens. Speech: transcripts, spoken commands,
and one reading of four minutes. The model answers greedily, its calls held to their schemas as they
are for everyone; a reply is right or wrong, nothing between (scoring.py says when), and words are
counted beside. A model without eyes or ears is not asked what it cannot take, and the report says
so.

Not a general benchmark: items come from the same generator as the training data, with names,
values, schemas, texts and voices that training never met.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from typing import Any, Protocol, cast

from rich.console import Console
from rich.table import Table

from gemsmith.errors import GemsmithError
from gemsmith.evals.items import Item
from gemsmith.evals.scoring import (
    MAX_TOKENS,
    Reply,
    WordErrors,
    border_errors,
    judge,
    wilson,
    word_errors,
)

TARGETS = {
    "tool_seen_domain": 0.95,
    "tool_unseen_schema": 0.80,
    "no_tool": 0.90,
    "thinking_arithmetic": 0.90,
    "needle_4x": 0.90,
    "picture_shape": 0.95,
    "picture_box": 0.90,
    "picture_read_1120": 0.90,
    "speech_call": 0.85,
    "speech_reading": 1.0,
}
"""Right replies of all, at least."""
WORD_TARGETS = {"speech": 0.10}
"""Word errors of all words, at most; `speech` is all transcripts of clips together."""
READ = "picture_read_"
"""Begins the categories of texts to read; the soft tokens that the picture has come after it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    item: Item
    reply: Reply
    wrong: str | None
    """Why the reply is wrong; None if it is right."""


@dataclass(frozen=True, slots=True)
class Score:
    """Right replies of one category."""

    count: int
    correct: int

    @property
    def rate(self) -> float:
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.correct, self.count)


@dataclass(slots=True)
class Report:
    """Outcomes so far; `complete` is False after Ctrl-C."""

    outcomes: list[Outcome] = field(default_factory=list)
    complete: bool = False
    left_out: dict[str, int] = field(default_factory=dict)
    """Items that this model has no tower for, by medium."""

    def scores(self) -> dict[str, Score]:
        """By category: those with a target first, then the others by name."""
        counts = Counter(o.item.category for o in self.outcomes)
        right = Counter(o.item.category for o in self.outcomes if o.wrong is None)
        order = [c for c in TARGETS if c in counts] + sorted(set(counts) - set(TARGETS))
        return {name: Score(counts[name], right[name]) for name in order}

    def curve(self) -> dict[int, Score]:
        """Texts read exactly, by the soft tokens that each picture may have."""
        budgets = {
            int(name.removeprefix(READ)): score
            for name, score in self.scores().items()
            if name.startswith(READ)
        }
        return dict(sorted(budgets.items()))

    def word_errors(self) -> dict[str, WordErrors]:
        """By category of transcripts, of all clips together, and of the reading and its borders."""
        counted: dict[str, WordErrors] = {}

        def add(name: str, errors: WordErrors) -> None:
            counted[name] = counted.get(name, WordErrors(0, 0)) + errors

        for outcome in self.outcomes:
            item, reply = outcome.item, outcome.reply
            kind, said = item.expected["type"], item.expected.get("value", "")
            if kind == "transcript":
                add(item.category, word_errors(said, reply.text))
                add("speech", word_errors(said, reply.text))
            elif kind == "reading":
                add(item.category, word_errors(said, reply.text))
                add(f"{item.category}_borders", border_errors(said, reply.segments))
        return {name: score for name, score in sorted(counted.items()) if score.count}

    def failures(self, most: int) -> list[Outcome]:
        """The first `most` wrong outcomes, by item id, so that two runs show the same ones."""
        wrong = (o for o in self.outcomes if o.wrong is not None)
        return sorted(wrong, key=lambda o: o.item.id)[:most]

    def to_dict(self) -> dict[str, Any]:
        """For programs: what `show` shows, unrounded counts and rates to four digits."""
        categories: dict[str, Any] = {}
        for name, score in self.scores().items():
            low, high = score.interval
            categories[name] = {
                "count": score.count,
                "correct": score.correct,
                "rate": round(score.rate, 4),
                "interval95": [round(low, 4), round(high, 4)],
                "target": TARGETS.get(name),
                "met": score.rate >= TARGETS[name] if name in TARGETS else None,
            }
        words: dict[str, Any] = {}
        for name, errors in self.word_errors().items():
            words[name] = {
                "count": errors.count,
                "errors": errors.errors,
                "rate": round(errors.rate, 4),
                "target": WORD_TARGETS.get(name),
                "met": errors.rate <= WORD_TARGETS[name] if name in WORD_TARGETS else None,
            }
        return {
            "name": "pocket",
            "complete": self.complete,
            "categories": categories,
            "words": words,
            "read_by_budget": {budget: round(s.rate, 4) for budget, s in self.curve().items()},
            "left_out": self.left_out,
        }


class LanguageModel(Protocol):
    """What `gemsmith.load` returns, as far as it is used here."""

    def generate(self, prompt: Any, /, **options: Any) -> Any: ...


# -- asking -----------------------------------------------------------------------------------


def ask(lm: LanguageModel, item: Item) -> Reply:
    """The model's greedy reply. An error that the engine raises on purpose is a wrong reply."""
    try:
        if item.expected["type"] == "reading":
            return _listen(lm, item)
        made = greedy(lm, item.messages, item.tools, item.enable_thinking, MAX_TOKENS)
    except GemsmithError as error:
        return Reply(problems=(f"{type(error).__name__}: {error}",), finish_reason="error")
    return reply_of(made)


def greedy(
    lm: LanguageModel,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    thinking: bool,
    max_tokens: int,
    **options: Any,
) -> Any:
    """The engine's Generation, of the likeliest token at each step."""
    return lm.generate(
        messages,
        tools=tools,
        enable_thinking=thinking,
        temperature=0.0,
        max_tokens=max_tokens,
        **options,
    )


def reply_of(made: Any) -> Reply:
    """What scoring needs of an `engine` Generation."""
    return Reply(
        text=made.text,
        calls=tuple((call.name, call.arguments) for call in made.tool_calls),
        problems=tuple(f"{problem.kind}: {problem.message}" for problem in made.problems),
        finish_reason=made.finish_reason,
    )


def _listen(lm: LanguageModel, item: Item) -> Reply:
    """A recording longer than the tower hears at a time, window after window."""
    from gemsmith.engine.engine import LM
    from gemsmith.engine.transcribe import transcribe

    made = transcribe(cast(LM, lm), item.media[0]["audio"])
    return Reply(made.text, segments=tuple(segment.text for segment in made.segments))


def evaluate(
    lm: LanguageModel, items: Iterable[Item], on_outcome: Callable[[Outcome], None] | None = None
) -> Report:
    """Ask every item of one model, here. Ctrl-C ends it; the report then holds what was asked."""
    return _collect(((item, ask(lm, item)) for item in items), on_outcome)


def evaluate_in_processes(
    model: str,
    items: Sequence[Item],
    on_outcome: Callable[[Outcome], None] | None = None,
    *,
    quant: str | None = None,
    workers: int | None = None,
) -> Report:
    """As `evaluate`, each worker process with a copy of the model and one thread.

    A step of a tiny model is too little work for two threads to share, so items are shared out
    instead. quant: as for `LM.load`. workers: by default one for each processor.

    Raises:
      HubError, ConfigError, WeightsError, TokenizerError: the model cannot be loaded.
    """
    workers = min(workers or os.cpu_count() or 1, max(1, len(items)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        jobs = {pool.submit(_ask_here, model, quant, item): item for item in items}
        return _collect(((jobs[job], job.result()) for job in as_completed(jobs)), on_outcome)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)


@cache
def _loaded(model: str, quant: str | None) -> LanguageModel:
    from gemsmith.engine.engine import LM

    return LM.load(model, quant=quant)


def _ask_here(model: str, quant: str | None, item: Item) -> Reply:
    return ask(_loaded(model, quant), item)


def _collect(
    replies: Iterator[tuple[Item, Reply]], on_outcome: Callable[[Outcome], None] | None
) -> Report:
    report = Report()
    try:
        for item, reply in replies:
            outcome = Outcome(item, reply, judge(item, reply))
            report.outcomes.append(outcome)
            if on_outcome:
                on_outcome(outcome)
        report.complete = True
    except KeyboardInterrupt:
        pass
    return report


# -- showing ----------------------------------------------------------------------------------


def show(report: Report, console: Console) -> None:
    """Print the tables."""
    whole = "" if report.complete else f" (stopped after {len(report.outcomes)} items)"
    table = Table(title=f"pocket, held-out items{whole}", title_justify="left")
    table.add_column("category")
    for name in ("correct", "of", "percent", "95 % interval", "target"):
        table.add_column(name, justify="right")
    for name, score in report.scores().items():
        low, high = score.interval
        target = TARGETS.get(name)
        reached = "" if target is None else f"{target:.0%} {'✓' if score.rate >= target else '✗'}"
        table.add_row(
            name,
            str(score.correct),
            str(score.count),
            f"{score.rate:.1%}",
            f"{low:.1%} - {high:.1%}",
            reached,
        )
    console.print(table)
    _show_words(report, console)
    if curve := report.curve():
        shares = ", ".join(f"{budget}: {score.rate:.0%}" for budget, score in curve.items())
        console.print(f"read exactly, by soft tokens: {shares}", highlight=False)
    if report.left_out:
        counts = ", ".join(f"{count} with {kind}" for kind, count in report.left_out.items())
        console.print(f"not asked, as this model has no tower for it: {counts}", highlight=False)


def _show_words(report: Report, console: Console) -> None:
    counted = report.word_errors()
    if not counted:
        return
    table = Table(title="word errors", title_justify="left")
    table.add_column("transcripts")
    for name in ("errors", "words", "percent", "target"):
        table.add_column(name, justify="right")
    for name, score in counted.items():
        most = WORD_TARGETS.get(name)
        reached = "" if most is None else f"at most {most:.0%} {'✓' if score.rate <= most else '✗'}"
        table.add_row(name, str(score.errors), str(score.count), f"{score.rate:.1%}", reached)
    console.print(table)
