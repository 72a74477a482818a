"""The embedded model's shape, first weights and export."""

import json
from pathlib import Path

import pytest
import torch
from recipes.pocket import train
from recipes.pocket.train import POCKET, TEXT, export, init_weights
from torch import Tensor

from gemsmith.cache.none import NoCache
from gemsmith.config import Gemma4Config
from gemsmith.errors import TrainError
from gemsmith.model.text import TextModel
from gemsmith.weights.load import load_model
from gemsmith.weights.save import save_model

MAX_BYTES = 16_000_000


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
    assert config == Gemma4Config.load(out) == POCKET
    for name, wanted in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], wanted.bfloat16().float()), name


def test_export_of_an_untrained_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="has no checkpoint; train a stretch first"):
        export(tmp_path, tmp_path, tmp_path / "out")


def test_a_run_may_begin_with_the_weights_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[torch.Tensor] = []

    class Stopped(Exception):
        pass

    def trainer(model: TextModel, *_: object, **__: object) -> None:
        begun.append(model.embed_tokens.weight.detach().clone())
        raise Stopped

    monkeypatch.setattr(train, "Trainer", trainer)
    monkeypatch.setattr(train, "TokenSet", lambda *_: None)
    saved = TextModel(TEXT)
    init_weights(saved, seed=5)
    save_model(saved, POCKET, tmp_path, dtype=torch.float32)
    for start in (tmp_path, None):
        with pytest.raises(Stopped):
            train.fit(tmp_path, tmp_path / "run", minutes=None, decay=False, start=start)
    assert torch.equal(begun[0], saved.embed_tokens.weight)
    assert not torch.equal(begun[1], saved.embed_tokens.weight)
