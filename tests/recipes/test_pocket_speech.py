"""Speech pocket learns from: deterministic, split by voice and text, written by one rule."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes.pocket import speech
from recipes.pocket.domains import TOOLS
from recipes.pocket.speech import COMMANDS, KINDS, SENTENCES, Spoken, Utterance, generate
from recipes.pocket.words import Draw, Split, side

from gemsmith.text import chat

spoken_here = pytest.mark.skipif(
    not speech.available(), reason="espeak-ng is not installed: no clip can be made"
)
COUNT = 12
"""Conversations of each kind and split."""
TEXTS = 2000


@pytest.fixture(scope="module")
def heard() -> dict[Split, list[Spoken]]:
    return {
        split: [generate(split, 0, i, kind=kind) for kind in KINDS for i in range(COUNT)]
        for split in ("train", "heldout")
    }


@pytest.fixture(scope="module")
def texts() -> dict[Split, list[Utterance]]:
    """What is said, without anyone saying it."""
    made: dict[Split, list[Utterance]] = {"train": [], "heldout": []}
    for split, said in made.items():
        for index in range(TEXTS):
            d = Draw(split, f"{split}/{index}")
            kind = d.weighted(speech.SAID)
            if kind == "digits":
                said.append(speech._digit_string(d))
            else:
                commands = COMMANDS[d.pick(speech._spoken_tools(d))]
                said.append(speech.utterance(d, SENTENCES if kind == "sentence" else commands))
    return made


def clips(talk: Spoken) -> list[np.ndarray]:
    contents = (m["content"] for m in talk.messages if m["role"] == "user")
    return [content[0]["audio"] for content in contents]


def as_spoken(written: str) -> str:
    """The rule of the module, the other way around: digits, numbers and times as words."""

    def word(part: str) -> str:
        if time := re.fullmatch(r"(\d\d):(\d\d)", part):
            hour, minute = int(time[1]), int(time[2])
            rest = {0: "o'clock", 5: "oh five"}.get(minute) or speech.number_words(minute)
            return f"{speech.number_words(hour)} {rest}"
        return speech.number_words(int(part)) if part.isdigit() else part

    return " ".join(map(word, written.split()))


@spoken_here
def test_same_seed_gives_same_samples() -> None:
    for kind in KINDS:
        one, two = (generate("train", 3, 4, kind=kind) for _ in range(2))
        assert all(map(np.array_equal, clips(one), clips(two)))
        assert (one.checks, one.tools, one.voices) == (two.checks, two.tools, two.voices)


@spoken_here
def test_every_conversation_is_heard_and_renders(heard: dict[Split, list[Spoken]]) -> None:
    for talk in heard["train"] + heard["heldout"]:
        text = chat.render(talk.messages, talk.tools, variant="edge")
        assert text.count("<|audio|>") == len(clips(talk)) == len(talk.voices) == len(talk.checks)


@spoken_here
def test_clips_are_short_and_within_range(heard: dict[Split, list[Spoken]]) -> None:
    made: dict[str, list[float]] = {"short": [], "reading": []}
    for talk in heard["train"] + heard["heldout"]:
        for clip in clips(talk):
            assert clip.dtype == np.float32
            assert 0.1 < np.abs(clip).max() <= 1
            long = talk.kind == "speech/reading"
            made["reading" if long else "short"].append(len(clip) / speech.SAMPLE_RATE)
    assert 0.5 < min(made["short"]) < max(made["short"]) < 5
    assert sum(made["short"]) / len(made["short"]) < 2.5
    assert 4 < max(made["reading"]) <= 30


@spoken_here
def test_a_reading_goes_on_after_what_its_request_tells(heard: dict[Split, list[Spoken]]) -> None:
    for talk in heard["train"]:
        if talk.kind == "speech/reading":
            asked = talk.messages[0]["content"][1]["text"]
            before = re.fullmatch(r'Transcribe the audio\.(?: It goes on after: "(.+)")?', asked)
            assert before
            assert not before[1] or before[1] not in talk.messages[1]["content"]


@spoken_here
def test_the_speaker_is_one_of_the_split(heard: dict[Split, list[Spoken]]) -> None:
    for split, talks in heard.items():
        voices = {voice.split("+")[1] for talk in talks for voice in talk.voices}
        assert voices <= set(speech.VOICES[split])
        assert len(voices) >= 6


def test_no_voice_is_in_both_splits() -> None:
    assert not set(speech.VOICES["train"]) & set(speech.VOICES["heldout"])


@spoken_here
def test_every_voice_speaks_every_accent_and_sounds_like_no_other() -> None:
    """espeak-ng passes over a timbre it does not know, and over any at some accents."""
    spoken, voices = (
        "set a timer for five minutes",
        speech.VOICES["train"] + speech.VOICES["heldout"],
    )
    accents = sorted(set(speech.ACCENTS))
    made = [speech.synthesise(spoken, f"{a}+{v}", 160, 50) for a in accents for v in voices]
    assert all(0.8 < len(clip) / speech.SAMPLE_RATE < 4 for clip in made)
    assert len({clip.tobytes() for clip in made}) == len(made)


def spectrum(clip: np.ndarray) -> np.ndarray:
    """Mean log magnitude over time in 64 bands; loudness does not count."""
    frames = np.lib.stride_tricks.sliding_window_view(clip, 512)[::256] * np.hanning(512)
    bands = np.abs(np.fft.rfft(frames))[:, :256].mean(0).reshape(64, 4).mean(1)
    return np.log(bands / bands.mean() + 0.01)


@spoken_here
def test_no_held_out_voice_is_a_near_copy_of_one_in_training() -> None:
    """Some variants of espeak-ng are one voice under two names, as `adam` and `caleb`."""
    made = {
        voice: spectrum(speech.synthesise("we saw a small green lamp", f"en-us+{voice}", 160, 50))
        for voice in (*speech.VOICES["train"], *speech.VOICES["heldout"], "adam", "caleb")
    }
    copies = np.abs(made["adam"] - made["caleb"]).mean()
    for voice in speech.VOICES["heldout"]:
        nearest = min(np.abs(made[voice] - made[v]).mean() for v in speech.VOICES["train"])
        assert nearest > max(0.15, 2 * copies), voice


def test_texts_are_held_out(texts: dict[Split, list[Utterance]]) -> None:
    train = {said.written for said in texts["train"]}
    heldout = {said.written for said in texts["heldout"]}
    assert len(heldout) > TEXTS // 2
    assert not train & heldout


def test_what_is_spoken_follows_from_what_is_written(texts: dict[Split, list[Utterance]]) -> None:
    for said in texts["train"] + texts["heldout"]:
        assert as_spoken(said.written) == said.spoken


@pytest.mark.parametrize(
    ("number", "words"), [(0, "zero"), (13, "thirteen"), (20, "twenty"), (45, "forty five")]
)
def test_numbers_are_spoken_as_words(number: int, words: str) -> None:
    assert speech.number_words(number) == words


def test_few_words_are_spoken_and_all_of_them_often_in_training(
    texts: dict[Split, list[Utterance]],
) -> None:
    counted = Counter(w for said in texts["train"] for w in said.spoken.split())
    heldout = {w for said in texts["heldout"] for w in said.spoken.split()}
    assert len(counted) < 280
    assert heldout <= set(counted)
    # A word said in fewer than one of a thousand clips would hardly be learned.
    assert [w for w in heldout if counted[w] < TEXTS / 1000] == []


def test_names_cities_and_things_held_out_in_text_are_not_spoken() -> None:
    for word in (*speech.NAMES, *speech.CITIES, *speech.THINGS, *speech.PLACES):
        assert side(word) == "train", word
    assert all(n < 10 or side(str(n)) == "train" for n in speech.NUMBERS)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_fill_the_parameters_of_their_tool(name: str) -> None:
    tool = next(t for t in TOOLS if t.name == name)
    names = {p.name for p in tool.params}
    required = {p.name for p in tool.params if p.opt is None}
    for form in COMMANDS[name]:
        said = set(re.findall(r"\{(\w+)\}", form))
        assert required <= said <= names


@spoken_here
def test_a_command_is_answered_by_the_expected_call(heard: dict[Split, list[Spoken]]) -> None:
    kinds = Counter()
    for talk in heard["train"] + heard["heldout"]:
        for check in talk.checks:
            kinds[check.category] += 1
            if check.category != "speech_call":
                continue
            call = talk.messages[check.upto]["tool_calls"][0]["function"]
            assert check.expected == {"type": "calls", "calls": [call]}
            assert talk.tools
            declared = {t["function"]["name"]: t["function"]["parameters"] for t in talk.tools}
            properties = declared[call["name"]]["properties"]
            for key, value in call["arguments"].items():
                assert fits(value, properties[key]["type"]), (key, value)
    assert {"speech_call", "speech_no_tool", "speech_answer", "speech_digits"} <= set(kinds)


def fits(value: Any, kind: str) -> bool:
    types: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
    }
    return isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))


@spoken_here
def test_a_transcript_is_what_is_expected(heard: dict[Split, list[Spoken]]) -> None:
    for talk in heard["train"] + heard["heldout"]:
        if talk.kind == "speech/transcribe":
            for check in talk.checks:
                assert check.expected["type"] == "transcript"
                assert talk.messages[check.upto]["content"] == check.expected["value"]


@spoken_here
def test_a_sum_is_right(heard: dict[Split, list[Spoken]]) -> None:
    for talk in heard["train"] + heard["heldout"]:
        for check in talk.checks:
            if check.category == "speech_answer":
                assert str(check.expected["value"]) in talk.messages[check.upto]["content"]


@spoken_here
def test_a_clip_in_the_cache_needs_no_synthesis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = speech.synthesise("call Anna", "en-us+f1", 150, 50, tmp_path)
    monkeypatch.setattr(speech, "available", lambda: False)
    assert np.array_equal(speech.synthesise("call Anna", "en-us+f1", 150, 50, tmp_path), made)
    with pytest.raises(RuntimeError, match="espeak-ng is not installed"):
        speech.synthesise("call Anna", "en-us+f1", 151, 50, tmp_path)


def test_without_espeak_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "available", lambda: False)
    with pytest.raises(RuntimeError, match="Debian package espeak-ng"):
        generate("train", 0, 0)


@spoken_here
def test_an_unknown_voice_is_named() -> None:
    with pytest.raises(RuntimeError, match="voice 'xx-none'"):
        speech.synthesise("call Anna", "xx-none", 150, 50)


@spoken_here
def test_written_clips_are_the_samples(tmp_path: Path) -> None:
    samples = speech.synthesise("call Anna", "en-us+f1", 150, 50)
    speech.write_wave(tmp_path / "a.wav", samples)
    read, rate = speech._wave((tmp_path / "a.wav").read_bytes())
    assert rate == 16_000
    assert np.abs(read - samples).max() < 1e-4
