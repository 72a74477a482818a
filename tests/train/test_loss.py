"""The chunked loss equals the plain one, value and gradients."""

from copy import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gemsmith.cache.none import NoCache
from gemsmith.config import TextConfig
from gemsmith.testing import assert_close, random_model, tiny_config, tolerance
from gemsmith.train.data import TokenSet, make_batch
from gemsmith.train.loss import backward_in_chunks, chunk_rows


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_over_rows_equals_full_logits_with_mask(copy_set: TokenSet, chunk: int) -> None:
    model = random_model(tiny_config("E2B", vocab_size=40)).requires_grad_(True)
    weighted = copy(copy_set)
    weighted.mask = np.array(copy_set.mask) * (1 + np.arange(len(copy_set.mask)) % 3)
    batch = make_batch(weighted, [0, 1, 2, 3], batch_tokens=64, row_multiple=16)

    kv = NoCache(model.config, batch.lengths)
    logits_TV = model.logits(model(batch.ids_T, batch.positions_T, kv))
    total, count, start = torch.zeros(()), 0, 0
    for c, length in zip(range(4), batch.lengths, strict=False):
        begin = int(copy_set.offsets[c])
        for i in range(1, length):
            weight = int(weighted.mask[begin + i])
            log_p = F.log_softmax(logits_TV[start + i - 1], -1)
            total = total - weight * log_p[int(copy_set.ids[begin + i])]
            count += weight
        start += length
    expected = total / count
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    kv = NoCache(model.config, batch.lengths)
    hidden = model(batch.ids_T, batch.positions_T, kv, rows_R=batch.rows_R)
    loss = backward_in_chunks(model.logits, hidden, batch.targets_R, batch.weights_R, chunk=chunk)
    limit = tolerance(torch.float32, 64, steps=8)
    assert_close(loss, expected.detach(), limit)
    for name, p in model.named_parameters():
        grad, want = p.grad, wanted[name]
        assert grad is not None, name
        assert want is not None, name
        assert_close(grad, want, limit * (1 + want.abs().max().item()))


def test_batch_without_targets_has_no_loss_and_no_gradient(config: TextConfig) -> None:
    model = random_model(tiny_config("E2B", vocab_size=40)).requires_grad_(True)
    ids = torch.arange(4)
    hidden = model(ids, ids, NoCache(model.config, [4]))
    none = torch.full((4,), -100)
    loss = backward_in_chunks(model.logits, hidden, none, torch.zeros(4), chunk=2)
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_chunk_is_bounded_by_logits_not_rows() -> None:
    assert chunk_rows(4096) == 2048
    assert chunk_rows(262_144) == 32
    assert chunk_rows(1 << 30) == 1
