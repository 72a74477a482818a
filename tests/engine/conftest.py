"""A vocabulary of bytes and markers, a model that says what it is told to say, tiny models of few
bits, and guesses of what they say."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers

from gemsmith.cache.ring import RingCache
from gemsmith.config import Gemma4Config
from gemsmith.engine.drafters import Lookup, Text
from gemsmith.engine.engine import LM
from gemsmith.engine.request import Generation, SamplingParams
from gemsmith.engine.speculative import Speculation
from gemsmith.model.text import TextModel
from gemsmith.testing import random_model, tiny_config, whole_groups
from gemsmith.text.tokenizer import MARKERS, SPACE, Tokenizer
from gemsmith.weights.load import load_model
from gemsmith.weights.save import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

NOTE = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}, "tag": {"enum": ["one", "two"]}},
            "required": ["text", "tag"],
        },
    },
}


def byte_tokenizer() -> Tokenizer:
    """Gemma's markers first (pad 0, eos 1, bos 2), then a few letters, then every byte."""
    names = [*MARKERS.values(), *"abcdefghij", SPACE]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {name: id for id, name in enumerate(names)}
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", SPACE)
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_tokens([AddedToken(m, normalized=False, special=True) for m in MARKERS.values()])
    return Tokenizer(core)


class ScriptedModel:
    """Stands in for TextModel: after `start` tokens it says `script`, whatever it has read.

    Its K/V are those of a one-layer model that attends to nothing. `interrupt_at` is the length
    at which a pass raises KeyboardInterrupt half-way, once.
    """

    native, read = None, TextModel.read

    def __init__(self, config: Gemma4Config, script: Sequence[int] = ()) -> None:
        self.config = config.text_config
        self.embed_tokens = SimpleNamespace(weight=torch.zeros(1))
        self.k_from_v = None
        self.script, self.start = list(script), 0
        self.interrupt_at: int | None = None
        self.passes: list[int] = []

    def __call__(self, ids_T, positions_T, kv: RingCache, *, rows_R=None, soft=None):
        if self.interrupt_at is not None and int(positions_T[-1]) >= self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.passes.append(len(ids_T))
        rows = positions_T if rows_R is None else positions_T[rows_R]
        return rows[:, None]

    def logits(self, hidden_RD):
        logits = torch.zeros(len(hidden_RD), self.config.vocab_size)
        for row, position in enumerate(hidden_RD[:, 0].tolist()):
            at = position - self.start + 1
            said = self.script[at] if 0 <= at < len(self.script) else 1
            logits[row, said] = 20.0
        return logits

    def likeliest(self, hidden_RD, count, skipped):
        return None

    def logits_of(self, hidden_RD, ids_n):
        return self.logits(hidden_RD)[:, ids_n]

    def parameters(self):
        return iter(())


class ScriptedLM(LM):
    """Tells the script where each prompt ends."""

    def _start(self, prompt, params, *, chat, follow=None):
        cast(ScriptedModel, self.model).start = len(prompt.ids)
        return super()._start(prompt, params, chat=chat, follow=follow)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def scripted(tokenizer: Tokenizer) -> Callable[..., LM]:
    """Makes an instruction-tuned LM that replies with a given text, end marker included.

    The reply begins wherever the prompt of a request ends.
    """

    def make(reply: str, *, size: str = "E2B", **options: Any) -> LM:
        config = tiny_config(size, vocab_size=tokenizer.vocab_size)
        model = ScriptedModel(config, tokenizer.encode(reply))
        ends = [tokenizer.special.turn_close, tokenizer.special.tool_response_open]
        options = {"end_ids": ends, "sampling": SamplingParams(temperature=0)} | options
        return ScriptedLM(cast(TextModel, model), tokenizer, config, **options)

    return make


@pytest.fixture(scope="session")
def low_bit(tokenizer, tmp_path_factory) -> Callable[..., LM]:
    """Makes tiny models whose logits have the same bits in any pass."""
    models = {}

    def make(size: str, window: int = 8, **options) -> LM:
        config = tiny_config(size, vocab_size=tokenizer.vocab_size, sliding_window=window)
        config = whole_groups(config)
        if (size, window) not in models:
            folder = tmp_path_factory.mktemp(size)
            save_model(random_model(config, dtype=torch.bfloat16), config, folder)
            models[size, window] = load_model(folder, quant="int4")[1]
        return LM(models[size, window], tokenizer, config, **options)

    return make


class Oracle:
    """Knows how texts go on, but for every n-th token, which it guesses wrong."""

    def __init__(self, *texts: Sequence[int], wrong_every: int = 4) -> None:
        self.texts, self.wrong_every = [list(text) for text in texts], wrong_every

    def __call__(self, _: Lookup, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        return [self.guesses(text.ids, most) for text, most in zip(texts, counts, strict=True)]

    def guesses(self, ids: list[int], most: int) -> list[int]:
        at = len(ids)
        [known] = [text for text in self.texts if text[:at] == ids]
        return [
            3 + (id == 3) if place % self.wrong_every == 0 else id
            for place, id in enumerate(known[at : at + most], at)
        ]


def always(monkeypatch: pytest.MonkeyPatch, oracle: Oracle | None = None) -> None:
    """Verify every guess that there is room for, however long it takes; in place of what stands in
    the text those of an oracle."""

    def depths(self, texts, reaches, rows, room):
        return [min(reach, room // len(texts)) for reach in reaches]

    monkeypatch.setattr(Speculation, "_depths", depths)
    if oracle is not None:
        monkeypatch.setattr(Lookup, "propose", partialmethod(oracle))


def same(a: Generation, b: Generation) -> bool:
    return (a.token_ids, a.text, a.thinking, a.tool_calls, a.finish_reason, a.logprobs) == (
        b.token_ids, b.text, b.thinking, b.tool_calls, b.finish_reason, b.logprobs,
    )  # fmt: skip


def random_ids(count: int, vocab: int, seed: int = 1) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(30, vocab) for _ in range(count)]


def random_lm(size: str, tokenizer: Tokenizer, **options) -> LM:
    """K/V are kept in float32: what others compute is compared to the last bits."""
    config = tiny_config(size, vocab_size=tokenizer.vocab_size)
    return LM(random_model(config), tokenizer, config, **{"kv": "float32", **options})


def short_context(lm: LM, limit: int) -> LM:
    text = replace(lm.config.text_config, max_position_embeddings=limit)
    lm.config = replace(lm.config, text_config=text)
    lm.model.config = text
    return lm
