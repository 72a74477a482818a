"""gemsmith's server and llama.cpp's, started on the same weights, threads and cores.

Both are what their users start: `gemsmith serve` and `llama-server`, each with as many sequences at
a time as there are clients at most and room for the longest of each, and its own choices for
everything else. llama-server is compiled here, or named (see llama.py); its copy of Gemma 4's chat
template stands beside its source.
"""

import asyncio
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks import llama, measure, musts, random_checkpoint, to_gguf
from benchmarks.client import ask
from benchmarks.llama_worker import status_bytes
from gemsmith.config import Gemma4Config
from gemsmith.weights.hub import POCKET, resolve

OURS, LLAMA = musts.SERVERS
TEMPLATE = "models/templates/google-gemma-4-31B-it.jinja"
EMPTY_THOUGHT = r"'<|channel>thought\n<channel|>'"
START_S = 300
"""What loading may take."""
MODELS = (POCKET, "E2B", "tiny-E2B")


@dataclass(frozen=True, slots=True)
class Weights:
    """A model in both programs' files."""

    folder: Path
    gguf: Path
    dtype: str
    vocabulary: int


def weights_of(model: str, *, trained: bool = False) -> Weights:
    """The checkpoint of a model, and the GGUF file with the same weights; both are kept.

    Random weights at 4 bits; `trained`: pocket as it is shipped, in bfloat16.
    """
    bits = "4"
    if trained and model == POCKET:
        bits, folder = None, resolve(POCKET)
        file = Path(tempfile.gettempdir()) / "gemsmith-pocket.gguf"
    else:
        folder = random_checkpoint.made(model, bits, None)
        file = folder.with_name(f"{folder.name}-Q4_0.gguf")
    vocabulary = Gemma4Config.load(folder).text_config.vocab_size
    return Weights(folder, to_gguf.write(folder, file), measure.label(bits), vocabulary)


def chat_template(program: Path, file: Path) -> Path | None:
    """Gemma 4's chat format as llama.cpp's source has it, beside `file`; None where that is gone.

    It is the large models'. The small ones' begins a reply without an empty thought.
    """
    cache = program.parents[1] / "CMakeCache.txt"
    told = cache.read_text("utf-8") if cache.is_file() else ""
    found = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", told, re.MULTILINE)
    path = Path(found[1]) / TEMPLATE if found else None
    if path is None or not path.is_file():
        return None
    made = file.with_suffix(".jinja")
    made.write_text(path.read_text("utf-8").replace(EMPTY_THOUGHT, "''"), "utf-8")
    return made


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def peak(self) -> int:
        """The most memory it held at once, in bytes, mapped files included."""
        return status_bytes("VmHWM", self.process.pid)

    def resident(self) -> int:
        """The memory it holds now, in bytes."""
        return status_bytes("VmRSS", self.process.pid)

    def said(self) -> str:
        """What it wrote so far."""
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")


def _ours(weights: Weights, *, sequences: int, longest: int) -> list[str]:
    """The command of `gemsmith serve`, but for the port."""
    return [sys.executable, "-m", "gemsmith", "serve", str(weights.folder), "--name", "model",
            "--max-num-seqs", str(sequences), "--max-model-len", str(longest)]  # fmt: skip


def _llama(
    program: Path, weights: Weights, *, sequences: int, longest: int, threads: int
) -> list[str]:
    """The command of llama-server, but for the port: so many slots, each with room for `longest`.

    Its context is given to slots in equal parts, of whole 256 tokens.
    """
    room = sequences * -(-longest // 256) * 256
    command = [str(program), "--model", str(weights.gguf), "--alias", "model", "--threads",
               str(threads), "--parallel", str(sequences), "--ctx-size", str(room)]  # fmt: skip
    template = chat_template(program, weights.gguf)
    return [*command, "--chat-template-file", str(template)] if template else command


@contextmanager
def running(name: str, command: list[str], *, threads: int, cores: list[int]) -> Iterator[Server]:
    """A server on a free port, bound to `cores`, once it takes requests; it is stopped at the end.

    Raises:
      RuntimeError: it did not start; the last line of what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bound = ["taskset", "--cpu-list", ",".join(map(str, cores))] if cores else []
    with tempfile.TemporaryFile("a+b") as log:
        process = subprocess.Popen(
            [*bound, *command, "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=measure.REPOSITORY,
            env=measure.environment(threads),
        )
        made = Server(name, port, process, log)
        try:
            began = time.monotonic()
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() - began > START_S:
                    said = made.said().strip().splitlines() or ["no message"]
                    raise RuntimeError(f"{name} did not start: {said[-1]}")
                time.sleep(0.1)
            yield made
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def both(
    stack: ExitStack, weights: Weights, *, sequences: int, longest: int, threads: int
) -> tuple[list[Server], dict[str, str]]:
    """Our server, and llama.cpp's if it can be had, up until the stack ends; why one is missing.

    Raises:
      RuntimeError: ours did not start.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads] if platform.system() == "Linux" else []
    command = _ours(weights, sequences=sequences, longest=longest)
    up = [stack.enter_context(running(OURS, command, threads=threads, cores=cores))]
    program, why = llama.server()
    if program:
        command = _llama(program, weights, sequences=sequences, longest=longest, threads=threads)
        try:
            up.append(stack.enter_context(running(LLAMA, command, threads=threads, cores=cores)))
        except RuntimeError as error:
            why = str(error)
    return up, {LLAMA: why} if why else {}


def _healthy(port: int) -> bool:
    try:
        return asyncio.run(ask(port, "/health")).status == 200
    except OSError:
        return False
