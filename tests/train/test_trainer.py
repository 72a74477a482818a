"""The loop: it learns, it resumes to the same weights, it refuses what is not its run."""

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.train.copying import copy_talks, fresh_model, write_set

from gemsmith.config import TextConfig
from gemsmith.errors import TrainError
from gemsmith.testing import assert_close, tolerance
from gemsmith.train.data import TokenSet
from gemsmith.train.trainer import TrainConfig, Trainer, checkpoints

TINY = TrainConfig(batch_tokens=256, lr=5e-3, warmup_steps=5, row_multiple=64, seed=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trainer(config: TextConfig, data: TokenSet, run: Path, **more: object) -> Trainer:
    return Trainer(fresh_model(config), TINY, data, run, **more)  # pyright: ignore[reportArgumentType]


def test_loss_falls_on_a_copy_task(config: TextConfig, copy_set: TokenSet, tmp_path: Path) -> None:
    folder = Path(copy_set.name).parent
    heldout = TokenSet(folder, "heldout")
    t = trainer(config, copy_set, tmp_path / "run", heldout=heldout)
    before = t.evaluate()["all"]
    t.train(steps=60)
    after = t.evaluate()["all"]
    assert before > 3.0  # no better than a guess among 40
    assert after < 0.6 * before
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["heldout"]["all"] == pytest.approx(after)


@pytest.mark.parametrize("muon", [True, False])
def test_interrupted_run_equals_uninterrupted_run(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path, muon: bool
) -> None:
    tiny = replace(TINY, muon=muon)
    whole = Trainer(fresh_model(config), tiny, copy_set, tmp_path / "whole")
    whole.train(steps=30)  # an epoch has about 16 batches
    for steps in (7, 12, 11):
        part = Trainer(fresh_model(config), tiny, copy_set, tmp_path / "parts")
        part.train(steps=steps)
    assert part.step == whole.step == 30
    assert part.packer.state == whole.packer.state
    for (name, a), b in zip(
        part.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_interrupted_decay_equals_uninterrupted_decay_and_can_be_undone(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    weights = {}
    for name, stretches in (("whole", (None,)), ("parts", (3, None))):
        run = tmp_path / name
        trainer(config, copy_set, run).train(steps=5)
        for steps in stretches:
            t = trainer(config, copy_set, run, decay=True)
            if t.decay is None:
                t.begin_decay(8)
            t.train(steps=steps)
        assert t.step == 13
        assert t.lr == 0
        weights[name] = t.model.state_dict()
        again = trainer(config, copy_set, run)
        assert again.step == 5
        assert again.lr == TINY.lr
    for name, a in weights["whole"].items():
        assert torch.equal(a, weights["parts"][name]), name


def test_a_run_goes_on_from_before_a_decay_and_decays_again(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    t = trainer(config, copy_set, tmp_path)
    t.train(steps=3)
    t.begin_decay(6)
    t.train()
    assert t.step == 9
    t = trainer(config, copy_set, tmp_path)
    assert t.step == 3
    t.train(steps=1)
    t = trainer(config, copy_set, tmp_path, decay=True)
    assert (t.step, t.decay) == (4, None)
    t.begin_decay(2)
    t.train()
    assert t.step == 6
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["checkpoint-4.pt", "checkpoint-6.pt", "decayed-9.pt"]


def test_run_of_another_shape_or_recipe_is_refused(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    trainer(config, copy_set, tmp_path)
    with pytest.raises(TrainError, match=r"another run: train\.lr is 0\.005 there and 0\.1 here"):
        Trainer(fresh_model(config), replace(TINY, lr=0.1), copy_set, tmp_path)
    other = replace(config, sliding_window=4)
    with pytest.raises(TrainError, match=r"model\.sliding_window is 8 there and 4 here"):
        Trainer(fresh_model(other), TINY, copy_set, tmp_path)


def test_run_record_that_is_not_one_is_refused(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(TrainError, match=r"run\.json: not the record of a run"):
        trainer(config, copy_set, tmp_path)


def test_damaged_checkpoint_is_named_with_the_way_out(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    trainer(config, copy_set, tmp_path).train(steps=1)
    trainer(config, copy_set, tmp_path).train(steps=1)
    path = tmp_path / "checkpoint-2.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"checkpoint-2\.pt cannot be resumed .* delete it"):
        trainer(config, copy_set, tmp_path)
    path.unlink()
    assert trainer(config, copy_set, tmp_path).step == 1


def test_run_goes_on_with_a_data_set_that_has_grown(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    trainer(config, copy_set, tmp_path / "run").train(steps=3)
    grown = tmp_path / "grown"
    grown.mkdir()
    write_set(grown, "train", copy_talks(400, 0))
    t = trainer(config, TokenSet(grown, "train"), tmp_path / "run")
    assert t.step == 3
    assert t.packer.state == (0, 3)
    t.train(steps=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_and_leaves_a_checkpoint(
    config: TextConfig,
    copy_set: TokenSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    t = trainer(config, copy_set, tmp_path)
    train_step = Trainer.train_step

    def interrupted(self: Trainer, batch: object) -> tuple[float, float]:
        if self.step == 2:
            os.kill(os.getpid(), number)
        return train_step(self, batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    before = signal.getsignal(number)
    t.train(steps=50)
    assert t.step == 3
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3.pt"]


def test_failed_save_leaves_the_newest_checkpoint_whole(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(config, copy_set, tmp_path)
    t.train(steps=1)
    whole = (tmp_path / "checkpoint-1.pt").read_bytes()

    def full_disk(_: object, file: object) -> None:
        file.write(b"half")  # pyright: ignore[reportAttributeAccessIssue]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        t.save()
    assert (tmp_path / "checkpoint-1.pt").read_bytes() == whole


def test_two_checkpoints_are_kept_and_the_one_before_a_decay(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    t = trainer(config, copy_set, tmp_path)
    for _ in range(3):
        t.train(steps=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2.pt", "checkpoint-3.pt"]
    t.begin_decay(10)
    for _ in range(3):
        t.train(steps=1)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["checkpoint-3.pt", "checkpoint-5.pt", "checkpoint-6.pt"]


def test_loss_that_is_not_finite_stops_before_the_weights_change(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    t = trainer(config, copy_set, tmp_path)
    with torch.no_grad():
        t.model.norm.weight.fill_(float("nan"))
    before = {k: v.clone() for k, v in t.model.state_dict().items()}
    with pytest.raises(TrainError, match=r"step 0: loss nan.*lower lr"):
        t.train(steps=1)
    for name, value in t.model.state_dict().items():
        assert torch.equal(value, before[name]) or name == "norm.weight"
    assert checkpoints(tmp_path) == []


def test_progress_is_drawn_where_matplotlib_is_there(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    trainer(config, copy_set, tmp_path).train(steps=10)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# PyTorch's tracer looks at .grad of every input and warns of what it does itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_run_takes_the_same_steps(
    config: TextConfig, copy_set: TokenSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = config.layer_types[: config.num_hidden_layers // 2]
    small = replace(
        config, num_hidden_layers=len(half), layer_types=half, num_kv_shared_layers=len(half) // 2
    )
    # In bfloat16 a last bit that differs can become the first of another score.
    monkeypatch.setattr("gemsmith.train.trainer.training_dtype", lambda _: torch.float32)
    plain = trainer(small, copy_set, tmp_path / "plain")
    plain.train(steps=1)
    # Traced and split as for the real compiler, which takes minutes; run by PyTorch's own kernels.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiled = trainer(small, copy_set, tmp_path / "compiled", compiled=True)
    compiled.heldout = TokenSet(Path(copy_set.name).parent, "heldout")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled.train(steps=1)
    # Before and after attention in each layer, and the head.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs >= 2 * len(half) + 1
    for name, a in plain.model.state_dict().items():
        assert_close(compiled.model.state_dict()[name], a, tolerance(torch.float32, 64, steps=8))
