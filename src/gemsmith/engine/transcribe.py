"""Speech of any length to text: window after window, nothing dropped.

An audio tower hears 30 s at a time. A longer recording is cut in pauses (media.transcript), each
window is transcribed with the end of the text before it as context, and where windows had to
overlap the words that both heard are kept once. A window in which the model repeats itself without
end is asked again; if that does not help its text is kept as it is and the loop is reported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from gemsmith.engine.engine import LM
from gemsmith.engine.media import require
from gemsmith.engine.request import FinishReason
from gemsmith.media.audio import SAMPLE_RATE, load_audio
from gemsmith.media.transcript import Segment, is_repetition, split_windows, trim_overlaps

REQUEST = "Transcribe the audio."
CONTEXT = 'It goes on after: "{}"'
CONTEXT_WORDS = 12
"""Enough to settle a name or half a sentence, too little to be taken for what is to be said."""
TOKENS_PER_SECOND = 12
"""Of a reply at most: fast speech has 6 words a second."""
MIN_TOKENS = 32
REPETITION_PENALTY = 1.3


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said, with times."""

    segments: tuple[Segment, ...]
    """One for each window, in order; the text may be empty."""
    problems: tuple[str, ...] = ()
    """Windows in which the model lost itself, with their times."""

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)


def transcribe(
    lm: LM,
    source: Any,
    *,
    sample_rate: int | None = None,
    context: bool = True,
    heard: Callable[[Segment, float], None] | None = None,
    **options: object,
) -> Transcript:
    """The words of a recording.

    source: as an audio part takes it, of any length. context: whether the end of the text so far
    goes with each window. heard: called with each window's segment as it comes (its overlap with
    the next not yet trimmed) and the seconds of the whole recording. options: as `LM.generate`;
    greedy by default.

    Raises:
      MediaError: a recording that cannot be read, or a model without audio input.
    """
    require(lm.config.audio_config, "sound")
    samples = load_audio(source, sample_rate=sample_rate)
    windows = split_windows(samples)
    segments: list[Segment] = []
    problems: list[str] = []
    for start, stop in windows:
        begin, end = start / SAMPLE_RATE, stop / SAMPLE_RATE
        before = segments[-1].text.split()[-CONTEXT_WORDS:] if context and segments else []
        text, problem = _window(lm, samples[start:stop], " ".join(before), options)
        if problem:
            problems.append(f"{begin:.1f}-{end:.1f} s: {problem}")
        segments.append(Segment(begin, end, text))
        if heard is not None:
            heard(segments[-1], len(samples) / SAMPLE_RATE)
    shared = [max(0, left[1] - right[0]) / SAMPLE_RATE for left, right in pairwise(windows)]
    texts = trim_overlaps([segment.text for segment in segments], shared)
    trimmed = (replace(s, text=text) for s, text in zip(segments, texts, strict=True))
    return Transcript(tuple(trimmed), tuple(problems))


def _window(lm: LM, samples: np.ndarray, before: str, options: dict[str, Any]) -> tuple[str, str]:
    """The text of one window, and what went wrong with it ("" if nothing)."""
    text = problem = ""
    for request in _requests(before, options, len(samples) / SAMPLE_RATE):
        asked = request.pop("text")
        part = {"type": "audio", "audio": samples, "sample_rate": SAMPLE_RATE}
        content = [part, {"type": "text", "text": asked}]  # the order that Google recommends
        reply = lm.generate([{"role": "user", "content": content}], **request)
        text = " ".join(reply.text.split())
        looped = is_repetition(text)
        if not looped and reply.finish_reason is not FinishReason.LENGTH:
            return text, ""
        problem = "the model repeats itself" if looped else "the text has no end"
    return text, problem


def _requests(before: str, options: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """What is tried in turn: with context, without (a loop is often copied from it), penalized."""
    most = max(MIN_TOKENS, round(seconds * TOKENS_PER_SECOND))
    request = {"text": REQUEST, "temperature": 0, "max_tokens": most, **options}
    if before:
        yield request | {"text": f"{REQUEST} {CONTEXT.format(before)}"}
    yield dict(request)
    yield request | {"repetition_penalty": REPETITION_PENALTY}
