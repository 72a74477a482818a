"""The drafter of a size: the config.json of its own folder."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from gemsmith.config.fields import bad, read_file, read_object, sized
from gemsmith.config.text import LAYER_TYPES, TextConfig
from gemsmith.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterConfig:
    """The drafter (assistant) of a size: the config.json of its own folder.

    A few layers without keys and values of their own. In the file `num_kv_shared_layers` says so;
    in `text_config` here it is 0, since no layer of the drafter itself has anything to share.

    Source: transformers 5.23 configuration_gemma4_assistant.py.
    """

    model_type: str = "gemma4_assistant"
    text_config: TextConfig
    backbone_hidden_size: int = sized(1536, high=1 << 16)
    """hidden_size of the model that it drafts for."""
    use_ordered_embeddings: bool = False
    """Logits only of the tokens whose centroids are likeliest (E2B, E4B)."""
    num_centroids: int = sized(2048, high=1 << 22)
    centroid_intermediate_top_k: int = sized(32, high=1 << 22)
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
                raise bad("text_config", key, getattr(text, key), f"a drafter has {wanted}")
        if not self.tie_word_embeddings:
            raise bad("config.json", "tie_word_embeddings", False, "a drafter has true")
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
            raise bad("config.json", "model_type", kind, f"drafters are {list(DRAFTER_TYPES)}")
        return read_object(
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
        return cls.from_dict(read_file(Path(folder)))


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
        raise bad(
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
