"""`gemsmith detect` and `point`: what is asked, what is printed, what is drawn."""

import errno
import json
import os
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.cli.fake import FakeLM
from typer.testing import CliRunner

import gemsmith
from gemsmith.cli.main import app
from gemsmith.text.stream import Content

FOUND = '```json\n[{"box_2d": [250, 100, 750, 400], "label": "red kettle"}]\n```'


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run a command over one reply in an empty folder that holds photo.png, 200 x 100, grey."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (200, 100), "#888888").save("photo.png")

    def run(reply: str, *arguments: str) -> Any:
        lm = FakeLM([Content(reply)])
        monkeypatch.setattr(gemsmith, "load", lambda name, **given: lm)
        return CliRunner().invoke(app, list(arguments)), lm.asked

    return run


def test_boxes_are_printed_in_pixels_and_drawn_on_a_copy(command, tmp_path):
    result, asked = command(FOUND, "detect", "photo.png", "red kettle", "--budget", "140")
    assert result.exit_code == 0
    assert "red kettle" in result.stdout
    assert [n for n in result.stdout.split() if n.isdigit()] == ["20", "25", "80", "75"]
    [(messages, options)] = asked
    image, text = messages[0]["content"]
    assert image["image"].size == (200, 100)
    assert text == {"type": "text", "text": "Detect the red kettle."}
    assert options == {"temperature": 0, "image_budget": 140}
    drawn = np.asarray(Image.open(tmp_path / "photo.boxes.png"))
    changed = (drawn != 0x88).any(-1)
    assert changed[25:76, 20].all()
    assert changed[75, 20:81].all()
    assert not changed[30:70, 25:75].any()
    assert (np.asarray(Image.open(tmp_path / "photo.png")) == 0x88).all()


def test_the_budget_is_left_to_the_checkpoint(command):
    _, asked = command(FOUND, "detect", "photo.png", "red kettle")
    assert asked[0][1] == {"temperature": 0, "image_budget": None}


def test_json_has_places_pixels_problems_and_the_picture(command, tmp_path):
    reply = '[{"point": [500, 250], "label": "Save"}, {"point": [5000, 1]}]'
    result, asked = command(reply, "point", "photo.png", "Save button", "--json", "--out", "x.png")
    found = json.loads(result.stdout)
    assert found["points"] == [{"y": 500, "x": 250, "label": "Save", "pixels": [50.0, 50.0]}]
    assert found["boxes"] == []
    assert [p["kind"] for p in found["problems"]] == ["outside"]
    assert found["picture"] == "x.png"
    assert (tmp_path / "x.png").exists()
    assert asked[0][0][0]["content"][1]["text"] == "Point to the Save button."


def test_nothing_found_draws_nothing_and_says_so(command, tmp_path):
    result, _ = command("[]", "detect", "photo.png", "whale")
    assert result.stdout == "The model found none.\n"
    result, _ = command("A whale? Where?", "detect", "photo.png", "whale")
    assert result.stdout.startswith("no box or point in the answer: A whale? Where?")
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("detect", "gone.png", "x"), r"gone\.png"),
        (
            ("detect", "photo.png", "x", "--out", "no/where.png"),
            r"cannot save no/where\.png: .*--out",
        ),
        (
            ("detect", "photo.png", "x", "--out", "found.xyz"),
            r"cannot save found\.xyz: \.xyz is no format.*--out",
        ),
        (("detect", "photo.png", "x", "--out", "found"), r"cannot save found: no ending.*--out"),
        (("detect", "photo.png", "x", "--out", "."), r"cannot save \.: it is a folder.*--out"),
    ],
)
def test_bad_files_give_one_line_and_exit_2_before_the_model_is_asked(command, arguments, message):
    result, asked = command(FOUND, *arguments)
    assert result.exit_code == 2
    assert asked == []
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(message, result.stderr)


@pytest.mark.parametrize("out", [[], ["--out", "x.png"]])
def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_asked(
    command, monkeypatch, out
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    result, asked = command(FOUND, "detect", "photo.png", "kettle", *out)
    assert result.exit_code == 2
    assert asked == []
    assert re.search(
        r"cannot save (x|photo\.boxes)\.png: Permission denied; .*--out", result.stderr
    )


@pytest.mark.parametrize("as_json", [True, False])
def test_the_answer_is_printed_where_the_drawing_cannot_be_saved(command, monkeypatch, as_json):
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result, _ = command(FOUND, "detect", "photo.png", "kettle", *["--json"] * as_json)
    assert result.exit_code == 2
    assert "cannot save photo.boxes.png: No space left on device" in result.stderr
    assert "red kettle" in result.stdout
    if as_json:
        assert json.loads(result.stdout)["picture"] is None


def test_labels_are_text_and_never_control_the_terminal(command):
    label = "[red]" + "a" * 500 + "\\n\\u001b[31m"
    reply = f'[{{"box_2d": [0, 990, 1000, 1000], "label": "{label}"}}]'
    result, _ = command(reply, "detect", "photo.png", "x")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "[red]aaa" in result.stdout
