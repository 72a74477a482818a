"""A small model whose weights every format can hold, and its checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch

from gemsmith.config import Gemma4Config
from gemsmith.testing import random_model, random_towers, tiny_config, tiny_media_config
from gemsmith.weights.save import save_model


def low_config(size: str = "E2B", *, media: bool = False) -> Gemma4Config:
    """`tiny_config` with rows of multiples of 32."""
    tiny = tiny_media_config(size) if media else tiny_config(size)
    text = tiny.text_config
    text = replace(
        text,
        intermediate_size=64,
        hidden_size_per_layer_input=32 if text.hidden_size_per_layer_input else 0,
        moe_intermediate_size=32 if text.enable_moe_block else None,
    )
    return replace(tiny, text_config=text)


def floats(folder: Path, size: str = "E2B", *, media: bool = False) -> Path:
    """A checkpoint of random bfloat16 weights."""
    config = low_config(size, media=media)
    model = random_model(config, dtype=torch.bfloat16)
    towers = random_towers(config, dtype=torch.bfloat16) if media else None
    save_model(model, config, folder, towers=towers)
    return folder
