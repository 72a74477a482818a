"""Prefill at real dimensions: with prefill skip, without, and Transformers, on the same weights.

A prompt of --tokens tokens goes through the whole path of one request: embeddings, per-layer
inputs, layers, K/V cache, logits of the last token. Without skip every layer runs on every token;
the head runs on the last one in all three. Runs take turns in one process on one copy of the
weights, and their logits are compared before anything is timed.

Ceiling of a run: its operations at the best rate of a matrix product measured here just before
(of the model's MLP shape, the better of bfloat16 and float32), plus its single-row weights at the
bandwidth measured here. Nothing but faster products, or fewer of them, can pass it.

Run: python -m benchmarks.prefill [--record]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks import measure, random_checkpoint
from gemsmith import sizing, work
from gemsmith.cache.ring import RingCache
from gemsmith.config import TextConfig
from gemsmith.model.text import TextModel
from gemsmith.weights.load import load_model
from gemsmith.weights.names import PLE_TABLE, written_key

MUST_SPEED_UP, MUST_NOT_BE_SLOWER = 2.5, 1.0


def ours(model: TextModel, ids_T: Tensor, *, skip: bool) -> Tensor:
    """Logits [V] of the last token, its prompt stored in a fresh cache."""
    cache = RingCache(model.config, dtype=torch.bfloat16, k_from_v=model.k_from_v)
    last_R = torch.tensor([len(ids_T) - 1])
    with torch.inference_mode(), cache.step(len(ids_T)) as positions_T:
        if skip:
            hidden_RD = model(ids_T, positions_T, cache, rows_R=last_R)
        else:
            hidden_RD = model(ids_T, positions_T, cache)[last_R]
        return model.logits(hidden_RD)[0]


def transformers_model(model: TextModel, folder: Path) -> Any:
    """Transformers' decoder; its weights are the very tensors of `model`, which is of floats.

    Its per-layer table, which ours reads from the file, is the file mapped into memory.
    """
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4TextConfig

    config: Any = Gemma4Config.from_pretrained(folder).text_config
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs: Any = Gemma4ForCausalLM(config).bfloat16()
    # Buffers that no checkpoint holds (rotary frequencies, embedding scales) come from a likeness.
    few = {"vocab_size": 8, "vocab_size_per_layer_input": 8, "intermediate_size": 8}
    likeness = Gemma4ForCausalLM(Gemma4TextConfig(**{**config.to_dict(), **few}))
    buffers = {name: b for name, b in likeness.named_buffers() if "layer_scalar" not in name}
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if config.hidden_size_per_layer_input:
        with safe_open(folder / "model.safetensors", "pt") as file:
            table = file.get_tensor(written_key(PLE_TABLE))
            weights["model.embed_tokens_per_layer.weight"] = table
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        theirs.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return theirs.eval().requires_grad_(False)


def transformers_run(model: TextModel, folder: Path, ids_T: Tensor) -> Callable[[], Tensor]:
    """The same prompt through Transformers, which skips too."""
    theirs = transformers_model(model, folder)

    def run() -> Tensor:
        with torch.inference_mode():
            return theirs(ids_T[None], use_cache=True, logits_to_keep=1).logits[0, -1]

    return run


def check(name: str, logits_V: Tensor, expected_V: Tensor, limit: float) -> float:
    """Relative distance |a - b| / |b| of two logit vectors; ends the program if above `limit`."""
    a, b = logits_V.double(), expected_V.double()
    distance = float((a - b).norm() / b.norm())
    if not distance <= limit:
        sys.exit(f"{name}: logits are {distance:.3f} off, more than {limit:.3f}; nothing was timed")
    return distance


def ceiling(config: TextConfig, tokens: int, *, skip: bool, rate: float, bandwidth: float) -> float:
    """Fewest seconds: operations at `rate`, then weights used by one row at `bandwidth`."""
    single = config.vocab_size * config.hidden_size
    if skip:
        for plan in config.layers:
            if not plan.owns_kv:
                parts = sizing.layer_parameters(config, plan)
                single += sum(parts.values())
    flops = work.prefill_flops(config, tokens, 1, skip=skip) - 2 * single
    return flops / rate + 2 * single / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="E2B", choices=random_checkpoint.SIZES)
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is kept")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = measure.machine()
    tokens = options.tokens
    folder = random_checkpoint.made(options.size, None, options.folder)
    loaded, model = load_model(folder)
    config = loaded.text_config

    rates = measure.product_rates(tokens, config.hidden_size, config.intermediate_size)
    rate, bandwidth = max(rates.values()), measure.read_bandwidth()
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(1, config.vocab_size, (tokens,), generator=generator)
    runs: dict[str, Callable[[], Tensor]] = {
        "skip": lambda: ours(model, ids_T, skip=True),
        "no_skip": lambda: ours(model, ids_T, skip=False),
        "transformers": transformers_run(model, folder, ids_T),
    }
    first = {name: run() for name, run in runs.items()}
    # The roundings of the layers add up like a random walk.
    limit = torch.finfo(torch.bfloat16).eps * config.num_hidden_layers**0.5
    distances = {
        name: check(name, logits, first["no_skip"], limit)
        for name, logits in first.items()
        if name != "no_skip"
    }
    seconds = measure.interleaved(runs, repeats=options.repeats)
    speeds = {name: [tokens / s for s in times] for name, times in seconds.items()}
    ceilings = {
        name: tokens
        / ceiling(config, tokens, skip=name != "no_skip", rate=rate, bandwidth=bandwidth)
        for name in runs
    }
    print(
        f"matrix products of {tokens} x {config.hidden_size} x {config.intermediate_size}: "
        + ", ".join(f"{name} {r / 1e9:.0f} GFLOP/s" for name, r in rates.items())
        + f"; memory {bandwidth / 1e9:.1f} GB/s"
    )
    for name, values in speeds.items():
        s = measure.summary(values)
        print(
            f"prefill {options.size} bf16 {tokens} tokens {name:13} {s['median']:8.1f} tok/s "
            f"({s['min']:.1f}-{s['max']:.1f}, n={s['n']})   ceiling {ceilings[name]:.1f}, "
            f"{s['median'] / ceilings[name]:.0%} of it"
        )
    medians = {name: measure.summary(values)["median"] for name, values in speeds.items()}
    by_skip = medians["skip"] / medians["no_skip"]
    to_peer = medians["skip"] / medians["transformers"]
    print(f"skip is {by_skip:.2f}x no skip (must reach {MUST_SPEED_UP})")
    print(f"skip is {to_peer:.2f}x Transformers (must reach {MUST_NOT_BE_SLOWER})")
    results = {
        "model": options.size,
        "dtype": "bfloat16",
        "tokens": tokens,
        "unit": "tok/s",
        "runs": {
            name: {**measure.summary(values), "ceiling": ceilings[name]}
            for name, values in speeds.items()
        },
        "skip_over_no_skip": by_skip,
        "skip_over_transformers": to_peer,
        "logit_distance": distances,
        "flops_per_token": {
            "skip": work.prefill_flops(config, tokens, 1) / tokens,
            "no_skip": work.prefill_flops(config, tokens, 1, skip=False) / tokens,
        },
        "gflops_measured": {name: r / 1e9 for name, r in rates.items()},
        "gb_s_measured": bandwidth / 1e9,
    }
    measure.finish("prefill", results, about, record=options.record)


if __name__ == "__main__":
    main()
