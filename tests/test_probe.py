"""Rates of the machine are measured once, kept, and forgotten when the machine is another."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gemsmith import hardware, probe

MEASURED = probe.Rates(2e10, float32=3e11, bfloat16=5e11, rows=1e12, groups=6e11, cores=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The cores of each measurement, none of which is made."""
    made: list[int] = []
    monkeypatch.setenv("GEMSMITH_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(probe, "measure", lambda cores: made.append(cores) or MEASURED)
    return made


def test_rates_are_measured_once(calls: list[int], tmp_path: Path):
    assert probe.rates() == probe.rates() == MEASURED
    assert len(calls) == 1
    probe.rates(fresh=True)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]


def test_another_processor_is_measured_anew(calls: list[int], monkeypatch: pytest.MonkeyPatch):
    probe.rates()
    other = replace(hardware.machine(), cpu="another")
    monkeypatch.setattr(hardware, "machine", lambda: other)
    probe.rates()
    assert len(calls) == 2


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"key": 1}', "nested"],
)
def test_a_file_that_is_not_whole_is_made_anew(calls: list[int], tmp_path: Path, text: str):
    probe.rates()
    path = tmp_path / "probe.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"bandwidth": -1.0}) if text == "nested" else text)
    assert probe.rates() == MEASURED
    assert len(calls) == 2
    assert json.loads(path.read_text()) == kept


def test_what_a_busy_machine_gives_is_not_kept(
    calls: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 9.0, 9.0))
    assert probe.rates().busy
    assert not list(tmp_path.iterdir())


def test_a_folder_without_room_is_no_error(calls: list[int], tmp_path: Path):
    (tmp_path / "probe.json").mkdir()
    assert probe.rates() == MEASURED


@pytest.mark.parametrize("native", [True, False])
def test_measuring_gives_rates_a_machine_can_have(native: bool, monkeypatch: pytest.MonkeyPatch):
    if not native:
        monkeypatch.setattr(probe, "_native", lambda: None)
    monkeypatch.setattr(probe, "READ_BYTES", 1 << 22)
    monkeypatch.setattr(probe, "REPEATS", 1)
    found = probe.measure(1)
    assert 1e7 < found.bandwidth < 1e14
    assert 1e7 < found.float32 <= found.bfloat16 < 1e16
    has = native and probe._native() is not None
    assert (found.rows is not None) == (found.groups is not None) == has


@pytest.mark.parametrize(
    ("isa", "flags", "units"),
    [
        ("amx", ("avx512f", "avx512_bf16", "amx_bf16", "amx_int8"), True),
        ("amx", ("avx512f", "avx512_bf16", "amx_int8"), False),
        ("avx512vnni", ("avx512f", "avx512_vnni", "avx512_bf16"), True),
        ("avx512vnni", ("avx512f", "avx512_vnni"), False),
        ("neon", ("asimd", "bf16", "i8mm"), True),
        ("neon", ("asimd", "asimddp"), False),
    ],
)
def test_units_for_bfloat16_do_half_of_what_they_do_in_int8(
    isa: str, flags: tuple[str, ...], units: bool, monkeypatch: pytest.MonkeyPatch
):
    """Without them the CPU multiplies float32."""

    class Native:
        linear = set_threads = advise_hugepages = read_memory = lambda *_: None

        @staticmethod
        def isa() -> str:
            return isa

    machine = replace(hardware.machine(), isa=flags)
    seconds = iter((1.0, 1e-6, 1e-5, 1e-4))  # reading, rows, groups, float32
    monkeypatch.setattr(hardware, "machine", lambda: machine)
    monkeypatch.setattr(probe, "_native", Native)
    monkeypatch.setattr(probe, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(probe, "_best", lambda run: next(seconds))
    found = probe.measure(1)
    assert found.bfloat16 == ((found.rows or 0) / 2 if units else found.float32)
    operations = 2 * probe.ROWS * probe.WIDTH * probe.OUTPUTS
    floats = operations * probe.FLOAT_ROWS / probe.ROWS / 1e-4
    each = (floats, found.bfloat16, operations / 1e-6, operations / 1e-5)
    assert tuple(found.operations.values()) == each
