"""The C++ extension itself: its threads, its instruction sets, memory, and its own checks."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.conftest import needs_extension

from gemsmith.errors import WeightsError
from gemsmith.ops import native

ROOT = Path(__file__).parents[2]


@needs_extension
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_too():
    """The pool's threads do not survive a fork; the child makes its own."""
    done = run_python("""
        import os, torch
        from gemsmith.ops import cpu, native
        native.threads = lambda: 3
        packed = torch.randint(0, 256, (4096, 256), dtype=torch.uint8)
        w = cpu.PackedWeight.pack(packed, torch.ones(4096, 1), inputs=512, bits=4)
        x = torch.randn(2, 512)
        product = lambda: cpu.linear(w, x)
        expected = product()
        children = []
        for _ in range(3):
            child = os.fork()
            if not child:
                same = all(torch.equal(product(), expected) for _ in range(20))
                tasks = "/proc/self/task"  # where there is one, this thread and the pool's
                shared = not os.path.isdir(tasks) or len(os.listdir(tasks)) == 3
                os._exit(0 if same and shared else 1)
            children.append(child)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        assert torch.equal(product(), expected)
        print("as it should be")
    """)
    assert done == "as it should be\n"


@needs_extension
def test_the_process_ends_while_workers_sleep():
    done = run_python("""
        import threading, time, torch
        from gemsmith.ops import cpu, native
        native.threads = lambda: 4
        packed = torch.zeros(65536, 256, dtype=torch.uint8)
        w = cpu.PackedWeight.pack(packed, torch.ones(65536, 1), inputs=512, bits=4)
        x, y = torch.zeros(2, 512), torch.empty(2, 65536)
        cpu.linear(w, x)
        # One that still computes, and asks for the GIL, when the interpreter goes. torch itself
        # aborts there, so the extension is called directly.
        addresses = x.data_ptr(), 2, y.data_ptr()
        def product():
            native.extension().linear(*w.arguments, *addresses)
        threading.Thread(target=lambda: [product() for _ in range(10**6)], daemon=True).start()
        time.sleep(0.1)
        print("end")
    """)
    assert done == "end\n"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=True, timeout=120,
    ).stdout  # fmt: skip


@needs_extension
def test_all_of_a_memory_is_read(isa: str, threads: int):
    words = torch.randint(-(2**62), 2**62, (3 * 2**16 + 8 * 5,))
    assert native.read_memory(words) == int(words.sum()) % 2**64
    assert native.read_memory(words[:0]) == 0
    with pytest.raises(WeightsError, match=r"memory is .*, not contiguous"):
        native.read_memory(words[::2])


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked of Linux")
def test_large_pages_are_asked_for_whole_pages_alone():
    """A kernel without them refuses the first too."""
    there = Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert native.advise_hugepages(torch.empty(1 << 22)) == there
    assert not native.advise_hugepages(torch.empty(16))


@needs_extension
def test_an_instruction_set_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match=r"instruction set 'mmx' cannot be used here; generic"):
        native.force_isa("mmx")


def test_no_more_threads_than_torch_or_the_machine_has(monkeypatch: pytest.MonkeyPatch):
    # Commands that ran in this process before may have left torch one thread, and the rest to it.
    monkeypatch.setattr(native, "_own_threads", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(native, "_cores", lambda: 2)
    assert native.threads() == 2
    monkeypatch.setattr(native, "_cores", lambda: 8)
    assert native.threads() == 3


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_kernels_run_clean_under_sanitizers(tmp_path: Path, sanitizers: str):
    built = build_check(tmp_path, sanitizers, "-DGEMSMITH_EMULATE_AMX=ON")
    told = built.stdout + built.stderr
    if built.returncode and "cannot find" in told and "san" in told:
        pytest.skip(f"the compiler lacks the libraries of -fsanitize={sanitizers}")
    assert built.returncode == 0, told
    # Looking for leaks needs ptrace, which containers may forbid.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run(
        [tmp_path / "gemsmith_check"], capture_output=True, text=True, env=environment
    )
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("this compiler's thread sanitizer cannot run on this kernel")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "amx-emulated: " in ran.stdout
    assert "3 callers of 3 threads: as they should be" in ran.stdout


@pytest.mark.slow
def test_the_kernels_for_arm_run_clean_under_emulation(tmp_path: Path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64-static here")
    built = build_check(
        tmp_path, "undefined", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    system = ["-cpu", "max", "-L", "/usr/aarch64-linux-gnu"]
    ran = subprocess.run(
        [emulator, *system, tmp_path / "gemsmith_check"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "neon: " in ran.stdout


def build_check(folder: Path, sanitizers: str, *options: str) -> subprocess.CompletedProcess[str]:
    """native/'s gemsmith_check, built in `folder`; skips where nothing can build it."""
    cmake = shutil.which("cmake")
    if cmake is None or not (shutil.which("ninja") or shutil.which("make")):
        pytest.skip("no CMake here, or nothing for it to drive")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    where = ["-S", str(ROOT / "native"), "-B", str(folder), f"-DGEMSMITH_SANITIZE={sanitizers}"]
    configured = subprocess.run([cmake, *ninja, *where, *options], capture_output=True, text=True)
    if configured.returncode and "CXX" in configured.stderr:
        pytest.skip("no C++ compiler here")
    assert configured.returncode == 0, configured.stderr
    build = [cmake, "--build", str(folder), "--target", "gemsmith_check"]
    return subprocess.run(build, capture_output=True, text=True)
