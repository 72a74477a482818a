"""The MTP drafter: against formulas written out, against Transformers, over a paged cache."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemsmith import shapes, sizing
from gemsmith.cache.block_pool import Pages
from gemsmith.cache.none import NoCache
from gemsmith.cache.paged import Chunk, PagedCache
from gemsmith.cache.ring import RingCache
from gemsmith.config import PRESETS, TextConfig, published_drafter
from gemsmith.errors import ConfigError, RequestError
from gemsmith.model.drafter import Draft, MTPDrafter, donors, likeliest
from gemsmith.model.text import DecoderLayer
from gemsmith.ops import reference
from gemsmith.testing import (
    SIZES,
    assert_close,
    random_drafter,
    random_model,
    tiny_config,
    tiny_drafter_config,
    tolerance,
)

RELEASED = json.loads((Path(__file__).parents[1] / "data/drafters.json").read_text())
"""Shapes by key of each size's drafter as Transformers lists them, with its copy of the head."""
WINDOW = 8
CONFIGS = {size: tiny_config(size, sliding_window=WINDOW) for size in SIZES}
MODELS = {size: random_model(config) for size, config in CONFIGS.items()}
DRAFTERS = {size: random_drafter(config.text_config) for size, config in CONFIGS.items()}
IDS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(5))
# Eight reductions a layer, in the model and then in four layers for each of four drafts.
LIMIT = tolerance(torch.float32, 64, steps=8 * 24)
COUNT = 4


class Recorded:
    """A store that keeps every layer's K/V of one sequence, for a drafter to read, slowly."""

    def __init__(self, config: TextConfig, length: int) -> None:
        self.layers = config.layers
        self.store: Any = NoCache(config, [length])
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k_TKH: Tensor | None,
        v_TKH: Tensor | None,
        rows_R: Tensor | None,
    ) -> Tensor:
        if k_TKH is not None and v_TKH is not None:
            self.own[layer] = (k_TKH, v_TKH)
        return self.store.attend(layer, q, k_TKH, v_TKH, rows_R)

    def read(self, layer: int, q_BNH: Tensor) -> Tensor:
        k_SKH, v_SKH = self.own[layer]
        S, window = len(k_SKH), self.layers[layer].window
        mask_1S = reference.allowed(torch.tensor([S]), torch.arange(S), window)
        return reference.attention(q_BNH, k_SKH, v_SKH, mask_1S)


def context(size: str, row: int, length: int) -> tuple[Tensor, Recorded]:
    """The model's last hidden state [D] of `length` tokens, and their K/V."""
    model = MODELS[size]
    kv = Recorded(model.config, length)
    return model(IDS[row, :length], torch.arange(length), kv)[-1], kv


def propose(size: str, row: int, length: int, count: int = COUNT) -> Draft:
    hidden_D, kv = context(size, row, length)
    newest, at = IDS[row, length : length + 1], torch.tensor([length])
    return DRAFTERS[size].propose(MODELS[size], newest, hidden_D[None], at, kv, count)


def by_formula(size: str, newest: int, hidden_D: Tensor, position: int, kv: Recorded):
    """(ids, whole rows of logits): one token at a time, in float64, from the weights by name."""
    w = {name: t.double() if t.is_floating_point() else t
         for name, t in DRAFTERS[size].state_dict().items()}  # fmt: skip
    config, target = DRAFTERS[size].config, MODELS[size].config
    text, table = config.text_config, MODELS[size].embed_tokens.weight.double()
    last_owners = {kind: max(i for i, plan in enumerate(target.layers)
                             if plan.layer_type == kind and i < target.first_kv_shared_layer)
                   for kind in target.layer_types}  # fmt: skip

    def norm(x: Tensor, name: str) -> Tensor:
        return reference.rms_norm(x, w[name + ".weight"], text.rms_norm_eps)

    ids, rows, state = [], [], hidden_D.double()
    for _ in range(COUNT):
        x = w["pre_projection.weight"] @ torch.cat((table[newest] * target.hidden_size**0.5, state))
        for i, kind in enumerate(text.layer_types):
            at, full = f"model.layers.{i}.", kind == "full_attention"
            head = text.global_head_dim if full else text.head_dim
            rope = text.full_rope if full else text.sliding_rope
            q = w[at + "self_attn.q_proj.weight"] @ norm(x, at + "input_layernorm")
            q = norm(q.view(1, -1, head), at + "self_attn.q_norm")
            frequencies = reference.inverse_frequencies(
                head, rope.rope_theta, rope.partial_rotary_factor
            )
            q = reference.rope(q, torch.tensor([position]), frequencies)
            k, v = (each.double() for each in kv.own[last_owners[kind]])
            if not full:
                k, v = k[-(WINDOW - 1) :], v[-(WINDOW - 1) :]
            o = reference.attention(q, k, v, torch.ones(1, len(k), dtype=torch.bool)).flatten()
            x = x + norm(w[at + "self_attn.o_proj.weight"] @ o, at + "post_attention_layernorm")
            u = norm(x, at + "pre_feedforward_layernorm")
            gate = F.gelu(w[at + "mlp.gate_proj.weight"] @ u, approximate="tanh")
            y = w[at + "mlp.down_proj.weight"] @ (gate * (w[at + "mlp.up_proj.weight"] @ u))
            x = (x + norm(y, at + "post_feedforward_layernorm")) * w[at + "layer_scalar"]
        x = norm(x, "model.norm")
        state = w["post_projection.weight"] @ x
        logits = w["model.embed_tokens.weight"] @ x
        if config.use_ordered_embeddings:
            each = text.vocab_size // config.num_centroids
            near = (w["masked_embedding.centroids.weight"] @ x).argsort(descending=True)
            kept = [
                int(w["masked_embedding.token_ordering"][c * each + j])
                for c in near[: config.centroid_intermediate_top_k].tolist()
                for j in range(each)
            ]
            others = [t for t in range(text.vocab_size) if t not in kept]
            logits[others] = logits[kept].min() - 1
        newest = int(logits.argmax())
        ids.append(newest)
        rows.append(logits)
    return ids, torch.stack(rows)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, 33])
def test_drafts_and_logits_are_those_of_the_formulas(size, length):
    hidden_D, kv = context(size, 0, length)
    ids, rows = by_formula(size, int(IDS[0, length]), hidden_D, length, kv)
    draft = propose(size, 0, length)
    assert draft.ids_BJ.tolist() == [ids]
    assert_close(draft.whole(96)[0], rows.float(), LIMIT)


@pytest.mark.parametrize("size", SIZES)
def test_drafts_are_those_of_transformers(size, monkeypatch):
    transformers = pytest.importorskip("transformers")
    drafter, length = DRAFTERS[size], 6  # shorter than the window, where all sources agree
    unified = size == "12B"
    text_class = transformers.Gemma4UnifiedTextConfig if unified else transformers.Gemma4TextConfig
    # Transformers 5.23 refuses to say that every layer shares, and then cannot build the model.
    modes = property(lambda self: ["reuse"] * self.num_hidden_layers)
    monkeypatch.setattr(text_class, "kv_sharing_modes", modes)
    data = drafter.config.to_dict()
    text = text_class(**{k: v for k, v in data.pop("text_config").items() if k != "model_type"})
    kind = "Gemma4UnifiedAssistant" if unified else "Gemma4Assistant"
    data = {k: v for k, v in data.items() if k not in ("model_type", "architectures")}
    config = getattr(transformers, kind + "Config")(text_config=text, **data)
    theirs = getattr(transformers, kind + "ForCausalLM")(config).eval()
    state = drafter.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)

    hidden_D, kv = context(size, 1, length)
    shared = {}
    for kind, layer in donors(MODELS[size].config).items():
        shared[kind] = tuple(each.transpose(0, 1)[None] for each in kv.own[layer])
    newest, state_D, ids, rows = IDS[1, length], hidden_D, [], []
    for _ in range(COUNT):
        inputs = torch.cat((MODELS[size].embed(newest[None])[0], state_D))
        with torch.no_grad():
            out = theirs(
                inputs_embeds=inputs[None, None],
                position_ids=torch.tensor([[length]]),
                shared_kv_states=shared,
            )
        newest, state_D = out.logits[0, 0].argmax(), out.last_hidden_state[0, 0]
        ids.append(int(newest))
        rows.append(out.logits[0, 0])
    draft = propose(size, 1, length)
    assert draft.ids_BJ.tolist() == [ids]
    assert_close(draft.whole(96)[0], torch.stack(rows), LIMIT)


@pytest.mark.parametrize("size", SIZES)
def test_sequences_in_a_paged_cache_draft_together_as_each_alone(size):
    model, lengths = MODELS[size], [30, 3, 9]
    plan = sizing.kv_plan(
        model.config, max_model_len=60, max_num_seqs=3, max_num_batched_tokens=64,
        bytes_per_value=4, block_tokens=4,
    )  # fmt: skip
    cache = PagedCache(model.config, plan, dtype=torch.float32, k_from_v=model.k_from_v)
    pages = [Pages() for _ in lengths]
    chunks = [Chunk(p, n) for p, n in zip(pages, lengths, strict=True)]
    for chunk in chunks:
        # One token more than is committed: a draft that was verified and refused.
        cache.blocks.extend(chunk.pages, chunk.tokens + 1)
        chunk.tokens += 1
    step = cache.step(chunks)
    ids_T = torch.cat([IDS[row, : n + 1] for row, n in enumerate(lengths)])
    hidden_TD = model(ids_T, step.positions_T, step)
    rows, first = [], 0
    for p, n in zip(pages, lengths, strict=True):
        cache.blocks.commit(p, n)
        rows.append(first + n - 1)
        first += n + 1
    newest_B = torch.tensor([int(IDS[row, n]) for row, n in enumerate(lengths)])
    kv = cache.reader(pages)
    hidden_BD, at_B = hidden_TD[rows], torch.tensor(lengths)
    drafted = DRAFTERS[size].propose(model, newest_B, hidden_BD, at_B, kv, COUNT)
    for row, length in enumerate(lengths):
        alone = propose(size, row, length)
        assert drafted.ids_BJ[row].tolist() == alone.ids_BJ[0].tolist()
        assert_close(drafted.whole(96)[row], alone.whole(96)[0], LIMIT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [5, WINDOW, 30])
def test_a_ring_is_read_as_it_turns_and_after_it_was_trimmed(size, length):
    model = MODELS[size]
    cache = RingCache(model.config, dtype=torch.float32, k_from_v=model.k_from_v)
    cache.reserve(length + 1)
    for first, stop in ((0, length - 2), (length - 2, length - 1), (length - 1, length)):
        with cache.step(stop - first) as positions_T:
            hidden_TD = model(IDS[0, first:stop], positions_T, cache)
    with cache.step(1) as positions_T:
        model(IDS[1, :1], positions_T, cache)  # a draft that was refused
    cache.trim(length)
    newest, at = IDS[0, length : length + 1], torch.tensor([length])
    drafted = DRAFTERS[size].propose(model, newest, hidden_TD[-1:], at, cache, COUNT)
    expected = propose(size, 0, length)
    assert drafted.ids_BJ.tolist() == expected.ids_BJ.tolist()
    assert_close(drafted.whole(96), expected.whole(96), LIMIT)


def test_what_left_the_window_changes_full_layers_alone():
    """Keys of sliding layers are the last WINDOW - 1: the newest token is the window's last."""
    hidden_D, kv = context("E2B", 0, 30)
    source = donors(MODELS["E2B"].config)
    assert source == {"sliding_attention": 2, "full_attention": 3}

    def drafted() -> Tensor:
        newest, at = IDS[0, 30:31], torch.tensor([30])
        drafter = DRAFTERS["E2B"]
        return drafter.propose(MODELS["E2B"], newest, hidden_D[None], at, kv, 1).whole(96)

    before = drafted()
    kv.own[source["sliding_attention"]][1][: 30 - (WINDOW - 1)] += 9
    assert torch.equal(drafted(), before)
    kv.own[source["sliding_attention"]][1][30 - (WINDOW - 1)] += 9
    seen = drafted()
    assert not torch.equal(seen, before)
    kv.own[source["full_attention"]][1][0] += 9
    assert not torch.equal(drafted(), seen)


@pytest.mark.parametrize(
    ("size", "sliding", "full"),
    [("E2B", 13, 14), ("E4B", 22, 23), ("12B", 46, 47), ("26B-A4B", 28, 29), ("31B", 58, 59)],
)
def test_it_reads_the_last_layers_that_own_k_and_v(size, sliding, full):
    config = PRESETS[size].text_config
    assert donors(config) == {"sliding_attention": sliding, "full_attention": full}
    drafter = MTPDrafter(published_drafter(config), config, device="meta")
    sources = [m.plan.kv_source for m in drafter.modules() if isinstance(m, DecoderLayer)]
    assert sources == [sliding, sliding, sliding, full]


@pytest.mark.parametrize("size", SIZES)
def test_tensors_are_those_of_the_released_checkpoints(size):
    config = PRESETS[size].text_config
    drafter = MTPDrafter(published_drafter(config), config, device="meta")
    state = {name: list(tensor.shape) for name, tensor in drafter.state_dict().items()}
    released = dict(RELEASED[size])
    assert released.pop("lm_head.weight") == released["model.embed_tokens.weight"]
    assert state == released
    listed = {tensor.name: tensor for tensor in shapes.drafter(drafter.config)}
    assert {name: list(tensor.shape) for name, tensor in listed.items()} == released
    trained = {name: p.numel() for name, p in drafter.named_parameters()}
    assert {name for name, tensor in listed.items() if tensor.trained} == set(trained)
    assert sum(trained.values()) == sizing.drafter_parameters(PRESETS[size])


def test_tokens_without_a_logit_get_the_least_of_their_row_less_one():
    logits = torch.tensor([[[3.0, -2.0]], [[5.0, 7.0]]])
    draft = Draft(torch.tensor([[1], [0]]), logits, torch.tensor([[[1, 3]], [[2, 0]]]))
    assert draft.whole(4).tolist() == [[[-3.0, 3.0, -3.0, -2.0]], [[7.0, 4.0, 5.0, 4.0]]]


def test_of_equal_logits_the_lowest_id_is_drafted():
    logits = torch.tensor([[1.0, 2.0, 2.0], [4.0, 4.0, 0.0]])
    assert likeliest(logits, None).tolist() == [1, 0]
    assert likeliest(logits, torch.tensor([[0, 7, 5], [9, 8, 1]])).tolist() == [5, 8]


def test_a_drafter_of_another_size_is_refused_by_name():
    e4b, e2b = (PRESETS[size].text_config for size in ("E4B", "E2B"))
    with pytest.raises(
        ConfigError,
        match=r"the drafter's backbone_hidden_size is 2560, and the model's hidden_size 1536: it "
        r"looks like E4B's. Use the drafter that was published beside this very model",
    ):
        MTPDrafter(published_drafter(e4b), e2b, device="meta")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"vocab_size": 104}, "vocab_size is 96, and the model's vocab_size 104"),
        ({"sliding_window": 9}, "sliding_window is 8, and the model's sliding_window 9"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 2, and .* 1: it is another model's"),
        ({"global_head_dim": 64}, "global_head_dim is 32, and the model's global_head_dim 64"),
    ],
)
def test_sizes_that_must_agree_with_the_model_s(change, text):
    target = CONFIGS["E4B"].text_config
    with pytest.raises(ConfigError, match=text):
        MTPDrafter(tiny_drafter_config(target), replace(target, **change))


def test_a_model_without_what_a_drafter_needs_is_refused():
    target = replace(CONFIGS["12B"].text_config, layer_types=("full_attention",) * 6)
    with pytest.raises(ConfigError, match=r"has sliding_attention layers, and the model no such"):
        MTPDrafter(tiny_drafter_config(target), target)
    target = replace(CONFIGS["12B"].text_config, sliding_window=1)
    with pytest.raises(ConfigError, match=r"sliding_window 1 leaves .* nothing to look at"):
        MTPDrafter(tiny_drafter_config(target), target)
    with pytest.raises(ConfigError, match=r"dtype float16: .* use bfloat16 or float32"):
        random_drafter(CONFIGS["12B"].text_config, dtype=torch.float16)


@pytest.mark.parametrize("count", [0, 65])
def test_a_number_of_drafts_out_of_range_is_refused(count):
    with pytest.raises(RequestError, match=rf"{count} drafts: must be 1 to 64"):
        propose("E2B", 0, 5, count)


def test_inputs_that_do_not_belong_together_are_refused():
    hidden_D, kv = context("E2B", 0, 5)
    with pytest.raises(RequestError, match=r"shapes \[\(1,\), \(64,\), \(1,\)\]; of 1 sequences"):
        DRAFTERS["E2B"].propose(MODELS["E2B"], IDS[0, :1], hidden_D, torch.tensor([5]), kv, 1)


def test_bfloat16_drafts_from_a_float32_model():
    drafter = random_drafter(CONFIGS["E2B"].text_config, dtype=torch.bfloat16)
    hidden_D, kv = context("E2B", 0, 20)

    class Wide:
        def read(self, layer: int, q_BNH: Tensor) -> Tensor:
            return kv.read(layer, q_BNH.float()).to(q_BNH.dtype)

    at = torch.tensor([20])
    draft = drafter.propose(MODELS["E2B"], IDS[0, 20:21], hidden_D[None], at, Wide(), 1)
    assert draft.logits_BJC.dtype == torch.float32
    exact = propose("E2B", 0, 20, 1)
    assert draft.among_BJC is not None
    assert exact.among_BJC is not None
    limit = tolerance(torch.bfloat16, 64, steps=32)
    assert_close(draft.logits_BJC.amax(), exact.logits_BJC.amax(), limit)
