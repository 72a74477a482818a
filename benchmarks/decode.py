"""Decoding alone: tokens a second by context, passes of several tokens, time to the first token.

One sequence, one low-bit checkpoint with random weights, the whole path of a token: embedding and
per-layer rows, layers, K/V, logits. Contexts are filled by a real prompt. Passes of 4 and 8 tokens
are what verifying a draft costs, given as multiples of a pass of one.

Ceiling of a speed: what one token has to read (weights once, the K/V of its context) at the rate
of plain reading of as many bytes, measured in turn with the decoding in the same process.

The time to the first token is that of `gemsmith generate --max-tokens 1` in a fresh process, from
its start to its exit, after one run that nobody timed (files are cached and packed by then).

Run: python -m benchmarks.decode [--bits 4|mobile] [--record]
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import measure, random_checkpoint
from benchmarks.llama_worker import ids_of, status_bytes
from gemsmith import sizing, work
from gemsmith.config import Gemma4Config
from gemsmith.engine.context import Context
from gemsmith.engine.engine import LM
from gemsmith.weights import layouts
from gemsmith.weights.names import EMBEDDING, PLE_TABLE, expected_shapes, written_key
from gemsmith.weights.tensors import DTYPES, read_checkpoint

CONTEXTS = (128, 1024, 8192)
ROWS = (1, 4, 8)
ROWS_CONTEXT = 128
STEPS = 8
"""Tokens timed at once: contexts grow little while they are measured."""
PROMPT = 32


def weight_bytes(folder: Path) -> int:
    """Bytes of weights that one token reads, as they lie in memory.

    Every weight once, of experts those chosen; of the per-layer table, and of an embedding that is
    not the head, no more than a row, which is not counted.
    """
    config = Gemma4Config.load(folder)
    text, stored = config.text_config, read_checkpoint(folder)
    shapes = expected_shapes(text)
    low = layouts.fold(stored, shapes, layouts.read_section(folder))[1]
    total = 0
    for name, shape in shapes.items():
        if name == PLE_TABLE or (name == EMBEDDING and not text.tie_word_embeddings):
            continue
        key = written_key(name)
        if key in low:
            nbytes = low[key].format.bytes(*shape)
        else:
            nbytes = torch.Size(shape).numel() * DTYPES[stored[key].dtype].itemsize
        if "experts." in name:
            nbytes = nbytes * (text.top_k_experts or 0) // (text.num_experts or 1)
        total += nbytes
    return total


def kv_bytes(config: Gemma4Config, context: Context, tokens: int, reserved: int) -> int:
    """Bytes of K/V that the token after so many reads from a context as it stores them."""
    text = config.text_config
    values = work.decode_bytes(text, tokens, 1) - work.decode_bytes(text, 0, 1)
    return int(values * context.nbytes / sizing.kv_bytes(text, reserved, 1))


def first_token(folder: Path, threads: int, repeats: int) -> tuple[list[float], int]:
    """Seconds of whole processes that answer one token, and the prompt's tokens."""
    command = [sys.executable, "-m", "gemsmith", "generate", "--model", str(folder), "--json"]
    command += ["--max-tokens", "1", "--temperature", "0", "--device", "cpu"]
    environment = measure.environment(threads)

    def run(prompt: str) -> tuple[float, int]:
        start = time.perf_counter()
        made = subprocess.run([*command, prompt], capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - start
        if made.returncode:
            sys.exit(f"generate failed with exit code {made.returncode}: {made.stderr.strip()}")
        return seconds, json.loads(made.stdout)["usage"]["prompt_tokens"]

    # A letter is a token of the random vocabulary; the frame of a chat takes some.
    frame = run("x")[1] - 1
    prompt = "x" * max(1, PROMPT - frame)
    found = [run(prompt) for _ in range(repeats + 1)][1:]
    return [seconds for seconds, _ in found], found[0][1]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="E2B", choices=random_checkpoint.SIZES)
    parser.add_argument("--bits", default="4", choices=random_checkpoint.BITS)
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is kept")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = measure.machine()
    folder = random_checkpoint.made(options.size, options.bits, options.folder)
    name = measure.label(options.bits)

    first, prompt = first_token(folder, options.threads, options.repeats)
    lm = LM.load(folder, device="cpu")
    weights = weight_bytes(folder)
    vocabulary = lm.config.text_config.vocab_size
    more = 2 * STEPS * options.repeats

    def filled(tokens: int, room: int) -> Context:
        context = Context(lm.model, lm.kv)
        context.reserve(tokens + room)
        context.run(ids_of(tokens, vocabulary))
        return context

    def steps(context: Context) -> None:
        for id in ids_of(STEPS, vocabulary, 1):
            context.run([id])

    runs: dict[str, Callable[[], object]] = {}
    reads: dict[str, int] = {}
    for tokens in options.contexts:
        context = filled(tokens, more)
        runs[f"context {tokens}"] = lambda context=context: steps(context)
        reads[f"context {tokens}"] = weights + kv_bytes(lm.config, context, tokens, tokens + more)
    for rows in ROWS:
        context = filled(ROWS_CONTEXT, 2 * rows * options.repeats)
        ids = ids_of(rows, vocabulary, 1)
        runs[f"{rows} rows"] = lambda context=context, ids=ids: list(context.scan(ids))
    peak = status_bytes("VmHWM")
    reader = measure.Reader(weights)
    runs["read"] = reader.read
    seconds = measure.interleaved(runs, repeats=options.repeats)

    rates = [reader.nbytes / s / 1e9 for s in seconds["read"]]
    best = max(rates)
    title = f"{options.size} {name}"
    print(f"reading {reader.nbytes / 1e9:.2f} GB: {best:.1f} GB/s at best, {len(rates)} times")
    contexts: dict[str, dict[str, float]] = {}
    for run, nbytes in reads.items():
        found = measure.summary([STEPS / s for s in seconds[run]])
        found |= {"bytes": nbytes, "ceiling": best * 1e9 / nbytes}
        contexts[run.partition(" ")[2]] = found
        print(
            f"decode {title} {run:13} {found['median']:8.2f} tok/s ({found['min']:.2f}-"
            f"{found['max']:.2f}, n={found['n']})   {nbytes / 1e9:.3f} GB a token, "
            f"{found['median'] / found['ceiling']:.0%} of {found['ceiling']:.1f}"
        )
    passes = {rows: measure.summary(seconds[f"{rows} rows"]) for rows in ROWS}
    one = passes[1]["median"]
    for rows, found in passes.items():
        print(
            f"decode {title} {rows} rows in a pass {found['median'] * 1e3:8.1f} ms "
            f"({found['min'] * 1e3:.1f}-{found['max'] * 1e3:.1f}, n={found['n']})   "
            f"{found['median'] / one:.2f}x one row"
        )
    start = measure.summary(first)
    print(
        f"decode {title} first token of a {prompt}-token prompt after {start['median']:.2f} s "
        f"({start['min']:.2f}-{start['max']:.2f}, n={start['n']}), process start to exit"
    )
    results = {
        "model": options.size,
        "dtype": name,
        "unit": "tok/s",
        "gb_s_measured": best,
        "contexts": contexts,
        "passes_seconds": {str(rows): found for rows, found in passes.items()},
        "first_token_seconds": start,
        "prompt_tokens": prompt,
        "peak": peak,
    }
    measure.finish("decode", results, about, record=options.record)


if __name__ == "__main__":
    main()
