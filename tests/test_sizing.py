"""Costs are the published integers, and what the modules and caches really hold."""

import pytest

from gemsmith import sizing
from gemsmith.config import PRESETS
from gemsmith.model.text import TextModel
from gemsmith.testing import SIZES, tiny_config

# Released files, from their headers: unique trainable values, and all stored values.
TRAINABLE = {
    "E2B": 5_104_297_504,
    "E4B": 7_941_100_832,
    "12B": 11_959_730_176,
    "26B-A4B": 25_805_933_872,
    "31B": 31_273_086_512,
}
STORED = {
    "E2B": 5_123_178_051,
    "E4B": 7_996_156_490,
    "12B": 11_959_730_224,
    "26B-A4B": 25_805_936_206,
    "31B": 31_273_088_876,
}
GIB = 1 << 30


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_published_integers(size):
    assert sum(sizing.parameters(PRESETS[size]).values()) == TRAINABLE[size]
    assert sizing.stored_values(PRESETS[size]) == STORED[size]


def test_moe_activates_the_published_count():
    assert sizing.active_parameters(PRESETS["26B-A4B"].text_config) == 3_822_530_560


@pytest.mark.parametrize("config", [tiny_config(size) for size in SIZES], ids=SIZES)
def test_text_parameters_are_what_the_module_has(config):
    model = TextModel(config.text_config, device="meta")
    assert sizing.text_parameters(config.text_config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "per_token", "fixed_mib", "at_32k", "at_max"),
    [
        ("E2B", 6 * 1024, 6, 0.19, 0.76),
        ("E4B", 16 * 1024, 20, 0.52, 2.02),
        ("12B", 8 * 1024, 320, 0.56, 2.31),
        ("26B-A4B", 10 * 1024, 200, 0.51, 2.70),
        ("31B", 40 * 1024, 800, 2.03, 10.78),
    ],
)
def test_kv_bytes_by_hand(size, per_token, fixed_mib, at_32k, at_max):
    # Two-copy arithmetic of the K = V sizes is halved here: one copy is stored.
    config = PRESETS[size].text_config
    deep, longest = 32_768, config.max_position_embeddings
    assert sizing.kv_bytes(config, deep) == deep * per_token + fixed_mib * 2**20
    assert round(sizing.kv_bytes(config, deep) / GIB, 2) == pytest.approx(at_32k, abs=0.011)
    assert sizing.kv_bytes(config, longest) / GIB == pytest.approx(at_max, abs=0.01)


def test_slabs_grow_in_steps_of_at_most_an_eighth():
    assert sizing.slab_tokens(0) == 0
    for n in (1, 255, 256, 257, 4096, 5000, 100_000, 131_072):
        held = sizing.slab_tokens(n)
        assert n <= held < n + max(256, n / 8)
        assert sizing.slab_tokens(held) == held


def test_prefill_skip_is_about_a_third_of_the_work_in_e2b():
    config = PRESETS["E2B"].text_config
    skip = sizing.prefill_flops(config, 512, 1)
    full = sizing.prefill_flops(config, 512, 1, skip=False)
    assert 0.28 < skip / full < 0.34


def test_decode_bytes_of_e2b_leave_out_all_but_one_row_of_the_table():
    config = PRESETS["E2B"].text_config
    assert sizing.decode_bytes(config, 0) == pytest.approx(2 * 2.28e9, rel=0.01)
