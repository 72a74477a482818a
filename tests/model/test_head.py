"""Parts of a row of logits are those of the whole row, to the bit where the head is of few bits."""

import pytest
import torch

from gemsmith.engine.context import Next
from gemsmith.engine.request import SamplingParams
from gemsmith.engine.sampler import MAX_REACH, Sampler
from gemsmith.errors import WeightsError
from gemsmith.model.text import TextModel
from gemsmith.ops import native
from gemsmith.quant.formats import Format
from gemsmith.quant.linear import QuantEmbedding
from gemsmith.quant.packed import Packed
from gemsmith.quant.quantize import quantize
from gemsmith.testing import assert_close, random_model, tiny_config, tolerance

VOCAB = 5000
SKIPPED = torch.arange(7, VOCAB, 11)


@pytest.fixture(scope="module")
def floats() -> TextModel:
    return random_model(tiny_config("E2B", vocab_size=VOCAB)).requires_grad_(False)


@pytest.fixture(params=["extension", "torch"])
def model(floats: TextModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """A head of 4 bits in which some tokens are equal."""
    if request.param == "extension" and not native.available():
        pytest.skip("the extension is not built")
    if request.param == "torch":
        monkeypatch.setattr(native, "extension", lambda: None)
    made = random_model(tiny_config("E2B", vocab_size=VOCAB)).requires_grad_(False)
    codes = quantize(floats.embed_tokens.weight, Format(4))
    codes.packed[1000:1100] = codes.packed[:100]
    codes.scales[1000:1100] = codes.scales[:100]
    made.set_submodule("embed_tokens", QuantEmbedding(Packed.of(codes), torch.float32))
    return made


def hidden(model: TextModel, rows: int = 1, size: float = 20.0) -> torch.Tensor:
    """Such that the greatest logits are a few times the cap apart from flat."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, model.config.hidden_size, generator=generator) * size


@pytest.mark.parametrize("size", [0.5, 5.0, 20.0])
def test_the_likeliest_are_those_of_the_row(model: TextModel, size: float):
    h = hidden(model, 3, size)
    left = model.logits(h).index_fill(1, SKIPPED, -torch.inf)
    expected = left.sort(dim=1, descending=True, stable=True)
    for count in (1, 2, 64, MAX_REACH):
        found = model.likeliest(h, count, SKIPPED)
        assert found is not None
        assert torch.equal(torch.from_numpy(found[0]), expected.values[:, :count])
        assert torch.equal(torch.from_numpy(found[1]), expected.indices[:, :count])


def test_where_capping_makes_all_equal_the_row_is_asked_for(model: TextModel):
    """tanh is 1 beyond 9: hundreds of logits are 30 then."""
    h = hidden(model, 1, 1e5)
    assert int((model.logits(h) == 30).sum()) > 100
    assert model.likeliest(h, 1, SKIPPED) is None
    sampler = Sampler(SamplingParams(temperature=0), vocab_size=VOCAB, prompt_ids=[])
    assert sampler.choose_next(Next(model, h)) == int(model.logits(h)[0].argmax())


def test_where_something_is_not_finite_the_row_is_asked_for(model: TextModel):
    h = hidden(model)
    h[0, 3] = torch.nan
    assert model.likeliest(h, 5, SKIPPED) is None
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=5)):
        sampler = Sampler(params, vocab_size=VOCAB, prompt_ids=[])
        with pytest.raises(WeightsError, match="logits are not finite"):
            sampler.choose_next(Next(model, h))


def test_all_that_is_left_may_be_asked_for(model: TextModel):
    h, skipped = hidden(model), torch.arange(0, VOCAB - 40)
    found = model.likeliest(h, 40, skipped)
    assert found is not None
    assert sorted(found[1][0].tolist()) == list(range(VOCAB - 40, VOCAB))
    assert model.likeliest(h, 41, skipped) is None


def test_floats_and_narrow_hidden_states_ask_for_the_row(model: TextModel, floats: TextModel):
    assert floats.likeliest(hidden(floats), 4, SKIPPED) is None
    assert model.likeliest(hidden(model).bfloat16(), 4, SKIPPED) is None


def test_logits_of_some_tokens_are_those_of_the_row(model: TextModel, floats: TextModel):
    h, ids = hidden(model, 2, 5.0), torch.tensor([4999, 0, 17, 16, 0])
    assert torch.equal(model.logits_of(h, ids), model.logits(h)[:, ids])
    limit = tolerance(torch.float32, model.config.hidden_size)
    assert_close(floats.logits_of(h, ids), floats.logits(h)[:, ids], limit)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(top_k=64, top_p=0.95, seed=3),
        SamplingParams(top_k=1, seed=3),
        SamplingParams(temperature=0.3, top_k=MAX_REACH, min_p=0.02, seed=3),
        SamplingParams(top_k=MAX_REACH + 1, seed=3),
        SamplingParams(top_p=0.9, seed=3),
        SamplingParams(top_k=40, repetition_penalty=1.3, seed=3),
        SamplingParams(top_k=40, logprobs=2, seed=3),
        SamplingParams(seed=3),
    ],
    ids=str,
)
def test_a_sampler_chooses_as_it_would_from_the_whole_row(model: TextModel, params: SamplingParams):
    rows = [hidden(model, rows, 4.0)[-1:] for rows in range(1, 13)]
    suppressed = tuple(SKIPPED.tolist())

    def sampler() -> Sampler:
        return Sampler(params, vocab_size=VOCAB, prompt_ids=[1, 9], suppressed=suppressed)

    whole, parts = sampler(), sampler()
    expected = [whole.choose(model.logits(h)[0]) for h in rows]
    assert [parts.choose_next(Next(model, h)) for h in rows] == expected


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(top_k=64)])
def test_the_whole_row_is_left_alone_where_few_are_wanted(
    model: TextModel, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TextModel, "logits", lambda *_: pytest.fail("a whole row"))
    sampler = Sampler(params, vocab_size=VOCAB, prompt_ids=[], suppressed=(3, 5))
    sampler.choose_next(Next(model, hidden(model)))
    sampler.choose_next(Next(model, hidden(model)), {7, 9})


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_of_few_allowed_tokens_one_is_chosen_as_under_a_mask(
    model: TextModel, temperature: float, penalty: float
):
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=5)
    allowed = {9, 1004, 4, 4711, 30}  # 4 and 1004 are equal

    def sampler() -> Sampler:
        return Sampler(params, vocab_size=VOCAB, prompt_ids=[9, 30])

    whole, parts = sampler(), sampler()
    for rows in range(1, 9):
        h = hidden(model, rows, 2.0)[-1:]
        mask = torch.full((VOCAB,), -torch.inf)
        mask[sorted(allowed)] = 0
        assert parts.choose_next(Next(model, h), allowed) == whole.choose(model.logits(h)[0] + mask)


def test_logits_that_capping_makes_equal_come_in_the_order_of_their_ids(model: TextModel):
    raw = torch.tensor([[80.00001, 80.0, 79.0, 3.0]])
    ids = torch.tensor([[9, 4, 2, 1]])
    found = model._settled(raw, ids, torch.tensor([80.0]), 3, torch.tensor([], dtype=torch.long))
    assert found is not None
    assert found[0][0, 0] == found[0][0, 1] > found[0][0, 2]
    assert found[1].tolist() == [[4, 9, 2]]
