"""The vision tower against Transformers on random weights, against golden values, and itself."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gemsmith.config import PRESETS, Gemma4Config, VisionConfig
from gemsmith.errors import ConfigError, MediaError
from gemsmith.model.vision import ClippableLinear, SoftProjection, VisionTower, pooling_order
from gemsmith.testing import assert_close, tolerance

GOLDEN = json.loads((Path(__file__).parents[1] / "data/tiny_golden.json").read_text())
# Nine reductions a layer in three layers, over at most 96 terms.
LIMIT = tolerance(torch.float32, 96, steps=27)
# The golden weights are smooth, so sums of them cancel: the file's own float32 noise is 1e-5.
GOLDEN_LIMIT = 3e-5

SMALL = VisionConfig(
    hidden_size=40,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    head_dim=16,
    patch_size=4,
    position_embedding_size=32,
    use_clipped_linears=True,
)
CONFIGS = {
    "E-series": SMALL,
    # Heads of 12: like the large tower's 72, a quarter that is odd.
    "large": replace(SMALL, head_dim=12, use_clipped_linears=False, standardize=True),
    "other sizes": replace(
        SMALL, num_attention_heads=4, num_key_value_heads=2, rope_theta=50.0, rms_norm_eps=0.05
    ),
}
SIZES = [(6, 3), (12, 9), (3, 15), (6, 3), (9, 9)]  # columns, rows


def grid(columns: int, rows: int) -> torch.Tensor:
    return torch.tensor([(x, y) for y in range(rows) for x in range(columns)])


def pictures(sizes, seed=0, values=48):
    """Packed values and positions of random images, and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    positions = [grid(*size) for size in sizes]
    lengths = [len(p) for p in positions]
    return torch.rand(sum(lengths), values, generator=generator), torch.cat(positions), lengths


def hf_rows(config: VisionConfig, tower: VisionTower, values, positions, lengths):
    """What transformers makes of the same images as one batch, padded as its processor pads."""
    transformers = pytest.importorskip("transformers")
    keys = asdict(config)
    theta = keys.pop("rope_theta")
    keys["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
    hf_config = transformers.Gemma4VisionConfig(**keys)
    hf_config._attn_implementation = "eager"
    hf = transformers.AutoModel.from_config(hf_config).eval()
    hf.load_state_dict(tower.state_dict(), strict=True)
    longest = max(lengths) + 9
    padded = torch.zeros(len(lengths), longest, values.shape[1])
    at = torch.full((len(lengths), longest, 2), -1)
    for i, (v, p) in enumerate(zip(values.split(lengths), positions.split(lengths), strict=True)):
        padded[i, : len(v)], at[i, : len(p)] = v, p
    with torch.no_grad():
        return hf(padded, at).last_hidden_state


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_images_match_the_padded_batch_of_transformers(kind, randomise):
    tower = randomise(VisionTower(CONFIGS[kind]))
    images = pictures(SIZES)
    ours = tower(*images)
    assert ours.abs().max() > 1
    assert_close(ours, hf_rows(CONFIGS[kind], tower, *images), LIMIT)


def test_large_std_values_match_transformers(randomise):
    tower = randomise(VisionTower(CONFIGS["large"]))
    # As in released checkpoints: rows and std_bias of 1e4, whose difference is what matters.
    tower.encoder.layers[-1].post_feedforward_layernorm.weight.mul_(2e3)
    tower.std_bias.copy_(1e4 * tower.std_bias)
    tower.std_scale.copy_(1e-3 * tower.std_scale)
    images = pictures(SIZES)
    ours = tower(*images)
    assert tower.std_bias.abs().max() > 5e3
    assert ours.abs().max() > 5
    assert_close(ours, hf_rows(CONFIGS["large"], tower, *images), LIMIT)


def test_bounds_clamp_inputs_and_outputs_of_every_linear(randomise):
    tower = randomise(VisionTower(SMALL))
    images = pictures([(6, 6)])
    before = tower(*images)
    linears = [m for m in tower.modules() if isinstance(m, ClippableLinear)]
    assert len(linears) == 7 * SMALL.num_hidden_layers
    for linear in linears:
        for name, bound in list(linear.named_buffers()):
            kept = bound.clone()
            bound.mul_(0.1)
            assert (tower(*images) - before).abs().max() > 100 * LIMIT, name
            bound.copy_(kept)


@pytest.mark.parametrize("case", ["edge_ple_kvshare_doublewide", "dense_keqv_bidir"])
def test_golden_rows_are_reproduced(case, golden_fill):
    golden = GOLDEN["cases"][case]
    config = Gemma4Config.from_dict(golden["config"] | {"model_type": "gemma4"})
    vision = config.vision_config
    assert isinstance(vision, VisionConfig)
    tower = golden_fill(VisionTower(vision), "model.vision_tower")
    width = config.text_config.hidden_size
    projection = golden_fill(SoftProjection(vision.hidden_size, width, 1e-6), "model.embed_vision")
    k, j = torch.arange(18)[:, None], torch.arange(48)
    rows = tower(0.5 + 0.5 * torch.sin(0.11 * j + 0.3 * k), grid(6, 3), [18])
    expected = golden["vision"]
    assert len(rows) == expected["num_soft"]
    assert_close(rows[0], torch.tensor(expected["tower_out_soft0"]), GOLDEN_LIMIT)
    projected = projection(rows)
    assert_close(projected[0], torch.tensor(expected["projected_soft0"]), GOLDEN_LIMIT)
    assert_close(projected[1], torch.tensor(expected["projected_soft1"]), GOLDEN_LIMIT)


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_equals_one_by_one(kind, randomise):
    tower = randomise(VisionTower(CONFIGS[kind]))
    values, positions, lengths = pictures(SIZES)
    alone = [
        tower(v, p, [len(v)])
        for v, p in zip(values.split(lengths), positions.split(lengths), strict=True)
    ]
    assert_close(tower(values, positions, lengths), torch.cat(alone), LIMIT)


def test_an_image_does_not_depend_on_its_neighbours(randomise):
    tower = randomise(VisionTower(SMALL))
    values, positions, lengths = pictures(SIZES)
    before = tower(values, positions, lengths)
    second = slice(lengths[0], lengths[0] + lengths[1])
    changed = values.clone()
    changed[second] = 1 - changed[second]
    after = tower(changed, positions, lengths)
    own = slice(second.start // 9, second.stop // 9)
    others = torch.ones(len(before), dtype=torch.bool)
    others[own] = False
    assert torch.equal(after[others], before[others])
    # Within it, every row changes: attention is over the whole image.
    assert ((after[own] - before[own]).abs().amax(1) > 100 * LIMIT).all()


def test_order_of_an_images_patches_does_not_matter(randomise):
    tower = randomise(VisionTower(SMALL))
    values, positions, lengths = pictures([(6, 3), (9, 6)])
    generator = torch.Generator().manual_seed(1)
    shuffled = torch.cat(
        (torch.randperm(18, generator=generator), 18 + torch.randperm(54, generator=generator))
    )
    mixed = tower(values[shuffled], positions[shuffled], lengths)
    assert_close(mixed, tower(values, positions, lengths), LIMIT)


def test_pooling_averages_each_cell_and_puts_cells_row_by_row(randomise):
    tower = randomise(VisionTower(replace(SMALL, pooling_kernel_size=2)))
    positions = torch.cat([grid(4, 4), grid(6, 2)])
    order = pooling_order(positions, [16, 12], 2)
    x_PD = torch.randn(28, 40, generator=torch.Generator().manual_seed(0))
    wide, flat = x_PD[:16].view(2, 2, 2, 2, 40), x_PD[16:].view(1, 2, 3, 2, 40)
    expected = [part.mean((1, 3)).flatten(0, 1) for part in (wide, flat)]
    assert_close(tower.pool(x_PD, order), torch.cat(expected) * 40**0.5, LIMIT)


def test_pooled_values_keep_float32_until_std_bias_is_subtracted():
    tower = VisionTower(CONFIGS["large"], dtype=torch.bfloat16)
    root = 40**0.5
    tower.std_bias.fill_(6336.0)  # a bfloat16 value near 1000 * sqrt(40)
    x_PD = torch.full((9, 40), 1000.0, dtype=torch.bfloat16)
    x_PD[0] = 1008.0  # the mean, 1000.89, is no bfloat16 value: they lie 4 apart there
    expected = torch.full((1, 40), (1000 + 8 / 9) * root - 6336.0)
    actual = tower.pool(x_PD, pooling_order(grid(3, 3), [9], 3))
    assert actual.dtype == torch.bfloat16
    assert_close(actual, expected, tolerance(torch.bfloat16, 1) / 8)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_rows_stay_near_float32(kind, randomise):
    wide = randomise(VisionTower(CONFIGS[kind]))
    narrow = randomise(VisionTower(CONFIGS[kind], dtype=torch.bfloat16))
    images = pictures(SIZES)
    rows = narrow(*images)
    assert rows.dtype == torch.bfloat16
    assert_close(rows, wide(*images), tolerance(torch.bfloat16, 96) / 4)


def test_projection_takes_wide_rows_and_answers_in_its_own_dtype(randomise):
    wide, narrow = SoftProjection(40, 24, 1e-6), SoftProjection(40, 24, 1e-6, dtype=torch.bfloat16)
    randomise(wide)
    randomise(narrow)
    rows = 1e5 * torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    out = narrow(rows)
    assert out.dtype == torch.bfloat16
    assert_close(out, wide(rows), tolerance(torch.bfloat16, 40) / 4)


@pytest.mark.parametrize("size", ["E2B", "E4B", "26B-A4B", "31B"])
def test_names_and_shapes_are_those_of_the_released_checkpoints(size, stored_shapes):
    config = PRESETS[size]
    assert isinstance(config.vision_config, VisionConfig)
    tower = VisionTower(config.vision_config, device="meta")
    shapes = {k: tuple(v.shape) for k, v in tower.state_dict().items()}
    assert shapes == stored_shapes(size, "vision_tower")
    projection = SoftProjection(
        config.vision_config.hidden_size, config.text_config.hidden_size, 1e-6, device="meta"
    )
    shapes = {k: tuple(v.shape) for k, v in projection.state_dict().items()}
    assert shapes == stored_shapes(size, "embed_vision")


@pytest.mark.parametrize(
    ("shift", "patch", "column", "row"),
    [((30, 0), 2, 32, 0), ((0, 30), 12, 0, 32), ((-3, 0), 0, -3, 0), ((6, -3), 0, 6, -3)],
)
def test_a_position_outside_the_table_is_refused(shift, patch, column, row, randomise):
    tower = randomise(VisionTower(SMALL))
    values, positions, lengths = pictures([(6, 3)])
    message = rf"patch {patch} is at column {column}, row {row}, .* 0 to 31 .*size 32\).*smaller"
    with pytest.raises(MediaError, match=message):
        tower(values, positions + torch.tensor(shift), lengths)


@pytest.mark.parametrize("size", [(7, 9), (4, 9), (6, 4), (2, 5)])
def test_a_grid_of_partial_cells_is_refused(size, randomise):
    tower = randomise(VisionTower(SMALL))
    with pytest.raises(MediaError, match=rf"images of 9, {size[0] * size[1]} patches: .*3 x 3.*"):
        tower(*pictures([(3, 3), size]))


def test_configs_that_cannot_be_a_tower_are_refused():
    with pytest.raises(ConfigError, match=r"head_dim 14 is not a multiple of 4"):
        VisionTower(replace(SMALL, head_dim=14))
    with pytest.raises(ConfigError, match=r"num_attention_heads 3 is not .*key_value_heads 2"):
        VisionTower(replace(SMALL, num_key_value_heads=2))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_cuda_rows_match_cpu(kind, randomise):
    tower = randomise(VisionTower(CONFIGS[kind]))
    values, positions, lengths = pictures(SIZES)
    expected = tower(values, positions, lengths)
    actual = tower.cuda()(values.cuda(), positions.cuda(), lengths)
    assert_close(actual.cpu(), expected, 4 * LIMIT)
