"""Long recordings: every window asked once, context carried on, loops noticed, nothing dropped."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gemsmith.config import PRESETS
from gemsmith.engine.request import FinishReason
from gemsmith.engine.transcribe import CONTEXT_WORDS, transcribe
from gemsmith.errors import MediaError
from gemsmith.media.audio import SAMPLE_RATE

LOOP = "and so on " * 10


class Listener:
    """Stands in for LM. A recording is a staircase of loudness: level n is word n, half a second.

    It writes down the words whose middle it hears, unless told to say something else.
    """

    config = PRESETS["E2B"]

    def __init__(self, *instead: Any) -> None:
        self.instead = list(instead)
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def generate(self, messages: Any, **options: Any) -> Any:
        sound, text = messages[0]["content"]
        self.asked.append((text["text"], options))
        said = self.instead.pop(0) if self.instead else None
        if said is None:
            levels = np.rint(sound["audio"][SAMPLE_RATE // 4 :: SAMPLE_RATE // 2] * 1000)
            said = " ".join(f"w{int(level)}" for level in levels if level)
        reason = FinishReason.LENGTH if said.endswith("...") else FinishReason.STOP
        return SimpleNamespace(text=said, finish_reason=reason)


def recording(words: int, pause_every: int | None) -> np.ndarray:
    """Half a second a word; after every `pause_every` words half a second of silence."""
    steps: list[float] = []
    for n in range(1, words + 1):
        steps.append(n / 1000)
        if pause_every and n % pause_every == 0:
            steps.append(0.0)
    return np.repeat(np.array(steps, np.float32), SAMPLE_RATE // 2)


@pytest.mark.parametrize("pause_every", [7, None])
def test_no_word_of_a_long_recording_is_dropped_or_doubled(pause_every):
    lm: Any = Listener()
    samples = recording(400, pause_every)
    made = transcribe(lm, samples, sample_rate=SAMPLE_RATE)
    assert made.text.split() == [f"w{n}" for n in range(1, 401)]
    assert made.problems == ()
    assert len(made.segments) == len(lm.asked) >= len(samples) / SAMPLE_RATE / 30
    assert made.segments[0].start_s == 0
    assert made.segments[-1].end_s == len(samples) / SAMPLE_RATE
    assert all(s.end_s - s.start_s <= 30 for s in made.segments)


def test_each_window_hears_how_the_last_one_ended():
    lm: Any = Listener()
    transcribe(lm, recording(150, 7), sample_rate=SAMPLE_RATE)
    first, second = lm.asked[0][0], lm.asked[1][0]
    assert first == "Transcribe the audio."
    before = second.removeprefix('Transcribe the audio. It goes on after: "').removesuffix('"')
    assert len(before.split()) == CONTEXT_WORDS
    lm = Listener()
    transcribe(lm, recording(150, 7), sample_rate=SAMPLE_RATE, context=False)
    assert {text for text, _ in lm.asked} == {"Transcribe the audio."}


def test_segments_are_told_as_they_come():
    seen: list[tuple[float, float]] = []
    samples = recording(150, 7)
    lm: Any = Listener()
    made = transcribe(
        lm, samples, sample_rate=SAMPLE_RATE, heard=lambda s, whole: seen.append((s.end_s, whole))
    )
    assert [end for end, _ in seen] == [s.end_s for s in made.segments]
    assert {whole for _, whole in seen} == {len(samples) / SAMPLE_RATE}


@pytest.mark.parametrize("bad", [LOOP, "it never ends ..."])
def test_a_loop_is_asked_again_without_context_then_with_a_penalty(bad):
    lm: Any = Listener(None, bad, bad, "all is well")
    made = transcribe(lm, recording(70, 7), sample_rate=SAMPLE_RATE)
    assert made.segments[1].text == "all is well"
    assert made.problems == ()
    _, second, third, fourth = lm.asked
    assert "goes on after" in second[0]
    assert third[0] == fourth[0] == "Transcribe the audio."
    assert "repetition_penalty" not in third[1]
    assert fourth[1]["repetition_penalty"] > 1


def test_a_window_that_stays_lost_is_kept_and_reported():
    lm: Any = Listener(LOOP, LOOP)
    made = transcribe(lm, recording(6, None), sample_rate=SAMPLE_RATE)
    assert made.problems == ("0.0-3.0 s: the model repeats itself",)
    assert made.segments[0].text == LOOP.strip()


def test_models_without_audio_input_refuse():
    lm: Any = Listener()
    lm.config = PRESETS["31B"]
    with pytest.raises(MediaError, match=r"takes no sound; E2B, E4B and 12B take"):
        transcribe(lm, recording(6, None), sample_rate=SAMPLE_RATE)
