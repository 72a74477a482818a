"""What is asked of a generation and what comes back. Plain data, no tensors.

What these are not: they hold no defaults of a checkpoint (see `LM.sampling`). `SamplingParams()` is
the model's own distribution, untouched.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Self

from gemsmith.engine.grammar import Follow
from gemsmith.engine.media import Prompt
from gemsmith.errors import RequestError
from gemsmith.text.calls import Problem, ToolCall

MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024
MAX_ALTERNATIVES = 64
MIN_TEMPERATURE = 1e-6
"""Below this differences of logits could overflow float32 once divided."""


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """An end token of the model, or a stop string."""
    LENGTH = "length"
    """max_tokens, or the end of the model's context."""
    TOOL_CALLS = "tool_calls"
    """The model ended its turn to have tools called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to end. Filters act in the order of the fields."""

    repetition_penalty: float = 1.0
    """Above 1 makes every token of the prompt and the reply so far less likely; 1 is off."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token (greedy) and skips what follows."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens (at least one) whose probabilities reach this; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest; 0 is off."""
    seed: int | None = None
    """The same seed gives the same reply; None draws a new one."""
    max_tokens: int | None = None
    """Most tokens of the reply, thoughts and the end token included; None: the context's end."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings. Thoughts and tool calls are not read."""
    logprobs: int | None = None
    """Report each token's log-probability, with this many of the likeliest beside it."""
    thinking_budget: int | None = None
    """Most tokens of a thought; then it is closed and the model goes on to its answer."""
    ignore_eos: bool = False
    """Go on over end tokens, for benchmarks of a given length."""

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, Sequence) or not all(isinstance(s, str) and s for s in stops):
            raise RequestError(f"stop {self.stop!r}: must be a text or a list of non-empty texts")
        if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop: {len(stops)} texts, the longest of {max(map(len, stops))} characters; "
                f"at most {MAX_STOPS} of at most {MAX_STOP_CHARACTERS} are allowed"
            )
        object.__setattr__(self, "stop", tuple(stops))
        number, whole = self._number, self._whole
        number("repetition_penalty", 0.01, 100)
        if self.temperature != 0 or isinstance(self.temperature, bool):
            number("temperature", MIN_TEMPERATURE, 100, "0 (greedy) or ")
        whole("top_k", 0, 2**31)
        number("top_p", 0, 1)
        number("min_p", 0, 1)
        whole("seed", 0, 2**63 - 1, optional=True)
        whole("max_tokens", 1, 2**31, optional=True)
        whole("logprobs", 0, MAX_ALTERNATIVES, optional=True)
        whole("thinking_budget", 0, 2**31, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos {self.ignore_eos!r}: must be true or false")

    def _number(self, name: str, low: float, high: float, also: str = "") -> None:
        value = getattr(self, name)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not low <= value <= high:
            raise RequestError(f"{name} {value!r}: must be {also}a number from {low:g} to {high:g}")

    def _whole(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RequestError(f"{name} {value!r}: must be a whole number from {low} to {high}")

    def changed(self, **options: object) -> Self:
        """A copy with some fields changed.

        Raises:
          RequestError: no such field, with near matches, or a value outside its range.
        """
        known = [spec.name for spec in fields(self)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=2)
                hint = f"did you mean {' or '.join(near)}? " if near else ""
                raise RequestError(
                    f"no sampling parameter {name!r}; {hint}known are {', '.join(known)}"
                )
        values: dict[str, Any] = {**asdict(self), **options}
        return type(self)(**values)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One generation asked of an engine that runs many."""

    prompt: Prompt
    """What the model reads, as `LM.encode` makes it."""
    params: SamplingParams = field(default_factory=SamplingParams)
    chat: bool = True
    """Whether thoughts and tool calls are split off; False shows all as text."""
    follow: Follow | None = None
    """What holds the reply to a grammar, as `LM.follow` makes it."""
    tenant: str = ""
    """Whose it is: tenants take turns, and share nothing that is cached."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found one token, before any penalty, temperature or filter."""

    token_id: int
    logprob: float
    """Natural logarithm of the softmax of the (capped) logits."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and theirs, best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a generation cost."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's tokens, those still held from the request before."""
    completion_tokens: int
    """Tokens of the reply: thoughts, calls, markers and the end token included."""
    thinking_tokens: int
    """Of those, the text of thoughts without its markers."""
    image_tokens: int = 0
    """Of the prompt's tokens, those that stand for images; markers count as text."""
    audio_tokens: int = 0
    """Those that stand for sound, a video's included."""
    video_tokens: int = 0
    """Those that stand for frames of videos."""
    drafted_tokens: int = 0
    """Guesses of tokens to come that the model verified, see `engine.speculative`."""
    accepted_tokens: int = 0
    """Those that were right: tokens of the reply that needed no pass of their own."""
    time_to_first_token_s: float
    total_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens that had to be computed, by the time until the first new one."""
        tokens = self.prompt_tokens - self.cached_tokens
        return tokens / self.time_to_first_token_s if self.time_to_first_token_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, by the time they took; 0 if there was but one."""
        seconds = self.total_s - self.time_to_first_token_s
        return (self.completion_tokens - 1) / seconds if self.completion_tokens > 1 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Last event of every stream."""

    finish_reason: FinishReason
    usage: Usage
    token_ids: tuple[int, ...]
    """The reply as the model wrote it, forced tokens and the end token included."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry a token of `token_ids`, if asked for."""
    notes: tuple[str, ...] = ()
    """What of the prompt's media could not be read, such as frames of a damaged video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """A whole reply."""

    text: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[Problem, ...] = ()
    """What looked like a tool call and could not be read."""
    finish_reason: FinishReason
    usage: Usage
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    """What of the prompt's media could not be read."""

    @property
    def message(self) -> dict[str, Any]:
        """The reply as an assistant message, ready to be appended to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{index}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(self.tool_calls)
            ]
        return message
