"""The machine is read from the kernel's files, limits of containers included."""

from pathlib import Path

import pytest
import torch

from gemsmith import hardware

CPUINFO = "processor: 0\nmodel name : Test CPU 9000\nflags : fpu avx2 amx_int8\n\nprocessor: 1\n"
MEMINFO = "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nHugePages_Total: 0\n"
GIB = 1 << 30


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("kernel")
def test_cpu_instructions_and_memory_are_read():
    machine = hardware.machine()
    assert machine.cpu == "Test CPU 9000"
    assert machine.isa == ("avx2", "amx_int8")
    assert (machine.memory_bytes, machine.available_bytes) == (8 * GIB, 4 * GIB)
    assert machine.memory_limit is None
    assert machine.cpu_limit is None


def test_a_limit_of_the_container_bounds_the_available_memory(kernel: Path):
    (kernel / "memory.max").write_text(f"{2 * GIB}\n")
    (kernel / "memory.current").write_text(f"{GIB}\n")
    (kernel / "cpu.max").write_text("150000 100000\n")
    machine = hardware.machine()
    assert (machine.memory_limit, machine.available_bytes) == (2 * GIB, GIB)
    assert machine.cpu_limit == 1.5


def test_limits_of_the_older_kind_are_read(kernel: Path):
    for name, text in {
        "memory/memory.limit_in_bytes": str(3 * GIB),
        "memory/memory.usage_in_bytes": str(GIB),
        "cpu/cpu.cfs_quota_us": "50000",
        "cpu/cpu.cfs_period_us": "100000",
    }.items():
        (kernel / name).parent.mkdir(exist_ok=True)
        (kernel / name).write_text(text)
    machine = hardware.machine()
    assert (machine.memory_limit, machine.available_bytes) == (3 * GIB, 2 * GIB)
    assert machine.cpu_limit == 0.5


@pytest.mark.parametrize("text", ["max", str(2**63 - 4096)])
def test_no_limit_is_none(kernel: Path, text: str):
    (kernel / "memory.max").write_text(text)
    assert hardware.machine().memory_limit is None


def test_a_machine_without_these_files_is_described_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("CPUINFO", "MEMINFO", "CGROUP"):
        monkeypatch.setattr(hardware, name, tmp_path / "missing")
    machine = hardware.machine()
    assert machine.cores >= 1
    assert machine.memory_bytes is None
    assert machine.available_bytes is None


@pytest.mark.parametrize(
    ("flags", "found"),
    [("avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_bf16", True), ("asimd", False),
     ("asimd bf16", True)],
)  # fmt: skip
def test_units_for_bfloat16_are_those_that_the_kernel_names(kernel: Path, flags: str, found: bool):
    (kernel / "cpuinfo").write_text(f"flags : {flags}\n")
    assert hardware.machine().multiplies_bfloat16 is found


@pytest.mark.parametrize(
    ("arch", "has", "found"),
    [("x86-64", True, True), ("x86-64", False, False), ("arm64", True, False)],
)
def test_where_no_file_names_units_for_bfloat16_torch_does_of_x86(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: str, has: bool, found: bool
):
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "missing")
    monkeypatch.setattr(hardware, "arch", lambda: arch)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    assert hardware.machine().multiplies_bfloat16 is found


@pytest.mark.skipif(hardware.arch() != "x86-64", reason="torch knows them of x86 alone")
def test_the_kernel_s_files_and_torch_agree_about_units_for_bfloat16():
    known = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert hardware.machine().multiplies_bfloat16 == known


def test_free_memory_of_a_cpu_is_what_is_available(kernel: Path):
    assert hardware.free_bytes(torch.device("cpu")) == 4 * GIB
    assert hardware.free_bytes(torch.device("meta")) is None


def test_nvidia_devices_are_what_the_driver_s_tool_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.nvidia_gpus() == []
    row = "NVIDIA Test, 9000, 24564, 24000"
    tool.write_text(f"#!/bin/sh\necho '{row}'\n")
    tool.chmod(0o755)
    [found] = hardware.nvidia_gpus()
    assert found.name == "NVIDIA Test, 9000"
    assert (found.memory_bytes, found.free_bytes) == (24_564 << 20, 24_000 << 20)
    for wrong in ("echo a, b, c", "exit 9", "echo 7"):
        tool.write_text(f"#!/bin/sh\n{wrong}\n")
        assert hardware.nvidia_gpus() == []


def test_caches_go_where_the_environment_says_or_the_system_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("GEMSMITH_CACHE", str(tmp_path / "chosen"))
    assert hardware.cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("GEMSMITH_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    for system, place in (
        ("linux", ".cache/gemsmith"),
        ("darwin", "Library/Caches/gemsmith"),
        ("win32", "AppData/Local/gemsmith"),
    ):
        monkeypatch.setattr("sys.platform", system)
        assert hardware.cache_folder() == tmp_path / place
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hardware.cache_folder() == tmp_path / "xdg" / "gemsmith"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("GEMSMITH_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert hardware.cache_folder() is None
    monkeypatch.setenv("GEMSMITH_CACHE", "~nobody-of-this-name/cache")
    assert hardware.cache_folder() is None


@pytest.mark.parametrize(
    ("called", "name"),
    [("x86_64", "x86-64"), ("AMD64", "x86-64"), ("aarch64", "arm64"), ("arm64", "arm64"),
     ("riscv64", "riscv64")],
)  # fmt: skip
def test_a_processor_has_one_name_on_every_system(
    monkeypatch: pytest.MonkeyPatch, called: str, name: str
):
    monkeypatch.setattr("platform.machine", lambda: called)
    assert hardware.arch() == name
