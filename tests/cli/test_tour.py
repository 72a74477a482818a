"""`gemsmith demo`: what is right gets a tick, what is wrong does not, and the tool loop decides."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.cli.fake import FakeLM, Reply
from typer.testing import CliRunner

import gemsmith
from gemsmith.cli.main import app
from gemsmith.cli.tour import ERRANDS, long_text
from gemsmith.errors import CapacityError
from gemsmith.testing import tiny_config
from gemsmith.text.calls import ToolCall
from gemsmith.text.stream import Content, Thinking, ToolCallEvent


def call(name: str, **arguments: Any) -> Reply:
    return [ToolCallEvent(ToolCall(name, arguments))]


def say(text: str) -> Reply:
    return [Content(text)]


TALKS: list[Reply] = [
    say("Hello! What can I do for you?"),
    [Thinking("7 + 6 = 13"), Content("The answer is 4433.")],
    say('{"city":"Lisbon","name":"Nora","age":34}'),
    say("The password for the harbor is velmora."),
    call("sky_report_v2", townName="Oslo", scale="celsius"),
]
TITLE = "plant the olive tree"
LOOP: list[Reply] = [
    call("read_file", path="plans/garden.txt"),
    call("add_event", title=TITLE, date="June 12", time="09:30"),
    say("Added."),
    call("list_files", path="recipes"),
    say("bread.txt, cake.txt and soup.txt."),
    call("convert_units", value=26.2, from_unit="miles", to_unit="km"),
    say("42.1648 km."),
    call("list_events", date="June 12"),
    say(f"{TITLE} at 09:30."),
]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `gemsmith demo` over scripted replies."""

    def run(talks: list[Reply], errands: list[Reply]) -> Any:
        lm: Any = FakeLM(*talks, *errands)
        lm.config = tiny_config("E2B")
        lm.tokenizer = SimpleNamespace(encode=str.split)
        monkeypatch.setattr(gemsmith, "load", lambda name, **given: lm)
        result = CliRunner().invoke(app, ["--debug", "demo"])
        assert lm.replies == [], f"not asked for: {lm.replies}\n{result.output}"
        return result

    return run


def test_a_model_that_is_right_passes(demo: Any):
    result = demo(TALKS, LOOP)
    assert result.exit_code == 0, result.output
    assert "6 of 6 right" in result.output
    assert "In the calendar now: 'plant the olive tree' on June 12 at 09:30" in result.output


def test_calls_and_real_results_are_shown(demo: Any):
    output = demo(TALKS, LOOP).output
    for line in (
        '-> read_file(path="plans/garden.txt")',
        '<- {"text": "plant the olive tree"}',
        '<- {"count": 3, "files": ["bread.txt", "cake.txt", "soup.txt"]}',
        '<- {"result": 42.1648}',
        '<- {"count": 1, "events": ["plant the olive tree at 09:30"]}',
        *(f"> {errand}" for errand in ERRANDS),
    ):
        assert line in output


def test_wrong_answers_are_said_to_be_wrong(demo: Any):
    wrong = [
        [],
        say("The answer is 4433."),  # right, but without a thought
        say("Lisbon"),
        say("I do not know."),
        call("sky_report_v2", townName="Oslo"),
    ]
    result = demo(wrong, LOOP)
    assert result.output.count("✗ wrong") == 5
    assert "1 of 6 right" in result.output
    assert result.exit_code == 0


@pytest.mark.parametrize(
    "changed",
    [
        call("add_event", title=TITLE, date="June 13", time="09:30"),
        call("list_events", date="June 12"),
    ],
)
def test_a_loop_that_did_not_do_its_work_fails_the_tour(demo: Any, changed: Reply):
    result = demo(TALKS, [LOOP[0], changed, *LOOP[2:]])
    assert result.exit_code == 1
    assert "The tool loop did not do its work: the tour failed." in result.output


def test_an_errand_answered_wrong_is_told_and_forgiven(demo: Any):
    result = demo(TALKS, [*LOOP[:-1], say("Nothing.")])
    assert "✗ the answer does not name plant the olive tree" in result.output
    assert "5 of 6 right" in result.output
    assert result.exit_code == 0


def test_an_error_in_the_loop_fails_the_tour(demo: Any):
    result = demo(TALKS, [LOOP[0], [CapacityError("no memory")]])
    assert result.exit_code == 1
    assert "error: no memory" in result.output


def test_the_long_text_is_as_long_as_asked_and_begins_with_the_fact():
    text = long_text("The code is 7.", lambda text: len(text.split()), 500)
    assert text.startswith("The code is 7. The ")
    assert 500 <= len(text.split()) < 510
