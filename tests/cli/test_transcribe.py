"""`gemsmith transcribe`: text, subtitles or JSON on stdout, everything else on stderr."""

import json
from typing import Any

import pytest
from tests.cli.fake import FakeLM
from typer.testing import CliRunner

import gemsmith
from gemsmith.cli import transcribe as worker
from gemsmith.cli.main import app
from gemsmith.engine.transcribe import Transcript
from gemsmith.media.transcript import Segment

MADE = Transcript(
    (Segment(0.0, 28.5, "Hello there."), Segment(28.5, 30.0, ""), Segment(30.0, 41.25, "Bye.")),
    ("28.5-30.0 s: the model repeats itself",),
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    def heard_all(lm: Any, source: str, *, heard: Any) -> Transcript:
        assert source == "talk.mp3"
        for segment in MADE.segments:
            heard(segment, 41.25)
        return MADE

    monkeypatch.setattr(gemsmith, "load", lambda name, **given: FakeLM())
    monkeypatch.setattr(worker, "transcribe", heard_all)
    return lambda *options: CliRunner().invoke(app, ["transcribe", "talk.mp3", *options])


def test_the_text_goes_to_stdout_and_problems_to_stderr(command: Any):
    result = command()
    assert result.stdout == "Hello there. Bye.\n"
    assert "28.5-30.0 s: the model repeats itself" in result.stderr
    assert result.exit_code == 0


def test_subtitles_have_times(command: Any):
    assert command("--srt").stdout == (
        "1\n00:00:00,000 --> 00:00:28,500\nHello there.\n\n2\n00:00:30,000 --> 00:00:41,250\nBye.\n"
    )


def test_json_has_segments_and_problems(command: Any):
    found = json.loads(command("--json").stdout)
    assert found["text"] == "Hello there. Bye."
    assert found["segments"][2] == {"start_s": 30.0, "end_s": 41.25, "text": "Bye."}
    assert found["problems"] == ["28.5-30.0 s: the model repeats itself"]


def test_two_forms_at_once_are_refused(command: Any):
    result = command("--json", "--srt")
    assert result.exit_code == 2
    assert result.stderr == "error: choose one of --srt and --json\n"
