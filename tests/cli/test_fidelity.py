"""`gemsmith eval fidelity`: reports for people and programs, the gate, the report that is kept."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from benchmarks import random_checkpoint
from gemsmith.cli import fidelity as worker
from gemsmith.cli.info import fidelity as headline
from gemsmith.cli.main import app
from gemsmith.evals import fidelity
from gemsmith.evals.fidelity import Report

TOOL = {"type": "function", "function": {"name": "sine"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two builds, a and b, and conversations with replies, one with a tool."""
    base = tmp_path_factory.mktemp("fidelity")
    config = random_checkpoint.config_of("tiny-E2B")
    for seed, name in enumerate("ab"):
        random_checkpoint.write(config, base / name, seed=seed)
    messages = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "Yes."}]
    lines = [
        {"messages": messages, "category": "[bold]short"},
        {"messages": messages, "tools": [TOOL], "category": "tools"},
    ]
    (base / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return base


@pytest.fixture(autouse=True)
def short_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "MAX_TOKENS", 6)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def run(folder: Path, b: str, *options: str) -> Result:
    arguments = ["eval", "fidelity", str(folder / "a"), str(folder / b)]
    data = ["--data", str(folder / "talks.jsonl")]
    return CliRunner().invoke(app, [*arguments, *data, *options])


def test_json_is_the_whole_report_and_nothing_else(folder: Path) -> None:
    result = run(folder, "b", "--json", "--max-kl", "1000")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["complete"], facts["conversations"], facts["data"]) == (True, 2, "talks.jsonl")
    assert facts["replies"]["all"]["positions"] == 10
    assert set(facts["replies"]["categories"]) == {"[bold]short", "tools"}
    assert list(facts["tools"]["categories"]) == ["tools"]
    assert facts["replies"]["all"]["kl"]["mean"] > 0
    assert facts["gate"]["broken"] == []
    assert facts["gate"]["bounds"]["max_kl"] == 1000


def test_a_broken_bound_is_exit_code_1_and_one_line(folder: Path) -> None:
    result = run(folder, "b", "--max-kl", "1e-6", "--save")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("fidelity: mean KL ")
    assert line.endswith("> --max-kl 1e-06")
    # What was found is a fact, whatever was hoped for.
    kept = json.loads((folder / "b" / "fidelity.json").read_text())
    assert len(kept["gate"]["broken"]) == 1
    same = run(folder, "a", "--min-top1", "100", "--max-kl", "0", "--max-validity-loss", "0")
    assert (same.exit_code, same.stderr) == (0, "")
    assert "no difference at any of 10 reply positions: KL 0, top-1 100 %" in same.stdout


def test_tables_fit_into_80_columns_and_hold_every_category(folder: Path) -> None:
    result = run(folder, "b")
    lines = result.stdout.splitlines()
    assert not [line for line in lines[1:] if len(line.rstrip()) > 80]
    for words in ("[bold]short", "tools: valid", "all prompts", "99.9 %", "B / A", "hardly more"):
        assert words in result.stdout
    assert "…" not in result.stdout


def test_a_saved_report_is_shown_by_info(folder: Path) -> None:
    result = run(folder, "b", "--save")
    assert result.exit_code == 0, result.output
    kept = json.loads((folder / "b" / "fidelity.json").read_text())
    # Not where they lay on the machine that compared them.
    assert (kept["reference"], kept["build"], kept["complete"]) == ("a", "b", True)
    assert list((folder / "b").glob("*.part")) == []
    top1 = 100 * kept["replies"]["all"]["top1"]
    shown = CliRunner().invoke(app, ["info", str(folder / "b")]).output
    assert f"fidelity beside a: top-1 {top1:.2f} %, mean KL " in shown
    assert "valid tool calls +0.0 points (10 positions)" in shown
    facts = json.loads(CliRunner().invoke(app, ["info", str(folder / "b"), "--json"]).output)
    assert facts["fidelity"].startswith("beside a: top-1")
    assert "fidelity" not in CliRunner().invoke(app, ["info", str(folder / "a")]).output


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[" * 10**5, '{"replies": {"all": null}}',
     '{"replies": {"all": {"top1": NaN, "kl": {"mean": 0}, "positions": 1}}, "tools": null, '
     '"reference": "a"}'],
)  # fmt: skip
def test_a_damaged_report_is_said_to_be_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fidelity.json"
    path.write_text(text)
    assert headline(path).startswith("fidelity.json cannot be read (")


def test_a_name_in_a_report_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.json"
    scores = {"top1": 0.995, "kl": {"mean": 0.001}, "positions": 2000}
    report = {"replies": {"all": scores}, "tools": None, "reference": "\x1b[2Jpocket\n" + "x" * 99}
    path.write_text(json.dumps(report))
    wanted = "beside [2Jpocket" + "x" * 71 + ": top-1 99.50 %, mean KL 0.001 (2,000 positions)"
    assert headline(path) == wanted


@pytest.mark.parametrize("build", ["pocket", "google/gemma-4-E2B-it", "./nowhere"])
def test_a_report_is_kept_in_local_folders_alone(build: str) -> None:
    result = CliRunner().invoke(app, ["eval", "fidelity", "pocket", build, "--save"])
    assert result.exit_code == 2
    assert f"{build!r} is no local folder" in result.stderr


def test_a_folder_that_takes_no_file_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**where: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(worker.tempfile, "TemporaryFile", refuse)
    result = run(folder, "b", "--save")
    assert result.exit_code == 2
    assert "b cannot be written to (Permission denied); use --json" in result.stderr


def test_ctrl_c_shows_what_there_is_and_keeps_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = fidelity._compare

    def once(a: Any, b: Any, case: Any) -> Any:
        if case.category == "tools":
            raise KeyboardInterrupt
        return compare(a, b, case)

    monkeypatch.setattr(fidelity, "_compare", once)
    result = run(folder, "b", "--save", "--max-kl", "0")
    assert result.exit_code == 130
    assert "1 conversations, PARTIAL: stopped after 1" in result.stdout
    assert "fidelity.json is not written: the report is partial" in result.stderr
    assert not (folder / "b" / "fidelity.json").exists()
    partial = json.loads(run(folder, "b", "--json").stdout)
    assert partial["complete"] is False
    assert "gate" not in partial


def test_nothing_compared_is_said() -> None:
    text = io.StringIO()
    worker.show(Report("a", "b", "talks"), Console(file=text))
    assert "b beside a, talks: 0 conversations, PARTIAL: stopped after 0" in text.getvalue()
    assert "nothing was compared" in text.getvalue()


@pytest.mark.parametrize("build", ["a", "b"])
def test_a_chart_is_drawn(folder: Path, build: str) -> None:
    pytest.importorskip("matplotlib")
    path = folder / "chart.png"
    result = run(folder, build, "--plot", str(path))
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_chart_that_cannot_be_drawn_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "must end in one of .png, .svg, .pdf" in run(folder, "b", "--plot", "chart.gif").stderr
    nowhere = str(folder / "none" / "chart.png")
    assert "there is no folder" in run(folder, "b", "--plot", nowhere).stderr
    monkeypatch.setattr("gemsmith.cli.plot.find_spec", lambda name: None)
    result = run(folder, "b", "--plot", str(folder / "chart.png"))
    assert result.exit_code == 2
    assert "--plot needs matplotlib; install gemsmith[train]" in result.stderr


def test_bad_data_and_bad_bounds_are_one_line(folder: Path) -> None:
    (folder / "talks.jsonl").write_text('{"messages"')
    for options in ([], ["--min-top1", "995"]):
        result = run(folder, "b", *options)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
    assert "--min-top1 995" in result.stderr


def test_other_evaluations_are_usage_errors() -> None:
    result = CliRunner().invoke(app, ["eval", "bogus"])
    assert result.exit_code == 2
    assert "bogus" in result.stderr
