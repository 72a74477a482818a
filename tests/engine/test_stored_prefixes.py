"""A conversation goes on after the process that had it: with the bits of a cold run."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from tests.conftest import needs_extension
from tests.engine.test_batching import (
    GREEDY,
    SMALL,
    idle,
    logits_of,
    low_bit_lm,
    reply_of,
)

from gemsmith.engine.batching import BatchEngine, run_all
from gemsmith.engine.media import Prompt
from gemsmith.engine.request import Request


@needs_extension
def test_a_prefix_from_disk_gives_the_bits_of_a_cold_run(tmp_path: Path, tokenizer):
    lm = low_bit_lm(tokenizer, tmp_path / "checkpoint", size="E2B")
    close, draw = tokenizer.special.turn_close, random.Random(4)

    def turn(count: int) -> list[int]:
        return [*(draw.randrange(40, tokenizer.vocab_size) for _ in range(count)), close]

    def asked(ids: list[int], tenant: str = "ann") -> Request:
        return Request(prompt=Prompt(ids), params=params, chat=False, tenant=tenant)

    params = GREEDY.changed(ignore_eos=True)
    settings = replace(SMALL, prefix_folder=tmp_path / "prefixes")
    first = [*turn(30), *turn(21)]
    before = BatchEngine(lm, settings)
    [events] = run_all(before, [asked(first)])
    before.close()
    second = [*first, *reply_of(events).token_ids, *turn(40)]
    branch = [*first[:31], *turn(20)]
    for ids, cached in ((second, len(first) + 8), (branch, 31)):
        after, cold = BatchEngine(lm, settings), BatchEngine(lm, SMALL)
        for a, b in zip(logits_of(after, asked(ids)), logits_of(cold, asked(ids)), strict=True):
            assert torch.equal(a, b)
        assert (after.stats().cached_tokens, after.stats().checkpoints_restored) == (cached, 1)
        idle(after)
        after.close()
    other = BatchEngine(lm, settings)
    run_all(other, [asked(second, "ben")])
    assert other.stats().cached_tokens == 0
    other.close()
