"""The decoder against Transformers on random weights, against golden values, and itself."""

import json
import math
import zlib
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from gemsmith.cache.none import NoCache
from gemsmith.cache.ring import RingCache
from gemsmith.config import PRESETS, Gemma4Config
from gemsmith.errors import ConfigError
from gemsmith.model.text import TextModel, rope_table
from gemsmith.ops import reference
from gemsmith.testing import SIZES, assert_close, random_model, tiny_config, tolerance

GOLDEN = json.loads((Path(__file__).parents[1] / "data/tiny_golden.json").read_text())
# Eight reductions a layer in eight layers.
LIMIT = tolerance(torch.float32, 64, steps=64)


def run(model: TextModel, sequences: list[list[int]], rows: list[int] | None = None):
    ids = torch.tensor([i for s in sequences for i in s])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    kv = NoCache(model.config, [len(s) for s in sequences])
    at = None if rows is None else torch.tensor(rows)
    return model.logits(model(ids, positions, kv, rows_R=at))


def tokens(count: int, seed: int = 0, vocab: int = 96) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (count,), generator=generator).tolist()


def hf_model(config: Gemma4Config, model: TextModel):
    transformers = pytest.importorskip("transformers")
    unified = config.model_type == "gemma4_unified"
    prefix = "Gemma4Unified" if unified else "Gemma4"
    hf_config = getattr(transformers, prefix + "TextConfig")(**config.text_config.to_dict())
    hf_config._attn_implementation = "eager"
    hf = getattr(transformers, prefix + "ForCausalLM")(hf_config).eval()
    missing, unexpected = hf.model.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not missing
    hf.tie_weights()
    return hf


@pytest.mark.parametrize("size", SIZES)
def test_logits_match_transformers_beyond_the_window_and_packed(size):
    config = tiny_config(size)
    model = random_model(config)
    hf = hf_model(config, model)
    sequences = [tokens(37, 1), tokens(5, 2), tokens(24, 3)]
    ours = run(model, sequences)
    with torch.no_grad():
        theirs = torch.cat([hf(torch.tensor([s])).logits[0] for s in sequences])
    assert ours.abs().max() > 1
    assert_close(ours, theirs, LIMIT)


@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_bfloat16_logits_stay_near_float32(size):
    config = tiny_config(size)
    wide = random_model(config)
    narrow = random_model(config, dtype=torch.bfloat16)
    sequence = [tokens(20, 4)]
    assert_close(run(narrow, sequence), run(wide, sequence), tolerance(torch.bfloat16, 64) / 4)


def golden_weight(name: str, shape: torch.Size) -> torch.Tensor:
    offset = zlib.crc32(name.encode()) % 1000
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    w = torch.sin(0.37 * index + offset).reshape(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "layer_scalar":
        return torch.full(shape, 0.9)
    if "norm" in name or last in ("scale", "per_expert_scale", "std_scale"):
        return (1 + 0.1 * w).float()
    return (0.2 * w).float()


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_golden_text_logits_are_reproduced(case):
    golden = GOLDEN["cases"][case]
    config = Gemma4Config.from_dict(golden["config"] | {"model_type": "gemma4"})
    model = TextModel(config.text_config).eval().requires_grad_(False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(golden_weight(f"model.language_model.{name}", tensor.shape))
    text = golden["text"]
    logits = run(model, [text["input_ids"]])
    assert_close(logits[-1], torch.tensor(text["logits_last"]), 1e-5)
    assert_close(logits[0], torch.tensor(text["logits_pos0"]), 1e-5)
    assert logits.argmax(-1).tolist() == text["argmax_all"]


def test_rope_tables_are_golden():
    for kind, dim, rope in (
        ("local_head_dim256", 256, PRESETS["E2B"].text_config.sliding_rope),
        ("global_head_dim512", 512, PRESETS["E2B"].text_config.full_rope),
    ):
        golden = GOLDEN["rope"][kind]
        cos, sin = rope_table(torch.tensor([1]), rope, dim)
        freqs = torch.atan2(sin, cos).flatten()
        assert len(freqs) == golden.get("nonzero", golden["len"])
        torch.testing.assert_close(freqs[:4], torch.tensor(golden["first4"]))
        torch.testing.assert_close(freqs[-1].item(), golden.get("idx63", golden.get("last")))
        oracle = reference.inverse_frequencies(dim, rope.rope_theta, rope.partial_rotary_factor)
        torch.testing.assert_close(freqs, oracle[: len(freqs)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [[-1], [0, 3, 40, 41, 65], [65, 2, 37]])
def test_prefill_skip_gives_the_logits_of_the_full_run(size, rows):
    config = tiny_config(size)
    model = random_model(config)
    sequences = [tokens(37, 1), tokens(5, 2), tokens(24, 3)]
    rows = [r % 66 for r in rows]
    assert_close(run(model, sequences, rows), run(model, sequences)[rows], LIMIT)


def test_logits_that_are_learned_from_are_capped_alike():
    model = random_model(tiny_config("E2B"))
    seeded = torch.Generator().manual_seed(0)
    hidden = 30 * torch.randn(3, model.config.hidden_size, generator=seeded)  # far into the cap
    capped = model.logits(hidden)
    assert model.config.final_logit_softcapping == capped.abs().max().ceil()
    learned = model.logits(hidden.requires_grad_())
    assert_close(learned.detach(), capped, LIMIT)
    learned.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_prefill_skip_leaves_the_skipped_layers_work_undone():
    model = random_model(tiny_config("E2B"))
    seen: list[int] = []
    for layer in model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    run(model, [tokens(30)], [29])
    assert seen == [30, 30, 30, 30, 1, 1, 1, 1]


@pytest.mark.parametrize("size", SIZES)
def test_no_rows_asked_store_the_prompt_all_the_same(size):
    model = random_model(tiny_config(size))
    cache = RingCache(model.config, dtype=torch.float32, k_from_v=model.k_from_v)
    ids = torch.tensor(tokens(20))
    with cache.step(19) as positions:
        none = model(ids[:19], positions, cache, rows_R=torch.tensor([], dtype=torch.long))
    assert none.shape == (0, 64)
    with cache.step(1) as positions:
        last = model.logits(model(ids[19:], positions, cache))
    assert_close(last, run(model, [ids.tolist()])[19:], LIMIT)


def test_packed_sequences_do_not_see_each_other():
    model = random_model(tiny_config("E4B"))
    lengths = [9, 14, 3]
    sequences = [tokens(n, n) for n in lengths]
    together = run(model, sequences)
    for start, sequence in zip(accumulate(lengths, initial=0), sequences, strict=False):
        assert_close(together[start : start + len(sequence)], run(model, [sequence]), LIMIT)


def test_soft_tokens_replace_embeddings_and_take_the_padding_identity():
    model = random_model(tiny_config("E2B"))
    ids, at = tokens(10), torch.tensor([3, 4])
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    soft = model(torch.tensor(ids), torch.arange(10), NoCache(model.config, [10]), soft=(at, rows))
    # Whatever ids stand at those places, they must not matter.
    ids[3:5] = [7, 8]
    again = model(torch.tensor(ids), torch.arange(10), NoCache(model.config, [10]), soft=(at, rows))
    assert torch.equal(soft, again)
    # And the padding id there, with the same rows, is the same computation written out.
    ids[3:5] = [0, 0]
    table = model.embed_tokens.weight.clone()
    model.embed_tokens.weight[0] = rows[0] / 8
    first = model(torch.tensor(ids[:4]), torch.arange(4), NoCache(model.config, [4]))
    model.embed_tokens.weight.copy_(table)
    assert_close(soft[:4], first, LIMIT)


def image_blocks(length: int, *spans: tuple[int, int]) -> torch.Tensor:
    blocks = torch.full((length,), -1)
    for number, (start, stop) in enumerate(spans):
        blocks[start:stop] = number
    return blocks


@pytest.mark.parametrize("size", ["31B", "26B-A4B"])
def test_images_are_seen_whole_in_sliding_layers_as_in_transformers(size):
    # Window 8: one block inside it, one longer than it, two that touch.
    spans = [(2, 7), (10, 31), (31, 36), (39, 40)]
    config = tiny_config(size)
    model = random_model(config)
    transformers = pytest.importorskip("transformers")
    hf = transformers.Gemma4Config(
        text_config=config.text_config.to_dict(), vision_config=None, audio_config=None
    )
    hf._attn_implementation = "eager"
    hf = transformers.Gemma4ForConditionalGeneration(hf).eval()
    hf.model.language_model.load_state_dict(model.state_dict())
    ids, blocks = torch.tensor(tokens(44)), image_blocks(44, *spans)
    kinds = (blocks >= 0).long()
    kinds[31:36] = 2  # a video's frame right behind an image: one run of media, so one block
    blocks[31:36] = blocks[30]
    with torch.no_grad():
        theirs = hf(input_ids=ids[None], mm_token_type_ids=kinds[None]).logits[0]
    ours = model.logits(model(ids, torch.arange(44), NoCache(model.config, [44], blocks)))
    assert_close(ours, theirs, LIMIT)
    causal = model.logits(model(ids, torch.arange(44), NoCache(model.config, [44])))
    assert (causal - ours).abs().max() > 100 * LIMIT


@pytest.mark.parametrize("size", ["31B", "E2B"])
@pytest.mark.parametrize("rows", [None, [5, 43, 20]])
@pytest.mark.parametrize("cuts", [[44], [9, 35], [1, 1, 36, 6]])
def test_blocks_through_the_cache_equal_the_whole_pass(size, rows, cuts):
    model = random_model(tiny_config(size))
    ids, blocks = torch.tensor(tokens(44)), image_blocks(44, (2, 7), (10, 31), (39, 40))
    expected = model(ids, torch.arange(44), NoCache(model.config, [44], blocks))
    if rows is not None:
        kv = NoCache(model.config, [44], blocks)
        asked = model(ids, torch.arange(44), kv, rows_R=torch.tensor(rows))
        assert_close(asked, expected[rows], LIMIT)
    cache = RingCache(model.config, dtype=torch.float32, k_from_v=model.k_from_v)
    start = 0
    for count in cuts:
        at = slice(start, start + count)
        start += count
        part = expected[at]
        rows_R = torch.tensor([r - at.start for r in rows or () if at.start <= r < at.stop])
        with cache.step(count, blocks[at]) as positions:
            asked = {} if rows is None else {"rows_R": rows_R.long()}
            ours = model(ids[at], positions, cache, **asked)
        if rows is None or len(rows_R):
            assert_close(ours, part if rows is None else part[rows_R.long()], LIMIT)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published_integers(size):
    published = {
        "E2B": 4_628_569_344,
        "E4B": 7_463_013_376,
        "12B": 11_907_350_272,
        "26B-A4B": 25_233_141_760,
        "31B": 30_697_345_280,
    }
    model = TextModel(PRESETS[size].text_config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == published[size]


def test_float16_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"float16.*65504.*bfloat16"):
        TextModel(tiny_config("31B").text_config, dtype=torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_cuda_logits_match_cpu(size):
    model = random_model(tiny_config(size))
    ids, positions = torch.tensor(tokens(40)), torch.arange(40)
    expected = model.logits(model(ids, positions, NoCache(model.config, [40])))
    model.cuda()
    actual = model.logits(model(ids.cuda(), positions.cuda(), NoCache(model.config, [40])))
    assert_close(actual.cpu(), expected, 4 * LIMIT)
