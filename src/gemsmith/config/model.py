"""A whole model's config.json: its decoder, and the image and sound inputs that it has."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from gemsmith.config.drafter import DRAFTER_TYPES
from gemsmith.config.fields import C, bad, read_file, read_ids, read_object, sized, write_ids
from gemsmith.config.text import TextConfig
from gemsmith.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower (`vision_config`) of E2B, E4B, 26B-A4B and 31B."""

    model_type: str = "gemma4_vision"
    hidden_size: int = sized(768, high=1 << 16)
    intermediate_size: int = sized(3072)
    num_hidden_layers: int = sized(16, high=1024)
    num_attention_heads: int = sized(12, high=1024)
    num_key_value_heads: int = sized(12, high=1024)
    head_dim: int = sized(64, high=4096)
    patch_size: int = sized(16, high=1024)
    pooling_kernel_size: int = sized(3, high=64)
    position_embedding_size: int = sized(10_240)
    use_clipped_linears: bool = False
    standardize: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    max_position_embeddings: int = 131_072
    default_output_length: int = sized(280)
    """Soft tokens that an image may cost unless a request says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """The conformer audio tower (`audio_config`) of E2B and E4B."""

    model_type: str = "gemma4_audio"
    hidden_size: int = sized(1024, high=1 << 16)
    num_hidden_layers: int = sized(12, high=1024)
    num_attention_heads: int = sized(8, high=1024)
    subsampling_conv_channels: tuple[int, ...] = (128, 32)
    conv_kernel_size: int = sized(5, high=256)
    residual_weight: float = 0.5
    attention_chunk_size: int = sized(12, high=4096)
    attention_context_left: int = sized(13, high=4096)
    attention_context_right: int = sized(0, low=0, high=4096)
    attention_logit_cap: float = 50.0
    use_clipped_linears: bool = True
    output_proj_dims: int = sized(1536, high=1 << 16)
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class UnifiedVisionConfig:
    """Encoder-free image input (`vision_config`) of the 12B: patches straight to embeddings."""

    model_type: str = "gemma4_unified_vision"
    patch_size: int = sized(16, high=1024)
    pooling_kernel_size: int = sized(3, high=64)
    mm_embed_dim: int = sized(3840, high=1 << 16)
    mm_posemb_size: int = sized(1120)
    output_proj_dims: int = sized(3840, high=1 << 16)
    rms_norm_eps: float = 1e-6
    default_output_length: int = sized(280)
    """As in VisionConfig."""

    @property
    def patch_values(self) -> int:
        """Values of one merged RGB patch: (patch_size * pooling_kernel_size)^2 * 3."""
        return (self.patch_size * self.pooling_kernel_size) ** 2 * 3


@dataclass(frozen=True, kw_only=True, slots=True)
class UnifiedAudioConfig:
    """Encoder-free audio input (`audio_config`) of the 12B: raw samples straight to embeddings."""

    model_type: str = "gemma4_unified_audio"
    audio_embed_dim: int = sized(640, high=1 << 16)
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
            raise bad(
                "config.json",
                "model_type",
                kind,
                "this is a drafter, which runs beside its model; give the model's folder",
            )
        if kind not in ("gemma4", "gemma4_unified"):
            raise bad(
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
            "eos_token_id": read_ids,
        }
        return read_object(cls, data, "config.json", special)

    def to_dict(self) -> dict[str, Any]:
        """The config.json object, flat spelling."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["text_config"] = self.text_config.to_dict()
        out["eos_token_id"] = write_ids(self.eos_token_id)
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
        return cls.from_dict(read_file(Path(folder)))

    def save(self, folder: str | Path) -> None:
        """Write `folder`/config.json."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")


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
            raise bad(where, "subsampling_conv_channels", value, "must be two positive integers")
        return tuple(value)

    return read_object(cls, data, where, {"subsampling_conv_channels": channels})


def text_only(config: Gemma4Config) -> Gemma4Config:
    """The same decoder without its vision and audio towers."""
    return replace(config, vision_config=None, audio_config=None)
