"""The machine: processor, instruction sets, memory, accelerators, place for caches. Nothing is set.

Reads the kernel's own files where they exist (Linux) and asks the standard library elsewhere; what
cannot be known is None. torch is asked for accelerators, and of CPUs that no file describes, and
imported only then.

Legend: bytes everywhere; GiB in text is 2^30. A cgroup is the kernel's limit on a container.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60
"""cgroup version 1 writes a number near 2^63 where there is none."""
# Flags of /proc/cpuinfo that matrix products can use, in the order of age; x86 then Arm.
ISA_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""Those of a CPU that multiplies bfloat16 itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What this process can use."""

    system: str
    cpu: str
    cores: int
    """Logical processors this process may run on."""
    cpu_limit: float | None
    """Processors' worth of time that the cgroup allows; None without a limit."""
    isa: tuple[str, ...]
    memory_bytes: int | None
    available_bytes: int | None
    """Memory that can be taken without swapping, the cgroup's limit respected."""
    memory_limit: int | None
    """The cgroup's limit in bytes; None without one."""

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether the CPU has bfloat16 products of its own. Where no file says so, torch may."""
        if self.isa or arch() != "x86-64":
            return any(flag in BFLOAT16_FLAGS for flag in self.isa)
        try:
            from torch import cpu
        except ImportError:
            return False
        return cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()


def machine() -> Machine:
    """The machine as this process sees it."""
    fields = _fields(CPUINFO)
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    memory = {key: _kib(value) for key, value in _fields(MEMINFO).items()}
    available = memory.get("MemAvailable")
    limit = _number("memory.max", "memory/memory.limit_in_bytes")
    used = _number("memory.current", "memory/memory.usage_in_bytes")
    if limit is not None and used is not None:
        available = min(available or limit, max(0, limit - used))
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        system=platform.platform(terse=True),
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        cpu_limit=_cpu_limit(),
        isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
        memory_bytes=memory.get("MemTotal"),
        available_bytes=available,
        memory_limit=limit,
    )


def arch() -> str:
    """Kind of processor, by the name that devices.py and calibration.json use: x86-64, arm64; of
    another kind what the system calls it."""
    found = platform.machine().lower()
    names = {"amd64": "x86-64", "x86_64": "x86-64", "aarch64": "arm64"}
    return names.get(found, found)


def cache_folder() -> Path | None:
    """Where files that can be made again are kept: GEMSMITH_CACHE, or the user's place for caches.

    None: the user has no home folder and the environment names no other. Nothing is kept then.
    """
    try:
        if chosen := os.environ.get("GEMSMITH_CACHE"):
            return Path(chosen).expanduser()
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return Path(base) / "gemsmith"


def peak_bytes() -> int | None:
    """The most memory this process has held so far (resident set size)."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpus() -> list[Gpu]:
    """CUDA devices that torch can use."""
    import torch

    found: list[Gpu] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(Gpu(name=name, memory_bytes=total, free_bytes=free))
    return found


def free_bytes(device: Any) -> int | None:
    """What can still be taken on a torch.device: of a CPU's memory without swapping, of a CUDA
    device's with what torch itself keeps for reuse. None where it cannot be known."""
    if device.type == "cpu":
        return machine().available_bytes
    if device.type != "cuda":
        return None
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def nvidia_gpus() -> list[Gpu]:
    """NVIDIA devices as the driver's own tool lists them, without torch; none where it is not."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        rows = [line.rsplit(",", 2) for line in made.stdout.splitlines() if line.strip()]
        return [
            Gpu(name=name.strip(), memory_bytes=int(total) << 20, free_bytes=int(free) << 20)
            for name, total, free in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []  # a driver that does not answer is no device


def _fields(path: Path) -> dict[str, str]:
    """`key : value` lines of a kernel file, the first of each key; empty if there is no file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    for line in lines:
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _kib(value: str) -> int:
    return int(value.split()[0]) * 1024


def _number(*names: str) -> int | None:
    """The number in the first cgroup file there is (version 2, then 1); None if it is no limit."""
    for name in names:
        try:
            text = (CGROUP / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() and int(text) < NO_LIMIT else None
    return None


def _cpu_limit() -> float | None:
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    quota, period = _number("cpu/cpu.cfs_quota_us"), _number("cpu/cpu.cfs_period_us")
    return quota / period if quota and period else None
