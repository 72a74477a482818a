"""Makes the samples that ship with the package: what `gemsmith demo` shows and tells the model.

  python -m recipes.pocket.build_samples src/gemsmith/pocket/samples

- scene.png     three shapes
- text.png      a code to read
- command.wav   a question about the calendar, spoken
- film.mp4      three shapes one after another, 2 s each
- samples.json  what is in them: shapes with their boxes, the text, what is said and what for

All of it is on the held-out side of words.side: places of colors and shapes, texts, the voice and
what it says. espeak-ng must be installed (see speech.py). Pictures and sounds come out the same
every time with the same versions of Pillow and espeak-ng.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import av
from PIL import Image
from recipes.pocket import pictures, speech
from recipes.pocket.films import reel
from recipes.pocket.pictures import Thing, thousandths
from recipes.pocket.words import Draw

FPS, SECONDS_EACH = 8, 2
SIZE = (400, 300)
TEXT_INDEX = 6
"""Of the held-out pictures to read."""
SPOKEN = "what is on my calendar on {date}"
"""A form of speech.COMMANDS whose tool is among those of `gemsmith demo`."""


def build(out: Path) -> None:
    """Writes the samples into a folder.

    Raises:
      RuntimeError: espeak-ng is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    scene, things = _scene(Draw("heldout", "samples/scene"), 3)
    scene.save(out / "scene.png", optimize=True)
    text = pictures.generate("heldout", 0, TEXT_INDEX, kind="read", budget=70)
    text.image.save(out / "text.png", optimize=True)
    said = _say(Draw("heldout", "samples/command"), out / "command.wav")
    shown = _film(Draw("heldout", "samples/film"), out / "film.mp4")
    facts = {
        "scene.png": [_fact(thing) for thing in things],
        "text.png": text.checks[0].expected["value"],
        "command.wav": said,
        "film.mp4": [_fact(thing) for thing in shown],
    }
    (out / "samples.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def _scene(d: Draw, count: int) -> tuple[Image.Image, list[Thing]]:
    """A picture of shapes that all differ in color and in shape."""
    while True:
        image, things = pictures._scene(d, lambda: [(None, None)] * count, 0.2)
        alike = 2 * count - len({t.color for t in things}) - len({t.name for t in things})
        if image.size == SIZE and not alike:
            return image, things


def _fact(thing: Thing) -> dict[str, Any]:
    return {"color": thing.color, "shape": thing.name, "box_2d": thousandths(thing.box, *SIZE)}


def _say(d: Draw, path: Path) -> dict[str, str]:
    """A command of the held-out side by a held-out voice."""
    made = speech.utterance(d, (SPOKEN,))
    speech.write_wave(path, speech.Studio(d).record(made.spoken)["audio"])
    return {"said": made.written, **made.arguments}


def _film(d: Draw, path: Path) -> list[Thing]:
    """Shapes one after another, alone in the picture."""
    frames, things = reel(d, 3, SIZE)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "20", "threads": "1"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for image in frames:
            for _ in range(FPS * SECONDS_EACH):
                file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode(None))
    return things


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    build(options.out)
    for path in sorted(options.out.iterdir()):
        print(f"{path.name:14} {path.stat().st_size:7,} bytes")
