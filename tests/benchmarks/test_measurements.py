import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import decode, measure, memory, musts, prefill, random_checkpoint, report
from gemsmith import sizing, work
from gemsmith.config import PRESETS, text_only
from gemsmith.testing import tolerance
from gemsmith.weights.load import load_model

PRESET = random_checkpoint.config_of("tiny-E2B")


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


def test_only_what_was_measured_in_the_same_way_is_taken_from_an_unfinished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "UNFINISHED", tmp_path)
    monkeypatch.setattr(measure, "commit", lambda: "abc")
    about = {"cpu": "A", "cores": 2, "threads": 2, "load_before": 0.5}

    def measured(about: dict[str, Any] = about, **settings: Any) -> bool:
        made: list[bool] = []
        unfinished = measure.Unfinished("x", about, **settings)
        found = [unfinished.of(1, "a", measure=lambda: made.append(True) or {"s": 1}) for _ in "ab"]
        assert found == [{"s": 1}, {"s": 1}]
        return bool(made)

    assert measured(clients=[1, 8])
    assert not measured(clients=[1, 8])
    assert not measured(about | {"load_before": 9}, clients=[1, 8])
    assert measured(clients=[1])
    assert measured(about | {"threads": 1}, clients=[1])
    monkeypatch.setattr(measure, "commit", lambda: "abd")
    assert measured(clients=[1])
    measure.Unfinished("x", about, clients=[1]).end()
    assert measured(clients=[1])


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
    expected = work.prefill_flops(config, 512, 1, skip=False) - head
    assert compute_only == pytest.approx(expected / 1e12)
    # Of E2B's 2.28 B weights outside the table 1.30 B serve one row only: layers 15-34.
    read_only = prefill.ceiling(config, 512, skip=True, rate=float("inf"), bandwidth=1e9)
    assert read_only == pytest.approx(2 * (1.2993 + 0.4027), rel=0.01)


def test_the_table_in_few_bits_is_counted_with_its_scales(tmp_path: Path) -> None:
    folder = random_checkpoint.made("tiny-E2B", "4", tmp_path)
    # 1024 rows of 8 layers x 32: a byte a weight, a bfloat16 scale a layer, the stated shape.
    assert memory.table_bytes(folder) == 1024 * 8 * (32 + 2) + 16


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


def peers_record(**speeds: dict[str, float]) -> dict[str, Any]:
    """A record of peers.py: of each program, tok/s by task."""
    names = {
        "int4": musts.OURS,
        "mobile": musts.MOBILE,
        "llama": musts.LLAMA,
        "transformers": musts.TRANSFORMERS,
    }
    programs = {
        names[short]: {
            "speeds": {t: {"median": v, "min": v, "max": v, "n": 5} for t, v in tasks.items()},
            "peak": {"decode 128": 2_000_000_000},
            "load": {"median": 1.0},
            "bytes_per_token": 1_500_000_000,
            "about": "an ISA",
            "missing": "" if tasks else "not installed",
        }
        for short, tasks in speeds.items()
    }
    return record(
        name="peers", dtype="4-bit", programs=programs, gb_s_measured=30.0, logit_distance=0.05
    )


def judged(records: list[dict[str, Any]]) -> dict[str, musts.Must]:
    return {must.text: must for must in musts.musts(records)}


def test_a_must_is_passed_missed_by_so_much_or_not_measured() -> None:
    made = peers_record(
        int4={"decode 128": 15.0, "decode 8192": 13.0, "prefill 512": 800.0},
        llama={"decode 128": 10.0, "prefill 512": 100.0},
        mobile={"decode 128": 18.0},
        transformers={},
    )
    found = judged([made])
    ratio = found["decode 128, gemsmith int4 over llama.cpp Q4_0"]
    assert ratio.cells[1:] == (">= 1.40x", "1.50x", "pass")
    mobile = found["decode 128, gemsmith mobile over llama.cpp Q4_0"]
    # 30 GB/s over 1.5 GB a token are 20 tokens a second: twice llama.cpp, whatever we do.
    assert mobile.cells[2:] == (
        "1.80x",
        "18% short: at 30.0 GB/s 1.50 GB a token allow 2.00x at most",
    )
    assert found["decode, gemsmith int4, weights read"].cells[2] == "75%"
    assert found["decode at 8192 over 128, gemsmith int4"].passed
    absent = found["prefill 512, gemsmith int4 over Transformers bf16"]
    assert not absent.passed
    assert absent.verdict == "not measured: Transformers bf16: not installed"
    # Without AMX four times llama.cpp are asked for, with it fifteen.
    assert found["prefill 512, gemsmith int4 over llama.cpp Q4_0"].needed == 4.0
    made["machine"]["isa"] = ["avx2", "amx_int8"]
    assert judged([made])["prefill 512, gemsmith int4 over llama.cpp Q4_0"].needed == 15.0


def test_a_shortfall_has_its_cause_on_this_cpu_and_a_pass_none() -> None:
    made = peers_record(
        int4={"decode 128": 15.0, "decode 8192": 9.0, "prefill 512": 300.0, "8 streams": 15.0},
        mobile={"prefill 512": 450.0},
        llama={"prefill 512": 100.0, "8 streams": 10.0},
        transformers={"prefill 512": 150.0},
    )
    kinds = ("int4-g32 x1", "int2 x1", "int4 x1", "int8 x1")
    runs = {kind: {"median": 27.0, "ceiling": 30.0} for kind in kinds}
    kernels = record(name="kernels", model="any", dtype="low-bit", runs=runs)
    streams, reads = (
        "8 streams, gemsmith int4 over llama.cpp Q4_0",
        "decode, gemsmith int4, weights read",
    )
    prompts = [
        f"prefill 512, gemsmith int4 over {peer}" for peer in (musts.TRANSFORMERS, musts.LLAMA)
    ]
    found = judged([made])
    assert found[reads].verdict.startswith("12% short: of 30.0 GB/s; a token has some 3 ms of")
    assert found["decode at 8192 over 128, gemsmith int4"].verdict == (
        "25% short: attention over the context takes the difference"
    )
    assert [found[name].verdict for name in (streams, *prompts)] == [
        "25% short: cause not measured",
        "20% short: cause not measured",
        "25% short: cause not measured",
    ]
    made["machine"]["isa"] = ["avx2", "amx_int8"]
    found = judged([kernels, made])
    assert "; products alone read at 90% (benchmarks.kernels); a token" in found[reads].verdict
    transformers, llama = (found[name].verdict for name in prompts)
    assert "bfloat16 has the unit too; two fifths" in transformers
    assert "% short: two fifths" in llama
    for run in made["programs"][musts.OURS]["speeds"].values():
        run["median"] *= 100
    found = judged([kernels, made])
    assert [found[name].verdict for name in (reads, streams, *prompts)] == ["pass"] * 4


@pytest.mark.parametrize(("ours", "verdict"), [(15.0, "25% short: a token's pass"), (20.0, "pass")])
def test_servers_fall_short_for_a_cause_too(ours: float, verdict: str) -> None:
    loads = {"tokens_per_s": {"median": 10.0}, "later_turns_s": {"median": 1.0}}
    faster = {"tokens_per_s": {"median": ours}, "later_turns_s": {"median": 0.45}}
    programs = {
        name: {"loads": {"1": each, "8": each}, "missing": ""}
        for name, each in zip(musts.SERVERS, (faster, loads), strict=True)
    }
    found = judged([record(name="serve", model="pocket", dtype="4-bit", programs=programs)])
    text = "pocket, 1 client, tokens/s, gemsmith serve over llama-server"
    assert found[text].verdict.startswith(verdict)
    later = "{}, time to first token from turn 2 on, gemsmith serve over llama-server"
    assert "50% over: most of a prompt" in found[later.format("pocket, 1 client")].verdict
    assert found[later.format("pocket, 8 clients")].verdict == "50% over: cause not measured"


def test_nothing_measured_is_nothing_passed() -> None:
    found = musts.musts([])
    assert len(found) == 40
    assert not any(must.passed for must in found)
    assert all(must.verdict.startswith("not measured: run python -m") for must in found)


def test_memory_and_passes_are_judged_by_their_own_records() -> None:
    one, eight = {"median": 0.1, "min": 0.1, "max": 0.1, "n": 7}, {"median": 0.25}
    run = {"median": 9.0, "min": 8.0, "max": 10.0, "n": 7, "bytes": 10**9, "ceiling": 20.0}
    decode = record(
        name="decode",
        dtype="mobile",
        contexts={"128": run},
        passes_seconds={"1": one, "4": one, "8": eight},
        first_token_seconds=one | {"median": 2.0},
        prompt_tokens=32,
    )
    memory_record = record(
        name="memory",
        dtype="mobile",
        peak=1_300_000_000,
        floor=10**9,
        ple_table=1,
        peak_over_floor=1.3,
        page_cache=2 * 10**9,
        kv={},
    )
    found = judged([decode, memory_record])
    assert found["a pass of 4 tokens over one, mobile"].passed
    assert found["a pass of 8 tokens over one, mobile"].cells[2:] == (
        "2.50x",
        "25% over: computing, not reading, takes longer",
    )
    assert found["start to first token, mobile"].passed
    assert found["peak memory, 256 tokens, mobile"].verdict == (
        "4% over: 1.00 GB of it are weights; 2.00 GB more in the page cache"
    )
    page = report.page([decode, memory_record, peers_record(int4={"decode 128": 5.0}, llama={})])
    assert "## Must reach, A processor (avx2), 2 threads: 2 of 40" in page
    assert "| 128 | 9.00 | 8.00 - 10.00 | 7 | 1.000 | 20.0 | 45% |" in page
    assert "The page cache then held 1.86 GiB of the checkpoint's files." in page
    assert "| gemsmith int4: decode 128 | 5.00 | 5.00 - 5.00 | 5 |  |" in page
    assert "| llama.cpp Q4_0 | not installed | | | |" in page


def test_what_is_no_speed_counts_on_every_machine() -> None:
    elsewhere = {**record()["machine"], "threads": 1}
    soaked = record(
        name="soak", model="pocket", dtype="", minutes=60, clients=32, faults=0, growth=0.001,
        machine=elsewhere,
    )  # fmt: skip
    lines = report.required([peers_record(int4={"decode 128": 5.0}, llama={}), soaked])
    (head,) = (line for line in lines if line.startswith("## "))
    assert head == "## Must reach, A processor (avx2), 2 threads: 2 of 40"
    assert report.required([soaked]) == []


def test_a_dry_run_of_decode_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "first_token", lambda *_: ([1.5, 2.0, 2.5], 32))
    argv = ["decode", "--size", "tiny-E2B", "--folder", str(tmp_path / "folder")]
    argv += ["--contexts", "8", "64", "--repeats", "2", "--record", str(tmp_path / "numbers")]
    monkeypatch.setattr("sys.argv", argv)
    decode.main()
    (made,) = report.latest(tmp_path / "numbers")
    assert made == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["contexts"].keys() == {"8", "64"}
    for tokens, run in made["contexts"].items():
        kv = work.decode_bytes(PRESET.text_config, int(tokens), 1) - work.decode_bytes(
            PRESET.text_config, 0, 1
        )
        assert (run["bytes"] - decode.weight_bytes(tmp_path / "folder")) % kv == 0
        assert run["median"] > 0
    assert made["passes_seconds"].keys() == {"1", "4", "8"}
    assert made["first_token_seconds"]["median"] == 2.0
    assert "## Decoding, tiny-E2B, 4-bit, one sequence" in report.page([made])


def test_a_prompt_of_the_first_token_has_32_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        prompts.append(command[-1])
        usage = {"usage": {"prompt_tokens": 11 + len(command[-1])}}
        return subprocess.CompletedProcess(command, 0, json.dumps(usage), "")

    monkeypatch.setattr(decode.subprocess, "run", run)
    seconds, tokens = decode.first_token(tmp_path, 1, 3)
    assert (len(seconds), tokens) == (3, 32)
    assert [len(prompt) for prompt in prompts] == [1, 21, 21, 21, 21]  # the first two are warm-up


def test_the_page_cache_holds_what_was_just_read(tmp_path: Path) -> None:
    if sys.platform != "linux":
        assert measure.cached_bytes(tmp_path) is None
        return
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    (tmp_path / "empty").touch()
    assert measure.cached_bytes(tmp_path) in range(1 << 20, (1 << 20) + 1)


def test_the_page_of_numbers_is_what_its_records_say() -> None:
    page = measure.NUMBERS.with_suffix(".md").read_text(encoding="utf-8")
    assert page == report.page(report.latest(measure.NUMBERS))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", [None, "memory --bits 4", "grammar"])
def test_make_bench_ends_in_the_table_and_fails_where_a_benchmark_does(
    tmp_path: Path, fails: str | None
) -> None:
    """With what says its arguments, and fails at some, for a Python."""
    python, numbers = tmp_path / "bin/python", tmp_path / "numbers"
    python.parent.mkdir()
    failing = f"benchmarks.{fails} --record {numbers}"
    python.write_text(f'#!/bin/sh\nshift; echo "$*"; [ "$*" != "{failing}" ]\n')
    python.chmod(0o755)
    for stamp in (".torch", ".dev"):
        (tmp_path / stamp).touch()
    command = ["make", "-s", "bench", f"VENV={tmp_path}", f"NUMBERS={numbers}"]
    made = subprocess.run(command, cwd=measure.REPOSITORY, capture_output=True, text=True)
    ran = [line.removesuffix(f" --record {numbers}") for line in made.stdout.splitlines()]
    assert ran[-1] == f"benchmarks.report {numbers}"
    assert ran[-2] == f"benchmarks.{fails or 'grammar'}"
    assert (made.returncode == 0) == (fails is None)
    if fails != "memory --bits 4":
        names = ["kernels", "decode", "memory", "peers", "prefill", "media", "fit", "grammar"]
        assert {line.split()[0] for line in ran[:-1]} == {f"benchmarks.{name}" for name in names}
