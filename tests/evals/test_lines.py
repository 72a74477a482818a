"""Files of JSON lines: what is read of them, and what is refused by name and number."""

from pathlib import Path
from typing import Any

import pytest

from gemsmith.errors import RequestError
from gemsmith.evals.lines import read_lines


def read(path: Path) -> list[tuple[str, Any]]:
    return list(read_lines(path, option="--data", kind="riddle"))


def test_lines_have_their_numbers_and_empty_ones_are_passed_over(tmp_path: Path):
    path = tmp_path / "some.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\r\n\r\n  \n[1]'.encode())
    assert read(path) == [(f"{path}:1", {"a": "x\u2028y"}), (f"{path}:4", [1])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\n{", r"some\.jsonl:2: not JSON \("),
        (b"1\n" + b"[" * 100_000, r"some\.jsonl:2: not JSON \("),
        (b"\xff\xfe\x00", r"some\.jsonl: not a text file \("),
        (b"\n \n", r"some\.jsonl is empty; give at least one riddle, one a line"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="gone does not exist; --data takes a JSON-lines file"):
        read(tmp_path / "gone")
    with pytest.raises(RequestError, match="not a text file"):
        read(tmp_path)
