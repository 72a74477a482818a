"""Prefixes on disk: found by another process, one's own alone, whole or not at all, bounded."""

import hashlib
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.cache.test_prefix import BLOCK, MODELS, Conversation, found, kept, new_cache

from gemsmith.cache import stored
from gemsmith.cache.paged import PagedCache
from gemsmith.cache.prefix import Chain, Miss, PrefixCache
from gemsmith.cache.stored import Store, extended, identity, private_folder
from gemsmith.errors import ConfigError
from gemsmith.testing import SIZES


def store_of(folder: Path, model: str = "a", max_bytes: int = 10**9) -> Store:
    return Store(folder, model, max_bytes=max_bytes, block_tokens=BLOCK)


def filled(size: str = "E2B", **changes) -> PagedCache:
    """A cache in which every slot has other values."""
    cache = new_cache(size, **changes)
    for slots in cache.slots.values():
        for tensor in slots.tensors.values():
            tensor.copy_(torch.randn(tensor.shape))
    return cache


def keep_on_disk(store: Store, keys, *lengths: int, salt: str = "") -> None:
    """What a process does that keeps prefixes and ends."""
    cache = filled()
    kept(cache, PrefixCache(cache, store=store), keys, *lengths, salt=salt)
    store.close()


def found_on_disk(store: Store, keys, salt: str = "") -> tuple[int, Miss | None]:
    """What a process that has nothing in memory finds."""
    cache = new_cache()
    return found(cache, PrefixCache(cache, store=store), keys, salt)


def files(folder: Path) -> list[Path]:
    """The stored ones, the oldest first."""
    return sorted(folder.glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("size", SIZES)
def test_another_process_finds_the_same_bits(size, tmp_path):
    """In the midst of blocks and at their ends, with windows that begin before a parent ends."""
    first, store = filled(size), store_of(tmp_path)
    said, prefix = Conversation(first, range(45)).compute(), PrefixCache(first, store=store)
    for length in (9, 17, 20, 21, 42):
        assert said.keep(prefix, length)
    store.close()
    for length in (9, 17, 20, 21, 42):
        second = filled(size)
        again = PrefixCache(second, store=store_of(tmp_path))
        result = again.find(range(length + 1), Chain("", BLOCK))
        assert (result.pages.length, result.miss) == (length, None)
        shared = first.blocks.share(said.pages, length)
        # Of sliding layers no more than the window is held.
        assert [pages.sliding.first for pages in again.pages()] == [shared.sliding.first]
        expected = first.copy_out(shared, 0)
        got = second.copy_out(result.pages, 0)
        assert got.keys() == expected.keys()
        for name, tensor in got.items():
            assert torch.equal(tensor, expected[name]), name
        second.blocks.check([*again.pages(), result.pages])
        second.blocks.release(result.pages)
        # From now on it is in memory.
        assert found(second, again, range(length + 1)) == (length, None)
        assert again.restored == 1


def test_a_conversation_is_stored_once_and_branches_from_any_turn(tmp_path):
    keep_on_disk(store_of(tmp_path), range(40), 16, 30, 38)
    full = next(layer.index for layer in MODELS["E2B"].config.layers if not layer.window)
    tokens = [stored.load_file(path)[f"{full}.v"].shape[0] for path in files(tmp_path)]
    assert sorted(tokens) == sorted([16, 30 - 16, 38 - 30])
    for keys, length in (
        (range(50), 38),
        ([*range(31), 99, 98], 30),
        ([*range(29), 99, 98], 16),  # it parts in the last block, which is not whole
        (range(30), 16),
    ):
        assert found_on_disk(store_of(tmp_path), keys)[0] == length
    other = [*range(30), *range(60, 70)]
    keep_on_disk(store_of(tmp_path), other, 40)
    assert found_on_disk(store_of(tmp_path), [*other, 1])[0] == 40
    assert found_on_disk(store_of(tmp_path), range(50))[0] == 38


def test_a_turn_whose_parent_is_gone_is_stored_anew(tmp_path):
    keep_on_disk(store_of(tmp_path), range(40), 16)
    [parent] = files(tmp_path)
    keep_on_disk(store_of(tmp_path), range(40), 30)
    parent.unlink()
    assert found_on_disk(store_of(tmp_path), range(40))[0] == 0
    keep_on_disk(store_of(tmp_path), range(40), 30)
    assert found_on_disk(store_of(tmp_path), range(40))[0] == 30


def test_another_salt_or_another_model_finds_nothing(tmp_path):
    keep_on_disk(store_of(tmp_path), range(30), 30, salt="anna")
    assert found_on_disk(store_of(tmp_path), range(40), "anna") == (30, None)
    assert found_on_disk(store_of(tmp_path), range(40), "otto") == (0, Miss.NEW)
    assert found_on_disk(store_of(tmp_path, "b"), range(40), "anna") == (0, Miss.NEW)
    assert not [path for path in tmp_path.rglob("*") if path.stat().st_mode & 0o077]


def test_models_are_told_apart_by_their_weights_and_what_else_is_said():
    model = MODELS["E2B"]
    name = identity(model, "int8", 16)
    assert name == identity(model, "int8", 16)
    weight = next(model.parameters())
    with torch.no_grad():
        last = weight.view(-1)[-1].item()
        weight.view(-1)[-1] += 1
        other = identity(model, "int8", 16)
        weight.view(-1)[-1] = last
    assert len({name, other, identity(model, "int8", 32), identity(MODELS["E4B"], "int8", 16)}) == 4


@pytest.mark.parametrize("damage", ["a bit", "cut short", "emptied", "another's"])
def test_what_is_damaged_is_deleted_and_the_turn_before_it_found(tmp_path, caplog, damage):
    keep_on_disk(store_of(tmp_path), range(40), 17, 30)
    store = store_of(tmp_path)
    parent, child = files(tmp_path)  # a parent is written first, and used with its child
    if b'length\\": 17' in child.read_bytes():
        parent, child = child, parent
    data = bytearray(child.read_bytes())
    if damage == "a bit":
        data[-100] ^= 4
    data = {"cut short": data[:-100], "emptied": b"", "another's": parent.read_bytes()}.get(
        damage, data
    )
    child.write_bytes(data)
    with caplog.at_level(logging.WARNING, "gemsmith.cache"):
        assert found_on_disk(store, range(40))[0] == 17
    assert [record.getMessage() for record in caplog.records if str(child) in record.getMessage()]
    assert len(caplog.records) == 1
    assert not child.exists()
    assert parent.exists()


def test_what_is_not_ours_is_left_alone_and_said(tmp_path, caplog):
    keep_on_disk(store_of(tmp_path), range(30), 30)
    own = tmp_path / "a"
    strangers = [own / "notes.txt", own / f"{'0' * 32}.safetensors", own / "x.safetensors"]
    strangers[0].write_text("mine")
    for path in strangers[1:]:
        save_file({"x": torch.zeros(1)}, path)
    fresh, abandoned = own / ".fresh.1", own / ".abandoned.1"
    for path in (fresh, abandoned):
        path.write_bytes(b"part of a file")
    os.utime(abandoned, (0, 0))
    with caplog.at_level(logging.WARNING, "gemsmith.cache"):
        assert found_on_disk(store_of(tmp_path), range(40)) == (30, None)
    assert len(caplog.records) == 3
    assert all(path.exists() for path in (*strangers, fresh))
    assert not abandoned.exists()


def test_the_least_recently_used_goes_and_a_parent_not_before_its_children(tmp_path):
    for first in (0, 100, 200):
        keep_on_disk(store_of(tmp_path), range(first, first + 40), 20, 36)
    assert found_on_disk(store_of(tmp_path), range(50))[0] == 36  # the oldest is used again
    sizes = [path.stat().st_size for path in files(tmp_path)]
    store = store_of(tmp_path, "b", max_bytes=sum(sizes[3:]))
    assert [path.stat().st_size for path in files(tmp_path)] == sizes[3:]
    assert len(store) == 0  # they are another model's
    store = store_of(tmp_path)
    assert found_on_disk(store, range(50))[0] == 36
    assert found_on_disk(store, range(100, 150))[0] == 0
    assert found_on_disk(store, range(200, 250))[0] == 20


def test_what_another_process_has_deleted_is_not_found(tmp_path, caplog):
    keep_on_disk(store_of(tmp_path), range(40), 17, 30)
    store = store_of(tmp_path)
    for path in files(tmp_path):
        path.unlink()
    assert found_on_disk(store, range(40)) == (0, Miss.NEW)
    assert not caplog.records


def test_a_disk_that_is_full_is_said_once_and_nothing_is_found(tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", full)
    store = store_of(tmp_path)
    keep_on_disk(store, range(40), 17, 30)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left on device" in caplog.text
    assert len(store) == len([*(tmp_path / "a").iterdir()]) == 0


def test_what_would_wait_too_long_for_a_slow_disk_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MOST_WAITING", 1000)
    store = store_of(tmp_path)
    keep_on_disk(store, range(40), 30)
    assert files(tmp_path) == []
    assert len(store) == 0


def test_without_room_in_memory_nothing_is_restored(tmp_path):
    keep_on_disk(store_of(tmp_path), range(40), 30)
    cache = new_cache()
    prefix = PrefixCache(cache, store=store_of(tmp_path))
    held = cache.blocks.full.take(cache.blocks.full.free - 3)
    result = prefix.find(range(40), Chain("", BLOCK))
    assert (result.pages.length, result.miss) == (0, Miss.NEW)
    cache.blocks.full.release(held)
    assert found(cache, prefix, range(40))[0] == 30


def test_a_folder_that_cannot_be_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"--prefix-cache .*file.*; name a folder that can be made"
    ):
        private_folder(tmp_path / "file")


def test_digests_stay_those_that_older_files_are_named_by():
    """Of the digest before, and each key spelled out with a comma."""
    keys = [7, "image", ("image", b"\x00")]
    made = hashlib.blake2b(b"before", digest_size=16)
    for key in keys:
        made.update(repr(key).encode() + b",")
    assert extended(b"before", keys) == made.digest()
