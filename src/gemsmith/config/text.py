"""The decoder of every size, and the plan of its layers that the rest of the house reads."""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, Self, TypeAlias

from gemsmith.config.fields import bad, read_ids, read_object, sized, write_ids
from gemsmith.errors import ConfigError

LayerType: TypeAlias = Literal["sliding_attention", "full_attention"]
LAYER_TYPES: tuple[LayerType, ...] = ("sliding_attention", "full_attention")


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
            raise bad(
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
    vocab_size: int = sized(262_144, high=1 << 22)
    hidden_size: int = sized(high=1 << 16)
    intermediate_size: int = sized()
    num_hidden_layers: int = sized(high=1024)
    num_attention_heads: int = sized(high=1024)
    num_key_value_heads: int = sized(high=1024)
    num_global_key_value_heads: int | None = sized(None, high=1024)
    """Key/value heads of the full-attention layers where attention_k_eq_v; None = as sliding."""
    head_dim: int = sized(256, low=2, high=4096)
    global_head_dim: int = sized(512, low=2, high=4096)
    layer_types: tuple[LayerType, ...] = ()
    """One entry a layer; empty = five sliding then one full, repeated."""
    sliding_window: int = sized(512, high=1 << 24)
    num_kv_shared_layers: int = sized(0, low=0, high=1023)
    attention_k_eq_v: bool = False
    use_double_wide_mlp: bool = False
    hidden_size_per_layer_input: int = sized(0, low=0, high=4096)
    vocab_size_per_layer_input: int = sized(262_144, low=0, high=1 << 22)
    enable_moe_block: bool = False
    num_experts: int | None = sized(None, high=4096)
    top_k_experts: int | None = sized(None, high=4096)
    moe_intermediate_size: int | None = sized(None)
    use_bidirectional_attention: str | None = None
    max_position_embeddings: int = sized(131_072, high=1 << 24)
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
            plan = tuple(layer_type(i, 6, n) for i in range(n))
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
                raise bad("text_config", name, data[name], "write rope_parameters instead")
        # Defaults of a config.json that leaves the key out differ by family, as in transformers.
        unified = data.get("model_type") == "gemma4_unified_text"
        data.setdefault("hidden_size_per_layer_input", 0 if unified else 256)
        if unified:
            data.setdefault("use_bidirectional_attention", "vision")
        rope = data.pop("rope_parameters", None)
        if rope is not None:
            if not isinstance(rope, dict) or not set(rope) <= set(LAYER_TYPES):
                raise bad("text_config", "rope_parameters", rope, f"keys are {LAYER_TYPES}")
            for kind, name in zip(LAYER_TYPES, ("sliding_rope", "full_rope"), strict=True):
                if rope.get(kind) is not None:
                    where = f"text_config.rope_parameters.{kind}"
                    data[name] = read_object(RopeParameters, rope[kind], where, {})
        special = {
            "layer_types": _layer_types,
            "eos_token_id": read_ids,
            "sliding_rope": lambda rope: rope,
            "full_rope": lambda rope: rope,
        }
        return read_object(cls, data, "text_config", special)

    def to_dict(self) -> dict[str, Any]:
        skip = {"sliding_rope", "full_rope", "layer_types", "eos_token_id"}
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        out["layer_types"] = list(self.layer_types)
        out["eos_token_id"] = write_ids(self.eos_token_id)
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
        raise bad("text_config", "layer_types", value, "must be a list, one entry a layer")
    for i, kind in enumerate(value):
        if kind not in LAYER_TYPES:
            raise bad("text_config", f"layer_types[{i}]", kind, f"must be one of {LAYER_TYPES}")
    return tuple(value)


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
        raise bad("text_config", "attention_bias", True, "no Gemma 4 decoder has biases")
    for key in ("hidden_activation", "hidden_act"):
        if data.get(key) not in (None, "gelu_pytorch_tanh"):
            raise bad("text_config", key, data[key], "must be gelu_pytorch_tanh")
    overrides = data.pop("per_layer_config", None)
    if not overrides:
        return data
    if not isinstance(overrides, dict):
        raise bad("text_config", "per_layer_config", overrides, "must map a layer to its keys")
    flat = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    types = _layer_types(data.get("layer_types"))
    for layer, values in overrides.items():
        full = layer == "full_attention" or (
            str(layer).isdecimal()
            and int(layer) < len(types)
            and types[int(layer)] == LAYER_TYPES[1]
        )
        if not full or not isinstance(values, dict) or not set(values) <= set(flat):
            raise bad(
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


def layer_type(index: int, period: int, layers: int) -> LayerType:
    """Every `period`-th layer and the last see everything; the others slide."""
    full = (index + 1) % period == 0 or index == layers - 1
    return "full_attention" if full else "sliding_attention"
