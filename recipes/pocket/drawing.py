"""Shapes, letters and paper for the pictures pocket learns from.

Every function draws on a Pillow image and returns nothing or a box (left, top, right, bottom) in
pixels, right and bottom exclusive. A shape fills its box on all four sides, so its box is known
without looking at pixels. Shapes are smoothed by drawing them at `SMOOTH` times their size.

Fonts: DejaVu as shipped with matplotlib, and Pillow's own. Nothing depends on installed fonts.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from recipes.pocket.words import Draw

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]
Font = ImageFont.FreeTypeFont

SMOOTH = 4
COLORS: dict[str, Color] = {
    "red": (220, 35, 35),
    "green": (35, 155, 60),
    "blue": (35, 80, 220),
    "yellow": (240, 215, 35),
    "orange": (245, 135, 20),
    "purple": (140, 50, 170),
    "pink": (245, 145, 190),
    "brown": (125, 75, 40),
    "black": (30, 30, 30),
}
JITTER = 14
"""Most that a channel of a named color moves; the names stay apart."""
PAPERS: tuple[Color, ...] = ((255, 255, 255), (226, 226, 226), (250, 242, 220), (216, 230, 246))
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "default")


def shade(d: Draw, color: Color, jitter: int = JITTER) -> Color:
    """The color, each channel moved a little."""
    red, green, blue = (max(0, min(255, c + d.between(-jitter, jitter))) for c in color)
    return red, green, blue


def paper(d: Draw, width: int, height: int) -> Image.Image:
    """An empty light picture."""
    return Image.new("RGB", (width, height), shade(d, d.pick(PAPERS), 8))


# -- shapes -----------------------------------------------------------------------------------


def _polygon(*corners: tuple[float, float]) -> Callable[[ImageDraw.ImageDraw, int], None]:
    """Draws corners given in 0..1 of the box."""

    def draw(on: ImageDraw.ImageDraw, side: int) -> None:
        on.polygon([(x * (side - 1), y * (side - 1)) for x, y in corners], fill=255)

    return draw


def _star() -> Callable[[ImageDraw.ImageDraw, int], None]:
    """Five points, stretched so that they touch all four sides of the box."""
    turns = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.42) for k in range(10)]
    corners = [(r * math.sin(a), -r * math.cos(a)) for a, r in turns]
    left, top = (min(c[i] for c in corners) for i in (0, 1))
    wide, high = (max(c[i] for c in corners) - low for i, low in ((0, left), (1, top)))
    return _polygon(*(((x - left) / wide, (y - top) / high) for x, y in corners))


def _circle(on: ImageDraw.ImageDraw, side: int) -> None:
    on.ellipse((0, 0, side - 1, side - 1), fill=255)


def _cross(on: ImageDraw.ImageDraw, side: int) -> None:
    third = side // 3
    on.rectangle((third, 0, side - 1 - third, side - 1), fill=255)
    on.rectangle((0, third, side - 1, side - 1 - third), fill=255)


SHAPES: dict[str, Callable[[ImageDraw.ImageDraw, int], None]] = {
    "circle": _circle,
    "square": _polygon((0, 0), (1, 0), (1, 1), (0, 1)),
    "triangle": _polygon((0.5, 0), (1, 1), (0, 1)),
    "diamond": _polygon((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "star": _star(),
    "cross": _cross,
}


@lru_cache(512)
def _mask(shape: str, side: int) -> Image.Image:
    mask = Image.new("L", (side * SMOOTH, side * SMOOTH))
    SHAPES[shape](ImageDraw.Draw(mask), side * SMOOTH)
    return mask.reduce(SMOOTH)


def shape(on: Image.Image, name: str, left: int, top: int, side: int, color: Color) -> None:
    """A shape of SHAPES that fills the square at (left, top)."""
    on.paste(color, (left, top, left + side, top + side), _mask(name, side))


# -- letters ----------------------------------------------------------------------------------


@cache
def font(name: str, size: int) -> Font:
    """A font of FONTS; size in pixels."""
    if name == "default":
        # Pillow without FreeType would give a bitmap font here; every wheel has FreeType.
        made = ImageFont.load_default(size)
        if not isinstance(made, ImageFont.FreeTypeFont):
            raise RuntimeError("Pillow was built without FreeType; install a wheel from its makers")
        return made
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def extent(text: str, name: str, size: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of the ink of `text` drawn at (0, 0)."""
    left, top, right, bottom = font(name, size).getbbox(text)
    return math.floor(left), math.floor(top), math.ceil(right - left), math.ceil(bottom - top)


def fitting(text: str, name: str, width: float, height: float, most: int) -> int:
    """The largest size up to `most` at which the ink of `text` fits into width x height."""
    _, _, wide, high = extent(text, name, 64)
    size = min(most, int(64 * width / wide), int(64 * height / high))
    while size > 1 and (
        extent(text, name, size)[2] > width or extent(text, name, size)[3] > height
    ):
        size -= 1
    return size


def write(
    on: Image.Image, text: str, left: int, top: int, name: str, size: int, color: Color
) -> Box:
    """Writes `text` with its ink at (left, top); returns the box of the ink."""
    dx, dy, wide, high = extent(text, name, size)
    _text(on, text, left - dx, top - dy, name, size, color)
    return left, top, left + wide, top + high


def write_centred(on: Image.Image, text: str, box: Box, name: str, size: int, color: Color) -> None:
    """Writes `text` in the middle of the box; capitals are centred, so a row shares a baseline."""
    left, top, right, bottom = box
    dx, _, wide, _ = extent(text, name, size)
    _, dy, _, high = extent("H", name, size)
    at = left + (right - left - wide) // 2 - dx, top + (bottom - top - high) // 2 - dy
    _text(on, text, *at, name, size, color)


def _text(
    on: Image.Image, text: str, left: int, top: int, name: str, size: int, color: Color
) -> None:
    """Writes it from its origin; each letter and its middle are noted in on.info["letters"]."""
    ImageDraw.Draw(on).text((left, top), text, color, font(name, size))
    noted: list[tuple[str, float, float]] = on.info.setdefault("letters", [])
    for i, letter in enumerate(text):
        start, end = (font(name, size).getlength(text[:n]) for n in (i, i + 1))
        noted.append((letter, left + (start + end) / 2, top + 0.62 * size))
