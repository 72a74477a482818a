"""llama.cpp at work on one job of `peers.py`: JSON on stdin, JSON as the last line of stdout.

Runs by its path in the peers' own virtual environment, which has no gemsmith and no torch, so it
imports the standard library and llama.cpp's C binding alone. Contexts are made as `llama-bench`
makes them (batches of 2048 in passes of 512, attention and repacking as llama.cpp chooses).

A long context is filled once: its state goes to a file in the job's `scratch`, which later runs
read back.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCH, PASS = 2048, 512
KEPT_FROM = 2048
"""Tokens of a context from which its state is kept in a file."""
Seconds = list[float]


def ids_of(count: int, vocabulary: int, first: int = 0) -> list[int]:
    """The same tokens for every program, spread over the vocabulary."""
    return [3 + (7919 * (first + n) + 17) % (vocabulary - 3) for n in range(count)]


class Llama:
    """A model and what `peers.py` asks of it."""

    def __init__(self, path: str, threads: int, scratch: str) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.cpp: Any = llama_cpp
        self.threads, self.scratch = threads, Path(scratch)
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self.model: Any = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            sys.exit(f"llama.cpp does not read {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocabulary)

    @contextmanager
    def context(self, tokens: int, sequences: int = 1) -> Iterator[Any]:
        params = self.cpp.llama_context_default_params()
        params.n_ctx = tokens
        params.n_batch, params.n_ubatch = BATCH, PASS
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.swa_full = False  # as the programs have it; the C default keeps whole windows
        made = self.cpp.llama_init_from_model(self.model, params)
        if not made:
            sys.exit(f"llama.cpp makes no context of {tokens} tokens")
        yield made
        self.cpp.llama_free(made)

    def feed(self, context: Any, ids: list[int]) -> None:
        """Append tokens to the one sequence, and wait for the logits of the last."""
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            tokens = (self.cpp.llama_token * len(piece))(*piece)
            batch = self.cpp.llama_batch_get_one(tokens, len(piece))
            if self.cpp.llama_decode(context, batch):
                sys.exit("llama.cpp failed to decode")
        self.cpp.llama_get_logits(context)

    def fill(self, context: Any, tokens: int) -> float | None:
        """Make the sequence so long; returns the seconds, or None if it was read from a file."""
        ids = ids_of(tokens, self.vocabulary)
        path = self.scratch / f"{tokens}.state"
        if path.is_file():
            held = (self.cpp.llama_token * tokens)()
            count = ctypes.c_size_t()
            if self.cpp.llama_state_seq_load_file(
                context, str(path).encode(), 0, held, tokens, ctypes.byref(count)
            ):
                return None
        start = time.perf_counter()
        self.feed(context, ids)
        seconds = time.perf_counter() - start
        if tokens >= KEPT_FROM:
            held = (self.cpp.llama_token * tokens)(*ids)
            self.cpp.llama_state_seq_save_file(context, str(path).encode(), 0, held, tokens)
        return seconds

    def prefill(self, tokens: int) -> Seconds:
        with self.context(tokens + 1) as context:
            start = time.perf_counter()
            self.feed(context, ids_of(tokens, self.vocabulary))
            return [time.perf_counter() - start]

    def decode(self, depth: int, tokens: int) -> dict[str, Any]:
        with self.context(depth + tokens + 8) as context:
            filled = self.fill(context, depth)
            # The first step after a fill has that one's caches to clear away.
            more = ids_of(tokens + 1, self.vocabulary, depth)
            self.feed(context, more[:1])
            start = time.perf_counter()
            for id in more[1:]:
                self.feed(context, [id])
            return {"seconds": time.perf_counter() - start, "fill": filled}

    def streams(self, count: int, depth: int, tokens: int) -> Seconds:
        """Steps of `count` sequences in one batch, each with a prompt of its own."""
        with self.context(count * (depth + tokens + 8), count) as context:
            batch = self.cpp.llama_batch_init(count * depth, 0, 1)

            def run(of_each: int, at: int) -> None:
                batch.n_tokens = count * of_each
                for row in range(batch.n_tokens):
                    sequence, step = divmod(row, of_each)
                    batch.token[row] = ids_of(1, self.vocabulary, 1000 * sequence + at + step)[0]
                    batch.pos[row], batch.n_seq_id[row] = at + step, 1
                    batch.seq_id[row][0] = sequence
                    batch.logits[row] = step == of_each - 1
                if self.cpp.llama_decode(context, batch):
                    sys.exit("llama.cpp failed to decode")
                self.cpp.llama_get_logits(context)

            run(depth, 0)
            run(1, depth)
            start = time.perf_counter()
            for step in range(tokens):
                run(1, depth + 1 + step)
            seconds = time.perf_counter() - start
            self.cpp.llama_batch_free(batch)
            return [seconds]

    def logits(self, ids: list[int], path: str) -> None:
        """After the last of `ids`, as float32 to a file."""
        with self.context(len(ids) + 1) as context:
            self.feed(context, ids)
            values = self.cpp.llama_get_logits_ith(context, -1)
            Path(path).write_bytes(ctypes.string_at(values, 4 * self.vocabulary))


def status_bytes(field: str, process: int | str = "self") -> int:
    """Memory of a process, mapped files included: VmHWM, the most it held, or VmRSS, now."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def work(engine: Any, tasks: dict[str, list[Any]]) -> dict[str, Any]:
    """Run tasks in order: {name: [method, arguments ...]}; what each gave, and the peaks."""
    results: dict[str, Any] = {}
    for name, (method, *arguments) in tasks.items():
        results[name] = {
            "result": getattr(engine, method)(*arguments),
            "peak": status_bytes("VmHWM"),
        }
    return results


def read_job() -> dict[str, Any]:
    """The job from stdin; binds this process to its cores before anything starts threads."""
    job = json.load(sys.stdin)
    if job["cores"]:
        os.sched_setaffinity(0, job["cores"])
    return job


if __name__ == "__main__":
    job = read_job()
    start = time.perf_counter()
    engine = Llama(job["model"], job["threads"], job["scratch"])
    loaded = time.perf_counter() - start
    done = {"load": loaded, "tasks": work(engine, job["tasks"])}
    done["about"] = engine.cpp.llama_print_system_info().decode()
    done["version"] = engine.cpp.__version__
    print(json.dumps(done))
