"""Your own tasks, asked of the models that are here: right replies, seconds, bytes.

A task is a line of a JSON-lines file:
  prompt     one user message; or `messages`, a conversation in OpenAI's shape
  expected   one of
               {"exact": TEXT}     the reply is the text, space around it aside
               {"contains": TEXT}  the text is in it, case aside; of a list: every one
               {"regex": PATTERN}  Python's `re` finds it; `(?s)` and the like work inside
               {"json": VALUE}     the reply is JSON, fenced or not, and equals the value
               {"call": {"name": N, "arguments": {...}}}  exactly this tool call; of a list: these
  system, tools, think (true lets it think first), id: where they are wanted
A reply is greedy, right or wrong (scoring.py decides calls and JSON), and wrong where it ran into
the limit of tokens. A call where none is expected is wrong.

Each model runs in a process of its own: its memory is its own, and if the system ends it for want
of memory the others go on. What was asked is kept in a file beside the tasks, TASKS.measured.jsonl,
line by line; the same task is not asked again of the same files at the same limit.

Seconds are of this machine, one request at a time, after one that is not counted; what consecutive
prompts begin with alike is not computed twice, as in use. Intervals are 95 %: Wilson's for rates,
for medians by order statistics, whatever the distribution. The file of tasks is trusted as a
program is: a pattern can be written that takes for ever.

Not a comparison of two builds of a model on the same words: that is fidelity.py.
"""

import hashlib
import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from gemsmith import hardware
from gemsmith.errors import GemsmithError, RequestError
from gemsmith.evals.items import Item
from gemsmith.evals.lines import read_lines
from gemsmith.evals.scoring import Reply, judge, wilson
from gemsmith.text.tools import check_tool
from gemsmith.weights import hub

QUANTS = ("int8", "int4", "int2")
"""What `LM.load(quant=...)` takes."""
HOW = ("exact", "contains", "regex", "json", "call")
KEYS = {"id", "prompt", "messages", "system", "tools", "think", "expected"}
MAX_TASKS_BYTES = 64 << 20
KEPT_CHARACTERS = 2000
"""Of a reply, in the file of results."""
FENCE = re.compile(r"\s*```\w*\n(.*?)\n?```\s*", re.S)


# -- tasks ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """One question and what is right."""

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    think: bool
    how: str
    """One of HOW."""
    wanted: Any

    @property
    def digest(self) -> str:
        return _digest({key: value for key, value in asdict(self).items() if key != "id"})


def read_tasks(path: str | Path) -> list[Task]:
    """The tasks of a file; empty lines are passed over.

    Raises:
      RequestError: no such file, none in it, or a line that is none, by its number.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > MAX_TASKS_BYTES:
        raise RequestError(f"{path}: larger than {MAX_TASKS_BYTES >> 20} MiB of tasks")
    lines = read_lines(path, option="--measure", kind="task")
    return [_task(data, where) for where, data in lines]


def _task(data: Any, where: str) -> Task:
    def bad(what: str) -> RequestError:
        return RequestError(f"{where}: {what}")

    if not isinstance(data, dict):
        raise bad(f'must be an object with "prompt" and "expected", not {type(data).__name__}')
    if unknown := sorted(data.keys() - KEYS):
        raise bad(f"no such key {unknown[0][:60]!r}; known are {', '.join(sorted(KEYS))}")
    prompt, messages = data.get("prompt"), data.get("messages")
    if (prompt is None) == (messages is None):
        raise bad('needs "prompt", a text, or "messages", not both')
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise bad('"prompt" must be a text')
        messages = [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages:
        raise bad('"messages" must be a list of objects with "role" and "content"')
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise bad('"messages" must be a list of objects with "role" and "content"')
    if (system := data.get("system")) is not None:
        messages = [{"role": "system", "content": str(system)}, *messages]
    tools = data.get("tools")
    if not isinstance(tools, list | None):
        raise bad('"tools" must be a list')
    try:
        for tool in tools or ():
            check_tool(tool)
    except (GemsmithError, TypeError, AttributeError) as error:
        raise bad(str(error)) from None
    how, wanted = _expected(data.get("expected"), bad)
    id = str(data.get("id", where.rpartition(":")[2]))
    return Task(id, messages, tools or None, data.get("think") is True, how, wanted)


def _expected(expected: Any, bad: Callable[[str], RequestError]) -> tuple[str, Any]:
    if not isinstance(expected, dict) or len(expected) != 1 or next(iter(expected)) not in HOW:
        raise bad(f'"expected" must be an object with one of {", ".join(HOW)}')
    how: str = next(iter(expected))
    wanted: Any = expected[how]
    if how in ("exact", "regex") and not isinstance(wanted, str):
        raise bad(f'"{how}" must be a text')
    if how == "regex":
        try:
            re.compile(wanted)
        except (re.error, OverflowError, RecursionError) as error:
            raise bad(f"regex {wanted[:60]!r}: {error}") from None
    if how not in ("contains", "call"):
        return how, wanted
    several: list[Any] = wanted if isinstance(wanted, list) else [wanted]
    if how == "contains":
        if not several or not all(isinstance(text, str) and text for text in several):
            raise bad('"contains" must be a text or a list of texts')
        return how, several
    whole = all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in several)
    if not whole or not all(isinstance(c.get("arguments", {}), dict) for c in several):
        raise bad('"call" must have a "name" and an object "arguments"')
    return how, [{"name": c["name"], "arguments": c.get("arguments", {})} for c in several]


def wrong(task: Task, reply: Reply) -> str | None:
    """None if the reply is what the task expects, otherwise why not."""
    if reply.finish_reason == "length":
        return "no end within the limit of tokens"
    if task.how in ("contains", "regex"):
        if reply.calls or reply.problems:
            return judge(_item(task, "text", ""), reply)
        if task.how == "regex":
            return None if re.search(task.wanted, reply.text) else "the pattern is not found"
        text = reply.text.casefold()
        lacking = [part for part in task.wanted if part.casefold() not in text]
        return f"{lacking[0][:60]!r} is not in it" if lacking else None
    if task.how == "json":
        fenced = FENCE.fullmatch(reply.text)
        text = fenced[1] if fenced else reply.text
        plain = Reply(text, reply.calls, reply.problems, reply.finish_reason)
        return judge(_item(task, "json", task.wanted), plain)
    if task.how == "call":
        return judge(_item(task, "calls", task.wanted), reply)
    return judge(_item(task, "text", task.wanted.strip()), reply)


def _item(task: Task, kind: str, value: Any) -> Item:
    expected = {"type": kind, "calls" if kind == "calls" else "value": value}
    return Item(task.id, "task", task.messages, task.tools, task.think, expected)


# -- candidates -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that is here, and how it is loaded."""

    label: str
    name: str
    quant: str | None
    files: str
    """A digest of what its files are: names, sizes, times."""


def candidate(text: str) -> Candidate:
    """`pocket`, a folder, or a hub id that was fetched; with `:int4` and the like, rounded.

    Raises:
      HubError: it is not here.
    """
    name, _, quant = text.rpartition(":")
    if not name or quant not in QUANTS or Path(text).is_dir():
        name, quant = text, ""
    folder = hub.resolve(name, offline=True)
    held = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    facts = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in held
        if path.name != hub.FIDELITY
    ]
    return Candidate(text, name, quant or None, _digest(facts))


@dataclass(slots=True)
class Measured:
    """What is known of one candidate so far."""

    candidate: Candidate
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One a task, in the tasks' order: see `ask`."""
    failure: str | None = None
    """Why it was asked no further."""

    @property
    def correct(self) -> int:
        return sum(row["wrong"] is None for row in self.rows)

    @property
    def peak_bytes(self) -> int:
        return max((row["peak_bytes"] or 0 for row in self.rows), default=0)

    def seconds(self, key: str = "total_s") -> list[float]:
        return sorted(row[key] for row in self.rows)


@dataclass(slots=True)
class Report:
    """All candidates; `complete` is False after Ctrl-C."""

    tasks: int
    measured: list[Measured]
    complete: bool = False

    def undominated(self) -> set[str]:
        """Those that no other, fully asked, equals or beats in score, seconds and memory."""
        whole = [m for m in self.measured if len(m.rows) == self.tasks]
        marks = {
            m.candidate.label: (-m.correct, median(m.seconds()) or 0.0, m.peak_bytes) for m in whole
        }

        def beaten(label: str) -> bool:
            mine = marks[label]
            return any(
                other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
                for other in marks.values()
            )

        return {label for label in marks if not beaten(label)}

    def to_dict(self) -> dict[str, Any]:
        best = self.undominated()
        return {
            "complete": self.complete,
            "tasks": self.tasks,
            "models": [_facts(one, best) for one in self.measured],
        }


def _facts(one: Measured, best: set[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "model": one.candidate.label,
        "asked": len(one.rows),
        "correct": one.correct,
        "failure": one.failure,
        "undominated": one.candidate.label in best,
    }
    if one.rows:
        facts |= {
            "rate": one.correct / len(one.rows),
            "interval95": wilson(one.correct, len(one.rows)),
            "seconds": median(one.seconds()),
            "seconds_interval95": median_interval(one.seconds()),
            "first_token_s": median(one.seconds("first_s")),
            "tokens_per_s": median(one.seconds("tokens_per_s")),
            "peak_bytes": one.peak_bytes or None,
            "weights_bytes": max(row["weights_bytes"] for row in one.rows),
            "wrong": {row["task"]: row["wrong"] for row in one.rows if row["wrong"]},
        }
    return facts


def median(ordered: Sequence[float]) -> float | None:
    """Of values in order; None of none."""
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2 if n else None


def median_interval(ordered: Sequence[float]) -> tuple[float, float] | None:
    """95 % for the median, from the k-th least to the k-th largest; None of fewer than 6 values.

    k is the largest with P(fewer than k of n fall below the median) <= 2.5 %, binomial.
    """
    n, below, k = len(ordered), 0, 0
    while k < n and (below := below + math.comb(n, k)) * 40 <= 1 << n:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None


# -- asking -----------------------------------------------------------------------------------


class Kept:
    """Results beside the tasks, one a line, added as they come. build: what else they depend on.

    Raises:
      RequestError: the file cannot be written.
    """

    def __init__(self, tasks: str | Path, max_tokens: int, build: str = "") -> None:
        self.path = Path(tasks).with_suffix(".measured.jsonl")
        self.max_tokens, self.build = max_tokens, build
        self._found: dict[str, dict[str, Any]] = {}
        try:
            with self.path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                text = file.read()
                if text and not text.endswith("\n"):
                    file.write("\n")  # the line that was being written when it ended
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"{self.path}, where results are kept, cannot be used ({error}); remove it, or "
                "copy the tasks to a folder of yours"
            ) from None
        for line in text.splitlines():
            try:
                row = json.loads(line)
                self._found[row["key"]] = row
            except (ValueError, RecursionError, TypeError, KeyError):
                continue

    def key(self, candidate: Candidate, task: Task) -> str:
        return _digest([self.build, candidate.files, candidate.quant, task.digest, self.max_tokens])

    def get(self, candidate: Candidate, task: Task) -> dict[str, Any] | None:
        row = self._found.get(self.key(candidate, task))
        return row and row | {"task": task.id}

    def add(self, candidate: Candidate, task: Task, row: dict[str, Any]) -> None:
        line = {"key": self.key(candidate, task), "model": candidate.label, **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Asked(Protocol):
    """A loaded candidate, wherever it runs."""

    def ask(self, task: Task) -> dict[str, Any]: ...

    def close(self) -> None: ...


def measure(
    tasks: Sequence[Task],
    candidates: Sequence[Candidate],
    kept: Kept,
    on_row: Callable[[Candidate, dict[str, Any]], None] | None = None,
    *,
    model: Callable[[Candidate, int], Asked] | None = None,
) -> Report:
    """Ask every candidate every task that it was not asked before. Ctrl-C ends it; what was
    answered is kept. `model` stands for the process of a candidate, in tests.
    """
    report = Report(len(tasks), [Measured(each) for each in candidates])
    try:
        for one in report.measured:
            _measure_one(one, tasks, kept, on_row, model or _Process)
        report.complete = True
    except KeyboardInterrupt:
        pass
    return report


def _measure_one(
    one: Measured,
    tasks: Sequence[Task],
    kept: Kept,
    on_row: Callable[[Candidate, dict[str, Any]], None] | None,
    model: Callable[[Candidate, int], Asked],
) -> None:
    process: Asked | None = None
    try:
        for task in tasks:
            row = kept.get(one.candidate, task)
            if row is None:
                process = process or model(one.candidate, kept.max_tokens)
                row = process.ask(task)
                kept.add(one.candidate, task, row)
            one.rows.append(row)
            if on_row:
                on_row(one.candidate, row)
    except GemsmithError as error:
        one.failure = str(error)
    finally:
        if process is not None:
            process.close()


def ask(lm: Any, task: Task, max_tokens: int) -> dict[str, Any]:
    """One task's row: whether it was right, seconds, tokens, bytes held and the reply's beginning.

    An error that the engine raises on purpose is a wrong reply.
    """
    from gemsmith.evals.pocket import greedy, reply_of

    first, total, tokens, speed = 0.0, 0.0, 0, 0.0
    try:
        made = greedy(lm, task.messages, task.tools, task.think, max_tokens)
        reply, usage = reply_of(made), made.usage
        first, total = usage.time_to_first_token_s, usage.total_s
        tokens, speed = usage.completion_tokens, usage.decode_tokens_per_s
        why = wrong(task, reply)
        text = reply.text or json.dumps(reply.calls, ensure_ascii=False)
    except GemsmithError as error:
        why, text = f"{type(error).__name__}: {error}", ""
    memory = lm.memory()
    return {
        "task": task.id,
        "wrong": why,
        "first_s": first,
        "total_s": total,
        "tokens": tokens,
        "tokens_per_s": speed,
        "peak_bytes": _peak_bytes(),
        "weights_bytes": memory["weights"],
        "reply": text[:KEPT_CHARACTERS],
    }


class _Process:
    """A candidate in a process of its own.

    Raises:
      GemsmithError: it cannot be loaded, or the process ended.
    """

    def __init__(self, candidate: Candidate, max_tokens: int) -> None:
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(there, candidate.name, candidate.quant, max_tokens), daemon=True
        )
        self._process.start()
        there.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, task: Task) -> dict[str, Any]:
        self._here.send(task)
        return self._answer()

    def _answer(self) -> Any:
        try:
            failed, answer = self._here.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            why = "killed, most likely for want of memory" if code == -9 else f"exit code {code}"
            raise RequestError(f"its process ended ({why}); what it answered is kept") from None
        if failed:
            raise RequestError(answer)
        return answer

    def close(self) -> None:
        self._here.close()
        self._process.terminate()
        self._process.join()


def _serve(connection: Connection, name: str, quant: str | None, max_tokens: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    from gemsmith.engine.engine import LM

    try:
        lm = LM.load(name, quant=quant, offline=True)
        lm.generate("Hello", temperature=0.0, max_tokens=2)  # the first request loads what is lazy
        connection.send((False, None))
        for task in _received(connection):
            connection.send((False, ask(lm, task, max_tokens)))
    except GemsmithError as error:
        connection.send((True, str(error)))


def _received(connection: Connection) -> Iterator[Task]:
    while True:
        try:
            yield connection.recv()
        except (EOFError, OSError):
            return


def _peak_bytes() -> int | None:
    """Of this process alone: getrusage's figure begins with that of the one that started it."""
    try:
        status = Path("/proc/self/status").read_text("ascii", errors="replace")
    except OSError:
        return hardware.peak_bytes()
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.M)
    return int(found[1]) * 1024 if found else hardware.peak_bytes()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
