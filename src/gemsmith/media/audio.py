"""Sound: from a file, bytes, a data URL or an array to what an audio tower takes.

The towers are in model/audio.py and model/unified.py; transcript.py cuts recordings that are longer
than the 30 s that a tower hears. Nothing is fetched from the network.

A sound is decoded whole, mixed to one channel, brought to 16 kHz and kept as floats, in which 1 is
full scale. The tower of E2B and E4B gets a log-mel spectrum (`mel`), of which 4 frames of 10 ms
become a soft token; the 12B gets the samples themselves (`frames`), 640 to a soft token.

Source: transformers 5.23, models gemma4 and gemma4_unified. Different from it: channels are mixed
here whatever the file's type, and nothing is cut off at 30 s.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import NoReturn, TypeGuard

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import InputContainer

from gemsmith.errors import MediaError
from gemsmith.media.source import locate, reader, short

SAMPLE_RATE = 16_000
"""Samples in a second, of everything that leaves `load_audio`."""
MAX_HOURS = 4
"""Of a recording: a long meeting. 16 kHz in float32 are 220 MiB an hour."""
MIN_RATE, MAX_RATE = 4_000, 768_000
"""Of a source, samples in a second: telephones send 8,000, studios record up to 768,000."""
MAX_CHANNELS = 64
"""Of a source: surround sound has up to 24, a mixing desk 64."""
MAX_PEAK = 16.0
"""Floats may pass full scale, which is 1, but not by 24 dB: those are integers in disguise."""
MAX_PIXELS = 2**26
"""Of a frame of video, 8192 x 8192; FFmpeg looks into the first frames when it opens a file."""

KNOWN_LENGTH = {"wav", "w64", "aiff", "flac", "mov,mp4,m4a,3gp,3g2,mj2"}
"""FFmpeg's names of formats whose header says how long the sound is; of others it is estimated."""
MAX_LOST = 0.05
"""Of the length that a header promises: more is an error. Codecs add or take a few milliseconds."""

N_FFT, HOP, WINDOW = 512, 160, 320
"""Samples: of the transform, from one mel frame to the next, of a frame (10 ms and 20 ms)."""
N_MELS = 128
LOG_FLOOR = 1e-3
FRAME = 640
"""Samples that the 12B takes as one soft token, 40 ms."""

Source = str | os.PathLike[str] | bytes | np.ndarray


def load_audio(source: Source, *, sample_rate: int | None = None) -> np.ndarray:
    """The sound as float32 [n], mono, 16 kHz, full scale 1; never cut off.

    source: a path; the bytes of a file; a `data:` URL with base64; or an array [n], [n, channels]
      or [channels, n] with its sample_rate, where the shorter axis is that of the channels.
      Integers of 8, 16 or 32 bits are scaled by their full scale; floats are taken as they are.

    Files are whatever FFmpeg decodes; of a video it is the sound. Of several tracks the one that
    FFmpeg holds for the best is taken; its channels are averaged with equal weight. A file that was
    cut short is refused where its header tells (see KNOWN_LENGTH); an MP3 may not.

    Raises:
      MediaError: no sound in it, damaged, not finite, of a rate, length or range over the limits
        above; an http address; an array without its rate or of another shape or type.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, sample_rate)
    if sample_rate is not None:
        raise MediaError(
            f"sample_rate={sample_rate} is for arrays; a file says its own rate: leave it away"
        )
    found, name = locate(source, "sound")
    with opened(found, name) as container:
        samples, problem = decode(container, name)
    if problem:
        raise MediaError(f"{name}: {problem}; send the original, or convert it to WAV")
    return samples


def mel(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-mel spectrum of one clip: float32 [frames, 128], and which frames are valid, bool.

    Natural logarithm of the magnitude (not power) spectrum in 128 HTK bands from 0 to 8000 Hz; the
    first band is narrower than the transform resolves and stays at log(1e-3). Frame i begins 160
    samples before sample 160 * i, so the clip is preceded by 10 ms of silence.

    All frames are valid. The reference pads clips to a multiple of 128 samples, which may add one
    frame that sees padding and is masked; the valid rows are these, and so are the soft tokens.

    Raises:
      MediaError: fewer than 161 samples (10 ms), which make no frame.
    """
    count = _mel_frames(len(samples))
    if count < 1:
        raise MediaError(
            f"a sound of {len(samples)} samples is too short to hear: at 16 kHz, "
            f"{WINDOW + 1 - HOP} (10 ms) make the first frame"
        )
    padded = np.zeros(HOP + len(samples), dtype=np.float32)
    padded[HOP:] = samples
    framed = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:count]
    spectrum = np.fft.rfft(framed * _HANN, n=N_FFT)
    bands = np.abs(spectrum).astype(np.float32, copy=False) @ _BANDS
    return np.log(bands + np.float32(LOG_FLOOR)), np.ones(count, dtype=bool)


def soft_tokens(n_samples: int) -> int:
    """Soft tokens that the tower of E2B and E4B makes of a clip of so many samples, 25 a second.

    Two convolutions of stride 2 follow the mel frames. 750 at 30 s, where the reference cuts off;
    here longer clips cost more, and what a tower hears at a time is its caller's business.
    """
    return -(-max(_mel_frames(n_samples), 0) // 4)


def frames(samples: np.ndarray) -> np.ndarray:
    """float32 [ceil(n / 640), 640] for the 12B, a row for each soft token; zeros fill the last."""
    count = -(-len(samples) // FRAME)
    framed = np.zeros(count * FRAME, dtype=np.float32)
    framed[: len(samples)] = samples
    return framed.reshape(count, FRAME)


@contextmanager
def opened(found: bytes | Path, name: str) -> Iterator[InputContainer]:
    """The container of a media file. What FFmpeg raises of it in the block becomes a MediaError."""
    try:
        with (
            # Never a name: FFmpeg would take it for a protocol, a device or a list of files.
            reader(found, name) as file,
            av.open(
                file,
                "r",
                options={"max_pixels": str(MAX_PIXELS), "protocol_whitelist": "none"},
                metadata_errors="replace",
                io_open=_refuse,
            ) as container,
        ):
            yield container
    except MediaError as error:
        raise error from None
    # FFmpeg's own errors are of many kinds, some of them ValueError, OSError and so on.
    except (av.error.FFmpegError, ValueError, OSError, RuntimeError, EOFError) as error:
        raise MediaError(
            f"{name} cannot be decoded ({reason(error)}): damaged, cut short, or no sound or video"
        ) from error


def decode(container: InputContainer, name: str) -> tuple[np.ndarray, str]:
    """The best sound track as float32 [n], mono, 16 kHz; and what went wrong on the way, or "".

    Raises:
      MediaError: no sound track, no samples, or samples over the limits of this module.
    """
    stream = container.streams.best("audio")
    if stream is None or stream.codec_context is None:
        kinds = ", ".join(each.type for each in container.streams) or "nothing"
        raise MediaError(f"{name} has no sound that FFmpeg can decode; it holds {kinds}")
    made, problem = _Mono(name), ""
    try:
        for frame in container.decode(stream):
            made.add(frame)  # pyright: ignore[reportArgumentType]
    except MediaError:
        raise
    except (av.error.FFmpegError, ValueError, OSError, RuntimeError, EOFError) as error:
        problem = f"the sound is damaged after {made.seconds:.1f} s ({reason(error)})"
    samples = made.finish()
    promised = float((stream.duration or 0) * (stream.time_base or 0))
    if container.format.name == "wav":
        promised = _wav_seconds(container, promised)
    lacks = made.seconds < promised * (1 - MAX_LOST) - 0.1
    if not problem and lacks and container.format.name in KNOWN_LENGTH:
        problem = f"the sound is cut short or damaged: {made.seconds:.1f} of {promised:.1f} s"
    if not len(samples):
        raise MediaError(f"{name}: {problem or 'the sound track has no samples'}")
    return _checked(samples, name), problem


def reason(error: Exception) -> str:
    """FFmpeg's words for what it raised, without numbers and file names."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, of Python or NumPy; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


class _Mono:
    """Collects sound as it comes, in any format, as 16 kHz mono."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples = bytearray()  # grows in place; float32
        self.setup: tuple[str, str, int] | None = None
        self.resampler: AudioResampler | None = None

    @property
    def seconds(self) -> float:
        return len(self.samples) / 4 / SAMPLE_RATE

    def add(self, frame: AudioFrame) -> None:
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self.setup:  # at the beginning, and where a stream changes its mind
            self._flush()
            _check_rate(frame.sample_rate, self.name)
            channels = frame.layout.nb_channels
            if channels > MAX_CHANNELS:
                raise MediaError(
                    f"{self.name} has {channels} channels; at most {MAX_CHANNELS} are mixed"
                )
            # "flt": interleaved, for PyAV 18 reads amiss where planar sound has over 8 channels.
            # Channels are mixed after it: libswresample scales a sum of floats other than one of
            # integers, so that an MP3 would be 3 dB louder than the WAV it was made from.
            self.setup, self.resampler = setup, AudioResampler(format="flt", rate=SAMPLE_RATE)
        assert self.resampler is not None, "set with the setup"
        self._keep(self.resampler.resample(frame))

    def finish(self) -> np.ndarray:
        self._flush()
        return np.frombuffer(self.samples, dtype=np.float32)

    def _flush(self) -> None:
        if self.resampler is not None:
            self._keep(self.resampler.resample(None))

    def _keep(self, resampled: list[AudioFrame]) -> None:
        for frame in resampled:
            if frame is not None:  # what it gives at the end where there was nothing to convert
                channels = frame.layout.nb_channels
                weights = np.full(channels, 1 / channels, dtype=np.float32)
                with np.errstate(invalid="ignore"):  # infinite: `_checked` refuses it
                    mixed = frame.to_ndarray().reshape(-1, channels) @ weights
                self.samples += mixed.data
        if self.seconds > MAX_HOURS * 3600:
            raise MediaError(
                f"{self.name} is longer than the {MAX_HOURS} hours that are read; cut it in parts"
            )


def _from_array(array: np.ndarray, sample_rate: int | None) -> np.ndarray:
    if sample_rate is None:
        raise MediaError("an array of samples needs its sample_rate, such as sample_rate=16000")
    _check_rate(sample_rate, "the array")
    mono = _mono(array)
    if len(mono) > MAX_HOURS * 3600 * sample_rate:
        raise MediaError(
            f"the array is {len(mono) / sample_rate / 3600:.1f} hours long and {MAX_HOURS} are "
            "read; cut it in parts"
        )
    _checked(mono, "the array")
    if sample_rate == SAMPLE_RATE:
        return mono
    made = _Mono("the array")
    for start in range(0, len(mono), 2**16):
        part = np.ascontiguousarray(mono[None, start : start + 2**16])
        frame = AudioFrame.from_ndarray(part, format="fltp", layout="mono")
        frame.sample_rate = int(sample_rate)
        made.add(frame)
    return made.finish()


def _mono(array: np.ndarray) -> np.ndarray:
    """float32 [n] of full scale 1."""
    if array.ndim not in (1, 2) or array.size == 0:
        raise MediaError(
            f"an array of shape {array.shape} is no sound: [n], [n, channels] or [channels, n] is, "
            "with at least one sample"
        )
    kind, bits = array.dtype.kind, array.dtype.itemsize * 8
    if not (kind == "f" or (kind == "i" and bits <= 32) or array.dtype == np.uint8):
        raise MediaError(
            f"an array of {array.dtype} has no full scale of its own: give floats in -1..1, or "
            "int16 as most files hold"
        )
    if array.ndim == 2:
        rows, columns = array.shape
        if rows == columns > 1 or min(rows, columns) > MAX_CHANNELS:
            raise MediaError(
                f"in an array of shape {array.shape} samples and channels cannot be told apart: "
                f"the shorter axis is that of the channels, {MAX_CHANNELS} at most"
            )
        with np.errstate(invalid="ignore"):  # infinite: `_checked` refuses it
            mono = array.mean(axis=0 if rows < columns else 1, dtype=np.float64)
    else:
        mono = array
    mono = mono.astype(np.float32)
    if kind == "u":
        return (mono - 128) / 128
    return mono / np.float32(2.0 ** (bits - 1)) if kind == "i" else mono


def _checked(samples: np.ndarray, name: str) -> np.ndarray:
    low, high = float(samples.min()), float(samples.max())
    if not np.isfinite([low, high]).all():
        raise MediaError(f"{name} has samples that are infinite or not a number")
    if max(-low, high) > MAX_PEAK:
        raise MediaError(
            f"{name} has floats from {low:g} to {high:g} where full scale is 1; divide them by "
            "their full scale, such as 32768, or give integers as int16"
        )
    return samples


def _check_rate(rate: object, name: str) -> None:
    if not (is_number(rate) and MIN_RATE <= rate <= MAX_RATE and rate == int(rate)):
        raise MediaError(
            f"{name} has {rate!r} samples a second; whole numbers from {MIN_RATE:,} to "
            f"{MAX_RATE:,} are read"
        )


def _wav_seconds(container: InputContainer, found: float) -> float:
    """Length that the header promises; FFmpeg says that of what it found."""
    file = container.file.file
    file.seek(0)
    promised = int.from_bytes(file.read(8)[4:], "little") + 8
    # Recorders that write to a pipe put the largest number there.
    return found * promised / container.size if promised < 2**31 and container.size else found


def _mel_frames(n_samples: int) -> int:
    # The reference cuts windows of one sample more than it uses.
    return (n_samples + HOP - (WINDOW + 1)) // HOP + 1


def _mel_bands() -> np.ndarray:
    """float32 [257, 128]: triangles on the frequencies of the transform, equal in height."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, N_MELS + 2) / 2595) - 1)
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)[:, None]
    width = np.diff(edges)
    rising = (bins - edges[:-2]) / width[:-1]
    falling = (edges[2:] - bins) / width[1:]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


_BANDS = _mel_bands()
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


def _refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    """For playlists: a file that a stranger sent must not make us open others."""
    raise MediaError(
        f"it is a list that names other files ({short(url)}), which are not opened; give one file"
    )
