"""llama.cpp, compiled for this CPU below build/: its server, and its libraries for Python.

It comes as the source package of PACKAGE. The server and the libraries are compiled once; the
Python binding, in a virtual environment of its own, loads those. Where GEMSMITH_LLAMA_SERVER names
a server it is taken instead, with the libraries that stand beside it. Without network or compiler
there is none, and the reason is told. It is no dependency of gemsmith.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from benchmarks import measure
from gemsmith import hardware

PACKAGE = "llama-cpp-python==0.3.36"
NAMED = "GEMSMITH_LLAMA_SERVER"
FOLDER = measure.REPOSITORY / "build" / "llama.cpp"
PROGRAM = FOLDER / "build" / "bin" / "llama-server"
PEERS = measure.REPOSITORY / "build" / "peers"
LIBRARIES = "LLAMA_CPP_LIB_PATH"
"""Where the binding is told to look for llama.cpp's libraries."""


def server() -> tuple[Path | None, str]:
    """The program, compiled if it is not there; or None and why there is none."""
    if named := os.environ.get(NAMED):
        path = Path(named)
        return (path, "") if path.is_file() else (None, f"{NAMED}: no file {path}")
    if PROGRAM.is_file():
        return PROGRAM, ""
    if not shutil.which("cmake"):
        return None, "not compiled (no cmake here)"
    print(f"compiling llama.cpp ({PACKAGE}) in {FOLDER}, ten minutes or more ...", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    package = PACKAGE.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--no-binary"]
    failed = _quiet([*pip, package, "--dest", str(FOLDER), PACKAGE])
    if failed is None:
        [archive] = FOLDER.glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(FOLDER, filter="data")
        [source] = FOLDER.glob("*/vendor/llama.cpp")
        source.rename(FOLDER / "source")
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
                   "-DLLAMA_USE_PREBUILT_UI=OFF", *_cmake_flags()]  # fmt: skip
        build = ["cmake", "--build", str(FOLDER / "build"), "--target", "llama-server"]
        failed = _quiet(
            ["cmake", "-S", str(FOLDER / "source"), "-B", str(FOLDER / "build"), *options]
        ) or _quiet([*build, "--parallel", str(os.cpu_count())])
    return (None, f"not compiled ({failed})") if failed else (PROGRAM, "")


def python() -> tuple[str, str]:
    """The Python that has llama.cpp, set up if it is not there; or "" and why there is none.

    From then on the environment of this process says where the libraries are.
    """
    program, missing = server()
    if program is None:
        return "", missing
    os.environ[LIBRARIES] = str(program.parent)
    path = PEERS / "bin" / "python"
    if path.is_file() and _quiet([str(path), "-c", "import llama_cpp"]) is None:
        return str(path), ""
    shutil.rmtree(PEERS, ignore_errors=True)
    venv.create(PEERS, with_pip=True)
    package = PACKAGE.partition("==")[0]
    install = [str(path), "-m", "pip", "install", "--quiet", "--no-binary", package, PACKAGE]
    failed = _quiet(install, CMAKE_ARGS="-DLLAMA_BUILD=OFF")
    if failed is None:
        failed = _quiet([str(path), "-c", "import llama_cpp"])
    return ("", f"not installed ({failed})") if failed else (str(path), "")


def _cmake_flags() -> list[str]:
    """How llama.cpp is compiled for this CPU."""
    flags = ["-DGGML_NATIVE=ON"]
    if any(name.startswith("amx") for name in hardware.machine().isa):
        # GCC 12's ldtilecfg names 8 of the 64 bytes it reads: stores to the rest are dropped as
        # dead, and the program crashes at the first tile. Unneeded once GCC 13 is the oldest.
        flags.append("-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse")
    return flags


def _quiet(command: list[str], **environment: str) -> str | None:
    """Run it; None if it succeeded, else the last line of what it said."""
    made = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    lines = (made.stderr.strip() or "no message").splitlines()
    return None if made.returncode == 0 else lines[-1][:200]
