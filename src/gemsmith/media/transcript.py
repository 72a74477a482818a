"""Long recordings: cut into windows that an audio tower hears, and their texts put together again.

No model runs here: the engine transcribes each window and hands back the texts. Windows end in
pauses where there are pauses; where there is none, the next window begins a little earlier than the
last one ended, and the words that both heard are found again in their texts.

Legend: samples are float32 [n] at 16 kHz (see audio.py); windows are (start, stop), in samples.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemsmith.errors import MediaError
from gemsmith.media.audio import SAMPLE_RATE

STEP = SAMPLE_RATE // 50
"""Loudness is measured every 20 ms."""
PAUSE_STEPS = 15
"""A pause is 300 ms of quiet: gaps within words, before p, t and k, last 50 to 150 ms."""
PAUSE_SHARE = 0.3
"""Quiet is the lowest three tenths of the way, in dB, from the noise to the voice of a window."""
MIN_RANGE_DB = 6
"""From the noise to the voice; with less there is no telling them apart, and no pause."""
SILENCE_DB = -70
"""Below full scale: quiet, whatever the rest is like. 16 bits end at -96."""
MIN_TAIL = SAMPLE_RATE
"""The last window has a second at least: models make up text for a sound of nothing."""

WORDS_PER_SECOND = 6
"""Of fast speech: an overlap of so many seconds holds no more words than this."""
LETTERS_PER_SECOND = 12
"""The same of letters of scripts without spaces, each of which is sought by itself."""
MIN_LETTERS = 3
"""What two texts share of such letters, at least: one or two meet by chance."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of scripts without spaces: the last line is Japanese and Chinese."""
UNIT = re.compile(rf"\s*(?:[{UNSPACED}][^\w\s{UNSPACED}]*|[^\s{UNSPACED}]+)")
"""A word, or a letter of those, with its punctuation and the space before it."""
MIN_REPEATS, MIN_REPEATED = 4, 12
"""A loop says the same thing so many times and in so many words; "no, no, no" is none."""
MAX_UNIT = 40
"""Words of what a loop repeats, at most."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a recording, in seconds, and what is said in it."""

    start_s: float
    end_s: float
    text: str


def split_windows(
    samples: np.ndarray, *, max_seconds: float = 30.0, overlap_seconds: float = 2.0
) -> list[tuple[int, int]]:
    """Windows of at most max_seconds that together cover every sample.

    A window ends in the middle of the quietest 300 ms of its second half, where that is a pause:
    300 ms near the noise floor of this window, however loud the noise. The next begins right there.
    Without a pause it is max_seconds long, or less where the last would have no second (MIN_TAIL),
    and the next begins overlap_seconds before its end.

    Raises:
      MediaError: no samples, or an overlap that is not in 0..max_seconds / 2.
    """
    longest, overlap = round(max_seconds * SAMPLE_RATE), round(overlap_seconds * SAMPLE_RATE)
    if not (0 <= overlap <= longest // 2 and longest >= 4 * MIN_TAIL):
        raise MediaError(
            f"windows of {max_seconds:g} s that overlap by {overlap_seconds:g} s: give windows of "
            f"{4 * MIN_TAIL // SAMPLE_RATE} s or more and an overlap of at most half a window"
        )
    if not len(samples):
        raise MediaError("there are no samples to split; the recording is empty")
    windows: list[tuple[int, int]] = []
    start = 0
    while len(samples) - start > longest:
        pause = _pause(samples[start : start + longest], len(samples) - start)
        whole = min(longest, len(samples) - start - MIN_TAIL + overlap)
        stop = start + (whole if pause is None else pause)
        windows.append((start, stop))
        start = stop - (overlap if pause is None else 0)
    windows.append((start, len(samples)))
    return windows


def trim_overlaps(texts: Sequence[str], overlaps: Sequence[float]) -> list[str]:
    """The texts of consecutive windows, what two of them share kept in one of the two.

    overlaps[i]: seconds that windows i and i + 1 share. Texts of windows that only touch stay as
    they are. Where windows overlap, the longest run of words that both have at the border (case and
    punctuation aside) is kept once. Words between the run and the border are dropped, for a word
    cut in two is heard wrong; so a run counts for its length less the words that it would drop, and
    if none counts for more than 0 both texts are kept whole: better twice than lost.

    In scripts without spaces letters stand for words, and a run must count for MIN_LETTERS.

    A phrase repeated just at a border ("no no no") may be taken for the overlap.

    Raises:
      MediaError: not one overlap fewer than texts.
    """
    if len(overlaps) != max(len(texts) - 1, 0):
        raise MediaError(
            f"{len(texts)} texts have {max(len(texts) - 1, 0)} borders, not {len(overlaps)}"
        )
    merged: list[tuple[int, str]] = []  # (window, word)
    for i, text in enumerate(texts):
        words = [(i, word) for word in UNIT.findall(" ".join(text.split()))]
        letters = re.search(f"[{UNSPACED}]", text) is not None
        rate, least = (LETTERS_PER_SECOND, MIN_LETTERS) if letters else (WORDS_PER_SECOND, 1)
        most = math.ceil(overlaps[i - 1] * rate) if i else 0
        left, right = merged[-most:] if most else [], words[:most]
        kept, begun = _border([word for _, word in left], [word for _, word in right], least)
        merged = merged[: len(merged) - kept] + words[begun:]
    return [
        "".join(word for owner, word in merged if owner == i).strip() for i in range(len(texts))
    ]


def is_repetition(text: str) -> bool:
    """Whether a model got into a loop: one phrase at least 4 times in a row, 12 words in all.

    A text without spaces is looked at character by character.
    """
    words = [_bare(word) for word in text.split()]
    if len(words) == 1:
        words = list(words[0])
    for unit in range(1, min(MAX_UNIT, len(words) // MIN_REPEATS) + 1):
        enough = max(MIN_REPEATS * unit, MIN_REPEATED)
        same = unit  # words up to here that repeat those before them, the first unit counted
        for before, word in zip(words, words[unit:], strict=False):
            same = same + 1 if word == before else unit
            if same >= enough:
                return True
    return False


def to_srt(segments: Sequence[Segment]) -> str:
    """Subtitles in SubRip form. Segments without text are left out."""
    spoken = [(segment, " ".join(segment.text.split())) for segment in segments]
    blocks = [
        # An arrow in the text would read as a time.
        f"{_clock(segment.start_s)} --> {_clock(segment.end_s)}\n{text.replace('-->', '->')}\n"
        for segment, text in spoken
        if text
    ]
    return "\n".join(f"{number}\n{block}" for number, block in enumerate(blocks, 1))


def _pause(window: np.ndarray, left: int) -> int | None:
    """Sample at which the window is best cut, if it has a pause; left: samples from its start."""
    steps = len(window) // STEP
    blocks = window[: steps * STEP].reshape(steps, STEP)
    power = np.einsum("ij,ij->i", blocks, blocks, dtype=np.float64) / STEP
    loudness = 10 * np.log10(power + 1e-12)
    noise, voice = np.percentile(loudness, [1, 90])
    quiet = noise + PAUSE_SHARE * (voice - noise) if voice - noise >= MIN_RANGE_DB else SILENCE_DB
    # The loudest step of each 300 ms: all of it must be quiet.
    around = np.lib.stride_tricks.sliding_window_view(loudness, PAUSE_STEPS).max(axis=1)
    first = steps // 2
    last = min(steps, (left - MIN_TAIL) // STEP) - PAUSE_STEPS
    # Of equals the last: fewer windows.
    best = last - int(np.argmin(around[first : last + 1][::-1]))
    if around[best] > max(quiet, SILENCE_DB):
        return None
    return (best + PAUSE_STEPS // 2) * STEP + STEP // 2


def _border(left: list[str], right: list[str], least: int) -> tuple[int, int]:
    """Words to take from the end of the left and from the beginning of the right text.

    least: what a run must count for.
    """
    ends, starts = [_bare(word) for word in left], [_bare(word) for word in right]
    best, found = (0, 0), (0, 0)
    before = [0] * (len(starts) + 1)
    for i, word in enumerate(ends, 1):
        runs = [0]  # of equal words that end at word i of the left and word j of the right
        for j, other in enumerate(starts, 1):
            runs.append(before[j - 1] + 1 if word == other and word else 0)
            run = runs[j]
            worth = run - (len(ends) - i) - (j - run)
            if worth >= least and (worth, run) > best:
                best, found = (worth, run), (len(ends) - i, j)
        before = runs
    return found


def _bare(word: str) -> str:
    return re.sub(r"\W", "", word).casefold() or word.strip()


def _clock(seconds: float) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"
