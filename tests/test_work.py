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


@pytest.mark.parametrize("size", SIZES)
def test_a_prompt_is_what_runs_on_every_token_and_a_token_in_the_rest(size: str):
    text = PRESETS[size].text_config
    products, scores = work.prompt_flops(text, 512)
    shared = [plan for plan in text.layers if not plan.owns_kv]
    weights = sum(sizing.layer_parameters(text, plan)["attention"] for plan in shared)
    weights += sum(sizing.layer_parameters(text, plan)["mlp"] for plan in shared)
    last = 2 * (text.vocab_size * text.hidden_size + weights)
    whole = work.prefill_flops(text, 512, 1)
    assert products + scores + last == pytest.approx(whole, rel=2e-3)


def test_in_attention_of_a_prompt_a_token_sees_itself_and_what_came_before_it_in_its_window():
    text = PRESETS["E2B"].text_config
    seen = 0
    for plan in text.layers[:15]:
        window = plan.window or 2000
        heads = text.num_attention_heads * plan.head_dim
        seen += 4 * heads * sum(min(token + 1, window) for token in range(2000))
    assert work.prompt_flops(text, 2000)[1] == seen


def test_weights_of_a_prompt_are_read_for_every_token_or_for_the_last():
    text = PRESETS["E2B"].text_config
    weights = sizing.weight_bytes(PRESETS["E2B"], "bfloat16", "cpu", towers=False)
    every, last = work.prompt_weight_bytes(text, weights, 512)
    assert every + last == work.decode_weight_bytes(text, weights, 512)
    layers = sum(
        sum(sizing.layer_parameters(text, plan).values())
        for plan in text.layers
        if not plan.owns_kv
    )
    assert last == pytest.approx(weights["embedding"] + 2 * layers, rel=1e-4)
    dense = PRESETS["12B"]
    weights = sizing.weight_bytes(dense, "int4", "cpu", towers=False)
    _, last = work.prompt_weight_bytes(dense.text_config, weights, 512)
    assert last == weights["embedding"]


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
