"""Which frames of a video are taken, when they are, what they cost, and files that are damaged.

Every frame drawn here tells its number in eight bars, so that a test sees which one it got.
"""

import base64
import errno
import io
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tests.media.damage import damaged

from gemsmith.errors import MediaError
from gemsmith.media import audio, video
from gemsmith.media.image import load_image, patches
from gemsmith.media.video import Plan, Video, load_video, plan, survey

DATA = Path(__file__).parents[1] / "data"
VECTORS = json.loads((DATA / "video_vectors.json").read_text("utf-8"))
BITS = 8


def drawn(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    bars = np.array([255 * (number >> bit & 1) for bit in range(BITS)], np.uint8)
    row = np.repeat(bars, -(-width // BITS))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_of(image: Image.Image) -> int:
    pixels = np.asarray(image.convert("L"), dtype=np.float32).mean(axis=0)
    bars = pixels.reshape(BITS, -1).mean(axis=1) > 127
    return int((bars << np.arange(BITS)).sum())


def encoded(
    path: Path,
    count: int = 40,
    *,
    format: str = "mp4",
    codec: str = "mpeg4",
    rate: int = 8,
    size: tuple[int, int] = (64, 48),
    pixels: str = "yuv420p",
    sound_seconds: float = 0,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    with av.open(str(path), "w", format=format, container_options=container_options) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = None
        if sound_seconds:
            sound = file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for index in range(count):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(index % 256, *size), "rgb24")))
        file.mux(stream.encode(None))
        if sound is not None:
            samples = 0.5 * np.ones((1, round(16_000 * sound_seconds)), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, "flt", "mono")
            frame.sample_rate = 16_000
            file.mux(sound.encode(frame))
            file.mux(sound.encode(None))
    return path.read_bytes()


def animated(format: str, count: int = 10, milliseconds: int | list[int] = 200) -> bytes:
    first, *others = [Image.fromarray(drawn(index)) for index in range(count)]
    file = io.BytesIO()
    first.save(file, format, save_all=True, append_images=others, duration=milliseconds)
    return file.getvalue()


def numbers(film: Video) -> list[int]:
    return [number_of(frame) for frame in film.frames]


def every(total: int, count: int) -> list[int]:
    return [k * total // count for k in range(count)]


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        load_video(source, **options)
    with pytest.raises(MediaError):
        plan(source, **options)
    return str(caught.value)


# Which frames


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: str(case["total_frames"]))
def test_frames_and_stamps_are_the_reference_s(case: dict[str, Any], tmp_path: Path):
    total, fps = case["total_frames"], case["fps"]
    film = load_video(encoded(tmp_path / "film", total, rate=int(fps), options={"g": "12"}))
    # Where there are fewer than 32 the reference raises; here each comes once.
    expected = case.get("frame_indices", list(range(total)))
    assert numbers(film) == [index % 256 for index in expected]
    assert film.seconds == [index / fps for index in expected]
    if "timestamps" in case:
        assert film.stamps == case["timestamps"]
    assert film.problems == []


def test_frames_of_the_reference_run_are_taken(tmp_path: Path):
    run = VECTORS["run_64x48_40frames_8fps"]
    film = load_video(encoded(tmp_path / "film", 40, rate=8))
    assert numbers(film) == run["frames_indices"]
    assert len(film.frames) == run["num_frames_per_video"][0]
    assert film.plan.frame_tokens == run["num_soft_tokens_per_video"][0]


@pytest.mark.parametrize(
    ("format", "codec", "options"),
    [
        ("mp4", "libx264", {"g": "10", "bf": "3"}),
        ("mp4", "libx264", {"x264-params": "keyint=10:open-gop=1:bframes=3:scenecut=0"}),
        ("matroska", "libx264", {}),
        ("mpegts", "libx264", {"g": "10"}),
        ("avi", "libx264", {"g": "10", "bf": "3"}),
        ("h264", "libx264", {"g": "10", "bf": "3"}),
        ("mpegts", "libx264", {"x264-params": "tff=1:keyint=10:bframes=3"}),
        ("mp4", "libx265", {"x265-params": "keyint=10:bframes=3:log-level=none"}),
        ("mpegts", "mpeg2video", {"g": "10", "bf": "2", "flags": "+ildct+ilme"}),
        ("webm", "libvpx-vp9", {"g": "10", "lag-in-frames": "16", "auto-alt-ref": "1"}),
        ("webm", "libvpx", {"lag-in-frames": "16", "auto-alt-ref": "1"}),
        ("mjpeg", "mjpeg", {}),
    ],
)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_frame_taken_is_the_one_numbered(
    format: str, codec: str, options: dict[str, str], count: int, tmp_path: Path
):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = encoded(
        tmp_path / "film", 40, format=format, codec=codec, options=options, pixels=pixels
    )
    film = load_video(data, frames=count)
    assert numbers(film) == every(40, count)
    assert film.problems == []
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in film.frames)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_an_animation_is_a_video(format: str):
    film = load_video(animated(format), frames=4)
    assert numbers(film) == [0, 2, 5, 7]
    # Where the first picture stands for itself alone, it has no time (PNG).
    assert film.seconds == [0, 0.4, 1.0, 1.4]
    assert film.audio is None
    assert film.problems == []


@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF"])
def test_the_rate_of_an_animation_is_that_of_all_its_frames(format: str):
    film = load_video(animated(format, 30, [3000] + [100] * 29), frames=4)
    assert film.stamps == ["00:00", "00:01", "00:02", "00:04"]
    assert film.seconds == pytest.approx([number * 5.9 / 30 for number in (0, 7, 15, 22)])


def test_without_avif_in_pillow_the_other_animations_are_read(monkeypatch: pytest.MonkeyPatch):
    avif = animated("AVIF", 2)
    assert survey(avif).by_pillow
    monkeypatch.delitem(Image.OPEN, "AVIF")
    monkeypatch.setattr(video, "ANIMATIONS", [each for each in video.ANIMATIONS if each != "AVIF"])
    assert survey(animated("PNG")).by_pillow
    assert not survey(avif).by_pillow  # FFmpeg may decode one frame of it


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_frames_that_store_only_what_changed_are_whole(format: str):
    frames = [Image.new("RGB", (200, 300), "white") for _ in range(3)]
    for i, frame in enumerate(frames):
        frame.paste((255, 0, 0), (20 + 60 * i, 50, 60 + 60 * i, 90))
    file = io.BytesIO()
    lossless = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=2000, **lossless)
    film = load_video(file.getvalue(), frames=3)
    assert [frame.tobytes() for frame in film.frames] == [frame.tobytes() for frame in frames]
    assert film.stamps == ["00:00", "00:02", "00:04"]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_a_video_of_one_frame(format: str):
    file = io.BytesIO()
    Image.fromarray(drawn(77)).save(file, format)
    film = load_video(file.getvalue())
    assert (numbers(film), film.stamps) == ([77], ["00:00"])


def test_frames_are_chosen_by_rate_and_by_tokens(tmp_path: Path):
    data = encoded(tmp_path / "film", 40, rate=8)  # 5 s, 63 tokens a frame
    assert numbers(load_video(data, fps=2)) == every(40, 10)
    assert numbers(load_video(data, fps=0.01)) == [0]
    for fps in (8, 100, 1e308, 10**400):
        assert numbers(load_video(data, fps=fps)) == list(range(40))
    assert numbers(load_video(data, frames=np.int64(4))) == every(40, 4)
    assert numbers(load_video(data, tokens=63 * 5 + 62)) == every(40, 5)
    assert plan(data, tokens=10**9).frames == 40


def test_tokens_are_a_limit_with_the_sound_included(tmp_path: Path):
    data = encoded(tmp_path / "film", 40, format="matroska", sound_seconds=5)
    made = plan(data, tokens=1000)
    assert made == Plan(frames=13, frame_tokens=63, audio_tokens=125)
    assert made.total == 944 <= 1000 < made.total + 63
    assert plan(data, tokens=1000, sound=False).frames == 15
    assert (
        "62 tokens are too few for the video bytes: a frame costs 63 and the sound 0"
        in error_of(data, tokens=62, sound=False)
    )


def test_stamps_go_on_after_an_hour():
    film = Video([], [0, 59.99, 60, 3661.5, 6000], 70, None, Plan(5, 63, 0), [])
    assert film.stamps == ["00:00", "00:59", "01:00", "61:01", "100:00"]


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_turned_video_is_shown_upright(rotation: int, tmp_path: Path):
    data = encoded(tmp_path / "film", 20, rotation=rotation)
    [*_, last] = load_video(data, frames=3).frames
    assert last.size == ((64, 48) if rotation == 180 else (48, 64))
    assert number_of(last.rotate(-rotation, expand=True)) == 13


def test_only_packets_that_chosen_frames_need_are_decoded(tmp_path: Path):
    options = {"x264-params": "keyint=10:min-keyint=10:bframes=2:scenecut=0"}
    path = tmp_path / "film"
    encoded(path, 200, codec="libx264", options=options)
    reel = survey(path)
    runs, _ = video._runs(reel, [0, 101, 150])
    assert len(runs) == 3
    assert sum(last - first + 1 for first, last in runs) < 10
    assert numbers(load_video(path, frames=3)) == [0, 66, 133]


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
def test_frames_that_no_other_needs_are_left_out_and_the_rest_is_the_same(
    codec: str, tmp_path: Path
):
    path = tmp_path / "film"
    encoded(path, 60, codec=codec, rate=25, options={"g": "60", "bf": "3"})
    with av.open(str(path)) as file:
        whole = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    reel, problems = survey(path), []
    for number in range(0, 60, 7):
        film = video._decoded(reel, [number], 70, problems)
        assert np.array_equal(np.asarray(film[number]), whole[number])
    runs, number_of = video._runs(reel, [58])
    with av.open(str(path)) as file:
        made = video._frames(file, file.streams.video[0], runs, set(number_of), problems)
        assert sum(1 for _ in made) < 45
    assert problems == []


# Cost


@pytest.mark.parametrize("case", VECTORS["cases"][:1] + VECTORS["cases"][3:], ids=str)
def test_tokens_of_a_frame_are_the_reference_s(case: dict[str, Any], tmp_path: Path):
    data = encoded(tmp_path / "film", 1, size=(case["width"], case["height"]))
    for budget in (70, 140, 280):
        assert plan(data, budget=budget).frame_tokens == case[f"frame_{budget}"]["soft_tokens"]


def test_a_plan_says_what_a_video_will_cost(tmp_path: Path):
    data = encoded(tmp_path / "film", 40, format="matroska", size=(1280, 720), sound_seconds=5)
    made = plan(data)
    assert str(made) == "32 frames x 66 tokens + 125 audio tokens = 2237 tokens"
    assert str(plan(data, sound=False)) == "32 frames x 66 tokens = 2112 tokens"
    film = load_video(data)
    assert film.plan == made
    assert film.audio is not None
    assert audio.soft_tokens(len(film.audio)) == made.audio_tokens
    assert film.budget == 70


def test_the_sound_comes_with_the_frames(tmp_path: Path):
    data = encoded(tmp_path / "film", 40, format="matroska", sound_seconds=5)
    film = load_video(data, frames=2)
    assert film.audio is not None
    assert (len(film.audio), film.audio.dtype) == (80_000, np.float32)
    np.testing.assert_allclose(film.audio, 0.5, atol=1e-4)
    assert load_video(data, frames=2, sound=False).audio is None


def test_a_video_is_surveyed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reel = survey(encoded(tmp_path / "film"))
    monkeypatch.setattr(video, "locate", None)
    assert plan(reel, frames=3).frames == 3
    assert numbers(load_video(reel, frames=3)) == [0, 13, 26]


def test_a_path_bytes_and_a_data_url_are_the_same_video(tmp_path: Path):
    path = tmp_path / "film.txt"  # the contents decide, not the name
    data = encoded(path)
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, url):
        assert numbers(load_video(source, frames=3)) == [0, 13, 26]


# Bad input


def test_what_is_no_file_is_refused():
    assert "nothing is fetched from the network; download the video" in error_of("http://a/b.mp4")
    assert "give the path of a video file" in error_of("missing.mp4")
    assert "must begin like data:video/mp4;base64," in error_of("data:video/mp4,abc")
    assert "or a data URL, not as ndarray" in error_of(np.zeros((4, 8, 8, 3), np.uint8))
    assert "is empty: 0 bytes" in error_of(b"")
    assert "the video bytes cannot be decoded (" in error_of(b"no video at all")


@pytest.mark.parametrize("data", [animated("WEBP", 2), b"no animation"], ids=["WEBP", "other"])
def test_a_file_that_may_not_be_read_says_so(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "film"
    path.write_bytes(data)

    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(path) == f"{path} cannot be read: Permission denied"
    with pytest.raises(MediaError, match=r"film cannot be read: Permission denied$"):
        audio.load_audio(path)
    with pytest.raises(MediaError, match=r"film cannot be read: Permission denied$"):
        load_image(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames=0: give a whole number over 0"),
        ({"frames": 2.5}, "frames=2.5: give a whole number over 0"),
        ({"frames": [1]}, "frames=[1]: give a whole number over 0"),
        ({"frames": True}, "frames=True: give a whole number over 0"),
        ({"tokens": "many"}, "tokens='many': give a whole number over 0"),
        ({"fps": "2"}, "fps='2': give a number over 0"),
        ({"fps": 2 + 1j}, "fps=(2+1j): give a number over 0"),
        ({"fps": 0}, "fps=0: give a number over 0"),
        ({"fps": float("nan")}, "fps=nan: give a number over 0"),
        ({"fps": float("inf")}, "fps=inf: give a number over 0"),
        ({"tokens": -1}, "tokens=-1: give a whole number over 0"),
        ({"frames": 2, "fps": 1}, "frames and fps: give one of frames, fps and tokens"),
        ({"budget": 71}, "image budget 71: an image may cost 70, 140"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
):
    assert message in error_of(encoded(tmp_path / "film", 4), **options)


def test_a_file_without_video_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), "flt", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert error_of(file.getvalue()).endswith("has no video that FFmpeg can decode; it holds audio")


def test_a_video_without_frames_is_refused(tmp_path: Path):
    data = encoded(tmp_path / "film", 4, format="avi")
    header = data[: data.index(b"movi") + 4]
    assert "has no frames; was it saved or sent whole?" in error_of(header)


def test_of_a_cut_file_what_is_left_is_taken_and_the_loss_named(tmp_path: Path):
    data = encoded(
        tmp_path / "film",
        40,
        codec="libx264",
        options={"g": "5"},
        container_options={"movflags": "faststart"},
    )
    film = load_video(data[: len(data) * 3 // 4], frames=8)
    assert len(film.frames) > 2
    assert numbers(film) == [round(second * 8) for second in film.seconds]
    assert film.problems[0].startswith("the header promises 40 frames and ")
    lost = 8 - len(film.frames)
    assert (f"{lost} of 8 frames cannot be decoded" in film.problems) == bool(lost)


def test_damaged_sound_leaves_the_frames(tmp_path: Path):
    data = bytearray(encoded(tmp_path / "film", 8, format="matroska", sound_seconds=1))
    data = data.replace(b"A_PCM/INT/LIT", b"A_PCM/INT/XXX")
    film = load_video(bytes(data))
    assert len(film.frames) == 8
    assert film.audio is None
    assert film.problems[0].startswith("no sound: ")


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    gif = bytearray(animated("GIF", 2))
    gif[6:10] = b"\xff\xff\xff\xff"
    assert "frames without a size, or of more than the 67,108,864 pixels" in error_of(bytes(gif))
    monkeypatch.setattr(video, "MAX_PIXELS", 1000)
    assert "frames of 64 x 48, more than the 1,000 pixels" in error_of(animated("WEBP"))


def test_frames_that_need_too_much_memory_with_their_patches_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = patches(Image.new("RGB", (480, 336)), 70)  # 10 x 7 cells
    monkeypatch.setattr(video, "MAX_MEMORY", 5 * (64 * 48 * 3 + whole.values.nbytes))
    data = encoded(tmp_path / "film", 8)
    assert len(load_video(data, frames=5).frames) == 5
    message = error_of(data, frames=6)
    assert re.match(r"6 frames of 64 x 48 at 70 soft tokens need .* GiB with their patch", message)
    assert "ask for 5 frames at most, lower their budget, or scale the video down" in message
    assert "ask for 2 frames at most" in error_of(data, frames=5, budget=140)


def test_frames_larger_than_the_header_says_are_refused_where_they_need_too_much_memory(
    monkeypatch: pytest.MonkeyPatch,
):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        for index in range(40):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16) if index < 20 else (500, 400)).save(picture, "JPEG")
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = index
            packet.is_keyframe = True
            container.mux(packet)
    data = file.getvalue()
    assert (survey(data).width, survey(data).height) == (16, 16)
    assert load_video(data, frames=4).frames[-1].size == (500, 400)
    with monkeypatch.context() as limits:
        limits.setattr(video, "MAX_DECODED", 2_000_000)
        plan(data, frames=40)
        with pytest.raises(MediaError, match="billion pixels would have to be decoded"):
            load_video(data, frames=40)
    monkeypatch.setattr(video, "MAX_MEMORY", 80_000_000)
    with pytest.raises(MediaError, match=r"^40 frames of 500 x 400 .* ask for 31 frames at most"):
        load_video(data, frames=40)


def test_a_video_that_takes_too_long_to_decode_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    size = 64 * 48
    data = encoded(tmp_path / "film", 40)  # each 12th packet is a key
    monkeypatch.setattr(video, "MAX_DECODED", 20 * size)
    assert len(load_video(data, frames=2).frames) == 2  # takes the first and the 13th to 21st
    message = error_of(data, frames=40)
    assert re.search(r"billion pixels would have to be decoded .* with more key frames", message)
    with pytest.raises(MediaError, match="billion pixels"):
        plan(data, frames=40)
    monkeypatch.setattr(video, "MAX_ANIMATED", 3 * size)
    assert survey(animated("WEBP", 3)).total == 3
    assert "billion pixels" in error_of(animated("WEBP", 4))


def test_a_video_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    data = encoded(tmp_path / "film", 40, rate=8)
    monkeypatch.setattr(video, "MAX_PACKETS", 39)
    assert "more than the 39 frames that are read" in error_of(data)
    monkeypatch.setattr(video, "MAX_HOURS", 4 / 3600)
    assert "is 0.0 hours long and" in error_of(encoded(tmp_path / "film", 33, rate=8))
    assert "hours long and" in error_of(animated("WEBP", 25))


def test_a_list_of_files_opens_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoded(tmp_path / "secret.mp4")
    monkeypatch.chdir(tmp_path)
    error_of(b"ffconcat version 1.0\nfile secret.mp4\n")


def test_an_unknown_codec_is_refused(tmp_path: Path):
    data = encoded(tmp_path / "film", 4, format="matroska")
    data = data.replace(b"V_MPEG4/ISO/ASP", b"V_MPEG9/ISO/ASP")
    assert "has no video that FFmpeg can decode; it holds video" in error_of(data)


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp4", "libx264"), ("matroska", "mpeg4"), ("avi", "mpeg4"), ("WEBP", ""), ("GIF", "")],
)
def test_damaged_files_decode_or_raise_media_error(format: str, codec: str, tmp_path: Path):
    if codec:
        data = encoded(
            tmp_path / "film", 12, format=format, codec=codec, sound_seconds=0.5 * (format != "mp4")
        )
    else:
        data = animated(format)
    outcomes = set()
    for changed in damaged(data, 5, 40):
        try:
            film = load_video(changed, frames=4)
        except MediaError:
            outcomes.add("refused")
        else:
            assert 1 <= len(film.frames) == len(film.seconds) <= 4
            assert len(film.frames) == film.plan.frames or film.problems
            outcomes.add("decoded")
    assert outcomes == {"refused", "decoded"}
