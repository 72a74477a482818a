"""Pictures, sounds and videos of a conversation: from content parts to runs of soft tokens.

`collect` reads every medium that the messages name into what the towers take; `expand` puts the
soft tokens where the prompt has placeholders. No tower runs here, and the readers of sound and
video, which load FFmpeg, are imported when the first one comes.

Parts, beside text; SOURCE is a path, bytes, a data URL, a PIL image or an array:
  {"type": "image", "image": SOURCE, "budget": 560}       soft tokens at most, or "auto"
  {"type": "image_url", "image_url": {"url": SOURCE, "detail": "low"}}
  {"type": "audio", "audio": SOURCE}                      an array with its "sample_rate"
  {"type": "input_audio", "input_audio": {"data": BASE64}}
  {"type": "video", "video": SOURCE, "frames": 8}         or "fps", or "tokens"; see media.video,
                                                          whose `survey` is a source, too
"url" and "path" name a source as well.

Source of the layouts: transformers 5.23, Gemma4Processor.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from gemsmith.config import AudioConfig, Gemma4Config, UnifiedVisionConfig
from gemsmith.errors import MediaError
from gemsmith.media import image
from gemsmith.text.tokenizer import Tokenizer

Kind = Literal["image", "audio", "video"]
MAX_CLIP_SECONDS = 30
"""What the audio tower hears at a time: 750 soft tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Soft tokens that stand together: an image, a frame of a video, a clip of sound."""

    kind: Kind
    """"audio" for the sound of a video, too."""
    tokens: int
    features: np.ndarray
    """Patches [P, values]; or mel frames [T, 128], or samples [T, 640], of a sound."""
    places: np.ndarray
    """Positions [P, 2] of patches; bool [T], which frames of a sound are valid."""
    before: str = ""
    """Text in front of it: a frame's time."""
    notes: tuple[str, ...] = ()
    """What of its medium could not be read."""

    @property
    def digest(self) -> bytes:
        """Equal for equal input, so that K/V computed for one serve the other."""
        made = hashlib.blake2b(self.places.tobytes(), digest_size=16)
        made.update(np.ascontiguousarray(self.features).data)
        return made.digest()


@dataclass(frozen=True, slots=True)
class Span:
    """Where the soft tokens of a run lie in the prompt."""

    start: int
    run: Run

    @property
    def stop(self) -> int:
        return self.start + self.run.tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and, at the soft tokens among them, what they stand for."""

    ids: list[int]
    spans: Sequence[Span] = ()

    def keys(self) -> list[Hashable]:
        """The ids, but at soft tokens what tells one picture from another."""
        keys: list[Hashable] = list(self.ids)
        for span in self.spans:
            digest = span.run.digest
            keys[span.start : span.stop] = [(digest, i) for i in range(span.run.tokens)]
        return keys

    def blocks(self) -> list[int]:
        """For each token the number of its image or frame, -1 for text and sound."""
        blocks = [-1] * len(self.ids)
        for number, span in enumerate(self.spans):
            if span.run.kind != "audio":
                blocks[span.start : span.stop] = [number] * span.run.tokens
        return blocks

    def notes(self) -> tuple[str, ...]:
        """What of the media could not be read."""
        return tuple(note for span in self.spans for note in span.run.notes)

    def soft_tokens(self, kind: Kind) -> int:
        return sum(span.run.tokens for span in self.spans if span.run.kind == kind)


def collect(
    messages: Sequence[Mapping[str, Any]],
    config: Gemma4Config,
    *,
    image_budget: int | str | None = None,
) -> list[list[Run]]:
    """The runs of each medium of the messages, in the order in which the prompt names them.

    image_budget: of images whose part says nothing else, "auto" or any number of soft tokens;
      None leaves it to the config.

    Raises:
      MediaError: a medium that cannot be read, or that this model has no input for; more soft
        tokens than its context holds.
    """
    media: list[list[Run]] = []
    tokens, limit = 0, config.text_config.max_position_embeddings
    for index, part in parts(messages):
        try:
            media.append(_READERS[part["type"]](part, config, image_budget))
            tokens += sum(run.tokens for run in media[-1])
            if tokens > limit:  # at once: what is read takes 28 KB a token
                raise MediaError(
                    f"the media up to here have {tokens} soft tokens, but the model's context "
                    f"holds {limit}; give fewer, or lower their budgets"
                )
        except MediaError as error:
            raise MediaError(f"message {index}: {error}") from None
    return media


def parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The parts of the messages that are media, and the number of the message of each."""
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, Sequence) or isinstance(content, str):
            continue
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind in _READERS:
                yield index, part


def expand(
    ids: list[int], media: list[list[Run]], config: Gemma4Config, tokenizer: Tokenizer
) -> Prompt:
    """Each placeholder becomes its medium's soft tokens between their markers.

    Raises:
      MediaError: more placeholders than media, or the reverse.
    """
    placeholders = {
        config.image_token_id: "image",
        config.audio_token_id: "audio",
        config.video_token_id: "video",
    }
    found = [placeholders[id] for id in ids if id in placeholders]
    given = [runs[0].kind for runs in media]
    if found != given:
        raise MediaError(
            f"the prompt has {len(found)} places for media ({_listed(found)}) and the messages "
            f"have {len(given)} media ({_listed(given)}); give one part for each place"
        )
    expanded: list[int] = []
    spans: list[Span] = []
    waiting = iter(media)
    for id in ids:
        if id not in placeholders:
            expanded.append(id)
            continue
        for run in next(waiting):
            opened, soft, closed = _markers(run, config)
            if run.before:
                expanded += tokenizer.encode_parts([(run.before, False)])
            expanded.append(opened)
            spans.append(Span(len(expanded), run))
            expanded += [soft] * run.tokens
            expanded.append(closed)
    return Prompt(expanded, spans)


def require(tower: object, what: str) -> None:
    """Refuses media that a model has no input for.

    Raises:
      MediaError: tower, the part of its config that takes them, is None.
    """
    if tower is None:
        raise MediaError(
            f"this model takes no {what}; E2B, E4B and 12B take images and sound, 26B-A4B and 31B "
            "images"
        )


def _markers(run: Run, config: Gemma4Config) -> tuple[int, int, int]:
    """Ids of the opening marker, the soft token and the closing marker of a run."""
    ids = {
        "image": (config.boi_token_id, config.image_token_id, config.eoi_token_id),
        "video": (config.boi_token_id, config.video_token_id, config.eoi_token_id),
        "audio": (config.boa_token_id, config.audio_token_id, config.eoa_token_index),
    }[run.kind]
    if None in ids:
        raise MediaError(f"config.json names no token ids for {run.kind}; the model cannot take it")
    return ids  # pyright: ignore[reportReturnType]


def _image(part: Mapping[str, Any], config: Gemma4Config, budget: int | str | None) -> list[Run]:
    """A budget of the part says most, then a detail, but for "auto", which clients send unasked."""
    vision = config.vision_config
    require(vision, "images")
    assert vision is not None
    source = _source(part, "image")
    detail: Any = None
    if isinstance(source, Mapping):
        source, detail = _source(source, "url"), source.get("detail")
    picture = image.load_image(source)
    chosen: Any = part.get("budget")
    if chosen not in (None, "auto"):
        image.check_budget(chosen)
    if chosen is None and detail in (None, "auto"):
        chosen = budget
    if chosen is None and detail is None:
        chosen = vision.default_output_length
    if chosen in (None, "auto"):
        chosen = image.choose_budget(picture, chosen or detail or "auto")
    return [_seen("image", picture, chosen, config)]


def _seen(kind: Kind, picture: Any, budget: int, config: Gemma4Config, before: str = "") -> Run:
    unified = isinstance(config.vision_config, UnifiedVisionConfig)
    made = (image.merged_patches if unified else image.patches)(picture, budget)
    return Run(kind, made.soft_tokens, made.values, made.positions, before=before)


def _audio(part: Mapping[str, Any], config: Gemma4Config, budget: int | str | None) -> list[Run]:
    require(config.audio_config, "sound")
    from gemsmith.media import audio

    source = _source(part, "audio")
    if isinstance(source, Mapping):
        source = f"data:audio/{source.get('format', 'wav')};base64,{source.get('data', '')}"
    samples = audio.load_audio(source, sample_rate=part.get("sample_rate"))
    seconds = len(samples) / audio.SAMPLE_RATE
    if isinstance(config.audio_config, AudioConfig) and seconds > MAX_CLIP_SECONDS:
        raise MediaError(
            f"the recording is {seconds:.1f} s long and this model hears {MAX_CLIP_SECONDS} s at a "
            "time; nothing is cut off unasked: give it in pieces, or use `transcribe`"
        )
    return [_heard(samples, config)]


def _heard(samples: np.ndarray, config: Gemma4Config) -> Run:
    from gemsmith.media import audio

    if isinstance(config.audio_config, AudioConfig):
        features, valid = audio.mel(samples)
        return Run("audio", audio.soft_tokens(len(samples)), features, valid)
    framed = audio.frames(samples)
    return Run("audio", len(framed), framed, np.ones(len(framed), bool))


def _video(part: Mapping[str, Any], config: Gemma4Config, budget: int | str | None) -> list[Run]:
    require(config.vision_config, "video")
    from gemsmith.media import video
    from gemsmith.media.transcript import split_windows

    options = {name: part[name] for name in ("frames", "fps", "tokens", "budget") if name in part}
    hears = config.audio_config is not None
    film = video.load_video(_source(part, "video"), sound=hears, **options)
    runs = [
        _seen("video", frame, film.budget, config, before=f"{' ' * bool(i)}{stamp} ")
        for i, (stamp, frame) in enumerate(zip(film.stamps, film.frames, strict=True))
    ]
    problems = list(film.problems)
    if hears and film.audio is not None and len(film.audio):
        # In pauses where there are any: a word is in one clip or the other.
        windows = split_windows(film.audio, max_seconds=MAX_CLIP_SECONDS, overlap_seconds=0)
        try:
            runs += [_heard(film.audio[start:stop], config) for start, stop in windows]
        except MediaError as error:  # too short; the frames can be seen all the same
            problems.append(f"no sound: {error}")
    runs[0] = replace(runs[0], notes=tuple(problems))
    return runs


def _source(part: Mapping[str, Any], key: str) -> Any:
    for name in (key, part.get("type"), "url", "path"):
        if isinstance(name, str) and part.get(name) is not None:
            return part[name]
    raise MediaError(
        f"a part of type {part.get('type')!r} needs {key!r}: a path, bytes or data URL"
    )


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(kinds) or "none"


_READERS: dict[str, Callable[[Mapping[str, Any], Gemma4Config, int | str | None], list[Run]]] = {
    "image": _image,
    "image_url": _image,
    "audio": _audio,
    "input_audio": _audio,
    "video": _video,
}
