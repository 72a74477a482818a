"""Sound files and arrays to 16 kHz, and the inputs of the audio towers."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from tests.media.damage import damaged

from gemsmith.errors import MediaError
from gemsmith.media import audio
from gemsmith.media.audio import frames, load_audio, mel, soft_tokens

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "audio_vectors.json").read_text("utf-8"))
THIRTY_SECONDS = 480_000


def tone(rate: int = 16_000, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype("f4")


def encoded(
    samples: np.ndarray,
    rate: int = 16_000,
    *,
    format: str = "wav",
    codec: str = "pcm_s16le",
    layout: str = "mono",
) -> bytes:
    """A file of [n] or [channels, n]."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)  # pyright: ignore
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(np.atleast_2d(samples), dtype=np.float32), "fltp", layout
        )
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        load_audio(source, **options)
    return str(caught.value)


# Reading


@pytest.mark.parametrize(
    ("format", "codec", "rate", "tolerance"),
    [
        ("wav", "pcm_s16le", 16_000, 5e-5),
        ("wav", "pcm_s16le", 44_100, 5e-5),
        ("wav", "pcm_f32le", 8_000, 5e-4),
        ("wav", "pcm_u8", 48_000, 8e-3),
        ("wav", "pcm_s24le", 96_000, 5e-5),
        ("wav", "pcm_mulaw", 8_000, 2e-2),
        ("flac", "flac", 22_050, 5e-5),
        ("aiff", "pcm_s16be", 44_100, 5e-5),
        ("matroska", "pcm_s16le", 48_000, 5e-5),
        ("ogg", "libopus", 48_000, 2e-2),
        ("mp3", "libmp3lame", 44_100, 4e-2),
    ],
)
def test_a_file_is_heard_at_16_khz(format: str, codec: str, rate: int, tolerance: float):
    samples = load_audio(encoded(tone(rate), rate, format=format, codec=codec))
    assert samples.dtype == np.float32
    assert abs(len(samples) - 16_000) <= 1
    inside = slice(1000, 15_000)  # filters and codecs ring at the ends
    np.testing.assert_allclose(samples[inside], tone()[inside], atol=tolerance)


@pytest.mark.parametrize(("rate", "hertz"), [(44_100, 1000), (8_000, 440), (48_000, 100)])
def test_an_array_is_brought_to_16_khz(rate: int, hertz: float):
    made = load_audio(tone(rate, 10, hertz), sample_rate=rate)
    assert abs(len(made) - 160_000) <= 1
    inside = slice(1000, 159_000)
    np.testing.assert_allclose(made[inside], tone(16_000, 10, hertz)[inside], atol=5e-4)


def test_frequencies_over_8_khz_do_not_fold_back():
    above = load_audio(tone(48_000, hertz=11_000), sample_rate=48_000)
    assert np.abs(above[1000:-1000]).max() < 1e-3


@pytest.mark.parametrize(("layout", "channels"), [("stereo", 2), ("5.1", 6)])
@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le"])
def test_channels_are_averaged_whatever_the_sample_type(layout: str, channels: int, codec: str):
    quiet_but_one = np.zeros((channels, 16_000), np.float32)
    quiet_but_one[-1] = 0.6
    samples = load_audio(encoded(quiet_but_one, codec=codec, layout=layout))
    np.testing.assert_allclose(samples, 0.6 / channels, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 9, 64])
def test_any_number_of_channels_up_to_64_is_mixed(channels: int):
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((channels, 2, 22_050, 0, "NONE", ""))
        sound.writeframes(np.full((2205, channels), 8192, "<i2").tobytes())
    samples = load_audio(file.getvalue())
    assert len(samples) == 1600
    np.testing.assert_allclose(samples[200:-200], 0.25, atol=1e-4)


def test_a_path_bytes_and_a_data_url_are_the_same_sound(tmp_path: Path):
    data = encoded(tone())
    path = tmp_path / "tone.mp3"  # the contents decide, not the name
    path.write_bytes(data)
    url = "data:audio/wav;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), url, url.replace("+", "%2B")):
        np.testing.assert_array_equal(load_audio(source), load_audio(data))


def test_the_sound_of_a_video_is_read():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        picture = container.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        sound = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        frame = av.AudioFrame.from_ndarray(tone()[None], "flt", "mono")
        frame.sample_rate = 16_000
        container.mux(sound.encode(frame))
        container.mux(picture.encode(None))
        container.mux(sound.encode(None))
    np.testing.assert_allclose(load_audio(file.getvalue()), tone(), atol=5e-5)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([-32768, 0, 16384], np.int16), [-1, 0, 0.5]),
        (np.array([-(2**31), 2**30], np.int32), [-1, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1, 0, 0.5]),
        (np.array([-128, 64], np.int8), [-1, 0.5]),
        (np.array([-1, 0.25], np.float64), [-1, 0.25]),
        (np.array([[0.5, 0.1, 0.3], [0.1, 0.1, 0.5]]), [0.3, 0.1, 0.4]),
        (np.array([[0.5, 0.1, 0.3], [0.1, 0.1, 0.5]]).T, [0.3, 0.1, 0.4]),
        (np.full((3, 2), 32767, np.int16), [32767 / 32768] * 3),
        (np.array([[0.5]]), [0.5]),
    ],
)
def test_an_array_is_scaled_by_its_type_and_mixed(array: np.ndarray, expected: list[float]):
    made = load_audio(array, sample_rate=16_000)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=1e-7)


def test_an_array_is_not_changed():
    given = np.array([0.5, -0.5], np.float32)
    load_audio(given, sample_rate=16_000)[:] = 0
    assert given.tolist() == [0.5, -0.5]


# Mel and frames


@pytest.mark.parametrize("row", VECTORS["counts"], ids=lambda row: str(row["samples"]))
def test_counts_are_the_reference_s(row: dict[str, Any]):
    n = row["samples"]
    samples = np.full(n, 0.1, np.float32)
    assert frames(samples).shape == tuple(row["unified_shape"][1:])
    if n <= THIRTY_SECONDS:  # beyond, the reference cuts off
        assert soft_tokens(n) == row["soft_tokens"]
        if row["valid_mel_frames"]:
            features, valid = mel(samples)
            assert features.shape == (row["valid_mel_frames"], 128)
            assert valid.all()
            assert len(valid) == len(features)
    else:
        assert soft_tokens(n) == -(-len(mel(samples)[0]) // 4) >= row["soft_tokens"]


def test_the_spectrum_of_a_tone_is_the_reference_s():
    expected = VECTORS["mel"]["sine440"]
    features, _ = mel(tone())
    close = {"atol": 2e-5, "rtol": 0}
    np.testing.assert_allclose(features[0, :8], expected["frame0_bins_0_8"], **close)
    np.testing.assert_allclose(features[10, 20:32], expected["frame10_bins_20_32"], **close)
    assert features[10].argmax() == expected["frame10_argmax"]
    np.testing.assert_allclose(features[10].max(), expected["frame10_max"], **close)
    np.testing.assert_allclose(features[10].mean(), expected["frame10_mean"], **close)
    np.testing.assert_allclose(features[0].mean(), expected["frame0_mean"], **close)
    np.testing.assert_allclose(features.mean(), expected["mean_all_valid"], **close)


def test_silence_is_the_floor_everywhere():
    features, _ = mel(np.zeros(16_000, np.float32))
    np.testing.assert_allclose(features, VECTORS["mel"]["silence_value"], atol=1e-6)


def test_bands_and_window_are_the_reference_s():
    expected, window = VECTORS["mel"]["mel_filter"], VECTORS["mel"]["window"]
    bands = audio._BANDS
    assert list(bands.shape) == expected["shape"]
    assert np.flatnonzero(bands[:, 64]).tolist() == expected["nonzero_bins_filter64"]
    assert np.flatnonzero(~bands.any(axis=0)).tolist() == expected["allzero_filters"]
    for band in (64, 127):
        assert bands[:, band].sum() == pytest.approx(expected[f"sum_filter{band}"], abs=1e-5)
    assert len(audio._HANN) == window["len"]
    np.testing.assert_allclose(audio._HANN[:5], window["first5"], atol=1e-7)
    assert audio._HANN[160] == window["mid"]
    lengths = [VECTORS["mel"][key] for key in ("frame_length", "hop_length", "fft_length")]
    assert lengths == [audio.WINDOW, audio.HOP, audio.N_FFT]


@pytest.mark.parametrize("n", [161, 801, 16_000, 50_001, THIRTY_SECONDS])
def test_mel_equals_transformers(n: int):
    gemma4 = pytest.importorskip("transformers.models.gemma4.feature_extraction_gemma4")
    samples = np.random.default_rng(n).uniform(-1, 1, n).astype(np.float32)
    made = gemma4.Gemma4AudioFeatureExtractor()([samples])  # it fails on a bare 1-D array
    theirs, mask = made["input_features"][0], made["input_features_mask"][0]
    features, _ = mel(samples)
    np.testing.assert_allclose(features, theirs[mask], atol=5e-6, rtol=1e-6)


def test_the_last_frame_of_samples_is_filled_with_zeros():
    samples = np.arange(1, 701, dtype=np.float32)
    made = frames(samples)
    assert made.shape == (2, 640)
    np.testing.assert_array_equal(made.ravel(), [*samples, *[0] * 580])


def test_a_sound_of_less_than_10_ms_makes_no_spectrum():
    with pytest.raises(MediaError, match=r"160 samples is too short to hear: at 16 kHz, 161"):
        mel(np.zeros(160, np.float32))


# Bad input


def test_what_is_no_file_is_refused(tmp_path: Path):
    (tmp_path / "empty.wav").touch()
    os.mkfifo(tmp_path / "pipe")
    assert "nothing is fetched from the network" in error_of("https://example.com/a.mp3")
    assert "nothing is fetched from the network" in error_of("rtmp://example.com/a")
    assert "No such file or directory; give the path of a sound file" in error_of("missing.wav")
    assert "is a folder" in error_of(tmp_path)
    assert "is not a file" in error_of(tmp_path / "pipe")
    assert "is empty: 0 bytes" in error_of(tmp_path / "empty.wav")
    assert "is empty: 0 bytes" in error_of(b"")
    assert "null" in error_of("a\0b").lower()
    assert "must begin like data:audio/wav;base64," in error_of("data:audio/wav,abc")
    assert "base64 of the data URL is damaged" in error_of("data:audio/wav;base64,abc")
    assert "not as list" in error_of([0.0, 0.1])
    assert "leave it away" in error_of(encoded(tone()), sample_rate=16_000)


@pytest.mark.parametrize("data", [b"no sound", b"RIFF", b"\0" * 5000, b"OggS" + b"\xff" * 200])
def test_what_ffmpeg_cannot_read_is_refused(data: bytes):
    assert "the sound bytes cannot be decoded (" in error_of(data)


def test_a_list_of_files_opens_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "secret.wav").write_bytes(encoded(tone()))
    monkeypatch.chdir(tmp_path)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    Path("list.m3u8").write_text(playlist.format("secret.wav"), "utf-8")
    assert "a list that names other files (" in error_of("list.m3u8")
    assert "secret.wav), which are not opened; give one file" in error_of("list.m3u8")
    for name in ("secret.wav", "file:secret.wav", f"{tmp_path}/secret.wav"):
        error_of(f"ffconcat version 1.0\nfile {name}\n".encode())
        error_of(playlist.format(name).encode())


def test_a_file_without_sound_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode(None))
    assert error_of(file.getvalue()).endswith("has no sound that FFmpeg can decode; it holds video")


def test_an_unknown_codec_is_refused():
    data = bytearray(encoded(tone()))
    data[20:22] = b"\x77\x77"
    assert error_of(bytes(data)).endswith("has no sound that FFmpeg can decode; it holds audio")


def test_a_file_without_samples_is_refused():
    data = encoded(tone())
    header = data[: data.index(b"data")] + b"data\0\0\0\0"
    assert "no samples" in error_of(header)


def test_a_damaged_stream_is_refused_and_says_where():
    data = bytearray(encoded(tone(44_100, 3), 44_100, format="mp3", codec="libmp3lame"))
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    found = error_of(bytes(data))
    assert re.search(r"the sound is damaged after 1\.\d s \(", found)
    assert "send the original, or convert it to WAV" in found


@pytest.mark.parametrize(
    ("format", "codec"), [("wav", "pcm_s16le"), ("aiff", "pcm_s16be"), ("flac", "flac")]
)
def test_a_file_that_was_cut_short_is_refused(format: str, codec: str):
    data = encoded(tone(44_100, 3), 44_100, format=format, codec=codec)
    assert re.search(
        r"the sound is (cut short or damaged: \d\.\d of 3\.0 s|damaged after)",
        error_of(data[: len(data) * 2 // 3]),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(bad: float):
    samples = tone()
    samples[500] = bad
    assert "infinite or not a number" in error_of(samples, sample_rate=16_000)
    assert "infinite or not a number" in error_of(encoded(samples, codec="pcm_f32le"))


def test_infinities_of_two_channels_do_not_cancel():
    both = np.stack([tone(), tone()])
    both[:, 500] = np.inf, -np.inf
    assert "infinite or not a number" in error_of(both, sample_rate=16_000)
    file = encoded(both, codec="pcm_f32le", layout="stereo")
    assert "infinite or not a number" in error_of(file)


def test_floats_that_are_integers_in_disguise_are_refused():
    assert "divide them by their full scale" in error_of(tone() * 32768, sample_rate=16_000)


@pytest.mark.parametrize(
    "rate", [0, -1, 100, 10**7, 16_000.5, float("nan"), float("inf"), "16000", [16_000], True]
)
def test_absurd_rates_are_refused(rate: Any):
    found = error_of(tone(), sample_rate=rate)
    assert found.startswith(f"the array has {rate!r} ")
    assert found.endswith("samples a second; whole numbers from 4,000 to 768,000 are read")


def test_a_file_of_an_absurd_rate_is_refused():
    data = bytearray(encoded(tone()))
    data[24:28] = (3).to_bytes(4, "little")
    assert "has 3 samples a second" in error_of(bytes(data))


def test_too_many_channels_are_refused():
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((65, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(65 * 2 * 100))
    assert "has 65 channels; at most 64 are mixed" in error_of(file.getvalue())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2)), "shape (2, 2, 2) is no sound"),
        (np.zeros(0, np.float32), "shape (0,) is no sound"),
        (np.zeros((0, 2)), "shape (0, 2) is no sound"),
        (np.zeros((2, 2)), "samples and channels cannot be told apart"),
        (np.zeros((100, 200)), "64 at most"),
        (np.zeros(9, np.int64), "an array of int64 has no full scale of its own"),
        (np.zeros(9, bool), "an array of bool has no full scale"),
        (np.zeros(9, complex), "an array of complex128 has no full scale"),
        (np.array(["a"]), "an array of <U1 has no full scale"),
    ],
)
def test_arrays_that_are_no_sound_are_refused(array: np.ndarray, message: str):
    assert message in error_of(array, sample_rate=16_000)


def test_an_array_needs_its_rate():
    assert "needs its sample_rate, such as sample_rate=16000" in error_of(tone())


def test_a_recording_over_the_limit_is_refused_not_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audio, "MAX_HOURS", 1 / 1800)  # 2 s
    assert len(load_audio(encoded(tone(seconds=2)))) == 32_000
    assert "longer than the" in error_of(encoded(tone(seconds=2.1)))
    assert "hours long and" in error_of(tone(seconds=2.1), sample_rate=16_000)


@pytest.mark.parametrize(
    ("format", "codec", "rate"),
    [
        ("wav", "pcm_s16le", 16_000),
        ("mp3", "libmp3lame", 44_100),
        ("flac", "flac", 22_050),
        ("ogg", "libopus", 48_000),
        ("mp4", "aac", 44_100),
    ],
)
def test_damaged_files_decode_or_raise_media_error(format: str, codec: str, rate: int):
    data = encoded(tone(rate, 2), rate, format=format, codec=codec)
    outcomes = set()
    for changed in damaged(data, 7, 60):
        try:
            samples = load_audio(changed)
        except MediaError:
            outcomes.add("refused")
        else:
            assert np.isfinite(samples).all()
            assert len(samples)
            outcomes.add("decoded")
    assert outcomes == {"refused", "decoded"}


def test_ffmpeg_itself_prints_nothing(tmp_path: Path):
    """What libraries print goes past Python's streams, so this looks at a process of its own."""
    path = tmp_path / "cut.mp3"
    data = encoded(tone(44_100), 44_100, format="mp3", codec="libmp3lame")
    path.write_bytes(damaged(data, 3, 3)[2] + b"\xff\xfb" * 500)
    script = (
        "import sys; from gemsmith.errors import MediaError\n"
        "from gemsmith.media.audio import load_audio\n"
        "try: load_audio(sys.argv[1])\nexcept MediaError: pass"
    )
    ran = subprocess.run([sys.executable, "-c", script, path], capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"", b"")
