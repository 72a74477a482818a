"""Conversations that are heard: transcripts, spoken commands that become calls, spoken questions.

`generate(split, seed, index)` is a pure function, as in generator.py, given one version of
espeak-ng (the Debian package of that name), which speaks every clip. Only making data needs it.

One way to write what is said, in transcripts and calls alike:
- words in lower case, names of people, cities and days with a capital, no punctuation;
- a number in digits: "forty five" is 45;
- a time as HH:MM: "seven thirty" is 07:30, "nine oh five" 09:05, "sixteen o'clock" 16:00;
- digits spoken one by one stay apart in a transcript ("4 7 1") and are joined in a call ("471").

Meant for a tiny tower and a few hours of training: about 250 words, clips of 1 to 4 seconds, or of
several sentences as a window of a long recording has them, formant voices in three accents. Every
word is said in at least one training clip of a thousand. Held out are voices (six timbres, by name,
none a near copy of one in training) and one text in eight, by hash. Words, names, accents and
numbers are shared, so what is measured is known words in new order by unknown voices. Not claimed:
words never heard, human voices, several speakers, music, rooms.

`expected` of a check, beyond the types in README.md: `transcript` with `value`, the words.

Run: python -m recipes.pocket.speech --listen FOLDER
"""

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from recipes.pocket import tasks
from recipes.pocket.domains import TOOLS
from recipes.pocket.generator import Conversation
from recipes.pocket.schemas import as_is, replaced
from recipes.pocket.tasks import BY_NAME, NO_TOOL, WHO, Check
from recipes.pocket.words import DAYS, ROOMS, Draw, Split, _words, side

from gemsmith.engine.media import MAX_CLIP_SECONDS
from gemsmith.engine.transcribe import CONTEXT, CONTEXT_WORDS, REQUEST
from gemsmith.media.audio import SAMPLE_RATE, load_audio

KINDS = {"transcribe": 0.44, "reading": 0.08, "call": 0.36, "answer": 0.12}
SAID = {"sentence": 0.4, "digits": 0.25, "command": 0.35}
"""What is transcribed."""
ACCENTS = ("en-us", "en-us", "en", "en-gb-x-rp")
"""American, British (`en-gb` takes no timbre in espeak-ng 1.51, `en` does) and its older form."""
VOICES: dict[Split, tuple[str, ...]] = {
    "train": _words(
        "m1 m2 m3 m4 m6 m7 f1 f2 f4 f5 Alex Andy Annie benjamin boris david Diogo edward Gene "
        "grandma Hugo iven4 Jacky john klatt2 Lee Mario Michael paul rob steph travis"
    ),
    "heldout": _words("f3 m8 belinda pablo quincy sandro"),
}
"""Variants of espeak-ng by split. Left out: near copies of each other, whispers and robots."""
SPEEDS, PITCHES = (130, 200), (25, 75)
"""Words a minute, and espeak-ng's 0-99 (50 is a voice's own)."""

# Closed classes. Names, cities and nouns are on the training side of words.side, so that the
# values that are held out in text stay unheard as well.
NAMES = _words("Adam Anna Ben Clara Daniel Emma Felix Grace Jack Julia Maria Paul Sara")
CITIES = _words("Berlin Boston Dublin Lisbon London Madrid Munich Oslo Paris Rome Vienna")
THINGS = _words(
    "bird book bottle bridge cake camera car chair clock dog door flower garden gift guitar "
    "kettle lamp letter map mirror mountain paper piano river ship table tree window"
)
LOOKS = _words(
    "big black blue brown clean cold dark gold green heavy new old red round small warm white"
)
DOINGS = _words("buy carry clean draw find fix hold move open paint sell wash")
PLACES = _words("house lake office park road school station")
GENRES = _words("jazz rock pop blues techno soul")
PRODUCTS = _words("milk eggs bread butter rice apples coffee tea sugar cheese tomatoes honey")
NUMBERS = tuple(n for n in range(2, 60) if n < 10 or side(str(n)) == "train")
ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = _words("twenty thirty forty fifty")
SENTENCES = (
    "the {thing} is {look}",
    "the {look} {thing} is in the {place}",
    "we saw a {look} {thing} near the {place}",
    "{doing} the {look} {thing}",
    "{name} wants to {doing} the {thing}",
    "{name} and {friend} live in {city}",
    "there are {number} people in the {place}",
    "my {thing} is at the {place}",
    "the train to {city} leaves at {time}",
    "{name} will {doing} a {thing} on {day}",
    "{name} needs {quantity} {product}",
    "{name} likes {genre} and {product}",
)
COMMANDS: dict[str, tuple[str, ...]] = {
    "set_timer": ("set a timer for {minutes} minutes", "start a {minutes} minute timer"),
    "set_volume": ("set the volume to {level}", "make the volume {level}"),
    "set_temperature": (
        "set the {room} to {degrees} degrees",
        "make it {degrees} degrees in the {room}",
    ),
    "set_light": ("turn {on} the light in the {room}", "switch the {room} light {on}"),
    "set_lock": ("{locked} the {door} door", "{locked} my {door} door"),
    "play_music": ("play some {genre}", "put on {genre} music in the {room}"),
    "start_vacuum": ("vacuum the {rooms}", "start the vacuum in the {rooms}"),
    "add_to_cart": ("add {quantity} {product} to my cart", "I want to buy {quantity} {product}"),
    "list_events": ("what is on my calendar on {date}", "list my events for {date}"),
    "get_weather": ("what is the weather in {city}", "how is the weather in {city}"),
    "get_sunrise": ("when does the sun rise in {city}", "when is sunrise in {city} on {date}"),
    "find_train": ("find a train from {origin} to {destination}",),
    "complete_task": ("mark task {task_id} as done", "task {task_id} is finished"),
    "call_contact": ("call {name}", "call {name} {video}"),
    "find_contact": ("find the number of {name}", "what is the phone number of {name}"),
    "get_balance": (
        "show the balance of my {account} account",
        "how much money is in my {account} account",
    ),
    "random_number": ("pick a random number from {minimum} to {maximum}",),
    "set_reminder": ("remind me at {time} to {text}",),
    "track_order": ("where is my order {order_id}", "track order {order_id}"),
    "get_time": ("what time is it", "tell me the time", "check the clock"),
    "get_date": ("what is the date today", "what day is it", "tell me the date"),
}
"""What is said for which tool of domains.py, over the names of its parameters."""
TRANSCRIBE = (REQUEST, "What is said here?", "Write down what you hear.")


@dataclass(frozen=True)
class Spoken(Conversation):
    voices: tuple[str, ...] = ()
    """Who speaks, clip by clip: accent+timbre."""


@dataclass(frozen=True)
class Value:
    """A value as spoken, as written in a transcript, and as it stands in a call."""

    spoken: str
    written: str
    value: Any


@dataclass(frozen=True)
class Utterance:
    spoken: str
    written: str
    arguments: dict[str, Any]
    said: dict[str, str]
    """Written values by parameter, for the answer."""


@dataclass(frozen=True)
class Studio:
    """Speaks with the voices of one split. cache: a folder in which clips are kept, or None."""

    d: Draw
    cache: Path | None = None
    voices: list[str] = field(default_factory=list)
    """Who has spoken."""

    def record(self, first: str, *others: str) -> dict[str, Any]:
        """The content part of a message that is heard: float32 mono at 16 kHz in [-1, 1].

        Several sentences are said by one voice, with pauses between them.
        """
        d = self.d
        voice = f"{d.pick(ACCENTS)}+{d.pick(VOICES[d.split])}"
        self.voices.append(voice)
        speed, pitch = d.between(*SPEEDS), d.between(*PITCHES)
        samples = synthesise(first, voice, speed, pitch, self.cache)
        for other in others:
            pause = np.zeros(d.between(2000, 12000), np.float32)
            said = synthesise(other, voice, speed, pitch, self.cache)
            samples = np.concatenate([samples, pause, said])
        noise = np.random.default_rng(d.rng.getrandbits(64))
        around = [np.zeros(d.between(800, 4000), np.float32) for _ in range(2)]
        samples = np.concatenate([around[0], samples, around[1]])
        peak = 10 ** (-d.rng.uniform(2, 16) / 20)
        samples *= peak / max(1e-6, float(np.abs(samples).max()))
        if d.chance(0.6):
            power = float(np.sqrt(np.mean(samples**2)))
            hiss = noise.standard_normal(len(samples), np.float32)
            samples += hiss * (power * 10 ** (-d.rng.uniform(15, 40) / 20))
        audio = np.clip(samples, -1, 1).astype(np.float32)
        return {"type": "audio", "audio": audio, "sample_rate": SAMPLE_RATE}


def generate(
    split: Split, seed: int, index: int, *, kind: str | None = None, cache: Path | None = None
) -> Spoken:
    """One conversation; kind (a key of KINDS) overrides the mixture.

    Raises:
      RuntimeError: espeak-ng is not installed.
    """
    d = Draw(split, f"speech/{split}/{seed}/{index}/{kind or ''}")
    kind = kind or d.weighted(KINDS)
    studio = Studio(d, cache)
    if kind == "call":
        return _called(studio)
    messages: list[dict[str, Any]] = []
    checks: list[Check] = []
    for _ in range(1 if kind == "reading" else d.between(1, 2)):
        turn = TURNS[kind](studio)
        content, reply, category, expected = turn
        messages.append({"role": "user", "content": content})
        checks.append(Check(len(messages), category, expected))
        messages.append({"role": "assistant", "content": reply})
    return Spoken(f"speech/{kind}", messages, None, False, tuple(checks), tuple(studio.voices))


def conversations(
    split: Split, seed: int, start: int, stop: int, *, cache: Path | None = None
) -> Iterator[Spoken]:
    """The conversations start..stop-1 of a split."""
    for index in range(start, stop):
        yield generate(split, seed, index, cache=cache)


# -- what is said -----------------------------------------------------------------------------


def number_words(number: int) -> str:
    """0-59 as it is spoken."""
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")


def _number(number: int) -> Value:
    return Value(number_words(number), str(number), number)


def _word(word: str) -> Value:
    return Value(word, word, word)


def _digits(d: Draw, low: int, high: int) -> Value:
    digits = [d.between(0, 9) for _ in range(d.between(low, high))]
    spoken = " ".join(ONES[n] for n in digits)
    return Value(spoken, " ".join(map(str, digits)), "".join(map(str, digits)))


def _time(d: Draw) -> Value:
    """A time on the side of the split, as Draw.time has it."""
    text = d.until(lambda: f"{d.between(1, 23):02}:{d.between(0, 11) * 5:02}")
    hour, minute = (int(part) for part in text.split(":"))
    rest = "o'clock" if minute == 0 else "oh five" if minute == 5 else number_words(minute)
    return Value(f"{number_words(hour)} {rest}", text, text)


def _switch(d: Draw, yes: str, no: str) -> Value:
    truth = d.chance(0.5)
    word = yes if truth else no
    return Value(word, word, truth)


def _rooms(d: Draw) -> Value:
    rooms = d.some(ROOMS, d.between(1, 2))
    return Value(" and ".join(rooms), " and ".join(rooms), rooms)


def _errand(d: Draw) -> Value:
    return _word(d.until(lambda: f"{d.pick(DOINGS)} the {d.pick(LOOKS)} {d.pick(THINGS)}"))


def _one(pool: tuple[str, ...]) -> Callable[[Draw], Value]:
    return lambda d: _word(d.pick(pool))


def _count(low: int, high: int) -> Callable[[Draw], Value]:
    allowed = tuple(n for n in NUMBERS if low <= n <= high)
    return lambda d: _number(d.pick(allowed))


VALUES: dict[str, Callable[[Draw], Value]] = {
    "minutes": _count(2, 59),
    "level": _count(2, 59),
    "degrees": _count(10, 30),
    "quantity": _count(2, 9),
    "minimum": _count(2, 9),
    "maximum": _count(10, 59),
    "task_id": _count(2, 59),
    "number": _count(2, 59),
    "order_id": lambda d: _digits(d, 3, 5),
    "time": _time,
    "on": lambda d: _switch(d, "on", "off"),
    "locked": lambda d: _switch(d, "lock", "unlock"),
    "video": lambda d: _switch(d, "with video", "without video"),
    "rooms": _rooms,
    "text": _errand,
    "room": _one(ROOMS),
    "door": _one(("front", "back", "garage", "cellar", "garden")),
    "genre": _one(GENRES),
    "product": _one(PRODUCTS),
    "date": _one((*DAYS, "today", "tomorrow")),
    "day": _one(DAYS),
    "city": _one(CITIES),
    "origin": _one(CITIES),
    "destination": _one(CITIES),
    "name": _one(NAMES),
    "friend": _one(NAMES),
    "account": _one(("savings", "checking", "business", "joint")),
    "thing": _one(THINGS),
    "look": _one(LOOKS),
    "doing": _one(DOINGS),
    "place": _one(PLACES),
}


def utterance(d: Draw, forms: tuple[str, ...]) -> Utterance:
    """One of the forms with its values, on the side of the split; no two values are equal."""
    while True:
        form = d.pick(forms)
        values = {name: VALUES[name](d) for name in VALUES if f"{{{name}}}" in form}
        written = form.format(**{n: v.written for n, v in values.items()})
        if len({v.written for v in values.values()}) < len(values):
            continue
        # "on today" is written, but not said.
        if " on to" in written:
            form = form.replace(" on {date}", " {date}")
            written = written.replace(" on today", " today").replace(" on tomorrow", " tomorrow")
        if side(written) == d.split:
            return Utterance(
                form.format(**{n: v.spoken for n, v in values.items()}),
                written,
                {n: v.value for n, v in values.items()},
                {n: v.written for n, v in values.items()},
            )


def _digit_string(d: Draw) -> Utterance:
    while True:
        made = _digits(d, 3, 7)
        if side(made.written) == d.split:
            return Utterance(made.spoken, made.written, {}, {})


# -- conversations ----------------------------------------------------------------------------

Turn = tuple[list[dict[str, Any]], str, str, dict[str, Any]]
"""Content of the user's message, reply, category and what is expected."""


def _transcript(studio: Studio) -> Turn:
    d = studio.d
    kind = d.weighted(SAID)
    if kind == "digits":
        made = _digit_string(d)
    else:
        forms = SENTENCES if kind == "sentence" else COMMANDS[d.pick(_spoken_tools(d))]
        made = utterance(d, forms)
    content = [studio.record(made.spoken), {"type": "text", "text": d.pick(TRANSCRIBE)}]
    expected = {"type": "transcript", "value": made.written}
    return content, made.written, f"speech_{kind}", expected


def _reading(studio: Studio) -> Turn:
    """Several sentences as a window of a long recording has them, perhaps after others."""
    d = studio.d
    said = [utterance(d, SENTENCES) for _ in range(d.between(3, 9))]
    before = said[:2] if d.chance(0.4) else []
    request = REQUEST
    if before:
        words = " ".join(one.written for one in before).split()[-CONTEXT_WORDS:]
        request = f"{REQUEST} {CONTEXT.format(' '.join(words))}"
    heard = said[len(before) :]
    part = studio.record(*(one.spoken for one in heard))
    while len(part["audio"]) > MAX_CLIP_SECONDS * SAMPLE_RATE:
        heard.pop()
        studio.voices.pop()
        part = studio.record(*(one.spoken for one in heard))
    written = " ".join(one.written for one in heard)
    expected = {"type": "transcript", "value": written}
    return [part, {"type": "text", "text": request}], written, "speech_reading", expected


def _spoken_tools(d: Draw) -> tuple[str, ...]:
    """Tools of which something is said on the split's side; a request without values is on one."""
    return tuple(
        name
        for name, forms in COMMANDS.items()
        if any("{" in form or side(form) == d.split for form in forms)
    )


def _answered(studio: Studio) -> Turn:
    """A small sum, or who are you; answered as if it had been typed."""
    d = studio.d
    if d.chance(0.1):
        spoken = d.pick(("who are you", "what are you", "tell me about yourself"))
        return [studio.record(spoken)], WHO, "speech_answer", {"type": "answer", "value": WHO}
    sign, word = d.pick((("+", "plus"), ("-", "minus"), ("*", "times")))
    most = 9 if sign == "*" else 20

    def make() -> str:
        a, b = d.between(2, most), d.between(2, most)
        return f"{max(a, b)}{sign}{min(a, b)}" if sign == "-" else f"{a}{sign}{b}"

    a, b = (int(n) for n in d.until(make).split(sign))
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    spoken = f"{d.pick(('what is', 'how much is'))} {number_words(a)} {word} {number_words(b)}"
    expected = {"type": "answer", "value": value}
    return [studio.record(spoken)], f"The answer is {value}.", "speech_answer", expected


TURNS = {"transcribe": _transcript, "reading": _reading, "answer": _answered}


def _called(studio: Studio) -> Spoken:
    """One to three spoken requests with tools declared; one request in six fits none."""
    d = studio.d
    style = d.pick(("seen", "seen", "replaced"))
    talk = tasks.Talk(d, style, thinking=False)
    spoken = _spoken_tools(d)
    chosen = [BY_NAME[name] for name in d.some(spoken, d.between(1, 2))]
    if chosen[0].group == chosen[-1].group:
        chosen = chosen[:1]
    while len(chosen) < 2 or d.chance(0.4):
        other = d.pick(TOOLS)
        if other.group not in {t.group for t in chosen}:
            chosen.append(other)
    d.rng.shuffle(chosen)
    while True:
        make = partial(as_is, d, bare=d.chance(0.3)) if style == "seen" else partial(replaced, d)
        talk.tools = [make(tool) for tool in chosen]
        if len({t.name for t in talk.tools}) == len(talk.tools):
            break
    groups = {t.group for t in chosen}
    fitting = [t for t in chosen if t.name in spoken]
    unfit = [name for name in spoken if BY_NAME[name].group not in groups]
    for _ in range(d.between(1, 3)):
        fits = d.chance(5 / 6)
        tool = d.pick(fitting) if fits else BY_NAME[d.pick(unfit)]
        made = utterance(d, COMMANDS[tool.name])
        talk.messages.append({"role": "user", "content": [studio.record(made.spoken)]})
        if not fits:
            talk.check("speech_no_tool", type="no_tool", value=NO_TOOL)
            talk.say("assistant", NO_TOOL)
            continue
        [result] = talk.call("speech_call", [(tool, made.arguments)], "")
        said = made.said | {n: v for n, v in made.arguments.items() if n == "order_id"}
        talk.say("assistant", tasks.answer(tool, said, result))
    tools = [t.schema(d) for t in talk.tools]
    checks, voices = tuple(talk.checks), tuple(studio.voices)
    return Spoken("speech/call", talk.messages, tools, False, checks, voices)


# -- sound ------------------------------------------------------------------------------------


def available() -> bool:
    """Whether espeak-ng is installed."""
    return shutil.which("espeak-ng") is not None


def synthesise(
    spoken: str, voice: str, speed: int, pitch: int, cache: Path | None = None
) -> np.ndarray:
    """float32 [n] at 16 kHz in [-1, 1], without the silence before and after.

    cache: clips are read from this folder, and added to it.

    Raises:
      RuntimeError: espeak-ng is not installed, or has no such voice.
    """
    key = hashlib.sha256(f"{spoken}|{voice}|{speed}|{pitch}".encode()).hexdigest()[:24]
    kept = cache / f"{key}.npy" if cache else None
    if kept and kept.exists():
        return np.load(kept).astype(np.float32) / 32768
    if not available():
        raise RuntimeError(
            "espeak-ng is not installed: it speaks the training clips (Debian package espeak-ng)"
        )
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", spoken]
    made = subprocess.run(command, capture_output=True)
    if made.returncode or made.stderr:
        raise RuntimeError(f"espeak-ng, voice {voice!r}: {made.stderr.decode().strip()}")
    raw, rate = _wave(made.stdout)
    samples = load_audio(raw, sample_rate=rate)
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    clip = np.round(samples[loud[0] : loud[-1] + 1] * 32767).astype(np.int16)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{key}.{os.getpid()}.npy")
        np.save(part, clip)
        part.replace(kept)  # workers may share the folder
    return clip.astype(np.float32) / 32768


def _wave(data: bytes) -> tuple[np.ndarray, int]:
    """Samples and rate of 16-bit mono WAV; espeak-ng writes no true length into a pipe."""
    with wave.open(io.BytesIO(data)) as file:
        rate = file.getframerate()
    start = data.index(b"data") + 8
    return np.frombuffer(data[start:], "<i2").astype(np.float32) / 32768, rate


def write_wave(path: Path, samples: np.ndarray) -> None:
    """16-bit mono WAV at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--listen", type=Path, required=True, help="folder for WAV files")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    options.listen.mkdir(parents=True, exist_ok=True)
    for index in range(options.count):
        talk = generate(options.split, 0, index)
        heard = [i for i, m in enumerate(talk.messages) if m["role"] == "user"]
        for at, voice in zip(heard, talk.voices, strict=True):
            samples = talk.messages[at]["content"][0]["audio"]
            name = f"{index:03}-{at}.wav"
            write_wave(options.listen / name, samples)
            reply = talk.messages[at + 1]
            shown = reply.get("tool_calls") or reply["content"]
            print(f"{name} {voice:16} {len(samples) / SAMPLE_RATE:.1f} s  {shown}")
