"""Held-out items: the files that come with the package, and files that are damaged."""

import gzip
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipes.pocket import build_heldout_media, pictures, speech
from recipes.pocket.words import side

import gemsmith.pocket
from gemsmith.config import AudioConfig, VisionConfig
from gemsmith.errors import RequestError
from gemsmith.evals import items as items_module
from gemsmith.evals.items import Item, held_out, read_items, read_media_items
from gemsmith.evals.scoring import Reply, judge
from gemsmith.media.audio import SAMPLE_RATE, load_audio
from gemsmith.testing import tiny_media_config

TINY = tiny_media_config("E2B")
POCKET = Path(gemsmith.pocket.__path__[0])


def test_items_come_in_one_mixed_order(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(n),
            "category": "copy",
            "messages": [],
            "tools": None,
            "enable_thinking": False,
            "expected": {"type": "answer", "value": n},
        }
        for n in range(50)
    ]
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    first = [i.id for i in read_items(path)]
    assert first == [i.id for i in read_items(path)]
    assert sorted(first, key=int) == [str(n) for n in range(50)]
    assert first != sorted(first, key=int)
    assert [i.id for i in read_items(path, limit=7)] == first[:7]


@pytest.mark.parametrize(
    ("text", "cut", "message"),
    [
        (b'{"id": "1"}', 0, "items.jsonl.gz:1: not an item .KeyError: 'category'"),
        (b"[1]", 0, "1: not an item"),
        (b"\xff", 0, "not a gzipped text file"),
        (b"{}", 6, "not a gzipped text file"),
    ],
)
def test_damaged_items_are_refused(tmp_path: Path, text: bytes, cut: int, message: str) -> None:
    path = tmp_path / "items.jsonl.gz"
    # Compressed in here: gzip writes the time, and a test's name must not differ between runs.
    content = gzip.compress(text)
    path.write_bytes(content[: len(content) - cut])
    with pytest.raises(RequestError, match=message):
        read_items(path)


def test_text_that_is_not_gzipped_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(b"plain")
    with pytest.raises(RequestError, match="not a gzipped text file"):
        read_items(path)


def test_unknown_kinds_missing_files_and_empty_limits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    row = {
        "id": "1",
        "category": "copy",
        "messages": [],
        "tools": None,
        "enable_thinking": False,
        "expected": {"type": "essay", "value": 1},
    }
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(
        RequestError, match="expected type 'essay' with int; allowed are calls, answer"
    ):
        read_items(path)
    with pytest.raises(RequestError, match=r"nothing\.gz does not exist"):
        read_items(tmp_path / "nothing.gz")
    with pytest.raises(RequestError, match="limit 0: at least one item"):
        read_items(limit=0)


# -- pictures and sounds ----------------------------------------------------------------------

ROW = {
    "id": "1",
    "category": "picture_shape",
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.webp", "budget": 70},
                {"type": "text", "text": "What shape is red?"},
            ],
        }
    ],
    "tools": None,
    "enable_thinking": False,
    "expected": {"type": "answer", "value": "star"},
}


def zipped(path: Path, **content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name.replace("__", "."), data)
    return path


def row(**other: Any) -> bytes:
    return json.dumps(ROW | other).encode()


def test_media_are_read_with_their_items(tmp_path: Path) -> None:
    path = zipped(tmp_path / "media.zip", items__jsonl=row(), a__webp=b"picture")
    [item] = read_media_items(path)
    assert item.media == [{"type": "image", "image": b"picture", "budget": 70}]
    assert item.messages[0]["content"][1]["text"] == "What shape is red?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a__webp": b"x"}, "there is no items.jsonl in it"),
        ({"items__jsonl": row()}, "1: not an item .ValueError: 'a.webp' is not in the file"),
        ({"items__jsonl": b"{}"}, "1: not an item .KeyError: 'id'"),
        ({"items__jsonl": b"\xff"}, "not a whole zip file"),
        (
            {"items__jsonl": row(expected={"type": "boxes", "value": [{"box_2d": [1, 2]}]})},
            "1: not an item .*'label'",
        ),
        (
            {"items__jsonl": row(expected={"type": "transcript", "value": 4}), "a__webp": b"x"},
            "1: expected type 'transcript' with int; allowed are calls",
        ),
    ],
)
def test_damaged_media_items_are_refused(
    tmp_path: Path, content: dict[str, bytes], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        read_media_items(zipped(tmp_path / "media.zip", **content))


def test_a_media_file_cut_short_or_changed_or_missing_is_refused(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "media.zip", items__jsonl=row(), a__webp=b"picture").read_bytes()
    path = tmp_path / "damaged.zip"
    for damaged in (b"", b"plain", whole[:-30], whole.replace(b"picture", b"pictura")):
        path.write_bytes(damaged)
        with pytest.raises(RequestError, match="not a whole zip file"):
            read_media_items(path)
    with pytest.raises(RequestError, match=r"nothing\.zip does not exist"):
        read_media_items(tmp_path / "nothing.zip")


def test_a_media_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items_module, "MAX_BYTES", 1000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("items.jsonl", b" " * 1001)
    with pytest.raises(RequestError, match="1001 bytes unpacked, more than 1000"):
        read_media_items(path)


def test_a_model_is_asked_only_what_it_can_take() -> None:
    seeing = replace(TINY, vision_config=VisionConfig(), audio_config=None)
    hearing = replace(TINY, vision_config=None, audio_config=AudioConfig())
    neither = replace(TINY, vision_config=None, audio_config=None)
    whole, nothing = held_out(replace(seeing, audio_config=AudioConfig()))
    text, left_out = held_out(neither)
    assert nothing == {}
    assert not any(item.media for item in text)
    assert len(text) + sum(left_out.values()) == len(whole)
    assert left_out.keys() == {"image", "audio"}
    assert held_out(seeing)[1] == {"audio": left_out["audio"]}
    assert held_out(hearing)[1] == {"image": left_out["image"]}
    first = [item.id for item in held_out(seeing, limit=40)[0]]
    assert first == [item.id for item in held_out(seeing)[0]][:40]
    assert {item.split("_")[0] for item in first} > {"picture", "tool"}
    with pytest.raises(RequestError, match="limit 0: at least one item"):
        held_out(neither, limit=0)


def test_the_shipped_media_are_whole_and_small() -> None:
    assert (POCKET / "heldout_media.zip").stat().st_size <= build_heldout_media.MAX_SIZE
    items = read_media_items()
    assert len({item.id for item in items}) == len(items)
    counts: dict[str, int] = {}
    for item in items:
        counts[item.category] = counts.get(item.category, 0) + 1
    wanted = dict(build_heldout_media.COUNTS)
    read = wanted.pop("picture_read")
    budgets = (70, 140, 280, 560, 1120)
    wanted |= {f"picture_read_{b}": read for b in budgets} | {"speech_reading": 1}
    assert counts == wanted
    for item in items[::37]:
        [part] = item.media
        if part["type"] == "image":
            assert Image.open(io.BytesIO(part["image"])).convert("RGB").width >= 100
            assert part["budget"] in budgets
        else:
            assert load_audio(part["audio"]).max() > 0.05


def test_each_text_to_read_is_asked_at_every_budget_with_the_same_picture() -> None:
    asked: dict[str, set[tuple[bytes, str]]] = {}
    for item in read_media_items():
        if item.category.startswith("picture_read"):
            key = (item.media[0]["image"], item.expected["value"])
            asked.setdefault(item.id.rsplit("-", 1)[1], set()).add(key)
            assert item.category == f"picture_read_{item.media[0]['budget']}"
            assert 4 <= len(item.expected["value"]) <= 8
    assert {len(same) for same in asked.values()} == {1}


def test_the_reading_is_four_minutes_long() -> None:
    [reading] = [item for item in read_media_items() if item.category == "speech_reading"]
    assert 240 <= len(load_audio(reading.media[0]["audio"])) / SAMPLE_RATE <= 250
    assert len(reading.expected["value"].split()) > 400


def test_no_text_or_place_of_an_item_is_on_the_side_of_training() -> None:
    checked = 0
    for item in read_media_items():
        value = item.expected.get("value")
        if item.category.startswith("picture_read"):
            assert "heldout" in (side(value), side(value.lower()))
        elif item.expected["type"] == "transcript":
            assert side(value) == "heldout"
        elif item.category == "picture_box" and " " in value[0]["label"]:
            for one in value:
                y0, x0, y1, x1 = one["box_2d"]
                place = pictures.place((x0, y0, x1, y1), 1000, 1000)
                assert side(f"{one['label']} {place}") == "heldout"
        else:
            continue
        checked += 1
    assert checked > 400


def told(item: Item) -> Reply:
    """The reply that the expectation itself gives."""
    expected, value = item.expected, item.expected.get("value")
    if expected["type"] == "calls":
        return Reply(calls=tuple((call["name"], call["arguments"]) for call in expected["calls"]))
    if expected["type"] in ("json", "boxes"):
        return Reply(json.dumps(value))
    if expected["type"] == "points":
        middles = [
            [(y0 + y1) / 2, (x0 + x1) / 2] for y0, x0, y1, x1 in (b["box_2d"] for b in value)
        ]
        return Reply(
            json.dumps(
                [
                    {"point": middle, "label": one["label"]}
                    for middle, one in zip(middles, value, strict=True)
                ]
            )
        )
    return Reply(str(value))


def test_every_shipped_item_can_be_answered_and_silence_is_never_right() -> None:
    for item in [*read_items(), *read_media_items()]:
        assert judge(item, told(item)) is None, item.id
        assert judge(item, Reply()) is not None, item.id


def few(path: Path) -> bytes:
    counts = {"picture_shape": 3, "picture_read": 1, "picture_call": 1}
    if speech.available():
        counts |= {"speech_call": 1, "speech_digits": 1}
    made = [*build_heldout_media.items(counts)]
    made += [build_heldout_media.reading(seconds=2)] if speech.available() else []
    build_heldout_media.write(path, made)
    return path.read_bytes()


def test_items_are_made_the_same_every_time(tmp_path: Path) -> None:
    assert few(tmp_path / "one.zip") == few(tmp_path / "two.zip")
    assert len(read_media_items(tmp_path / "one.zip")) >= 3 + 5 + 1


def test_pictures_of_items_lose_nothing() -> None:
    picture = pictures.generate("heldout", 5, 1, kind="table").image
    again = Image.open(io.BytesIO(build_heldout_media.webp(picture))).convert("RGB")
    assert again.tobytes() == picture.tobytes()
