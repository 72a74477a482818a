"""Reading config.json objects: every key's name, type and range is checked before anything else."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from gemsmith.errors import ConfigError

C = TypeVar("C")
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


def sized(default: Any = MISSING, *, low: int = 1, high: int = 1 << 20) -> Any:
    """An integer field with its allowed range; absurd sizes are refused before any allocation."""
    return field(default=default, metadata={"low": low, "high": high})


def bad(where: str, key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{where}: {key} is {value!r}; {allowed}")


def _check(where: str, spec: Field[Any], value: Any) -> Any:
    """Return `value` as the type that `spec` declares, or raise ConfigError naming the key."""
    kind = spec.type.__name__ if isinstance(spec.type, type) else str(spec.type)
    if value is None:
        if "None" in kind:
            return None
        raise bad(where, spec.name, value, "a value is required")
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise bad(where, spec.name, value, "must be true or false")
    elif kind.startswith("int"):
        low, high = spec.metadata.get("low", 0), spec.metadata.get("high", 1 << 40)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise bad(where, spec.name, value, f"must be an integer from {low} to {high}")
    elif kind.startswith("float"):
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise bad(where, spec.name, value, "must be a finite number")
        return float(value)
    elif kind.startswith("str") and not isinstance(value, str):
        raise bad(where, spec.name, value, "must be a string")
    return value


def read_object(
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


def read_ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, int) or v < 0:
            raise bad("config", "eos_token_id", value, "must be a token id or a list of them")
    return tuple(values)


def write_ids(ids: tuple[int, ...]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else list(ids) or None


def read_file(folder: Path) -> Any:
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
