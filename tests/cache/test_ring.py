"""The cache against no cache, its bytes against sizing, and its past after every interruption."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsmith import hardware, sizing
from gemsmith.cache.none import NoCache
from gemsmith.cache.ring import RingCache
from gemsmith.config import PRESETS
from gemsmith.errors import CapacityError, ConfigError, RequestError, WeightsError
from gemsmith.testing import SIZES, assert_close, random_model, tiny_config, tolerance

# Eight reductions a layer in eight layers.
LIMIT = tolerance(torch.float32, 64, steps=64)
WINDOW = 8
CONFIGS = {size: tiny_config(size, sliding_window=WINDOW) for size in SIZES}
MODELS = {size: random_model(config) for size, config in CONFIGS.items()}
IDS = torch.randint(3, 96, (400,), generator=torch.Generator().manual_seed(7))


def new_cache(size: str, dtype: torch.dtype = torch.float32) -> RingCache:
    model = MODELS[size]
    return RingCache(model.config, dtype=dtype, k_from_v=model.k_from_v)


def feed(size: str, cache: RingCache, count: int) -> torch.Tensor:
    model = MODELS[size]
    with cache.step(count) as positions:
        ids = IDS[cache.length : cache.length + count]
        hidden = model(ids, positions, cache)
    return model.logits(hidden)


def whole(size: str, count: int) -> torch.Tensor:
    model = MODELS[size]
    store = NoCache(model.config, [count])
    return model.logits(model(IDS[:count], torch.arange(count), store))


class Rounded(NoCache):
    """No cache, and K/V through int8 and back: what an int8 cache means."""

    def __init__(self, size: str, count: int) -> None:
        super().__init__(MODELS[size].config, [count])
        self.model = MODELS[size]

    def attend(self, layer, q, k_TKH, v_TKH, rows_R):
        if k_TKH is not None and v_TKH is not None:
            v_TKH = self.there_and_back(v_TKH)
            k_TKH = self.there_and_back(k_TKH)
            if self.layers[layer].k_eq_v:
                k_TKH = self.model.k_from_v(layer).keys(v_TKH, torch.arange(len(v_TKH)))
        return NoCache.attend(self, layer, q, k_TKH, v_TKH, rows_R)

    @staticmethod
    def there_and_back(x_TKH: torch.Tensor) -> torch.Tensor:
        step = x_TKH.abs().amax(-1, keepdim=True) / 127
        return (x_TKH / step).round() * step


def off_by(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of the logits."""
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()


CHUNKINGS = [[1] * 30, [37], [5, 1, 1, 20, 1, 1, 1], [8, 8, 8, 8], [7, 9, 1, 17, 1], [3, 1, 1, 1]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunks", CHUNKINGS, ids=str)
def test_cached_logits_equal_the_uncached_run_in_any_chunking(size, chunks):
    cache = new_cache(size)
    ours = torch.cat([feed(size, cache, n) for n in chunks])
    assert_close(ours, whole(size, sum(chunks)), LIMIT)


def test_long_sequences_stay_equal_across_many_ring_turns_and_slab_steps():
    for size in ("E2B", "31B"):
        cache = new_cache(size)
        ours = torch.cat([feed(size, cache, n) for n in (200, 1, 1, 100, 1, 60, 1)])
        assert_close(ours, whole(size, 364), LIMIT)


@pytest.mark.parametrize("size", SIZES)
def test_prefill_skip_with_a_cache_gives_the_logits_of_the_full_run(size):
    model, cache = MODELS[size], new_cache(size)
    feed(size, cache, 11)
    rows = torch.tensor([0, 4, 20])
    with cache.step(21) as positions:
        hidden = model(IDS[11:32], positions, cache, rows_R=rows)
    assert_close(model.logits(hidden), whole(size, 32)[11:][rows], LIMIT)
    assert_close(feed(size, cache, 1), whole(size, 33)[32:], LIMIT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("chunks", [[37], [5, 1, 1, 20, 1, 1, 1], [7, 9, 1, 17, 1]], ids=str)
def test_int8_moves_logits_by_its_rounding_and_no_more(size, chunks):
    """Rounding is uniform over a step of a row's largest (2 to 3 deviations) / 127: off by 0.29
    steps, 0.7 % of the row. Scores of these untrained layers have a deviation of sqrt(H), so they
    move by 0.007 * sqrt(32) = 0.04 and the weights as much, relatively; through V comes 0.007.
    Over eight layers: sqrt(8) * 0.041 = 0.115.
    """
    cache = new_cache(size, torch.int8)
    ours = torch.cat([feed(size, cache, n) for n in chunks])
    assert 0 < off_by(ours, whole(size, sum(chunks))) < 0.115


@pytest.mark.parametrize("size", SIZES)
def test_int8_means_attention_over_rounded_keys_and_values(size, monkeypatch):
    """Float paths agree to float rounding, save where that turns a value at the edge between two
    steps; the extension's 16-bit queries and weights (1e-4) turn more of them, but far fewer than
    rounding moves by itself."""
    model = MODELS[size]
    expected = model.logits(model(IDS[:37], torch.arange(37), Rounded(size, 37)))
    moved = off_by(expected, whole(size, 37))
    chunks = [20, 1, 9, 1, 1, 5]
    cache = new_cache(size, torch.int8)
    assert off_by(torch.cat([feed(size, cache, n) for n in chunks]), expected) < moved / 2
    monkeypatch.setattr("gemsmith.ops.attention._goes_native", lambda *_: False)
    cache = new_cache(size, torch.int8)
    assert off_by(torch.cat([feed(size, cache, n) for n in chunks]), expected) < moved / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_the_extension_and_torch_agree_in_every_format(size, dtype, monkeypatch):
    """From the same stored past, one step of each kind."""
    cache = new_cache(size, dtype)
    feed(size, cache, 29)
    for count in (1, 6):
        there, here = cache.fork(), cache.fork()
        native = feed(size, here, count)
        with monkeypatch.context() as patch:
            patch.setattr("gemsmith.ops.attention._goes_native", lambda *_: False)
            plain = feed(size, there, count)
        # int8: a value of this step may round the other way, one step in 127.
        limit = {torch.float32: LIMIT, torch.bfloat16: 0.05, torch.int8: 0.05}[dtype]
        assert_close(native, plain, limit)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [1, 255, 257, 300])
def test_int8_bytes_are_one_a_value_and_four_a_head(size, tokens):
    cache = new_cache(size, torch.int8)
    cache.reserve(tokens)
    assert cache.nbytes == sizing.kv_bytes(MODELS[size].config, tokens, 1)
    values = sizing.kv_bytes(MODELS[size].config, tokens, 2) // 2
    scales = sum(
        t.nbytes
        for layer in cache._layers.values()
        for n, t in layer.tensors.items()
        if "scale" in n
    )
    assert cache.nbytes == values + scales > values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_every_format_survives_interruption_fork_trim_and_save(size, tokens, dtype, tmp_path):
    cache, model = new_cache(size, dtype), MODELS[size]
    feed(size, cache, 19)
    other = cache.fork()

    def interrupt() -> None:
        with cache.step(tokens) as positions:
            model(IDS[50 : 50 + tokens], positions, cache)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    cache.save(tmp_path / "kv")
    restored = RingCache.restore(
        tmp_path / "kv", model.config, dtype=dtype, k_from_v=model.k_from_v
    )
    for each in (cache, other, restored):
        each.trim(18)
    expected = torch.cat([feed(size, other, 10), feed(size, other, 1)])
    for each in (cache, restored):
        assert torch.equal(torch.cat([feed(size, each, 10), feed(size, each, 1)]), expected)


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"as torch.float16; float32, bfloat16, int8 can be"):
        new_cache("E2B", torch.float16)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 255, 256, 257, 300])
def test_bytes_are_what_sizing_says(size, tokens):
    cache = new_cache(size)
    cache.reserve(tokens)
    assert cache.nbytes == sizing.kv_bytes(MODELS[size].config, tokens, 4) > 0


@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_real_sizes_are_what_sizing_says_without_touching_memory(size):
    config = PRESETS[size].text_config
    cache = RingCache(config, dtype=torch.bfloat16, device="meta")
    cache.reserve(config.max_position_embeddings)
    assert cache.nbytes == sizing.kv_bytes(config, config.max_position_embeddings, 2)


def test_k_eq_v_layers_store_one_copy_and_rebuild_the_keys():
    model, cache = MODELS["31B"], new_cache("31B")
    stored: dict[int, torch.Tensor] = {}
    attend = cache.attend

    def spy(layer, q, k, v, rows):
        stored[layer] = k
        return attend(layer, q, k, v, rows)

    cache.attend = spy
    feed("31B", cache, 20)
    for plan in model.config.layers:
        names = [n for n in cache._layers[plan.index].tensors if n.endswith(".k")]
        assert bool(names) == (not plan.k_eq_v)
        if plan.k_eq_v:
            values = cache._layers[plan.index].slots.v[:20]
            rebuilt = model.k_from_v(plan.index).keys(values, torch.arange(20))
            assert_close(rebuilt, stored[plan.index], LIMIT)


def test_layers_that_share_kv_store_nothing():
    cache = new_cache("E2B")
    cache.reserve(100)
    assert sorted(cache._layers) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", ["E2B", "26B-A4B"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_a_step_that_fails_leaves_no_trace(size, tokens):
    cache = new_cache(size)
    feed(size, cache, 19)
    model = MODELS[size]

    def interrupt() -> None:
        with cache.step(tokens) as positions:
            model(IDS[50 : 50 + tokens], positions, cache)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert cache.length == 19
    cache.trim(18)
    ours = torch.cat([feed(size, cache, 10), feed(size, cache, 1)])
    assert_close(ours, whole(size, 29)[18:], LIMIT)


def test_a_failed_step_at_the_turn_of_the_ring_loses_nothing():
    cache = new_cache("E2B")
    feed("E2B", cache, WINDOW)

    def interrupt() -> None:
        with cache.step(1) as positions:
            MODELS["E2B"](IDS[50:51], positions, cache)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    cache.trim(3)
    assert_close(feed("E2B", cache, 4), whole("E2B", 7)[3:], LIMIT)


@pytest.mark.parametrize("size", SIZES)
def test_fork_goes_its_own_way(size):
    cache = new_cache(size)
    feed(size, cache, 13)
    other = cache.fork()
    with other.step(5) as positions:
        MODELS[size](IDS[100:105], positions, other)
    assert (cache.length, other.length) == (13, 18)
    assert_close(feed(size, cache, 5), whole(size, 18)[13:], LIMIT)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [5, 23])
def test_saved_and_restored_past_goes_on_alike(size, length, tmp_path):
    cache, model = new_cache(size), MODELS[size]
    feed(size, cache, length)
    cache.save(tmp_path / "kv.safetensors")
    restored = RingCache.restore(
        tmp_path / "kv.safetensors", model.config, dtype=torch.float32, k_from_v=model.k_from_v
    )
    assert torch.equal(feed(size, restored, 6), feed(size, cache, 6))


def test_restore_refuses_damage_and_strangers(tmp_path):
    cache = new_cache("E2B")
    feed("E2B", cache, 5)
    path = tmp_path / "kv.safetensors"
    cache.save(path)
    with pytest.raises(WeightsError, match="K/V of another model; prefill the prompt again"):
        RingCache.restore(path, MODELS["12B"].config, dtype=torch.float32)
    with pytest.raises(WeightsError, match=r"saved as float32, and this cache holds int8; restore"):
        RingCache.restore(path, MODELS["E2B"].config, dtype=torch.int8)
    data = path.read_bytes()
    for bad in (data[:100], data[:-3], b"", b"\xff" * 64):
        path.write_bytes(bad)
        with pytest.raises(WeightsError, match="not a saved cache"):
            RingCache.restore(path, MODELS["E2B"].config, dtype=torch.float32)
    with pytest.raises(WeightsError, match="not a saved cache"):
        RingCache.restore(tmp_path / "none", MODELS["E2B"].config, dtype=torch.float32)


def test_trim_before_the_ring_wraps_goes_anywhere():
    cache = new_cache("E2B")
    feed("E2B", cache, 8)
    cache.trim(3)
    assert_close(feed("E2B", cache, 7), whole("E2B", 10)[3:], LIMIT)
    cache.trim(0)
    assert_close(feed("E2B", cache, 20), whole("E2B", 20), LIMIT)


@pytest.mark.parametrize("size", SIZES)
def test_trim_by_one_token_is_always_exact(size):
    cache = new_cache(size)
    feed(size, cache, 20)
    cache.trim(19)
    assert_close(feed(size, cache, 1), whole(size, 20)[19:], LIMIT)
    cache.trim(19)
    assert_close(feed(size, cache, 4), whole(size, 23)[19:], LIMIT)


def test_trim_that_would_lose_a_window_is_refused():
    cache = new_cache("E2B")
    feed("E2B", cache, 20)
    with pytest.raises(CapacityError, match=r"from 20 to 18 tokens.*last 8 only.*Fork or save"):
        cache.trim(18)
    with pytest.raises(CapacityError, match="cannot trim to 21: the cache holds 20"):
        cache.trim(21)
    assert cache.length == 20


def test_context_limit_is_refused_before_anything_is_computed():
    cache = new_cache("E2B")
    with pytest.raises(CapacityError, match=r"5000 tokens do not fit.*context of 4096.*shorten"):
        cache.reserve(5000)
    assert cache.nbytes == 0


def test_a_context_that_the_memory_cannot_hold_is_refused_with_what_would_fit(monkeypatch):
    config = PRESETS["31B"].text_config
    gib = 1 << 30
    cache = RingCache(config, dtype=torch.bfloat16)
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 6 * gib)
    most = sizing.largest_context(config, 6 * gib)
    with pytest.raises(CapacityError) as caught:
        cache.reserve(262_144)
    assert str(caught.value) == (
        "a context of 262144 tokens needs 10.78 GiB of bfloat16 K/V, and 6.00 GiB are free; the "
        f"largest context that fits is {most} tokens; kv='int8' would need 5.44 GiB"
    )
    assert cache.nbytes == cache.reserved == 0
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 4 * gib)
    with pytest.raises(CapacityError, match=r"5\.44 GiB, which is not there either$"):
        cache.reserve(262_144)
    narrow = RingCache(config, dtype=torch.int8)
    with pytest.raises(CapacityError, match=r"of int8 K/V.*fits is \d+ tokens$"):
        narrow.reserve(262_144)


def test_what_is_held_already_counts_as_room(monkeypatch):
    cache = new_cache("E2B")
    feed("E2B", cache, 3)
    more = sizing.kv_bytes(cache.config, 1000, 4) - cache.nbytes
    monkeypatch.setattr(hardware, "free_bytes", lambda device: more)
    cache.reserve(1000)
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 0)
    cache.reserve(1024)  # the same slab
    with pytest.raises(CapacityError, match=r"0\.00 GiB are free; the largest"):
        cache.reserve(1025)


def test_packed_lengths_must_hold_tokens():
    with pytest.raises(RequestError, match="every packed sequence needs a token"):
        NoCache(MODELS["E2B"].config, [3, 0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=6), st.sampled_from(SIZES))
def test_any_chunking_equals_the_whole(chunks, size):
    cache = new_cache(size)
    ours = torch.cat([feed(size, cache, n) for n in chunks])
    assert_close(ours, whole(size, sum(chunks)), LIMIT)
    assert cache.nbytes == sizing.kv_bytes(MODELS[size].config, sum(chunks), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_cuda_cache_equals_cpu(size):
    model = random_model(CONFIGS[size]).cuda()
    cache = RingCache(model.config, dtype=torch.float32, device="cuda", k_from_v=model.k_from_v)
    logits = []
    for n in (17, 1, 1, 12):
        with cache.step(n) as positions:
            ids = IDS[cache.length : cache.length + n].cuda()
            logits.append(model.logits(model(ids, positions, cache)))
    assert_close(torch.cat(logits).cpu(), whole(size, 31), 4 * LIMIT)


def held(cache: RingCache) -> list[torch.Tensor]:
    layers = cache._layers.values()
    return [t[: cache.length].clone() for layer in layers for t in layer.tensors.values()]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("past", [3, 21])
@pytest.mark.parametrize("kept", [0, 1, 4, 8, 11])
@pytest.mark.parametrize("after", ["commit", "step", "trim"])
def test_an_open_step_counts_as_far_as_it_is_committed(size, past, kept, after):
    cache = new_cache(size)
    feed(size, cache, past)
    before, length = held(cache), 11
    model = MODELS[size]
    with cache.step(length, left_open=True) as positions:
        ids = IDS[past : past + length].clone()
        ids[kept:] = 3
        model(ids, positions, cache)
    assert cache.length == past
    assert all(torch.equal(a, b) for a, b in zip(held(cache), before, strict=True))
    if after == "commit":
        cache.commit(kept)
    elif after == "trim":
        cache.trim(past)
    count = 5 if after == "commit" else 9
    logits = feed(size, cache, count)
    assert cache.length == past + count + (kept if after == "commit" else 0)
    assert_close(logits, whole(size, cache.length)[-count:], LIMIT)
    with pytest.raises(AssertionError):
        cache.commit(1)
