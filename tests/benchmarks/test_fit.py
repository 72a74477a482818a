"""The comparison of `gemsmith fit` with measurements, and the page made from the command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fit as bench
from benchmarks import fit_page, measure, random_checkpoint, report
from gemsmith import fit, hardware, sizing
from gemsmith.engine.context import Context
from gemsmith.engine.engine import LM
from gemsmith.probe import Rates

CONFIG = random_checkpoint.config_of("tiny-E2B")


def row(format: str, **measured: float | None) -> dict[str, Any]:
    rates = {"bandwidth": 1e9, "float32": 1e11, "bfloat16": 5e11, "rows": 1e12, "groups": 6e11}
    made = {"model": "E2B", "format": format, "context": 512, "users": 2, "prompt": 256}
    text = CONFIG.text_config
    made |= {"layers": text.num_hidden_layers, "owned": text.first_kv_shared_layer, "rates": rates}
    return made | {"measured": {"weights": 1.0, "kv": 1.0, "peak": 1.0, **measured}}


def test_the_page_is_what_the_command_prints():
    assert fit_page.PAGE.read_text("utf-8") == fit_page.page(), "run: python -m benchmarks.fit_page"


def test_memory_is_predicted_for_all_users():
    found = bench.predicted(CONFIG, "int4", row("int4"))
    assert found["weights"] == sum(sizing.weight_bytes(CONFIG, "int4", "cpu").values())
    assert found["kv"] == sizing.kv_bytes(CONFIG.text_config, 512, 1, 2)
    memory = sizing.memory(CONFIG, "int4", 512, kv="int8", sequences=2, towers=False)
    assert found["peak"] == memory.total - 100 * CONFIG.text_config.vocab_size


def test_shares_taken_from_runs_predict_these_runs(monkeypatch: pytest.MonkeyPatch):
    rows = [row("int4", decode=1000.0, prefill=2e4), row("int8", decode=900.0, prefill=1e4)]
    rows.append(row("int4", decode=1000.0, prefill=1.99e4) | {"prompt": 512})
    for each in rows:
        each["predicted"] = bench.predicted(CONFIG, each["format"], each)
    records = bench.shares(rows, hardware.arch(), "here")
    kinds = [(record["kind"], record["what"]) for record in records]
    assert kinds == [(kind, what) for kind in ("rows", "groups") for what in ("decode", "prefill")]
    assert all(0 < r["share"][0] <= r["share"][1] <= r["share"][2] for r in records)
    monkeypatch.setattr(fit, "calibration", lambda: tuple(records))
    again = bench.predicted(CONFIG, "int4", rows[0])
    assert again["decode"] == pytest.approx(1000, rel=1e-3)
    for each in rows:  # of prompts two runs of a kind, two numbers
        said = bench.predicted(CONFIG, each["format"], each)["prefill"]
        assert said == pytest.approx(each["measured"]["prefill"], rel=1e-2)
    rows[0]["predicted"] = again
    assert bench.error(rows[0], "decode") == pytest.approx(again["decode"] / 1000 - 1)


def test_records_of_other_processors_are_kept(monkeypatch: pytest.MonkeyPatch):
    old = [{"arch": arch, "share": [1.0] * 3} for arch in ("x86-64", "arm64", "x86-64")]
    monkeypatch.setattr(fit, "calibration", lambda: tuple(old))
    new = [{"arch": "x86-64", "share": [0.5] * 3}]
    assert bench.with_others(new) == [old[1], *new]


def test_shares_and_layer_seconds_are_found_again():
    def seconds(bound: float, kv: float, layers: int) -> tuple[float, float, int, float]:
        return bound, kv, layers, bound / 0.8 + kv / 0.5 + layers * 1e-4

    points = [seconds(0.01, 0.001, 9), seconds(0.05, 0.001, 35), seconds(0.05, 0.02, 35)]
    assert bench.least_squares(points) == pytest.approx((1 / 0.8, 1 / 0.5, 1e-4))
    # One depth says nothing of layers; without K/V nothing is said of them.
    one_depth = [seconds(0.05, kv, 35) for kv in (0.001, 0.01, 0.02)]
    assert bench.least_squares(one_depth)[2] == 0
    no_kv = [seconds(0.01, 0, 9), seconds(0.05, 0, 35)]
    assert bench.least_squares(no_kv) == pytest.approx((1 / 0.8, 1 / 0.8, 1e-4))
    # No layer takes less than nothing.
    assert bench.least_squares([(0.01, 0.0, 9, 0.01), (0.05, 0.0, 35, 0.03)])[2] == 0


def test_a_prompt_takes_layer_seconds_in_all_layers_and_its_last_token_alone_as_any():
    each = row("int4", decode=1.0, prefill=256.0) | {"layers": 35, "owned": 15}
    each["predicted"] = {"bounds": {"prefill": 512.0, "last": 0.1}}
    assert bench._prompt(each, (2.0, 9.0, 0.01)) == pytest.approx((0.4, 256 * 15, 1 - 0.2 - 0.35))


def test_what_a_prompt_takes_is_found_again_and_no_bound_is_beaten():
    def points(share: float, row: float) -> list[tuple[float, int, float]]:
        bounds = [(1.0, 512), (0.5, 256), (0.01, 512)]
        return [(bound, rows, bound / share + rows * row) for bound, rows in bounds]

    assert bench.line(points(0.5, 1e-4)) == pytest.approx((2.0, 1e-4))
    # All faster than the bound: it is kept, and no row takes less than nothing.
    assert bench.line(points(2.0, 0.0)) == (1.0, 0.0)
    slope, row = bench.line(points(1.25, 1e-4))
    assert slope == 1
    assert 0 < row < 1e-4
    assert bench.line([(1.0, 512, 2.0)]) == pytest.approx((2.0, 0.0))


def test_of_all_rounds_the_medians_count_and_of_rates_those_of_all_rows():
    def measured(round: int, context: int, decode: float, bandwidth: float) -> dict[str, Any]:
        made = row("int4", decode=decode, prefill=None)
        made["rates"] = made["rates"] | {"bandwidth": bandwidth}
        return made | {"machine": "m", "round": round, "context": context}

    rows = [
        *(measured(n, 512, decode, 1e9) for n, decode in enumerate((1, 9, 3))),
        *(measured(n, 8192, 5.0, 3e9) for n in range(2)),
    ]
    one, other = bench.merged(rows)
    assert (one["context"], one["measured"]["decode"], one["speeds"]) == (512, 3, [1, 9, 3])
    assert (other["context"], other["measured"]["decode"]) == (8192, 5.0)
    assert one["measured"]["prefill"] is None
    assert one["rates"]["bandwidth"] == other["rates"]["bandwidth"] == 1e9


def test_a_kind_without_record_has_no_error():
    each = row("int4", decode=10.0, prefill=10.0)
    each["predicted"] = {"decode": None, "prefill": 20.0}
    assert bench.error(each, "decode") is None
    assert bench.error(each, "prefill") == 1.0


def test_the_report_shows_every_error():
    each = row("int4", decode=10.0, prefill=10.0)
    each["errors"] = {"weights": 0.0, "kv": 0.0, "peak": 0.031, "decode": None, "prefill": -0.2}
    text = "\n".join(
        report.fit(
            {
                "model": "E2B",
                "rows": [each],
                "limits": bench.LIMITS,
                "worst": {"peak": 0.031, "prefill": 0.2},
                "calibrated_here": False,
                "runs": {"commit abc, 2026-01-01 00:00 UTC": 1},
            }
        )
    )
    assert "| E2B | int4 | 512 | 2 | +0.0% | +0.0% | +3.1% | - | -20.0% |" in text
    assert "peak 3.1% of 5.0%, prefill 20.0% of 25.0%" in text
    assert "when they were measured: 1 at commit abc, 2026-01-01 00:00 UTC." in text


def test_a_speed_that_was_not_measured_has_no_error_and_no_share():
    each = row("int4", decode=10.0, prefill=None)
    each["predicted"] = bench.predicted(CONFIG, "int4", each)
    assert bench.error(each, "prefill") is None
    assert [record["what"] for record in bench.shares([each], "arm64", "here")] == ["decode"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint.made("tiny-E2B", "4", tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("users", [1, 3])
def test_zeros_stand_for_a_prompt_up_to_its_last_pass(
    users: int, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    passes: list[tuple[int, int]] = []
    """Tokens held before, and run."""
    held: list[Context] = []
    run = Context.run

    def watched(self: Context, ids: list[int]) -> Any:
        passes.append((len(self.keys), len(ids)))
        assert self.kv.length == len(self.keys)
        held[:] = [self]
        return run(self, ids)

    monkeypatch.setattr(Context, "run", watched)
    monkeypatch.setattr(bench.probe, "measure", lambda _: Rates(*[1.0] * 5, cores=1))
    found = bench.worker(str(tiny), 2000, users)["measured"]
    prompts = [(0, 512)] * 6 if users == 1 else []
    prompts += [(0, n) for n in range(33, 49)]  # of a length that was not there before
    assert passes == [*prompts, (1440, 512), *((n, 1) for n in range(1952, 2000))]
    assert (found["prefill"] is None) == (users > 1)
    assert found["kv"] == sizing.kv_bytes(CONFIG.text_config, 2000, 1, users)
    assert len(held[0].keys) == 2000


@torch.inference_mode()
def test_all_that_is_reserved_is_written_to(tiny: Path):
    lm = LM.load(tiny, device="cpu")
    context = Context(lm.model, lm.kv)
    context.reserve(700)
    tensors = [t for layer in context.kv._layers.values() for t in layer.tensors.values()]
    for tensor in tensors:
        tensor.fill_(1)
    bench.fill(context, 600)
    assert (context.kv.length, len(context.keys)) == (600, 600)
    assert sum(tensor.nbytes for tensor in tensors) == context.nbytes
    assert not any(tensor.any() for tensor in tensors)


@pytest.mark.slow
def test_the_peak_is_that_of_a_whole_prompt(tiny: Path):
    def peak(chunk: int) -> int:
        code = (
            "from benchmarks import fit\n"
            f"fit.CHUNK_TOKENS = {chunk}\n"
            f"print(fit.worker({str(tiny)!r}, 4096, 2)['measured']['peak'])"
        )
        made = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, cwd=measure.REPOSITORY
        )
        return int(made.stdout)

    assert peak(bench.CHUNK_TOKENS) == pytest.approx(peak(4096), rel=0.01)


Go = Callable[..., tuple[list[tuple[int, int]], dict[str, Any]]]


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Go:
    """The command without a model: contexts and users that were measured, and its record."""

    def go(*arguments: str, stop: int | None = None, date: str = "now"):
        asked: list[tuple[int, int]] = []

        def measured(each: bench.Row) -> bench.Row:
            if len(asked) == stop:
                raise KeyboardInterrupt
            asked.append((each["context"], each["users"]))
            made = row("int4", decode=float(len(asked)), prefill=None)
            return {name: made[name] for name in ("rates", "prompt", "measured")}

        monkeypatch.setattr(bench, "measured", measured)
        monkeypatch.setattr(bench.measure, "now", lambda: date)
        monkeypatch.setattr(bench.measure, "commit", lambda: "abc")
        command = ["fit", "--models", "tiny-E2B", "--formats", "int4", "--contexts", "512", "1024"]
        command += ["--rounds", "1"]
        progress = ["--progress", str(tmp_path / "fit.jsonl")]
        monkeypatch.setattr("sys.argv", [*command, *progress, *arguments])
        try:
            bench.main()
        except SystemExit as end:
            return asked, {"end": str(end)}
        out = capsys.readouterr().out
        return asked, {**json.loads(out.splitlines()[-1]), "out": out}

    return go


ALL = [(512, 1), (512, 8), (1024, 1), (1024, 8)]


def test_a_run_that_was_stopped_goes_on_where_it_was(go: Go, tmp_path: Path):
    asked, told = go(stop=3, date="before")
    assert asked == ALL[:3]
    assert told["end"].startswith("stopped; the same command goes on from what ")
    progress = tmp_path / "fit.jsonl"
    # The third row was being written when the machine went down.
    progress.write_bytes(progress.read_bytes()[:-20])
    asked, record = go(date="now")
    assert asked == ALL[2:]
    assert record["runs"] == {"commit abc, before UTC": 2, "commit abc, now UTC": 2}
    assert [each["measured"]["decode"] for each in record["rows"]] == [1, 2, 1, 2]
    assert [(each["context"], each["users"]) for each in record["rows"]] == ALL
    assert "1 of 4: tiny-E2B int4, 512 x 1, round 1: 1.00 tok/s" in record["out"]
    assert "(measured before, commit abc, before UTC)" in record["out"]
    page = "\n".join(report.fit(record))
    assert "2 at commit abc, before UTC; 2 at commit abc, now UTC." in page
    assert go()[0] == []


def test_another_machine_measures_for_itself(go: Go, monkeypatch: pytest.MonkeyPatch):
    go()
    about = measure.machine() | {"threads": 99}
    monkeypatch.setattr(measure, "machine", lambda: about)
    assert go()[0] == ALL


def test_rates_of_another_kind_are_measured_anew(go: Go, monkeypatch: pytest.MonkeyPatch):
    go()
    monkeypatch.setattr(bench.probe, "VERSION", bench.probe.VERSION + 1)
    assert go()[0] == ALL


def test_fresh_forgets_what_is_asked_for_and_nothing_else(go: Go):
    go()
    assert go("--users", "8", "--fresh")[0] == ALL[1::2]
    assert go()[0] == []
    assert go("--fresh", stop=1)[0] == ALL[:1]
    assert go()[0] == ALL[1:]


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path):
    path = tmp_path / "new" / "x.jsonl"
    assert measure.noted(path) == []
    measure.note(path, {"a": 1})
    with path.open("ab") as file:
        file.write('{"a": "é'.encode()[:-1])
    measure.note(path, {"a": 2})
    measure.note(path, {"a": 3})
    assert measure.noted(path) == [{"a": 1}, {"a": 2}, {"a": 3}]
