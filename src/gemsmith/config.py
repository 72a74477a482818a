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

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypeVar

from gemsmith.errors import ConfigError

LayerType: TypeAlias = Literal["sliding_attention", "full_attention"]
C = TypeVar("C")
LAYER_TYPES: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
MAX_CONFIG_BYTES = 4 << 20

# Keys of released config.json files that change nothing about inference, or that gemsmith
# derives; how weights are stored is read with them. Any other key that is not a field is reported.
IGNORED_KEYS = frozenset(
    """
    architectures attention_bias attention_dropout auto_map bad_words_ids chunk_size_feed_forward
    decoder_start_token_id default_output_length dtype expert_intermediate_size
    global_head_dim gradient_clipping id2label initializer_range is_decoder
    is_encoder_decoder label2id max_position_embeddings_original name_or_path _name_or_path
    output_attentions output_hidden_states per_layer_config prefix problem_type
    quantization_config
    query_pre_attn_scalar return_dict _sliding_window_pattern sliding_window_pattern
    task_specific_params tie_encoder_decoder torch_dtype transformers_version use_cache
    vision_soft_tokens_per_image _attn_implementation _commit_hash
    hidden_activation hidden_act attention_invalid_logits_value rope_theta rope_scaling
    """.split()  # noqa: SIM905
)


def _size(default: Any = MISSING, *, low: int = 1, high: int = 1 << 20) -> Any:
    """An integer field with its allowed range; absurd sizes are refused before any allocation."""
    return field(default=default, metadata={"low": low, "high": high})


def _bad(where: str, key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{where}: {key} is {value!r}; {allowed}")


def _check(where: str, spec: Field[Any], value: Any) -> Any:
    """Return `value` as the type that `spec` declares, or raise ConfigError naming the key."""
    kind = spec.type.__name__ if isinstance(spec.type, type) else str(spec.type)
    if value is None:
        if "None" in kind:
            return None
        raise _bad(where, spec.name, value, "a value is required")
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise _bad(where, spec.name, value, "must be true or false")
    elif kind.startswith("int"):
        low, high = spec.metadata.get("low", 0), spec.metadata.get("high", 1 << 40)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _bad(where, spec.name, value, f"must be an integer from {low} to {high}")
    elif kind.startswith("float"):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise _bad(where, spec.name, value, "must be a finite number")
        return float(value)
    elif kind.startswith("str") and not isinstance(value, str):
        raise _bad(where, spec.name, value, "must be a string")
    return value


def _read(
    cls: Callable[..., C], data: Any, where: str, special: Mapping[str, Callable[[Any], Any]]
) -> C:
    """Build dataclass `cls` from a JSON object, checking each key's name, type and range."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(data).__name__}")
    specs = {spec.name: spec for spec in fields(cls)}  # pyright: ignore[reportArgumentType]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key in special:
            values[key] = special[key](value)
        elif key in specs:
            values[key] = _check(where, specs[key], value)
        elif key not in IGNORED_KEYS:
            near = get_close_matches(key, specs, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "No known key is near it."
            raise ConfigError(
                f"{where}: unknown key {key!r}. {hint} Remove it if it has no effect."
            )
    missing = [n for n, s in specs.items() if n not in values and s.default is MISSING]
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(repr(n) for n in missing)}")
    return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeParameters:
    """Rotary embedding of one layer type.

    `default` rotates every pair: inv_freq_i = theta^(-2i/head_dim). `proportional` keeps those
    frequencies for the first partial_rotary_factor of the pairs and sets the others to zero.
    """

    rope_type: str = "default"
    rope_theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in ("default", "proportional"):
            raise _bad(
                "rope_parameters", "rope_type", self.rope_type, "must be default or proportional"
            )
        if not (self.rope_theta > 0 and self.factor > 0 and 0 < self.partial_rotary_factor <= 1):
            raise ConfigError(
                f"rope_parameters: theta {self.rope_theta}, factor {self.factor} must be positive "
                f"and partial_rotary_factor {self.partial_rotary_factor} in (0, 1]"
            )


SLIDING_ROPE = RopeParameters()
FULL_ROPE = RopeParameters(
    rope_type="proportional", rope_theta=1_000_000.0, partial_rotary_factor=0.25
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """What one decoder layer is. Everything that differs between layers is here."""

    index: int
    layer_type: LayerType
    window: int | None
    """Keys a query sees, itself included; None in a full-attention layer."""
    head_dim: int
    num_key_value_heads: int
    kv_source: int
    """The layer whose K/V this layer reads; its own index if it owns them."""
    intermediate_size: int
    k_eq_v: bool
    """No v_proj: V is the un-scaled norm of the raw K projection."""
    rope: RopeParameters

    @property
    def owns_kv(self) -> bool:
        return self.kv_source == self.index


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The decoder (`text_config` of config.json)."""

    model_type: str = "gemma4_text"
    vocab_size: int = _size(262_144, high=1 << 22)
    hidden_size: int = _size(high=1 << 16)
    intermediate_size: int = _size()
    num_hidden_layers: int = _size(high=1024)
    num_attention_heads: int = _size(high=1024)
    num_key_value_heads: int = _size(high=1024)
    num_global_key_value_heads: int | None = _size(None, high=1024)
    """Key/value heads of the full-attention layers where attention_k_eq_v; None = as sliding."""
    head_dim: int = _size(256, low=2, high=4096)
    global_head_dim: int = _size(512, low=2, high=4096)
    layer_types: tuple[LayerType, ...] = ()
    """One entry a layer; empty = five sliding then one full, repeated."""
    sliding_window: int = _size(512, high=1 << 24)
    num_kv_shared_layers: int = _size(0, low=0, high=1023)
    attention_k_eq_v: bool = False
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = _size(0, low=0, high=4096)
    vocab_size_per_layer_input: int = _size(262_144, low=0, high=1 << 22)
    enable_moe_block: bool = False
    num_experts: int | None = _size(None, high=4096)
    top_k_experts: int | None = _size(None, high=4096)
    moe_intermediate_size: int | None = _size(None)
    use_bidirectional_attention: str | None = None
    max_position_embeddings: int = _size(131_072, high=1 << 24)
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    sliding_rope: RopeParameters = SLIDING_ROPE
    full_rope: RopeParameters = FULL_ROPE
    tie_word_embeddings: bool = True
    """False only in low-bit checkpoints that store head and embedding apart."""
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_id: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if not self.layer_types:
            n = self.num_hidden_layers
            plan = tuple(_type(i, 6, n) for i in range(n))
            object.__setattr__(self, "layer_types", plan)
        self._check_consistency()

    def _check_consistency(self) -> None:
        def refuse(text: str) -> ConfigError:
            return ConfigError(f"text_config: {text}")

        if len(self.layer_types) != self.num_hidden_layers:
            raise refuse(
                f"layer_types has {len(self.layer_types)} entries but num_hidden_layers is "
                f"{self.num_hidden_layers}; give one entry a layer"
            )
        if self.layer_types[-1] != "full_attention":
            raise refuse("the last of layer_types must be full_attention")
        for heads, name in (
            (self.num_key_value_heads, "num_key_value_heads"),
            (self.global_key_value_heads, "num_global_key_value_heads"),
        ):
            if self.num_attention_heads % heads:
                raise refuse(
                    f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                    f"{name} {heads}"
                )
        for dim, name in ((self.head_dim, "head_dim"), (self.global_head_dim, "global_head_dim")):
            if dim % 2:
                raise refuse(f"{name} {dim} is odd; rotary embedding needs pairs")
        if self.num_kv_shared_layers >= self.num_hidden_layers:
            raise refuse(
                f"num_kv_shared_layers {self.num_kv_shared_layers} leaves no layer of "
                f"{self.num_hidden_layers} to own K/V"
            )
        first_shared = self.first_kv_shared_layer
        for kind in set(self.layer_types[first_shared:]):
            if kind not in self.layer_types[:first_shared]:
                raise refuse(
                    f"layers {first_shared}.. share K/V but no {kind} layer before them owns any"
                )
        moe = (self.num_experts, self.top_k_experts, self.moe_intermediate_size)
        if self.enable_moe_block:
            if None in moe:
                raise refuse(
                    "enable_moe_block needs num_experts, top_k_experts and moe_intermediate_size"
                )
            if (self.top_k_experts or 0) > (self.num_experts or 0):
                raise refuse(
                    f"top_k_experts {self.top_k_experts} exceeds num_experts {self.num_experts}"
                )
        if self.attention_k_eq_v and self.num_kv_shared_layers:
            raise refuse("attention_k_eq_v and num_kv_shared_layers are never used together")
        if self.use_bidirectional_attention not in (None, "vision"):
            raise refuse(
                f"use_bidirectional_attention is {self.use_bidirectional_attention!r}; "
                'only null and "vision" are Gemma 4 decoders'
            )
        if self.rms_norm_eps <= 0:
            raise refuse(f"rms_norm_eps {self.rms_norm_eps} must be positive")
        if self.final_logit_softcapping is not None and self.final_logit_softcapping <= 0:
            raise refuse(
                f"final_logit_softcapping {self.final_logit_softcapping} must be positive or null"
            )
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input < 1:
            raise refuse("hidden_size_per_layer_input needs vocab_size_per_layer_input")

    @property
    def global_key_value_heads(self) -> int:
        """K/V heads of full-attention layers. The override counts only where K = V, as in HF."""
        if self.attention_k_eq_v and self.num_global_key_value_heads:
            return self.num_global_key_value_heads
        return self.num_key_value_heads

    @property
    def first_kv_shared_layer(self) -> int:
        """Layers from here on own no K/V; num_hidden_layers if every layer owns its own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        return _plan(self)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        if not isinstance(data, dict):
            raise ConfigError(f"text_config: expected a JSON object, got {type(data).__name__}")
        data = _flat_spelling(data)
        for name in ("sliding_rope", "full_rope"):
            if name in data:
                raise _bad("text_config", name, data[name], "write rope_parameters instead")
        # Defaults of a config.json that leaves the key out differ by family, as in transformers.
        unified = data.get("model_type") == "gemma4_unified_text"
        data.setdefault("hidden_size_per_layer_input", 0 if unified else 256)
        if unified:
            data.setdefault("use_bidirectional_attention", "vision")
        rope = data.pop("rope_parameters", None)
        if rope is not None:
            if not isinstance(rope, dict) or not set(rope) <= set(LAYER_TYPES):
                raise _bad("text_config", "rope_parameters", rope, f"keys are {LAYER_TYPES}")
            for kind, name in zip(LAYER_TYPES, ("sliding_rope", "full_rope"), strict=True):
                if rope.get(kind) is not None:
                    where = f"text_config.rope_parameters.{kind}"
                    data[name] = _read(RopeParameters, rope[kind], where, {})
        special = {
            "layer_types": _layer_types,
            "eos_token_id": _ids,
            "sliding_rope": lambda rope: rope,
            "full_rope": lambda rope: rope,
        }
        return _read(cls, data, "text_config", special)

    def to_dict(self) -> dict[str, Any]:
        skip = {"sliding_rope", "full_rope", "layer_types", "eos_token_id"}
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        out["layer_types"] = list(self.layer_types)
        out["eos_token_id"] = _ids_json(self.eos_token_id)
        out["hidden_activation"] = "gelu_pytorch_tanh"
        out["rope_parameters"] = {
            kind: _plain(rope)
            for kind, rope in zip(LAYER_TYPES, (self.sliding_rope, self.full_rope), strict=True)
        }
        return out


@lru_cache(maxsize=64)
def _plan(config: TextConfig) -> tuple[LayerPlan, ...]:
    first_shared = config.first_kv_shared_layer
    last_owner = {kind: i for i, kind in enumerate(config.layer_types[:first_shared])}
    plans: list[LayerPlan] = []
    for index, kind in enumerate(config.layer_types):
        shared, sliding = index >= first_shared, kind == "sliding_attention"
        wide = config.use_double_wide_mlp and shared
        plans.append(
            LayerPlan(
                index=index,
                layer_type=kind,
                window=config.sliding_window if sliding else None,
                head_dim=config.head_dim if sliding else config.global_head_dim,
                num_key_value_heads=(
                    config.num_key_value_heads if sliding else config.global_key_value_heads
                ),
                kv_source=last_owner[kind] if shared else index,
                intermediate_size=config.intermediate_size * (2 if wide else 1),
                k_eq_v=config.attention_k_eq_v and not sliding,
                rope=config.sliding_rope if sliding else config.full_rope,
            )
        )
    return tuple(plans)


def _plain(rope: RopeParameters) -> dict[str, Any]:
    """A rope entry with only the keys its type reads."""
    out: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.rope_theta}
    if rope.rope_type == "proportional":
        out["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.factor != 1.0:
        out["factor"] = rope.factor
    return out


def _layer_types(value: Any) -> tuple[LayerType, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or len(value) > 1024:
        raise _bad("text_config", "layer_types", value, "must be a list, one entry a layer")
    for i, kind in enumerate(value):
        if kind not in LAYER_TYPES:
            raise _bad("text_config", f"layer_types[{i}]", kind, f"must be one of {LAYER_TYPES}")
    return tuple(value)


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int) or v < 0:
            raise _bad("config", "eos_token_id", value, "must be a token id or a list of them")
    return tuple(values)


def _ids_json(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None


def _flat_spelling(data: dict[str, Any]) -> dict[str, Any]:
    """Rewrite `per_layer_config` and key aliases into the flat spelling; refuse contradictions."""
    data = dict(data)
    alias = data.pop("expert_intermediate_size", None)
    if alias is not None:
        if data.get("moe_intermediate_size") not in (None, alias):
            raise ConfigError(
                f"text_config: expert_intermediate_size {alias} contradicts "
                f"moe_intermediate_size {data['moe_intermediate_size']}; keep one"
            )
        data["moe_intermediate_size"] = alias
    if data.get("attention_bias"):
        raise _bad("text_config", "attention_bias", True, "no Gemma 4 decoder has biases")
    for key in ("hidden_activation", "hidden_act"):
        if data.get(key) not in (None, "gelu_pytorch_tanh"):
            raise _bad("text_config", key, data[key], "must be gelu_pytorch_tanh")
    overrides = data.pop("per_layer_config", None)
    if not overrides:
        return data
    if not isinstance(overrides, dict):
        raise _bad("text_config", "per_layer_config", overrides, "must map a layer to its keys")
    flat = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    types = _layer_types(data.get("layer_types"))
    for layer, values in overrides.items():
        full = layer == "full_attention" or (
            str(layer).isdecimal()
            and int(layer) < len(types)
            and types[int(layer)] == LAYER_TYPES[1]
        )
        if not full or not isinstance(values, dict) or not set(values) <= set(flat):
            raise _bad(
                "text_config",
                f"per_layer_config[{layer!r}]",
                values,
                f"only {sorted(flat)} of full-attention layers may differ",
            )
        for key, value in values.items():
            if data.get(flat[key]) not in (None, value):
                raise ConfigError(
                    f"text_config: per_layer_config[{layer!r}].{key} {value} contradicts "
                    f"{flat[key]} {data[flat[key]]}; full-attention layers are alike"
                )
            data[flat[key]] = value
    return data


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower (`vision_config`) of E2B, E4B, 26B-A4B and 31B."""

    model_type: str = "gemma4_vision"
    hidden_size: int = _size(768, high=1 << 16)
    intermediate_size: int = _size(3072)
    num_hidden_layers: int = _size(16, high=1024)
    num_attention_heads: int = _size(12, high=1024)
    num_key_value_heads: int = _size(12, high=1024)
    head_dim: int = _size(64, high=4096)
    patch_size: int = _size(16, high=1024)
    pooling_kernel_size: int = _size(3, high=64)
    position_embedding_size: int = _size(10_240)
    use_clipped_linears: bool = False
    standardize: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    max_position_embeddings: int = 131_072
    default_output_length: int = _size(280)
    """Soft tokens that an image may cost unless a request says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """The conformer audio tower (`audio_config`) of E2B and E4B."""

    model_type: str = "gemma4_audio"
    hidden_size: int = _size(1024, high=1 << 16)
    num_hidden_layers: int = _size(12, high=1024)
    num_attention_heads: int = _size(8, high=1024)
    subsampling_conv_channels: tuple[int, ...] = (128, 32)
    conv_kernel_size: int = _size(5, high=256)
    residual_weight: float = 0.5
    attention_chunk_size: int = _size(12, high=4096)
    attention_context_left: int = _size(13, high=4096)
    attention_context_right: int = _size(0, low=0, high=4096)
    attention_logit_cap: float = 50.0
    use_clipped_linears: bool = True
    output_proj_dims: int = _size(1536, high=1 << 16)
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class UnifiedVisionConfig:
    """Encoder-free image input (`vision_config`) of the 12B: patches straight to embeddings."""

    model_type: str = "gemma4_unified_vision"
    patch_size: int = _size(16, high=1024)
    pooling_kernel_size: int = _size(3, high=64)
    mm_embed_dim: int = _size(3840, high=1 << 16)
    mm_posemb_size: int = _size(1120)
    output_proj_dims: int = _size(3840, high=1 << 16)
    rms_norm_eps: float = 1e-6
    default_output_length: int = _size(280)
    """As in VisionConfig."""

    @property
    def patch_values(self) -> int:
        """Values of one merged RGB patch: (patch_size * pooling_kernel_size)^2 * 3."""
        return (self.patch_size * self.pooling_kernel_size) ** 2 * 3


@dataclass(frozen=True, kw_only=True, slots=True)
class UnifiedAudioConfig:
    """Encoder-free audio input (`audio_config`) of the 12B: raw samples straight to embeddings."""

    model_type: str = "gemma4_unified_audio"
    audio_embed_dim: int = _size(640, high=1 << 16)
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemma4Config:
    """A whole model: config.json."""

    model_type: str = "gemma4"
    text_config: TextConfig
    vision_config: VisionConfig | UnifiedVisionConfig | None = None
    audio_config: AudioConfig | UnifiedAudioConfig | None = None
    boi_token_id: int | None = 255_999
    eoi_token_id: int | None = 258_882
    image_token_id: int | None = 258_880
    video_token_id: int | None = 258_884
    boa_token_id: int | None = 256_000
    eoa_token_index: int | None = 258_883
    audio_token_id: int | None = 258_881
    eos_token_id: tuple[int, ...] = (1,)
    tie_word_embeddings: bool = True

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read a config.json object: a whole model, or a bare `gemma4_text` decoder."""
        if not isinstance(data, dict):
            raise ConfigError(f"config.json: expected a JSON object, got {type(data).__name__}")
        kind = data.get("model_type")
        if kind in ("gemma4_text", "gemma4_unified_text"):
            text = TextConfig.from_dict(data)
            return cls(
                model_type=kind.removesuffix("_text"),
                text_config=text,
                eos_token_id=text.eos_token_id,
            )
        if kind in tuple(DRAFTER_TYPES):
            raise _bad(
                "config.json",
                "model_type",
                kind,
                "this is a drafter, which runs beside its model; give the model's folder",
            )
        if kind not in ("gemma4", "gemma4_unified"):
            raise _bad(
                "config.json",
                "model_type",
                kind,
                "gemsmith runs gemma4, gemma4_unified and their _text decoders",
            )
        data = dict(data)
        eoa = data.pop("eoa_token_id", None)
        if eoa is not None and data.setdefault("eoa_token_index", eoa) != eoa:
            raise ConfigError(
                f"config.json: eoa_token_id {eoa} contradicts eoa_token_index "
                f"{data['eoa_token_index']}; keep one"
            )
        budget, seen = data.pop("vision_soft_tokens_per_image", None), data.get("vision_config")
        if budget is not None and isinstance(seen, dict):
            data["vision_config"] = seen = {"default_output_length": budget} | seen
            if seen["default_output_length"] != budget:
                raise ConfigError(
                    f"config.json: vision_soft_tokens_per_image {budget} contradicts "
                    f"default_output_length {seen['default_output_length']} of vision_config; "
                    "keep one"
                )
        text = data.get("text_config")
        if isinstance(text, dict) and data.get("tie_word_embeddings") is False:
            data["text_config"] = text = text | {"tie_word_embeddings": False}
        if isinstance(text, dict) and data.get("eos_token_id") is None:
            data["eos_token_id"] = text.get("eos_token_id", 1)
        unified = kind == "gemma4_unified"
        vision = UnifiedVisionConfig if unified else VisionConfig
        audio = UnifiedAudioConfig if unified else AudioConfig
        special: dict[str, Callable[[Any], Any]] = {
            "text_config": TextConfig.from_dict,
            "vision_config": lambda d: d and _read_tower(vision, d, "vision_config"),
            "audio_config": lambda d: d and _read_tower(audio, d, "audio_config"),
            "eos_token_id": _ids,
        }
        return _read(cls, data, "config.json", special)

    def to_dict(self) -> dict[str, Any]:
        """The config.json object, flat spelling."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["text_config"] = self.text_config.to_dict()
        out["eos_token_id"] = _ids_json(self.eos_token_id)
        out["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        unified = self.model_type == "gemma4_unified"
        name = (
            "Gemma4UnifiedForConditionalGeneration" if unified else "Gemma4ForConditionalGeneration"
        )
        out["architectures"] = [name]
        for key in ("vision_config", "audio_config"):
            tower = out[key]
            if tower is not None:
                out[key] = {f.name: getattr(tower, f.name) for f in fields(tower)}
                if "rope_theta" in out[key]:
                    theta = out[key].pop("rope_theta")
                    out[key]["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
        return out

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder`/config.json.

        Raises:
          ConfigError: missing, larger than 4 MiB, not JSON, or not a Gemma 4 config.
        """
        return cls.from_dict(_read_file(Path(folder)))

    def save(self, folder: str | Path) -> None:
        """Write `folder`/config.json."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")


def _read_file(folder: Path) -> Any:
    """What `folder`/config.json says, whatever it is."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB; not a config")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is {folder} a checkpoint folder?") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid JSON ({error})") from None


def _read_tower(cls: Callable[..., C], data: Any, where: str) -> C:
    if isinstance(data, dict):
        data = dict(data)
        rope = data.pop("rope_parameters", None)
        if isinstance(rope, dict) and "rope_theta" in rope:
            data["rope_theta"] = rope["rope_theta"]
        # The theta is a field of the image tower alone; elsewhere the key is inert.
        if "rope_theta" in data and cls is not VisionConfig:
            data.pop("rope_theta")

    def channels(value: Any) -> tuple[int, ...]:
        good = isinstance(value, list | tuple) and len(value) == 2
        if not good or not all(type(v) is int and 0 < v <= 1 << 16 for v in value):
            raise _bad(where, "subsampling_conv_channels", value, "must be two positive integers")
        return tuple(value)

    return _read(cls, data, where, {"subsampling_conv_channels": channels})


def _type(index: int, period: int, layers: int) -> LayerType:
    """Every `period`-th layer and the last see everything; the others slide."""
    full = (index + 1) % period == 0 or index == layers - 1
    return "full_attention" if full else "sliding_attention"


def _edge(layers: int, period: int, **sizes: Any) -> Gemma4Config:
    types: tuple[LayerType, ...] = tuple(_type(i, period, layers) for i in range(layers))
    text = TextConfig(
        num_hidden_layers=layers,
        layer_types=types,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterConfig:
    """The drafter (assistant) of a size: the config.json of its own folder.

    A few layers without keys and values of their own. In the file `num_kv_shared_layers` says so;
    in `text_config` here it is 0, since no layer of the drafter itself has anything to share.

    Source: transformers 5.23 configuration_gemma4_assistant.py.
    """

    model_type: str = "gemma4_assistant"
    text_config: TextConfig
    backbone_hidden_size: int = _size(1536, high=1 << 16)
    """hidden_size of the model that it drafts for."""
    use_ordered_embeddings: bool = False
    """Logits only of the tokens whose centroids are likeliest (E2B, E4B)."""
    num_centroids: int = _size(2048, high=1 << 22)
    centroid_intermediate_top_k: int = _size(32, high=1 << 22)
    """How many centroids' tokens get logits."""
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        text = self.text_config
        for key, value in (
            ("hidden_size_per_layer_input", 0),
            ("enable_moe_block", False),
            ("use_double_wide_mlp", False),
            ("final_logit_softcapping", None),
            ("tie_word_embeddings", True),
        ):
            if getattr(text, key) != value:
                wanted = json.dumps(value)
                raise _bad("text_config", key, getattr(text, key), f"a drafter has {wanted}")
        if not self.tie_word_embeddings:
            raise _bad("config.json", "tie_word_embeddings", False, "a drafter has true")
        if self.use_ordered_embeddings:
            if text.vocab_size % self.num_centroids:
                raise ConfigError(
                    f"config.json: vocab_size {text.vocab_size} is not a multiple of "
                    f"num_centroids {self.num_centroids}; each centroid has as many tokens"
                )
            if self.centroid_intermediate_top_k > self.num_centroids:
                raise ConfigError(
                    f"config.json: centroid_intermediate_top_k {self.centroid_intermediate_top_k} "
                    f"exceeds num_centroids {self.num_centroids}"
                )

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read a config.json object.

        Raises:
          ConfigError: not a drafter, or one with something that no Gemma 4 drafter has.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"config.json: expected a JSON object, got {type(data).__name__}")
        kind = data.get("model_type")
        if kind not in tuple(DRAFTER_TYPES):
            raise _bad("config.json", "model_type", kind, f"drafters are {list(DRAFTER_TYPES)}")
        return _read(
            cls,
            {key: value for key, value in data.items() if key not in _DRAFTER_IGNORED},
            "config.json",
            {"text_config": _drafter_layers},
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json object, flat spelling."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        layers = self.text_config.num_hidden_layers
        out["text_config"] = self.text_config.to_dict() | {"num_kv_shared_layers": layers}
        out["architectures"] = [DRAFTER_TYPES[self.model_type]]
        return out

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder`/config.json.

        Raises:
          ConfigError: missing, larger than 4 MiB, not JSON, or not a drafter's.
        """
        return cls.from_dict(_read_file(Path(folder)))


DRAFTER_TYPES = {
    "gemma4_assistant": "Gemma4AssistantForCausalLM",
    "gemma4_unified_assistant": "Gemma4UnifiedAssistantForCausalLM",
}
"""model_type of a drafter's config.json, and the class of transformers that it names."""

# A drafter's copy of its model's ids. It sees no token itself: the model embeds what it reads.
_DRAFTER_IGNORED = frozenset(
    """
    audio_token_id boa_token_id boi_token_id bos_token_id eoa_token_id eoa_token_index eoi_token_id
    eos_token_id image_token_id pad_token_id video_token_id
    """.split()  # noqa: SIM905
)


def _drafter_layers(data: Any) -> TextConfig:
    """`text_config` of a drafter, in which every layer shares or, as it may be written, none."""
    if not isinstance(data, dict):
        raise ConfigError(f"text_config: expected a JSON object, got {type(data).__name__}")
    layers, shared = data.get("num_hidden_layers"), data.get("num_kv_shared_layers")
    if shared not in (None, 0, layers):
        raise _bad(
            "text_config",
            "num_kv_shared_layers",
            shared,
            f"every layer of a drafter reads its model's K/V, here {layers}",
        )
    return TextConfig.from_dict({**data, "num_kv_shared_layers": 0})


def published_drafter(target: TextConfig) -> DrafterConfig:
    """The drafter that Google publishes beside a size, `google/gemma-4-*-it-assistant`.

    Sources: the released config.json files of E2B, E4B and 12B; for 26B-A4B and 31B the key/value
    heads are those of the model whose K/V it reads.
    """
    edge = target.hidden_size_per_layer_input > 0
    unified = target.model_type == "gemma4_unified_text"
    return DrafterConfig(
        model_type="gemma4_unified_assistant" if unified else "gemma4_assistant",
        text_config=replace(
            target,
            hidden_size=256 if edge else 1024,
            intermediate_size=2048 if edge else 8192,
            num_hidden_layers=4,
            layer_types=(*[LAYER_TYPES[0]] * 3, LAYER_TYPES[1]),
            num_attention_heads=4 if edge else target.num_attention_heads,
            num_kv_shared_layers=0,
            use_double_wide_mlp=False,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=0,
            enable_moe_block=False,
            num_experts=None,
            top_k_experts=None,
            moe_intermediate_size=None,
            final_logit_softcapping=None,
            tie_word_embeddings=True,
        ),
        backbone_hidden_size=target.hidden_size,
        use_ordered_embeddings=edge,
    )


def text_only(config: Gemma4Config) -> Gemma4Config:
    """The same decoder without its vision and audio towers."""
    return replace(config, vision_config=None, audio_config=None)
