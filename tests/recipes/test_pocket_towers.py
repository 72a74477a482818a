"""Labels of soft tokens say what stands there, and a stretch of teaching can be gone on with."""

import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.pocket import drawing, letters, pictures, seeing, towers
from recipes.pocket.train import POCKET as CONFIG
from recipes.pocket.train import VISION, init_towers

from gemsmith.media.image import patches, target_size
from gemsmith.model.towers import Towers
from gemsmith.weights.hub import resolve

POCKET = resolve("pocket")
CELL_END = float(letters.CELL)


def read(labels: np.ndarray) -> str:
    """Letters of a row of labels; _ is an empty place, ? one that is not judged."""
    return "".join("?_"[n + 1] if n < 1 else letters.LETTERS[n - 1] for n in labels.flatten())


SIDE_BY_SIDE = np.array([[0, 0], [1, 0]])
"""Columns and rows of two soft tokens."""


def silent(tokens: int, boxes: int) -> np.ndarray:
    """What a tower says that has not learned a letter."""
    return np.zeros((tokens, boxes, len(letters.LETTERS) + 1))


def tokens_of(written: letters.Written, cells_S2: np.ndarray) -> np.ndarray:
    return letters.of_tokens(written, cells_S2, silent(len(cells_S2), letters.HALVES))


def test_letters_are_labelled_in_order_and_by_line() -> None:
    """Two soft tokens side by side, a line in the upper half of both and one in the lower."""
    noted = [("A", 5.0, 10.0), ("b", 30.0, 10.0), (" ", 42.0, 10.0), ("C", 53.0, 10.0)]
    noted += [("x", 44.0, 30.0), ("y", 52.0, 30.0)]
    written = letters.written(noted, (1.0, 1.0))
    assert [[read(half) for half in token] for token in tokens_of(written, SIDE_BY_SIDE)] == [
        ["Ab __", "x____"],
        ["C____", "y____"],
    ]
    # Stretched to twice its width only the first letters are left in the first soft token.
    stretched = letters.written(noted, (2.0, 1.0))
    assert read(tokens_of(stretched, SIDE_BY_SIDE)[0, 0]) == "A____"
    # Patches: 3 x 3 of a soft token, the first row of each.
    patches_SPN = letters.of_patches(written, SIDE_BY_SIDE, silent(2, letters.POOL**2))
    assert [[read(each) for each in token[:3]] for token in patches_SPN] == [
        ["A_", "b_", " _"],
        ["C_", "__", "__"],
    ]


def test_a_letter_on_a_border_belongs_to_the_side_that_says_it_louder() -> None:
    """Once to one of the two, wherever its middle lies, and what follows it stands after it."""
    written = letters.written([("A", 20.0, 10.0), ("B", 46.0, 10.0), ("C", 49.5, 10.0)], (1, 1))
    b, c = (letters.LETTERS.index(letter) + 1 for letter in "BC")
    for loud, expected in (
        ({(0, b): 0.6, (1, b): 0.4}, ["AB___", "C____"]),
        ({(0, b): 0.4, (1, b): 0.6}, ["A____", "BC___"]),
        ({(0, b): 0.9, (0, c): 0.9}, ["ABC__", "_____"]),
        # Not C before B.
        ({(1, b): 0.9, (0, c): 0.9}, ["A____", "BC___"]),
    ):
        said = silent(2, letters.HALVES)
        for (token, letter), how in loud.items():
            said[token, 0, letter] = how
        said[1, 0, c] = max(said[1, 0, c], 0.1)
        labels = letters.of_tokens(written, SIDE_BY_SIDE, said)
        assert [read(token[0]) for token in labels] == expected
    # Further away than CLOSE there is nothing to choose.
    said[1, 0] = 1.0
    far = letters.written([("B", CELL_END - letters.CLOSE - 0.1, 10.0)], (1, 1))
    assert read(letters.of_tokens(far, SIDE_BY_SIDE, said)[0, 0]) == "B____"


def test_a_line_between_two_halves_stays_whole() -> None:
    """In the half that says its letters louder, all in all, though one of them be softer."""
    written = letters.written([("A", 20.0, 25.0), ("B", 80.0, 25.0)], (1, 1))
    a, b = (letters.LETTERS.index(letter) + 1 for letter in "AB")
    for upper_a, upper_b, expected in (
        (0.9, 0.1, ["A____", "B____"]),
        (0.3, 0.9, ["A____", "B____"]),
        (0.3, 0.3, ["_____", "_____"]),
    ):
        said = silent(2, letters.HALVES)
        said[0, 0, a], said[0, 1, a] = upper_a, 0.4
        said[1, 0, b], said[1, 1, b] = upper_b, 0.4
        labels = letters.of_tokens(written, SIDE_BY_SIDE, said)
        assert [read(token[0]) for token in labels] == expected
        assert read(labels).replace("_", "") == "AB"


def test_letters_outside_of_what_is_seen_are_left_out() -> None:
    noted = [("A", -20.0, 10.0), ("B", 150.0, 10.0), ("C", 20.0, -9.0), ("D", 20.0, 99.0)]
    noted += [("E", 1.0, 10.0)]
    assert read(tokens_of(letters.written(noted, (1, 1)), SIDE_BY_SIDE)) == "E".ljust(20, "_")
    assert read(tokens_of(letters.written([], (1, 1)), SIDE_BY_SIDE)) == "_" * 20


def test_lines_too_close_to_tell_apart_are_not_judged() -> None:
    written = letters.written([("A", 5.0, 5.0), ("B", 6.0, 15.0)], (1.0, 1.0))
    labels = tokens_of(written, SIDE_BY_SIDE[:1])
    assert [read(half) for half in labels[0]] == ["?????", "_____"]


def in_rows(values_SPC: np.ndarray, columns: int) -> np.ndarray:
    """Patches row by row, as the media code has them, from those of soft tokens."""
    grid = values_SPC.reshape(-1, columns, 3, 3, values_SPC.shape[-1])
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, values_SPC.shape[-1])


def test_letters_of_pictures_are_labelled_where_their_ink_is() -> None:
    """A page's letters stand in its soft tokens; patches of a letter have more ink than others."""
    for index in range(6):
        picture = pictures.generate("train", 3, index, kind="page")
        size = target_size(*picture.image.size, 70)
        shown = towers.shown(picture.image, size)
        made = patches(picture.image, 70)
        values = in_rows(shown.values_SPC, size[0] // letters.CELL)
        assert np.array_equal(np.float32(values) * np.float32(1 / 255), made.values)
        labels = tokens_of(shown.written, shown.cells_S2)
        assert len(labels) == made.soft_tokens
        text = picture.messages[1]["content"]
        found = read(labels).replace("_", "").replace("?", "")
        assert len(found) > 0.9 * len(text.replace("\n", ""))
        assert set(found) <= set(text)
        ink = np.ptp(shown.values_SPC, axis=2)
        quiet = silent(len(shown.cells_S2), letters.POOL**2)
        first = letters.of_patches(shown.written, shown.cells_S2, quiet)[..., 0]
        assert ink[first > 1].mean() > 1.4 * ink[first == 0].mean()


def test_sheets_are_full_of_letters() -> None:
    side = letters.SIDE * letters.CELL
    for index in range(8):
        image = letters.sheet(1, index)
        shown = towers.shown(image, (side, side))
        assert (tokens_of(shown.written, shown.cells_S2) > 0).sum() >= 8
        assert all(0 <= x < image.width for _, x, _ in image.info["letters"])


def test_sheets_lie_at_any_place_that_a_patch_can_have() -> None:
    side = letters.SIDE * letters.CELL
    one = towers.shown(letters.sheet(1, 0), (side, side))
    lesson = towers.of_sheets([one] * 200, np.random.default_rng(0))
    inside = lesson.places_BP2 - lesson.positions_BP2
    assert (inside == inside[:, :1]).all()
    assert (inside % letters.POOL == 0).all()
    assert lesson.places_BP2.min() < 12
    assert VISION.position_embedding_size - 12 <= lesson.places_BP2.max()
    assert lesson.places_BP2.max() < VISION.position_embedding_size
    assert lesson.positions_BP2.max() == 3 * letters.SIDE - 1


def seen_together(made: Towers, lesson: towers.Lesson) -> torch.Tensor:
    with torch.no_grad():
        rows_BSD, _ = seeing.see(
            made,
            torch.from_numpy(lesson.values_BPC) / 255,
            torch.from_numpy(lesson.places_BP2),
            torch.from_numpy(lesson.positions_BP2),
            torch.from_numpy(lesson.bias_BP),
        )
    return rows_BSD


def seen_alone(made: Towers, image: Image.Image, budget: int) -> torch.Tensor:
    alone = patches(image, budget)
    with torch.no_grad():
        return made.see(
            torch.from_numpy(alone.values), torch.from_numpy(alone.positions), [len(alone.values)]
        )


def test_seeing_together_gives_what_the_towers_give_one_by_one() -> None:
    made = Towers(CONFIG)
    init_towers(made, 3)
    images = [pictures.generate("train", 3, 1, kind=kind).image for kind in ("page", "scene")]
    seen = [towers.shown(image, target_size(*image.size, 70)) for image in images]
    for rows, image in zip(seen_together(made, towers.of_pictures(seen)), images, strict=True):
        alone = seen_alone(made, image, 70)
        torch.testing.assert_close(rows[: len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_of_a_large_picture_all_letters_are_kept_and_a_little_paper_stands_for_the_rest() -> None:
    image = pictures.generate("train", 3, 2, kind="read", budget=560).image
    whole = towers.shown(image, target_size(*image.size, 560))
    part = towers.part_of(whole, np.random.default_rng(0))
    assert len(part.cells_S2) == 70
    assert part.count_S.sum() == pytest.approx(len(whole.cells_S2))
    everything, kept = (tokens_of(each.written, each.cells_S2) for each in (whole, part))
    has = (everything > 0).any(axis=(1, 2))
    assert 0 < has.sum() < 60
    chosen = {tuple(cell): labels for cell, labels in zip(part.cells_S2, kept, strict=True)}
    for cell, labels in zip(whole.cells_S2[has], everything[has], strict=True):
        assert np.array_equal(chosen[tuple(cell)], labels)
    assert (part.count_S[(kept > 0).any(axis=(1, 2))] == 1).all()


def test_a_large_picture_of_which_no_letter_is_judged_is_seen_in_part_all_the_same() -> None:
    whole = towers.shown(Image.new("RGB", (1200, 900), "white"), (1200, 912))
    part = towers.part_of(whole, np.random.default_rng(0))
    assert len(part.cells_S2) == 70
    assert part.count_S.sum() == pytest.approx(len(whole.cells_S2))


def test_a_soft_token_that_stands_for_two_counts_as_two() -> None:
    made = Towers(CONFIG)
    init_towers(made, 3)
    image = pictures.generate("train", 3, 0, kind="page").image
    whole = towers.shown(image, target_size(*image.size, 70))

    def some(chosen: list[int], counts: list[int]) -> towers.Shown:
        labels = {f.name: getattr(whole.labels, f.name)[chosen] for f in fields(towers.Labels)}
        return towers.Shown(
            whole.values_SPC[chosen],
            whole.cells_S2[chosen],
            np.array(counts),
            towers.Labels(**labels),
            whole.written,
        )

    lesson = towers.of_pictures([some([8, 9, 9], [1, 1, 1]), some([8, 9], [1, 2])])
    twice, counted = seen_together(made, lesson)
    torch.testing.assert_close(twice[:2], counted[:2], rtol=1e-4, atol=1e-4)


def test_what_fills_up_a_picture_is_not_judged() -> None:
    image = pictures.generate("train", 3, 0, kind="scene").image
    one = towers.shown(image, target_size(*image.size, 70))
    lesson = towers.of_pictures([one])
    for field in fields(towers.Labels):
        own, filled = getattr(one.labels, field.name), getattr(lesson.labels, field.name)
        assert np.array_equal(filled[: len(own)], own)
        assert (filled[len(own) :] == letters.UNJUDGED).all()
        assert len(filled) == 70


def test_things_are_labelled_in_the_soft_tokens_they_cover() -> None:
    for kind in ("scene", "buttons"):
        for index in range(6):
            image = pictures.generate("train", 3, index, kind=kind).image
            width, height = target_size(*image.size, 70)
            labels = towers.labels_of(image, (width, height))
            columns = width // letters.CELL
            for thing in image.info["things"]:
                left, top, right, bottom = thing.box
                x = (left + right) / 2 * width / image.width / letters.CELL
                y = (top + bottom) / 2 * height / image.height / letters.CELL
                cell = int(y) * columns + int(x)
                assert labels.color_S[cell] == towers.COLORS.index(thing.color) + 1
                assert labels.shape_S[cell] == towers.SHAPES.index(thing.name) + 1
                box = pictures.thousandths(thing.box, *image.size)
                assert (10 * labels.box_S4[cell]).tolist() == box
                assert labels.middle_S[cell] == 1
            assert labels.middle_S.sum() == len(image.info["things"])
            assert (labels.color_S == 0).any()


def test_every_letter_that_is_written_has_a_number() -> None:
    for kind in ("page", "read", "table", "buttons"):
        for index in range(20):
            picture = pictures.generate("train", 5, index, kind=kind)
            written = {letter for letter, _, _ in picture.image.info["letters"]}
            assert written <= set(letters.LETTERS), (kind, written - set(letters.LETTERS))
    assert set(drawing.COLORS) == set(towers.COLORS)


def test_shapes_weigh_little_until_letters_are_known() -> None:
    made = Towers(CONFIG)
    init_towers(made, 1)
    head = towers.Eyes(towers.Decoder(POCKET))
    image = pictures.generate("train", 3, 0, kind="scene").image
    lesson = [towers.of_pictures([towers.shown(image, target_size(*image.size, 70))])]
    early, late = (
        towers.see_step(made, head, [(step, lesson)])[0].item()
        for step in (towers.LETTERS_FIRST - 1, towers.LETTERS_FIRST)
    )
    assert early < 0.7 * late


def test_fresh_towers_are_those_of_the_checkpoint_where_shapes_agree() -> None:
    decoder = towers.Decoder(POCKET)
    made = Towers(CONFIG)
    init_towers(made, 1)
    fresh = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    towers.begin(made, decoder)
    assert decoder.towers is not None
    theirs = decoder.towers.state_dict()
    for name, tensor in made.state_dict().items():
        same = name in theirs and theirs[name].shape == tensor.shape
        if name.startswith(("audio", "embed_audio")):
            assert torch.equal(tensor, theirs[name])
        elif name.endswith("embedding_projection.weight") and not same:
            torch.testing.assert_close(tensor, fresh[name] * decoder.length)


@pytest.mark.parametrize("kind", ["see", "hear"])
def test_teaching_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, kind) -> None:
    if kind == "hear" and shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    monkeypatch.setattr(towers, "SHEETS", 2)
    monkeypatch.setattr(towers, "PICTURES", 1)
    monkeypatch.setattr(towers, "SHEETS_ALONE", 1)
    monkeypatch.setattr(torch, "compile", lambda made, **_: made)  # it takes a minute
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
