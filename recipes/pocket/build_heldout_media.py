"""Writes the held-out set of pictures and speech: one file that holds items and their media.

Every item is one question about one picture, or one clip, that nothing was said about before: the
checks of pictures.py and speech.py, taken out of their conversations. Beside them a reading of four
minutes. Format and categories are in README.md; the same arguments give the same bytes, given one
version of Pillow, FFmpeg and espeak-ng.

Pictures are lossless WebP, half the size of PNG with a palette. Sounds are Opus at 24 kbit/s: at 32
the set would not fit into 3.5 MB, as FLAC a clip is seven times larger. The loss is part of the
test; training clips have none.

Run: python -m recipes.pocket.build_heldout_media src/gemsmith/pocket/heldout_media.zip
"""

import argparse
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from recipes.pocket import pictures, speech
from recipes.pocket.generator import Conversation
from recipes.pocket.tasks import Check
from recipes.pocket.words import Draw

from gemsmith.media.audio import SAMPLE_RATE
from gemsmith.media.image import BUDGETS

SEED = 7_000_033
MAX_SIZE = 3_500_000
COUNTS = {
    "picture_shape": 100,
    "picture_description": 40,
    "picture_count": 40,
    "picture_box": 100,
    "picture_point": 40,
    "picture_read": 60,
    "picture_lines": 40,
    "picture_table": 40,
    "picture_row": 40,
    "picture_button": 40,
    "picture_call": 40,
    "speech_sentence": 45,
    "speech_digits": 25,
    "speech_command": 40,
    "speech_call": 100,
    "speech_no_tool": 30,
    "speech_answer": 30,
}
"""Pictures to read are asked at every budget; transcripts are counted together."""
SOURCES = {
    "picture_shape": ("scene",),
    "picture_description": ("scene",),
    "picture_count": ("count", "scene"),
    "picture_box": ("detect", "scene", "buttons"),
    "picture_point": ("detect", "buttons"),
    "picture_read": ("read",),
    "picture_lines": ("read",),
    "picture_table": ("table",),
    "picture_row": ("table",),
    "picture_button": ("buttons",),
    "picture_call": ("note",),
    "speech_sentence": ("transcribe",),
    "speech_digits": ("transcribe",),
    "speech_command": ("transcribe",),
    "speech_call": ("call",),
    "speech_no_tool": ("call",),
    "speech_answer": ("answer",),
}
"""Kinds of conversations that a category comes from, in turn."""
EXACT = tuple(
    f"picture_{what}" for what in ("description", "read", "lines", "table", "row", "button")
)
"""The reply must be the one of the conversation letter by letter, more than `answer` asks for."""
BIT_RATE = 24_000
READING_SECONDS = 240
PAUSES_MS = (350, 900)
"""Between the sentences of the reading."""


@dataclass(frozen=True)
class Item:
    """A line of items.jsonl and the files that it names."""

    line: dict[str, Any]
    media: dict[str, bytes]


def items(counts: Mapping[str, int] = COUNTS) -> Iterator[Item]:
    """All items, no prompt twice, in a stable order."""
    for category, wanted in counts.items():
        seen: set[str] = set()
        for index in count():
            if len(seen) == wanted:
                break
            kind = SOURCES[category][index % len(SOURCES[category])]
            talk = _conversation(category, kind, index)
            found = [check for check in talk.checks if check.category == category]
            if not found:
                continue
            check = Draw("heldout", f"{SEED}/{category}/{index}").pick(found)
            made = _items(category, len(seen), talk, check)
            prompt = _fingerprint(made[0])
            if prompt not in seen:
                seen.add(prompt)
                yield from made


def _conversation(category: str, kind: str, index: int) -> Conversation:
    seed = SEED + list(SOURCES).index(category)  # no category has the pictures of another
    if category.startswith("speech"):
        return speech.generate("heldout", seed, index, kind=kind)
    budget = max(BUDGETS) if category == "picture_read" else None
    return pictures.generate("heldout", seed, index, kind=kind, budget=budget)


def _items(category: str, number: int, talk: Conversation, check: Check) -> list[Item]:
    """The question of a check, put to the picture or with the sound; several at several budgets."""
    message = talk.messages[check.upto - 1]
    asked = message["content"]
    text = asked if isinstance(asked, str) else asked[-1].get("text")
    said = [{"type": "text", "text": text}] if text else []
    expected = check.expected
    if category in EXACT:
        expected = {"type": "text", "value": talk.messages[check.upto]["content"]}
    line = {"tools": talk.tools, "enable_thinking": False, "expected": expected}
    if not isinstance(talk, pictures.Picture):
        name = f"{category}-{number:04}.ogg"
        part: dict[str, Any] = {"type": "audio", "audio": name}
        return [
            _item(
                category, number, [part, *said], line, {name: ogg(message["content"][0]["audio"])}
            )
        ]
    name = f"{category}-{number:04}.webp"
    media = {name: webp(talk.image)}
    budgets = {category: talk.budget}
    if category == "picture_read":
        budgets = {f"{category}_{budget}": budget for budget in BUDGETS}
    return [
        _item(own, number, [{"type": "image", "image": name, "budget": b}, *said], line, media)
        for own, b in budgets.items()
    ]


def _item(
    category: str,
    number: int,
    content: list[dict[str, Any]],
    line: dict[str, Any],
    media: dict[str, bytes],
) -> Item:
    messages = [{"role": "user", "content": content}]
    named = {"id": f"{category}-{number:04}", "category": category, "messages": messages}
    return Item(named | line, media)


def _fingerprint(item: Item) -> str:
    """Equal for equal prompts, whatever their files are called."""
    [data] = item.media.values()
    parts = item.line["messages"][0]["content"]
    return f"{[p['text'] for p in parts if p['type'] == 'text']}{item.line['tools']}{data.hex()}"


def reading(seconds: float = READING_SECONDS) -> Item:
    """Sentences of the kind that are transcribed, read by one voice with pauses between them."""
    d = Draw("heldout", f"{SEED}/reading")
    voice = f"{d.pick(speech.ACCENTS)}+{d.pick(speech.VOICES['heldout'])}"
    written: list[str] = []
    pieces: list[np.ndarray] = []
    while sum(map(len, pieces)) < seconds * SAMPLE_RATE:
        made = speech.utterance(d, speech.SENTENCES)
        if made.written not in written:
            written.append(made.written)
            pieces.append(speech.synthesise(made.spoken, voice, 160, 50))
            pieces.append(np.zeros(d.between(*PAUSES_MS) * SAMPLE_RATE // 1000, np.float32))
    samples = np.concatenate(pieces)
    samples *= 0.5 / np.abs(samples).max()
    noise = np.random.default_rng(SEED).standard_normal(len(samples), np.float32)
    samples += noise * 10 ** (-40 / 20) * np.sqrt(np.mean(samples**2))
    name = "speech_reading.ogg"
    expected = {"type": "reading", "value": " ".join(written)}
    line = {"tools": None, "enable_thinking": False, "expected": expected}
    content = [{"type": "audio", "audio": name}]
    return _item("speech_reading", 0, content, line, {name: ogg(samples)})


def webp(image: Image.Image) -> bytes:
    """Lossless."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True)
    return file.getvalue()


def ogg(samples: np.ndarray) -> bytes:
    """Opus of float32 mono at 16 kHz in [-1, 1]."""
    file = io.BytesIO()
    # Otherwise FFmpeg draws the stream's number at random.
    exact = {"fflags": "+bitexact"}
    with av.open(file, "w", format="ogg", options=exact) as container:
        stream = container.add_stream("libopus", rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = BIT_RATE
        pcm = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def write(path: Path, made: list[Item]) -> None:
    """items.jsonl, then the media by name, stored as they are. Equal items give equal bytes."""
    lines = "".join(json.dumps(item.line, ensure_ascii=False) + "\n" for item in made)
    media = {name: data for item in made for name, data in item.media.items()}
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, "items.jsonl", lines.encode(), zipfile.ZIP_DEFLATED)
        for name in sorted(media):
            _add(archive, name, media[name], zipfile.ZIP_STORED)


def _add(archive: zipfile.ZipFile, name: str, data: bytes, how: int) -> None:
    entry = zipfile.ZipInfo(name)  # dated 1980
    entry.create_system = 3
    archive.writestr(entry, data, how, 9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    made = [*items(), reading()]
    write(options.out, made)
    size = options.out.stat().st_size
    print(f"wrote {len(made)} items, {size / 1024:.0f} KiB")
    if size > MAX_SIZE:
        raise SystemExit(f"{options.out} is larger than {MAX_SIZE} bytes; lower some of COUNTS")
