"""Your own tasks: what a task is, when a reply is right, what is asked again and what is not."""

import json
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import random_checkpoint
from gemsmith.errors import CapacityError, HubError, RequestError
from gemsmith.evals import measure as module
from gemsmith.evals.measure import (
    Asked,
    Candidate,
    Kept,
    Task,
    ask,
    candidate,
    measure,
    median,
    median_interval,
    read_tasks,
    wrong,
)
from gemsmith.evals.scoring import Reply

TOOL = {"type": "function", "function": {"name": "sine"}}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def task(**expected: Any) -> Task:
    data = {"prompt": "Say.", "tools": [TOOL], "expected": expected}
    return module._task(data, "here:1")


# -- tasks ------------------------------------------------------------------------------------


def test_tasks_are_read_with_what_they_say(tmp_path: Path) -> None:
    first = {"prompt": "a", "expected": {"contains": "x"}}
    second = {
        "id": "two", "messages": [{"role": "user", "content": "b"}], "system": "Be brief.",
        "tools": [TOOL], "think": True, "expected": {"call": {"name": "sine"}},
    }  # fmt: skip
    path = write(tmp_path / "t.jsonl", "\ufeff" + json.dumps(first), "", second)
    one, two = read_tasks(path)
    assert (one.id, one.messages, one.how) == ("1", [{"role": "user", "content": "a"}], "contains")
    assert (one.wanted, one.tools, one.think) == (["x"], None, False)
    assert [message["role"] for message in two.messages] == ["system", "user"]
    assert (two.id, two.think, two.wanted) == ("two", True, [{"name": "sine", "arguments": {}}])


PROMPT = {"prompt": "a", "expected": {"exact": "b"}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", 'must be an object with "prompt" and "expected", not list'),
        ({"prompt": "a", "expects": 1}, "no such key 'expects'; known are expected, id"),
        ({"expected": {"exact": "b"}}, 'needs "prompt", a text, or "messages", not both'),
        (PROMPT | {"messages": []}, "not both"),
        (PROMPT | {"prompt": " "}, '"prompt" must be a text'),
        ({"messages": [], "expected": {"exact": "b"}}, '"messages" must be a list of objects'),
        ({"messages": ["a"], "expected": {"exact": "b"}}, '"messages" must be a list of objects'),
        (PROMPT | {"tools": {}}, '"tools" must be a list'),
        (PROMPT | {"tools": [{"type": "function"}]}, "function"),
        ({"prompt": "a"}, '"expected" must be an object with one of exact, contains, regex'),
        (PROMPT | {"expected": "b"}, '"expected" must be an object with one of'),
        (PROMPT | {"expected": {"like": "b"}}, "with one of"),
        (PROMPT | {"expected": {"exact": 7}}, '"exact" must be a text'),
        (PROMPT | {"expected": {"contains": []}}, '"contains" must be a text or a list'),
        (PROMPT | {"expected": {"regex": "("}}, r"regex '\(': missing \)"),
        (PROMPT | {"expected": {"call": {"arguments": {}}}}, '"call" must have a "name"'),
        (PROMPT | {"expected": {"call": {"name": "a", "arguments": []}}}, 'object "arguments"'),
    ],
)
def test_a_line_that_is_no_task_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_tasks(write(tmp_path / "t.jsonl", PROMPT, line))


def test_a_file_without_tasks_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist; --measure takes a JSON-lines file"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match="is empty; give at least one task"):
        read_tasks(write(tmp_path / "t.jsonl", "", ""))


# -- right and wrong --------------------------------------------------------------------------

CALL = Reply(calls=(("sine", {"x": 1}),))


@pytest.mark.parametrize(
    ("expected", "reply", "why"),
    [
        ({"exact": "Yes. "}, Reply(" Yes.\n"), None),
        ({"exact": "Yes."}, Reply("yes."), "other words"),
        ({"exact": "Yes."}, CALL, "called sine"),
        ({"contains": "Paris"}, Reply("It is PARIS."), None),
        ({"contains": ["a", "zeta"]}, Reply("a b"), "'zeta' is not in it"),
        ({"contains": "a"}, CALL, "called sine"),
        ({"contains": "a"}, Reply("a", finish_reason="length"), "no end within the limit"),
        ({"regex": r"\b4[0-9]\b"}, Reply("it is 42"), None),
        ({"regex": r"^42$"}, Reply("it is 42"), "the pattern is not found"),
        ({"json": {"a": [1, 2]}}, Reply('{"a": [1, 2.0]}'), None),
        ({"json": {"a": [1, 2]}}, Reply('```json\n{"a": [1, 2]}\n```'), None),
        ({"json": {"a": 1}}, Reply('{"a": true}'), "other JSON"),
        ({"json": {"a": 1}}, Reply("sure: {}"), "not JSON"),
        ({"call": {"name": "sine", "arguments": {"x": 1.0}}}, CALL, None),
        ({"call": {"name": "sine", "arguments": {"x": 2}}}, CALL, "other calls"),
        ({"call": [{"name": "sine"}, {"name": "sine"}]}, CALL, "other calls"),
        ({"call": {"name": "sine"}}, Reply("no", problems=("bad: x",)), "unreadable call: bad: x"),
    ],
)
def test_a_reply_is_right_or_it_is_said_why_not(
    expected: dict[str, Any], reply: Reply, why: str | None
) -> None:
    found = wrong(task(**expected), reply)
    assert found is None if why is None else (found or "").startswith(why)


def test_an_error_of_the_engine_is_a_wrong_reply() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CapacityError("no room")

    row = ask(SimpleNamespace(generate=fail, memory=lambda: {"weights": 7}), task(exact="a"), 8)
    assert row["wrong"] == "CapacityError: no room"
    assert (row["weights_bytes"], row["peak_bytes"] > 1 << 20) == (7, True)


# -- intervals --------------------------------------------------------------------------------


def test_the_interval_of_a_median_is_that_of_its_order_statistics() -> None:
    assert median_interval(range(5)) is None
    assert median_interval(range(6)) == (0, 5)
    # Conover's table: for 20 values the 6th and the 15th, 95.86 %.
    assert median_interval(range(1, 21)) == (6, 15)
    assert (median([]), median([3.0]), median([1.0, 2.0])) == (None, 3.0, 1.5)


# -- asking -----------------------------------------------------------------------------------


class Scripted(Asked):
    """A model that is right at tasks whose id is in `right`, and fails or is interrupted once."""

    asked: list[str]

    def __init__(self, right: str, stop: dict[str, BaseException] | None = None) -> None:
        self.right, self.stop, self.closed, self.asked = right, stop or {}, 0, []

    def ask(self, task: Task) -> dict[str, Any]:
        if task.id in self.stop:
            raise self.stop.pop(task.id)
        self.asked.append(task.id)
        return {
            "task": task.id, "wrong": None if task.id in self.right else "other words",
            "first_s": 0.1, "total_s": len(self.asked) / len(self.right), "tokens": 5,
            "tokens_per_s": 50.0, "peak_bytes": 1000 * len(self.right), "weights_bytes": 10,
            "reply": "x",
        }  # fmt: skip

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    lines = [{"id": i, "prompt": i, "expected": {"exact": i}} for i in "abcdefg"]
    return write(tmp_path / "tasks.jsonl", *lines)


A, B = (Candidate(name, name, None, f"files of {name}") for name in "AB")


def test_candidates_are_measured_and_the_undominated_are_marked(tasks: Path) -> None:
    models = {"A": Scripted("abcdef"), "B": Scripted("ab")}
    seen: list[str] = []
    report = measure(
        read_tasks(tasks), [A, B], Kept(tasks, 64),
        lambda asked, row: seen.append(asked.label + row["task"]),
        model=lambda each, _: models[each.label],
    )  # fmt: skip
    a, b = report.to_dict()["models"]
    assert (a["correct"], a["asked"], b["correct"]) == (6, 7, 2)
    assert a["interval95"] == pytest.approx((0.4869, 0.9743), abs=1e-4)
    assert a["seconds"] == pytest.approx(4 / 6)
    assert a["seconds_interval95"] == pytest.approx((1 / 6, 7 / 6))
    assert a["wrong"] == {"g": "other words"}
    # A is better and quicker, B smaller: neither is beaten in everything.
    assert (a["undominated"], b["undominated"]) == (True, True)
    assert seen == [f"A{i}" for i in "abcdefg"] + [f"B{i}" for i in "abcdefg"]
    assert [model.closed for model in models.values()] == [1, 1]


def test_what_is_worse_in_everything_is_not_marked(tasks: Path) -> None:
    worse = Scripted("abcd")
    worse.right = "zzzzzzzzz"  # nothing right, more memory; slower below
    original = worse.ask
    worse.ask = lambda task: original(task) | {"total_s": 99.0}
    models = {"A": Scripted("abcd"), "B": worse}
    report = measure(read_tasks(tasks), [A, B], Kept(tasks, 64), model=lambda c, _: models[c.label])
    assert report.undominated() == {"A"}


def test_an_interrupted_run_goes_on_where_it_ended(tasks: Path) -> None:
    stopped = Scripted("abc", {"d": KeyboardInterrupt()})
    report = measure(read_tasks(tasks), [A], Kept(tasks, 64), model=lambda *_: stopped)
    assert (report.complete, len(report.measured[0].rows), stopped.closed) == (False, 3, 1)
    path = tasks.with_suffix(".measured.jsonl")
    path.write_text(path.read_text() + '{"key": "torn')
    again = Scripted("abc")
    report = measure(read_tasks(tasks), [A], Kept(tasks, 64), model=lambda *_: again)
    assert (report.complete, again.asked) == (True, list("defg"))
    assert report.measured[0].correct == 3
    third = measure(
        read_tasks(tasks), [A], Kept(tasks, 64), model=lambda *_: pytest.fail("asked again")
    )
    assert third.to_dict() == report.to_dict()


def test_other_files_another_limit_or_another_task_are_asked_anew(tasks: Path) -> None:
    def asked(candidate: Candidate, max_tokens: int = 64) -> list[str]:
        model = Scripted("a")
        measure(read_tasks(tasks), [candidate], Kept(tasks, max_tokens), model=lambda *_: model)
        return model.asked

    assert asked(A) == list("abcdefg")
    assert asked(A) == []
    assert asked(Candidate("A", "A", None, "new files")) == list("abcdefg")
    assert asked(Candidate("A", "A", "int4", "files of A")) == list("abcdefg")
    assert asked(A, 65) == list("abcdefg")
    lines = tasks.read_text().splitlines()
    changed = json.loads(lines[2]) | {"expected": {"contains": "c"}}
    write(tasks, *lines[:2], changed, json.loads(lines[3]) | {"id": "renamed"}, *lines[4:])
    assert asked(A) == ["c"]


def test_one_model_that_fails_leaves_the_others_theirs(tasks: Path) -> None:
    models = {"A": Scripted("a", {"c": RequestError("its process ended")}), "B": Scripted("b")}
    report = measure(read_tasks(tasks), [A, B], Kept(tasks, 64), model=lambda c, _: models[c.label])
    a, b = report.to_dict()["models"]
    assert (a["asked"], a["failure"], a["undominated"]) == (2, "its process ended", False)
    assert (b["asked"], b["failure"], b["undominated"]) == (7, None, True)
    assert report.complete


def test_results_that_cannot_be_kept_are_refused_before_anything_is_asked(tasks: Path) -> None:
    tasks.with_suffix(".measured.jsonl").mkdir()
    with pytest.raises(RequestError, match=r"measured.jsonl, where results are kept, cannot be"):
        Kept(tasks, 64)


def test_candidates_are_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, rounded = candidate("pocket"), candidate("pocket:int4")
    assert (plain.name, plain.quant, rounded.name, rounded.quant) == (
        "pocket",
        None,
        "pocket",
        "int4",
    )
    assert plain.files == rounded.files
    monkeypatch.chdir(tmp_path)
    Path("odd:int4").mkdir()
    assert candidate("odd:int4").name == "odd:int4"
    before = candidate("odd:int4").files
    Path("odd:int4", "config.json").write_text("{}")
    assert candidate("odd:int4").files != before
    with pytest.raises(HubError, match="no folder 'nothing'"):
        candidate("nothing")
    with pytest.raises(HubError, match="not in the local cache and offline mode is on"):
        candidate("google/gemma-4-E2B-it")


def test_a_model_that_cannot_be_loaded_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = Pipe()
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    module._serve(there, str(tmp_path), None, 8)
    failed, answer = here.recv()
    here.close()
    there.close()
    assert failed
    assert "no vocabulary at" in answer


def test_a_process_that_was_killed_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        exitcode = -9

        def __init__(self, **_: Any) -> None: ...
        def start(self) -> None: ...
        def join(self, timeout: float = 0) -> None: ...
        def terminate(self) -> None: ...

    monkeypatch.setattr(module, "get_context", lambda _: SimpleNamespace(Pipe=Pipe, Process=Killed))
    with pytest.raises(RequestError, match=r"its process ended .killed, most likely for want of"):
        module._Process(A, 8)


@pytest.mark.slow
def test_models_are_asked_in_processes_of_their_own(tmp_path: Path) -> None:
    random_checkpoint.write(random_checkpoint.config_of("tiny-E2B"), tmp_path / "noise")
    path = write(
        tmp_path / "tasks.jsonl",
        {"prompt": "Hello!", "expected": {"contains": "hello"}},
        {"prompt": "Hello!", "expected": {"exact": "Goodbye."}},
    )
    names = ["pocket", str(tmp_path / "noise")]
    report = measure(read_tasks(path), [candidate(name) for name in names], Kept(path, 24))
    pocket, noise = report.to_dict()["models"]
    assert (pocket["correct"], pocket["asked"], pocket["failure"]) == (1, 2, None)
    assert pocket["wrong"] == {"2": "other words"}
    assert (noise["correct"], noise["asked"]) == (0, 2)
    assert pocket["peak_bytes"] > 50 << 20
    assert pocket["seconds"] > pocket["first_token_s"] > 0
