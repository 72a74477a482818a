"""Peak memory of the command line on a model of real dimensions, and bytes of K/V.

`gemsmith generate` runs in a process of its own on a checkpoint with random weights; the system
reports the most memory that process held at once (its resident set: mapped weights that were
touched count, PLE rows too). The floor is the weights that every token passes through, which is all
of them but the per-layer table. K/V is what a cache holds against what sizing.py says.

Run: python -m benchmarks.memory [--record]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import measure, random_checkpoint
from gemsmith import sizing
from gemsmith.cache.ring import RingCache
from gemsmith.config import PRESETS, Gemma4Config

MOST_OVER_FLOOR = 1.15
KV_TOKENS = (1, 512, 4096, 32_768)


def floor_bytes(config: Gemma4Config) -> int:
    """bfloat16 weights without the per-layer table."""
    parts = sizing.parameters(config)
    return 2 * (sum(parts.values()) - parts.get("ple_table", 0))


def generate(folder: Path, *, prompt_words: int, max_tokens: int) -> tuple[int, float]:
    """Peak bytes and seconds of one run of the command line; its errors end the program."""
    prompt = " ".join(["word"] * prompt_words)
    command = [sys.executable, "-m", "gemsmith", "generate", prompt, "--model", str(folder)]
    command += ["--max-tokens", str(max_tokens), "--temperature", "0", "--device", "cpu"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the command failed with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return usage.ru_maxrss * unit, time.perf_counter() - started


def kv_measured(config: Gemma4Config, tokens: int) -> int:
    """Bytes that a cache really holds for so many tokens."""
    cache = RingCache(config.text_config, dtype=torch.bfloat16, k_from_v=_never)
    cache.reserve(tokens)
    return cache.nbytes


def _never(*_: object) -> torch.Tensor:
    raise AssertionError("nothing is read from a cache that is only measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="E2B", choices=[*PRESETS, "tiny-E2B"])
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is kept")
    parser.add_argument("--record", action="store_true", help="append to docs/numbers")
    options = parser.parse_args()
    about = measure.machine()
    config = random_checkpoint.config_of(options.size)
    folder = options.folder or Path(tempfile.gettempdir()) / f"gemsmith-random-{options.size}"
    random_checkpoint.write(config, folder)

    floor = floor_bytes(config)
    table = 2 * sizing.parameters(config).get("ple_table", 0)
    peak, seconds = generate(folder, prompt_words=100, max_tokens=16)
    print(
        f"generate {options.size} bf16, 500 tokens in and 16 out: peak {peak / 2**30:.2f} GiB = "
        f"{peak / floor:.3f} x the weights without PLE, {floor / 2**30:.2f} GiB "
        f"(must stay below {MOST_OVER_FLOOR}); PLE on disk {table / 2**30:.2f} GiB; {seconds:.0f} s"
    )
    kv: dict[str, dict[str, int]] = {}
    for tokens in KV_TOKENS:
        held, said = kv_measured(config, tokens), sizing.kv_bytes(config.text_config, tokens)
        kv[str(tokens)] = {"held": held, "sizing": said}
        same = "equal to" if held == said else f"NOT {said}, as"
        print(f"K/V of {tokens:6} tokens: {held} bytes, {same} what sizing says")
    results = {
        "model": options.size,
        "dtype": "bfloat16",
        "unit": "bytes",
        "peak": peak,
        "floor": floor,
        "ple_table": table,
        "peak_over_floor": peak / floor,
        "seconds": seconds,
        "kv": kv,
    }
    measure.finish("memory", results, about, record=options.record)


if __name__ == "__main__":
    main()
