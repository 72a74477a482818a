import gzip
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import random_checkpoint
from gemsmith.engine.engine import LM
from gemsmith.errors import HubError, RequestError
from gemsmith.evals import pocket
from gemsmith.evals.pocket import (
    Item,
    Reply,
    evaluate,
    evaluate_in_processes,
    judge,
    read_items,
    same_json,
    wilson,
)
from gemsmith.text.tools import Problem, ToolCall

SINE = {"name": "sine", "arguments": {"x": 1, "loud": True}}
WAVE = {"name": "wave", "arguments": {"to": ["a", "b"]}}


def item(kind: str, wanted: Any, *, name: str = "1", category: str = "no_tool") -> Item:
    expected = {"type": kind, "calls" if kind == "calls" else "value": wanted}
    return Item(
        name, category, [{"role": "user", "content": f"item {name}"}], None, False, expected
    )


def calls(*made: dict[str, Any]) -> Reply:
    return Reply(calls=tuple((call["name"], call["arguments"]) for call in made))


@dataclass
class Generation:
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    finish_reason: str = "stop"


class ScriptedModel:
    """Replies from a list; an exception in the list is raised."""

    def __init__(self, *script: Generation | BaseException) -> None:
        self.script = list(script)
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def generate(self, prompt: Any, /, **options: Any) -> Generation:
        self.asked.append((prompt, options))
        reply = self.script.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply


# -- what is right ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "right"),
    [
        ((SINE, WAVE), True),
        ((WAVE, SINE), True),
        ((SINE,), False),
        ((SINE, WAVE, WAVE), False),
        ((SINE, SINE), False),
        ((SINE, {"name": "wave", "arguments": {"to": ["b", "a"]}}), False),
        ((SINE, {"name": "wave", "arguments": {"to": ["a", "b"], "more": None}}), False),
        ((SINE, {"name": "wavy", "arguments": {"to": ["a", "b"]}}), False),
        ((), False),
    ],
)
def test_calls_must_be_equal_in_any_order(made: tuple[dict[str, Any], ...], right: bool) -> None:
    assert (judge(item("calls", [SINE, WAVE]), calls(*made)) is None) == right


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        ("1", 1, False),
        (None, 0, False),
        ([1, 2], [2, 1], False),
        ({"a": 1, "b": [True]}, {"b": [True], "a": 1.0}, True),
        ({"a": 1, "b": [1]}, {"b": [True], "a": 1}, False),
        ({"a": {}}, {"a": []}, False),
    ],
)
def test_json_values_compare_as_json_does(a: Any, b: Any, same: bool) -> None:
    assert same_json(a, b) is same
    assert same_json(b, a) is same


@pytest.mark.parametrize(
    ("value", "text", "right"),
    [
        (849, "The answer is 849.", True),
        (849, "849", True),
        (-5, "That makes -5.", True),
        (5, "12-5", True),
        (849, "849 or 850", False),
        (849, "The answer is 8490.", False),
        (849, "The answer is 849.5", False),
        (849, "The answer is -849.", False),
        (1860, "1,860", False),
        ("22:00", "It leaves at 22:00.", True),
        ("22", "It leaves at 22:00.", False),
        ("00", "It leaves at 22:00.", False),
        ("4", "There are 4.", True),
        ("4", "There are 14 and 4.5.", False),
        ("purple peaf", "The secret is the purple peaf.", True),
        ("peaf", "The secret is the purple peafowl.", False),
        ("peaf", "Peaf.", False),
        ("c++ (new)", "It is c++ (new).", True),
    ],
)
def test_an_answer_holds_the_value_as_a_whole(value: Any, text: str, right: bool) -> None:
    assert (judge(item("answer", value), Reply(text)) is None) == right


def test_a_recital_of_the_prompt_is_no_answer() -> None:
    text = "There is a lot of filler here. " * 30 + "The code is 8955."
    assert judge(item("answer", "8955"), Reply(text)) == "other answer"


def test_no_tool_is_missed_when_a_tool_is_called_or_something_else_is_said() -> None:
    sentence = "None of the available tools can do that."
    wanted = item("no_tool", sentence)
    assert judge(wanted, Reply(sentence)) is None
    assert judge(wanted, Reply("Hello! What can I do for you?")) == "other words"
    assert judge(wanted, Reply(f"{sentence} But here is a poem.")) == "other words"
    assert judge(wanted, Reply(sentence, calls=(("sine", {}),))) == "called sine"


def test_json_replies_are_json_and_nothing_else() -> None:
    wanted = item("json", {"a": 1, "b": ["x"]})
    assert judge(wanted, Reply('{"b":["x"], "a":1}')) is None
    assert judge(wanted, Reply('Here: {"a":1,"b":["x"]}')) == "not JSON"
    assert judge(wanted, Reply('{"a":true,"b":["x"]}')) == "other JSON"
    assert judge(wanted, Reply("[" * 100_000)) == "not JSON"


def test_a_right_call_beside_an_unreadable_one_is_wrong() -> None:
    reply = Reply(calls=(("sine", SINE["arguments"]),), problems=("truncated: ...",))
    assert judge(item("calls", [SINE]), reply) == "unreadable call: truncated: ..."


def test_a_reply_cut_by_the_token_limit_is_wrong() -> None:
    reply = Reply("The answer is 7.", finish_reason="length")
    assert judge(item("answer", 7), reply) == "no end within 384 tokens"


def test_wilson_interval_of_known_counts() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


# -- running ----------------------------------------------------------------------------------


def test_items_are_asked_greedily_with_their_tools_and_thinking() -> None:
    tools = [{"type": "function", "function": {"name": "sine"}}]
    one = Item("1", "tool_seen_domain", [{"role": "user", "content": "?"}], tools, True,
               {"type": "calls", "calls": [SINE]})  # fmt: skip
    lm = ScriptedModel(Generation(tool_calls=[ToolCall("sine", {"x": 1, "loud": True})]))
    report = evaluate(lm, [one])
    [(prompt, options)] = lm.asked
    assert prompt == one.messages
    assert options["tools"] is tools
    assert options["enable_thinking"] is True
    assert options["temperature"] == 0.0
    assert options["max_tokens"] == pocket.MAX_TOKENS
    assert report.outcomes[0].wrong is None


def test_problems_of_the_engine_reach_the_score() -> None:
    problem = Problem("truncated", "the text ends inside a call")
    lm = ScriptedModel(Generation("7", problems=[problem]), RequestError("prompt too long"))
    report = evaluate(lm, [item("answer", 7, name="1"), item("answer", 7, name="2")])
    assert report.complete
    assert [o.wrong for o in report.outcomes] == [
        "unreadable call: truncated: the text ends inside a call",
        "unreadable call: RequestError: prompt too long",
    ]


def test_report_counts_by_category_with_targets_first() -> None:
    lm = ScriptedModel(*(Generation(t) for t in ("7", "8", "7", "x", "7")))
    names = ("copy", "no_tool", "no_tool", "no_tool", "tool_seen_domain")
    items = [item("answer", 7, name=str(n), category=c) for n, c in enumerate(names)]
    made = evaluate(lm, items).to_dict()
    assert list(made["categories"]) == ["tool_seen_domain", "no_tool", "copy"]
    assert made["categories"]["no_tool"] == {
        "count": 3,
        "correct": 1,
        "rate": 0.3333,
        "interval95": [0.0615, 0.7923],
        "target": 0.9,
        "met": False,
    }
    assert made["categories"]["copy"]["met"] is None
    assert made["complete"] is True


def test_interrupt_keeps_what_was_asked_so_far() -> None:
    lm = ScriptedModel(Generation("7"), KeyboardInterrupt())
    report = evaluate(lm, [item("answer", 7), item("answer", 7)])
    assert len(report.outcomes) == 1
    assert report.to_dict()["complete"] is False


def test_every_outcome_is_announced() -> None:
    seen: list[str | None] = []
    lm = ScriptedModel(Generation("7"), Generation("8"))
    evaluate(lm, [item("answer", 7), item("answer", 7)], lambda o: seen.append(o.wrong))
    assert seen == [None, "other answer"]


def test_table_shows_targets_and_failures() -> None:
    lm = ScriptedModel(Generation("7"), Generation("[8]"), Generation("9"))
    report = evaluate(lm, [item("answer", 7, name=str(n)) for n in range(3)])
    text = io.StringIO()
    pocket.show(report, Console(file=text, width=100), failures=1)
    assert "33.3%" in text.getvalue()
    assert "90% ✗" in text.getvalue()
    assert "no_tool 1: other answer" in text.getvalue()
    assert "[8]" in text.getvalue()
    assert "no_tool 2" not in text.getvalue()


@pytest.mark.slow
def test_processes_give_the_same_outcomes_as_one(tmp_path: Path) -> None:
    config = random_checkpoint.config_of("tiny-E2B")
    folder = str(random_checkpoint.write(config, tmp_path / "random"))
    items = [item("answer", 7, name=str(n)) for n in range(3)]
    alone = evaluate(LM.load(folder), items)
    shared = evaluate_in_processes(folder, items, workers=2)
    assert shared.complete
    assert sorted(o.item.id for o in shared.outcomes) == ["0", "1", "2"]
    texts = {o.item.id: o.reply for o in alone.outcomes}
    assert {o.item.id: o.reply for o in shared.outcomes} == texts
    assert len({reply.text for reply in texts.values()}) > 1


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_one_clear_error() -> None:
    with pytest.raises(HubError, match="nowhere"):
        evaluate_in_processes("./nowhere", [item("answer", 7)], workers=1)


# -- items ------------------------------------------------------------------------------------


def test_items_come_in_one_mixed_order(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(n),
            "category": "copy",
            "messages": [],
            "tools": None,
            "enable_thinking": False,
            "expected": {"type": "answer", "value": n},
        }
        for n in range(50)
    ]
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    first = [i.id for i in read_items(path)]
    assert first == [i.id for i in read_items(path)]
    assert sorted(first, key=int) == [str(n) for n in range(50)]
    assert first != sorted(first, key=int)
    assert [i.id for i in read_items(path, limit=7)] == first[:7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "not a gzipped text file"),
        (gzip.compress(b'{"id": "1"}'), "items.jsonl.gz:1: not an item .KeyError: 'category'"),
        (gzip.compress(b"[1]"), "1: not an item"),
        (gzip.compress(b"\xff"), "not a gzipped text file"),
        (gzip.compress(b"{}")[:-6], "not a gzipped text file"),
    ],
)
def test_damaged_items_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_items(path)


def test_unknown_kinds_missing_files_and_empty_limits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    row = {
        "id": "1",
        "category": "copy",
        "messages": [],
        "tools": None,
        "enable_thinking": False,
        "expected": {"type": "essay", "value": 1},
    }
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(RequestError, match="expected type 'essay'; allowed are calls, answer"):
        read_items(path)
    with pytest.raises(RequestError, match=r"nothing\.gz does not exist"):
        read_items(tmp_path / "nothing.gz")
    with pytest.raises(RequestError, match="limit 0: at least one item"):
        read_items(path, limit=0)
