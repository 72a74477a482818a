"""What a checkpoint says about sampling from it: generation_config.json.

Keys keep their file names. A key that is absent has the value of Gemma 4's releases (sampling at
temperature 1, top-p 0.95, top-k 64), not that of a library. Keys that would change the text in a
way gemsmith does not implement are refused unless they are off; keys that only steer how another
library computes are ignored, by name.

Source: generation_config.json of the Gemma 4 releases; transformers 5.23 GenerationConfig.
"""

import json
import math
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from gemsmith.config import Gemma4Config
from gemsmith.errors import ConfigError

FILE = "generation_config.json"
MAX_BYTES = 1 << 20
MAX_IDS = 4096

IGNORED_KEYS = frozenset(
    """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind cache_config cache_implementation compile_config
    continuous_batching_config decoder_start_token_id disable_compile is_assistant low_memory
    max_cache_len max_length max_matching_ngram_size max_time num_assistant_tokens
    num_assistant_tokens_schedule num_return_sequences output_attentions output_hidden_states
    output_logits output_scores prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values
    renormalize_logits return_dict_in_generate speculation_type target_lookbehind
    transformers_version use_cache use_mtp _from_model_config
    """.split()  # noqa: SIM905
)
# Values at which a key of another library changes nothing, besides null.
OFF: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """Defaults of sampling that come with a checkpoint."""

    do_sample: bool = True
    """False: the likeliest token every time."""
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    bos_token_id: int | None = 2
    pad_token_id: int | None = 0
    eos_token_id: tuple[int, ...] = (1,)
    """Any of these ends the turn."""
    suppress_tokens: tuple[int, ...] = ()
    """Never chosen."""

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise _bad("do_sample", self.do_sample, "must be true or false")
        self._number("temperature", 0, 100)
        self._number("top_p", 0, 1)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0.01, 100)
        self._whole("top_k", 0)
        self._whole("max_new_tokens", 1, optional=True)
        self._whole("bos_token_id", 0, optional=True)
        self._whole("pad_token_id", 0, optional=True)
        if not self.eos_token_id:
            raise _bad("eos_token_id", list(self.eos_token_id), "must name at least one token")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Read a generation_config.json object.

        Raises:
          ConfigError: an unknown key (with near matches), a value of the wrong type or range, or
            a way of generating that gemsmith does not have.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"{FILE}: expected a JSON object, got {type(data).__name__}")
        known = [spec.name for spec in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key in ("eos_token_id", "suppress_tokens"):
                values[key] = _ids(key, value)
            elif key in known:
                values[key] = value
            elif key in OFF:
                if value is not None and value not in OFF[key]:
                    raise _bad(key, value, "gemsmith does not generate that way; remove the key")
            elif key not in IGNORED_KEYS:
                near = get_close_matches(key, known, n=2)
                hint = f"Did you mean {' or '.join(near)}?" if near else "No known key is near it."
                raise ConfigError(f"{FILE}: unknown key {key!r}. {hint} Remove it otherwise.")
        # null means "not set", except where None is a value.
        optional = {"max_new_tokens", "bos_token_id", "pad_token_id"}
        given: dict[str, Any] = {
            key: value for key, value in values.items() if value is not None or key in optional
        }
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The generation_config.json object."""
        out = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        out["eos_token_id"] = list(self.eos_token_id)
        out["suppress_tokens"] = list(self.suppress_tokens) or None
        return {key: value for key, value in out.items() if value is not None}

    def save(self, folder: str | Path) -> None:
        """Write `folder`/generation_config.json."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE).write_text(text, encoding="utf-8")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not low <= value <= high:
            raise _bad(name, value, f"must be a number from {low:g} to {high:g}")

    def _whole(self, name: str, low: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise _bad(name, value, f"must be a whole number from {low} to {2**31 - 1}")


def load_generation_config(folder: str | Path, config: Gemma4Config) -> GenerationConfig:
    """Read `folder`/generation_config.json; without one, the release's values and config's ends.

    `config` supplies the end tokens a file does not name.

    Raises:
      ConfigError: the file is not JSON, larger than 1 MiB, or see GenerationConfig.from_dict.
    """
    path = Path(folder) / FILE
    data: Any = {}
    try:
        if path.exists():
            if path.stat().st_size > MAX_BYTES:
                raise ConfigError(f"{path}: larger than {MAX_BYTES >> 20} MiB; not a config")
            data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if isinstance(data, dict) and data.get("eos_token_id") is None:
        ends = config.eos_token_id or config.text_config.eos_token_id
        data = data | {"eos_token_id": list(ends)}
    return GenerationConfig.from_dict(data)


def _ids(key: str, value: Any) -> tuple[int, ...] | None:
    """One token id or a list of them, in order, each once."""
    if value is None:
        return None
    values = value if isinstance(value, list | tuple) else [value]
    good = all(type(v) is int and 0 <= v < 2**31 for v in values)
    if not good or len(values) > MAX_IDS:
        raise _bad(key, value, f"must be a token id or a list of at most {MAX_IDS} of them")
    return tuple(dict.fromkeys(values))


def _bad(key: str, value: object, allowed: str) -> ConfigError:
    shown = repr(value)
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    return ConfigError(f"{FILE}: {key} is {shown}; {allowed}")
