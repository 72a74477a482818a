"""Configuration of every Gemma 4 size, and the per-layer plan that the rest of the house reads.

Field names are config.json keys. A `Gemma4Config` holds a `TextConfig` and, where the size has
them, the vision and audio configs. `TextConfig.layers` is the plan: one `LayerPlan` a layer with
its attention type, window, head size, key/value heads, the layer whose K/V it reads, MLP width.
Nothing here computes with tensors.

config.json comes in two spellings of the full-attention overrides, and both are read:
  flat       "global_head_dim": 512, "num_global_key_value_heads": 4
  per layer  "per_layer_config": {"5": {"head_dim": 512, "num_key_value_heads": 4}, ...}
also `expert_intermediate_size` for `moe_intermediate_size`, `eoa_token_id` for `eoa_token_index`
and `vision_soft_tokens_per_image`, beside `vision_config`, for its `default_output_length`. The
flat spelling is written.

Sources: transformers 5.23 configuration_gemma4.py and configuration_gemma4_unified.py;
google-deepmind/gemma gemma/gm/nn/gemma4/_config.py (per-layer plans as data).
"""

from gemsmith.config.drafter import DRAFTER_TYPES, DrafterConfig, published_drafter
from gemsmith.config.fields import MAX_CONFIG_BYTES
from gemsmith.config.model import (
    AudioConfig,
    Gemma4Config,
    UnifiedAudioConfig,
    UnifiedVisionConfig,
    VisionConfig,
    text_only,
)
from gemsmith.config.presets import PRESETS, preset
from gemsmith.config.text import LAYER_TYPES, LayerPlan, LayerType, RopeParameters, TextConfig

__all__ = [
    "DRAFTER_TYPES",
    "LAYER_TYPES",
    "MAX_CONFIG_BYTES",
    "PRESETS",
    "AudioConfig",
    "DrafterConfig",
    "Gemma4Config",
    "LayerPlan",
    "LayerType",
    "RopeParameters",
    "TextConfig",
    "UnifiedAudioConfig",
    "UnifiedVisionConfig",
    "VisionConfig",
    "preset",
    "published_drafter",
    "text_only",
]
