"""`gemsmith chat`: the conversation that is kept, the commands, Ctrl-C at a real terminal."""

import json
import os
import select
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tests.cli.fake import FakeLM, fake

from gemsmith.cli.chat import COMMANDS, Session
from gemsmith.cli.desk import Desk, make_folder
from gemsmith.cli.talk import Talker
from gemsmith.errors import CapacityError, RequestError
from gemsmith.media.source import locate
from gemsmith.text.calls import Problem, ToolCall
from gemsmith.text.stream import Content, Thinking, ToolCallEvent, ToolProblem


class Chat:
    """A session over scripted replies, and what it printed."""

    def __init__(self, folder: Path, *replies: Any) -> None:
        self.screen = StringIO()
        self.lm: Any = FakeLM(*replies)
        self.talker = Talker(self.lm, Console(file=self.screen, width=80))
        make_folder(folder)
        self.session = Session(self.talker, Desk(folder).toolbox())

    @property
    def roles(self) -> list[str]:
        return [message["role"] for message in self.session.messages]


@pytest.fixture
def chat(tmp_path: Path) -> Any:
    return lambda *replies: Chat(tmp_path, *replies)


def test_answers_are_shown_and_kept(chat: Any):
    made = chat([Content("Hel"), Content("lo")], [Content("Bye")])
    made.session.answer("Hi")
    made.session.answer("Go")
    assert made.screen.getvalue() == "Hello\nBye\n"
    assert made.lm.asked[1][0] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Go"},
    ]


def test_a_thought_ends_its_line_before_the_answer(chat: Any):
    made = chat([Thinking("1 + 1"), Content("2")])
    made.session.answer("?")
    assert made.screen.getvalue() == "1 + 1\n2\n"


def test_tools_run_and_their_results_go_back(chat: Any):
    call = ToolCall("list_files", {"path": "plans"})
    made = chat([ToolCallEvent(call)], [Content("Two.")])
    made.session.command("/tools on")
    made.session.answer("Which files?")
    assert '-> list_files(path="plans")\n<- {"count": 2' in made.screen.getvalue()
    assert made.lm.asked[1][0][1]["tool_responses"][0]["response"]["files"] == [
        "garden.txt",
        "trip.txt",
    ]
    assert len(made.lm.asked[0][1]["tools"]) == 6


def test_without_tools_none_are_declared(chat: Any):
    made = chat([Content("Hello")])
    made.session.answer("Hi")
    assert made.lm.asked[0][1]["tools"] is None


def test_an_unreadable_call_is_shown(chat: Any):
    made = chat([ToolProblem(Problem("truncated", "the text ends inside a tool call", "<x"))])
    made.session.answer("Hi")
    assert "unreadable tool call: the text ends inside a tool call: <x" in made.screen.getvalue()


def test_a_reply_stopped_by_ctrl_c_stays_as_far_as_it_got(chat: Any):
    made = chat([Content("One, two"), KeyboardInterrupt()], [Content("Yes")])
    made.session.answer("Count")
    made.session.answer("On?")
    assert "(stopped)" in made.screen.getvalue()
    assert made.session.messages[1] == {"role": "assistant", "content": "One, two"}
    assert made.roles == ["user", "assistant"] * 2


def test_a_question_stopped_before_any_reply_is_forgotten(chat: Any):
    made = chat([KeyboardInterrupt()])
    made.session.answer("Count")
    assert made.session.messages == []


def test_a_reply_stopped_before_its_first_word_does_not_repeat_the_last_one(chat: Any):
    made = chat([Content("One")], [KeyboardInterrupt()])
    made.session.answer("Count")
    made.session.answer("On")
    assert [message["content"] for message in made.session.messages] == ["Count", "One"]


def test_ctrl_c_while_results_are_shown_keeps_the_step_once(
    chat: Any, monkeypatch: pytest.MonkeyPatch
):
    call = ToolCall("get_time", {})
    made = chat([Content("Let me look."), ToolCallEvent(call)])
    made.session.command("/tools on")

    def interrupt(value: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("gemsmith.cli.chat.short", interrupt)
    made.session.answer("Time?")
    assert made.roles == ["user", "assistant"]
    assert made.session.messages[1]["tool_responses"][0]["name"] == "get_time"


def test_a_thought_that_was_stopped_is_no_reply(chat: Any):
    made = chat([Thinking("Let me see"), KeyboardInterrupt()])
    made.session.answer("Count")
    assert made.session.messages == []


def test_an_error_is_shown_and_the_question_is_forgotten(chat: Any):
    made = chat([CapacityError("no memory for 9 tokens")], [Content("Hello")])
    made.session.answer("Long")
    assert "error: no memory for 9 tokens" in made.screen.getvalue()
    made.session.answer("Hi")
    assert made.roles == ["user", "assistant"]


def test_think_and_system_reach_the_model(chat: Any):
    made = chat([Content("a")], [Content("b")])
    made.session.command("/think on")
    made.session.command("/system Be brief.")
    made.session.answer("Hi")
    prompt, options = made.lm.asked[0]
    assert prompt[0] == {"role": "system", "content": "Be brief."}
    assert options["enable_thinking"] is True
    made.session.command("/think off")
    made.session.command("/system -")
    made.session.answer("Hi")
    prompt, options = made.lm.asked[1]
    assert prompt[0]["role"] == "user"
    assert options["enable_thinking"] is False


def test_reset_forgets_the_conversation_and_keeps_the_settings(chat: Any):
    made = chat([Content("a")], [Content("b")])
    made.session.command("/system Be brief.")
    made.session.answer("Hi")
    made.session.command("/reset")
    made.session.answer("Again")
    assert [message["role"] for message in made.lm.asked[1][0]] == ["system", "user"]


def test_save_writes_a_new_file_once(chat: Any, tmp_path: Path):
    made = chat([Content("Hello")])
    made.session.answer("Hi")
    made.session.command(f"/save {tmp_path / 'talk.json'}")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["content"] for message in saved] == ["Hi", "Hello"]
    with pytest.raises(RequestError, match=r"talk\.json exists already"):
        made.session.command(f"/save {tmp_path / 'talk.json'}")


def test_a_file_is_kept_as_it_was_shown(chat: Any, tmp_path: Path):
    picture = tmp_path / "pic.png"
    picture.write_bytes(b"first")
    made = chat([Content("A")], [Content("B")])
    made.session.answer(f"{picture} What is it?")
    picture.write_bytes(b"second")
    picture.rename(tmp_path / "gone.png")
    made.session.answer("And now?")
    for messages, _ in made.lm.asked:
        shown = messages[0]["content"][0]["image"]
        assert shown == b"first"
        assert locate(shown, "image") == (b"first", str(picture))
    made.session.command(f"/save {tmp_path / 'talk.json'}")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved[0]["content"] == [
        {"type": "image", "image": str(picture)},
        {"type": "text", "text": "What is it?"},
    ]


def test_a_file_too_large_to_keep_stays_a_path(
    chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gemsmith.cli.chat.MAX_KEPT_BYTES", 3)
    (tmp_path / "talk.mp3").write_bytes(b"long")
    made = chat([Content("A")])
    made.session.answer(f"{tmp_path / 'talk.mp3'}")
    assert made.lm.asked[0][0][0]["content"][0]["audio"] == str(tmp_path / "talk.mp3")


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_a_video_is_told_with_its_plan_and_saved_as_its_path(
    chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
):
    monkeypatch.setattr("gemsmith.cli.chat.MAX_KEPT_BYTES", limit)
    film = tmp_path / "film.mp4"
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:])
    made = chat([Content("A")], [Content("B")])
    made.lm.config = SimpleNamespace(audio_config=None)
    made.session.answer(f"What moves in {film}?")
    made.session.answer("And now?")
    assert made.screen.getvalue().count(f"{film}: 2 frames") == 1
    assert made.screen.getvalue().endswith("A\nB\n")
    made.session.command(f"/save {tmp_path / 'talk.json'}")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved[0]["content"][0] == {"type": "video", "video": str(film)}


def test_a_film_that_is_none_is_an_error_and_the_question_is_forgotten(chat: Any, tmp_path: Path):
    (tmp_path / "film.mp4").write_bytes(b"no film")
    made = chat()
    made.session.answer(f"{tmp_path / 'film.mp4'}")
    assert f"error: {tmp_path / 'film.mp4'}" in made.screen.getvalue()
    assert made.session.messages == []


def test_ctrl_c_while_a_film_is_looked_at_repeats_no_reply(
    chat: Any, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*given: Any) -> None:
        if given[0][-1]["content"] == "Second":
            raise KeyboardInterrupt

    monkeypatch.setattr("gemsmith.cli.chat.show_plans", interrupt)
    made = chat([Content("One")])
    made.session.answer("First")
    made.session.answer("Second")
    assert [message["content"] for message in made.session.messages] == ["First", "One"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/thinks on", "no command /thinks; did you mean /think?"),
        ("/xyz", "no command /xyz; /help lists them"),
        ("/think maybe", "/think takes on or off, not 'maybe'"),
        ("/tools", "/tools takes on or off, not ''"),
        ("/save", "/save needs a file name"),
        ("/save /nowhere/at/all", "cannot write /nowhere/at/all"),
    ],
)
def test_a_wrong_command_says_what_is_right(chat: Any, line: str, message: str):
    with pytest.raises(RequestError, match=message.replace("?", r"\?")):
        chat().session.command(line)


def test_help_lists_every_command(chat: Any):
    made = chat()
    assert made.session.command("/help") is True
    assert all(f"{command} " in made.screen.getvalue() for command in COMMANDS)
    assert made.session.command("/quit") is False


def test_a_model_cannot_steer_the_terminal():
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None)
    Talker(fake([Content("\x1b[2Jgone\r\x07")]), console).chat([])
    assert screen.getvalue() == "\ufffd[2Jgone\ufffd\ufffd\n"


TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests run in the background ignore it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.path.insert(0, {tests!r})
from pathlib import Path
from rich.console import Console
from tests.cli.fake import fake
from gemsmith.agent.tools import Toolbox
from gemsmith.cli.chat import Session
from gemsmith.cli.talk import Talker
from gemsmith.text.stream import Content
words = [Content(f"word{{i}} ") for i in range(2000)]
lm = fake(words, [Content("still here")], pause_s=0.01)
Session(Talker(lm, Console()), Toolbox(())).loop()
"""


def test_ctrl_c_at_a_terminal_stops_the_reply_and_keeps_the_session(tmp_path: Path):
    """A real terminal, a real signal: the reply stops, the next question is answered."""
    parent, child = os.openpty()
    code = TERMINAL.format(tests=str(Path(__file__).parents[2]))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    os.close(child)
    screen = ""

    def wait_for(text: str) -> None:
        nonlocal screen
        end = time.monotonic() + 60
        while text not in screen:
            ready, _, _ = select.select([parent], [], [], end - time.monotonic())
            assert ready, f"no {text!r} in {screen!r}"
            screen += os.read(parent, 4096).decode()

    try:
        wait_for("> ")
        os.write(parent, b"Count\n")
        wait_for("word3 ")
        os.write(parent, b"\x03")
        wait_for("(stopped)")
        os.write(parent, b"Are you there?\n")
        wait_for("still here")
        os.write(parent, f"/save {tmp_path / 'talk.json'}\n".encode())
        wait_for("messages in")
        os.write(parent, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved[1]["content"].startswith("word0 word1 word2 word3 ")
    assert saved[2:] == [
        {"role": "user", "content": "Are you there?"},
        {"role": "assistant", "content": "still here"},
    ]
