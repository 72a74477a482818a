"""The comparison of `gemsmith fit` with measurements, and the page made from the command."""

from typing import Any

import pytest

from benchmarks import fit as bench
from benchmarks import fit_page, random_checkpoint, report
from gemsmith import fit, sizing

CONFIG = random_checkpoint.config_of("tiny-E2B")


def row(format: str, **measured: float) -> dict[str, Any]:
    rates = {"bandwidth": 1e9, "float": 1e11, "low": 1e12}
    made = {"model": "E2B", "format": format, "context": 512, "users": 2, "prompt": 256}
    made |= {"layers": CONFIG.text_config.num_hidden_layers, "rates": rates}
    return made | {"measured": {"weights": 1.0, "kv": 1.0, "peak": 1.0, **measured}}


def test_the_page_is_what_the_command_prints():
    assert fit_page.PAGE.read_text("utf-8") == fit_page.page(), "run: python -m benchmarks.fit_page"


def test_memory_is_predicted_for_all_users():
    found = bench.predicted(CONFIG, "int4", row("int4"))
    assert found["weights"] == sum(sizing.weight_bytes(CONFIG, "int4", "cpu").values())
    assert found["kv"] == sizing.kv_bytes(CONFIG.text_config, 512, 1, 2)
    assert found["peak"] > found["weights"] + found["kv"]


def test_shares_taken_from_runs_predict_these_runs(monkeypatch: pytest.MonkeyPatch):
    rows = [row("int4", decode=1000.0, prefill=2e4), row("int8", decode=900.0, prefill=1e4)]
    for each in rows:
        each["predicted"] = bench.predicted(CONFIG, each["format"], each)
    records = bench.shares(rows, "here")
    assert {(r["kind"], r["what"]) for r in records} == {("low", "decode"), ("low", "prefill")}
    assert all(0 < r["share"][0] <= r["share"][1] <= r["share"][2] for r in records)
    monkeypatch.setattr(fit, "calibration", lambda: tuple(records))
    again = bench.predicted(CONFIG, "int4", rows[0])
    bound = rows[0]["predicted"]["bounds"]["decode"]
    [decode] = [r["share"] for r in records if r["what"] == "decode"]
    assert again["decode"] == pytest.approx(bound * decode[1])
    rows[0]["predicted"] = again
    assert bench.error(rows[0], "decode") == pytest.approx(again["decode"] / 1000 - 1)


def test_share_and_layer_seconds_are_found_again():
    points = [(0.01, 9, 0.01 / 0.8 + 9e-4), (0.05, 35, 0.05 / 0.8 + 35e-4)]
    assert bench._least_squares(points) == pytest.approx((1 / 0.8, 1e-4))
    # One depth says nothing of layers, and no layer takes less than nothing.
    assert bench._least_squares(points[:1])[1] == 0
    assert bench._least_squares([(0.01, 9, 0.01), (0.05, 35, 0.03)])[1] == 0


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
            }
        )
    )
    assert "| E2B | int4 | 512 | 2 | +0.0% | +0.0% | +3.1% | - | -20.0% |" in text
    assert "peak 3.1% of 5.0%, prefill 20.0% of 25.0%" in text
