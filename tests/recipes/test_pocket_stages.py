"""A stage of training: whole conversations of a set, with their media, weighed anew."""

import json
from pathlib import Path

import numpy as np
import pytest
from recipes.pocket import generator, pictures, speech
from recipes.pocket.stages import HEAVIEST, STAGES, Stage, choose

from gemsmith.errors import TrainError
from gemsmith.train.data import TokenSet
from gemsmith.train.media import SOUND, MediaWriter, Medium

SOFT = 9
TALKS = 40


@pytest.fixture
def data(tmp_path: Path) -> TokenSet:
    """Talks of two kinds in turn: of text, and with a sound that tells which it is."""
    folder = tmp_path / "all"
    folder.mkdir()
    ids, offsets = [], [0]
    with MediaWriter(folder, "train") as writer:
        for number in range(TALKS):
            talk = [2, 100 + number, 1]
            if number % 2:
                medium = Medium(SOUND, bytes([number, 0]) * 4, at=2, tokens=2)
                writer.add(medium, start=len(ids))
                talk = [2, 100 + number, SOFT, SOFT, 1]
            ids += talk
            offsets.append(len(ids))
    np.save(folder / "train.ids.npy", np.array(ids, np.uint16))
    np.save(folder / "train.mask.npy", np.array(ids, np.uint8) * 0 + 10)
    np.save(folder / "train.offsets.npy", np.array(offsets))
    kinds = {"names": ["text", "sound"], "kinds": [number % 2 for number in range(TALKS)]}
    (folder / "train.kinds.json").write_text(json.dumps(kinds))
    return TokenSet(folder, "train")


def chosen(data: TokenSet, out: Path, stage: Stage) -> TokenSet:
    choose([data], out, stage)
    return TokenSet(out, "train")


def test_whole_talks_are_kept_with_their_media(data: TokenSet, tmp_path: Path) -> None:
    part = chosen(data, tmp_path / "part", Stage({"sound": 0.6}, 0.4, {}))
    numbers = [int(part.ids[start + 1]) - 100 for start in part.offsets[:-1]]
    assert 0 < len(numbers) < TALKS
    assert numbers == sorted(set(numbers))
    assert {part.kind_names[k] for k in part.kinds} == {"text", "sound"}
    assert part.media is not None
    assert data.media is not None
    for place, number in enumerate(numbers):
        there, here = (
            each.ids[each.offsets[c] : each.offsets[c + 1]].tolist()
            for each, c in ((data, number), (part, place))
        )
        assert there == here
        assert list(part.media.of(place)) == list(data.media.of(number))


def test_a_kind_may_be_all_there_is_and_weigh_more(data: TokenSet, tmp_path: Path) -> None:
    part = chosen(data, tmp_path / "text", Stage({"text": 1.0}, 0.0, {"text": 5}))
    assert len(part) == TALKS // 2
    assert part.media is None
    assert set(part.mask.tolist()) == {50}
    part = chosen(data, tmp_path / "heavy", Stage({}, 1.0, {"sound": 26}))
    assert set(part.mask.tolist()) == {10, HEAVIEST}


def test_a_stage_of_several_sets_has_them_one_after_another(data: TokenSet, tmp_path: Path) -> None:
    sounds = chosen(data, tmp_path / "sounds", Stage({"sound": 1.0}, 0.0, {}))
    choose([sounds, data], tmp_path / "both", Stage({"text": 1.0}, 1.0, {"text": 2}))
    both = TokenSet(tmp_path / "both", "train")
    half = TALKS // 2
    assert len(both) == half + TALKS
    assert both.media is not None
    assert sounds.media is not None
    assert data.media is not None
    for c in range(len(both)):
        there, old = (sounds, c) if c < half else (data, c - half)
        assert there.media is not None
        assert list(both.media.of(c)) == list(there.media.of(old))
        assert both.kind_names[both.kinds[c]] == there.kind_names[there.kinds[old]]
        ids, mask = (
            part[both.offsets[c] : both.offsets[c + 1]].tolist() for part in (both.ids, both.mask)
        )
        assert ids == there.ids[there.offsets[old] : there.offsets[old + 1]].tolist()
        assert set(mask) == {10 if len(ids) == 5 else 20}


def test_what_a_set_has_not_cannot_be_chosen(data: TokenSet, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"train: no conversations of the kinds \['smell'\]"):
        choose([data], tmp_path / "part", Stage({"smell": 1.0}, 1.0, {}))
    with pytest.raises(TrainError, match=f"^nothing is kept of {2 * TALKS} conversations"):
        choose([data, data], tmp_path / "part", Stage({}, 0.0, {}))


def test_stages_name_kinds_that_are_made() -> None:
    made = {f"picture/{kind}" for kind in (*pictures.KINDS, "sheet")} | {
        f"speech/{k}" for k in speech.KINDS
    }
    made |= {"film", *generator.KINDS}
    for stage in STAGES.values():
        assert stage.shares.keys() | stage.weights.keys() <= made
        assert all(0 <= share <= 1 for share in [stage.rest, *stage.shares.values()])
