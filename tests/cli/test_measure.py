"""`gemsmith choose --measure`: the table, JSON, exit codes; the asking itself is faked."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gemsmith.cli.main import app
from gemsmith.errors import RequestError
from gemsmith.evals import measure as module
from gemsmith.evals.measure import Asked, Candidate, Task


class Fake(Asked):
    """Right at the first task, wrong at the others; fails where its name says so."""

    def __init__(self, candidate: Candidate, max_tokens: int) -> None:
        self.quant = candidate.quant

    def ask(self, task: Task) -> dict[str, Any]:
        if self.quant == "int2" and task.id == "2":
            raise RequestError("its process ended")
        if self.quant == "int8":
            raise KeyboardInterrupt
        return {
            "task": task.id, "wrong": None if task.id == "1" else "other words", "first_s": 0.5,
            "total_s": 2.0, "tokens": 9, "tokens_per_s": 6.0, "peak_bytes": 300 << 20,
            "weights_bytes": 1 << 20, "reply": "x",
        }  # fmt: skip

    def close(self) -> None:
        pass


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_Process", Fake)
    path = tmp_path / "tasks.jsonl"
    lines = ({"prompt": i, "expected": {"exact": i}} for i in "abcdef")
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["choose", "--measure", *options], env={"COLUMNS": "110"})


def test_a_row_a_model_with_intervals(tasks: Path) -> None:
    result = run(str(tasks), "pocket")
    assert result.exit_code == 0, result.output
    [row] = [line for line in result.output.splitlines() if line.strip().startswith("pocket")]
    assert row.split("  ")[1:2] == ["pocket *"]
    for words in ("1 of 6", "3 - 56 %", "2 (2 - 2)", "0.5", "300 MiB"):
        assert words in row
    assert "tasks.measured.jsonl" in result.output.replace("\n", "")
    again = run(str(tasks), "pocket")
    assert again.stderr.startswith("6 of 6 answers are in ")


def test_json_is_one_object(tasks: Path) -> None:
    facts = json.loads(run(str(tasks), "pocket", "--json").stdout)
    assert (facts["complete"], facts["tasks"]) == (True, 6)
    assert facts["models"][0]["correct"] == 1
    assert facts["results"].endswith("tasks.measured.jsonl")


def test_a_model_that_could_not_be_asked_everything_is_exit_code_1(tasks: Path) -> None:
    result = run(str(tasks), "pocket", "pocket:int2")
    assert result.exit_code == 1
    assert "pocket:int2: asked 1 of 6: its process ended" in result.output


def test_ctrl_c_shows_what_is_known(tasks: Path) -> None:
    result = run(str(tasks), "pocket", "pocket:int8")
    assert result.exit_code == 130
    assert "6 tasks, PARTIAL" in result.output
    assert "1 of 6" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--measure: name the models to ask: pocket, or folders"),
        (["pocket", "--max-tokens", "0"], "max tokens 0: must be from 1 to 32768"),
        (["no-such-folder"], "no folder 'no-such-folder'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(tasks: Path, options: list[str], message: str) -> None:
    result = run(str(tasks), *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
