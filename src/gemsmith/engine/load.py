"""What a checkpoint gives an `LM`: model, vocabulary, template, sampling, towers, drafter.

What cannot be meant is refused before anything is read. What this is not: how a name becomes a
folder and a file becomes weights is known to `weights` alone.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from gemsmith.config import Gemma4Config
from gemsmith.engine.context import kv_format
from gemsmith.engine.request import MIN_TEMPERATURE, SamplingParams
from gemsmith.engine.speculative import check_speculation
from gemsmith.errors import ConfigError
from gemsmith.model.drafter import MTPDrafter
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.text.template import ChatTemplate
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.weights.drafter import load_drafter
from gemsmith.weights.generation import GenerationConfig, load_generation_config
from gemsmith.weights.hub import resolve
from gemsmith.weights.load import Advance, load_model, load_towers, quantized_values, silent

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""None leaves the choice to the checkpoint."""


class Parts(TypedDict):
    """What `LM` takes, by the names of its arguments."""

    model: TextModel
    tokenizer: Tokenizer
    config: Gemma4Config
    sampling: SamplingParams
    end_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]
    template: ChatTemplate | None
    towers: Callable[[], Towers] | None
    kv: str
    speculation: str
    drafter: MTPDrafter | None
    name: str


def load_parts(
    name: str | Path,
    *,
    device: str,
    dtype: str | torch.dtype,
    towers: str,
    kv: str,
    quant: str | None,
    speculation: str,
    drafter: str | Path | None,
    progress: Callable[[int, int], None] | None,
    revision: str | None,
    offline: bool | None,
) -> Parts:
    """Read a checkpoint: see `LM.load`, also for what it raises."""
    if towers not in ("auto", "none"):
        raise ConfigError(f"towers {towers!r}: must be auto (loaded once needed) or none")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_speculation(speculation, drafter)
    kv_format(kv, torch.float32, torch.device(device))  # refused before anything is read
    folder = resolve(name, revision=revision, offline=offline)
    tokenizer = Tokenizer.load(folder)
    mtp = None
    if drafter is not None:  # before what may take minutes: it may be another model's
        beside = resolve(drafter, offline=offline)
        mtp = load_drafter(beside, Gemma4Config.load(folder).text_config, device=device)
    told = _told(progress, folder, quant)
    config, model = load_model(
        folder, device=device, dtype=_dtype(dtype), quant=quant, advance=told
    )
    weights_dtype = model.embed_tokens.weight.dtype
    if mtp is not None:
        mtp.to(weights_dtype)
    read_towers = partial(
        load_towers, folder, config, device=device, dtype=weights_dtype, quant=quant
    )
    habits = load_generation_config(folder, config)
    return Parts(
        model=model,
        tokenizer=tokenizer,
        config=config,
        sampling=_sampling(habits),
        end_ids=habits.eos_token_id,
        suppressed_ids=habits.suppress_tokens,
        template=ChatTemplate.load(folder),
        towers=read_towers if towers == "auto" else None,
        kv=kv,
        speculation=speculation,
        drafter=mtp,
        name=str(name),
    )


def _dtype(name: str | torch.dtype) -> torch.dtype | None:
    if isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _sampling(habits: GenerationConfig) -> SamplingParams:
    """What a checkpoint samples with unless a request says otherwise."""
    greedy = not habits.do_sample or habits.temperature < MIN_TEMPERATURE
    return SamplingParams(
        repetition_penalty=habits.repetition_penalty,
        temperature=0.0 if greedy else habits.temperature,
        top_k=habits.top_k,
        top_p=habits.top_p,
        min_p=habits.min_p,
        max_tokens=habits.max_new_tokens,
    )


def _told(progress: Callable[[int, int], None] | None, folder: Path, quant: str | None) -> Advance:
    """`progress` as `load_model` calls it: a piece at a time, summed here."""
    if progress is None or quant is None:
        return silent
    total, done = quantized_values(Gemma4Config.load(folder), quant), 0

    def advance(key: str, values: int) -> None:
        nonlocal done
        done += values
        progress(done, total)

    return advance
