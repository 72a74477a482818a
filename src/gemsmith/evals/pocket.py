"""The held-out test of the embedded model: tool calls, answers, JSON, and when no tool fits.

Each item is a prompt (messages, tools, thinking or not) and what must come next. The model answers
greedily; a reply is right or wrong, nothing between. Not a general benchmark: items come from the
same generator as the training data, with names, values and schemas that training never saw.

What is right, by the kind of `expected`:
  calls    the same calls with equal names and arguments as JSON values, in any order; no problems
  answer   no call; the value stands in the reply as a whole word or number (an integer: is the last
           number of it), and the reply is short enough not to be a recital of the prompt
  no_tool  no call; the reply is the sentence that says so
  json     no call; the whole reply is JSON and equals the value
A reply that ran into the token limit is wrong.

Intervals are Wilson's, 95 %.
"""

import gzip
import json
import math
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from gemsmith.errors import GemsmithError, RequestError

TARGETS = {
    "tool_seen_domain": 0.95,
    "tool_unseen_schema": 0.80,
    "no_tool": 0.90,
    "thinking_arithmetic": 0.90,
    "needle_4x": 0.90,
}
MAX_TOKENS = 384
"""Most tokens of one reply; the longest right one (a word problem worked out) has half as many."""
SLACK = 160
"""Characters that an answer may have beyond the value asked for."""
KINDS = ("calls", "answer", "no_tool", "json")


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt and what must come next."""

    id: str
    category: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    enable_thinking: bool
    expected: dict[str, Any]
    """`type` (one of KINDS) with `calls` or `value`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model did, as far as scoring needs it. Travels between processes."""

    text: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    problems: tuple[str, ...] = ()
    finish_reason: str = "stop"


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

    def scores(self) -> dict[str, Score]:
        """By category: those with a target first, then the others by name."""
        counts = Counter(o.item.category for o in self.outcomes)
        right = Counter(o.item.category for o in self.outcomes if o.wrong is None)
        order = [c for c in TARGETS if c in counts] + sorted(set(counts) - set(TARGETS))
        return {name: Score(counts[name], right[name]) for name in order}

    def failures(self, most: int) -> list[Outcome]:
        """The first `most` wrong outcomes, by item id, so that two runs show the same ones."""
        wrong = (o for o in self.outcomes if o.wrong is not None)
        return sorted(wrong, key=lambda o: o.item.id)[:most]

    def to_dict(self) -> dict[str, Any]:
        """For programs: per category count, correct, rate, interval, target, met."""
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
        return {"name": "pocket", "complete": self.complete, "categories": categories}


class LanguageModel(Protocol):
    """What `gemsmith.load` returns, as far as it is used here."""

    def generate(self, prompt: Any, /, **options: Any) -> Any: ...


# -- items ------------------------------------------------------------------------------------


def read_items(path: str | Path | None = None, *, limit: int | None = None) -> list[Item]:
    """Items of a gzipped JSON-lines file, by default the one shipped with the package, shuffled.

    The order is always the same and mixes the categories, so that the first `limit` of them, or
    those before an interruption, stand for all.

    Raises:
      RequestError: the file is missing, damaged, or a line is no item.
    """
    source = (
        Path(str(files("gemsmith.pocket") / "heldout.jsonl.gz")) if path is None else Path(path)
    )
    if limit is not None and limit < 1:
        raise RequestError(f"limit {limit}: at least one item has to be asked")
    try:
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            items = [_item(line, f"{source}:{n}") for n, line in enumerate(lines, 1)]
    except FileNotFoundError:
        raise RequestError(f"{source} does not exist; there are no items to ask") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RequestError(f"{source}: not a gzipped text file ({error})") from None
    random.Random(0).shuffle(items)
    return items[:limit]


def _item(line: str, where: str) -> Item:
    try:
        data = json.loads(line)
        item = Item(**{name: data[name] for name in Item.__slots__})
        kind = item.expected["type"]
        wanted = item.expected["calls" if kind == "calls" else "value"]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{where}: not an item ({type(error).__name__}: {error})") from None
    if kind not in KINDS or (kind == "calls" and not isinstance(wanted, list)):
        raise RequestError(f"{where}: expected type {kind!r}; allowed are {', '.join(KINDS)}")
    return item


# -- scoring ----------------------------------------------------------------------------------


def judge(item: Item, reply: Reply) -> str | None:
    """None if the reply is what the item expects, otherwise why not, in one line."""
    expected, kind = item.expected, item.expected["type"]
    if reply.finish_reason == "length":
        return f"no end within {MAX_TOKENS} tokens"
    if reply.problems:
        return "unreadable call: " + "; ".join(reply.problems)
    if kind == "calls":
        wanted = [(call["name"], call["arguments"]) for call in expected["calls"]]
        return None if _same_calls(wanted, reply.calls) else "other calls"
    if reply.calls:
        return f"called {', '.join(name for name, _ in reply.calls)}"
    if kind == "json":
        try:
            value = json.loads(reply.text)
        except (ValueError, RecursionError):
            return "not JSON"
        return None if same_json(value, expected["value"]) else "other JSON"
    if kind == "no_tool":
        return None if reply.text.strip() == expected["value"] else "other words"
    return None if _answers(reply.text, expected["value"]) else "other answer"


def _same_calls(
    wanted: Sequence[tuple[str, Any]], made: Sequence[tuple[str, Mapping[str, Any]]]
) -> bool:
    left = list(made)
    for name, arguments in wanted:
        for call in left:
            if call[0] == name and same_json(call[1], arguments):
                left.remove(call)
                break
        else:
            return False
    return not left


def same_json(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true, order counts in lists and not in objects."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return a == b


def _answers(text: str, value: Any) -> bool:
    if len(text) > len(str(value)) + SLACK:
        return False
    if isinstance(value, int):
        numbers = re.findall(r"(?<!\d)-?\d+(?:[.,]\d+)*", text)
        return bool(numbers) and numbers[-1] == str(value)
    # As a whole: 4 is not in 14, 4.5, 4:30 or x4, but is in "4." and "(4)".
    whole = rf"(?<![\w])(?<!\d[.,:-]){re.escape(str(value))}(?!\w)(?![.,:-]\d)"
    return re.search(whole, text) is not None


def wilson(correct: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a rate, 95 % unless z says otherwise; (0, 1) where nothing was counted.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927), 209.
    """
    if count == 0:
        return 0.0, 1.0
    rate, shrink = correct / count, 1 + z * z / count
    centre = (rate + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


# -- asking -----------------------------------------------------------------------------------


def ask(lm: LanguageModel, item: Item) -> Reply:
    """The model's greedy reply. An error that the engine raises on purpose is a wrong reply."""
    try:
        made = lm.generate(
            item.messages,
            tools=item.tools,
            enable_thinking=item.enable_thinking,
            temperature=0.0,
            max_tokens=MAX_TOKENS,
        )
    except GemsmithError as error:
        return Reply(problems=(f"{type(error).__name__}: {error}",), finish_reason="error")
    return Reply(
        text=made.text,
        calls=tuple((call.name, call.arguments) for call in made.tool_calls),
        problems=tuple(f"{problem.kind}: {problem.message}" for problem in made.problems),
        finish_reason=made.finish_reason,
    )


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
    workers: int | None = None,
) -> Report:
    """As `evaluate`, each worker process with a copy of the model and one thread.

    A step of a tiny model is too little work for two threads to share, so items are shared out
    instead. workers: by default one for each processor.

    Raises:
      HubError, ConfigError, WeightsError, TokenizerError: the model cannot be loaded.
    """
    workers = min(workers or os.cpu_count() or 1, max(1, len(items)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        jobs = {pool.submit(_ask_here, model, item): item for item in items}
        return _collect(((jobs[job], job.result()) for job in as_completed(jobs)), on_outcome)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    torch.set_num_threads(1)


@cache
def _loaded(model: str) -> LanguageModel:
    from gemsmith.engine.engine import LM

    return LM.load(model)


def _ask_here(model: str, item: Item) -> Reply:
    return ask(_loaded(model), item)


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


def show(report: Report, console: Console, *, failures: int = 0) -> None:
    """Print the table, then the first `failures` wrong replies beside what was expected."""
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
    for outcome in report.failures(failures):
        item, reply = outcome.item, outcome.reply
        asked = next((m["content"] for m in reversed(item.messages) if m["role"] == "user"), "")
        got = [{"name": name, "arguments": values} for name, values in reply.calls] or reply.text
        console.print(f"\n{item.category} {item.id}: {outcome.wrong}", style="bold", markup=False)
        for label, value in (("asked", asked), ("wanted", item.expected), ("got", got)):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            shown = text if len(text) <= 600 else f"{text[:200]} ... {text[-400:]}"
            console.print(f"  {label:7}{shown}", markup=False, highlight=False, soft_wrap=True)
