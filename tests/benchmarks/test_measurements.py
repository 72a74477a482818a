import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, memory, prefill, random_checkpoint, report
from gemsmith import sizing
from gemsmith.config import PRESETS, text_only
from gemsmith.testing import tolerance
from gemsmith.weights.load import load_model


def record(**changes: Any) -> dict[str, Any]:
    """A prefill record as measure.finish writes it."""
    run = {"median": 20.0, "min": 19.0, "max": 21.0, "n": 5, "ceiling": 40.0}
    made: dict[str, Any] = {
        "name": "prefill",
        "model": "E2B",
        "dtype": "bfloat16",
        "tokens": 512,
        "runs": {"skip": run, "no_skip": run, "transformers": run},
        "skip_over_no_skip": 3.0,
        "skip_over_transformers": 1.5,
        "gflops_measured": {"bfloat16": 30.0, "float32": 150.0},
        "gb_s_measured": 12.0,
        "machine": {
            "cpu": "A processor",
            "isa": ["avx2"],
            "threads": 2,
            "memory_gib": 24.0,
            "load_before": 0.1,
        },
        "versions": {"torch": "2"},
        "commit": "abc",
        "command": "python -m benchmarks.prefill",
        "date": "2026-01-01 00:00",
    }
    return made | changes


def test_runs_take_turns_each_after_a_warm_up_that_is_not_counted() -> None:
    order: list[str] = []
    seconds = measure.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warm_up=1
    )
    assert order == ["a", "a", "b", "b", "a", "a", "b", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_ours_and_transformers_run_the_same_weights_to_the_same_logits(tmp_path: Path) -> None:
    folder = random_checkpoint.write(random_checkpoint.config_of("tiny-E2B"), tmp_path)
    _, model = load_model(folder)
    ids_T = torch.arange(1, 41)
    ours = prefill.ours(model, ids_T, skip=True)
    limit = tolerance(torch.bfloat16, 1)
    prefill.check("no skip", prefill.ours(model, ids_T, skip=False), ours, limit)
    theirs = prefill.transformers_run(model, folder, ids_T)()
    prefill.check("transformers", theirs, ours, limit)
    with pytest.raises(SystemExit, match=r"logits are .* off"):
        prefill.check("other prompt", prefill.ours(model, ids_T + 1, skip=True), ours, limit)


def test_ceiling_counts_every_weight_once() -> None:
    config = text_only(PRESETS["E2B"]).text_config
    compute_only = prefill.ceiling(config, 512, skip=False, rate=1e12, bandwidth=float("inf"))
    head = 2 * config.vocab_size * config.hidden_size
    expected = sizing.prefill_flops(config, 512, 1, skip=False) - head
    assert compute_only == pytest.approx(expected / 1e12)
    # Of E2B's 2.28 B weights outside the table 1.30 B serve one row only: layers 15-34.
    read_only = prefill.ceiling(config, 512, skip=True, rate=float("inf"), bandwidth=1e9)
    assert read_only == pytest.approx(2 * (1.2993 + 0.4027), rel=0.01)


def test_memory_floor_of_e2b_is_what_every_token_passes_through() -> None:
    assert memory.floor_bytes(text_only(PRESETS["E2B"])) == 2 * 2_279_759_104


@pytest.mark.parametrize("tokens", memory.KV_TOKENS[:3])
def test_kv_held_is_kv_sized(tokens: int) -> None:
    config = random_checkpoint.config_of("tiny-E2B")
    assert memory.kv_measured(config, tokens) == sizing.kv_bytes(config.text_config, tokens)


def test_page_shows_the_latest_record_of_each_machine(tmp_path: Path) -> None:
    other = {**record()["machine"], "cpu": "Another"}
    lines = [record(tokens=1), record(), record(machine=other, tokens=7)]
    (tmp_path / "prefill.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = report.page(report.latest(tmp_path))
    assert "512 tokens" in page
    assert "7 tokens" in page
    assert "bfloat16, 1 tokens" not in page
    assert "| gemsmith | 20.0 | 19.0 - 21.0 | 5 | 40.0 | 50% |" in page
    assert "Another (avx2), 2 threads, 24.0 GiB, load before 0.1; torch 2; commit abc" in page


def test_media_stand_beside_decoding_alone_and_their_peers(tmp_path: Path) -> None:
    def run(seconds: float) -> dict[str, float]:
        return {"median": seconds, "min": seconds / 2, "max": seconds * 2, "n": 5}

    runs = {"gemsmith": run(0.2), "Transformers": run(0.5), "floor": run(0.1)}
    subjects = {"photo": {"runs": runs, "missing": {"torchvision": "not installed"}}}
    made = record(name="media", model="any", subjects=subjects)
    (tmp_path / "media.jsonl").write_text(json.dumps(made) + "\n")
    page = report.page(report.latest(tmp_path))
    assert "| photo: gemsmith | 200.0 | 100.0 - 400.0 | 5 | 2.00 |  |" in page
    assert "| photo: Transformers | 500.0 | 250.0 - 1000.0 | 5 | 5.00 | 2.50x as fast |" in page
    assert "| photo: decoding alone | 100.0 | 50.0 - 200.0 | 5 | 1.00 |  |" in page
    assert "| photo: torchvision | not installed |" in page


def test_the_page_of_numbers_is_what_its_records_say() -> None:
    page = measure.NUMBERS.with_suffix(".md").read_text(encoding="utf-8")
    assert page == report.page(report.latest(measure.NUMBERS))
