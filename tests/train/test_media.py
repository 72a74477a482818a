"""Pictures and sounds in training: their files, their features, and that the towers learn."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.train.copying import fresh_model, write_set

from gemsmith.cache.none import NoCache
from gemsmith.config import Gemma4Config
from gemsmith.errors import TrainError
from gemsmith.media import audio, image
from gemsmith.model.towers import Towers
from gemsmith.testing import assert_close, tiny_media_config, tolerance
from gemsmith.train.data import MAX_PATCHES, TokenSet, make_batch, plan_epoch
from gemsmith.train.loss import backward_in_chunks
from gemsmith.train.media import IMAGE, RECORD, SOUND, MediaWriter, Medium, pcm
from gemsmith.train.trainer import TrainConfig, Trainer, checkpoints

VOCABULARY = 40
COLORS = {10: (190, 40, 40), 11: (40, 170, 50)}
"""The answer to a picture, and what it shows."""
TONES = {12: 300.0, 13: 2500.0}
"""The answer to a sound, and its pitch in Hz."""
TINY = TrainConfig(batch_tokens=192, lr=5e-3, warmup_steps=5, row_multiple=64, seed=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def two_layers(size: str = "E2B") -> Gemma4Config:
    """Two layers of the size, the last of each kind of attention, and the tests' small towers."""
    config = tiny_media_config(size, vocab_size=VOCABULARY)
    shared = 1 if config.text_config.num_kv_shared_layers else 0
    types = ("sliding_attention", "full_attention")
    if shared:
        types = ("full_attention", "full_attention")
    text = replace(
        config.text_config, num_hidden_layers=2, layer_types=types, num_kv_shared_layers=shared
    )
    return replace(config, text_config=text)


CONFIG = two_layers()


def square(answer: int, rng: np.random.Generator) -> Image.Image:
    """A square of the answer's color, of any shade and size, somewhere on grey."""
    picture = np.full((48, 48, 3), rng.integers(90, 160), np.uint8)
    x, y, side = rng.integers(0, 20), rng.integers(0, 20), rng.integers(12, 28)
    color = np.array(COLORS[answer]) + rng.integers(-30, 30)
    picture[y : y + side, x : x + side] = color.clip(0, 255)
    return Image.fromarray(picture)


def tone(answer: int, rng: np.random.Generator) -> np.ndarray:
    """0.3 to 0.5 s of the answer's pitch in noise, on the int16 grid on which sounds are kept."""
    n = int(rng.integers(4800, 8000))
    wave = np.sin(2 * np.pi * TONES[answer] * rng.uniform(0.9, 1.1) * np.arange(n) / 16_000)
    noisy = 0.3 * wave + 0.02 * rng.standard_normal(n)
    return (np.round(noisy * 32768) / 32768).astype(np.float32)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_media_set(
    folder: Path, split: str, talks: Sequence[Sequence[Image.Image | np.ndarray | int]]
) -> None:
    """Talks of ids, pictures and sounds; their last token is learned."""
    folder.mkdir(exist_ok=True)
    sequences, at = [], 0
    with MediaWriter(folder, split) as writer:
        for talk in talks:
            ids: list[int] = []
            for part in talk:
                if isinstance(part, int):
                    ids.append(part)
                    continue
                if isinstance(part, Image.Image):
                    kind, data, budget = IMAGE, png(part), 70
                    tokens = image.patches(part, budget).soft_tokens
                    soft = CONFIG.image_token_id
                else:
                    kind, data, budget = SOUND, pcm(part), 0
                    tokens, soft = audio.soft_tokens(len(part)), CONFIG.audio_token_id
                writer.add(Medium(kind, data, len(ids), tokens, budget), start=at)
                assert soft is not None
                ids += [soft] * tokens
            sequences.append((ids, [0] * (len(ids) - 1) + [1]))
            at += len(ids)
    write_set(folder, split, sequences)


def riddles(count: int, seed: int) -> list[list[Any]]:
    """What color, what pitch: half pictures, half sounds, each answer equally often."""
    rng = np.random.default_rng(seed)
    talks = []
    for number in range(count):
        answer = 10 + number % 4
        shown = square(answer, rng) if answer in COLORS else tone(answer, rng)
        talks.append([2, 5, shown, 6, answer])
    return talks


KINDS = ("color", "pitch")


def write_riddles(folder: Path, kinds: Sequence[str] = KINDS) -> TokenSet:
    """80 to learn and 16 held out of each kind; the training split is opened."""
    for split, count, seed in (("train", 160, 0), ("heldout", 32, 1)):
        chosen = [(talk, c % 4 // 2) for c, talk in enumerate(riddles(count, seed))]
        chosen = [(talk, kind) for talk, kind in chosen if KINDS[kind] in kinds]
        write_media_set(folder, split, [talk for talk, _ in chosen])
        data = {"names": KINDS, "kinds": [kind for _, kind in chosen]}
        (folder / f"{split}.kinds.json").write_text(json.dumps(data))
    return TokenSet(folder, "train")


@pytest.fixture
def riddle_set(tmp_path: Path) -> TokenSet:
    return write_riddles(tmp_path / "riddles")


def fresh_towers(config: Gemma4Config = CONFIG) -> Towers:
    towers = Towers(config)
    towers.init_weights(torch.Generator().manual_seed(0))
    return towers


def trainer(
    data: TokenSet,
    run: Path,
    *,
    towers: Towers | None = None,
    blind: bool = False,
    heldout: TokenSet | None = None,
) -> Trainer:
    """With the given towers, or fresh ones, or as a run of text alone."""
    model, towers = fresh_model(CONFIG.text_config), None if blind else towers or fresh_towers()
    return Trainer(model, TINY, data, run, towers=towers, heldout=heldout)


@pytest.mark.parametrize(("kind", "steps"), [("color", 45), ("pitch", 20)])
def test_towers_learn_to_tell_colors_and_pitches(kind: str, steps: int, tmp_path: Path) -> None:
    data = write_riddles(tmp_path / "riddles", [kind])
    t = trainer(data, tmp_path / "run", heldout=TokenSet(tmp_path / "riddles", "heldout"))
    t.train(steps=steps)
    # Who neither sees nor hears can do no better than ln 2 = 0.69: both answers are as likely.
    assert t.evaluate()[kind] < 0.2


def test_held_out_loss_is_told_by_kind_of_media(tmp_path: Path) -> None:
    told = []
    for kinds in (KINDS, *([kind] for kind in KINDS)):
        folder = tmp_path / "-".join(kinds)
        data = write_riddles(folder, kinds)
        t = trainer(data, folder / "run", heldout=TokenSet(folder, "heldout"))
        t.dtype = torch.float32
        told.append(t.evaluate())
    both, colors, pitches = told
    # Sums over a patch's 768 values, then two over up to 64 in each of the towers' and the
    # decoder's two layers; a loss is off by the errors of two logits at most.
    limit = 2 * tolerance(torch.float32, 768 + 8 * 64)
    assert both == pytest.approx(colors | pitches, rel=0, abs=limit)
    assert list(colors) == ["color"]


def test_a_batch_has_the_features_that_inference_makes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    red, high, green = square(10, rng), tone(13, rng), square(11, rng)
    write_media_set(tmp_path, "train", [[2, 3], [2, red, 7], [2, 7, high, 8, green, 7]])
    batch = make_batch(TokenSet(tmp_path, "train"), [2, 0, 1], batch_tokens=256)
    soft = batch.soft
    assert soft is not None
    pictures = [image.patches(picture, 70) for picture in (green, red)]
    assert soft.lengths == tuple(len(made.values) for made in pictures)
    assert np.array_equal(soft.values_PC, np.concatenate([made.values for made in pictures]))
    assert np.array_equal(soft.positions_P2, np.concatenate([made.positions for made in pictures]))
    assert len(soft.clips) == 1
    for ours, wanted in zip(soft.clips[0], audio.mel(high), strict=True):
        assert np.array_equal(ours, wanted)
    seen = (batch.ids_T == CONFIG.image_token_id).nonzero().flatten().tolist()
    heard = (batch.ids_T == CONFIG.audio_token_id).nonzero().flatten().tolist()
    assert soft.at_S.tolist() == seen + heard
    assert soft.image_S.tolist() == [0] * 64 + [1] * 64 + [-1] * len(heard)


@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_packed_conversations_equal_single_ones(size: str, tmp_path: Path) -> None:
    config, rng = two_layers(size), np.random.default_rng(0)
    sound = tone(12, rng) if size == "E2B" else 9  # the larger sizes do not hear
    talks = [[2, 5, square(10, rng), 6, 10], [2, 7, 8], [2, square(11, rng), 6, sound, 11]]
    write_media_set(tmp_path, "train", talks)
    data = TokenSet(tmp_path, "train")
    model, towers = fresh_model(config.text_config), fresh_towers(config)
    t = Trainer(model, TINY, data, tmp_path / "run", towers=towers)
    with torch.no_grad():
        together = t._hidden(make_batch(data, [0, 1, 2], batch_tokens=256, row_multiple=256))
        start = 0
        for c in range(3):
            n = int(data.lengths[c])
            alone = t._hidden(make_batch(data, [c], batch_tokens=n, row_multiple=n))
            limit = tolerance(torch.float32, 64, steps=4)
            assert_close(together[start : start + n], alone, limit)
            start += n


def test_an_image_sees_itself_whole_in_sizes_that_have_it(tmp_path: Path) -> None:
    config = two_layers("31B")
    write_media_set(tmp_path, "train", [[2, square(10, np.random.default_rng(0)), 6]])
    data = TokenSet(tmp_path, "train")
    model, towers = fresh_model(config.text_config), fresh_towers(config)
    t = Trainer(model, TINY, data, tmp_path / "run", towers=towers)
    batch = make_batch(data, [0], batch_tokens=66, row_multiple=66)
    assert batch.soft is not None
    with torch.no_grad():
        blocks_T = torch.where(batch.ids_T == config.image_token_id, 0, -1)
        rows = towers.see(batch.soft.values_PC, batch.soft.positions_P2, batch.soft.lengths)
        wanted = model(
            batch.ids_T,
            batch.positions_T,
            NoCache(config.text_config, [66], blocks_T),
            soft=(torch.arange(1, 65), rows),
        )
        assert_close(t._hidden(batch), wanted, tolerance(torch.float32, 64, steps=4))


def test_gradients_reach_every_parameter_of_the_towers(
    riddle_set: TokenSet, tmp_path: Path
) -> None:
    t = trainer(riddle_set, tmp_path / "run")
    batch = make_batch(riddle_set, [0, 1, 2, 3], batch_tokens=256)
    assert t.towers is not None
    # Without weights at zero every path counts.
    for p in t.towers.parameters():
        torch.nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.2)
    backward_in_chunks(t.model.logits, t._hidden(batch), batch.targets_R, batch.weights_R, chunk=64)
    for name, p in t.towers.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_every_parameter_of_the_towers_is_trained_and_their_bounds_stay(
    riddle_set: TokenSet, tmp_path: Path
) -> None:
    t = trainer(riddle_set, tmp_path / "run")
    before = {name: p.clone() for name, p in fresh_towers().state_dict().items()}
    t.train(steps=3)
    assert t.towers is not None
    for name, value in t.towers.state_dict().items():
        bound = name.endswith(("_min", "_max"))
        assert torch.equal(value, before[name]) == bound, name
        assert not bound or value.isinf(), name


def test_interrupted_run_with_media_equals_uninterrupted_run(
    riddle_set: TokenSet, tmp_path: Path
) -> None:
    whole = trainer(riddle_set, tmp_path / "whole")
    whole.train(steps=9)
    for steps in (2, 7):
        part = trainer(riddle_set, tmp_path / "parts")
        part.train(steps=steps)
    assert part.step == whole.step == 9
    wanted = whole.trained.state_dict()
    for name, value in part.trained.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_batches_without_media_take_the_steps_of_a_text_run(
    copy_set: TokenSet, tmp_path: Path
) -> None:
    blind = trainer(copy_set, tmp_path / "blind", blind=True)
    seeing = trainer(copy_set, tmp_path / "seeing")
    for t in (blind, seeing):
        t.train(steps=5)
    wanted = blind.model.state_dict()
    for name, value in seeing.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_a_run_of_before_there_were_towers_goes_on_and_keeps_its_layout(
    copy_set: TokenSet, tmp_path: Path
) -> None:
    made = trainer(copy_set, tmp_path / "made", blind=True)
    made.train(steps=2)
    old = tmp_path / "old"
    old.mkdir()
    train = {
        "batch_tokens": 192,
        "lr": 0.005,
        "weight_decay": 0.1,
        "warmup_steps": 5,
        "grad_clip": 1.0,
        "muon": True,
        "seed": 1,
        "row_multiple": 64,
    }
    record = {"train": train, "model": CONFIG.text_config.to_dict()}
    (old / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    state = {
        "step": 2,
        "model": made.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in made.optimizers],
        "data": (0, 2),
        "decay": None,
        "seconds_per_step": 0.5,
    }
    torch.save(state, old / "checkpoint-2.pt")
    # Only what came later is new: a run that says nothing of bits is one without.
    now = json.loads((tmp_path / "made/run.json").read_text())
    assert now == record | {"train": train | {"bits": None}}
    resumed = trainer(copy_set, old, blind=True)
    assert resumed.step == 2
    for t in (made, resumed):
        t.train(steps=1)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, made.model.state_dict()[name]), name
    assert torch.load(checkpoints(old)[-1], weights_only=True).keys() == state.keys()


def test_a_run_keeps_its_towers_or_their_absence(
    riddle_set: TokenSet, copy_set: TokenSet, tmp_path: Path
) -> None:
    trainer(riddle_set, tmp_path / "seeing")
    trainer(copy_set, tmp_path / "blind", blind=True)
    with pytest.raises(TrainError, match="seeing holds a run with towers, and this one is not"):
        trainer(copy_set, tmp_path / "seeing", blind=True)
    with pytest.raises(TrainError, match="blind holds a run without towers, and this one is not"):
        trainer(riddle_set, tmp_path / "blind")
    assert CONFIG.audio_config is not None
    other = replace(CONFIG, audio_config=None)
    with pytest.raises(TrainError, match=r"another run: towers\.audio_config is .* and None here"):
        trainer(copy_set, tmp_path / "seeing", towers=fresh_towers(other))


def test_media_without_a_tower_for_them_are_refused(riddle_set: TokenSet, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="train has pictures but there is no tower to take them"):
        trainer(riddle_set, tmp_path / "run", blind=True)
    deaf = fresh_towers(replace(CONFIG, audio_config=None))
    with pytest.raises(TrainError, match="train has sounds but there is no tower"):
        trainer(riddle_set, tmp_path / "run", towers=deaf)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, MAX_PATCHES)), max_size=100),
    seed=st.integers(0, 9),
)
def test_batches_hold_no_more_patches_than_allowed(sizes: list[tuple[int, int]], seed: int) -> None:
    lengths, patches = np.array(sizes, np.int64).reshape(-1, 2).T
    plan = plan_epoch(lengths, batch_tokens=64, seed=seed, epoch=0, patches=patches)
    assert sorted(c for members in plan for c in members) == list(range(len(sizes)))
    assert all(lengths[members].sum() <= 64 for members in plan)
    assert all(patches[members].sum() <= MAX_PATCHES for members in plan)


def test_conversation_of_too_many_patches_is_refused() -> None:
    with pytest.raises(TrainError, match=r"conversation 1 has 10081 patches .* smaller budgets"):
        plan_epoch(
            np.array([3, 3]), batch_tokens=64, seed=0, epoch=0, patches=np.array([0, 10_081])
        )


def test_patches_of_a_conversation_are_counted_without_reading_its_pictures(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    red, low = square(10, rng), tone(12, rng)
    write_media_set(tmp_path, "train", [[2, red, 7, red], [2, 3], [2, low, 7]])
    assert TokenSet(tmp_path, "train").patches.tolist() == [2 * 64 * 9, 0, 0]


def test_a_set_of_text_has_no_media_files_not_even_of_a_set_before(tmp_path: Path) -> None:
    write_media_set(tmp_path, "train", [[2, tone(12, np.random.default_rng(0)), 7]])
    assert TokenSet(tmp_path, "train").media is not None
    write_media_set(tmp_path, "train", [[2, 3]])
    assert TokenSet(tmp_path, "train").media is None
    assert not list(tmp_path.glob("*media*"))


@pytest.mark.parametrize("part", ["media.bin", "media_index.npy"])
def test_missing_media_file_is_named(riddle_set: TokenSet, part: str) -> None:
    folder = Path(riddle_set.name).parent
    (folder / f"train.{part}").unlink()
    with pytest.raises(TrainError, match=rf"train\.{part} does not exist; build the data set"):
        TokenSet(folder, "train")


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("kind", 3, 7, r"medium 3 is neither image nor sound \(7\)"),
        ("begin", 2, 0, "medium 2 lies elsewhere"),
        ("end", 1, 0, "medium 1 lies elsewhere"),
        ("at", 0, -5, r"medium 0 stands outside its conversation \(-5\)"),
        ("at", 1, 2, "medium 1 stands outside its conversation"),
        ("at", -1, 1 << 40, "medium 159 stands outside its conversation"),
        ("tokens", 0, 0, "medium 0 stands outside its conversation"),
        ("tokens", 0, 500, "medium 0 stands outside its conversation"),
    ],
)
def test_index_that_does_not_fit_is_refused(
    riddle_set: TokenSet, field: str, row: int, value: int, message: str
) -> None:
    path = Path(riddle_set.name).parent / "train.media_index.npy"
    index = np.load(path)
    index[field][row] = value
    np.save(path, index)
    with pytest.raises(TrainError, match=message):
        TokenSet(path.parent, "train")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.zeros(3), "is not an index of media but float64"),
        (np.zeros(0, RECORD), r"is not an index of media but .* \[0\]"),
    ],
)
def test_array_that_is_no_index_is_refused(
    riddle_set: TokenSet, index: np.ndarray, message: str
) -> None:
    folder = Path(riddle_set.name).parent
    np.save(folder / "train.media_index.npy", index)
    with pytest.raises(TrainError, match=message):
        TokenSet(folder, "train")


def test_damaged_index_is_refused(riddle_set: TokenSet) -> None:
    path = Path(riddle_set.name).parent / "train.media_index.npy"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TrainError, match=r"media files are damaged .*; build the data set again"):
        TokenSet(path.parent, "train")


def test_media_of_another_length_are_refused(riddle_set: TokenSet) -> None:
    path = Path(riddle_set.name).parent / "train.media.bin"
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    with pytest.raises(TrainError, match=rf"has {len(whole) + 4} bytes and its index {len(whole)}"):
        TokenSet(path.parent, "train")
    path.write_bytes(whole[:-2])
    with pytest.raises(TrainError, match="medium 159 lies elsewhere"):
        TokenSet(path.parent, "train")


def test_damaged_picture_is_named(riddle_set: TokenSet) -> None:
    path = Path(riddle_set.name).parent / "train.media.bin"
    with path.open("r+b") as file:
        file.write(b"\0\0\0\0")
    data = TokenSet(path.parent, "train")
    with pytest.raises(TrainError, match=r"medium 0 cannot be read \(.*\); build the data set"):
        make_batch(data, [0], batch_tokens=128)


def test_soft_tokens_that_the_towers_would_not_make_are_refused(tmp_path: Path) -> None:
    picture = square(10, np.random.default_rng(0))
    write_set(tmp_path, "train", [([2] + [34] * 63 + [7], [0] * 65)])
    with MediaWriter(tmp_path, "train") as writer:
        writer.add(Medium(IMAGE, png(picture), 1, 63, 70), start=0)
    with pytest.raises(TrainError, match="medium 0 makes 64 soft tokens, its index says 63"):
        make_batch(TokenSet(tmp_path, "train"), [0], batch_tokens=128)
    with MediaWriter(tmp_path, "train") as writer:
        writer.add(Medium(IMAGE, png(picture), 1, 64, 70), start=0)
    with pytest.raises(TrainError, match="64 soft tokens, its index says 64 of 2 ids"):
        make_batch(TokenSet(tmp_path, "train"), [0], batch_tokens=128)


def test_writing_begins_anew_and_leaves_no_set_where_it_failed(tmp_path: Path) -> None:
    sound = pcm(np.zeros(800, np.float32))
    blob, index = tmp_path / "train.media.bin", tmp_path / "train.media_index.npy"
    for _ in range(2):
        with MediaWriter(tmp_path, "train") as writer:
            for number in range(3):
                writer.add(Medium(SOUND, sound, 0, 2), start=5 * number)
    assert blob.read_bytes() == 3 * sound
    assert np.load(index)["end"].tolist() == [1600, 3200, 4800]

    def add_and_fail(writer: MediaWriter) -> None:
        writer.add(Medium(SOUND, sound, 0, 2), start=0)
        raise KeyError

    with pytest.raises(KeyError), MediaWriter(tmp_path, "train") as writer:
        add_and_fail(writer)
    assert [path.name for path in tmp_path.iterdir()] == [blob.name]
    with MediaWriter(tmp_path, "train"):
        pass
    assert list(tmp_path.iterdir()) == []
