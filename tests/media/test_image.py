import base64
import contextlib
import io
import json
import os
import random
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont, features

from gemsmith.errors import MediaError
from gemsmith.media import image
from gemsmith.media.image import (
    BUDGETS,
    check_budget,
    choose_budget,
    load_image,
    merged_patches,
    patches,
    target_size,
)

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "image_vectors.json").read_text("utf-8"))
CASES = VECTORS["cases"]
ROUNDED = 1.1e-6
"""The vectors are rounded to six digits."""


def synthetic(width: int, height: int) -> np.ndarray:
    """The picture of the vectors."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [(7 * x + 3 * y) % 256, (2 * x + 5 * y + 40) % 256, (x * y) % 256]
    return np.stack(channels, axis=-1).astype(np.uint8)


def noise(width: int = 56, height: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(picture: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def pixels(source: Any) -> np.ndarray:
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def page(width: int, height: int, font_size: int, ink: str = "black") -> Image.Image:
    """A page full of text."""
    made = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=font_size)
    line = "The quick brown fox jumps over the lazy dog. 0123456789 " * (
        width // font_size // 20 + 1
    )
    for y in range(font_size, height - font_size, round(1.4 * font_size)):
        draw.text((font_size, y), line, fill=ink, font=font)
    return made


def shapes(width: int, height: int) -> Image.Image:
    made = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(made)
    draw.ellipse((width * 0.1, height * 0.1, width * 0.4, height * 0.5), fill="red")
    box = (width * 0.5, height * 0.3, width * 0.8, height * 0.9)
    draw.rectangle(box, fill="blue", outline="black", width=3)
    return made


def photo(width: int, height: int) -> Image.Image:
    """Detail of every size, the larger the stronger, as in nature; and a sensor's noise."""
    rng = np.random.default_rng(0)
    sum_of_octaves = np.zeros((height, width), dtype=np.float32)
    for octave in 2 ** np.arange(10):
        spots = rng.normal(0, octave, (height // octave + 2, width // octave + 2))
        spread = Image.fromarray(spots.astype(np.float32)).resize((width, height))
        sum_of_octaves += np.asarray(spread)
    brightness = 128 + 50 * sum_of_octaves / sum_of_octaves.std()
    brightness += rng.normal(0, 5, brightness.shape)
    return Image.fromarray(brightness.clip(0, 255).astype(np.uint8)).convert("RGB")


# --- sizes and patches ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['width']}x{c['height']}-{c['budget']}")
def test_sizes_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    size = target_size(case["width"], case["height"], case["budget"])
    assert size == (case["resized_w"], case["resized_h"])


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c["budget"] in (70, 280) and c["width"] * c["height"] <= 2_100_000],
    ids=lambda c: f"{c['width']}x{c['height']}-{c['budget']}",
)
def test_patches_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    picture = load_image(synthetic(case["width"], case["height"]))
    made = patches(picture, case["budget"])
    assert made.values.dtype == np.float32
    assert made.positions.dtype == np.int64
    assert made.values.shape == (case["patches"], case["pixel_values_shape"][-1])
    assert made.soft_tokens == case["soft_tokens"]
    assert made.size == (case["resized_w"], case["resized_h"])
    assert made.positions[-1].tolist() == [case["grid_w"] - 1, case["grid_h"] - 1]
    mean = made.values.mean(dtype=np.float64)
    assert mean == pytest.approx(case["pixel_mean_valid"], abs=ROUNDED)
    merged = merged_patches(picture, case["budget"])
    assert merged.values.shape == (case["soft_tokens"], case["unified_pixel_values_shape"][-1])
    assert merged.values.mean(dtype=np.float64) == pytest.approx(mean, abs=1e-9)


def test_order_of_values_and_positions_is_that_of_the_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = VECTORS["patchify"]
    monkeypatch.setattr(image, "target_size", lambda *_, **__: (96, 48))  # as it is
    made = patches(load_image(synthetic(96, 48)))
    assert len(made.values) == known["n_valid_patches"]
    assert made.positions[:8].tolist() == known["positions_first_8"]
    assert made.positions[-1].tolist() == known["positions_last_valid"]
    assert made.values.sum(dtype=np.float64) == pytest.approx(known["sum_all"], abs=0.005)
    for first, name in (
        (made.values[0], "patch0_first_9"),
        (made.values[0, 16 * 3 :], "patch0_row1_first_3"),
        (made.values[1], "patch1_first_3"),
        (made.values[6], "patch6_first_3"),
    ):
        assert first[: len(known[name])] == pytest.approx(known[name], abs=ROUNDED)
    known = known["unified"]
    merged = merged_patches(load_image(synthetic(96, 48)))
    assert merged.positions.tolist() == known["positions_first_3"][:2]  # the third is padding
    for first, name in (
        (merged.values[0], "soft0_first_6"),
        (merged.values[0, 48 * 3 :], "soft0_row1_first_3"),
        (merged.values[1], "soft1_first_3"),
    ):
        assert first[: len(known[name])] == pytest.approx(known[name], abs=ROUNDED)


@pytest.mark.parametrize(("width", "height"), [(100, 50), (333, 1000), (48, 48), (1500, 20)])
def test_patches_equal_transformers(width: int, height: int) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    picture = Image.fromarray(noise(width, height))
    for budget in BUDGETS:
        processor: Any = Gemma4ImageProcessorPil()
        theirs = processor(picture, max_soft_tokens=budget, return_tensors="np")
        ours = patches(picture, budget)
        n = len(ours.values)
        # They multiply by 1/255 in double precision.
        np.testing.assert_allclose(ours.values, theirs["pixel_values"][0, :n], rtol=2e-7)
        assert (ours.positions == theirs["image_position_ids"][0, :n]).all()
        assert (theirs["image_position_ids"][0, n:] == -1).all()
        assert [ours.soft_tokens] == list(theirs["num_soft_tokens_per_image"])


def test_merged_patches_are_the_patches_of_a_cell_in_full_rows() -> None:
    picture = Image.fromarray(noise(500, 300))
    small, merged = patches(picture, 70), merged_patches(picture, 70)
    of = {
        tuple(p): v.reshape(16, 16, 3) for p, v in zip(small.positions, small.values, strict=True)
    }
    assert merged.size == small.size
    assert len(merged.values) == merged.soft_tokens == small.soft_tokens
    places = [(x, y) for y in range(small.size[1] // 48) for x in range(small.size[0] // 48)]
    assert [tuple(p) for p in merged.positions] == places
    for (x, y), values in zip(places, merged.values, strict=True):
        rows = [np.hstack([of[3 * x + i, 3 * y + j] for i in range(3)]) for j in range(3)]
        assert (values.reshape(48, 48, 3) == np.vstack(rows)).all()


sides = st.integers(1, 100_000)


@given(sides, sides, st.sampled_from(BUDGETS))
def test_sizes_equal_transformers_and_never_exceed_the_budget(w: int, h: int, budget: int) -> None:
    from transformers.models.gemma4.image_processing_pil_gemma4 import (
        get_aspect_ratio_preserving_size,
    )

    width, height = target_size(w, h, budget)
    assert (height, width) == get_aspect_ratio_preserving_size(h, w, 16, budget * 9, 3)
    assert width % 48 == height % 48 == 0
    assert 1 <= width * height // 48**2 <= budget


@pytest.mark.parametrize("budget", [0, 100, -70, 2240, "high", None])
def test_a_budget_outside_the_list_is_refused(budget: Any) -> None:
    with pytest.raises(MediaError, match=r"budget .*: an image may cost 70, 140, 280, 560 or 1120"):
        check_budget(budget)


def test_white_is_one_and_black_is_zero() -> None:
    assert (patches(Image.new("RGB", (9, 9), "white"), 70).values == 1).all()
    assert (patches(Image.new("RGB", (9, 9), "black"), 70).values == 0).all()


# --- what can be read ----------------------------------------------------------------------------


def test_the_same_file_as_path_bytes_and_data_url(tmp_path: Path) -> None:
    picture = noise()
    data = encoded(picture)
    path = tmp_path / "photo.jpg"  # the contents decide
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    escaped = text.replace("+", "%2B").replace("=", "%3D")
    for source in (
        path,
        str(path),
        data,
        bytearray(data),
        f"data:image/png;base64,{text}",
        f"DATA:text/plain;charset=utf-8;BASE64,{text[:76]}\n{text[76:]}",
        f"data:image/png;base64,{escaped}",
        Image.fromarray(picture),
        picture,
    ):
        assert (pixels(source) == picture).all()


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})]
    + [("TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits")],
)
def test_formats_without_loss_give_the_pixels_back(format: str, options: dict[str, Any]) -> None:
    picture = np.repeat(np.repeat(noise(7, 5), 8, axis=0), 8, axis=1)  # few colors, for GIF
    assert (pixels(encoded(picture, format, **options)) == picture).all()


@pytest.mark.parametrize(
    "format", ["JPEG", "WEBP", "MPO"] + ["AVIF"] * bool(features.check("avif"))
)
def test_formats_with_loss_give_nearly_the_pixels_back(format: str) -> None:
    picture = np.asarray(shapes(256, 256))
    options = {"save_all": True, "append_images": [shapes(256, 256)]} if format == "MPO" else {}
    found = pixels(encoded(picture, format, quality=95, **options)).astype(int)
    assert np.abs(found - picture).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int) -> None:
    upright = np.asarray(shapes(64, 48))
    # What a camera stores, from what EXIF says row 0 and column 0 of it are.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(np.ascontiguousarray(stored), exif=exif)
    loaded = load_image(data)
    assert (np.asarray(loaded) == upright).all()
    assert (pixels(loaded) == upright).all()
    given = Image.open(io.BytesIO(data))
    assert (pixels(given) == upright).all()
    assert (np.asarray(given) == stored).all()  # the caller's image stays as it was


def test_a_damaged_exif_block_hides_no_pixels() -> None:
    data = encoded(shapes(32, 32), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\1\2\3")
    assert pixels(data).shape == (32, 32, 3)


def test_transparent_pixels_are_mixed_with_white() -> None:
    picture = np.zeros((2, 2, 4), dtype=np.uint8)  # black everywhere, seen or not
    picture[..., 3] = [[0, 255], [51, 128]]
    expected = np.array([[255, 0], [204, 127]])[..., None].repeat(3, axis=2)
    for source in (picture, Image.fromarray(picture), encoded(picture), encoded(picture, "TIFF")):
        assert (pixels(source) == expected).all()
    grey = Image.fromarray(picture).convert("LA")
    assert (pixels(encoded(grey)) == expected).all()


def test_a_transparent_color_of_a_palette_or_of_rgb_is_white() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    for format in ("PNG", "GIF"):
        assert pixels(encoded(picture, format)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
        clear = encoded(picture, format, transparency=1)
        assert pixels(clear).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    red = encoded(picture.convert("RGB"), transparency=(255, 0, 0))
    assert pixels(red).tolist() == [[[255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "LA", "RGBA", "PA"]
)
def test_every_mode_looks_as_in_transformers(mode: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    picture = Image.fromarray(noise(16, 16)).convert("RGBA" if "A" in mode else "RGB")
    picture.putalpha(Image.fromarray(noise(16, 16, 1)[..., 0])) if "A" in mode else None
    picture = picture.convert(mode)
    assert (pixels(picture) == convert_to_rgb(picture, return_numpy=True)).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_and_not_cut_off(format: str) -> None:
    values = np.array([[0, 255, 256], [257, 32_896, 65_535]], dtype=np.uint16)
    expected = np.array([[0, 1, 1], [1, 128, 255]])[..., None].repeat(3, axis=2)
    assert (pixels(encoded(values, format)) == expected).all()
    assert (pixels(values) == expected).all()


@pytest.mark.parametrize("brightest", [100, 65_535])
def test_16_bits_in_either_byte_order_are_the_same_picture(brightest: int) -> None:
    values = np.linspace(0, brightest, 12).reshape(3, 4).astype(np.uint16)
    swapped = values.astype(">u2")
    big = Image.frombytes("I;16B", (4, 3), swapped.tobytes())
    data = encoded(big, "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "I;16B"
    for source in (swapped, big, data):
        assert (pixels(source) == pixels(values)).all()


def test_32_bit_files_are_read_where_their_range_is_known() -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert pixels(encoded(values, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(MediaError, match=r"the image bytes: an array of float32 must be in 0..1"):
        load_image(encoded(values * 9, "TIFF"))
    with pytest.raises(MediaError, match=r"32-bit pixels from 0 to 70000: which is black"):
        load_image(encoded(np.array([[0, 70_000]], dtype=np.int32), "TIFF"))


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3  # pyright: ignore
        assert (pixels(data) == [255, 0, 0]).all()


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 51], [102, 255]], dtype=np.uint8),
        np.array([[0, 51], [102, 255]], dtype=np.int64),
        np.array([[0, 51], [102, 255]], dtype=np.uint8)[:, ::-1][:, ::-1, None],
        np.array([[0, 51], [102, 255]], dtype=np.uint16) * 257,
        np.array([[0, 0.2], [0.4, 1]], dtype=np.float16),
        np.array([[0, 0.2], [0.4, 1]], dtype=np.float64),
    ],
    ids=lambda v: f"{v.dtype}{v.shape}",
)
def test_arrays_of_every_number_type_are_the_same_picture(values: np.ndarray) -> None:
    expected = np.array([[0, 51], [102, 255]])[..., None].repeat(3, axis=2)
    assert (pixels(values) == expected).all()


def test_an_array_of_booleans_is_black_and_white() -> None:
    assert pixels(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]


def test_the_image_does_not_change_with_the_array() -> None:
    array = noise()
    loaded = load_image(array)
    before = np.asarray(loaded).copy()
    array[:] = 0
    assert (np.asarray(loaded) == before).all()


# --- what cannot ---------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://example.org/cat.png", "HTTPS://example.org/cat.png"])
def test_web_addresses_are_not_fetched(url: str) -> None:
    with pytest.raises(
        MediaError, match=rf"{url}: nothing is fetched .*; download the image and give"
    ):
        load_image(url)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\n <!DOCTYPE html><html>", "a web page, perhaps of a log-in: save the image itself"),
        (b"<HTML lang=en>", "a web page"),
        (b'<?xml version="1.0"?>\n<svg width="1">', "an SVG drawing: export it as PNG"),
        (b"%PDF-1.7", "a PDF: export its pages as PNG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC photo: export it as JPEG"),
    ],
)
def test_what_people_take_for_an_image_is_named(data: bytes, what: str) -> None:
    with pytest.raises(MediaError, match=f"the image bytes is no image but {what}"):
        load_image(data)


@pytest.mark.parametrize("data", [b"hello, world", b"\0" * 100, b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_other_files_are_refused_with_how_they_begin(data: bytes) -> None:
    with pytest.raises(
        MediaError, match=r"is no image, or its header is damaged: .*read are PNG, J"
    ):
        load_image(data)


def test_empty_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "nothing.png").touch()
    for source, name in (
        (tmp_path / "nothing.png", r"nothing\.png"),
        (b"", "the image bytes"),
        ("data:image/png;base64,", "the data URL"),
    ):
        with pytest.raises(MediaError, match=rf"{name} is empty: 0 bytes"):
            load_image(source)


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"absent\.png cannot be read: No such file or directory"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(MediaError, match=r"is a folder; give the path of an image file"):
        load_image(tmp_path)
    with pytest.raises(MediaError, match="cannot be read: embedded null byte"):
        load_image("cat\0.png")
    with pytest.raises(MediaError, match=r"^A{60}\.\.\. \(9,000 characters\) cannot be .*base64,"):
        load_image("A" * 9_000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match=r"pipe is not a file; give the path of an image file"):
        load_image(tmp_path / "pipe")


def test_data_urls_that_hold_no_image_are_refused() -> None:
    with pytest.raises(MediaError, match=r"data URL data:image/png,abc holds no base64"):
        load_image("data:image/png,abc")
    with pytest.raises(MediaError, match=r"data URL data:image/png;base64 holds no base64"):
        load_image("data:image/png;base64")
    for damaged in ("AAA", "AA*A", "AAé="):
        with pytest.raises(
            MediaError, match=r"the base64 of the data URL is damaged \(.*sent whole"
        ):
            load_image(f"data:image/png;base64,{damaged}")


def test_too_many_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_BYTES", 2**20)
    data = bytes(2**20 + 2**19)
    path = tmp_path / "large.png"
    path.write_bytes(data)
    for source in (path, data, "data:image/png;base64," + base64.b64encode(data).decode()):
        with pytest.raises(MediaError, match=r"has 1\.5 MiB, more than the 1 MiB that are read"):
            load_image(source)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header alone is that large."""
    data = bytearray(encoded(Image.new("RGB", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    limit = r"pixels, more than the 100,000,000 that are read; scale it down"
    with pytest.raises(MediaError, match=rf"has 11000 x 10000 = 110,000,000 {limit}"):
        load_image(png_of(11_000, 10_000))
    with pytest.raises(MediaError, match=rf"has 400,000,000 {limit}"):  # Pillow refuses these
        load_image(png_of(20_000, 20_000))
    with pytest.warns(Image.DecompressionBombWarning):
        lazy = Image.open(io.BytesIO(png_of(11_000, 10_000)))
    with pytest.raises(MediaError, match=rf"the PIL image has 11000 x 10000 = 110,000,000 {limit}"):
        load_image(lazy)
    with pytest.raises(MediaError, match=rf"the array has 11000 x 10000 = 110,000,000 {limit}"):
        load_image(np.broadcast_to(np.uint8(0), (10_000, 11_000)))


def test_images_without_pixels_are_refused() -> None:
    with pytest.raises(MediaError, match="the PIL image has no pixels: it is 0 x 5"):
        load_image(Image.new("RGB", (0, 5)))
    with pytest.raises(MediaError, match="the array has no pixels: it is 5 x 0"):
        load_image(np.zeros((0, 5, 3), dtype=np.uint8))
    with pytest.raises(MediaError, match="the image has no pixels: it is 0 x 5"):
        target_size(0, 5, 70)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_file_cut_short_is_refused(format: str) -> None:
    data = encoded(noise(), format)
    with pytest.raises(
        MediaError, match=r"damaged.*save it again or send the original|header is da"
    ):
        load_image(data[: len(data) * 2 // 3])


def test_a_damaged_image_is_named_with_format_and_size() -> None:
    data = encoded(noise())
    with pytest.raises(
        MediaError,
        match=r"the PNG image of 56 x 40 is damaged or cut short \(.*\); save it again or",
    ):
        load_image(data[: len(data) // 2])


def test_a_closed_pil_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "cat.png")
    closed = Image.open(tmp_path / "cat.png")
    closed.close()
    with pytest.raises(MediaError, match="the PIL image: the PNG image of 56 x 40 is damaged"):
        load_image(closed)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 20, 20)), r"shape \(3, 20, 20\) is no image: .*np\.moveaxis\(array, 0, -1\)"),
        (np.zeros(7), r"shape \(7,\) is no image"),
        (np.zeros((1, 9, 9, 3)), r"shape \(1, 9, 9, 3\) is no image"),
        (np.full((2, 2), 255.0), r"float64 must be in 0\.\.1, not 255\.\.255; scale it, or give u"),
        (np.array([[0, np.nan]]), r"float64 must be in 0\.\.1, not nan\.\.nan"),
        (np.array([[-0.5, 1]]), r"float64 must be in 0\.\.1, not -0\.5\.\.1"),
        (np.array([[0, 256]]), r"int64 must be in 0\.\.255, not 0\.\.256"),
        (np.array([[1j]]), "array of complex128 is no image: give uint8, uint16 or floats in 0..1"),
        (np.array([["a"]]), "array of <U1 is no image"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array: np.ndarray, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        load_image(array)


@pytest.mark.parametrize("source", [None, 7, ["cat.png"], io.BytesIO(b"")])
def test_other_types_are_refused(source: Any) -> None:
    with pytest.raises(MediaError, match=rf"a numpy array, not as {type(source).__name__}"):
        load_image(source)


def test_odd_files_give_no_warning_and_leave_the_filters_of_warnings_alone() -> None:
    palette = Image.fromarray(noise()).convert("P")
    odd = encoded(palette, transparency=bytes(range(256)))  # Pillow warns when it is converted
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_image(odd)
        load_image(encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0"))
    assert not caught
    assert warnings.filters == before


def test_threads_leave_the_filters_of_warnings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first decodes, and would end after it."""
    decode, seconds = image._upright, iter([0.1, 0.2])

    def slowly(picture: Image.Image, name: str) -> Image.Image:
        time.sleep(next(seconds))
        return decode(picture, name)

    monkeypatch.setattr(image, "_upright", slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load_image, [encoded(noise())] * 2))
    assert warnings.filters == before


ENCODINGS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded(noise()),
    "PNG with palette": lambda: encoded(Image.fromarray(noise()).convert("P"), transparency=3),
    "PNG of 16 bits": lambda: encoded(noise().astype(np.uint16)[..., 0] * 255),
    "JPEG": lambda: encoded(noise(), "JPEG", exif=encoded_exif()),
    "JPEG progressive": lambda: encoded(noise(), "JPEG", progressive=True),
    "JPEG in CMYK": lambda: encoded(Image.fromarray(noise()).convert("CMYK"), "JPEG"),
    "GIF": lambda: encoded(noise(), "GIF"),
    "GIF animated": lambda: encoded(
        noise(), "GIF", save_all=True, append_images=[Image.fromarray(255 - noise())]
    ),
    "WEBP": lambda: encoded(noise(), "WEBP", exif=encoded_exif()),
    "WEBP lossless": lambda: encoded(noise(channels=4), "WEBP", lossless=True),
    "BMP": lambda: encoded(noise(), "BMP"),
    "TIFF": lambda: encoded(noise(), "TIFF", exif=encoded_exif()),
    "TIFF with LZW": lambda: encoded(noise(), "TIFF", compression="tiff_lzw"),
    "PPM": lambda: encoded(noise(), "PPM"),
}


def encoded_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a title of some length"
    return exif


@pytest.mark.parametrize("kind", ENCODINGS)
def test_damaged_files_give_an_image_or_a_media_error(kind: str) -> None:
    """50 damages each: cut short, bytes changed anywhere or in the header, pieces exchanged."""
    whole, chance, read = ENCODINGS[kind](), random.Random(kind), 0
    for _ in range(50):
        data = bytearray(whole)
        match chance.randrange(4):
            case 0:
                del data[chance.randrange(len(data)) :]
            case 1:
                for _ in range(chance.randrange(1, 8)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
            case 2:
                for _ in range(chance.randrange(1, 4)):
                    data[chance.randrange(min(200, len(data)))] = chance.randrange(256)
            case _:
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(1, 40)] = chance.randbytes(chance.randrange(40))
        with contextlib.suppress(MediaError):
            read += load_image(bytes(data)).mode == "RGB"
    assert read < 50


# --- the budget ----------------------------------------------------------------------------------


def test_detail_of_openai_is_a_budget() -> None:
    picture = Image.new("RGB", (640, 480))
    assert choose_budget(picture, "low") == 140
    assert choose_budget(picture, "high") == 1120
    assert choose_budget(picture, "auto") == choose_budget(picture)
    for wrong in ("medium", ["low"], 7, None):
        words = f"^image detail {re.escape(repr(wrong))} is not one of auto, low, high$"
        with pytest.raises(MediaError, match=words):
            choose_budget(picture, wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("picture", "budget"),
    [
        # Small ones cost what their own pixels need, whatever they show.
        (page(64, 64, 11), 70),
        (shapes(224, 224), 70),
        (photo(400, 400), 140),
        (shapes(150, 660), 140),  # 70 shows 144 x 816: more pixels, but less of the width
        (page(640, 480, 11), 280),
        # Nothing is gained by more than the default.
        (Image.new("RGB", (5000, 5000)), 280),
        (shapes(1000, 1000), 280),
        (shapes(4000, 3000), 280),
        (photo(2000, 1500), 280),
        # Letters: a page of A4 at 150 dpi, a screenshot of a dark and of a pale program.
        (page(1240, 1754, 40), 280),
        (page(1240, 1754, 20), 560),
        (page(1240, 1754, 12), 1120),
        (page(1920, 1080, 13), 1120),
        (page(1920, 1080, 13, ink="silver"), 1120),
    ],
    ids=lambda v: f"{v.size[0]}x{v.size[1]}" if isinstance(v, Image.Image) else str(v),
)
def test_auto_spends_what_the_picture_needs(picture: Image.Image, budget: int) -> None:
    assert choose_budget(picture) == budget


def test_auto_counts_letters_wherever_they_are() -> None:
    """A few lines at the top of an empty page need what a full page needs."""
    made = Image.new("RGB", (1240, 1754), "white")
    made.paste(page(1240, 200, 12), (0, 60))
    assert choose_budget(made) == 1120


def test_auto_ignores_the_noise_of_a_sensor() -> None:
    picture = np.asarray(photo(1600, 1200)).astype(float)
    picture += np.random.default_rng(1).normal(0, 12, picture.shape)
    assert choose_budget(Image.fromarray(picture.clip(0, 255).astype(np.uint8))) == 280
