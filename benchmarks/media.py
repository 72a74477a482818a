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
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks import measure
from gemsmith.media import image

MUST_NOT_BE_SLOWER = 1.0
PHOTO = (4000, 3000)


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


SUBJECTS: dict[str, Callable[[Path], Iterator[Subject]]] = {"images": images}


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
    parser.add_argument("--record", action="store_true", help="append to docs/numbers")
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
