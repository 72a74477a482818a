from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import media
from gemsmith.media import image


def test_ours_and_transformers_make_the_same_patches_of_one_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "PHOTO", (400, 300))
    subjects = list(media.images(tmp_path))
    assert [s.name.rpartition(", ")[2] for s in subjects] == ["280", "1120"]
    for subject in subjects:
        assert set(subject.peers) | set(subject.missing) == {
            "Transformers, torchvision",
            "Transformers, Pillow",
        }
        assert subject.ours().soft_tokens <= int(subject.name.rpartition(", ")[2])  # pyright: ignore
        times = media.timed(subject, 1)
        assert list(times) == ["gemsmith", *subject.peers, "floor"]


def test_ours_and_transformers_hear_and_see_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "CLIP_SECONDS", 1)
    monkeypatch.setattr(media, "FILM", (96, 64))
    monkeypatch.setattr(media, "FILM_SECONDS", 2)
    for subject in (*media.sounds(tmp_path), *media.videos(tmp_path)):
        assert len(subject.peers) == 1
        assert list(media.timed(subject, 1)) == ["gemsmith", *subject.peers, "floor"]
    with pytest.raises(SystemExit, match="frames differ from those of Transformers; nothing was"):
        media.check_equal("frames", np.zeros(3), np.ones(3))


@pytest.mark.parametrize("wrong", ["values", "positions"])
def test_nothing_is_timed_where_the_results_differ(wrong: str) -> None:
    ours = image.patches(media.photo(60, 40), 70)
    theirs: dict[str, Any] = {
        "pixel_values": ours.values[None] + np.float32(1 / 255),
        "image_position_ids": ours.positions[None],
    }
    media.check_patches("peer", ours, theirs)
    if wrong == "values":
        theirs["pixel_values"][0, -1, -1] += 3 / 255
    else:
        theirs["image_position_ids"] = theirs["image_position_ids"][:, :, ::-1]
    with pytest.raises(SystemExit, match=r"peer: patches differ by .* nothing was timed"):
        media.check_patches("peer", ours, theirs)


def test_a_line_has_the_ratio_to_the_peer_and_names_who_is_missing() -> None:
    subject = media.Subject(
        name="a photo",
        ours=lambda: None,
        peers={"peer": lambda: None},
        missing={"other": "not installed"},
        floor=lambda: None,
    )
    run = {"min": 0.01, "max": 0.04, "n": 5}
    times = {
        "gemsmith": {"median": 0.02, **run},
        "peer": {"median": 0.03, **run},
        "floor": {"median": 0.01, **run},
    }
    name, ours, peer, floor, other = media.lines(subject, times)
    assert name == "a photo"
    assert "20.0 ms (10.0-40.0, n=5)   2.00x the floor" in ours
    assert "3.00x the floor   ours is 1.50x as fast (must reach 1.0)" in peer
    assert "10.0 ms" in floor
    assert other.split() == ["other", "missing:", "not", "installed"]
