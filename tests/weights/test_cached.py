"""Packed weights are kept on disk, and nothing that is wrong there is ever used."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from tests.conftest import needs_extension
from tests.weights.test_convert import SPOILT, floats, logits, with_outliers

from gemsmith.quant.linear import QuantLinear
from gemsmith.quant.packed import Packed
from gemsmith.weights import cached, load, rounding
from gemsmith.weights.convert import Recipe, quantize_checkpoint
from gemsmith.weights.load import load_model, load_towers, quantized_values
from gemsmith.weights.names import PLE_TABLE

pytestmark = needs_extension


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A low-bit checkpoint, all of which is worth a cache that is empty."""
    monkeypatch.setenv("GEMSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached, "LEAST_BYTES", 0)
    quantize_checkpoint(floats(tmp_path / "floats"), tmp_path / "low", Recipe("4"))
    return tmp_path / "low"


def cached_file(folder: Path) -> Path:
    file = cached.cached_file(folder)
    assert file is not None
    return file


@pytest.fixture
def packings(monkeypatch) -> list[str]:
    """Grows by one with every weight that is packed."""
    seen: list[str] = []
    real = Packed.of

    def of(weight):
        seen.append("one")
        return real(weight)

    monkeypatch.setattr(Packed, "of", of)
    return seen


def test_the_second_start_packs_nothing_and_computes_the_same(folder, packings):
    first = logits(load_model(folder)[1])
    assert packings
    packings.clear()
    assert torch.equal(logits(load_model(folder)[1]), first)
    assert not packings
    file = cached_file(folder)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_small_checkpoints_leave_nothing_behind(folder, monkeypatch):
    monkeypatch.setattr(cached, "LEAST_BYTES", 1 << 30)
    load_model(folder)
    assert not cached_file(folder).exists()


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def swap(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[64:128] + data[:64] + data[128:])


DAMAGES = {
    "a bit of the first weight": lambda f: flip(f, 5),
    "a bit of the last scale": lambda f: flip(f, f.stat().st_size - cached.TRAILER.size - 64),
    "two lines change places": swap,
    "the magic": lambda f: flip(f, f.stat().st_size - cached.TRAILER.size),
    "the fingerprint": lambda f: flip(f, f.stat().st_size - cached.TRAILER.size + 20),
    "the digest": lambda f: flip(f, f.stat().st_size - 20),
    "cut short": lambda f: os.truncate(f, f.stat().st_size - 1),
    "empty": lambda f: os.truncate(f, 0),
    "longer": lambda f: f.write_bytes(f.read_bytes() + b"\0"),
    "a folder": lambda f: (f.unlink(), f.mkdir(), shutil.rmtree(f)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(folder, packings, damage):
    first = logits(load_model(folder)[1])
    file = cached_file(folder)
    whole = file.read_bytes()
    DAMAGES[damage](file)
    packings.clear()
    assert torch.equal(logits(load_model(folder)[1]), first)
    assert packings
    assert file.read_bytes() == whole


def test_another_version_or_a_checkpoint_written_anew_is_noticed(folder, packings, monkeypatch):
    load_model(folder)
    packings.clear()
    monkeypatch.setattr(cached, "VERSION", cached.VERSION + 1)
    load_model(folder)
    assert packings
    packings.clear()
    os.utime(folder / "model.safetensors", ns=(0, 12345))
    load_model(folder)
    assert packings


def test_without_room_on_the_disk_it_works_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match=r"No space left on device.: the weights"):
        _, model = load_model(folder)
    assert list(cached_file(folder).parent.iterdir()) == []
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(load_model(folder)[1]), logits(model))


def full(fd: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_cache_that_cannot_be_made_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GEMSMITH_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="Not a directory"):
        load_model(folder)


def test_without_a_place_for_caches_it_works_and_says_so(folder, monkeypatch):
    expected = logits(load_model(folder)[1])
    monkeypatch.setattr(cached.hardware, "cache_folder", lambda: None)
    with pytest.warns(RuntimeWarning, match="no home folder .* set GEMSMITH_CACHE to a folder"):
        assert torch.equal(logits(load_model(folder)[1]), expected)


# -- quantized while loading ------------------------------------------------------------------


@pytest.fixture
def roundings(monkeypatch) -> list[str]:
    """Grows by one with every piece that is quantized."""
    seen: list[str] = []
    real = rounding.quantize

    def quantize(weight, format, **options):
        seen.append(str(format))
        return real(weight, format, **options)

    monkeypatch.setattr(rounding, "quantize", quantize)
    return seen


@pytest.fixture
def source(folder) -> Path:
    """The checkpoint of floats beside the other."""
    return folder.parent / "floats"


def files() -> list[Path]:
    return sorted(cached_file(Path()).parent.glob("*"))


def test_the_second_start_quantizes_nothing_and_computes_the_same(source, roundings):
    first = logits(load_model(source, quant="int4")[1])
    assert roundings
    roundings.clear()
    told: list[int] = []
    config, model = load_model(source, quant="int4", advance=lambda key, n: told.append(n))
    assert torch.equal(logits(model), first)
    # A row of the table on disk is rounded when it is read.
    assert set(roundings) <= {str(Recipe("4").formats(config)[PLE_TABLE])}
    assert sum(told) == quantized_values(config, "int4")
    assert len(files()) == 1


def test_each_recipe_has_a_file_and_so_have_the_towers(folder, tmp_path, roundings):
    source = floats(tmp_path / "media", media=True)
    for _ in range(2):
        roundings.clear()
        for quant in ("int4", "int8"):
            config, _ = load_model(source, quant=quant)
            where = {"device": "cpu", "dtype": torch.float32}
            load_towers(source, config, quant=quant, **where)
        load_model(folder)
    assert not roundings
    assert len(files()) == 5


def test_towers_of_a_low_bit_folder_do_not_take_the_place_of_its_decoder(
    tmp_path, folder, packings
):
    source, low = floats(tmp_path / "media", media=True), tmp_path / "media-low"
    quantize_checkpoint(source, low, Recipe("4"))
    for _ in range(2):
        packings.clear()
        config, _ = load_model(low)
        load_towers(low, config, device="cpu", dtype=torch.float32)
    assert not packings


@pytest.mark.parametrize("damage", ["a bit of the last scale", "cut short", "the fingerprint"])
def test_a_damaged_file_is_quantized_anew(source, roundings, damage):
    first = logits(load_model(source, quant="int4")[1])
    (file,) = files()
    whole = file.read_bytes()
    DAMAGES[damage](file)
    roundings.clear()
    assert torch.equal(logits(load_model(source, quant="int4")[1]), first)
    assert "int4-g32s" in roundings
    assert file.read_bytes() == whole


def test_other_weights_and_another_way_of_rounding_are_noticed(source, roundings, monkeypatch):
    load_model(source, quant="int8")
    for change in (
        lambda: os.utime(source / "model.safetensors", ns=(0, 12345)),
        lambda: monkeypatch.setattr(load, "ROUNDING", load.ROUNDING + 1),
    ):
        change()
        roundings.clear()
        load_model(source, quant="int8")
        assert roundings


def test_without_room_it_is_quantized_at_each_start_and_progress_is_told_once(source, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    told: list[int] = []
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        config, _ = load_model(source, quant="int4", advance=lambda key, n: told.append(n))
    assert sum(told) == quantized_values(config, "int4")
    assert files() == []


def test_a_weight_that_kept_free_scales_is_read_back_so(folder, tmp_path):
    """The recipe alone does not tell: the file does."""
    source = with_outliers(tmp_path / "outliers")
    quantize_checkpoint(source, tmp_path / "outliers-low", Recipe("4"))
    wanted = logits(load_model(tmp_path / "outliers-low")[1])
    for _ in range(2):
        model = load_model(source, quant="int4")[1]
        module = model.get_submodule(SPOILT.removesuffix(".weight"))
        assert isinstance(module, QuantLinear)
        assert str(module.format) == "int4-g32"
        assert torch.equal(logits(model), wanted)
