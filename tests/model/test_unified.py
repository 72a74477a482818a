"""The image and audio inputs of the 12B against Transformers on random weights."""

from dataclasses import replace

import pytest
import torch

from gemsmith.config import PRESETS, UnifiedAudioConfig, UnifiedVisionConfig
from gemsmith.errors import MediaError
from gemsmith.model.unified import UnifiedAudio, UnifiedVision
from gemsmith.testing import assert_close, tolerance

# Two products and four norms over at most 108 terms.
LIMIT = tolerance(torch.float32, 108, steps=6)
WIDTH = 24
VISION = UnifiedVisionConfig(
    patch_size=2, pooling_kernel_size=3, mm_embed_dim=40, mm_posemb_size=16, output_proj_dims=40
)
AUDIO = UnifiedAudioConfig(audio_embed_dim=20)
VALUES = 108


def pictures(*sizes, seed=0):
    positions = [torch.tensor([(x, y) for y in range(h) for x in range(w)]) for w, h in sizes]
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(p) for p in positions)
    return torch.rand(count, VALUES, generator=generator), torch.cat(positions)


def hf_class(name):
    pytest.importorskip("transformers")
    from transformers.models.gemma4_unified import modeling_gemma4_unified as module

    return getattr(module, name)


def hf_configs():
    transformers = pytest.importorskip("transformers")
    vision = transformers.Gemma4UnifiedVisionConfig(
        patch_size=2, pooling_kernel_size=3, mm_embed_dim=40, mm_posemb_size=16, output_proj_dims=40
    )
    audio = transformers.Gemma4UnifiedAudioConfig(audio_embed_dim=20)
    return vision, audio, transformers.Gemma4UnifiedTextConfig(hidden_size=WIDTH)


def test_images_match_transformers(randomise):
    vision, _, text = hf_configs()
    ours = randomise(UnifiedVision(VISION, WIDTH))
    theirs = hf_class("Gemma4UnifiedVisionEmbedder")(vision, text).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    values, positions = pictures((5, 3), (1, 16), (16, 2))
    values[4] = 0.5 + 1e-3 * values[4]  # in a plain area the norm's eps shows
    values[5] = 1
    split = [15, 16, 32]
    padded, at = torch.zeros(3, 40, VALUES), torch.full((3, 40, 2), -1)
    for i, (v, p) in enumerate(zip(values.split(split), positions.split(split), strict=True)):
        padded[i, : len(v)], at[i, : len(v)] = v, p
    with torch.no_grad():
        rows = theirs(padded, at).pooler_output[(at >= 0).all(-1)]
    actual = ours(values, positions)
    assert actual.abs().max() > 1
    assert_close(actual, rows, LIMIT)


def test_sound_matches_transformers(randomise):
    _, audio, text = hf_configs()
    ours = randomise(UnifiedAudio(AUDIO, WIDTH))
    theirs = hf_class("Gemma4UnifiedMultimodalEmbedder")(audio, text).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    frames = 0.3 * torch.randn(11, 20, generator=torch.Generator().manual_seed(1))
    frames[3] *= 1e-3  # near silence the norm's eps shows
    frames[4] = 0
    with torch.no_grad():
        rows = theirs(frames[None])[0]
    actual = ours(frames)
    assert actual.abs().max() > 1
    assert_close(actual, rows, LIMIT)


def test_a_patch_depends_on_itself_and_its_place_alone(randomise):
    model = randomise(UnifiedVision(VISION, WIDTH))
    values, positions = pictures((5, 3))
    rows = model(values, positions)
    assert_close(model(values.flip(0), positions.flip(0)).flip(0), rows, LIMIT)
    moved = positions.clone()
    moved[4] = moved[4].flip(0)
    changed = (model(values, moved) - rows).abs().amax(1) > 100 * LIMIT
    assert changed.nonzero().flatten().tolist() == [4]


def test_bfloat16_rows_stay_near_float32(randomise):
    values, positions = pictures((5, 3))
    wide, narrow = UnifiedVision(VISION, WIDTH), UnifiedVision(VISION, WIDTH, dtype=torch.bfloat16)
    rows = randomise(narrow)(values, positions)
    assert rows.dtype == torch.bfloat16
    assert_close(rows, randomise(wide)(values, positions), tolerance(torch.bfloat16, 108) / 4)
    frames = 0.3 * torch.randn(11, 20, generator=torch.Generator().manual_seed(1))
    wide, narrow = UnifiedAudio(AUDIO, WIDTH), UnifiedAudio(AUDIO, WIDTH, dtype=torch.bfloat16)
    rows = randomise(narrow)(frames)
    assert rows.dtype == torch.bfloat16
    assert_close(rows, randomise(wide)(frames), tolerance(torch.bfloat16, 20) / 4)


def test_names_and_shapes_are_those_of_the_released_checkpoint(stored_shapes):
    config = PRESETS["12B"]
    assert isinstance(config.vision_config, UnifiedVisionConfig)
    assert isinstance(config.audio_config, UnifiedAudioConfig)
    width = config.text_config.hidden_size
    for part, module in (
        ("embed_vision", UnifiedVision(config.vision_config, width, device="meta")),
        ("embed_audio", UnifiedAudio(config.audio_config, width, device="meta")),
    ):
        shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
        assert shapes == stored_shapes("12B", part)


def test_a_position_outside_the_table_is_refused(randomise):
    model = randomise(UnifiedVision(replace(VISION, mm_posemb_size=4), WIDTH))
    values, positions = pictures((5, 3))
    with pytest.raises(MediaError, match=r"patch 4 is at column 4, row 0, .* 0 to 3 .*size 4\)"):
        model(values, positions)
