"""The samples of the package: their list says what is in them, and the recipe makes them so."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recipes.pocket import build_samples, speech
from recipes.pocket.drawing import COLORS, JITTER
from recipes.pocket.words import side

import gemsmith
from gemsmith.media.audio import SAMPLE_RATE, load_audio
from gemsmith.media.video import load_video

FOLDER = Path(gemsmith.__file__).parent / "pocket" / "samples"
FACTS = json.loads((FOLDER / "samples.json").read_text("utf-8"))


def color_inside(image: Image.Image, fact: dict[str, Any]) -> np.ndarray:
    """Of the middle of a shape's box."""
    y0, x0, y1, x1 = (value / 1000 for value in fact["box_2d"])
    x, y = round((x0 + x1) / 2 * image.width), round((y0 + y1) / 2 * image.height)
    return np.asarray(image)[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(axis=0)


def test_shapes_are_where_the_list_says():
    image = Image.open(FOLDER / "scene.png").convert("RGB")
    paper = np.asarray(image)[0, 0]
    bare = (np.asarray(image) == paper).all(axis=-1)
    for fact in FACTS["scene.png"]:
        assert np.abs(color_inside(image, fact) - COLORS[fact["color"]]).max() <= JITTER
        y0, x0, y1, x1 = fact["box_2d"]
        bare[y0 * 300 // 1000 : y1 * 300 // 1000, x0 * 400 // 1000 : x1 * 400 // 1000] = True
    assert bare.all()


def test_every_shape_of_the_film_is_alone_for_two_seconds():
    film = load_video(FOLDER / "film.mp4", fps=8)
    assert film.problems == []
    facts = FACTS["film.mp4"]
    assert len(film.frames) == 16 * len(facts)
    for number, frame in enumerate(film.frames):
        for at, fact in enumerate(facts):
            inside = np.abs(color_inside(frame, fact) - COLORS[fact["color"]]).max()
            assert (inside <= JITTER + 12) == (number // 16 == at)  # 12: of the codec


def test_no_question_about_the_samples_has_two_answers():
    for name, key in product(("scene.png", "film.mp4"), ("color", "shape")):
        values = [fact[key] for fact in FACTS[name]]
        assert len(set(values)) == len(values) == 3


def test_the_command_is_on_the_held_out_side():
    assert side(FACTS["command.wav"]["said"]) == side(FACTS["text.png"]) == "heldout"
    assert 1 < len(load_audio(FOLDER / "command.wav")) / SAMPLE_RATE < 4


def test_samples_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 250_000


@pytest.mark.skipif(not speech.available(), reason="espeak-ng is not installed")
def test_the_recipe_makes_the_samples_that_ship(tmp_path: Path):
    build_samples.build(tmp_path)
    assert json.loads((tmp_path / "samples.json").read_text("utf-8")) == FACTS
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in FOLDER.iterdir()}
    for name in ("scene.png", "text.png"):
        made, shipped = (np.asarray(Image.open(folder / name)) for folder in (tmp_path, FOLDER))
        assert (made == shipped).all()
