"""Layers in two native calls compute what their modules compute."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.conftest import needs_extension
from torch import Tensor, nn

from gemsmith.cache.none import NoCache
from gemsmith.cache.ring import RingCache
from gemsmith.config import Gemma4Config
from gemsmith.errors import WeightsError
from gemsmith.model.text import Experts, Layers, TextModel
from gemsmith.ops import attention, cpu, cpu_layers, native
from gemsmith.ops.cpu_attention import Readers, StoredKV
from gemsmith.ops.cpu_layers import Layer, Place
from gemsmith.ops.rotary import KeyRule
from gemsmith.quant.formats import Format
from gemsmith.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from gemsmith.quant.packed import Packed
from gemsmith.quant.quantize import quantize, search
from gemsmith.testing import SIZES, assert_close, random_model, tiny_config, tolerance
from gemsmith.weights.fuse import PackedLayer, fuse

pytestmark = needs_extension


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.force_isa(request.param)
    yield request.param
    native.force_isa(None)


def packed_model(config: Gemma4Config, format: Format) -> TextModel:
    """A random model whose matrices are all packed."""

    def packed(weight: Tensor) -> Packed:
        its = format.stepped(weight.shape[-1]) if format.steps else format
        return Packed.of(search(weight, its))

    model, dtype = random_model(config).requires_grad_(False), torch.float32
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.Embedding):
            model.set_submodule(name, QuantEmbedding(packed(old.weight), dtype))
        elif isinstance(old, nn.Linear) and not name.endswith("router.proj"):
            model.set_submodule(name, QuantLinear(packed(old.weight), dtype))
        elif isinstance(old, Experts):
            parts = packed(old.gate_up_proj), packed(old.down_proj)
            model.set_submodule(name, QuantExperts(*parts, dtype))
    layers: Any = model.layers
    generator = torch.Generator().manual_seed(4)
    for layer in layers:
        if layer.has_experts:
            layer.router.scale.data.uniform_(0.5, 1.5, generator=generator)
            layer.router.per_expert_scale.data.uniform_(0.5, 1.5, generator=generator)
        layer.layer_scalar.fill_(0.75)
        for norm in layer.modules():
            if hasattr(norm, "eps") and hasattr(norm, "weight"):
                norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    return model


def logits(model: TextModel, config: Gemma4Config, tokens: int) -> Tensor:
    ids = torch.arange(2, 2 + tokens)
    kv = NoCache(config.text_config, [tokens])
    return model.logits(model(ids, torch.arange(tokens), kv))


@pytest.mark.parametrize(
    ("size", "tokens"),
    # With experts one such step may choose another expert: fewer tokens, so that none does.
    [(size, tokens) for size in SIZES for tokens in (1, 20, 60 if size == "26B-A4B" else 300)],
)
def test_a_fused_model_equals_its_modules(size, tokens):
    config = tiny_config(size, vocab_size=320)
    model = packed_model(config, Format(8))
    wanted = logits(model, config, tokens)
    fuse(model)
    assert all(isinstance(layer, PackedLayer) for layer in model.layers)
    found = logits(model, config, tokens)
    # Sums in another order differ in the last bits. Where that turns one rounding to int8 over, a
    # row moves by half a percent, which eight layers of random weights make a fifth: rare, and
    # nothing that a wrong layer would leave at almost all tokens.
    error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert (error < 1e-5).float().mean() > 0.95
    assert error.max() < 0.5


def test_half_a_layer_is_near_its_definition():
    """Without the rounding to int8 in between: before() against the modules, in float64."""
    config = tiny_config("E2B")
    model = packed_model(config, Format(8))
    fuse(model)
    layer: Any = model.layers[0]
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    angle = torch.linspace(0, 3, 7 * 8).view(7, 1, 8)
    q, k, v = layer.before_attention(x, (angle.cos(), angle.sin()))
    wide = layer.self_attn.queries_keys_values(layer.input_layernorm(x), (angle.cos(), angle.sin()))
    for found, wanted in zip((q, k, v), wide, strict=True):
        assert_close(found, wanted, tolerance(torch.float32, 64, steps=4))


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(isa, monkeypatch, size):
    config = tiny_config(size, vocab_size=320)
    model = packed_model(config, Format(4))
    fuse(model)
    native.force_isa("generic")
    monkeypatch.setattr(native, "threads", lambda: 1)
    wanted = logits(model, config, 300)
    native.force_isa(isa)
    for threads in (1, 2):
        monkeypatch.setattr(native, "threads", lambda threads=threads: threads)
        assert torch.equal(logits(model, config, 300), wanted)


def steps(
    model: TextModel, config: Gemma4Config, lengths: tuple[int, ...], dtype=torch.int8
) -> list[Tensor]:
    """Hidden states of steps of so many tokens, then K/V; the first step asks for one row."""
    kv = RingCache(config.text_config, dtype=dtype, k_from_v=model.k_from_v)
    found = []
    for tokens in lengths:
        with kv.step(tokens) as positions_T:
            rows_R = torch.tensor([tokens - 1]) if not found else None
            ids_T = (positions_T * 7) % 60 + 2
            found.append(model(ids_T, positions_T, kv, rows_R=rows_R))
    kept = (t for layer in kv._layers.values() for t in layer.tensors.values())
    return [*found, *(t[: kv.length] for t in kept)]


@pytest.mark.parametrize("size", ["E2B", "12B", "26B-A4B"])
def test_layers_in_one_call_give_the_same_bits_as_one_by_one(monkeypatch, size):
    """Through a ring that turns, with layers in between whose keys the extension cannot store."""
    config = tiny_config(size, vocab_size=320)
    model = packed_model(config, Format(4))
    fuse(model)
    lengths = (5, 1, 1, 1, 1, 1, 3, 1, 12, 2, 1)  # the window is 8
    calls: list[int] = []
    run = cpu_layers.run_layers
    monkeypatch.setattr(cpu_layers, "run_layers", lambda a, *b: calls.append(len(a)) or run(a, *b))
    found = steps(model, config, lengths)
    layers = len(model.layers)
    assert max(calls) == layers if size == "E2B" else 1 < max(calls) < layers
    monkeypatch.setattr(type(model.layers), "run", Layers.run)
    for one, other in zip(found, steps(model, config, lengths), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_whose_keys_are_not_int8_run_one_by_one(monkeypatch, dtype):
    config = tiny_config("E2B", vocab_size=320)
    model = packed_model(config, Format(4))
    fuse(model)
    monkeypatch.setattr(cpu_layers, "run_layers", None)
    lengths = (5, 1, 3, 1, 12, 1)
    found = steps(model, config, lengths, dtype)
    monkeypatch.setattr(type(model.layers), "run", Layers.run)
    for one, other in zip(found, steps(model, config, lengths, dtype), strict=True):
        assert torch.equal(one, other)


def test_a_failed_step_in_one_call_leaves_no_trace():
    config = tiny_config("E2B", vocab_size=320)
    model = packed_model(config, Format(4))
    fuse(model)
    kv = RingCache(config.text_config, dtype=torch.int8)

    def step() -> None:
        with kv.step(1) as positions_T:
            model(torch.tensor([3]), positions_T, kv)
            raise KeyboardInterrupt

    for tokens in (7, 1, 1, 1):
        with kv.step(tokens) as positions_T:
            model(torch.arange(tokens), positions_T, kv)
    seen = kv.length
    before = {n: t.clone() for layer in kv._layers.values() for n, t in layer.tensors.items()}
    with pytest.raises(KeyboardInterrupt):
        step()
    assert kv.length == seen
    for layer in kv._layers.values():
        for name, tensor in layer.tensors.items():
            held = min(seen, len(tensor))
            assert torch.equal(tensor[:held], before[name][:held])


def test_places_that_do_not_belong_to_the_layers_are_refused():
    layer = Layer(*weights_and_norms(), heads=4, head_dim=16, eps=1e-6, scalar=1.0)
    x, ranges = torch.zeros(1, 64), torch.tensor([[0, 2]])
    turn = torch.zeros(1, 8), torch.zeros(1, 8)

    def stored(heads: int = 1, head_dim: int = 16, dtype: torch.dtype = torch.int8) -> StoredKV:
        values, scales = torch.zeros(3, heads, head_dim, dtype=dtype), torch.ones(3, heads)
        extra = (scales, scales) if dtype == torch.int8 else (None, None)
        return StoredKV(values, values, *extra)

    def run(kv: StoredKV, count: int = 2, into: StoredKV | None = None) -> Tensor:
        slots_M = None if into is None else torch.tensor([0])
        place = Place(into, slots_M, [kv], Readers([[(0, 0, count)]], [1], ranges, [0]))
        return cpu_layers.run_layers([layer], [place], [turn], x, None)

    assert run(stored()).shape == (1, 64)
    with pytest.raises(WeightsError, match="slots 0 to 4 of 3"):
        run(stored(), 4)
    with pytest.raises(WeightsError, match=r"\[1, 32\] of formats \(2, 2\); .* int8 \[1, 16\]"):
        run(stored(head_dim=32))
    with pytest.raises(WeightsError, match=r"formats \(0, 0\); the layer runs on int8"):
        run(stored(dtype=torch.float32))
    with pytest.raises(WeightsError, match="4 query heads do not share 3 key/value heads"):
        run(stored(heads=3))
    with pytest.raises(WeightsError, match="a layer of 0 key/value heads was given"):
        run(stored(), into=stored())
    place = Place(None, None, [stored()], Readers([[(0, 0, 2)]], [1], ranges, [0]))
    two = torch.zeros(2, 8), torch.zeros(2, 8)
    with pytest.raises(WeightsError, match="2 rows, of which 1 ask"):
        cpu_layers.run_layers([layer], [place], [two], torch.zeros(2, 64), None)


def test_layers_keep_their_names_and_those_with_floats_stay():
    config = tiny_config("E2B")
    model = packed_model(config, Format(8))
    names = list(model.state_dict())
    mlp: Any = model.get_submodule("layers.1.mlp")
    old = mlp.up_proj
    mlp.up_proj = nn.Linear(64, 48, bias=False)
    fuse(model)
    assert not isinstance(model.layers[1], PackedLayer)
    assert isinstance(model.layers[0], PackedLayer)
    mlp.up_proj = old
    assert list(model.state_dict()) == names


def weights_and_norms() -> tuple[dict[str, cpu.PackedWeight], dict[str, Tensor]]:
    """Of a layer with 4 heads of 16 that reads another layer's keys."""
    sizes = {"q": (64, 64), "o": (64, 64), "gate": (48, 64), "up": (48, 64), "down": (64, 48)}
    made = {
        name: Packed.of(quantize(torch.ones(*size), Format(8))).weight
        for name, size in sizes.items()
    }
    norms = {name: torch.ones(64) for name in ("input", "attention", "before_mlp", "after_mlp")}
    return made, norms | {"q": torch.ones(16)}


def test_weights_that_do_not_belong_together_are_refused():
    weights, norms = weights_and_norms()
    sizes = {"heads": 4, "head_dim": 16, "eps": 1e-6, "scalar": 1.0}
    Layer(weights, norms, **sizes)
    with pytest.raises(WeightsError, match=r"weight up of the layer is None, not \(48, 64\)"):
        Layer({n: w for n, w in weights.items() if n != "up"}, norms, **sizes)
    with pytest.raises(WeightsError, match=r"weight o of the layer is \(64, 48\), not \(64, 64\)"):
        Layer(weights | {"o": weights["down"]}, norms, **sizes)
    with pytest.raises(WeightsError, match=r"norm q is torch.float32 \[64\]"):
        Layer(weights, norms | {"q": torch.ones(64)}, **sizes)
    with pytest.raises(WeightsError, match=r"norm input is torch.bfloat16"):
        Layer(weights, norms | {"input": torch.ones(64).bfloat16()}, **sizes)


def test_rows_of_the_wrong_size_are_refused():
    layer = Layer(*weights_and_norms(), heads=4, head_dim=16, eps=1e-6, scalar=1.0)
    angles = torch.zeros(3, 8)
    x, o = torch.zeros(3, 64), torch.zeros(3, 4, 16)
    assert layer.after(x, o, None).shape == (3, 64)
    with pytest.raises(WeightsError, match=r"x is torch.float32 \[3, 63\]"):
        layer.before(torch.zeros(3, 63), angles, angles)
    with pytest.raises(WeightsError, match=r"cos is torch.float32 \[3, 9\]"):
        layer.before(x, torch.zeros(3, 9), torch.zeros(3, 9))
    with pytest.raises(WeightsError, match=r"sin is torch.float32 \[2, 8\]"):
        layer.before(x, angles, angles[:2])
    with pytest.raises(WeightsError, match=r"o is torch.float32 \[2, 4, 16\]"):
        layer.after(x, o[:2], None)


def test_experts_that_do_not_belong_to_the_layer_are_refused():
    def experts(**sizes: int) -> dict[str, Any]:
        D, F, E = (sizes.get(n, v) for n, v in (("D", 64), ("F", 32), ("E", 3)))
        made = Packed.of(quantize(torch.ones(2 * F, D), Format(8))).weight
        down = Packed.of(quantize(torch.ones(D, F), Format(8))).weight
        arrays = {name: torch.ones(64) for name in Layer.EXPERTS}
        arrays |= {"router": torch.ones(E, 64), "scale": torch.ones(E)}
        return {"gate_up": [made] * 3, "down": [down] * 3, "arrays": arrays}

    layer = Layer(*weights_and_norms(), heads=4, head_dim=16, eps=1e-6, scalar=1.0)
    with pytest.raises(WeightsError, match=r"each must be \[2F, 64\] and \[64, F\] with one F"):
        layer.add_experts(**experts(D=48), top_k=2)
    with pytest.raises(WeightsError, match="3 and 3 experts, 4 at a time"):
        layer.add_experts(**experts(), top_k=4)
    with pytest.raises(WeightsError, match=r"router is torch.float32 \[4, 64\]"):
        layer.add_experts(**experts(E=4), top_k=2)
    layer.add_experts(**experts(), top_k=2)
    assert layer.after(torch.ones(3, 64), torch.ones(3, 4, 16), None).isfinite().all()


@pytest.mark.parametrize("size", ["12B", "26B-A4B", "31B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_over_values_alone_never_leave_the_extension(
    size: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Fused layers, a cache without keys in K = V layers, the greatest logits: as the modules."""
    config = tiny_config(size)
    model = packed_model(config, Format(4))
    ids = torch.arange(2, 22)

    def step(cache: RingCache, tokens: Tensor) -> Tensor:
        with torch.no_grad(), cache.step(len(tokens)) as positions:
            return model(tokens, positions, cache)

    def cache() -> RingCache:
        return RingCache(config.text_config, dtype=dtype, k_from_v=model.k_from_v)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_goes_native", lambda *_: False)
        modules = cache()
        expected = torch.cat([step(modules, id[None]) for id in ids])
    fuse(model)
    assert all(isinstance(layer, PackedLayer) for layer in model.layers)
    monkeypatch.setattr(KeyRule, "keys", lambda *_: pytest.fail("keys of the whole past"))
    fused = cache()
    hidden = torch.cat([step(fused, id[None]) for id in ids])
    # A rounding of activations to int8 may turn over, see above.
    error = (hidden - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 1e-4).float().mean() > 0.75
    assert model.likeliest(hidden, 5, torch.empty(0, dtype=torch.long)) is not None
