"""`gemsmith detect` and `gemsmith point`: ask where something is, and draw the answer on a copy."""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gemsmith.cli.console import harmless, write
from gemsmith.cli.talk import load
from gemsmith.engine.engine import LM
from gemsmith.errors import MediaError
from gemsmith.media.image import load_image
from gemsmith.text.boxes import Box, Places, parse_boxes

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#f032e6")
"""Far apart, and dark enough for white letters. One for each label."""


def run(
    image: str,
    what: str,
    model: str,
    *,
    point: bool,
    out: str | None,
    options: dict[str, Any],
    device: str,
    dtype: str,
    kv: str,
    quant: str | None,
    as_json: bool,
) -> None:
    """Ask, print what was found, and save the drawing (only where something was found).

    Raises:
      MediaError: no picture, or no place for the drawing: before the model is asked where that can
        be seen, otherwise after its answer is printed.
    """
    picture = load_image(image)
    target = Path(out or f"{Path(image).stem}.{'points' if point else 'boxes'}.png")
    check(target)
    lm = load(model, device=device, dtype=dtype, kv=kv, quant=quant)
    places, reply = ask(lm, picture, what, point=point, **options)
    saved, problem = None, None
    if places.boxes or places.points:
        try:
            save(draw(picture, places), target)
            saved = target
        except MediaError as error:
            problem = error
    found = {
        "boxes": [asdict(b) | {"pixels": b.pixels(*picture.size)} for b in places.boxes],
        "points": [asdict(p) | {"pixels": p.pixels(*picture.size)} for p in places.points],
        "problems": [asdict(p) for p in places.problems],
        "picture": saved and str(saved),
        "text": reply,
    }
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        show(places, picture.size, saved, Console())
    if problem is not None:
        raise problem


def ask(
    lm: LM, picture: Image.Image, what: str, *, point: bool, **options: Any
) -> tuple[Places, str]:
    """What the model says of the picture: the places in its answer, and the answer."""
    wanted = f"Point to the {what}." if point else f"Detect the {what}."
    content = [{"type": "image", "image": picture}, {"type": "text", "text": wanted}]
    reply = lm.generate([{"role": "user", "content": content}], temperature=0, **options)
    return parse_boxes(reply.text), reply.text


def draw(picture: Image.Image, places: Places) -> Image.Image:
    """A copy with every box framed, every point ringed, and their labels."""
    made = picture.copy()
    pen = ImageDraw.Draw(made)
    size = max(12, min(made.size) // 30)
    font, width = ImageFont.load_default(size), max(2, size // 6)
    found = [*places.boxes, *places.points]
    labels = list(dict.fromkeys(place.label for place in found))
    for place in found:
        color = COLORS[labels.index(place.label) % len(COLORS)]
        if isinstance(place, Box):
            left, top, right, bottom = place.pixels(*made.size)
            pen.rectangle((left, top, right, bottom), outline=color, width=width)
        else:
            x, y = place.pixels(*made.size)
            ring = size * 0.6
            pen.ellipse((x - ring, y - ring, x + ring, y + ring), outline=color, width=width)
            left, top = x + ring, y - ring
        if place.label:
            _label(pen, place.label, left, top, font, color, made.size)
    return made


def _label(
    pen: ImageDraw.ImageDraw,
    text: str,
    left: float,
    top: float,
    font: Any,
    color: str,
    size: tuple[int, int],
) -> None:
    """White on color, above the place, moved inside the picture."""
    text = "".join(c for c in text[:60] if c.isprintable())
    x0, y0, x1, y1 = pen.textbbox((0, 0), text, font=font)
    width, height = x1 - x0 + 6, y1 - y0 + 6
    left = max(0, min(left, size[0] - width))
    top = top - height if top >= height else top
    pen.rectangle((left, top, left + width, top + height), fill=color)
    pen.text((left + 3 - x0, top + 3 - y0), text, font=font, fill="white")


def check(path: Path) -> None:
    """Refuse a drawing's name that cannot be written, as far as one sees without writing.

    Raises:
      MediaError: as `save`.
    """
    if not path.parent.is_dir():
        raise _unsaved(path, "there is no such folder")
    if path.is_dir():
        raise _unsaved(path, "it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _unsaved(path, os.strerror(errno.EACCES))
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise _unsaved(path, f"{path.suffix or 'no ending'} is no format of pictures")


def save(picture: Image.Image, path: Path) -> None:
    """Write the drawing, over one of that name.

    Raises:
      MediaError: no such folder, no permission, or no picture format of that name.
    """
    try:
        picture.save(path)
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _unsaved(path, reason) from None


def _unsaved(path: Path, reason: str) -> MediaError:
    return MediaError(
        f"cannot save {path}: {reason}; give --out a name such as found.png in a folder that is "
        "there and yours to write"
    )


def show(places: Places, size: tuple[int, int], saved: Path | None, console: Console) -> None:
    found = [*places.boxes, *places.points]
    if found:
        table = Table("label", "left", "top", "right", "bottom", title="pixels")
        for place in found:
            corners = place.pixels(*size)
            label = Text(harmless(place.label[:60]))
            table.add_row(label, *(f"{value:.0f}" for value in corners))
        console.print(table)
    elif not places.problems:
        console.print("The model found none.")
    for problem in places.problems:
        write(console, f"{problem.message}: {problem.raw}\n", style="red")
    if saved is not None:
        write(console, f"drawn on a copy: {saved}\n")
