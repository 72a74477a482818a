"""gemsmith and Transformers at work on one job of `peers.py`; llama.cpp is in `llama_worker.py`.

One process, one model, the same tasks by the same names: `prefill`, `decode`, `streams`, `logits`.
Every decoded token has its logits made; the tokens are given, none is chosen but in our `streams`.

Run by peers.py: python -m benchmarks.workers gemsmith|transformers
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_worker
from benchmarks.llama_worker import Seconds, ids_of
from benchmarks.measure import Reader
from benchmarks.prefill import transformers_model
from gemsmith import sizing
from gemsmith.engine.batching import BatchEngine, EngineConfig
from gemsmith.engine.context import Context
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.request import Request, SamplingParams
from gemsmith.ops import native
from gemsmith.weights.load import load_model


class Gemsmith:
    def __init__(self, folder: str) -> None:
        # Guesses would make more than one token of a step, which the others do not.
        self.lm = LM.load(folder, device="cpu", speculation="off")
        self.vocabulary = self.lm.config.text_config.vocab_size

    def context(self, tokens: int) -> Context:
        made = Context(self.lm.model, self.lm.kv)
        made.reserve(tokens)
        return made

    def prefill(self, tokens: int) -> Seconds:
        context = self.context(tokens)
        start = time.perf_counter()
        context.run(ids_of(tokens, self.vocabulary))
        return [time.perf_counter() - start]

    def decode(self, depth: int, tokens: int) -> dict[str, Any]:
        context = self.context(depth + tokens + 8)
        start = time.perf_counter()
        context.run(ids_of(depth, self.vocabulary))
        filled = time.perf_counter() - start
        more = ids_of(tokens + 1, self.vocabulary, depth)
        context.run(more[:1])
        start = time.perf_counter()
        for id in more[1:]:
            context.run([id])
        return {"seconds": time.perf_counter() - start, "fill": filled}

    def streams(self, count: int, depth: int, tokens: int) -> Seconds:
        """Steps of `count` requests in the server's engine, likeliest tokens chosen: all prompts
        are read in the first step, and nobody is done before the last."""
        engine = BatchEngine(
            self.lm,
            EngineConfig(
                max_num_seqs=count,
                max_num_batched_tokens=count * (depth + 1),
                # Admission keeps a block free for each sequence that runs.
                max_model_len=depth + tokens + 3 + sizing.BLOCK_TOKENS,
                prefix_caching=False,
            ),
        )
        params = SamplingParams(temperature=0, ignore_eos=True)
        for sequence in range(count):
            prompt = Prompt(ids_of(depth, self.vocabulary, 1000 * sequence))
            engine.add(Request(prompt=prompt, params=params, chat=False))
        engine.step()
        engine.step()
        before = engine.stats()
        assert before.generated_tokens == 2 * count, "not all are decoding"
        start = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        seconds = time.perf_counter() - start
        after = engine.stats()
        made = after.generated_tokens - before.generated_tokens
        assert made == count * tokens, f"{made} tokens in {tokens} steps of {count} requests"
        assert after.running == count, "requests ended while they were timed"
        return [seconds]

    def logits(self, ids: list[int], path: str) -> None:
        _save(Context(self.lm.model, self.lm.kv).run(ids), path)

    def read(self, nbytes: int) -> Seconds:
        """Plain reading of so many bytes, the best of three: decoding cannot be faster."""
        reader = Reader(nbytes)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            reader.read()
            seconds.append((time.perf_counter() - start) * nbytes / reader.nbytes)
        return [min(seconds[1:])]


class Transformers:
    def __init__(self, folder: str) -> None:
        _, model = load_model(folder)
        self.model = transformers_model(model, Path(folder))
        self.vocabulary = model.config.vocab_size

    def _run(self, ids_BT: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        out = self.model(ids_BT, past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def _ids(self, count: int, first: int = 0) -> Tensor:
        return torch.tensor([ids_of(count, self.vocabulary, first)])

    def prefill(self, tokens: int) -> Seconds:
        ids_BT = self._ids(tokens)
        start = time.perf_counter()
        self._run(ids_BT)
        return [time.perf_counter() - start]

    def decode(self, depth: int, tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        _, past = self._run(self._ids(depth))
        filled = time.perf_counter() - start
        return {"seconds": self._steps(past, 1, depth, tokens), "fill": filled}

    def streams(self, count: int, depth: int, tokens: int) -> Seconds:
        ids = [self._ids(depth, 1000 * sequence) for sequence in range(count)]
        _, past = self._run(torch.cat(ids))
        return [self._steps(past, count, depth, tokens)]

    def _steps(self, past: Any, count: int, depth: int, tokens: int) -> float:
        more = self._ids(tokens + 1, depth).expand(count, -1)
        self._run(more[:, :1], past)
        start = time.perf_counter()
        for step in range(1, tokens + 1):
            self._run(more[:, step : step + 1], past)
        return time.perf_counter() - start

    def logits(self, ids: list[int], path: str) -> None:
        _save(self._run(torch.tensor([ids]))[0][0], path)


def _save(logits_V: Tensor, path: str) -> None:
    Path(path).write_bytes(logits_V.float().contiguous().view(torch.uint8).numpy().tobytes())


@torch.inference_mode()
def main(kind: str) -> None:
    job = llama_worker.read_job()
    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    engine = Gemsmith(job["model"]) if kind == "gemsmith" else Transformers(job["model"])
    loaded = time.perf_counter() - start
    done = {"load": loaded, "tasks": llama_worker.work(engine, job["tasks"])}
    print(json.dumps(done | {"about": native.isa(), "version": ""}))


if __name__ == "__main__":
    main(sys.argv[1])
