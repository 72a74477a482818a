"""A whole pass in one native call gives the bits of its parts one by one."""

from typing import Any

import pytest
import torch
from tests.conftest import needs_extension
from tests.weights.test_fuse import packed_model
from torch import Tensor, nn

from gemsmith import sizing
from gemsmith.cache.block_pool import Pages
from gemsmith.cache.paged import Chunk, PagedCache
from gemsmith.cache.ring import RingCache
from gemsmith.config import Gemma4Config
from gemsmith.errors import WeightsError
from gemsmith.model.text import TextModel
from gemsmith.ops import native
from gemsmith.ops.cpu_decoder import Decoder, Seen, Sight, Stores
from gemsmith.ops.rotary import Angles, table
from gemsmith.quant.formats import Format
from gemsmith.testing import tiny_config, whole_groups
from gemsmith.weights import fuse as fuse_module
from gemsmith.weights.fuse import fuse

pytestmark = needs_extension

WINDOW, SKIPPED = 8, torch.tensor([0, 5, 317])
PASSES = (
    # (sequence, tokens, asks) of each: prompts, replies, guesses, some that ask nothing.
    [(0, 5, 1), (1, 3, 0)],
    [(0, 1, 1), (1, 14, 1)],
    [(0, 1, 1), (1, 1, 1), (2, 40, 0)],
    [(0, 4, 4), (2, 2, 1), (1, 1, 1)],
    [(2, 9, 3), (0, 1, 1)],
    [(1, 7, 0)],
    [(0, 3, 3)],
    [(0, 1, 1), (1, 1, 1), (2, 1, 1)],
)
"""The window is 8."""


def config_of(size: str = "E2B") -> Gemma4Config:
    return whole_groups(tiny_config(size, vocab_size=320, sliding_window=WINDOW))


def fused(config: Gemma4Config, format: Format | None = None) -> TextModel:
    model = packed_model(config, format or Format(4, 32))
    fuse(model)
    return model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the passes that went through in one call."""
    calls: list[int] = []
    read = Decoder.read

    def noted(self: Decoder, ids: list[int], *args: Any, **options: Any) -> Any:
        calls.append(len(ids))
        return read(self, ids, *args, **options)

    monkeypatch.setattr(Decoder, "read", noted)
    return calls


def paged(model: TextModel, config: Gemma4Config, dtype: torch.dtype = torch.int8) -> list[Tensor]:
    """Hidden states and greatest logits of the passes above, then all that was stored."""
    plan = sizing.kv_plan(
        config.text_config,
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        bytes_per_value=dtype.itemsize,
        block_tokens=4,
    )
    cache = PagedCache(config.text_config, plan, dtype=dtype, k_from_v=model.k_from_v)
    pages = [Pages() for _ in range(3)]
    results: list[Tensor] = []
    for number, parts in enumerate(PASSES):
        for at, tokens, _ in parts:
            cache.blocks.extend(pages[at], tokens)
        ids = [(7 * i * (at + 3) + number) % 300 + 6 for at, n, _ in parts for i in range(n)]
        step = cache.step([Chunk(pages[at], tokens) for at, tokens, _ in parts])
        results += asked(model, ids, [(n, asks) for _, n, asks in parts], step)
        for at, tokens, _ in parts:
            cache.blocks.commit(pages[at], tokens)
    for at, each in enumerate(pages):
        results += [each for _, each in sorted(cache.copy_out(pages[at], 0).items())]
        assert each.length
    return results


def alone(model: TextModel, config: Gemma4Config) -> list[Tensor]:
    """The same of one sequence, through a ring that turns."""
    cache = RingCache(config.text_config, dtype=torch.int8, k_from_v=model.k_from_v)
    results: list[Tensor] = []
    for number, tokens in enumerate((5, 1, 1, 1, 1, 1, 3, 1, 12, 2, 1)):
        with cache.step(tokens):
            ids = [(7 * i + 11 * number) % 300 + 6 for i in range(tokens)]
            results += asked(model, ids, [(tokens, 1)], cache)
    kept = (t for layer in cache._layers.values() for t in layer.tensors.values())
    return [*results, *(t[: cache.length] for t in kept)]


def asked(model: TextModel, ids: list[int], parts: list[tuple[int, int]], kv: Any) -> list[Tensor]:
    with torch.inference_mode():
        hidden_RD, found = model.read(ids, parts, kv, count=5, skipped=SKIPPED)
        if found is None:
            found = model.likeliest(hidden_RD, 5, SKIPPED)
    assert found is not None
    return [hidden_RD, *map(torch.from_numpy, found)]


def parts_of(model: TextModel) -> TextModel:
    """The same model, a part at a time."""
    model.native = None
    return model


def check(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(one, other), f"number {number}"


STEPPED = Format(4, 32, steps=True)


@pytest.mark.parametrize(
    ("size", "format"), [("E2B", None), ("E4B", None), ("E2B", STEPPED), ("E4B", STEPPED)]
)
def test_a_pass_over_several_sequences_gives_the_bits_of_its_parts(size, format, counted):
    config = config_of(size)
    model = fused(config, format)
    found = paged(model, config)
    assert len(counted) == len(PASSES)
    check(found, paged(parts_of(model), config))
    assert len(counted) == len(PASSES)


def test_a_token_of_one_sequence_gives_the_bits_of_its_parts(counted):
    config = config_of()
    model = fused(config)
    found = alone(model, config)
    assert counted == [1] * 7
    check(found, alone(parts_of(model), config))


@pytest.mark.parametrize("format", [None, STEPPED])
@pytest.mark.parametrize("isa", native.isas())
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(isa, format, monkeypatch):
    config = config_of()
    model = fused(config, format)
    native.force_isa("generic")
    monkeypatch.setattr(native, "threads", lambda: 1)
    wanted = paged(model, config)
    try:
        native.force_isa(isa)
        for threads in (1, 2):
            monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
            check(paged(model, config), wanted)
    finally:
        native.force_isa(None)


def test_rows_of_a_large_table_are_handed_in(monkeypatch, counted):
    config = config_of()
    monkeypatch.setattr(fuse_module, "KEPT_TABLE", 0)
    model = fused(config)
    assert model.native is not None
    assert model.native.needs_rows
    found = paged(model, config)
    assert len(counted) == len(PASSES)
    check(found, paged(parts_of(model), config))


def test_a_projection_of_bfloat16_is_for_few_tokens(counted):
    config = config_of()
    model: Any = packed_model(config, Format(4, 32))
    old = model.per_layer_model_projection
    new = nn.Linear(old.in_features, old.out_features, bias=False, dtype=torch.bfloat16)
    model.per_layer_model_projection = new.requires_grad_(False)
    fuse(model)
    found = paged(model, config)
    assert max(counted) < 32
    assert len(counted) == len(PASSES) - 1  # one has 42 tokens
    check(found, paged(parts_of(model), config))


@pytest.mark.parametrize("size", ["12B", "26B-A4B"])
def test_keys_that_are_rebuilt_go_part_by_part(size, counted):
    config = config_of(size)
    model = fused(config)
    assert model.native is not None
    alone(model, config)
    assert counted == []


def test_keys_that_are_floats_go_part_by_part(counted):
    config = config_of()
    paged(fused(config), config, torch.float32)
    assert counted == []


def test_a_model_with_a_float_matrix_goes_part_by_part():
    config = config_of()
    model: Any = packed_model(config, Format(4, 32))
    mlp = model.get_submodule("layers.1.mlp")
    mlp.up_proj = nn.Linear(64, 64, bias=False)
    fuse(model)
    assert model.native is None


def test_angles_ahead_are_those_of_each_position():
    frequencies = [torch.rand(16), torch.rand(7)]
    angles = Angles(frequencies)
    for starts, tokens in (([900], [1]), ([963], [1]), ([964], [1]), ([3], [1]), ([5, 9], [1, 4])):
        tables, row = angles.of(starts, tokens)
        at = [s + i for s, n in zip(starts, tokens, strict=True) for i in range(n)]
        for found, frequency in zip(tables, frequencies, strict=True):
            for one, other in zip(found, table(torch.tensor(at), frequency), strict=True):
                assert torch.equal(one[row : row + len(at)], other)


def test_what_does_not_belong_together_is_refused():
    config = config_of()
    model = fused(config)
    decoder: Any = model.native
    cache = RingCache(config.text_config, dtype=torch.int8)
    with cache.step(1):
        seen = cache.seen()
        assert seen is not None
        with pytest.raises(WeightsError, match="rows 320 to 320 of a table of 320"):
            decoder.read([320], [(1, 1)], seen)
        with pytest.raises(WeightsError, match=r"1 tokens in parts \[\(2, 1\)\]"):
            decoder.read([3], [(2, 1)], seen)
        with pytest.raises(WeightsError, match="the 318 greatest of 317 outputs"):
            decoder.read([3], [(1, 1)], seen, count=318, skipped=SKIPPED)
        with torch.inference_mode():  # such a tensor counts no changes
            skipped = SKIPPED.clone()
        for _ in range(2):
            decoder.read([3], [(1, 1)], seen, count=5, skipped=skipped)
        with torch.inference_mode():
            skipped += 400
        with pytest.raises(WeightsError, match="skipped: ids must ascend within 320 outputs"):
            decoder.read([3], [(1, 1)], seen, count=5, skipped=skipped)
        with pytest.raises(WeightsError, match=r"must be contiguous torch\.int64"):
            decoder.read([3], [(1, 1)], seen, count=5, skipped=SKIPPED.int())
        far = Sight([[(0, 1), (500, 3)]], [0])
        with pytest.raises(WeightsError, match="slot 502 of"):
            decoder.read([3], [(1, 1)], Seen(seen.stores, [0], far, seen.sliding))
        with pytest.raises(WeightsError, match=r"keys \[1\] of sequences with tokens \[\(2, 1\)\]"):
            decoder.read([3, 4], [(2, 1)], seen)
        nowhere = Stores(len(model.layers), {})
        with pytest.raises(WeightsError, match=r"keys and values \{\}; the layers have"):
            decoder.read([3], [(1, 1)], Seen(nowhere, [0], seen.full, seen.sliding))
        decoder.read([3], [(1, 1)], seen)
    with pytest.raises(WeightsError, match="0 slots from 3 on hold no keys"):
        Sight([[(3, 0)]], [0])
    with pytest.raises(WeightsError, match="no token -1 begins"):
        Sight([[(3, 1)]], [-1])
