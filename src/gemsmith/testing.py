"""Small stand-ins for tests, shipped so that users of the package can test with them too.

`tiny_config` gives each of the five sizes' shape in kind (which layers slide, share K/V, have
experts) at toy dimensions; `random_model` fills one with seeded weights; `tolerance` says how far
two computations of the same thing may differ. No source file of the package imports this one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gemsmith.config import (
    LAYER_TYPES,
    PRESETS,
    AudioConfig,
    Gemma4Config,
    VisionConfig,
    text_only,
)
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.text.tokenizer import SpecialIds

SIZES = tuple(PRESETS)


def tiny_config(size: str, *, sliding_window: int = 8, vocab_size: int = 96) -> Gemma4Config:
    """The decoder of `size` with its layer pattern and every feature, a few layers deep."""
    text = PRESETS[size].text_config
    moe = text.enable_moe_block
    layers = 8 if text.num_kv_shared_layers else 6
    small = replace(
        text,
        vocab_size=vocab_size,
        vocab_size_per_layer_input=vocab_size,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=layers,
        layer_types=tuple(LAYER_TYPES[i % 2 if layers == 8 else i % 3 == 2] for i in range(layers)),
        num_attention_heads=4,
        num_key_value_heads=min(2, text.num_key_value_heads),
        num_global_key_value_heads=1 if text.attention_k_eq_v else None,
        head_dim=16,
        global_head_dim=32,
        sliding_window=sliding_window,
        num_kv_shared_layers=4 if text.num_kv_shared_layers else 0,
        hidden_size_per_layer_input=12 if text.hidden_size_per_layer_input else 0,
        num_experts=6 if moe else None,
        top_k_experts=2 if moe else None,
        moe_intermediate_size=20 if moe else None,
        max_position_embeddings=4096,
    )
    return replace(text_only(PRESETS[size]), text_config=small)


def whole_groups(config: Gemma4Config) -> Gemma4Config:
    """A tiny config with rows of whole groups of 32 everywhere, as the real sizes have them."""
    text = config.text_config
    text = replace(
        text,
        intermediate_size=64,
        hidden_size_per_layer_input=32 if text.hidden_size_per_layer_input else 0,
        moe_intermediate_size=32 if text.enable_moe_block else None,
    )
    return replace(config, text_config=text)


def tiny_media_config(size: str, *, sliding_window: int = 8, vocab_size: int = 96) -> Gemma4Config:
    """`tiny_config` with the image and audio inputs of `size`, small; ids end the vocabulary."""
    preset = PRESETS[size]
    vision, audio = preset.vision_config, preset.audio_config
    if isinstance(vision, VisionConfig):
        vision = replace(
            vision,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            position_embedding_size=512,
        )
    elif vision is not None:
        vision = replace(vision, mm_embed_dim=32, mm_posemb_size=128, output_proj_dims=32)
    if isinstance(audio, AudioConfig):
        audio = replace(
            audio,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            subsampling_conv_channels=(128, 4),
            output_proj_dims=24,
        )
    names = ("boi_token_id", "image_token_id", "video_token_id", "eoi_token_id")
    names += ("boa_token_id", "audio_token_id", "eoa_token_index")
    ids = {name: vocab_size - len(names) + i for i, name in enumerate(names)}
    tiny = tiny_config(size, sliding_window=sliding_window, vocab_size=vocab_size)
    return replace(tiny, vision_config=vision, audio_config=audio, **ids)


def media_ids(special: SpecialIds) -> dict[str, int | None]:
    """Fields of `Gemma4Config` that give media the token ids of a vocabulary."""
    return {
        "boi_token_id": special.boi,
        "eoi_token_id": special.eoi,
        "image_token_id": special.image,
        "video_token_id": special.video,
        "boa_token_id": special.boa,
        "eoa_token_index": special.eoa,
        "audio_token_id": special.audio,
    }


def random_towers(
    config: Gemma4Config, seed: int = 1, *, dtype: torch.dtype = torch.float32
) -> Towers:
    """Towers whose every weight is random, as `random_model`; bounds of linear layers do bite."""
    generator = torch.Generator().manual_seed(seed)
    towers = Towers(config, dtype=dtype)
    for name, tensor in (*towers.named_parameters(), *towers.named_buffers()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("_min", "_max")):
            tensor.data.fill_(-1.5 if name.endswith("_min") else 1.5)
        elif "norm" in name or "_ln" in name or name.endswith(("scale", "std_bias")):
            tensor.data.copy_(1 + 0.1 * noise)
        else:
            tensor.data.copy_(0.15 * noise)
    return towers.eval().requires_grad_(False)


def random_model(
    config: Gemma4Config, seed: int = 0, *, dtype: torch.dtype = torch.float32
) -> TextModel:
    """A decoder whose every weight, norms and scalars included, is random: none may be ignored."""
    generator = torch.Generator().manual_seed(seed)
    model = TextModel(config.text_config, dtype=dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        noise = torch.randn(tensor.shape, generator=generator)
        centred = "norm" in name or name.endswith(("scale", "layer_scalar"))
        tensor.data.copy_(1 + 0.1 * noise if centred else 0.15 * noise)
    return model.eval().requires_grad_(False)


def tolerance(dtype: torch.dtype, length: int, *, steps: int = 1) -> float:
    """How far two float computations of one sum may differ, relative to its terms' size.

    8 * eps * sqrt(length * steps): rounding errors of a reduction of `length` terms grow like a
    random walk, `steps` such reductions in sequence likewise; 8 covers the worst of many outputs.
    """
    return 8 * torch.finfo(dtype).eps * (length * steps) ** 0.5


def assert_close(actual: Tensor, expected: Tensor, limit: float) -> None:
    """Assert |actual - expected| <= limit * max(1, max |expected|), printing the worst place."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs()
    bound = limit * max(1.0, expected.abs().max().item())
    if not (error <= bound).all():
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"at {worst}: {actual[worst].item()} instead of {expected[worst].item()}; error "
            f"{error.max().item():.3g} > {bound:.3g}, {int((error > bound).sum())} of "
            f"{error.numel()} outside"
        )
