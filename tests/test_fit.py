"""Plans: memory as sizing has it, speed as a roofline, the best that fits, and what is missing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gemsmith import fit, hardware, probe, sizing, work
from gemsmith.config import PRESETS
from gemsmith.errors import CapacityError, ConfigError
from gemsmith.fit import GIB, Target

RATES = {"float32": 300e9, "bfloat16": 500e9, "rows": 3e12, "groups": 2e12}
CARD = Target("card", "gpu", 12 * GIB, 360e9, dict.fromkeys(RATES, 50e12))
CPU = Target("box", "cpu", 16 * GIB, 20e9, RATES, arch="x86-64")


def test_a_plan_fits_where_its_parts_do():
    found = fit.plan("E4B", PRESETS["E4B"], "int4", CARD, context=32_768, users=4)
    assert found.kv == "bfloat16"
    assert found.memory.kv == 4 * sizing.kv_bytes(PRESETS["E4B"].text_config, 32_768)
    assert found.fits
    assert found.missing == 0
    tight = fit.plan(
        "E4B", PRESETS["E4B"], "int4", replace(CARD, memory=3 * GIB), context=32_768, users=4
    )
    assert not tight.fits
    assert tight.missing == tight.memory.total - 3 * GIB


@pytest.mark.parametrize("target", [CARD, CPU])
@pytest.mark.parametrize("size", ["E2B", "12B", "31B"])
def test_the_largest_context_fits_and_one_more_does_not(target: Target, size: str):
    config = PRESETS[size]
    found = fit.plan(size, config, "int4", target, context=1024, users=3)
    most = config.text_config.max_position_embeddings
    if found.largest_context == 0:
        assert found.limit == "memory for weights"
        assert found.memory.total > target.memory
        return
    largest = fit.plan(size, config, "int4", target, context=found.largest_context, users=3)
    assert largest.fits
    if found.largest_context < most:
        assert found.limit.startswith("memory for ")
        assert not fit.plan(
            size, config, "int4", target, context=found.largest_context + 1, users=3
        ).fits
    else:
        assert found.limit == "the model's own context"


def test_decoding_is_bounded_by_what_it_reads():
    text = PRESETS["E2B"].text_config
    found = fit.plan("E2B", PRESETS["E2B"], "bfloat16", CPU, context=4096, kv="bfloat16")
    weights = sizing.weight_bytes(PRESETS["E2B"], "bfloat16", "cpu", towers=False)
    reads = sum(weights.values()) + work.decode_kv_bytes(text, 4096)
    assert found.speed.decode_bound == pytest.approx(20e9 / reads)
    assert found.speed.limit == "memory bandwidth"


def test_many_users_wait_for_computing_and_share_the_weights():
    slow = replace(CPU, rates=dict.fromkeys(RATES, 5e11), memory=64 * GIB)
    one, many = (
        fit.plan("E2B", PRESETS["E2B"], "int4", slow, context=1024, users=n) for n in (1, 64)
    )
    assert many.speed.limit == "computing"
    assert one.speed.decode_bound
    assert many.speed.decode_bound
    assert many.speed.decode_bound * 64 > one.speed.decode_bound


@pytest.mark.parametrize(
    ("format", "multiplied"),
    [
        ("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "rows"), ("mobile", "rows"),
        ("int4", "groups"), ("int2", "groups"),
    ],
)  # fmt: skip
def test_a_prompt_takes_its_operations_each_at_its_rate(format: str, multiplied: str):
    """Attention is of floats, whatever the weights are."""
    config = PRESETS["E2B"]
    found = fit.plan("E2B", config, format, CPU, context=4096, prompt=512).speed
    products, scores = work.prompt_flops(config.text_config, 512)
    assert found.ttft_bound
    assert found.last_bound
    first = found.ttft_bound - found.last_bound
    assert first == pytest.approx(products / RATES[multiplied] + scores / 300e9)


def test_a_prompt_takes_at_least_the_reading_of_the_weights():
    """Of the head and of layers without K/V once, for the last token."""
    config = PRESETS["E2B"]
    fast = replace(CPU, rates=dict.fromkeys(RATES, 1e18))
    weights = sizing.weight_bytes(config, "bfloat16", "cpu", towers=False)
    found = fit.plan("E2B", config, "bfloat16", fast, context=4096, prompt=1024).speed
    every, last = work.prompt_weight_bytes(config.text_config, weights, 512)
    assert every + last == sum(weights.values())
    assert found.ttft_bound == pytest.approx((2 * every + last) / 20e9)
    assert found.last_bound == pytest.approx(last / 20e9)


def test_expected_speed_is_the_bound_by_the_measured_share(monkeypatch: pytest.MonkeyPatch):
    kinds = {"place": "cpu", "arch": "x86-64", "kind": "groups"}
    decode = {"share": [0.5, 0.8, 1.0], "kv_share": 0.4, "layer_seconds": 1e-3}
    prefill = {"share": [0.25, 0.5, 1.0], "row_seconds": 1e-5}
    records = (kinds | {"what": "decode"} | decode, kinds | {"what": "prefill"} | prefill)
    monkeypatch.setattr(fit, "calibration", lambda: records)
    speed = fit.plan("E2B", PRESETS["E2B"], "int4", CPU, context=4096, prompt=1024).speed
    assert speed.decode_bound
    assert speed.ttft_bound
    assert speed.last_bound
    assert speed.decode
    kv, last = speed.attention_bound or 0.0, speed.last_bound
    first = speed.ttft_bound - last
    rest, fixed = 1 / speed.decode_bound - kv, kv / 0.4 + 35e-3
    assert 0 < kv < rest
    assert speed.decode.mid == pytest.approx(1 / (rest / 0.8 + fixed))
    assert speed.decode.low == pytest.approx(1 / (rest / 0.5 + fixed))
    assert speed.decode.high == pytest.approx(1 / (rest + fixed))
    # 15 layers that every token runs through, in two passes; 20 for the last one alone.
    rows, alone = 1024 * 15 * 1e-5 + 2 * 15e-3, 20e-3
    assert speed.ttft
    assert (speed.ttft.low, speed.ttft.mid, speed.ttft.high) == pytest.approx(
        (
            first + rows + last + alone,
            first / 0.5 + rows + last / 0.8 + alone,
            first / 0.25 + rows + last / 0.5 + alone,
        )
    )
    assert fit.plan("E2B", PRESETS["E2B"], "int4", CARD, context=1024).speed.decode is None


def test_a_share_of_another_processor_is_a_guess(monkeypatch: pytest.MonkeyPatch):
    assert fit.plan("E2B", PRESETS["E2B"], "int4", CPU, context=64).speed.guess is None
    board = fit.named("raspberry-pi-5-8gb")
    speed = fit.plan("E2B", PRESETS["E2B"], "int4", board, context=64).speed
    assert speed.decode
    assert speed.guess
    assert speed.guess.startswith("the shares were measured on x86-64, on arm64 none were; there")
    unknown = fit.plan("E2B", PRESETS["E2B"], "int4", replace(CPU, arch=None), context=64).speed
    assert "on another processor none were" in (unknown.guess or "")
    # Where nothing is expected, nothing is guessed.
    assert fit.plan("E2B", PRESETS["E2B"], "int4", CARD, context=64).speed.guess is None
    # Its own share is no guess, and goes before that of another.
    own = [{**r, "arch": "arm64", "share": [0.1, 0.1, 0.1]} for r in fit.calibration()]
    records = (*fit.calibration(), *own)
    monkeypatch.setattr(fit, "calibration", lambda: records)
    measured = fit.plan("E2B", PRESETS["E2B"], "int4", board, context=64).speed
    assert measured.guess is None
    assert measured.decode
    assert measured.decode.mid < speed.decode.mid


def test_records_of_calibration_are_whole():
    for record in fit.calibration():
        least, median, most = record["share"]
        assert 0 < least <= median <= most
        assert record["what"] in ("decode", "prefill")
        if record["what"] == "decode":
            assert record["layer_seconds"] >= 0
            assert record["kv_share"] > 0
        else:
            assert record["row_seconds"] >= 0
            assert median <= 1  # or the bound would be none
        assert record["place"] in ("cpu", "gpu")
        assert record["arch"] in ("x86-64", "arm64")
        assert record["kind"] in ("float", "rows", "groups", "mobile")
        assert record["source"]


def test_search_gives_all_that_fits_the_best_first():
    found = fit.search(CARD, context=32_768, users=4)
    assert all(plan.fits and plan.largest_context >= 32_768 for plan in found)
    names = [(plan.model, plan.format, plan.kv) for plan in found]
    assert names[:3] == [
        ("12B", "int4", "bfloat16"), ("12B", "int4", "int8"), ("E4B", "bfloat16", "int8")
    ]  # fmt: skip
    trained = [plan.format in fit.TRAINED_FOR for plan in found]
    assert trained == sorted(trained)
    assert {plan.model for plan in found if plan.format == "mobile"} == {"E2B", "E4B"}
    for size, format, kv in (("E4B", "bfloat16", "bfloat16"), ("31B", "int4", "int8")):
        assert (size, format, kv) not in names
        asked = fit.plan(size, PRESETS[size], format, CARD, context=32_768, users=4, kv=kv)
        assert not asked.fits


def test_nothing_fits_names_the_closest_three_and_what_is_missing():
    small = replace(CARD, memory=2 * GIB)
    with pytest.raises(CapacityError) as caught:
        fit.search(small, context=131_072, users=8)
    text = str(caught.value)
    assert text.startswith("nothing fits 2.00 GiB (card) for 8 users with 131072 tokens of context")
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == 3
    closest = fit.plan("E2B", PRESETS["E2B"], "int2", small, context=131_072, users=8, kv="int8")
    assert f"needs {fit.gib(closest.memory.total)}, {fit.gib(closest.missing)} more" in lines[0]
    assert text.endswith("Use a shorter context, fewer users, or more memory.")


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * GIB), ("512m", 512 << 20), ("1.5 TiB", 3 << 39), ("1048576", 1 << 20)],
)
def test_sizes_are_read(text: str, size: int):
    assert fit.size_of(text) == size


@pytest.mark.parametrize(("text", "tokens"), [("32K", 32_768), ("8192", 8192), ("1m", 1 << 20)])
def test_contexts_are_read(text: str, tokens: int):
    assert fit.tokens_of(text) == tokens


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1e3", "12 gigs", "0", "9" * 50])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ConfigError, match="write a size, such as 12GB"):
        fit.size_of(text)


@pytest.mark.parametrize("text", ["", "0", "-5", "32KB", "999M", "1.5K"])
def test_what_is_no_context_is_refused(text: str):
    with pytest.raises(ConfigError, match="write tokens, such as 8192, 32K or 128K"):
        fit.tokens_of(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 131_073}, "context 131073: E2B has 1 to 131072 tokens"),
        ({"context": 0}, "context 0: E2B has 1 to 131072"),
        ({"context": 8, "users": 0}, "users 0: must be from 1 to 4096"),
        ({"context": 8, "kv": "int4"}, "kv 'int4': must be one of"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        fit.plan("E2B", PRESETS["E2B"], "int4", CARD, **options)


def test_a_context_that_no_model_has_is_refused():
    with pytest.raises(ConfigError, match="context 300000: the longest of any model is 262144"):
        fit.search(CARD, context=300_000)


def test_formats_have_other_names():
    assert [fit.format_of(t) for t in ("16", "bf16", "INT4", "4", "mobile")] == [
        "bfloat16", "bfloat16", "int4", "int4", "mobile"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="format 'q4_k': must be one of float32"):
        fit.format_of("q4_k")


def test_a_named_device_has_less_memory_than_it_is_sold_with():
    card = fit.named("rtx-4090")
    assert card.place == "gpu"
    assert 22 * GIB < card.memory < 24 * GIB
    assert card.bandwidth == 1008e9
    assert card.rates == dict.fromkeys(RATES, 165e12)
    assert fit.named("raspberry-pi-5-8gb").place == "cpu"


@pytest.mark.usefixtures("rates")
def test_this_machine_is_its_gpu_where_it_has_one(monkeypatch: pytest.MonkeyPatch):
    gpu = hardware.Gpu(name="NVIDIA GeForce RTX 4090", memory_bytes=24 * GIB, free_bytes=20 * GIB)
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: [gpu])
    found = fit.this_machine()
    assert (found.place, found.memory, found.bandwidth) == ("gpu", 20 * GIB, 1008e9)
    assert fit.this_machine("cpu").place == "cpu"
    strange = replace(gpu, name="NVIDIA Nonesuch 9")
    monkeypatch.setattr(hardware, "nvidia_gpus", lambda: [strange])
    assert fit.this_machine().bandwidth is None
    monkeypatch.setattr(hardware, "nvidia_gpus", list)
    assert fit.this_machine().rates == RATES
    with pytest.raises(ConfigError, match="nvidia-smi finds none here"):
        fit.this_machine("gpu")
    blind = replace(hardware.machine(), memory_bytes=None, available_bytes=None)
    monkeypatch.setattr(hardware, "machine", lambda: blind)
    with pytest.raises(ConfigError, match="cannot be read; say it with --memory 16GB"):
        fit.this_machine()
    assert fit.this_machine("cpu", 8 * GIB).memory == 8 * GIB


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("Tesla T4", "t4"), ("NVIDIA H100 80GB HBM3", None)],
)
def test_drivers_names_are_found_in_the_table(name: str, known: str | None):
    found = fit._known(name)
    wanted = fit.device_of(known) if known else fit.device_of("h100-80gb")
    assert found == wanted


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probe.Rates(bandwidth=20e9, cores=2, busy=False, **RATES)
    monkeypatch.setattr(probe, "rates", lambda: found)


@pytest.mark.usefixtures("rates")
def test_code_of_bfloat16_products_is_counted_where_the_cpu_has_units_for_them(
    monkeypatch: pytest.MonkeyPatch,
):
    def runtime(isa: tuple[str, ...], format: str) -> int:
        here = replace(hardware.machine(), isa=isa)
        monkeypatch.setattr(hardware, "machine", lambda: here)
        found = fit.plan("E2B", PRESETS["E2B"], format, fit.this_machine("cpu"), context=64)
        return found.memory.runtime

    plain, units = ("avx2", "avx512f"), ("avx512f", "amx_bf16")
    assert runtime(units, "bfloat16") - runtime(plain, "bfloat16") == sizing.PRODUCTS_BYTES
    assert runtime(units, "int4") == runtime(plain, "int4") == runtime(plain, "bfloat16")


def test_planning_imports_no_torch(tmp_path: Path):
    program = (
        "import sys, json\n"
        "from gemsmith import fit\n"
        "from gemsmith.cli import fit as cli\n"
        "plans = fit.search(fit.named('rtx-3060-12gb'), context=32768, users=4)\n"
        "cli.model_of('pocket')\n"
        "print(json.dumps([len(plans), 'torch' in sys.modules]))\n"
    )
    made = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    count, torch = json.loads(made.stdout)
    assert count > 10
    assert not torch
