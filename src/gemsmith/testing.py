"""Small stand-ins for tests, shipped so that users of the package can test with them too.

`tiny_config` gives each of the five sizes' shape in kind (which layers slide, share K/V, have
experts) at toy dimensions; `random_model` fills one with seeded weights; `tolerance` says how far
two computations of the same thing may differ. No source file of the package imports this one.
"""

from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from gemsmith.config import (
    LAYER_TYPES,
    PRESETS,
    AudioConfig,
    DrafterConfig,
    Gemma4Config,
    TextConfig,
    VisionConfig,
    published_drafter,
    text_only,
)
from gemsmith.model.drafter import MTPDrafter
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


def tiny_drafter_config(target: TextConfig) -> DrafterConfig:
    """The drafter of a tiny model: as published beside the size, small; a centroid has 8 tokens or
    the next more that divide the vocabulary."""
    each = next(n for n in range(8, target.vocab_size + 1) if target.vocab_size % n == 0)
    published = published_drafter(replace(target, vocab_size=1 << 18))
    text = replace(
        published.text_config,
        vocab_size=target.vocab_size,
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
    )
    return replace(
        published,
        text_config=text,
        num_centroids=target.vocab_size // each,
        centroid_intermediate_top_k=3,
    )


def random_drafter(
    target: TextConfig, seed: int = 2, *, dtype: torch.dtype = torch.float32
) -> MTPDrafter:
    """A drafter of a tiny model whose every weight is random, as `random_model`."""
    generator = torch.Generator().manual_seed(seed)
    model = MTPDrafter(tiny_drafter_config(target), target, dtype=dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype == torch.long:
            tensor.data.copy_(torch.randperm(len(tensor), generator=generator))
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        centred = "norm" in name or name.endswith("layer_scalar")
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


# -- tools ------------------------------------------------------------------------------------

_WORDS = ("city", "unit", "days", "Name", "note", "max", "from_", "x-id", "größe", "k2", "a.b")
_TEXTS = ("", "a", "ab", "celsius", "New York", 'say "hi"', "{x:1}", "1", "null", "é", "a,b:c\n")


def random_tool(random: Random, *, name: str = "use_it", depth: int = 3) -> dict[str, Any]:
    """A declaration with arguments of a random schema: whatever calls can be held to may occur.

    random: of the standard library, or what stands for one. Every schema has a value that fits.
    """
    parameters = _random_object(random, depth)
    parameters.setdefault("properties", {})
    defs = {key: _random_schema(random, 1) for key in ("First", "Second")}
    if random.random() < 0.3:
        parameters["properties"]["shared"] = {"$ref": "#/$defs/First"}
        parameters["properties"]["more"] = {
            "type": "array",
            "items": {"$ref": "#/$defs/Second"},
            "maxItems": 2,
        }
        parameters["$defs"] = defs
    function = {"name": name, "description": "Try it.", "parameters": parameters}
    return {"type": "function", "function": function}


def _random_object(random: Random, depth: int) -> dict[str, Any]:
    keys = random.sample(_WORDS, random.randint(0, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {key: _random_schema(random, depth - 1) for key in keys},
        "required": [key for key in keys if random.random() < 0.5],
        # Absent it would mean any to JSON Schema, none to the call syntax.
        "additionalProperties": False,
    }
    if random.random() < 0.2:
        schema["additionalProperties"] = random.choice([True, {"type": "integer"}])
    if keys and random.random() < 0.2:
        schema["minProperties"] = random.randint(0, len(keys))
        schema["maxProperties"] = len(keys)
    return schema


def _random_schema(random: Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth > 0:
        kinds += ["array", "object", "anyOf", "oneOf", "allOf", "set"]
    low = random.randint(-30, 30)
    match random.choice(kinds):
        case "string":
            schema = {"type": "string"}
            if random.random() < 0.4:
                schema |= {"minLength": random.randint(0, 3), "maxLength": random.randint(3, 9)}
            return schema | (
                {"format": "date"} if random.random() < 0.1 and len(schema) == 1 else {}
            )
        case "integer":
            bounds: list[dict[str, Any]] = [
                {},
                {"minimum": low},
                {"exclusiveMaximum": low},
                {"minimum": low, "maximum": low + random.randint(0, 200)},
                {"minimum": low, "maximum": low + 40, "multipleOf": random.randint(1, 7)},
            ]
            return {"type": "integer"} | random.choice(bounds)
        case "number":
            bounds = [
                {},
                {"minimum": low / 4},
                {"exclusiveMinimum": low - 0.125, "maximum": low + 9.5},
            ]
            return {"type": "number"} | random.choice(bounds)
        case "boolean" | "null" as kind:
            return {"type": kind}
        case "enum":
            values: list[Any] = [*_TEXTS, 1, -2.5, True, None, [1, "a"], {"b": "x", "A": [None]}]
            return {"enum": random.sample(values, random.randint(1, 4))}
        case "const":
            return {"const": random.choice([*_TEXTS, 7, False])}
        case "pattern":
            return {"type": "string", "pattern": random.choice(_PATTERNS)}
        case "array":
            schema = {"type": "array", "items": _random_schema(random, depth - 1)}
            if random.random() < 0.6:
                schema |= {"minItems": random.randint(0, 2), "maxItems": random.randint(2, 4)}
            return schema
        case "set":
            listed = random.sample(_TEXTS, random.randint(1, 5))
            return {"type": "array", "items": {"enum": listed}, "uniqueItems": True}
        case "anyOf":
            return {"anyOf": [_random_schema(random, depth - 1) for _ in range(2)]}
        case "oneOf":
            branches = []
            for tag in ("cat", "dog"):
                branch = _random_object(random, depth - 1)
                branch["properties"]["kind"] = {"const": tag}
                branch["required"].append("kind")
                branch.pop("maxProperties", None)
                branches.append(branch)
            return {"oneOf": branches}
        case "allOf":
            return {"type": "integer", "allOf": [{"minimum": low}, {"maximum": low + 5}]}
    return _random_object(random, depth - 1)


_PATTERNS = ("^[a-z]{2,5}$", r"^\d{3}-\d{2}$", "b", r"^(yes|no)\s?$", "^a|z$", r"^[^/]+/x$")
