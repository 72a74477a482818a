"""Labels of soft tokens say what stands there, and a stretch of teaching can be gone on with."""

import shutil

import numpy as np
import pytest
import torch
from recipes.pocket import drawing, pictures, towers

from gemsmith.media.image import patches, target_size
from gemsmith.weights.hub import resolve

POCKET = resolve("pocket")


def test_letters_are_labelled_where_their_ink_is() -> None:
    """A page's letters stand in its cells, but for those that share a patch."""
    for index in range(6):
        picture = pictures.generate("train", 3, index, kind="page")
        labels = towers.labels_of(picture.image, 70)
        made = patches(picture.image, 70)
        assert len(labels.letters_S9) == made.soft_tokens
        text = picture.messages[1]["content"]
        found = labels.letters_S9[labels.letters_S9 > 0] - 1
        letters = [towers.LETTERS[i] for i in found]
        written = [c for c in text if c.strip()]
        assert len(letters) > 0.7 * len(written)
        assert set(letters) <= set(written)
        # Paper is labelled as paper: patches of a letter have more ink than others.
        ink = np.ptp(made.values.reshape(len(made.values), -1), axis=1)
        width, _ = target_size(*picture.image.size, 70)
        columns = width // towers.CELL
        of_patch = np.array(
            [
                labels.letters_S9[(y // 3) * columns + x // 3, y % 3 * 3 + x % 3]
                for x, y in made.positions
            ]
        )
        assert ink[of_patch > 0].mean() > 1.4 * ink[of_patch == 0].mean()


def test_shapes_are_labelled_in_the_cells_they_cover() -> None:
    for index in range(6):
        picture = pictures.generate("train", 3, index, kind="scene")
        labels = towers.labels_of(picture.image, 70)
        width, height = target_size(*picture.image.size, 70)
        columns = width // towers.CELL
        for thing in picture.image.info["things"]:
            left, top, right, bottom = thing.box
            x = (left + right) / 2 * width / picture.image.width / towers.CELL
            y = (top + bottom) / 2 * height / picture.image.height / towers.CELL
            cell = int(y) * columns + int(x)
            assert labels.color_S[cell] == towers.COLORS.index(thing.color) + 1
            assert labels.shape_S[cell] == towers.SHAPES.index(thing.name) + 1
            box = pictures.thousandths(thing.box, *picture.image.size)
            assert (10 * labels.box_S4[cell]).tolist() == box
            assert labels.middle_S[cell] == 1
        assert labels.middle_S.sum() == len(picture.image.info["things"])
        assert (labels.color_S == 0).any()


def test_every_letter_that_is_written_has_a_number() -> None:
    for kind in ("page", "read", "table", "buttons"):
        for index in range(20):
            picture = pictures.generate("train", 5, index, kind=kind)
            letters = {letter for letter, _, _ in picture.image.info["letters"]}
            assert letters <= set(towers.LETTERS), (kind, letters - set(towers.LETTERS))
    assert set(drawing.COLORS) == set(towers.COLORS)


@pytest.mark.parametrize("kind", ["see", "hear"])
def test_teaching_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, kind) -> None:
    if kind == "hear" and shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    monkeypatch.setattr(towers, "PICTURES", 1)
    monkeypatch.setattr(towers, "CLIPS", 1)
    out = tmp_path / "towers.pt"
    towers.fit(kind, POCKET, out, 0.02, decay=False, cache=None)
    first = torch.load(out, weights_only=True)
    assert first[kind]["step"] > 0
    towers.fit(kind, POCKET, out, 0.02, decay=True, cache=None)
    second = torch.load(out, weights_only=True)
    assert second[kind]["step"] > first[kind]["step"]
    assert second[kind]["seen"] > first[kind]["seen"]
    tower = "vision_tower" if kind == "see" else "audio_tower"
    for name, tensor in first["towers"].items():
        moved = not torch.equal(tensor, second["towers"][name])
        if moved:
            assert name.startswith((tower, f"embed_{'vision' if kind == 'see' else 'audio'}"))
    assert any(
        not torch.equal(t, second["towers"][n]) for n, t in first["towers"].items() if tower in n
    )


def test_distance_counts_insertions_deletions_and_replacements() -> None:
    assert towers._distance([1, 2, 3], [1, 2, 3]) == 0
    assert towers._distance([1, 3], [1, 2, 3]) == 1
    assert towers._distance([], [1, 2]) == 2
    assert towers._distance([4, 2, 3, 3], [1, 2, 3]) == 2
