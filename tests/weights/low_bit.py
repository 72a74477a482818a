"""A small model whose weights every format can hold, and its checkpoint."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gemsmith.config import Gemma4Config
from gemsmith.model.text import TextModel
from gemsmith.testing import (
    random_model,
    random_towers,
    tiny_config,
    tiny_media_config,
    whole_groups,
)
from gemsmith.weights.hub import resolve
from gemsmith.weights.save import save_model


def low_config(size: str = "E2B", *, media: bool = False) -> Gemma4Config:
    """`tiny_config` with rows of multiples of 32."""
    return whole_groups(tiny_media_config(size) if media else tiny_config(size))


def floats(folder: Path, size: str = "E2B", *, media: bool = False) -> Path:
    """A checkpoint of random bfloat16 weights."""
    config = low_config(size, media=media)
    model = random_model(config, dtype=torch.bfloat16)
    towers = random_towers(config, dtype=torch.bfloat16) if media else None
    save_model(model, config, folder, towers=towers)
    return folder


def pocket_off_the_grid(folder: Path) -> Path:
    """The embedded model as if it had not been trained to be rounded to 4 bits: each matrix with
    noise of a tenth of its own spread, towers and all else as they are."""
    source = resolve("pocket")
    shutil.copytree(source, folder)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if ".language_model." in name and weight.ndim == 2:
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std() / 10
            weights[name] = (weight.float() + noise).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def growth_with_the_table(folder: Path, work: str) -> int:
    """KiB by which the peak memory of a process grows from a table of 4 MiB to one of 64.

    work: Python that does something with the checkpoint folder `at`.

    malloc's threshold is fixed where glibc has it at first. Left alone it rises with the blocks
    that are freed, up to 32 MiB; large buffers then lie between small ones that stay, and how much
    of the heap is lost to the gaps differs by 30 MiB from run to run.
    """
    config = low_config("31B")
    text = replace(
        config.text_config, num_hidden_layers=3, layer_types=config.text_config.layer_types[:3]
    )
    for name, mebibytes in (("small", 4), ("large", 64)):
        sized = replace(text, vocab_size=(mebibytes << 20) // 128)
        model = TextModel(sized, dtype=torch.bfloat16)
        for tensor in model.state_dict().values():
            tensor.fill_(0.01)
        save_model(model, replace(config, text_config=sized), folder / name)
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from gemsmith.weights import convert, load, tensors\n"
        "tensors.PIECE_BYTES = 1 << 20\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(l for l in lines if l.startswith('VmHWM')).split()[1])\n"
        "for name in 'small', 'large':\n"
        "    at = f'{sys.argv[1]}/{name}'\n"
        f"    {work}\n"
        "    print(peak())\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    small, large = (int(line) for line in done.stdout.split())
    return large - small
