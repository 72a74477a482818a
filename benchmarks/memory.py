"""Peak memory of the command line on a model of real dimensions, and bytes of K/V.

`gemsmith generate` runs in a process of its own on a checkpoint with random weights; the system
reports the most memory that process held at once (its resident set: mapped weights that were
touched count, PLE rows too). The floor is the weights that every token passes through, which is all
of them but the per-layer table. What the page cache holds of the checkpoint's files after the run
stands beside it: that memory is the system's, which takes it back when it is short.

In bfloat16 500 tokens go in and 16 come out, and K/V is counted: what a cache holds against what
sizing.py says. In few bits 256 tokens come out of a short prompt, after one run that nobody
measured, which leaves the weights packed.

Run: python -m benchmarks.memory [--bits 4|mobile] [--record]
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import measure, random_checkpoint
from benchmarks.decode import weight_bytes
from gemsmith import sizing
from gemsmith.cache.ring import RingCache
from gemsmith.config import Gemma4Config
from gemsmith.weights.tensors import read_checkpoint

BYTES = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "I64": 8}
MOST_OVER_FLOOR = 1.15
KV_TOKENS = (1, 512, 4096, 32_768)


def floor_bytes(config: Gemma4Config) -> int:
    """bfloat16 weights without the per-layer table."""
    parts = sizing.parameters(config)
    return 2 * (sum(parts.values()) - parts.get("ple_table", 0))


def table_bytes(folder: Path) -> int:
    """The per-layer table as it lies in the checkpoint, scales included."""
    stored = read_checkpoint(folder).items()
    return sum(
        math.prod(tensor.shape) * BYTES[tensor.dtype]
        for key, tensor in stored
        if "embed_tokens_per_layer" in key
    )


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
    cache = RingCache(config.text_config, dtype=torch.bfloat16)
    cache.reserve(tokens)
    return cache.nbytes


def kv_table(config: Gemma4Config) -> dict[str, dict[str, int]]:
    """Bytes held and bytes said for some numbers of tokens, printed too."""
    kv: dict[str, dict[str, int]] = {}
    for tokens in KV_TOKENS:
        held, said = kv_measured(config, tokens), sizing.kv_bytes(config.text_config, tokens)
        kv[str(tokens)] = {"held": held, "sizing": said}
        same = "equal to" if held == said else f"NOT {said}, as"
        print(f"K/V of {tokens:6} tokens: {held} bytes, {same} what sizing says")
    return kv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="E2B", choices=random_checkpoint.SIZES)
    parser.add_argument("--bits", choices=random_checkpoint.BITS, help="bfloat16 without")
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is kept")
    parser.add_argument("--tokens", type=int, help="how many come out; 16, or 256 in few bits")
    measure.add_record(parser)
    options = parser.parse_args()
    about = measure.machine()
    config = random_checkpoint.config_of(options.size)
    folder = random_checkpoint.made(options.size, options.bits, options.folder)
    name = measure.label(options.bits)

    floor, words, tokens = floor_bytes(config), 100, options.tokens or 16
    table = 2 * sizing.parameters(config).get("ple_table", 0)
    if options.bits:
        floor, words, tokens = weight_bytes(folder), 4, options.tokens or 256
        table = table_bytes(folder)
        generate(folder, prompt_words=words, max_tokens=1)
    peak, seconds = generate(folder, prompt_words=words, max_tokens=tokens)
    cached = measure.cached_bytes(folder)
    must = "" if options.bits else f" (must stay below {MOST_OVER_FLOOR})"
    print(
        f"generate {options.size} {name}, {5 * words} tokens in and {tokens} out: peak "
        f"{peak / 1e9:.2f} GB = {peak / floor:.3f} x the weights every token reads, "
        f"{floor / 1e9:.2f} GB{must}; {table / 1e9:.2f} GB stay on disk; {seconds:.0f} s"
    )
    if cached is not None:
        print(f"the page cache then holds {cached / 1e9:.2f} GB of the checkpoint's files")
    results = {
        "model": options.size,
        "dtype": name,
        "unit": "bytes",
        "tokens": tokens,
        "peak": peak,
        "floor": floor,
        "ple_table": table,
        "peak_over_floor": peak / floor,
        "page_cache": cached,
        "seconds": seconds,
        "kv": {} if options.bits else kv_table(config),
    }
    measure.finish("memory", results, about, record=options.record)


if __name__ == "__main__":
    main()
