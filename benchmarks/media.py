"""From a file to what a model takes: ours against Transformers' processors, in the same run.

Each subject makes its file, checks that ours and the peers' results agree, and is then timed. The
floor is what no implementation can avoid, decoding the file, done by the library that ours uses.
A peer that cannot be imported here (its fast image processor needs a torchvision that fits torch)
is named as missing.

Run: python -m benchmarks.media [--record]
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks import measure
from gemsmith.media import audio, image, video

MUST_NOT_BE_SLOWER = 1.0
PHOTO = (4000, 3000)
CLIP_SECONDS = 30
FILM, FILM_RATE, FILM_SECONDS = (1280, 720), 30, 60


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One file and the ways to prepare it."""

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that cannot run here, and why."""
    floor: Callable[[], object]


def images(folder: Path) -> Iterator[Subject]:
    """A 12-megapixel photo, from its JPEG file to patches."""
    path = folder / "photo.jpg"
    photo(*PHOTO).save(path, quality=90)
    peers, missing = image_processors()
    for budget in (image.DEFAULT_BUDGET, image.BUDGETS[-1]):

        def ours(budget: int = budget) -> image.Patches:
            return image.patches(image.load_image(path), budget)

        runs: dict[str, Callable[[], Any]] = {
            name: lambda run=processor, budget=budget: run(
                images=[str(path)], max_soft_tokens=budget, return_tensors="np"
            )
            for name, processor in peers.items()
        }
        for name, run in runs.items():
            check_patches(name, ours(), run())
        yield Subject(
            name=f"photo {PHOTO[0]} x {PHOTO[1]}, {path.stat().st_size / 1e6:.1f} MB, {budget}",
            ours=ours,
            peers=runs,
            missing=missing,
            floor=lambda: Image.open(path).load(),
        )


def photo(width: int, height: int) -> Image.Image:
    """Detail of every size, the larger the stronger; things with edges; and a sensor's noise."""
    rng = np.random.default_rng(0)
    scene = np.zeros((height, width), dtype=np.float32)
    for octave in 2 ** np.arange(1, 10):
        spots = rng.normal(0, octave, (height // octave + 2, width // octave + 2))
        spread = Image.fromarray(spots.astype(np.float32)).resize((width, height))
        scene += np.asarray(spread)
    scene = 128 + 40 * scene / scene.std()
    layers = [scene + shade + rng.normal(0, 3, scene.shape) for shade in (15, 0, -20)]
    made = Image.fromarray(np.stack(layers, axis=-1).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(made)
    for _ in range(200):
        x, y, size = rng.integers([0, 0, 10], [width, height, 300]).tolist()
        draw.ellipse((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return made


def image_processors() -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """Transformers' image processors that can be had here; the others with the reason."""
    found: dict[str, Callable[..., Any]] = {}
    missing: dict[str, str] = {}
    try:
        from transformers.models.gemma4.image_processing_gemma4 import Gemma4ImageProcessor

        found["Transformers, torchvision"] = Gemma4ImageProcessor()
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        missing["Transformers, torchvision"] = str(error).strip().splitlines()[0]
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    found["Transformers, Pillow"] = Gemma4ImageProcessorPil()
    return found, missing


def check_patches(name: str, ours: image.Patches, theirs: Any) -> None:
    """End the program unless both have the same patches at the same places.

    torchvision rounds its filter differently, and its JPEG decoder is another: 2 of 255 are seen.
    """
    n = len(ours.values)
    values, positions = theirs["pixel_values"][0, :n], theirs["image_position_ids"][0, :n]
    apart = np.abs(ours.values - values).max() * 255
    if not (apart <= 2.5 and (ours.positions == positions).all()):
        sys.exit(f"{name}: patches differ by {apart:.1f} of 255; nothing was timed")


def sounds(folder: Path) -> Iterator[Subject]:
    """30 seconds of 44.1 kHz stereo, from an MP3 file to mel frames.

    Transformers' reader of sound files needs soundfile or torchcodec; its extractor gets what ours
    decoded, so the difference is the mel front end.
    """
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor

    path = folder / "clip.mp3"
    record_clip(path, CLIP_SECONDS)
    extractor = Gemma4AudioFeatureExtractor()

    def theirs() -> Any:
        return extractor([audio.load_audio(path)])

    features, _ = audio.mel(audio.load_audio(path))
    made = theirs()
    check_equal("mel frames", features, made["input_features"][0][made["input_features_mask"][0]])
    yield Subject(
        name=f"clip of {CLIP_SECONDS} s, {path.stat().st_size / 1e6:.1f} MB",
        ours=lambda: audio.mel(audio.load_audio(path)),
        peers={"Transformers, our decoding": theirs},
        floor=lambda: decode_all(path, "audio"),
    )


def videos(folder: Path) -> Iterator[Subject]:
    """60 seconds of 1280 x 720, from the file to 32 frames in RGB; patches are those of images.

    Transformers' video processor needs torchvision; what stands here is its reader for PyAV.
    """
    from transformers.video_utils import read_video_pyav

    path = folder / "film.mp4"
    record_film(path, FILM_SECONDS)

    def evenly(metadata: Any, **_: Any) -> np.ndarray:
        total = metadata.total_num_frames
        return np.arange(0, total, total / video.DEFAULT_FRAMES).astype(int)

    def theirs() -> Any:
        return read_video_pyav(path, evenly)  # pyright: ignore[reportArgumentType]

    def ours() -> video.Video:
        return video.load_video(path, sound=False)

    check_equal("frames", np.stack([np.asarray(frame) for frame in ours().frames]), theirs()[0])
    yield Subject(
        name=f"video of {FILM_SECONDS} s, {path.stat().st_size / 1e6:.1f} MB",
        ours=ours,
        peers={"Transformers, PyAV": theirs},
        floor=lambda: decode_all(path, "video"),
    )


def record_clip(path: Path, seconds: int) -> None:
    """Tones that rise and fall, on noise."""
    rate = 44_100
    t = np.arange(seconds * rate) / rate
    rng = np.random.default_rng(0)
    tones = 0.3 * np.sin(2 * np.pi * 300 * t + 40 * np.sin(3 * t)) * (np.sin(9 * t) > -0.5)
    both = np.stack([tones, 0.8 * tones]) + rng.normal(0, 0.01, (2, len(t)))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libmp3lame", rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(both.astype(np.float32), "fltp", "stereo")
        frame.sample_rate = rate
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def record_film(path: Path, seconds: int) -> None:
    """A window that wanders over a photo; a key frame every 8 seconds or so, as encoders do."""
    scene = np.asarray(photo(FILM[0] * 2, FILM[1] * 2))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FILM_RATE, options={"preset": "veryfast"})
        stream.width, stream.height = FILM
        stream.pix_fmt = "yuv420p"
        for index in range(seconds * FILM_RATE):
            x, y = (round(side * (1 + np.sin(index / 97)) / 2) for side in FILM)
            window = np.ascontiguousarray(scene[y : y + FILM[1], x : x + FILM[0]])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(window, "rgb24")))
        file.mux(stream.encode(None))


def decode_all(path: Path, kind: Literal["audio", "video"]) -> None:
    with av.open(str(path)) as file:
        for _ in file.decode(file.streams.best(kind)):
            pass


def check_equal(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """End the program unless both are equal, but for the rounding of float32."""
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        sys.exit(f"{name} differ from those of Transformers; nothing was timed")


SUBJECTS: dict[str, Callable[[Path], Iterator[Subject]]] = {
    "images": images,
    "sounds": sounds,
    "videos": videos,
}


def timed(subject: Subject, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of ours, of each peer and of the floor, in turns."""
    runs = {"gemsmith": subject.ours, **subject.peers, "floor": subject.floor}
    seconds = measure.interleaved(runs, repeats=repeats)
    return {name: measure.summary(values) for name, values in seconds.items()}


def lines(subject: Subject, times: dict[str, dict[str, float]]) -> list[str]:
    """What is printed of a subject: each run beside the floor, and ours against each peer."""
    ours, floor = times["gemsmith"]["median"], times["floor"]["median"]
    made = [subject.name]
    for name, s in times.items():
        text = (
            f"  {name:26} {s['median'] * 1e3:8.1f} ms "
            f"({s['min'] * 1e3:.1f}-{s['max'] * 1e3:.1f}, n={s['n']})"
        )
        if name == "floor":
            text += "   decoding alone"
        else:
            text += f"   {s['median'] / floor:.2f}x the floor"
        if name in subject.peers:
            ratio = s["median"] / ours
            text += f"   ours is {ratio:.2f}x as fast (must reach {MUST_NOT_BE_SLOWER})"
        made.append(text)
    made += [f"  {name:26} missing: {why}" for name, why in subject.missing.items()]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--subject", choices=SUBJECTS, action="append", help="all by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = measure.machine()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.subject or SUBJECTS:
            for subject in SUBJECTS[name](Path(folder)):
                times = timed(subject, options.repeats)
                print("\n".join(lines(subject, times)))
                found[subject.name] = {"runs": times, "missing": subject.missing}
    results = {"model": "any", "unit": "s", "subjects": found}
    measure.finish("media", results, about, record=options.record)


if __name__ == "__main__":
    main()
