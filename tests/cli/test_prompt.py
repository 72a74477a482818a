"""`gemsmith generate`: where the message and the tools come from."""

import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemsmith.cli.prompt import MAX_PROMPT_BYTES, read_messages, read_tools, with_dropped_files
from gemsmith.errors import RequestError


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_the_argument_is_the_message():
    assert read_messages("Hello", None, None) == [{"role": "user", "content": "Hello"}]


def test_a_system_message_comes_first():
    messages = read_messages("Hello", None, "Be brief")
    assert [message["role"] for message in messages] == ["system", "user"]


def test_a_file_is_the_message(tmp_path: Path):
    (tmp_path / "prompt.txt").write_bytes("\ufeffGrüße\n".encode())
    [message] = read_messages(None, str(tmp_path / "prompt.txt"), None)
    assert message["content"] == "Grüße\n"


def test_stdin_is_the_message(monkeypatch: pytest.MonkeyPatch):
    stdin(monkeypatch, b"from a pipe")
    assert read_messages(None, None, None)[0]["content"] == "from a pipe"


def test_bytes_that_are_not_utf8_are_named_with_their_place(monkeypatch: pytest.MonkeyPatch):
    stdin(monkeypatch, b"caf\xe9 au lait")
    with pytest.raises(RequestError, match="stdin is not UTF-8: byte 0xe9 at offset 3"):
        read_messages(None, None, None)


def test_an_argument_that_is_not_utf8_is_refused():
    with pytest.raises(RequestError, match="the argument is not UTF-8: byte 0xff at offset 2"):
        read_messages("ab\udcff", None, None)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "latin"
    path.write_bytes(b"\xff")
    with pytest.raises(RequestError, match="latin is not UTF-8: byte 0xff at offset 0"):
        read_messages(None, str(path), None)


def test_an_endless_stdin_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    class Endless:
        def read(self, count: int) -> bytes:
            assert count <= MAX_PROMPT_BYTES + 1
            return b"a" * count

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Endless(), isatty=lambda: False))
    with pytest.raises(RequestError, match="stdin has more than 64 MiB"):
        read_messages(None, None, None)


def test_a_message_given_twice_is_refused():
    with pytest.raises(RequestError, match="as an argument or with --file, not both"):
        read_messages("Hello", "file", None)


def test_no_message_at_all_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(RequestError, match="no message: give it as an argument"):
        read_messages(None, None, None)


@pytest.mark.parametrize("data", [b"", b" \n\t"])
def test_an_empty_message_is_refused(monkeypatch: pytest.MonkeyPatch, data: bytes):
    stdin(monkeypatch, data)
    with pytest.raises(RequestError, match="the message is empty"):
        read_messages(None, None, None)


@pytest.mark.parametrize("name", ["missing.txt", ".", "nul\0"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str):
    with pytest.raises(RequestError, match="cannot read"):
        read_messages(None, str(tmp_path / name), None)


def test_tools_are_a_list(tmp_path: Path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"type": "function", "function": {"name": "f"}}]))
    assert read_tools(str(path))[0]["function"]["name"] == "f"
    path.write_text("{}")
    with pytest.raises(RequestError, match="holds a JSON dict; tools are a list such as"):
        read_tools(str(path))


@pytest.mark.parametrize("text", ["[", "[" * 200_000, "nothing"])
def test_tools_that_are_not_json_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "tools.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"tools.json is not JSON"):
        read_tools(str(path))


@pytest.mark.parametrize(
    "line",
    [
        "What is this? {path}",
        "'{path}' What is this?",
        'What is "{path}" this?',
        "What is this? {escaped}",
    ],
)
def test_a_file_dropped_on_the_terminal_goes_along(tmp_path, line):
    path = tmp_path / ("my photo.PNG" if "'" in line or '"' in line or "esc" in line else "p.png")
    path.write_bytes(b"")
    line = line.format(path=path, escaped=str(path).replace(" ", "\\ "))
    assert with_dropped_files(line) == [
        {"type": "image", "image": str(path)},
        {"type": "text", "text": "What is this?"},
    ]


def test_sounds_stand_behind_the_text_and_a_lone_file_has_none(tmp_path):
    sound, film = tmp_path / "a.mp3", tmp_path / "b.mp4"
    sound.write_bytes(b"")
    film.write_bytes(b"")
    parts: Any = with_dropped_files(f"{sound} {film} Compare")
    assert [part["type"] for part in parts] == ["video", "text", "audio"]
    assert with_dropped_files(f" {film} ") == [{"type": "video", "video": str(film)}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("what is in a.png?", "what is in?"),
        ("Describe a.png, please", "Describe, please"),
        ("(a.png)", ""),
        ("What is this? (a.png)", "What is this?"),
        ("What is this [a.png]?", "What is this?"),
        ("a.png: what is it?", "what is it?"),
        ("What's in a.png and what's it for?", "What's in and what's it for?"),
        ("'tis in a.png, isn't it", "'tis in, isn't it"),
        ("What is in 'a.png'?", "What is in?"),
        ("What is this ('a.png')?", "What is this?"),
        ("Is a.png, a.pngs or ba.png the a.png?!", None),
    ],
)
def test_a_file_is_found_beside_marks_and_apostrophes(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    image = {"type": "image", "image": "a.png"}
    if said is None:
        assert with_dropped_files(line) == [
            image, image, {"type": "text", "text": "Is, a.pngs or ba.png the?!"}
        ]  # fmt: skip
    else:
        text = [{"type": "text", "text": said}] if said else []
        assert with_dropped_files(line) == [image, *text]


def test_a_name_that_begins_with_a_bracket_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "(1).png").write_bytes(b"")
    image = {"type": "image", "image": "(1).png"}
    assert with_dropped_files("((1).png)") == [image]
    assert with_dropped_files("see (1).png.") == [image, {"type": "text", "text": "see."}]


def test_long_lines_are_read_once():
    began = time.process_time()
    for line in (
        "'" * 50_000,
        " '" * 50_000,
        "a" * 50_000,
        "a" + "!" * 50_000 + "x",
        "!" * 50_000,
        "('" * 50_000,
        "a.png!" * 9000,
    ):
        assert with_dropped_files(line) == line
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "line",
    [
        "open ~nosuchuser/a.png",
        "x" * 5000 + ".png",
        "see gone.png",
        "it's \"odd",
        "notes.txt",
        "/think on",
        "a\0.png",
    ],
)
def test_words_that_are_no_media_files_stay_words(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert with_dropped_files(line) == line
