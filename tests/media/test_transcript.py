"""Windows of long recordings and the texts put together again."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsmith.errors import MediaError
from gemsmith.media.audio import SAMPLE_RATE
from gemsmith.media.transcript import (
    MIN_TAIL,
    WORDS_PER_SECOND,
    Segment,
    is_repetition,
    split_windows,
    to_srt,
    trim_overlaps,
)


def speech(*stretches: float, noise: float = 0.001, seed: int = 0) -> np.ndarray:
    """Loud and quiet by turns, so many seconds each, on a floor of noise."""
    random = np.random.default_rng(seed)
    loud = np.concatenate(
        [
            np.full(round(seconds * SAMPLE_RATE), 0.3 * (index % 2 == 0))
            for index, seconds in enumerate(stretches)
        ]
    )
    sound = loud * random.standard_normal(len(loud)) + noise * random.standard_normal(len(loud))
    return sound.astype(np.float32)


def merged(texts: Sequence[str], overlaps: Sequence[float]) -> str:
    return " ".join(text for text in trim_overlaps(texts, overlaps) if text)


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.05])
def test_a_window_ends_in_the_pause_however_loud_the_noise(noise: float):
    windows = split_windows(speech(20, 0.6, 15, noise=noise))
    assert [start for start, _ in windows[1:]] == [stop for _, stop in windows[:-1]]
    assert len(windows) == 2
    assert 20.0 < windows[0][1] / SAMPLE_RATE < 20.6


def test_of_several_pauses_the_quietest_in_the_second_half_is_taken():
    sound = speech(10, 0.6, 8, 0.6, 5, 0.6, 20)
    sound[round(23.6 * SAMPLE_RATE) + 1600 : round(24.8 * SAMPLE_RATE)] *= 0.5
    [first, *_] = split_windows(sound)
    assert 18.6 < first[1] / SAMPLE_RATE < 24.8
    assert np.abs(sound[first[1] - 2000 : first[1] + 2000]).max() < 0.01


@pytest.mark.parametrize("gap", [0.0, 0.12])
def test_without_a_pause_windows_overlap(gap: float):
    windows = split_windows(speech(25, gap, 40), overlap_seconds=3)
    assert windows[0] == (0, 30 * SAMPLE_RATE)
    assert windows[1][0] == 27 * SAMPLE_RATE


def test_constant_noise_has_no_pause():
    windows = split_windows(speech(0, 70, noise=0.05), overlap_seconds=2)
    assert windows[0] == (0, 30 * SAMPLE_RATE)
    assert windows[1][0] == 28 * SAMPLE_RATE


def test_digital_silence_is_a_pause():
    windows = split_windows(np.zeros(65 * SAMPLE_RATE, np.float32))
    assert [start for start, _ in windows[1:]] == [stop for _, stop in windows[:-1]]


def test_a_short_recording_is_one_window():
    assert split_windows(speech(30)) == [(0, 30 * SAMPLE_RATE)]


@pytest.mark.parametrize("overlap", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("stretches", [(29.2, 1.2), (30 + 3 / SAMPLE_RATE,), (60.1,)])
def test_the_last_window_has_a_second(stretches: tuple[float, ...], overlap: float):
    windows = split_windows(speech(*stretches), overlap_seconds=overlap)
    assert len(windows) == 2 + (stretches == (60.1,))
    assert windows[-1][1] - windows[-1][0] >= MIN_TAIL


@settings(max_examples=40, deadline=None)
@given(
    stretches=st.lists(st.floats(0.0, 12.0), min_size=1, max_size=10),
    noise=st.sampled_from([0.0, 0.001, 0.1]),
    longest=st.sampled_from([4.0, 10.0, 30.0]),
    overlap=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_windows_cover_every_sample(
    stretches: list[float], noise: float, longest: float, overlap: float
):
    sound = speech(*stretches, 0.5, noise=noise)
    windows = split_windows(sound, max_seconds=longest, overlap_seconds=overlap)
    assert windows[0][0] == 0
    assert windows[-1][1] == len(sound)
    assert all(0 < stop - start <= longest * SAMPLE_RATE for start, stop in windows)
    assert all(stop - start >= min(MIN_TAIL, len(sound)) for start, stop in windows)
    for (start, stop), (after, _) in pairwise(windows):
        assert start < after <= stop
        assert stop - after in (0, round(overlap * SAMPLE_RATE))


@pytest.mark.parametrize(("longest", "overlap"), [(3, 1), (30, 16), (30, -1)])
def test_windows_that_cannot_be_are_refused(longest: float, overlap: float):
    with pytest.raises(MediaError, match=f"windows of {longest:g} s that overlap by {overlap:g} s"):
        split_windows(speech(40), max_seconds=longest, overlap_seconds=overlap)


def test_no_samples_make_no_windows():
    with pytest.raises(MediaError, match="no samples to split"):
        split_windows(np.zeros(0, np.float32))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), words=st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=60))
def test_a_text_cut_with_overlaps_merges_to_itself(data: st.DataObject, words: list[int]):
    names = [f"w{number}" for number in words]
    cuts = data.draw(st.lists(st.integers(0, len(names)), max_size=4).map(sorted))
    shared = [data.draw(st.integers(0, 2 * WORDS_PER_SECOND)) for _ in cuts]
    starts = [0] + [max(cut - n, 0) for cut, n in zip(cuts, shared, strict=True)]
    texts = [
        " ".join(names[start:stop]) for start, stop in zip(starts, [*cuts, len(names)], strict=True)
    ]
    # A window may be shorter than what it shares; then the one before it holds all of it.
    if all(start <= after for start, after in pairwise(starts)):
        overlaps = [2.0 if n else 0.0 for n in shared]
        assert merged(texts, overlaps) == " ".join(names)


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        (["We went to the", "to the old mill."], "We went to the old mill."),
        (["we went, to The old", "To the old mill"], "we went, to The old mill"),
        (["we went to the old mi", "nt to the old mill today"], "we went to the old mill today"),
        (["one two three", "four five six"], "one two three four five six"),
        (["we all win", "all win we all win now"], "we all win we all win now"),
        (["one two", ""], "one two"),
        (["", "one two"], "one two"),
        (["das ist gut", "— das ist gut so"], "das ist gut so"),
        (
            ["今日は学校に行きました。", "行きました、それから帰りました。"],
            "今日は学校に行きました。 それから帰りました。",
        ),
        (
            ["はい、きょうはとてもいいてんきです", "きょうはとてもいいてんきですね"],
            "はい、きょうはとてもいいてんきです ね",
        ),
        (["我们今天去", "今天去学校上课"], "我们今天去 学校上课"),
        (["我们今天去学", "今天去学校 and so on"], "我们今天去学 校 and so on"),
        (
            ["彼は本です", "すばらしいです"],
            "彼は本です すばらしいです",
        ),  # one letter meets by chance
        (["วันนี้เราไปโรงเรียน", "โรงเรียนด้วยกัน"], "วันนี้เราไปโรงเรียน ด้วยกัน"),
    ],
)
def test_overlapping_texts_are_joined_at_what_both_heard(texts: list[str], whole: str):
    assert merged(texts, [1.5]) == whole


def test_texts_of_windows_keep_their_words_and_spaces():
    texts = ["今日は  iPhone 15 を買った。", " ", "「はい」と 言った…", "no — no, (no)"]
    kept = ["今日は iPhone 15 を買った。", "", "「はい」と 言った…", "no — no, (no)"]
    assert trim_overlaps(texts, [0, 0, 0]) == kept


def test_windows_that_only_touch_keep_a_word_said_twice():
    assert merged(["it was very", "very good"], [0]) == "it was very very good"


def test_words_are_sought_no_further_than_the_overlap_reaches():
    far = "alpha beta gamma " + " ".join(f"x{i}" for i in range(7))
    assert merged([far, "alpha beta gamma"], [1.0]) == far + " alpha beta gamma"


def test_texts_and_overlaps_must_fit():
    with pytest.raises(MediaError, match="3 texts have 2 borders, not 1"):
        merged(["a", "b", "c"], [1.0])
    assert merged([], []) == ""


@pytest.mark.parametrize(
    ("text", "looped"),
    [
        ("Thank you. " * 6, True),
        ("Thank you. " * 5, False),
        ("and then we go to the shop " * 4, True),
        ("and then we go to the shop " * 3, False),
        ("before it " + "la " * 12 + "and after", True),
        ("no, no, no, no!", False),
        ("谢谢观看" * 4, True),
        ("", False),
        ("a text in which the same word and the same phrase come back now and then", False),
        (" ".join(f"{i} and" for i in range(30)), False),
    ],
)
def test_a_loop_is_told_from_speech(text: str, looped: bool):
    assert is_repetition(text) is looped


def test_subtitles_are_numbered_and_timed_to_the_millisecond():
    segments = [
        Segment(0, 1.5, "Hello\nthere"),
        Segment(1.5, 2, "  "),
        Segment(3599.9996, 3661.0014, "a --> b"),
        Segment(360_000, 360_001.25, "late"),
    ]
    assert to_srt(segments) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello there\n\n"
        "2\n01:00:00,000 --> 01:01:01,001\na -> b\n\n"
        "3\n100:00:00,000 --> 100:00:01,250\nlate\n"
    )
    assert to_srt([]) == ""
