"""The five released sizes."""

from difflib import get_close_matches
from typing import Any

from gemsmith.config.model import (
    AudioConfig,
    Gemma4Config,
    UnifiedAudioConfig,
    UnifiedVisionConfig,
    VisionConfig,
)
from gemsmith.config.text import TextConfig, layer_type
from gemsmith.errors import ConfigError


def _edge(layers: int, period: int, **sizes: Any) -> Gemma4Config:
    text = TextConfig(
        num_hidden_layers=layers,
        layer_types=tuple(layer_type(i, period, layers) for i in range(layers)),
        num_attention_heads=8,
        hidden_size_per_layer_input=256,
        final_logit_softcapping=30.0,
        **sizes,
    )
    return Gemma4Config(
        text_config=text,
        vision_config=VisionConfig(use_clipped_linears=True),
        audio_config=AudioConfig(),
    )


def _large(**sizes: Any) -> TextConfig:
    return TextConfig(
        sliding_window=1024,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
        max_position_embeddings=262_144,
        final_logit_softcapping=30.0,
        **sizes,
    )


_LARGE_VISION = VisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=72,
    standardize=True,
)

PRESETS: dict[str, Gemma4Config] = {
    "E2B": _edge(
        35,
        5,
        hidden_size=1536,
        intermediate_size=6144,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
    ),
    "E4B": _edge(
        42,
        6,
        hidden_size=2560,
        intermediate_size=10_240,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
    ),
    "12B": Gemma4Config(
        model_type="gemma4_unified",
        text_config=_large(
            model_type="gemma4_unified_text",
            hidden_size=3840,
            intermediate_size=15_360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_global_key_value_heads=1,
        ),
        vision_config=UnifiedVisionConfig(),
        audio_config=UnifiedAudioConfig(),
    ),
    "26B-A4B": Gemma4Config(
        text_config=_large(
            hidden_size=2816,
            intermediate_size=2112,
            num_hidden_layers=30,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_global_key_value_heads=2,
            enable_moe_block=True,
            num_experts=128,
            top_k_experts=8,
            moe_intermediate_size=704,
        ),
        vision_config=_LARGE_VISION,
    ),
    "31B": Gemma4Config(
        text_config=_large(
            hidden_size=5376,
            intermediate_size=21_504,
            num_hidden_layers=60,
            num_attention_heads=32,
            num_key_value_heads=16,
            num_global_key_value_heads=4,
        ),
        vision_config=_LARGE_VISION,
    ),
}


def preset(name: str) -> Gemma4Config:
    """The configuration of a released size, by name; case and a `gemma-4-` prefix are ignored.

    Raises:
      ConfigError: unknown name, with near matches.
    """
    key = name.removeprefix("google/").lower().removeprefix("gemma-4-").removesuffix("-it")
    for known, config in PRESETS.items():
        if known.lower() == key:
            return config
    near = get_close_matches(key.upper(), PRESETS, n=2, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"no preset {name!r}; presets are {', '.join(PRESETS)}. {hint}".rstrip())
