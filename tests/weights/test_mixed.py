"""A recipe within a budget of bytes: what is chosen, that it fits, and that it pays."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from tests.conftest import needs_extension
from tests.weights.low_bit import floats, growth_with_the_table, low_config, pocket_off_the_grid
from tests.weights.test_calibrate import sequences
from tests.weights.test_convert import (
    Stop,
    contents,
    logits,
    rounded,
    with_float_products,
)

from gemsmith.cache.none import NoCache
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.evals.items import read_items
from gemsmith.quant.formats import Format
from gemsmith.quant.packed import Packed
from gemsmith.quant.quantize import quantize
from gemsmith.testing import assert_close, random_model, tolerance
from gemsmith.text import chat
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.weights import mixed, sensitivity
from gemsmith.weights.convert import PROGRESS, Row, quantize_checkpoint
from gemsmith.weights.load import load_model
from gemsmith.weights.mixed import MEASURED, Option, choose, hull
from gemsmith.weights.recipe import Recipe
from gemsmith.weights.save import save_model
from gemsmith.weights.tensors import read_checkpoint

FORMATS = (Format(2, 32), Format(4, 64), Format(4, 32), Format(8))
ROOM = 300_000
"""Of the tiny models: in the middle between all at 2 bits and all at 8."""


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch) -> None:
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", 64)
    monkeypatch.setattr(sensitivity, "SEQUENCE_TOKENS", 32)


def make(source: Path, target: Path, budget: int, **options) -> list[Row]:
    return quantize_checkpoint(source, target, Recipe("mixed", budget=budget), **options)


def tensor_bytes(folder: Path) -> int:
    """What the files of a checkpoint hold but their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def limits(source: Path, target: Path) -> tuple[int, int]:
    """Bytes of the smallest and of the largest mix."""
    with pytest.raises(ConfigError, match="smallest that this model can be made") as refused:
        make(source, target, 1)
    least = int(str(refused.value).split(" is ")[1].split(" (")[0].replace(",", ""))
    most = sum(row.nbytes for row in quantize_checkpoint(source, target, Recipe("8")))
    return least, most


# -- choosing ---------------------------------------------------------------------------------


def options(generator: random.Random) -> list[Option]:
    """Sizes and harms in no order at all: some options are worse than others in both."""
    return [
        Option(format, generator.randint(1, 60), generator.choice([0.0, generator.random()]))
        for format in FORMATS
    ]


def test_the_choice_is_the_best_for_the_bytes_that_it_takes():
    generator = random.Random(3)
    for _ in range(100):
        units = [((str(n),), options(generator)) for n in range(4)]
        least = sum(min(o.nbytes for o in each) for _, each in units)
        budget = least + generator.randint(0, 80)
        chosen = choose(units, budget)
        used = sum(each.option.nbytes for each in chosen)
        harm = sum(each.option.harm for each in chosen)
        assert used <= budget
        # Up to one step, the one that no longer fitted.
        best = min(
            sum(o.harm for o in each)
            for each in itertools.product(*(o for _, o in units))
            if sum(o.nbytes for o in each) <= budget
        )
        step = max((c.option.harm - c.next.harm for c in chosen if c.next), default=0.0)
        assert best <= harm <= best + step + 1e-12
        if not any(each.next for each in chosen):
            assert harm == pytest.approx(best, abs=1e-12)


def test_no_step_that_was_left_is_better_than_one_taken_and_would_have_fitted():
    generator = random.Random(4)
    for _ in range(100):
        units = [((str(n),), options(generator)) for n in range(6)]
        budget = 150 + sum(min(o.nbytes for o in each) for _, each in units)
        chosen = choose(units, budget)
        left = budget - sum(each.option.nbytes for each in chosen)
        for each in chosen:
            assert each.next is None or each.next.nbytes - each.option.nbytes > left


def test_the_hull_leaves_out_what_no_budget_asks_for():
    a, b, c, d = (
        Option(FORMATS[at], nbytes, harm)
        for at, (nbytes, harm) in enumerate([(10, 8.0), (20, 7.5), (30, 1.0), (40, 1.0)])
    )
    assert hull([d, b, c, a]) == [a, c]


def test_a_unit_whose_step_does_not_fit_takes_no_later_one():
    path = [Option(f, n, h) for f, n, h in zip(FORMATS, (1, 11, 12), (9.0, 1.0, 0.9), strict=False)]
    (chosen,) = choose([(("a",), path)], 5)
    assert chosen.option == path[0]
    assert chosen.next == path[1]
    assert chosen.paid is None


def test_equal_steps_go_by_the_order_of_the_model():
    pair = [Option(Format(4), 1, 1.0), Option(Format(8), 2, 0.5)]
    chosen = choose([(("a",), pair), (("b",), pair)], 3)
    assert [each.option.nbytes for each in chosen] == [2, 1]


# -- converting -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["E2B", "12B", "26B-A4B"])
def test_the_files_hold_what_was_chosen_within_the_budget(tmp_path, monkeypatch, size):
    with_float_products(monkeypatch)
    source, config = floats(tmp_path / "floats", size), low_config(size)
    least, most = limits(source, tmp_path / "wide")
    budget = (least + most) // 2
    rows = make(source, tmp_path / "low", budget, shard_bytes=60_000)
    assert len(list((tmp_path / "low").glob("*.safetensors"))) > 2
    assert budget - 5000 < tensor_bytes(tmp_path / "low") <= budget
    assert tensor_bytes(tmp_path / "low") == sum(row.nbytes for row in rows)
    formats = {row.name: row.format for row in rows if row.format}
    assert len({str(format) for format in formats.values()}) > 2
    for row in rows:
        if row.choice:
            assert row.format == row.choice.option.format
            assert {formats[name] for name in row.choice.unit} == {row.format}
        elif row.format:
            assert row.format.bits == 8
            assert "per_layer" in row.name
    chosen = tuple((row.name, row.format) for row in rows if row.choice and row.format)
    recipe = Recipe("mixed", budget=budget, chosen=chosen)
    _, model = load_model(tmp_path / "low", dtype=torch.float32)
    expected = logits(rounded(config, recipe))
    assert_close(logits(model), expected, tolerance(torch.float32, 64, steps=60))


@needs_extension
def test_the_kernels_take_any_mix(tmp_path, monkeypatch):
    source = floats(tmp_path / "floats")
    rows = make(source, tmp_path / "low", sum(limits(source, tmp_path / "wide")) // 2)
    assert len({row.choice.option.format.bits for row in rows if row.choice}) > 1
    packed = logits(load_model(tmp_path / "low")[1])
    monkeypatch.setattr(Packed, "takes", lambda *_: False)
    plain = logits(load_model(tmp_path / "low")[1])
    # As in test_fuse.py: sums in another order turn a rounding to int8 over now and then.
    error = (packed - plain).norm(dim=1) / plain.norm(dim=1)
    assert error.median() < 1e-4
    assert error.max() < 0.5


def test_the_ends_of_the_range(tmp_path):
    """The smallest budget that is named can be kept, to the byte; a vast one is all in 8 bits."""
    source = floats(tmp_path / "floats")
    least, most = limits(source, tmp_path / "wide")
    rows = make(source, tmp_path / "least", least)
    assert tensor_bytes(tmp_path / "least") == least
    assert {row.format.bits for row in rows if row.choice and row.format} == {2, 4}  # 4: a table
    rows = make(source, tmp_path / "most", 10**9)
    assert tensor_bytes(tmp_path / "most") == most
    assert {row.format.bits for row in rows if row.format} == {8}
    assert all(row.choice.next is None for row in rows if row.choice)
    with pytest.raises(ConfigError, match=rf"{least - 1:,} bytes: the smallest .* is {least:,} "):
        make(source, tmp_path / "none", least - 1)
    assert not (tmp_path / "none").exists()


def test_weights_trained_for_four_bits_stay_there_as_long_as_others_gain(tmp_path):
    config = low_config("12B")
    model = random_model(config, dtype=torch.float32)
    trained = "layers.2.self_attn.o_proj.weight"
    weight = model.get_parameter(trained).data
    weight.copy_(quantize(weight, Format(4, 32)).dequantize())
    save_model(model, config, tmp_path / "floats")
    rows = make(tmp_path / "floats", tmp_path / "low", 10**9)
    formats = {row.name: str(row.format) for row in rows}
    assert formats.pop(trained) == "int4-g32"
    assert "int4-g32" not in formats.values()


def test_data_measures_and_calibrates(tmp_path):
    source = floats(tmp_path / "floats", "12B")
    rows = make(source, tmp_path / "low", 150_000, tokens=sequences())
    assert tensor_bytes(tmp_path / "low") <= 150_000
    below = [row for row in rows if row.format and row.format.bits < 8 and "layers." in row.name]
    assert below
    assert all(row.calibrated for row in below)
    assert json.loads((tmp_path / "low" / MEASURED).read_text())["data"] is True


# -- resuming ---------------------------------------------------------------------------------


def test_a_run_taken_up_again_measures_nothing_and_chooses_the_same(tmp_path, monkeypatch):
    source = floats(tmp_path / "floats")
    whole = make(source, tmp_path / "once", ROOM, shard_bytes=20_000)
    left = [60]

    def advance(name: str, values: int) -> None:
        left[0] -= bool(values)
        if not left[0]:
            raise Stop

    target = tmp_path / "twice"
    with pytest.raises(Stop):
        make(source, target, ROOM, shard_bytes=20_000, advance=advance)
    assert (target / PROGRESS).exists()
    assert not (target / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.delattr(mixed, "sensitivities")
        assert make(source, target, ROOM, shard_bytes=20_000) == whole
    assert contents(target) == contents(tmp_path / "once")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-40],
        lambda text: "[" * 100_000,
        lambda text: "{}",
        lambda text: text.replace("e-", "e+", 1),
    ],
)
def test_a_damaged_record_is_measured_anew(tmp_path, damage):
    source = floats(tmp_path / "floats", "12B")
    make(source, tmp_path / "once", 150_000)
    target = tmp_path / "twice"
    target.mkdir()
    text = (tmp_path / "once" / MEASURED).read_text()
    (target / MEASURED).write_text(damage(text))
    make(source, target, 150_000)
    assert contents(target) == contents(tmp_path / "once")


def test_another_budget_is_another_quantization(tmp_path):
    source, target = floats(tmp_path / "floats"), tmp_path / "low"

    def advance(name: str, values: int) -> None:
        if values and (target / PROGRESS).exists():
            raise Stop

    with pytest.raises(Stop):
        make(source, target, ROOM, shard_bytes=20_000, advance=advance)
    with pytest.raises(WeightsError, match="unfinished quantization of another checkpoint or with"):
        make(source, target, ROOM + 20_000, shard_bytes=20_000)


def test_a_target_of_something_else_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.delattr(mixed, "sensitivities")
    source = floats(tmp_path / "floats")
    with pytest.raises(WeightsError, match="holds a checkpoint already"):
        make(source, source, ROOM)
    (source / "config.json").rename(source / "config")
    source = floats(tmp_path / "other")
    with pytest.raises(WeightsError, match=r"holds model.safetensors, which is not of an unfini"):
        make(source, tmp_path / "floats", ROOM)
    assert not (tmp_path / "floats" / MEASURED).exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"bits": "mixed"}, "bits 'mixed' needs a budget"),
        ({"bits": "mixed", "budget": 0}, "bits 'mixed' needs a budget"),
        ({"bits": "4", "budget": 9}, "a budget is for bits 'mixed', not '4'"),
        ({"bits": "mixed", "budget": 9, "group": 32}, "a mixed recipe chooses groups itself"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe, message):
    with pytest.raises(ConfigError, match=message):
        Recipe(**recipe)


def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """A table of 64 MiB is measured, chosen and written some rows at a time."""
    work = "from gemsmith.weights import sensitivity; sensitivity.PROBE_TOKENS = 256; "
    work += "sensitivity.COMPARED = 8; "
    work += "convert.quantize_checkpoint(at, f'{at}-low', "
    work += "convert.Recipe('mixed', budget=10**9))"
    assert growth_with_the_table(tmp_path, work) < 28 << 10


# -- what it is for ---------------------------------------------------------------------------


def test_pocket_loses_much_less_than_four_bits_lose_in_as_many_bytes(tmp_path):
    source = pocket_off_the_grid(tmp_path / "exact")
    rows = quantize_checkpoint(source, tmp_path / "four", Recipe("4"))
    budget = sum(row.nbytes for row in rows)
    make(source, tmp_path / "mixed", budget)
    assert tensor_bytes(tmp_path / "mixed") <= tensor_bytes(tmp_path / "four") == budget
    tokenizer = Tokenizer.load(source)
    prompts = [
        chat.encode(item.messages, item.tools, tokenizer, variant="edge")
        for item in read_items()[::150]
    ]
    ids = torch.tensor([id for prompt in prompts for id in prompt])
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])

    def log_probabilities(folder: Path) -> torch.Tensor:
        config, model = load_model(folder, dtype=torch.float32)
        kv = NoCache(config.text_config, [len(prompt) for prompt in prompts])
        return model.logits(model(ids, positions, kv)).log_softmax(-1)

    clean = log_probabilities(source)
    four, mix = (
        (clean.exp() * (clean - log_probabilities(tmp_path / name))).sum(-1).mean().item()
        for name in ("four", "mixed")
    )
    assert 0 < mix < 0.6 * four  # 0.54; of the checkpoint before this one 0.38


def test_the_record_is_not_taken_for_one_of_other_weights(tmp_path):
    """Neither copied to a checkpoint made from this one nor read for another source."""
    source = floats(tmp_path / "floats", "12B")
    (source / MEASURED).write_text("{}")
    quantize_checkpoint(source, tmp_path / "low", Recipe("8"))
    assert not (tmp_path / "low" / MEASURED).exists()
    assert len(read_checkpoint(tmp_path / "low")) > 50
