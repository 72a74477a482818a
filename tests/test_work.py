"""Operations and bytes of a pass, against what the weights themselves say."""

import math

import pytest

from gemsmith import shapes, sizing, work
from gemsmith.config import PRESETS
from gemsmith.testing import SIZES


def test_prefill_skip_is_about_a_third_of_the_work_in_e2b():
    config = PRESETS["E2B"].text_config
    skip = work.prefill_flops(config, 512, 1)
    full = work.prefill_flops(config, 512, 1, skip=False)
    assert 0.28 < skip / full < 0.34


def test_decode_bytes_of_e2b_leave_out_all_but_one_row_of_the_table():
    config = PRESETS["E2B"].text_config
    assert work.decode_bytes(config, 0) == pytest.approx(2 * 2.28e9, rel=0.01)


@pytest.mark.parametrize("size", SIZES)
def test_a_token_costs_two_operations_a_weight_of_its_matrices(size):
    text = PRESETS[size].text_config
    matrices = {t.name: math.prod(t.shape) for t in shapes.decoder(text) if len(t.shape) > 1}
    matrices.pop("embed_tokens_per_layer.weight", None)
    chosen = {
        name: count * 8 // 128 if ".experts." in name else count for name, count in matrices.items()
    }
    assert work.decode_flops(text, 0) == pytest.approx(2 * sum(chosen.values()), rel=1e-3)
    more = work.decode_flops(text, 4096) - work.decode_flops(text, 0)
    heads = text.num_attention_heads
    seen = sum(min(4096, p.window or 4096) * 4 * heads * p.head_dim for p in text.layers)
    assert more == seen


def test_experts_read_grow_with_sequences_up_to_all():
    config = PRESETS["26B-A4B"]
    weights = sizing.weight_bytes(config, "int4", "cpu")
    experts, towers = weights["experts"], weights["vision"] + weights["vision_projection"]
    rest = sum(weights.values()) - experts - towers
    one, eight, many = (
        work.decode_weight_bytes(config.text_config, weights, n) for n in (1, 8, 500)
    )
    assert one == rest + experts * 8 // 128
    assert eight == pytest.approx(rest + experts * (1 - (120 / 128) ** 8), rel=1e-6)
    assert many == pytest.approx(rest + experts, rel=1e-6)


def test_an_embedding_apart_from_the_head_is_not_read():
    weights = sizing.weight_bytes(PRESETS["E2B"], "mobile", "cpu")
    read = work.decode_weight_bytes(PRESETS["E2B"].text_config, weights)
    body = ("attention", "mlp", "norms", "ple", "ple_projection", "head")
    assert read == sum(weights[part] for part in body)
