"""Trainers side by side: after a meeting all have the mean, and they end and save together."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipes.pocket import train as pocket
from tests.train.copying import copy_talks, fresh_model, write_set

from gemsmith.config import TextConfig
from gemsmith.errors import TrainError
from gemsmith.train.data import TokenSet
from gemsmith.train.peers import MEETING_STEPS, Peers, join
from gemsmith.train.trainer import TrainConfig, Trainer, checkpoints

TINY = TrainConfig(batch_tokens=64, lr=5e-3, warmup_steps=5, row_multiple=64, seed=1)
COUNT = 2
Scene = Callable[[Peers, TextConfig, Path], None]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set for each trainer."""
    for rank in range(COUNT):
        (tmp_path / f"data-{rank}").mkdir()
        write_set(tmp_path / f"data-{rank}", "train", copy_talks(200, rank))
    return tmp_path


def trainer(config: TextConfig, folder: Path, rank: int, peers: Peers | None) -> Trainer:
    data = TokenSet(folder / f"data-{rank}", "train")
    run = folder / ("alone" if peers is None else "together") / str(rank)
    return Trainer(fresh_model(config), TINY, data, run, peers=peers)


def saved(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    state = torch.load(checkpoints(run)[-1], weights_only=True)
    return state["step"], state["model"]


def together(scene: Scene, config: TextConfig, folder: Path) -> None:
    """Act a scene in processes that meet, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    actors = [
        spawn.Process(target=act, args=(scene, rank, port, config, folder)) for rank in range(COUNT)
    ]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join(120)
        actor.kill()
    assert [actor.exitcode for actor in actors] == [0] * COUNT


def act(scene: Scene, rank: int, port: int, config: TextConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(COUNT),
        "RANK": str(rank),
    }
    peers = join()
    assert peers is not None
    scene(peers, config, folder)
    torch.distributed.destroy_process_group()


def one_meeting(peers: Peers, config: TextConfig, folder: Path) -> None:
    trainer(config, folder, peers.rank, peers).train(steps=MEETING_STEPS)


def test_after_a_meeting_all_have_the_mean(config: TextConfig, folder: Path) -> None:
    together(one_meeting, config, folder)
    alone = []
    for rank in range(COUNT):
        trainer(config, folder, rank, None).train(steps=MEETING_STEPS)
        alone.append(saved(folder / "alone" / str(rank))[1])
    first, second = (saved(folder / "together" / str(rank)) for rank in range(COUNT))
    assert first[0] == second[0] == MEETING_STEPS
    for name, weight in first[1].items():
        assert torch.equal(weight, second[1][name]), name
        assert torch.equal(weight, (alone[0][name] + alone[1][name]) / 2), name
    assert not torch.equal(alone[0]["norm.weight"], alone[1]["norm.weight"])


def one_has_no_time(peers: Peers, config: TextConfig, folder: Path) -> None:
    mine = trainer(config, folder, peers.rank, peers)
    mine.begin_decay(1000 + peers.rank)
    assert mine.decay is not None
    assert mine.decay.steps == 1000
    mine.train(minutes=1e-6 if peers.rank else None)


def test_all_end_where_one_must(config: TextConfig, folder: Path) -> None:
    together(one_has_no_time, config, folder)
    steps = {saved(folder / "together" / str(rank))[0] for rank in range(COUNT)}
    assert steps in ({0}, {MEETING_STEPS})


def one_is_ahead(peers: Peers, config: TextConfig, folder: Path) -> None:
    if peers.rank == 0:
        trainer(config, folder, 0, peers)
        return
    (folder / "together").mkdir()
    run = trainer(config, folder, 1, None)
    run.train(steps=3)
    run.run_folder.rename(folder / "together" / "1")
    with pytest.raises(TrainError, match=r"at step 3 and the first of its peers at another; del"):
        trainer(config, folder, 1, peers)


def test_one_that_is_ahead_is_refused(config: TextConfig, folder: Path) -> None:
    together(one_is_ahead, config, folder)


def test_alone_there_are_no_peers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is None
    with pytest.raises(TrainError, match=r"--data names 2 folders, one for each process"):
        pocket.fit([folder, folder], folder / "run", minutes=None, decay=False)
