"""Images inside a prompt: the golden logits of a whole multimodal model."""

import json
from pathlib import Path

import pytest
import torch

from gemsmith.cache.none import NoCache
from gemsmith.config import PRESETS, Gemma4Config
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.testing import assert_close

GOLDEN = json.loads((Path(__file__).parents[1] / "data/tiny_golden.json").read_text())["cases"]
LIMIT = 1e-4
"""The file's own: its weights make sums in which float32 rounding grows to 2e-5."""


@pytest.mark.parametrize("case", ["edge_ple_kvshare_doublewide", "dense_keqv_bidir"])
def test_golden_multimodal_logits_are_reproduced(case, golden_fill):
    config = Gemma4Config.from_dict(GOLDEN[case]["config"] | {"model_type": "gemma4"})
    text = golden_fill(TextModel(config.text_config), "model.language_model")
    towers = golden_fill(Towers(config), "model")
    k, j = torch.arange(18)[:, None], torch.arange(48)
    patches = 0.5 + 0.5 * torch.sin(0.11 * j + 0.3 * k)
    grid = torch.stack((torch.arange(18) % 6, torch.arange(18) // 6), -1)
    rows = towers.see(patches, grid, [18])
    expected = GOLDEN[case]["multimodal"]
    ids = torch.tensor(expected["input_ids"])
    at = (ids == config.image_token_id).nonzero().flatten()
    blocks = torch.where(ids == config.image_token_id, 0, -1)
    bidirectional = config.text_config.use_bidirectional_attention == "vision"
    kv = NoCache(config.text_config, [len(ids)], blocks if bidirectional else None)
    logits = text.logits(text(ids, torch.arange(len(ids)), kv, soft=(at, rows)))
    assert_close(logits[-1], torch.tensor(expected["logits_last"]), LIMIT)
    first = torch.tensor(expected["logits_at_first_image_token"])
    assert_close(logits[at[0]], first, LIMIT)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("E2B", 167_364_608 + 1_179_648 + 304_824_608 + 2_359_296),
        ("E4B", 167_364_608 + 1_966_080 + 304_824_608 + 3_932_160),
        ("26B-A4B", 569_548_080 + 3_244_032),
        ("31B", 569_548_080 + 6_193_152),
    ],
)
def test_tower_parameter_counts_are_the_published_integers(size, count):
    towers = Towers(PRESETS[size], device="meta")
    assert sum(p.numel() for p in towers.parameters()) == count
