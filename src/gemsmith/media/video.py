"""Video: a few frames of it with their times, and its sound.

What becomes of the frames is in image.py, of the sound in audio.py. Nothing is fetched from the
network.

A file is read up to three times: once without decoding, to number its frames (`survey`), which is
enough to say what they will cost (`plan`); once to decode the frames that were chosen, and of the
others only those that they are predicted from; once for the sound.

Legend: a packet is a compressed frame, in the order of decoding; a key packet needs no other; pts
is when a packet is shown, in ticks of the stream. Frames are numbered as they are shown, from 0.

Source: transformers 5.23, Gemma4VideoProcessor and Gemma4Processor. Different from it: fewer frames
than asked for is no error, and there is sound.
"""

import bisect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image

from gemsmith.errors import MediaError
from gemsmith.media.audio import (
    MAX_HOURS,
    MAX_PIXELS,
    SAMPLE_RATE,
    decode,
    is_number,
    opened,
    reason,
    soft_tokens,
)
from gemsmith.media.image import FORMATS, check_budget, load_image, target_size
from gemsmith.media.source import locate, reader

DEFAULT_FRAMES = 32
DEFAULT_BUDGET = 70
"""Soft tokens of a frame at most, as of an image: see image.BUDGETS."""
DEFAULT_FPS = 24
"""Where a file does not say."""
MAX_PACKETS = 2_000_000
"""Of a file: 4 hours at 120 frames a second are 1.7 million. Their times take 80 MB."""
TOKEN_BYTES = 48 * 48 * 3 * 4
"""Of the patches of a soft token, float32: see `image.Patches`."""
MAX_MEMORY = 3 * 2**30
"""Bytes of the frames chosen, as RGB, and of their patches: 394 of 1920 x 1080 at 70 soft tokens,
1,663 of 16 x 16."""
MAX_DECODED = 250_000_000_000
"""Pixels of the frames that are decoded, those that others are predicted from too: an hour of
1920 x 1080 at 30 a second whose only key packet is the first. Minutes of work."""
MAX_ANIMATED = 30_000_000_000
"""Pixels of all frames of an animation: Pillow decodes each of them, and slower."""
ANIMATIONS = [each for each in FORMATS if each in ("WEBP", "AVIF", "PNG")]
"""Formats of which FFmpeg decodes one frame or none."""
TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
"""Degrees counterclockwise by which a telephone says that a frame must be turned."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a video will cost, in soft tokens; times and markers between the frames not counted."""

    frames: int
    frame_tokens: int
    audio_tokens: int
    """Of the length that the header gives; codecs add or take a few milliseconds."""

    @property
    def total(self) -> int:
        return self.frames * self.frame_tokens + self.audio_tokens

    def __str__(self) -> str:
        sound = f" + {self.audio_tokens} audio tokens" if self.audio_tokens else ""
        return f"{self.frames} frames x {self.frame_tokens} tokens{sound} = {self.total} tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Frames of a video, in order, and its sound."""

    frames: list[Image.Image]
    """RGB, upright, in their own size."""
    seconds: list[float]
    """When each is shown: its number by the average frame rate, as in the reference."""
    budget: int
    """Soft tokens of each frame, at most."""
    audio: np.ndarray | None
    """float32 [n], mono, 16 kHz; None without sound, or where it was not asked for."""
    plan: Plan
    problems: list[str]
    """What was lost because the file is damaged or cut short; empty if nothing was."""

    @property
    def stamps(self) -> list[str]:
        """When each frame is shown, as mm:ss."""
        return [f"{int(second) // 60:02d}:{int(second) % 60:02d}" for second in self.seconds]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """What is known of a video before it is decoded."""

    found: bytes | Path
    """The file."""
    name: str
    """What errors call it."""
    width: int
    height: int
    total: int
    """Frames."""
    fps: float
    audio_seconds: float | None
    problems: list[str]
    pts: list[int | None]
    """Of each packet."""
    keys: list[int]
    """Numbers of the key packets."""
    trusted: bool
    """Whether pts tell which frame is which."""
    by_pillow: bool = False


Source = str | os.PathLike[str] | bytes | Survey


def load_video(
    source: Source,
    *,
    frames: int | None = None,
    fps: float | None = None,
    tokens: int | None = None,
    budget: int = DEFAULT_BUDGET,
    sound: bool = True,
) -> Video:
    """Some frames of a video, evenly spaced from the first on, and its sound.

    source: a path; the bytes of a file; a `data:` URL with base64; or the `survey` of one of them.
      Animations (GIF, PNG, WebP, AVIF) are videos too, and an image is a video of one frame.
    frames, fps, tokens: how many frames; or how many for each second; or as many as cost no more
      than so many soft tokens, the sound's included. At most one of them; 32 frames otherwise. If
      there are fewer frames than that, each comes once.
    budget: soft tokens of each frame, at most.
    sound: whether to decode it; for models that do not hear.

    Raises:
      MediaError: no video in it, no frame that can be decoded, too large, too long, too many frames
        for MAX_MEMORY, a budget too small for one frame; and as `audio.load_audio` for the source.
    """
    reel = survey(source)
    planned = plan(reel, frames=frames, fps=fps, tokens=tokens, budget=budget, sound=sound)
    wanted = _spread(reel.total, planned.frames)
    problems = list(reel.problems)
    decoded = _decoded(reel, wanted, budget, problems)
    heard = None
    if sound and reel.audio_seconds is not None:
        heard = _heard(reel, problems)
    if not decoded:
        raise MediaError(
            f"{reel.name}: none of {len(wanted)} frames can be decoded ({'; '.join(problems)}); "
            "send the original"
        )
    if len(decoded) < len(wanted):
        problems.append(f"{len(wanted) - len(decoded)} of {len(wanted)} frames cannot be decoded")
    return Video(
        frames=[decoded[number] for number in sorted(decoded)],
        seconds=[number / reel.fps for number in sorted(decoded)],
        budget=budget,
        audio=heard,
        plan=planned,
        problems=problems,
    )


def survey(source: Source) -> Survey:
    """Numbers the frames without decoding them (but for ANIMATIONS); raises as `load_video`."""
    if isinstance(source, Survey):
        return source
    found, name = locate(source, "video")
    animation = _animation(found, name)
    if animation is not None:
        return animation
    with opened(found, name) as container:
        stream = _stream(container, name)
        width, height = stream.codec_context.width, stream.codec_context.height
        _check_size(width, height, name)
        pts: list[int | None] = []
        keys: list[int] = []
        problems: list[str] = []
        try:
            for packet in container.demux(stream):
                if not packet.size:  # the end
                    continue
                if packet.is_keyframe:
                    keys.append(len(pts))
                pts.append(None if packet.is_discard else packet.pts)
                if len(pts) > MAX_PACKETS:
                    raise MediaError(
                        f"{name} has more than the {MAX_PACKETS:,} frames that are read; cut it "
                        "in parts"
                    )
        except av.error.FFmpegError as error:
            problems.append(f"the file ends after {len(pts)} frames ({reason(error)})")
        if not pts:
            raise MediaError(f"{name} has no frames; was it saved or sent whole?")
        if stream.frames > len(pts):
            problems.append(f"the header promises {stream.frames} frames and {len(pts)} are there")
        shown = [each for each in pts if each is not None]
        # An AVI has no times: FFmpeg counts its packets in the order of decoding.
        trusted = bool(shown) and len(set(shown)) == len(shown) and container.format.name != "avi"
        trusted = trusted and bool(keys) and keys[0] == 0
        fps = float(stream.average_rate or 0) or DEFAULT_FPS
        total = len(shown) if trusted else len(pts)
        _check_length(total / fps, name)
        return Survey(
            found=found,
            name=name,
            width=width,
            height=height,
            total=total,
            fps=fps,
            audio_seconds=_audio_seconds(container, total / fps),
            problems=problems,
            pts=pts,
            keys=keys,
            trusted=trusted,
        )


def plan(
    source: Source,
    *,
    frames: int | None = None,
    fps: float | None = None,
    tokens: int | None = None,
    budget: int = DEFAULT_BUDGET,
    sound: bool = True,
) -> Plan:
    """What `load_video` would take, found without decoding; arguments and errors are the same."""
    reel = survey(source)
    given = {"frames": frames, "fps": fps, "tokens": tokens}
    asked = {key: value for key, value in given.items() if value is not None}
    if len(asked) > 1:
        raise MediaError(f"{' and '.join(asked)}: give one of frames, fps and tokens")
    for key, value in asked.items():
        known = is_number(value) and 0 < value < math.inf
        if not (known and (key == "fps" or value == int(value))):
            number = "number" if key == "fps" else "whole number"
            raise MediaError(f"{key}={value!r}: give a {number} over 0")
    check_budget(budget)
    width, height = target_size(reel.width, reel.height, budget)
    frame_tokens = width * height // 48**2
    heard = sound and reel.audio_seconds is not None
    audio_tokens = soft_tokens(round((reel.audio_seconds or 0) * SAMPLE_RATE)) if heard else 0
    if tokens is not None:
        count = (int(tokens) - audio_tokens) // frame_tokens
        if count < 1:
            raise MediaError(
                f"{tokens} tokens are too few for {reel.name}: a frame costs {frame_tokens} and "
                f"the sound {audio_tokens}; raise it, lower the budget of a frame (now {budget}), "
                "or leave the sound out"
            )
    elif fps is not None:
        count = reel.total if fps >= reel.fps else max(1, int(reel.total / reel.fps * fps))
    else:
        count = DEFAULT_FRAMES if frames is None else int(frames)
    count = min(count, reel.total)
    _check_memory(count, reel.width, reel.height, budget)
    runs, _ = _runs(reel, _spread(reel.total, count))
    packets = sum(last - first + 1 for first, last in runs)
    _check_work(packets * reel.width * reel.height, MAX_DECODED, reel.name)
    return Plan(count, frame_tokens, audio_tokens)


def _spread(total: int, count: int) -> list[int]:
    """Numbers of `count` frames of `total`, evenly spaced from the first on."""
    return [k * total // count for k in range(count)]


def _decoded(
    reel: Survey, wanted: list[int], budget: int, problems: list[str]
) -> dict[int, Image.Image]:
    """The frames of these numbers, as far as they can be decoded."""
    if reel.by_pillow:
        return _from_animation(reel, wanted, problems)
    made: dict[int, Image.Image] = {}
    pixels = 0
    runs, number_of = _runs(reel, wanted)
    needed = set(number_of) if reel.trusted else None
    with opened(reel.found, reel.name) as container:
        stream = _stream(container, reel.name)
        stream.thread_type = "AUTO"  # pyright: ignore[reportAttributeAccessIssue]
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        try:
            for order, frame in enumerate(_frames(container, stream, runs, needed, problems)):
                # Frames may be larger than the header says.
                pixels += frame.width * frame.height
                _check_work(pixels, MAX_DECODED, reel.name)
                number = number_of.get(frame.pts if reel.trusted else order)
                if number is not None and number not in made:
                    _check_memory(len(wanted), frame.width, frame.height, budget)
                    made[number] = _upright(frame, reel.name)
                    if len(made) == len(wanted):
                        break
        except av.error.FFmpegError as error:
            problems.append(f"the file ends early ({reason(error)})")
    return made


def _runs(reel: Survey, wanted: list[int]) -> tuple[list[tuple[int, int]], dict[int | None, int]]:
    """Stretches of packets to decode, first and last, and the number of a frame by its pts.

    A frame needs what stands from the last key packet that is shown no later than it up to itself;
    key packets shown after it may come before it in the file. Where pts cannot be trusted all is
    decoded, and frames go by the order in which they come out.
    """
    if not reel.trusted:
        return [(0, len(reel.pts) - 1)], {number: number for number in wanted}
    place = {pts: packet for packet, pts in enumerate(reel.pts) if pts is not None}
    shown = sorted(place)
    runs: list[tuple[int, int]] = []
    for number in wanted:
        pts = shown[number]
        last = place[pts]
        key = bisect.bisect_right(reel.keys, last) - 1
        while key > 0 and (reel.pts[reel.keys[key]] or 0) > pts:
            key -= 1
        first = reel.keys[key]
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
        else:
            runs.append((first, last))
    return runs, {shown[number]: number for number in wanted}


def _frames(
    container: InputContainer,
    stream: VideoStream,
    runs: list[tuple[int, int]],
    needed: set[int | None] | None,
    problems: list[str],
) -> Iterator[VideoFrame]:
    """Frames of the packets in the runs, in the order of showing.

    needed: pts of those that are wanted. Of the others the decoder leaves out what no frame is
    predicted from: with the B frames of common encoders, half of the work. None: all are wanted.
    """
    damaged = 0
    packets = enumerate(packet for packet in container.demux(stream) if packet.size)
    for first, last in runs:
        for order, packet in packets:
            if order >= first:
                skip = needed is not None and packet.pts not in needed
                stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
                try:
                    yield from stream.decode(packet)
                except av.error.FFmpegError:
                    damaged += 1
            if order == last:
                break
        yield from stream.decode(None)  # those that it still held back
        stream.codec_context.flush_buffers()
    if damaged:
        problems.append(f"{damaged} packets are damaged")


def _upright(frame: VideoFrame, name: str) -> Image.Image:
    _check_size(frame.width, frame.height, name)
    image = frame.to_image()
    turn = TURNS.get(round(frame.rotation / 90) * 90 % 360)
    return image if turn is None else image.transpose(turn)


def _heard(reel: Survey, problems: list[str]) -> np.ndarray | None:
    try:
        with opened(reel.found, reel.name) as container:
            samples, problem = decode(container, reel.name)
    except MediaError as error:
        problems.append(f"no sound: {error}")
        return None
    if problem:
        problems.append(problem)
    return samples


def _stream(container: InputContainer, name: str) -> VideoStream:
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        kinds = ", ".join(each.type for each in container.streams) or "nothing"
        raise MediaError(f"{name} has no video that FFmpeg can decode; it holds {kinds}")
    return stream  # pyright: ignore[reportReturnType]


def _audio_seconds(container: InputContainer, otherwise: float) -> float | None:
    stream = container.streams.best("audio")
    if stream is None:
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration else otherwise


def _animation(found: bytes | Path, name: str) -> Survey | None:
    """What is known of a file of ANIMATIONS; None for anything else."""
    with reader(found, name) as file:
        head = file.read(16)
    if not (
        head[8:12] == b"WEBP"
        or ("AVIF" in ANIMATIONS and head[4:12] in (b"ftypavis", b"ftypavif"))
        or head[:8] == b"\x89PNG\r\n\x1a\n"
    ):
        return None
    with _by_pillow(found, name) as image:
        _check_size(image.width, image.height, name)
        total = getattr(image, "n_frames", 1)
        _check_work(total * image.width * image.height, MAX_ANIMATED, name)
        image.load()
        milliseconds = _milliseconds(image, total) if total > 1 else 0
        fps = 1000 / milliseconds if milliseconds > 0 else DEFAULT_FPS
        _check_length(total / fps, name)
        return Survey(
            found=found,
            name=name,
            width=image.width,
            height=image.height,
            total=total,
            fps=fps,
            audio_seconds=None,
            problems=[],
            pts=[],
            keys=[],
            trusted=False,
            by_pillow=True,
        )


def _milliseconds(image: Image.Image, total: int) -> float:
    """How long a frame is shown, on average over those that can be decoded.

    Pillow knows a frame's time only when it has decoded it.
    """
    times: list[float] = []
    with suppress(Exception):  # of damaged frames; those that are asked for are named later
        for number in range(total):
            image.seek(number)
            image.load()
            times.append(image.info.get("duration") or 0)
    return sum(times) / max(len(times), 1)


def _from_animation(reel: Survey, wanted: list[int], problems: list[str]) -> dict[int, Image.Image]:
    made: dict[int, Image.Image] = {}
    with _by_pillow(reel.found, reel.name) as image:
        for number in wanted:
            try:
                image.seek(number)
                made[number] = load_image(image.copy())
            except Exception as error:
                problems.append(f"frame {number} is damaged ({reason(error)})")
                break
    return made


@contextmanager
def _by_pillow(found: bytes | Path, name: str) -> Iterator[Image.Image]:
    try:
        with reader(found, name) as file, Image.open(file, formats=ANIMATIONS) as image:
            yield image
    except MediaError:
        raise
    except Exception as error:  # Pillow raises all kinds of errors for damaged files
        raise MediaError(
            f"{name} is a damaged animation ({reason(error)}); send the original"
        ) from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} has frames of {width} x {height}, more than the {MAX_PIXELS:,} pixels that "
            "are read; scale it down"
        )
    if not width * height:
        # FFmpeg gives no size where it is over MAX_PIXELS.
        raise MediaError(
            f"{name} has frames without a size, or of more than the {MAX_PIXELS:,} pixels that are "
            "read; scale it down"
        )


def _check_memory(count: int, width: int, height: int, budget: int) -> None:
    size = width * height * 3 + budget * TOKEN_BYTES
    if count * size > MAX_MEMORY:
        raise MediaError(
            f"{count} frames of {width} x {height} at {budget} soft tokens need "
            f"{count * size / 2**30:.1f} GiB with their patches and {MAX_MEMORY / 2**30:g} may be "
            f"used; ask for {MAX_MEMORY // size} frames at most, lower their budget, or scale the "
            "video down"
        )


def _check_work(pixels: int, limit: int, name: str) -> None:
    if pixels > limit:
        raise MediaError(
            f"{name}: {pixels / 1e9:,.0f} billion pixels would have to be decoded and "
            f"{limit / 1e9:g} may be; cut it in parts, scale it down, or write it with more key "
            "frames"
        )


def _check_length(seconds: float, name: str) -> None:
    if seconds > MAX_HOURS * 3600:
        raise MediaError(
            f"{name} is {seconds / 3600:.1f} hours long and {MAX_HOURS} are read; cut it in parts"
        )
