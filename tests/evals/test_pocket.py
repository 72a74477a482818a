"""Asking the held-out items and reporting what came back."""

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import random_checkpoint
from gemsmith.cli import evaluate as cli_evaluate
from gemsmith.engine.engine import LM
from gemsmith.errors import HubError, RequestError
from gemsmith.evals import pocket
from gemsmith.evals.items import Item, read_items
from gemsmith.evals.pocket import Report, evaluate, evaluate_in_processes
from gemsmith.text.tools import Problem, ToolCall

SINE = {"name": "sine", "arguments": {"x": 1, "loud": True}}


def item(kind: str, wanted: Any, *, name: str = "1", category: str = "no_tool") -> Item:
    expected = {"type": kind, "calls" if kind == "calls" else "value": wanted}
    return Item(
        name, category, [{"role": "user", "content": f"item {name}"}], None, False, expected
    )


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
    pocket.show(report, Console(file=text, width=100))
    cli_evaluate.show_failures(report.failures(1), Console(file=text, width=100))
    assert "33.3%" in text.getvalue()
    assert "90% ✗" in text.getvalue()
    assert "no_tool 1: other answer" in text.getvalue()
    assert "[8]" in text.getvalue()
    assert "no_tool 2" not in text.getvalue()


def test_a_wrong_reply_is_shown_as_it_was_given() -> None:
    report = evaluate(ScriptedModel(Generation("{a:x:b}\tc")), [item("answer", 7)])
    text = io.StringIO()
    cli_evaluate.show_failures(report.failures(1), Console(file=text, width=100))
    assert "{a:x:b}\tc\n" in text.getvalue()


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


# -- pictures and speech ----------------------------------------------------------------------


def test_reading_is_reported_over_budgets_in_their_order() -> None:
    texts = {70: "X7", 140: "X8", 1120: "K7"}
    items = [item("text", "K7", name=str(b), category=f"picture_read_{b}") for b in texts]
    report = evaluate(ScriptedModel(*map(Generation, texts.values())), items[::-1])
    assert report.to_dict()["read_by_budget"] == {70: 1.0, 140: 0.0, 1120: 0.0}
    report = evaluate(ScriptedModel(*map(Generation, texts.values())), items)
    assert list(report.to_dict()["read_by_budget"].items()) == [(70, 0.0), (140, 0.0), (1120, 1.0)]
    assert report.to_dict()["categories"]["picture_read_1120"]["met"] is True
    text = io.StringIO()
    pocket.show(report, Console(file=text, width=100))
    assert "read exactly, by soft tokens: 70: 0%, 140: 0%, 1120: 100%" in text.getvalue()


def test_word_errors_of_all_clips_are_counted_together() -> None:
    items = [
        item("transcript", "the lamp is red", name="1", category="speech_sentence"),
        item("transcript", "1 2 3 4 5 6", name="2", category="speech_digits"),
    ]
    report = evaluate(ScriptedModel(Generation("The lamp is red."), Generation("1 2 3 4 5")), items)
    made = report.to_dict()["words"]
    assert made["speech"] == {"count": 10, "errors": 1, "rate": 0.1, "target": 0.1, "met": True}
    assert made["speech_digits"] == {
        "count": 6,
        "errors": 1,
        "rate": 0.1667,
        "target": None,
        "met": None,
    }
    assert [o.wrong for o in report.outcomes] == [None, "1 word errors in 6 words"]
    text = io.StringIO()
    pocket.show(report, Console(file=text, width=100))
    assert "at most 10% ✓" in text.getvalue()


def test_a_reply_cut_off_counts_with_all_its_words() -> None:
    one = item("transcript", "yes", category="speech_sentence")
    report = evaluate(ScriptedModel(Generation("no " * 9, finish_reason="length")), [one])
    assert report.to_dict()["words"]["speech"]["errors"] == 9
    assert report.outcomes[0].wrong == "no end within 384 tokens"


def test_the_reading_is_heard_window_after_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemsmith.engine import transcribe
    from gemsmith.media.transcript import Segment

    heard: list[Any] = []

    def fake(lm: Any, source: Any) -> transcribe.Transcript:
        heard.append(source)
        texts = ("a b c d e f", "h i j k")
        return transcribe.Transcript(tuple(Segment(0, 1, text) for text in texts))

    monkeypatch.setattr(transcribe, "transcribe", fake)
    content = [{"type": "audio", "audio": b"sound"}]
    expected = {"type": "reading", "value": "a b c d e f g h i j k"}
    one = Item("1", "speech_reading", [{"role": "user", "content": content}], None, False, expected)
    report = evaluate(ScriptedModel(), [one])
    assert heard == [b"sound"]
    assert report.outcomes[0].wrong is None
    made = report.to_dict()["words"]
    assert (made["speech_reading"]["errors"], made["speech_reading"]["count"]) == (1, 11)
    borders = made["speech_reading_borders"]
    assert (borders["errors"], borders["count"]) == (1, 10)
    assert "speech" not in made


def test_what_was_left_out_and_what_was_shown_are_said() -> None:
    part = {"type": "image", "image": b"x", "budget": 70}
    content = [part, {"type": "text", "text": "What shape is red?"}]
    expected = {"type": "answer", "value": "star"}
    one = Item("1", "picture_shape", [{"role": "user", "content": content}], None, False, expected)
    report = evaluate(ScriptedModel(Generation("The circle is red.")), [one])
    report.left_out = {"audio": 3}
    text = io.StringIO()
    pocket.show(report, Console(file=text, width=100))
    cli_evaluate.show_failures(report.failures(1), Console(file=text, width=100))
    assert "not asked, as this model has no tower for it: 3 with audio" in text.getvalue()
    assert "[image] What shape is red?" in text.getvalue()
    assert report.to_dict()["left_out"] == {"audio": 3}
    assert Report().to_dict()["left_out"] == {}


def test_a_checkpoint_without_towers_is_asked_text_alone_and_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_checkpoint.write(random_checkpoint.config_of("tiny-E2B"), tmp_path / "random")
    asked: list[Item] = []

    def unasked(model: str, items: list[Item], on_outcome: Any, **given: object) -> Report:
        asked.extend(items)
        return Report(complete=True)

    monkeypatch.setattr(pocket, "evaluate_in_processes", unasked)
    cli_evaluate.run(str(folder), limit=None, failures=0, as_json=False)
    assert len(asked) == len(read_items())
    assert not any(item.media for item in asked)
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"not asked, as this model has no tower for it: \d+ with image, \d+ with a", shown
    )
