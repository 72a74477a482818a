"""`gemsmith generate`: where the message and the tools come from."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

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
    parts = with_dropped_files(f"{sound} {film} Compare")
    assert [part["type"] for part in parts] == ["video", "text", "audio"]
    assert with_dropped_files(f" {film} ") == [{"type": "video", "video": str(film)}]


@pytest.mark.parametrize(
    "line", ["see gone.png", "it's \"odd", "notes.txt", "/think on", "a\0.png"]
)
def test_words_that_are_no_media_files_stay_words(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert with_dropped_files(line) == line
