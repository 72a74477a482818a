"""Rates of the machine are measured once, kept, and forgotten when the machine is another."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gemsmith import hardware, probe

MEASURED = probe.Rates(bandwidth=2e10, float_rate=3e11, int_rate=1e12, cores=1)


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
    assert 1e7 < found.float_rate < 1e16
    has = native and probe._native() is not None
    assert (found.int_rate is not None) == has
