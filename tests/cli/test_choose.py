"""`gemsmith choose`: the decision for people and for programs; exit codes; errors."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gemsmith import fit, probe
from gemsmith.cli.main import app
from gemsmith.fit import Target


def run(*options: str) -> Result:
    return CliRunner().invoke(app, ["choose", *options], env={"COLUMNS": "100"})


def test_a_decision_is_explained() -> None:
    result = run("--device", "RTX 4090")
    assert result.exit_code == 0, result.output
    first, second, *_ = result.output.splitlines()
    assert first == "on GeForce RTX 4090: 22.56 GiB to use"
    assert second == "31B int4  (google/gemma-4-31B-it)"
    for words in (
        "runner-up: 26B-A4B int4",
        "  if it must hear: 12B int8",
        "MMLU Pro",
        "ai.google.dev/gemma/docs/core/model_card_4",
        "what int4 costs is not published",
    ):
        assert words in result.output


def test_json_says_the_same() -> None:
    facts = json.loads(run("--device", "rtx-4090", "--json").output)
    assert (facts["choice"]["size"], facts["choice"]["format"]) == ("31B", "int4")
    assert facts["choice"]["scores"]["mmlu-pro"]["score"] == 85.2
    assert facts["runner_up"]["model"] == "google/gemma-4-26B-A4B-it"
    assert {"what": "if it must hear", "then": "12B int8"} in facts["changes"]


def test_nothing_that_will_do_is_exit_code_1_with_the_closest_three() -> None:
    result = run("--memory", "1.5GB", "--task", "code")
    assert result.exit_code == 1
    assert "no size of Gemma 4 will do. What comes closest:" in result.output
    assert result.output.count(" are missing\n") == 3
    facts = json.loads(run("--memory", "1.5GB", "--json").output)
    assert facts["choice"] is None
    assert len(facts["closest"]) == 3


def test_what_is_a_guess_or_depends_on_the_weights_is_said() -> None:
    reasons = {
        "raspberry-pi-5-8gb": "the shares were measured on x86-64, on arm64 none were",
        "rtx-4090": "50% of what the machine allows; on such nothing was measured yet",
    }
    for device, why in reasons.items():
        output = run("--device", device).output
        assert f"~ a guess: {why}" in output
        assert ("that memory bandwidth allows, a guess\n" in output) == (device[:3] == "ras")
        assert re.search(r"GiB +~\d", output)
        assert ("keeps free ones" in output) == (device[:3] == "ras")
        options = json.loads(run("--device", device, "--json").output)["options"]
        assert all(option["guess"].startswith(why) for option in options)
    said = run("--device", "raspberry-pi-5-8gb", "--speed", "20").output
    assert re.search(r"~[\d.]+ tokens a second for each user, 20 are asked", said)


def test_floors_are_of_the_leading_score_or_by_name() -> None:
    facts = json.loads(
        run("--task", "agents", "--memory", "500GB", "--quality", "60", "--quality", "gpqa=80",
            "--json").output
    )  # fmt: skip
    assert facts["needs"]["quality"] == {"tau2": 60.0, "gpqa": 80.0}


def test_this_machine_is_what_fit_finds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dict.fromkeys(probe.RATES, 2e11)
    here = Target("this machine", "cpu", 7 << 30, 20e9, rates, "measured")
    monkeypatch.setattr(fit, "this_machine", lambda *_, **__: here)
    facts = json.loads(run("--json").output)
    assert facts["machine"]["name"] == "this machine"
    assert facts["machine"]["memory_bytes"] == 7 << 30
    assert facts["choice"]["tokens_per_s_at_most"] > 0


def test_answers_in_half_a_second_without_torch() -> None:
    code = (
        "import sys, time; from gemsmith.cli.main import app\n"
        "try: app(['choose', '--device', 't4', '--json'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert time.process_time() < 1.0, time.process_time()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "rtx-4080"], "no device 'rtx-4080'. Did you mean rtx-4090"),
        (["--memory", "0"], "memory '0': write a size, such as 12GB"),
        (["--memory", "lots"], "memory 'lots': write a size"),
        (["--context", "long"], "context 'long': write tokens, such as 8192, 32K"),
        (["--quality", "good"], "quality 'good': give a score such as 70, or a name with it"),
        (["--quality", "glue=7"], "quality 'glue': no such score; known: mmlu-pro"),
        (["--users", "0"], "users 0: must be from 1"),
        (["pocket"], "pocket: models are measured with --measure TASKS.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_one_line(options: list[str], message: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")


def test_the_example_of_the_readme_is_what_is_printed() -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    [example] = re.findall(r"^```\n\$ gemsmith (choose .*?)^```", page, re.M | re.S)
    command, *lines = example.splitlines()
    printed = CliRunner().invoke(app, shlex.split(command)).output.splitlines()
    assert lines[-1].strip() == "..."
    assert all(line in printed for line in lines[:-1])
