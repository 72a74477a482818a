"""Which tokens are learned, and how conversations become batches."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.copying import write_set

from gemsmith.errors import TrainError
from gemsmith.train.data import Packer, TokenSet, make_batch, model_turn_mask, plan_epoch

OPEN, CLOSE, MODEL, NEWLINE, USER, RESPONSE, RESPONSE_END, CALL, TEXT = range(105, 114)


def mask(ids: list[int]) -> list[int]:
    return model_turn_mask(
        ids,
        model_prefix=(OPEN, MODEL, NEWLINE),
        turn_end=CLOSE,
        response_start=RESPONSE,
        response_end=RESPONSE_END,
    ).tolist()


def test_only_model_turns_are_learned_from_after_the_prefix_to_the_close() -> None:
    user = [2, OPEN, USER, NEWLINE, TEXT, CLOSE, NEWLINE]
    model = [OPEN, MODEL, NEWLINE, TEXT, TEXT, CLOSE, NEWLINE]
    learned = [0, 0, 0, 1, 1, 1, 0]
    assert mask(user + model + user + model) == [0] * 7 + learned + [0] * 7 + learned


def test_call_and_response_opener_are_learned_but_not_what_the_runtime_answers() -> None:
    ids = [OPEN, MODEL, NEWLINE, CALL, RESPONSE, TEXT, TEXT, RESPONSE_END, TEXT, CLOSE, NEWLINE]
    assert mask(ids) == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0]


def test_second_of_two_responses_is_opened_by_the_runtime() -> None:
    first, second = [RESPONSE, TEXT, RESPONSE_END], [RESPONSE, TEXT, RESPONSE_END]
    ids = [OPEN, MODEL, NEWLINE, CALL, CALL, *first, *second, TEXT, CLOSE]
    assert mask(ids) == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]


def test_call_after_a_response_is_learned_with_its_own_opener() -> None:
    ids = [OPEN, MODEL, NEWLINE, CALL, RESPONSE, TEXT, RESPONSE_END, CALL, RESPONSE, RESPONSE_END]
    assert mask(ids) == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0]


def test_close_marker_inside_a_response_does_not_end_the_turn() -> None:
    ids = [OPEN, MODEL, NEWLINE, CALL, RESPONSE, CLOSE, RESPONSE_END, TEXT, CLOSE, TEXT]
    assert mask(ids) == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
)
def test_each_conversation_is_in_one_batch_of_an_epoch_and_no_batch_overflows(
    lengths: list[int], seed: int, epoch: int
) -> None:
    plan = plan_epoch(np.array(lengths), batch_tokens=64, seed=seed, epoch=epoch)
    assert sorted(c for members in plan for c in members) == list(range(len(lengths)))
    assert all(sum(lengths[c] for c in members) <= 64 for members in plan)


def test_packing_of_ordinary_lengths_leaves_under_three_percent_padding() -> None:
    lengths = np.random.default_rng(0).integers(40, 1024, 5000)
    plan = plan_epoch(lengths, batch_tokens=4096, seed=0, epoch=0)
    assert lengths.sum() > 0.97 * 4096 * len(plan)


def test_epochs_and_seeds_differ_in_order() -> None:
    lengths = np.full(100, 10)
    plans = [
        plan_epoch(lengths, batch_tokens=20, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]


def test_conversation_longer_than_a_batch_is_refused() -> None:
    with pytest.raises(TrainError, match=r"conversation 1 has 65 tokens but a batch holds 64"):
        plan_epoch(np.array([3, 65]), batch_tokens=64, seed=0, epoch=0)


@pytest.fixture
def three_talks(tmp_path: Path) -> TokenSet:
    talks = [([2, 11, 12, 13], [0, 0, 1, 1]), ([2, 21], [1, 1]), ([2, 31, 32], [0, 0, 0])]
    write_set(tmp_path, "train", talks)
    return TokenSet(tmp_path, "train")


def test_targets_are_next_tokens_within_their_own_conversation(three_talks: TokenSet) -> None:
    batch = make_batch(three_talks, [0, 1, 2], batch_tokens=12)
    assert batch.ids_T.tolist() == [2, 11, 12, 13, 2, 21, 2, 31, 32, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 1, 2]
    assert batch.lengths == (4, 2, 3, 3)
    # The second mask says to learn a first token; still the row before it is not asked for it.
    assert batch.rows_R.tolist() == [1, 2, 4]
    assert batch.targets_R.tolist() == [12, 13, 21]


def test_rows_that_round_up_are_ascending_and_not_learned(three_talks: TokenSet) -> None:
    batch = make_batch(three_talks, [0, 1, 2], batch_tokens=12, row_multiple=5)
    assert batch.rows_R.tolist() == [0, 1, 2, 3, 4]
    assert batch.targets_R.tolist() == [-100, 12, 13, -100, 21]


def test_batch_with_nothing_to_learn_still_has_rows(three_talks: TokenSet) -> None:
    batch = make_batch(three_talks, [2], batch_tokens=4, row_multiple=2)
    assert batch.targets_R.tolist() == [-100, -100]


def test_packer_resumes_where_another_stood(copy_set: TokenSet) -> None:
    first = Packer(copy_set, batch_tokens=64, seed=3)
    for _ in range(70):  # past the end of an epoch
        next(first)
    assert first.state[0] == 1
    second = Packer(copy_set, batch_tokens=64, seed=3)
    second.seek(*first.state)
    for _ in range(3):
        assert torch.equal(next(first).ids_T, next(second).ids_T)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"train\.ids\.npy does not exist; build the data set"):
        TokenSet(tmp_path, "train")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "train", [([1, 2, 3], [0, 0, 1])])
    np.save(tmp_path / "train.mask.npy", np.zeros(2, np.uint8))
    with pytest.raises(TrainError, match="3 ids, 2 mask entries and offsets up to 3"):
        TokenSet(tmp_path, "train")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_pickle_in_place_of_an_array_is_refused_not_run(tmp_path: Path) -> None:
    write_set(tmp_path, "train", [([1, 2, 3], [0, 0, 1])])
    (tmp_path / "train.ids.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(TrainError, match=r"not \.npy arrays"):
        TokenSet(tmp_path, "train")
    assert not (tmp_path / "boom").exists()


def test_kinds_of_another_data_set_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "train", [([1, 2, 3], [0, 0, 1])])
    (tmp_path / "train.kinds.json").write_text('{"names": ["a"], "kinds": [0, 0]}')
    with pytest.raises(TrainError, match="2 kinds for 1 conversations"):
        TokenSet(tmp_path, "train")
