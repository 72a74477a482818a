"""`gemsmith demo`: what is right gets a tick, what is wrong does not, and the tool loop decides."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tests.cli.fake import FakeLM, Reply
from typer.testing import CliRunner

import gemsmith
from gemsmith.cli.main import app
from gemsmith.cli.tour import ERRANDS, SAMPLES, WANTED, Tour, long_text
from gemsmith.engine.engine import LM
from gemsmith.errors import CapacityError, MediaError
from gemsmith.testing import media_ids, random_towers, tiny_config, tiny_media_config
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


FACTS = json.loads((SAMPLES / "samples.json").read_text("utf-8"))
SCENE, FILM = FACTS["scene.png"], FACTS["film.mp4"]


def detected(*boxes: list[int]) -> Reply:
    return say(f"```json\n{json.dumps([{'box_2d': box, 'label': 'it'} for box in boxes])}\n```")


MEDIA: list[Reply] = [
    say(f"The {SCENE[0]['shape']} is {SCENE[0]['color']}."),
    *(detected(fact["box_2d"]) for fact in SCENE),
    say(FACTS["text.png"]),
    say(f"The {FILM[-1]['shape']} is {FILM[-1]['color']}."),
    call("list_events", date=FACTS["command.wav"]["date"]),
    say("Events on Monday (1): water the roses at 16:00."),
]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run `gemsmith demo` over scripted replies; media: those of a model with towers."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(
        talks: list[Reply],
        errands: list[Reply],
        media: list[Reply] | None = None,
        *,
        quant: str | None = None,
        serve: bool = False,
    ) -> Any:
        lm: Any = FakeLM(*talks, *errands, *(media or []))
        lm.config = tiny_config("E2B") if media is None else tiny_media_config("E2B")
        lm.tokenizer = SimpleNamespace(encode=str.split)
        loaded: dict[str, Any] = {}

        def load(name: str, *, progress: Any, **given: Any) -> Any:
            loaded.update(given)
            return lm

        monkeypatch.setattr(gemsmith, "load", load)
        chosen = ["--quant", quant] if quant else []
        chosen += ["--serve"] if serve else []
        result: Any = CliRunner().invoke(app, ["--debug", "demo", *chosen])
        result.loaded = loaded
        assert lm.replies == [], f"not asked for: {lm.replies}\n{result.output}"
        result.asked = lm.asked
        return result

    return run


def test_a_model_that_is_right_passes(demo: Any):
    result = demo(TALKS, LOOP)
    assert result.exit_code == 0, result.output
    assert "6 of 6 right" in result.output
    assert "In the calendar now: 'plant the olive tree' on June 12 at 09:30" in result.output
    assert "generated text to speak" in " ".join(result.output.split())


def test_speed_and_memory_are_said_at_the_end(demo: Any):
    output = " ".join(demo(TALKS, LOOP).output.split())
    # Of every reply of the fake: one token after the first, in a tenth of a second.
    assert "Weights of int4: 10 tokens a second, one after the other; 1.00 MiB of weights" in output
    assert "in the whole process at its peak." in output
    assert "quantized to int4 while loading" in output


def test_the_weights_of_the_tour_are_of_four_bits_unless_asked_otherwise(
    demo: Any,
):
    assert demo(TALKS, LOOP).loaded == {"quant": "int4"}
    result = demo(TALKS, LOOP, quant="none")
    assert result.loaded["quant"] is None
    assert "Weights of floats: 10 tokens" in result.output


def test_it_serves_after_the_tour_if_asked_until_ctrl_c(demo: Any, monkeypatch):
    served: dict[str, Any] = {}

    def run(model: str, **given: Any) -> None:
        served.update(given, model=model)
        raise KeyboardInterrupt

    monkeypatch.setattr("gemsmith.cli.serve.run", run)
    assert demo(TALKS, LOOP).exit_code == 0
    assert served == {}
    result = demo(TALKS, LOOP, serve=True)
    assert result.exit_code == 0, result.output
    chosen = [served[name] for name in ("model", "host", "port", "quant")]
    assert chosen == ["pocket", "127.0.0.1", 0, "int4"]
    demo(TALKS, LOOP, serve=True, quant="none")
    assert served["quant"] is None
    wrong = demo(TALKS, [say("Done.")] * len(ERRANDS), serve=True)
    assert wrong.exit_code == 1  # the tour's verdict stays


def test_it_says_before_the_tour_that_it_cannot_serve(monkeypatch):
    monkeypatch.setattr("gemsmith.cli.serve.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["demo", "--serve"])
    assert done.exit_code == 2
    assert "pip install 'gemsmith[serve]'" in done.stderr
    assert done.stdout == ""


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


def test_a_model_with_towers_is_shown_and_told_the_samples(demo: Any):
    result = demo(TALKS, LOOP, MEDIA)
    assert result.exit_code == 0, result.output
    assert "9 of 9 right" in result.output
    assert "film.mp4: 3 frames x 63 tokens = 189 tokens" in result.output
    assert "> [command.wav] (a voice: what is on my calendar on Monday)" in result.output
    assert '<- {"count": 1, "events": ["water the roses at 16:00"]}' in result.output
    assert "generated text, pictures and speech" in " ".join(result.output.split())
    contents = [messages[0]["content"] for messages, _ in result.asked]
    shown = [content for content in contents if isinstance(content, list)]
    scene = {"type": "image", "image": SAMPLES / "scene.png"}
    assert shown[:2] == [
        [scene, {"type": "text", "text": f"What color is the {SCENE[0]['shape']}?"}],
        [scene, {"type": "text", "text": f"Detect the {SCENE[0]['color']} {SCENE[0]['shape']}."}],
    ]
    assert shown[4][0] == {"type": "image", "image": SAMPLES / "text.png"}
    assert shown[5][0] == {"type": "video", "video": SAMPLES / "film.mp4", "frames": 3}
    assert shown[6] == [{"type": "audio", "audio": SAMPLES / "command.wav"}]


def test_the_boxes_are_drawn_on_a_copy_that_stays_and_replaces_nothing(demo: Any, tmp_path: Path):
    original = np.asarray(Image.open(SAMPLES / "scene.png"))
    for _ in range(2):
        output = demo(TALKS, LOOP, MEDIA).output
        named = re.search(r"drawn on a copy, which stays: (.+)\n", output)
        assert named is not None
        drawn = np.asarray(Image.open(named[1]))
        for fact in SCENE:
            y0, x0, _, x1 = fact["box_2d"]
            row, columns = y0 * 300 // 1000, slice(x0 * 400 // 1000, x1 * 400 // 1000)
            assert (drawn[row, columns] != original[row, columns]).any(-1).all()
    assert len(list(tmp_path.glob("gemsmith-demo-*.png"))) == 2
    assert (np.asarray(Image.open(SAMPLES / "scene.png")) == original).all()


@pytest.mark.parametrize(
    ("at", "replies", "truth"),
    [
        (0, [say("The square is black.")], "✗ it is red"),
        (0, [say("It is red or pink.")], "✗ it is red"),
        (2, [detected([0, 0, 300, 300])], "✗ the box is [200, 510, 480, 720]"),
        (2, [detected(SCENE[1]["box_2d"], SCENE[0]["box_2d"])], "✗ the box is [200, 510, 480"),
        (2, [say("There is none.")], "✗ the box is [200, 510, 480, 720]"),
        (4, [say("CPC")], "✗ it says CPCV"),
        (5, [say(f"The square is {FILM[0]['color']}.")], "✗ it is orange"),
        (6, [call("list_events", date="Sunday")], "✗ the answer does not name water the roses"),
    ],
)
def test_what_was_seen_or_heard_wrong_is_told_and_forgiven(
    demo: Any, at: int, replies: list[Reply], truth: str
):
    media = [*MEDIA[:at], *replies, *MEDIA[at + len(replies) :]]
    if at == 6:
        media[-1] = say("Events on Sunday (0): none.")
    result = demo(TALKS, LOOP, media)
    assert truth in result.output
    assert "8 of 9 right" in result.output
    assert result.exit_code == 0


def test_an_error_over_a_sample_is_told_and_the_tour_goes_on(demo: Any):
    result = demo(TALKS, LOOP, [[MediaError("no towers")], *MEDIA[5:]])
    assert "error: no towers" in result.output
    assert "8 of 9 right" in result.output
    assert result.exit_code == 0


def test_nothing_found_draws_nothing(demo: Any, tmp_path: Path):
    media = [MEDIA[0], say("none"), say("[]"), say("?"), *MEDIA[4:]]
    output = demo(TALKS, LOOP, media).output
    assert "No box was found: nothing is drawn." in output
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_model_does_the_errands():
    """The one test here of what pocket has learned: without it `gemsmith demo` fails."""
    console = Console(record=True, width=100)
    tour = Tour(gemsmith.load("pocket", device="cpu", quant="int4"), console)
    tour.tool_loop()
    assert tour.events == WANTED, console.export_text()


def test_untrained_towers_are_wrong_and_nothing_else():
    """The samples go through the real engine: read, cut, counted, and answered without sense."""
    pocket = gemsmith.load("pocket", device="cpu")
    special, tiny = pocket.tokenizer.special, tiny_media_config("E2B")
    config = replace(
        pocket.config,
        vision_config=replace(tiny.vision_config, default_output_length=70),
        audio_config=tiny.audio_config,
        **media_ids(special),
    )
    towers = random_towers(config)
    lm = LM(pocket.model, pocket.tokenizer, config, end_ids=pocket.end_ids, towers=lambda: towers)
    console = Console(record=True, width=100)
    tour = Tour(lm, console)
    tour.talker.options["max_tokens"] = 12
    tour.film()  # a color that is named by chance may be right
    assert [stop() for stop in (tour.picture, tour.command)] == [False] * 2
    output = console.export_text()
    assert "[film.mp4] What color" in output
    assert output.count("✗") >= 5
    assert "error" not in output


def test_the_long_text_is_as_long_as_asked_and_begins_with_the_fact():
    text = long_text("The code is 7.", lambda text: len(text.split()), 500)
    assert text.startswith("The code is 7. The ")
    assert 500 <= len(text.split()) < 510
