"""Attention over stored K/V: the extension and torch against plain float64, on every instruction
set and in every format.

Without the extension the same facts are held to torch's code.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import needs_extension
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops import attention, cpu, cpu_attention, native
from gemsmith.ops.attention import Queries, Slots, Span, stored_attention
from gemsmith.ops.cpu_attention import Readers, StoredKV
from gemsmith.ops.rotary import KeyRule, Turns
from gemsmith.testing import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
CPU = torch.device("cpu")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["extension", "torch"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "extension" and not native.available():
        pytest.skip("the extension is not built")
    if request.param == "torch":
        monkeypatch.setattr(attention, "_goes_native", lambda *_: False)
    else:
        monkeypatch.setattr(attention, "NATIVE_ROWS", 10_000)
    return request.param


@pytest.fixture
def every_isa() -> Iterator[tuple[str, ...]]:
    yield native.isas()
    native.force_isa(None)


def stored(count: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 1) -> Slots:
    """`count` slots of random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    slots = Slots.empty(count, heads, head_dim, dtype=dtype, device=CPU)
    k, v = (torch.randn(count, heads, head_dim, generator=generator) for _ in range(2))
    slots.write(0, k, v)
    return slots


def queries_of(rows: int, heads: int, head_dim: int, seed: int = 2) -> Tensor:
    """Scores of these with standard normal keys have a deviation of 2: neither flat nor a peak."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, head_dim, generator=generator) * 2 / head_dim**0.5


def plainly(q: Tensor, spans: list[Span], ranges: Tensor) -> Tensor:
    """The definition in float64, from what is stored."""
    parts = [s.widened(first, first + count, torch.float32) for s, first, count in spans]
    k = torch.cat([k for k, _ in parts if k is not None]).double()
    v = torch.cat([v for _, v in parts]).double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("rnh,snh->nrs", q.double(), k)
    at = torch.arange(len(k))
    seen = (at >= ranges[:, :1]) & (at < ranges[:, 1:])
    return torch.einsum("nrs,snh->rnh", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def limit(dtype: torch.dtype, head_dim: int, how: str = "extension") -> float:
    """Relative to the largest output, for `queries_of` over standard normal K and V.

    Floats: a score is a sum of H products, its rounding 8 * eps * sqrt(H) of sizes up to 16 (eight
    deviations), and shifts a softmax weight by as much; the sum of values adds less.
    int8 in the extension: q and the weights of a block are rounded to steps of their largest /
    32767. A step in each of H values of q (largest 4 * 2 / sqrt(H)) moves a score of unit keys by
    0.29 * 8 / 32767 times at most 8; the weights' steps stay below a tenth of that.
    """
    if dtype == torch.int8 and how == "extension":
        return 8 * 0.29 * 8 / 32767
    return 16 * 8 * torch.finfo(torch.float32).eps * head_dim**0.5


def last_rows(rows: int, keys: int, window: int | None = None) -> Queries:
    return Queries(rows, keys, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1), (8, 1), (16, 2)])
def test_every_head_size_and_grouping_is_the_definition(
    how: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
):
    for rows, keys, window in ((1, 1, None), (1, 300, None), (2, 129, 100), (8, 260, None)):
        spans: list[Span] = [(stored(keys, kv_heads, head_dim, dtype), 0, keys)]
        q, asked = queries_of(rows, heads, head_dim), last_rows(rows, keys, window)
        expected = plainly(q, spans, asked.ranges_R2)
        assert_close(stored_attention(q, spans, asked), expected, limit(dtype, head_dim, how))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("keys", [33, 128, 1000, 4000])
def test_any_number_of_queries_and_keys_is_the_definition(
    how: str, keys: int, rows: int, dtype: torch.dtype
):
    spans: list[Span] = [(stored(keys, 1, 64, dtype), 0, keys)]
    q = queries_of(rows, 4, 64)
    for window in (None, 512, 40):
        asked = Queries(rows, keys, window)
        if rows == 1 and window is not None:
            continue  # a lone query sees whatever it is given
        expected = plainly(q, spans, asked.ranges_R2)
        assert_close(stored_attention(q, spans, asked), expected, limit(dtype, 64, how))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spans_are_read_in_their_order_wherever_they_lie(how: str, dtype: torch.dtype):
    """A ring that has turned, and the step's own tokens elsewhere: as one after the other."""
    ring, fresh = stored(200, 2, 32, dtype), stored(40, 2, 32, dtype, seed=5)
    spans: list[Span] = [(ring, 150, 50), (ring, 0, 149), (fresh, 3, 30)]
    q, asked = queries_of(30, 4, 32), Queries(30, 229, 200)
    expected = plainly(q, spans, asked.ranges_R2)
    assert_close(stored_attention(q, spans, asked), expected, limit(dtype, 32, how))
    turned = plainly(q, [spans[1], spans[0], spans[2]], asked.ranges_R2)
    assert (turned - expected).abs().max() > 0.1


def test_rows_that_ask_get_what_they_would_among_all(how: str):
    spans: list[Span] = [(stored(90, 1, 32, torch.int8), 0, 90)]
    q = queries_of(40, 4, 32)
    rows = torch.tensor([39, 0, 17])
    everyone = stored_attention(q, spans, Queries(40, 90, 30))
    some = stored_attention(q[rows], spans, Queries(40, 90, 30, None, rows))
    assert_close(some, everyone[rows], limit(torch.int8, 32))


def test_tokens_of_a_block_see_each_other_whole(how: str):
    blocks = torch.tensor([-1, 0, 0, 0, -1, 1, 1, 2, 2, 2])
    asked = Queries(10, 16, 5, blocks)
    first = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    last = [7, 10, 10, 10, 11, 13, 13, 16, 16, 16]
    assert asked.ranges_R2.tolist() == [list(pair) for pair in zip(first, last, strict=True)]
    spans: list[Span] = [(stored(16, 2, 32, torch.float32), 0, 16)]
    q = queries_of(10, 4, 32)
    expected = plainly(q, spans, asked.ranges_R2)
    assert_close(stored_attention(q, spans, asked), expected, limit(torch.float32, 32))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(
    dtype: torch.dtype, data: st.DataObject
):
    kv_heads = data.draw(st.sampled_from([1, 2]))
    heads = kv_heads * data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    head_dim = 16 * data.draw(st.integers(1, 32))
    rows, past = data.draw(st.sampled_from([1, 2, 8, 33])), data.draw(st.integers(0, 900))
    keys = past + rows
    window = data.draw(st.sampled_from([None, 17, 512]))
    spans: list[Span] = [(stored(keys, kv_heads, head_dim, dtype), 0, keys)]
    q = queries_of(rows, heads, head_dim)
    asked = Queries(rows, keys, window)
    natives = [(s._native, first, count) for s, first, count in spans if s._native]
    with pytest.MonkeyPatch.context() as patch:
        results: list[Tensor] = []
        for isa in native.isas():
            native.force_isa(isa)
            for threads in (1, 2):
                patch.setattr(native, "threads", lambda threads=threads: threads)
                results.append(cpu_attention.attention(q, natives, asked.ranges_R2))
    native.force_isa(None)
    assert all(torch.equal(result, results[0]) for result in results)
    assert_close(results[0], plainly(q, spans, asked.ranges_R2), limit(dtype, head_dim))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_row_has_the_same_bits_alone_as_among_any_others(dtype: torch.dtype, data: st.DataObject):
    kv_heads, group = data.draw(st.sampled_from([(1, 8), (1, 1), (2, 2), (8, 2)]))
    rows = data.draw(st.sampled_from([1, 5, 70, 300]))
    keys = rows + data.draw(st.integers(0, 900))
    window = data.draw(st.sampled_from([None, 17, 512]))
    slots = stored(keys, kv_heads, 32, dtype)
    kv, q = slots._native, queries_of(rows, kv_heads * group, 32)
    assert kv is not None
    together = cpu_attention.attention(q, [(kv, 0, keys)], Queries(rows, keys, window).ranges_R2)
    for row in {0, rows // 2, rows - 1}:
        last = keys - rows + row + 1
        # Of the keys before it only those that it sees, or some more, are given.
        seen = 0 if window is None else max(0, last - window)
        start = data.draw(st.integers(0, seen))
        ranges = torch.tensor([[seen - start, last - start]])
        alone = cpu_attention.attention(
            q[row : row + 1], [(kv, start, last - start)], ranges, origin=start
        )
        assert torch.equal(alone[0], together[row])


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_sequences_at_once_get_the_bits_of_each_alone(dtype: torch.dtype):
    slots = stored(900, 2, 32, dtype)
    kv = slots._native
    assert kv is not None
    runs = [[(0, 300), (640, 20)], [(320, 1)], [(500, 64), (400, 64)]]
    asked = [Queries(9, 320, None, origin=0), Queries(1, 1, None), Queries(30, 128, 40, origin=77)]
    q = queries_of(40, 8, 32)
    spans = [[(0, *run) for run in each] for each in runs]
    ranges_R2 = torch.cat([a.ranges_R2 for a in asked])
    readers = Readers(spans, [9, 1, 30], ranges_R2, [a.origin for a in asked])
    together = cpu_attention.attention_of_many(q, [kv], readers)
    alone = [
        cpu_attention.attention(part, [(kv, *run) for run in each], a.ranges_R2, origin=a.origin)
        for part, each, a in zip(q.split([9, 1, 30]), runs, asked, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@needs_extension
def test_what_several_sequences_cannot_ask_is_refused():
    kv = stored(64, 2, 32, torch.float32)._native
    ranges = torch.tensor([[0, 4]])
    assert kv is not None
    with pytest.raises(WeightsError, match="attention needs keys"):
        Readers([[]], [1], ranges, [0])
    with pytest.raises(WeightsError, match=r"ranges is .* must be contiguous torch\.int64"):
        Readers([[(0, 0, 4)]], [1], ranges.int(), [0])
    outside = Readers([[(0, 60, 5)]], [1], ranges, [0])
    with pytest.raises(WeightsError, match="slots 0 to 65 of 64"):
        cpu_attention.attention_of_many(torch.zeros(1, 2, 32), [kv], outside)
    inside = Readers([[(0, 60, 4)]], [1], ranges, [0])
    with pytest.raises(WeightsError, match=r"q is .* must be contiguous"):
        cpu_attention.attention_of_many(torch.zeros(2, 2, 32), [kv], inside)
    with pytest.raises(WeightsError, match="3 query heads do not share 2"):
        cpu_attention.attention_of_many(torch.zeros(1, 3, 32), [kv], inside)
    other = Readers([[(1, 0, 4)]], [1], ranges, [0])
    with pytest.raises(WeightsError, match="storage number 1 of 1"):
        cpu_attention.attention_of_many(torch.zeros(1, 2, 32), [kv], other)


@needs_extension
def test_keys_and_values_may_be_of_different_formats():
    eight, wide = stored(150, 2, 64, torch.int8), stored(150, 2, 64, torch.float32, seed=9)
    mixed = Slots(eight.v, wide.k, eight.v_scale)
    spans: list[Span] = [(mixed, 0, 150)]
    q, asked = queries_of(3, 4, 64), Queries(3, 150, None)
    expected = plainly(q, spans, asked.ranges_R2)
    assert_close(stored_attention(q, spans, asked), expected, limit(torch.int8, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_great_scores_do_not_overflow(how: str, dtype: torch.dtype):
    slots = stored(300, 1, 64, dtype)
    q = queries_of(2, 2, 64) * 1000
    spans: list[Span] = [(slots, 0, 300)]
    asked = Queries(2, 300, None)
    out = stored_attention(q, spans, asked)
    # All the weight on one key, unless two scores come as close as roundings are apart.
    assert_close(out, plainly(q, spans, asked.ranges_R2), 1000 * limit(dtype, 64, how))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_key_reaches_those_that_see_it_alone(dtype: torch.dtype):
    slots = Slots.empty(400, 1, 32, dtype=dtype, device=CPU)
    k, v = (torch.randn(400, 1, 32, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    k[390, 0, 3] = torch.nan
    slots.write(0, k, v)
    q = queries_of(20, 2, 32)
    found = stored_attention(q, [(slots, 0, 400)], Queries(20, 400, None))
    assert found.isnan().flatten(1).any(1).tolist() == [t >= 10 for t in range(20)]
    assert found[10:].isnan().all()


def test_int8_is_stored_by_the_rule_of_quantize_rows(how: str):
    """One scale a token and head: max / 127, or 1 for zeros; rounded half to even."""
    slots = Slots.empty(3, 2, 16, dtype=torch.int8, device=CPU)
    k = torch.zeros(1, 2, 16)
    k[0, 1, :4] = torch.tensor([127.0, -2.5, 3.5, 0.5])
    v = torch.arange(32.0).view(1, 2, 16)
    slots.write(1, k, v)
    assert slots.k is not None
    assert slots.k_scale is not None
    assert slots.v_scale is not None
    assert slots.k_scale[1].tolist() == [1.0, 1.0]
    assert slots.k[1, 0].tolist() == [0] * 16
    assert slots.k[1, 1, :4].tolist() == [127, -2, 4, 0]
    x8, scale = cpu.quantize_rows_reference(v.view(2, 16))
    assert torch.equal(slots.v[1], x8)
    assert torch.equal(slots.v_scale[1], scale)


def test_gradients_flow_through_torch():
    slots = stored(9, 1, 32, torch.float32)
    q = queries_of(2, 2, 32).requires_grad_()
    stored_attention(q, [(slots, 0, 9)], Queries(2, 9, None)).sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


def test_bfloat16_queries_get_bfloat16_back(how: str):
    spans: list[Span] = [(stored(50, 1, 32, torch.int8), 0, 50)]
    q = queries_of(2, 2, 32).bfloat16()
    out = stored_attention(q, spans, Queries(2, 50, None))
    assert out.dtype == torch.bfloat16
    expected = plainly(q, spans, Queries(2, 50, None).ranges_R2)
    assert_close(out.float(), expected, 8 * torch.finfo(torch.bfloat16).eps)


@needs_extension
def test_ranges_beyond_the_keys_are_cut():
    slots = stored(50, 1, 32, torch.int8)
    assert slots._native
    q = queries_of(2, 2, 32)
    beyond = torch.tensor([[-7, 900], [10, 50]])
    within = torch.tensor([[0, 50], [10, 50]])
    spans = [(slots._native, 0, 50)]
    assert torch.equal(
        cpu_attention.attention(q, spans, beyond), cpu_attention.attention(q, spans, within)
    )
    assert cpu_attention.attention(q, spans, torch.tensor([[0, 50], [20, 20]]))[1].isnan().all()


@needs_extension
def test_what_the_kernel_cannot_take_is_refused():
    def refused(match: str, call: Any) -> None:
        with pytest.raises(WeightsError, match=match):
            call()

    def kv(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    good = StoredKV(kv(8, 2, 32), kv(8, 2, 32))
    q, ranges = kv(3, 4, 32), torch.zeros(3, 2, dtype=torch.int64)
    refused(r"keys \[8, 2, 24\].*multiple of 16", lambda: StoredKV(kv(8, 2, 24), kv(8, 2, 24)))
    refused(r"keys \[8, 2, 528\]", lambda: StoredKV(kv(8, 2, 528), kv(8, 2, 528)))
    refused(r"keys \[8, 32\]", lambda: StoredKV(kv(8, 32), kv(8, 32)))
    refused(r"v is torch.float32 \[7, 2, 32\]", lambda: StoredKV(kv(8, 2, 32), kv(7, 2, 32)))
    refused("not contiguous", lambda: StoredKV(kv(2, 8, 32).transpose(0, 1), kv(8, 2, 32)))
    eight = kv(8, 2, 32, dtype=torch.int8)
    refused("int8 has scales, no other type does", lambda: StoredKV(eight, eight))
    refused(r"k_scale is torch.float32 \[8\]", lambda: StoredKV(eight, eight, kv(8), kv(8, 2)))
    half = kv(8, 2, 32, dtype=torch.float16)
    refused("k is torch.float16; it must be one of", lambda: StoredKV(half, half))
    refused("attention needs keys", lambda: cpu_attention.attention(q, [], ranges))
    refused(r"slots 0 to 9 of 8", lambda: cpu_attention.attention(q, [(good, 5, 4)], ranges))
    refused(r"spans .* from token 0", lambda: cpu_attention.attention(q, [(good, -1, 3)], ranges))
    refused(
        r"q is torch.float64", lambda: cpu_attention.attention(q.double(), [(good, 0, 8)], ranges)
    )
    refused(
        r"3 query heads do not share 2",
        lambda: cpu_attention.attention(kv(3, 3, 32), [(good, 0, 8)], ranges),
    )
    refused(r"q is .* \[2, 4, 32\]", lambda: cpu_attention.attention(q, [(good, 0, 8)], ranges[:2]))
    other = StoredKV(eight, eight, kv(8, 2), kv(8, 2))
    refused(
        "different formats",
        lambda: cpu_attention.attention(q, [(good, 0, 8), (other, 0, 8)], ranges),
    )
    refused("only int8 slots are written", lambda: good.write(0, kv(1, 2, 32), kv(1, 2, 32)))
    refused(r"slots 7 to 9 of 8", lambda: other.write(7, kv(2, 2, 32), kv(2, 2, 32)))
    refused(r"v is .* \[2, 1, 32\]", lambda: other.write(0, kv(2, 2, 32), kv(2, 1, 32)))


# -- keys rebuilt from values -------------------------------------------------------------------


def rule_of(head_dim: int, pairs: int) -> KeyRule:
    """Norms around 1, and the slowest to the fastest of the angles Gemma turns by."""
    generator = torch.Generator().manual_seed(4)
    frequencies = 1_000_000.0 ** -(torch.arange(pairs) * 2 / head_dim)
    return KeyRule(torch.rand(head_dim, generator=generator) + 0.5, Turns(frequencies))


def values_alone(
    count: int, heads: int, head_dim: int, dtype: torch.dtype, pairs: int, repeats: int = 1
) -> Slots:
    """`count` slots of random values and the rule for their keys; the same again for long pasts."""
    rule = rule_of(head_dim, pairs)
    slots = Slots.empty(count, heads, head_dim, dtype=dtype, device=CPU, keys=False, rule=rule)
    v = torch.randn(-(-count // repeats), heads, head_dim, generator=torch.Generator())
    v = v.repeat(repeats, 1, 1)[:count]
    slots.write(0, torch.full_like(v, torch.nan), v)
    return slots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "pairs"), [(512, 64), (512, 256), (48, 7), (32, 0)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (16, 2), (3, 3)])
def test_keys_rebuilt_from_values_are_the_definition(
    how: str, heads: int, kv_heads: int, head_dim: int, pairs: int, dtype: torch.dtype
):
    for rows, keys, window in ((1, 1, None), (1, 300, None), (2, 129, None), (40, 260, 100)):
        slots = values_alone(keys, kv_heads, head_dim, dtype, pairs)
        assert slots.k is None
        spans: list[Span] = [(slots, 0, keys)]
        q, asked = queries_of(rows, heads, head_dim), Queries(rows, keys, window)
        expected = rebuilt_plainly(q, slots, keys, asked)
        assert_close(stored_attention(q, spans, asked), expected, limit(dtype, head_dim, how))


def rebuilt_plainly(q: Tensor, slots: Slots, keys: int, asked: Queries) -> Tensor:
    """The definition: float32 angles, all else in float64."""
    assert slots.rule is not None
    _, v = slots.widened(0, keys, torch.float32)
    frequencies = slots.rule.turns.frequencies_R
    angle = (torch.arange(keys)[:, None, None].float() * frequencies).double()
    k = v.double() * slots.rule.norm_H
    half, pairs = k.shape[-1] // 2, len(frequencies)
    a, b = k[..., :pairs].clone(), k[..., half : half + pairs].clone()
    k[..., :pairs] = a * angle.cos() - b * angle.sin()
    k[..., half : half + pairs] = b * angle.cos() + a * angle.sin()
    exact = Slots(v, k.float())
    return plainly(q, [(exact, 0, keys)], asked.ranges_R2)


@needs_extension
def test_far_positions_turn_by_the_rounded_angles_of_the_definition():
    """At 200,000 float32 angles are off by up to 1/128; what is rebuilt is off by the same."""
    keys = 200_000
    slots = values_alone(keys, 1, 32, torch.float32, 16, repeats=400)
    q = queries_of(1, 2, 32)
    ranges = torch.tensor([[keys - 90, keys]])
    assert slots._native
    found = cpu_attention.attention(q, [(slots._native, 0, keys)], ranges)
    _, v = slots.widened(keys - 90, keys, torch.float32)
    assert slots.rule is not None
    exact = Slots(v.contiguous(), slots.rule.keys(v, torch.arange(keys - 90, keys)))
    expected = plainly(q, [(exact, 0, 90)], torch.tensor([[0, 90]]))
    assert_close(found, expected, 2 * limit(torch.float32, 32))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rebuilt_keys_have_the_same_bits_on_every_instruction_set(dtype: torch.dtype):
    slots = values_alone(700, 2, 512, dtype, 64)
    assert slots._native
    asked = Queries(9, 700, None)
    q = queries_of(9, 16, 512)
    with pytest.MonkeyPatch.context() as patch:
        results: list[Tensor] = []
        for isa in native.isas():
            native.force_isa(isa)
            for threads in (1, 2):
                patch.setattr(native, "threads", lambda threads=threads: threads)
                results.append(
                    cpu_attention.attention(q, [(slots._native, 0, 700)], asked.ranges_R2)
                )
    native.force_isa(None)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_extension
def test_values_alone_are_attended_by_the_extension_and_their_keys_never_made(
    monkeypatch: pytest.MonkeyPatch,
):
    slots = values_alone(300, 1, 32, torch.int8, 4)
    monkeypatch.setattr(KeyRule, "keys", lambda *_: pytest.fail("keys of the whole past"))
    for rows in (1, 64):
        stored_attention(queries_of(rows, 2, 32), [(slots, 0, 300)], Queries(rows, 300, None))


@needs_extension
def test_rules_that_do_not_fit_are_refused():
    rule, v = rule_of(32, 4), torch.zeros(8, 2, 32)
    with pytest.raises(WeightsError, match="either stored or rebuilt by a rule: give one of the"):
        StoredKV(None, v)
    with pytest.raises(WeightsError, match="either stored or rebuilt by a rule: give one of the"):
        StoredKV(v, v, rule=rule)
    with pytest.raises(WeightsError, match=r"norm is torch.float32 \[48\] .* \[32\] on cpu"):
        StoredKV(None, v, rule=rule_of(48, 4))
    with pytest.raises(WeightsError, match="17 pairs of a head of 32 cannot turn"):
        StoredKV(None, v, rule=KeyRule(torch.ones(32), Turns(torch.ones(17))))
    kv = StoredKV(None, v, rule=rule)
    q, ranges = torch.zeros(1, 2, 32), torch.tensor([[0, 4]])
    for other in (StoredKV(v, v), StoredKV(None, v, rule=rule_of(32, 4))):
        with pytest.raises(WeightsError, match="keys that follow different rules"):
            cpu_attention.attention(q, [(kv, 0, 4), (other, 4, 4)], ranges)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rebuilt_keys_stand_where_their_spans_say(how: str, dtype: torch.dtype):
    """A past in blocks that lie anywhere, as one in a row."""
    slots = values_alone(300, 2, 64, dtype, 8)
    q, asked = queries_of(3, 4, 64), Queries(3, 300, None)
    order = torch.cat([torch.arange(100, 300), torch.arange(100)])
    scale = None if slots.v_scale is None else slots.v_scale[order]
    moved = Slots(slots.v[order], None, scale, rule=slots.rule)
    expected = stored_attention(q, [(slots, 0, 300)], asked)
    found = stored_attention(q, [(moved, 200, 100), (moved, 0, 150), (moved, 150, 50)], asked)
    assert torch.equal(found, expected)
