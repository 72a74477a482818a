"""Images: from a file, bytes, a data URL or an array to the patches that a vision tower takes.

The towers are in model/vision.py and model/unified.py. Nothing is fetched from the network.

An image is decoded whole, turned upright, put on white where it is transparent and made RGB. Its
budget is the most soft tokens that it may cost, each of which stands for a cell of 48 x 48 pixels:
the image is scaled, up or down, to the largest size of about its own shape whose cells fit the
budget, then cut into 16-pixel patches (towers, which pool 3 x 3 of them) or into cells (12B).

Source: transformers 5.23, models gemma4 and gemma4_unified, `convert_to_rgb`. Pixels are the same
except where noted below: 16-bit images are scaled to 8 bits, not cut off at 255.
"""

import io
import math
import os
import re
import threading
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from gemsmith.errors import MediaError
from gemsmith.media.source import locate, reader

BUDGETS = (70, 140, 280, 560, 1120)
"""Soft tokens that the models were trained to spend on an image, at most."""
DEFAULT_BUDGET = 280

MAX_BYTES = 128 * 2**20
"""Of a file: the largest photos of telephones and cameras stay below it."""
MAX_PIXELS = 100_000_000
"""A3 scanned at 600 dpi is 70 million. As RGB 300 MB, and four times that while it is put on white;
the models see 2.6 million at most."""

FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]
"""What people send. Pillow's other readers are rare, old, or run programs (EPS calls Ghostscript),
and every one of them is a door for untrusted files. Pillow before 11.3 may lack AVIF."""
if features.check("avif"):
    FORMATS.append("AVIF")

NOT_IMAGES = (
    (rb"\s*<(!doctype\s+html|html)", "a web page, perhaps of a log-in: save the image itself"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "an SVG drawing: export it as PNG"),
    (rb"%PDF", "a PDF: export its pages as PNG"),
    (rb".{4}ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "a HEIC photo: export it as JPEG"),
)
"""How files begin that people take for images: pattern, what to say of it."""

DETAILS = {"low": 140, "high": 1120}
"""OpenAI's `detail` -> budget. Its "low" shows a model at most 512 x 512 pixels: 140 is the
smallest budget that shows as many (528 x 528); 70 shows 384 x 384."""

# Legibility, see `choose_budget`. Set by pages of text: letters count as kept while their font is
# about 11 pixels high or more.
BLOCK = 24
"""Pixels a side: half a soft token's, about a word."""
MIN_CONTRAST = 16
"""Of 255. Pale grey letters on white have more, smooth areas and sensor noise less."""
KEPT_CONTRAST = 0.85
KEPT_SHARE = 0.9
"""Of the blocks; the rest may be dust, moire, a fine pattern."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright."""

_DECODING = threading.Lock()
"""Pillow warns of odd files, and Python's filters for warnings belong to the whole process: two
threads that silence them at once would leave them silent. It also bounds the memory of decoding."""

Source = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """An image as a model takes it, without padding."""

    values: np.ndarray
    """float32 [P, side * side * 3] in [0, 1]: row, column, channel; the channel runs fastest."""
    positions: np.ndarray
    """int64 [P, 2]: x, y of each, counted in patches. Row by row from the top left."""
    size: tuple[int, int]
    """Width and height of the scaled image, pixels."""
    soft_tokens: int


def load_image(source: Source) -> Image.Image:
    """The image upright and in RGB; of an animation or a file of several pages the first.

    source: a path; the bytes of a file; a `data:` URL with base64; a PIL image, which is never
      changed and which comes back as it is where nothing is to be done; or an array [H, W],
      [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, of other integers in 0..255, of uint16 (scaled by
      1/257), of booleans, or of floats in 0..1.

    The contents decide what a file is, not its name. Transparent pixels are mixed with white,
    which is what most pictures with holes are drawn for: the color under a hole is often black, and
    black text on it would vanish.

    Raises:
      MediaError: not an image in a format of FORMATS, damaged, cut short, empty, over MAX_BYTES or
        MAX_PIXELS; an http address; an array of other shape, type or range.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(source, Image.Image):
            return _upright(source, "the PIL image")
        data, name = _read(source)
        return _upright(_open(data, name), name)


def check_budget(budget: object) -> None:
    """Raises: MediaError: not one of BUDGETS."""
    if budget not in BUDGETS:
        raise MediaError(
            f"image budget {budget!r}: an image may cost {', '.join(map(str, BUDGETS[:-1]))} or "
            f"{BUDGETS[-1]} soft tokens; {DEFAULT_BUDGET} is the default"
        )


def target_size(
    width: int, height: int, budget: int, *, patch: int = 16, pool: int = 3
) -> tuple[int, int]:
    """Width and height, in pixels, to which an image is scaled: multiples of patch * pool.

    At most `budget` cells of patch * pool pixels. Small images are scaled up. A strip so thin that
    its cells would have no height (or width) gets one row (or column), of its length in heights.

    budget: one that `check_budget` lets pass, or any other whole number over 0.

    Raises:
      MediaError: a side without pixels.
    """
    _check_sides(width, height, "the image")
    cell = patch * pool
    scale = math.sqrt(budget * cell**2 / (width * height))
    columns, rows = (math.floor(scale * side / cell) for side in (width, height))
    if rows == 0:
        columns, rows = min(width // height, int(budget)), 1
    elif columns == 0:
        columns, rows = 1, min(height // width, int(budget))
    return columns * cell, rows * cell


def choose_budget(image: Image.Image, detail: str = "auto") -> int:
    """The budget for OpenAI's `detail`: "low" 140, "high" 1120, "auto" by what the image shows.

    image: as `load_image` gives it.

    "auto" is the smallest budget that meets both, where 1120 stands for more:
    - It does not scale the image down; or
    - it is DEFAULT_BUDGET or more, and fine detail survives it: letters, lines of a plan.

    So small images cost less than the default, photos and drawings the default, and pages and
    screenshots as much as their letters need. None is scaled up where a smaller budget shows all of
    its pixels.

    Fine detail: at the scale of the first kind the image is cut into blocks of 24 x 24 pixels (a
    quarter of a soft token). Those of some contrast (standard deviation of brightness, 16 of 255 or
    more) are compared with the same blocks scaled to the smaller budget: edges of large things keep
    their contrast, strokes thinner than a pixel turn grey. It survives if nine of ten keep 85 %.

    Raises:
      MediaError: another detail.
    """
    if isinstance(detail, str) and detail in DETAILS:
        return DETAILS[detail]
    if detail != "auto":
        raise MediaError(f"image detail {detail!r} is not one of auto, {', '.join(DETAILS)}")
    whole = BUDGETS[-1]
    for budget in BUDGETS:
        width, height = target_size(*image.size, budget)
        if width >= image.width and height >= image.height:
            whole = budget
            break
    smaller = [budget for budget in BUDGETS if DEFAULT_BUDGET <= budget < whole]
    if not smaller:
        return whole
    columns, rows = (side // BLOCK for side in target_size(*image.size, whole))
    # This need not be exact: with a gap of 1, Pillow averages 2 x 2, 3 x 3 ... pixels where it can.
    size = (columns * BLOCK, rows * BLOCK)
    grey = image.convert("L").resize(size, Image.Resampling.BICUBIC, reducing_gap=1.0)
    before = _contrast(grey, columns, rows)
    shown = before >= MIN_CONTRAST
    for budget in smaller:
        block = round(BLOCK * math.sqrt(budget / whole))
        size = (columns * block, rows * block)
        after = _contrast(grey.resize(size, Image.Resampling.BICUBIC), columns, rows)
        kept = after[shown] >= KEPT_CONTRAST * before[shown]
        if kept.sum() >= KEPT_SHARE * kept.size:
            return budget
    return whole


def _contrast(grey: Image.Image, columns: int, rows: int) -> np.ndarray:
    """Standard deviation of brightness in each block [rows, columns] of equal size."""
    blocks = np.asarray(grey, dtype=np.float32).reshape(rows, -1, columns, grey.width // columns)
    return blocks.std(axis=(1, 3))


def patches(
    image: Image.Image, budget: int = DEFAULT_BUDGET, *, patch: int = 16, pool: int = 3
) -> Patches:
    """Patches for a vision tower: P = pool**2 * soft_tokens of them, patch pixels a side.

    Raises:
      MediaError: as `target_size` and `load_image`.
    """
    return _cut(image, budget, patch=patch, pool=pool, side=patch)


def merged_patches(
    image: Image.Image, budget: int = DEFAULT_BUDGET, *, patch: int = 16, pool: int = 3
) -> Patches:
    """Cells for the 12B, which has no tower: one for each soft token, patch * pool pixels a side.

    The values of a cell run over its full rows, not patch by patch; positions count cells.

    Raises:
      MediaError: as `target_size` and `load_image`.
    """
    return _cut(image, budget, patch=patch, pool=pool, side=patch * pool)


def _cut(image: Image.Image, budget: int, *, patch: int, pool: int, side: int) -> Patches:
    """The image scaled to its budget and cut into squares of `side` pixels."""
    image = load_image(image)
    size = target_size(*image.size, budget, patch=patch, pool=pool)
    # On 8-bit values, as in the reference; Pillow's filter widens when it shrinks (antialias).
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    columns, rows = size[0] // side, size[1] // side
    squares = pixels.reshape(rows, side, columns, side * 3).transpose(0, 2, 1, 3)
    values = np.multiply(squares, np.float32(1 / 255), order="C")
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    return Patches(
        values=values.reshape(rows * columns, -1),
        positions=np.stack([x, y], axis=1),
        size=size,
        soft_tokens=size[0] * size[1] // (patch * pool) ** 2,
    )


def _read(source: object) -> tuple[bytes, str]:
    """Bytes of a file, and what to call it in an error."""
    found, name = locate(source, "image", max_bytes=MAX_BYTES)
    with reader(found, name) as file:
        return file.read(), name


def _open(data: bytes, name: str) -> Image.Image:
    """The image with its header read, not decoded.

    Decoded it is in full: letting the JPEG decoder halve a large photo (`draft`) would take a third
    of the time, but letters then differ by up to 73 of 255 from what the models were trained on.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        for pattern, what in NOT_IMAGES:
            if re.match(pattern, data[:512], re.IGNORECASE | re.DOTALL):
                raise MediaError(f"{name} is no image but {what}") from error
        raise MediaError(
            f"{name} is no image, or its header is damaged: it begins with {data[:8]!r}; "
            f"read are {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        # Pillow refuses twice its own limit by itself, and tells the size in words only.
        number = re.search(r"\d+", str(error))
        raise _too_large(f"{int(number[0]):,}" if number else "too many", name) from error
    # Readers of damaged files raise all kinds of errors.
    except Exception as error:
        raise MediaError(
            f"{name}: the header of the image is damaged ({_reason(error)}); "
            "save it again or send the original"
        ) from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Decoded, in RGB, and turned as its EXIF orientation says."""
    _check_pixels(image.width, image.height, name)
    try:
        image.load()
        made = _rgb(image)
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from error
    except Exception as error:
        raise MediaError(
            f"{name}: the {image.format or image.mode} image of {image.width} x {image.height} "
            f"is damaged or cut short ({_reason(error)}); save it again or send the original"
        ) from error
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # A damaged EXIF block says nothing, and hides no pixels.
        turn = None
    if turn is not None:
        made = made.transpose(turn)
        made.info = {}  # or it would be turned again
    return made


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "F":
        return _from_array(np.asarray(image))
    if image.mode == "I":  # 32-bit integers: how Pillow holds the 16 bits of some formats
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not 0 <= low <= high <= 65_535:
            raise MediaError(
                f"32-bit pixels from {low} to {high}: which is black, and which is white? Give an "
                "array of floats in 0..1"
            )
        return _from_array(values.astype(np.uint16))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise MediaError(
            f"an array of shape {shape} is no image: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] is; "
            "where channels come first, use np.moveaxis(array, 0, -1)"
        )
    _check_pixels(shape[1], shape[0], "the array")
    levels = _levels(array)
    return _rgb(Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels))


def _levels(array: np.ndarray) -> np.ndarray:
    """The array as uint8, 0 to 255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if (array.dtype.kind, array.dtype.itemsize) == ("u", 2):  # np.uint16 is of one byte order
        return ((array.astype(np.uint32) * 255 + 32_767) // 65_535).astype(np.uint8)
    most = {"f": 1, "i": 255, "u": 255}.get(array.dtype.kind)
    if most is None:
        raise MediaError(
            f"an array of {array.dtype} is no image: give uint8, uint16 or floats in 0..1"
        )
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= most):  # so that NaN is caught
        raise MediaError(
            f"an array of {array.dtype} must be in 0..{most}, not {low:g}..{high:g}; "
            "scale it, or give uint8"
        )
    if most == 255:
        return array.astype(np.uint8)
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _check_sides(width: int, height: int, name: str) -> None:
    if min(width, height) < 1:
        raise MediaError(f"{name} has no pixels: it is {width} x {height}")


def _check_pixels(width: int, height: int, name: str) -> None:
    _check_sides(width, height, name)
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height} = {width * height:,}", name)


def _too_large(pixels: str, name: str) -> MediaError:
    return MediaError(
        f"{name} has {pixels} pixels, more than the {MAX_PIXELS:,} that are read; scale it down "
        "(the models see 2.6 million at most)"
    )


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
