"""The embedded model's shape, first weights and export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes.pocket import train
from recipes.pocket.train import POCKET, TEXT, export, init_towers, init_weights
from tests.train.copying import write_set
from torch import Tensor

import gemsmith.pocket
from gemsmith.cache.none import NoCache
from gemsmith.config import Gemma4Config, text_only
from gemsmith.errors import TrainError
from gemsmith.media import audio, image
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.quant.quantize import on_grid
from gemsmith.train.media import SOUND, MediaWriter, Medium, pcm
from gemsmith.train.rounding import decoder_formats
from gemsmith.weights.load import load_model, load_towers
from gemsmith.weights.save import save_model

MAX_BYTES, MAX_BYTES_WITH_TOWERS = 16_000_000, 24_000_000
TOKENIZER = Path(gemsmith.pocket.__path__[0]) / "checkpoint"


@pytest.fixture(scope="module")
def model() -> TextModel:
    model = TextModel(TEXT)
    init_weights(model, seed=0)
    return model


def test_pocket_has_every_feature_of_the_e_series(model: TextModel) -> None:
    plans = TEXT.layers
    assert {plan.layer_type for plan in plans} == {"sliding_attention", "full_attention"}
    assert [plan.owns_kv for plan in plans] == [True] * 5 + [False] * 4
    assert {plan.intermediate_size for plan in plans} == {384, 768}
    assert TEXT.hidden_size_per_layer_input > 0
    assert sum(p.numel() for p in model.parameters()) == 7_529_232


@torch.no_grad()
def test_first_weights_give_signals_of_order_one(model: TextModel) -> None:
    ids = torch.randint(0, 4096, (64,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64)
    embedded = model.embed(ids)
    assert 0.9 < embedded.pow(2).mean().sqrt() < 1.1
    seen: list[float] = []

    class Watch(NoCache):
        def attend(
            self,
            layer: int,
            q: Tensor,
            k_TKH: Tensor | None,
            v_TKH: Tensor | None,
            rows_R: Tensor | None,
        ) -> Tensor:
            if k_TKH is not None:
                seen.append((q[:, 0] @ k_TKH[:, 0].T).std().item())
            return super().attend(layer, q, k_TKH, v_TKH, rows_R)

    stream: list[float] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: stream.append(out.std().item()))
        for layer in model.layers
    ]
    model(ids, positions, Watch(TEXT, [64]))
    for hook in hooks:
        hook.remove()
    assert all(0.5 < scores < 2 for scores in seen)  # without a scale they would be near 8 and 11
    assert stream[-1] < 2


def test_export_is_a_small_checkpoint_with_the_same_logits(
    model: TextModel, tmp_path: Path
) -> None:
    run, tokenizer, out = tmp_path / "run", tmp_path / "tokenizer", tmp_path / "out"
    run.mkdir()
    tokenizer.mkdir()
    torch.save({"model": TextModel(TEXT).state_dict()}, run / "checkpoint-9.pt")
    torch.save({"model": model.state_dict()}, run / "checkpoint-10.pt")
    (run / "run.json").write_text('{"train": {}}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_text(name)
    export(run, tokenizer, out)

    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in out.iterdir()) < MAX_BYTES
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 106, 50]
    config, loaded = load_model(out, dtype=torch.float32, ple="memory")
    assert config == Gemma4Config.load(out) == text_only(POCKET)
    for name, wanted in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], wanted.bfloat16().float()), name


@pytest.fixture(scope="module")
def towers() -> Towers:
    towers = Towers(POCKET)
    init_towers(towers, seed=0)
    return towers


def test_export_with_towers_is_small_and_keeps_them(
    model: TextModel, towers: Towers, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    state = {"model": model.state_dict(), "towers": towers.state_dict()}
    torch.save(state, run / "checkpoint-1.pt")
    (run / "run.json").write_text('{"train": {}}')
    export(run, TOKENIZER, out)
    assert sum(path.stat().st_size for path in out.iterdir()) < MAX_BYTES_WITH_TOWERS
    config, _ = load_model(out, dtype=torch.float32, ple="memory")
    assert config == POCKET
    loaded = load_towers(out, config, device="cpu", dtype=torch.float32).state_dict()
    for name, wanted in towers.state_dict().items():
        assert torch.equal(loaded[name], wanted.bfloat16().float()), name


def test_the_mean_of_checkpoints_is_rounded_where_it_is_asked_for(
    model: TextModel, towers: Towers, tmp_path: Path
) -> None:
    other = TextModel(TEXT)
    init_weights(other, seed=1)
    for name, decoder in (("a", model), ("b", other)):
        train.write(decoder.state_dict(), towers.state_dict(), None, TOKENIZER, tmp_path / name)
    train.average([tmp_path / "a", tmp_path / "b"], tmp_path / "exact", None)
    train.average([tmp_path / "a", tmp_path / "b"], tmp_path / "rounded", "4")
    stored = [
        load_model(tmp_path / name, dtype=torch.float32, ple="memory")[1].state_dict()
        for name in ("a", "b", "exact", "rounded")
    ]
    formats = decoder_formats(model, "4")
    for name in stored[0]:
        a, b, exact, low = (each[name] for each in stored)
        torch.testing.assert_close(exact, ((a + b) / 2).bfloat16().float(), rtol=0, atol=0)
        if name in formats:
            assert on_grid(low, formats[name]), name
            assert not torch.equal(low, exact)
        else:
            torch.testing.assert_close(low, exact, rtol=0, atol=0)
    seen = load_towers(tmp_path / "exact", POCKET, device="cpu", dtype=torch.float32).state_dict()
    for name, wanted in towers.state_dict().items():
        torch.testing.assert_close(seen[name], wanted.bfloat16().float(), rtol=0, atol=0)


@torch.no_grad()
def test_first_towers_give_rows_like_embeddings(towers: Towers) -> None:
    rng = np.random.default_rng(0)
    made = image.patches(Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)), 70)
    seen = towers.see(
        torch.from_numpy(made.values), torch.from_numpy(made.positions), [len(made.values)]
    )
    mel, valid = audio.mel(0.1 * rng.standard_normal(16_000).astype(np.float32))
    heard = towers.hear(torch.from_numpy(mel), torch.from_numpy(valid))
    for rows in (seen, heard):
        assert 0.8 < rows.pow(2).mean().sqrt() < 1.2  # embeddings: 1
        assert rows.std(0).mean() > 0.2  # places and times differ


def test_export_of_an_untrained_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="has no checkpoint; train a stretch first"):
        export(tmp_path, tmp_path, tmp_path / "out")


class Stopped(Exception):
    pass


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TextModel, Towers | None]]:
    """What a run begins with, in place of running it."""
    made: list[tuple[TextModel, Towers | None]] = []

    def trainer(model: TextModel, *_: object, towers: Towers | None, **__: object) -> None:
        made.append((model, towers))
        raise Stopped

    monkeypatch.setattr(train, "Trainer", trainer)
    return made


def begin(data: Path, start: Path | None, *, frozen: bool = False) -> None:
    with pytest.raises(Stopped):
        train.fit([data], data / "run", minutes=None, decay=False, start=start, frozen=frozen)


def test_a_run_may_begin_with_the_weights_of_a_checkpoint(
    begun: list[tuple[TextModel, Towers | None]], tmp_path: Path
) -> None:
    saved = TextModel(TEXT)
    init_weights(saved, seed=5)
    save_model(saved, POCKET, tmp_path, dtype=torch.float32)
    write_set(tmp_path, "train", [([2, 5, 1], [0, 0, 1])])
    for start in (tmp_path, None):
        begin(tmp_path, start)
    assert torch.equal(begun[0][0].embed_tokens.weight, saved.embed_tokens.weight)
    assert not torch.equal(begun[1][0].embed_tokens.weight, saved.embed_tokens.weight)
    assert begun[0][1] is begun[1][1] is None


def test_data_with_media_begin_towers_fresh_or_those_of_a_checkpoint(
    begun: list[tuple[TextModel, Towers | None]], model: TextModel, tmp_path: Path
) -> None:
    saved = Towers(POCKET)
    init_towers(saved, seed=5)
    save_model(model, POCKET, tmp_path / "blind", dtype=torch.float32)
    save_model(model, POCKET, tmp_path / "seeing", towers=saved, dtype=torch.float32)
    samples = np.zeros(3200, np.float32)
    tokens = audio.soft_tokens(len(samples))
    write_set(tmp_path, "train", [([2] + [4092] * tokens, [0] * (tokens + 1))])
    writer = MediaWriter(tmp_path, "train")
    writer.add(Medium(SOUND, pcm(samples), 1, tokens), start=0)
    writer.close()
    for name in ("blind", "seeing"):
        begin(tmp_path, tmp_path / name)
    for (_, towers), fresh in zip(begun, (True, False), strict=True):
        assert towers is not None
        same = [
            torch.equal(p, q) for p, q in zip(towers.parameters(), saved.parameters(), strict=True)
        ]
        assert all(same) != fresh
        assert all(p.requires_grad for p in towers.parameters())
    begin(tmp_path, tmp_path / "seeing", frozen=True)
    decoder, towers = begun[-1]
    assert towers is not None
    assert not any(p.requires_grad for p in towers.parameters())
    assert all(p.requires_grad for p in decoder.parameters())
