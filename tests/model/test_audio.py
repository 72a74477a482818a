"""The conformer against Transformers on random weights, against golden values, and itself."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from gemsmith.config import PRESETS, AudioConfig, Gemma4Config
from gemsmith.errors import ConfigError, MediaError
from gemsmith.model.audio import AudioTower, LocalAttention, sinusoids
from gemsmith.model.vision import ClippableLinear, SoftProjection
from gemsmith.testing import assert_close, tolerance

GOLDEN = json.loads((Path(__file__).parents[1] / "data/tiny_golden.json").read_text())
# Thirteen reductions a layer in three layers, over at most 160 terms.
LIMIT = tolerance(torch.float32, 160, steps=39)
# The golden weights are smooth, so sums of them cancel: the file's own float32 noise is 1e-5.
GOLDEN_LIMIT = 3e-5

SMALL = AudioConfig(
    hidden_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    subsampling_conv_channels=(16, 6),
    output_proj_dims=28,
)
CONFIGS = {
    "released": SMALL,
    "other sizes": replace(
        SMALL,
        attention_chunk_size=4,
        attention_context_left=5,
        attention_logit_cap=2.0,
        conv_kernel_size=3,
        residual_weight=0.7,
        use_clipped_linears=False,
    ),
}
# Mel frames: 1 and 12 and 24 soft tokens to the frame, and lengths around them.
LENGTHS = [1, 2, 5, 45, 48, 49, 93, 96, 97, 131]


def mel(frames: int, seed: int = 0, bins: int = 16) -> torch.Tensor:
    """Values as loud and as quiet as log-mel frames are, -7 to 3."""
    generator = torch.Generator().manual_seed(seed)
    return -2 + 2 * torch.randn(frames, bins, generator=generator)


def heard(tower: AudioTower, frames: torch.Tensor) -> torch.Tensor:
    return tower(frames, torch.ones(len(frames), dtype=torch.bool))


def hf_tower(config: AudioConfig, tower: AudioTower):
    transformers = pytest.importorskip("transformers")
    keys = asdict(config)
    keys["subsampling_conv_channels"] = list(keys["subsampling_conv_channels"])
    hf_config = transformers.Gemma4AudioConfig(**keys)
    hf_config._attn_implementation = "eager"
    hf = transformers.AutoModel.from_config(hf_config).eval()
    hf.load_state_dict(tower.state_dict(), strict=True)
    return hf


@pytest.mark.parametrize("kind", CONFIGS)
def test_clips_match_the_padded_batch_of_transformers(kind, randomise):
    tower = randomise(AudioTower(CONFIGS[kind]))
    hf = hf_tower(CONFIGS[kind], tower)
    longest = max(LENGTHS) + 10
    # What lies in the padding must not matter, so it is not silence.
    batch = torch.stack([mel(longest, seed) for seed in range(len(LENGTHS))])
    batch[4] *= 1e-3  # here the norms' eps shows
    valid = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        theirs = hf(batch, attention_mask=valid)
    for i, frames in enumerate(LENGTHS):
        expected = theirs.last_hidden_state[i][theirs.attention_mask[i]]
        assert len(expected) == -(-frames // 4)
        ours = tower(batch[i], valid[i])
        assert ours.abs().max() > 1
        assert_close(ours, expected, LIMIT)
        assert torch.equal(ours, heard(tower, batch[i, :frames]))


def test_bounds_clamp_inputs_and_outputs_of_every_linear(randomise):
    tower = randomise(AudioTower(SMALL))
    frames = mel(60)
    before = heard(tower, frames)
    linears = [m for m in tower.modules() if isinstance(m, ClippableLinear)]
    assert len(linears) == 10 * SMALL.num_hidden_layers
    for linear in linears:
        for name, bound in list(linear.named_buffers()):
            kept = bound.clone()
            bound.mul_(0.1)
            assert (heard(tower, frames) - before).abs().max() > 100 * LIMIT, name
            bound.copy_(kept)


def test_golden_rows_are_reproduced(golden_fill):
    golden = GOLDEN["cases"]["edge_ple_kvshare_doublewide"]
    config = Gemma4Config.from_dict(golden["config"] | {"model_type": "gemma4"})
    audio = config.audio_config
    assert isinstance(audio, AudioConfig)
    tower = golden_fill(AudioTower(audio), "model.audio_tower")
    width = config.text_config.hidden_size
    projection = golden_fill(
        SoftProjection(audio.output_proj_dims, width, 1e-6), "model.embed_audio"
    )
    t, f = torch.arange(100)[:, None], torch.arange(16)
    frames, expected = torch.sin(0.05 * t + 0.2 * f), golden["audio"]
    rows = heard(tower, frames)
    assert len(rows) == expected["num_soft"]
    assert_close(rows[0], torch.tensor(expected["tower_out_frame0"]), GOLDEN_LIMIT)
    assert_close(rows[24], torch.tensor(expected["tower_out_frame24"]), GOLDEN_LIMIT)
    projected = projection(rows)[24]
    assert_close(projected, torch.tensor(expected["projected_frame24"]), GOLDEN_LIMIT)
    masked = expected["masked_90_valid"]
    rows = tower(frames, t[:, 0] < 90)
    assert len(rows) == masked["num_soft"]
    assert_close(rows[20], torch.tensor(masked["tower_out_frame20"]), GOLDEN_LIMIT)


def slow_attention(attention: LocalAttention, x_SD: torch.Tensor, window: int, cap: float):
    """The definition: all pairs, one head at a time, in the layer's own words."""
    S, D = x_SD.shape
    H = attention.head_dim
    q, k, v = (p(x_SD) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    speed = 10_000.0 ** (-torch.arange(D // 2) / (D // 2 - 1))
    distance = torch.arange(S)[:, None] - torch.arange(S)
    out = torch.empty(S, D)
    for head in range(D // H):
        part = slice(head * H, (head + 1) * H)
        asked = q[:, part] / math.log(2) / H**0.5 * F.softplus(attention.per_dim_scale)
        scores = asked @ (k[:, part] * math.log2(1 + math.e)).T
        for i in range(S):
            for j in range(max(0, i - window + 1), i + 1):
                wave = torch.cat(((i - j) * speed, (i - j) * speed + math.pi / 2)).sin()
                scores[i, j] += asked[i] @ (attention.relative_k_proj.weight @ wave)[part]
        scores = cap * torch.tanh(scores / cap)
        seen = (distance >= 0) & (distance < window)
        out[:, part] = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, part]
    return attention.post(out)


@pytest.mark.parametrize("rows", [1, 7, 12, 13, 40])
@pytest.mark.parametrize(("chunk", "left"), [(12, 13), (5, 13), (16, 4), (3, 2)])
def test_blocks_equal_the_full_matrix(chunk, left, rows, randomise):
    config = replace(
        SMALL, attention_chunk_size=chunk, attention_context_left=left, attention_logit_cap=3.0
    )
    attention = randomise(LocalAttention(config))
    x_SD = torch.randn(rows, 40, generator=torch.Generator().manual_seed(1))
    waves_WD = sinusoids(left - 1, 40, x_SD.device)
    expected = slow_attention(attention, x_SD, left - 1, 3.0)
    assert_close(attention(x_SD, waves_WD), expected, LIMIT)


def test_a_later_frame_changes_no_row_before_its_look_ahead(randomise):
    tower = randomise(AudioTower(SMALL))
    frames = mel(400)
    before = heard(tower, frames)
    for at in (0, 101, 102, 103, 104, 250):
        changed = frames.clone()
        changed[at] += 1
        rows = (heard(tower, changed) - before).abs().amax(1).nonzero().flatten()
        # A row hears mel frames up to three after its own four begin; then each layer carries it
        # 11 rows on by attention and 4 by convolution, and no further.
        first = max(0, math.ceil((at - 3) / 4))
        assert rows.min() == first
        assert rows.max() <= (at + 3) // 4 + SMALL.num_hidden_layers * (11 + 4)
        assert rows.max() > first + 2 * (11 + 4)


def test_cost_grows_linearly_with_length(randomise):
    tower = randomise(AudioTower(SMALL))
    counts = []
    for frames in (480, 960, 4800):
        with FlopCounterMode(display=False) as counter:
            heard(tower, mel(frames))
        counts.append(counter.get_total_flops())
    assert counts[1] < 2.01 * counts[0]
    assert counts[2] < 10.01 * counts[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_bfloat16_rows_stay_near_float32(kind, randomise):
    wide = randomise(AudioTower(CONFIGS[kind]))
    narrow = randomise(AudioTower(CONFIGS[kind], dtype=torch.bfloat16))
    rows = heard(narrow, mel(131))
    assert rows.dtype == torch.bfloat16
    assert_close(rows, heard(wide, mel(131)), tolerance(torch.bfloat16, 160) / 4)


@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_names_and_shapes_are_those_of_the_released_checkpoints(size, stored_shapes):
    config = PRESETS[size]
    assert isinstance(config.audio_config, AudioConfig)
    tower = AudioTower(config.audio_config, device="meta")
    shapes = {k: tuple(v.shape) for k, v in tower.state_dict().items()}
    assert shapes == stored_shapes(size, "audio_tower")
    assert sum(p.numel() for p in tower.parameters()) == 304_824_608
    projection = SoftProjection(
        config.audio_config.output_proj_dims, config.text_config.hidden_size, 1e-6, device="meta"
    )
    shapes = {k: tuple(v.shape) for k, v in projection.state_dict().items()}
    assert shapes == stored_shapes(size, "embed_audio")


@pytest.mark.parametrize(("valid", "count"), [([0, 0, 0], 0), ([1, 0, 1], 2), ([0, 1, 1], 2)])
def test_frames_that_are_no_prefix_are_refused(valid, count, randomise):
    tower = randomise(AudioTower(SMALL))
    with pytest.raises(
        MediaError, match=rf"audio of 3 frames, {count} of them valid: .*first.*one"
    ):
        tower(mel(3), torch.tensor(valid, dtype=torch.bool))


def test_another_number_of_mel_bins_is_refused(randomise):
    tower = randomise(AudioTower(SMALL))
    with pytest.raises(MediaError, match=r"audio of 80 mel bins; this model hears 16"):
        heard(tower, mel(10, bins=80))


def test_configs_that_cannot_be_a_tower_are_refused():
    for left, right in ((1, 0), (13, 1)):
        config = replace(SMALL, attention_context_left=left, attention_context_right=right)
        with pytest.raises(ConfigError, match=rf"left {left} and right {right}; left must be 2"):
            AudioTower(config)
    with pytest.raises(ConfigError, match=r"hidden_size 40 does not divide into 3 heads"):
        AudioTower(replace(SMALL, num_attention_heads=3))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
def test_cuda_rows_match_cpu(kind, randomise):
    tower = randomise(AudioTower(CONFIGS[kind]))
    expected = heard(tower, mel(131))
    assert_close(heard(tower.cuda(), mel(131).cuda()).cpu(), expected, 4 * LIMIT)
