"""Fast operations against the slow reference."""

import pytest
import torch
from torch import Tensor

from gemsmith.config import RopeParameters
from gemsmith.model.text import rms_norm, rope_table, rotate
from gemsmith.ops import attention, moe, reference
from gemsmith.ops import linear as linear_module
from gemsmith.ops.attention import causal_attention, masked_attention, visible
from gemsmith.testing import assert_close, tolerance


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5, 16, 200])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 40), (9, 9), (9, 30), (300, 310)])
def test_causal_attention_equals_reference(heads, window, queries, keys):
    n, kv = heads
    q, k, v = random(queries, n, 16), random(keys, kv, 16, seed=1), random(keys, kv, 16, seed=2)
    at = torch.arange(keys)
    mask = reference.allowed(at[keys - queries :], at, window)
    expected = reference.attention(q, k, v, mask)
    assert_close(causal_attention(q, k, v, window), expected, tolerance(torch.float32, keys))


@pytest.mark.parametrize("kind", ["causal", "window", "all"])
@pytest.mark.parametrize(("queries", "keys", "kv_heads"), [(5, 5, 1), (70, 130, 2), (64, 64, 4)])
def test_attention_that_is_trained_equals_the_fused_kernel(
    kind, queries, keys, kv_heads, monkeypatch
):
    """Outputs and gradients; without a gradient to come, and beyond its bound, it is not used."""
    keys = queries if kind == "causal" else keys
    q, k, v = random(queries, 4, 32), random(keys, kv_heads, 32), random(keys, kv_heads, 32, seed=1)
    weight = random(queries, 4, 32, seed=2)
    at = torch.arange(keys)
    mask = visible(at[-queries:], at, 9) if kind == "window" else None
    calls: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        calls.append(1)
        return written_out(q, k, v, mask, causal)

    written_out = attention._written_out
    monkeypatch.setattr(attention, "_written_out", counted)

    def attend(bound: int) -> list[Tensor]:
        monkeypatch.setattr(attention, "WRITTEN_OUT", bound)
        a, b, c = (x.clone().requires_grad_() for x in (q, k, v))
        out = masked_attention(a, b, c, mask, causal=kind == "causal")
        return [out, *torch.autograd.grad((out * weight).sum(), (a, b, c))]

    ours = attend(queries * keys * 4)
    plain = masked_attention(q, k, v, mask, causal=kind == "causal")
    fused = attend(queries * keys * 4 - 1)
    assert calls == [1]
    for actual, expected in zip([plain, *fused], [ours[0], *ours], strict=True):
        assert_close(actual, expected, tolerance(torch.float32, 32 * keys))


def test_masked_attention_equals_reference_at_scattered_rows():
    q, k, v = random(3, 4, 8), random(20, 2, 8, seed=1), random(20, 2, 8, seed=2)
    rows, at = torch.tensor([19, 4, 11]), torch.arange(20)
    assert torch.equal(visible(rows, at, 6), reference.allowed(rows, at, 6))
    expected = reference.attention(q, k, v, reference.allowed(rows, at, 6))
    actual = masked_attention(q, k, v, visible(rows, at, 6))
    assert_close(actual, expected, tolerance(torch.float32, 20))


def test_window_counts_the_query_itself():
    mask = visible(torch.tensor([10]), torch.arange(12), 4)
    assert mask.nonzero()[:, 1].tolist() == [7, 8, 9, 10]


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_rotation_equals_reference(fraction):
    rope = RopeParameters(rope_type="proportional", rope_theta=1e4, partial_rotary_factor=fraction)
    x, positions = random(7, 3, 32), torch.tensor([0, 1, 2, 50, 511, 512, 4000])
    inv_freq = reference.inverse_frequencies(32, 1e4, fraction)
    expected = reference.rope(x, positions, inv_freq)
    assert_close(rotate(x, rope_table(positions, rope, 32)), expected, 1e-5)


def test_rms_norm_equals_reference_and_keeps_dtype():
    x, weight = random(5, 24), random(24, seed=1)
    assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), 1e-6)
    assert_close(rms_norm(x, None, 1e-6), reference.rms_norm(x, None, 1e-6), 1e-6)
    assert rms_norm(x.bfloat16(), weight, 1e-6).dtype == torch.bfloat16


def test_experts_equal_reference_with_idle_and_crowded_experts():
    x = random(11, 12)
    index = torch.randint(0, 5, (11, 1), generator=torch.Generator().manual_seed(3))
    index = torch.cat((index, torch.full((11, 1), 6)), 1)
    weight = random(11, 2, seed=4)
    gate_up, down = random(8, 20, 12, seed=5), random(8, 12, 10, seed=6)
    expected = reference.experts(x, index, weight, gate_up, down)
    assert_close(moe.experts(x, index, weight, gate_up, down), expected, 1e-5)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_bfloat16_products_equal_the_wide_ones_with_and_without_cpu_support(
    monkeypatch, native, rows
):
    monkeypatch.setattr(linear_module, "cpu_multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(linear_module, "BLOCK_OUTPUTS", 16)
    x, weight = random(rows, 64).bfloat16(), random(50, 64, seed=1).bfloat16()
    actual = linear_module.linear(x, weight)
    assert actual.dtype == torch.bfloat16
    expected = x.double() @ weight.double().T
    assert_close(actual, expected, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("multiplies", [True, False])
def test_few_bfloat16_rows_go_to_the_extension_whatever_the_cpu_multiplies(
    monkeypatch, tiles, multiplies
):
    """Many rows where only the extension multiplies them well, none where it does not."""
    taken: list[int] = []
    monkeypatch.setattr(linear_module, "cpu_multiplies_bfloat16", lambda: multiplies)
    monkeypatch.setattr(linear_module.cpu, "tiles_bfloat16", lambda: tiles)
    monkeypatch.setattr(
        linear_module.cpu, "linear_bfloat16", lambda w, x: taken.append(len(x)) or x @ w.T
    )
    weight, few = random(50, 64).bfloat16(), linear_module.FEW_ROWS
    for rows in (1, few, few + 1, 40):
        linear_module.linear(random(rows, 64).bfloat16(), weight)
    assert taken == ([] if not tiles else [1, few] if multiplies else [1, few, few + 1, 40])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_float_rows_take_bfloat16_weights_with_and_without_the_extension(monkeypatch, native, rows):
    if not native:
        monkeypatch.setattr(linear_module.native, "available", lambda: False)
    monkeypatch.setattr(linear_module, "BLOCK_OUTPUTS", 16)
    x, weight = random(rows, 64), random(50, 64, seed=1).bfloat16()
    actual = linear_module.linear(x, weight)
    assert actual.dtype == torch.float32
    assert_close(actual, x.double() @ weight.double().T, torch.finfo(torch.float32).eps * 8)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_keeps_gradients(dtype, rows):
    weight = random(5, 64).bfloat16().requires_grad_()
    x = random(rows, 64, seed=1).to(dtype).requires_grad_()
    linear_module.linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    if dtype == torch.float32:
        x = x.detach().requires_grad_()
        linear_module.linear(x, weight.detach()).sum().backward()
        assert x.grad is not None
