"""Many requests together against each alone; nothing leaks whoever leaves, fails or waits."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import needs_extension
from tests.engine.conftest import random_lm

from gemsmith.engine.batching import BatchEngine, EngineConfig, Outcome, run_all
from gemsmith.engine.context import Next
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.reply import Reply, collect
from gemsmith.engine.request import Finished, FinishReason, Generation, Request, SamplingParams
from gemsmith.errors import CapacityError, ConfigError, QueueFullError, RequestError, WeightsError
from gemsmith.ops import cpu_layers
from gemsmith.ops.cpu_decoder import Decoder
from gemsmith.ops.linear import bfloat16_rows_are_alone
from gemsmith.testing import (
    SIZES,
    media_ids,
    random_model,
    random_towers,
    tiny_config,
    tiny_media_config,
    whole_groups,
)
from gemsmith.weights.load import load_model
from gemsmith.weights.save import save_model

LENGTHS = (1, 40, 7, 120, 8, 23, 64, 3)
SMALL = EngineConfig(max_num_seqs=5, max_num_batched_tokens=48, max_model_len=200, block_tokens=4)
GREEDY = SamplingParams(temperature=0, max_tokens=9)


def prompts(vocab_size: int, lengths=LENGTHS) -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def reply_of(outcome: Outcome) -> Generation:
    assert isinstance(outcome, list), outcome
    return collect(outcome)


def requests(lm: LM, params=GREEDY, lengths=LENGTHS) -> list[Request]:
    ids = prompts(lm.tokenizer.vocab_size, lengths)
    return [Request(prompt=Prompt(each), params=params, chat=False) for each in ids]


def idle(engine: BatchEngine) -> None:
    engine.check()
    engine.prefix.clear()
    blocks = engine.cache.blocks
    assert (blocks.full.free, blocks.sliding.free) == (
        engine.plan.full_blocks,
        engine.plan.sliding_blocks,
    )
    assert engine.stats().kv_used_bytes == 0
    assert not engine.busy


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_says_what_each_request_says_alone(size, tokenizer):
    lm = random_lm(size, tokenizer)
    engine = BatchEngine(lm, SMALL)
    outcomes = run_all(engine, requests(lm))
    for request, events in zip(requests(lm), outcomes, strict=True):
        alone = lm.complete(request.prompt.ids, sampling=GREEDY)
        assert reply_of(events).token_ids == alone.token_ids
        assert reply_of(events).text == alone.text
    idle(engine)
    stats = engine.stats()
    assert (stats.finished, stats.prompt_tokens) == (len(LENGTHS), sum(LENGTHS))
    assert stats.generated_tokens == 9 * len(LENGTHS)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=3, temperature=0.8, top_k=40, max_tokens=12, logprobs=2),
        SamplingParams(seed=4, top_p=0.9, min_p=0.01, repetition_penalty=1.3, max_tokens=12),
    ],
)
def test_seeds_penalties_and_logprobs_are_each_requests_own(params, tokenizer):
    lm = random_lm("E2B", tokenizer)
    asked = [replace(r, params=params.changed(seed=i)) for i, r in enumerate(requests(lm))]
    for request, events in zip(asked, run_all(BatchEngine(lm, SMALL), asked), strict=True):
        alone = lm.complete(request.prompt.ids, sampling=request.params)
        ours = reply_of(events)
        assert ours.token_ids == alone.token_ids
        for a, b in zip(ours.logprobs or (), alone.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert (ours.logprobs is None) == (params.logprobs is None)


def test_chats_are_split_and_cut_as_alone(scripted):
    lm = scripted("<|channel>thought\nhm\n<channel|>one two STOP three<turn|>")
    prompt = lm.encode([{"role": "user", "content": "Hi"}])
    lm.model.start = len(prompt.ids)
    engine = BatchEngine(lm, SMALL)
    params = lm.sampling.changed(stop=("STOP",))
    outcomes = run_all(engine, [Request(prompt=prompt, params=params)] * 3)
    for events in outcomes:
        reply = reply_of(events)
        assert (reply.thinking, reply.text) == ("hm", "one two ")
        assert reply.finish_reason == FinishReason.STOP
        assert isinstance(events, list)
        assert isinstance(events[-1], Finished)
    idle(engine)


def test_too_little_memory_preempts_and_changes_nothing(tokenizer):
    lm = random_lm("E4B", tokenizer)
    roomy = BatchEngine(lm, SMALL)
    params = GREEDY.changed(max_tokens=60)
    lengths = (60, 50, 40, 30, 20)
    expected = [reply_of(e).token_ids for e in run_all(roomy, requests(lm, params, lengths))]
    block = roomy._block_bytes
    tight = replace(
        SMALL, max_model_len=128, kv_bytes=40 * block[0] + roomy.plan.sliding_blocks * block[1]
    )
    engine = BatchEngine(lm, tight)
    found = [reply_of(e).token_ids for e in run_all(engine, requests(lm, params, lengths))]
    assert found == expected
    assert engine.stats().preemptions > 0
    idle(engine)


def test_aborted_requests_leave_no_block_and_disturb_nobody(tokenizer):
    lm = random_lm("12B", tokenizer)
    params = GREEDY.changed(max_tokens=20)
    expected = [
        reply_of(e).token_ids for e in run_all(BatchEngine(lm, SMALL), requests(lm, params))
    ]
    engine, draw = BatchEngine(lm, SMALL), random.Random(1)
    ids = [engine.add(request) for request in requests(lm, params) * 2]
    gone, events = set(), {id: [] for id in ids}
    while engine.busy:
        for id, outcome in engine.step():
            assert id not in gone
            assert isinstance(outcome, list)
            events[id] += outcome
        engine.check()
        if draw.random() < 0.3:
            id = draw.choice(ids[::2])
            if engine.abort(id):
                gone.add(id)
    assert gone
    assert engine.stats().aborted == len(gone)
    assert not engine.abort(ids[0])
    idle(engine)
    for i, id in enumerate(ids):
        if id not in gone:
            assert reply_of(events[id]).token_ids == expected[i % len(LENGTHS)]


def test_a_poisoned_request_fails_alone(tokenizer, monkeypatch):
    lm = random_lm("E2B", tokenizer)
    expected = [reply_of(e).token_ids for e in run_all(BatchEngine(lm, SMALL), requests(lm))]
    engine = BatchEngine(lm, SMALL)
    ids = [engine.add(request) for request in requests(lm)]
    poison = engine._jobs[ids[3]].text.ids[:8]
    forward = type(lm.model).forward

    def picky(self, input_ids_T, *args, **options):
        if set(poison) <= set(input_ids_T.tolist()):
            raise RuntimeError("boom")
        return forward(self, input_ids_T, *args, **options)

    monkeypatch.setattr(type(lm.model), "forward", picky)
    events, errors = {id: [] for id in ids}, {}
    while engine.busy:
        for id, outcome in engine.step():
            if isinstance(outcome, Exception):
                errors[id] = outcome
            else:
                events[id] += outcome
    assert list(errors) == [ids[3]]
    assert "the model failed on this request: RuntimeError('boom')" in str(errors[ids[3]])
    for i, id in enumerate(ids):
        if id not in errors:
            assert reply_of(events[id]).token_ids == expected[i]
    assert engine.stats().failed == 1
    idle(engine)


def test_logits_that_are_not_finite_fail_their_request_alone(tokenizer, monkeypatch):
    lm = random_lm("E2B", tokenizer)
    engine = BatchEngine(lm, SMALL)
    take = Reply.take

    def damaged(self, following):
        if len(self.prompt.ids) == 7:
            logits_V = following.logits_V * float("nan")
            following = Next(lm.model, following.logits_V[None], logits_V)
        return take(self, following)

    monkeypatch.setattr(Reply, "take", damaged)
    outcomes = run_all(engine, requests(lm))
    assert [isinstance(o, WeightsError) for o in outcomes] == [n == 7 for n in LENGTHS]
    idle(engine)


@pytest.mark.parametrize("size", ["E2B", "12B"])
def test_images_and_sound_in_chunks_beside_others_equal_each_alone(size, tokenizer):
    config = tiny_media_config(size, vocab_size=tokenizer.vocab_size)
    config = replace(config, **media_ids(tokenizer.special))
    lm = LM(
        random_model(config), tokenizer, config, kv="float32", towers=lambda: random_towers(config)
    )
    draw = np.random.default_rng(3)
    picture = draw.integers(0, 255, (120, 90, 3), dtype=np.uint8)
    sound = {"type": "audio", "audio": draw.normal(size=9000), "sample_rate": 16000}
    asked = []
    for i, text in enumerate(("What?", "Why, and what is behind it?", "Hm")):
        parts = [{"type": "image", "image": picture[i:], "budget": 70}, sound]
        content = [{"type": "text", "text": text}, *parts[: 1 + i % 2]]
        prompt = lm_encode(lm, tokenizer, content)
        asked.append(Request(prompt=prompt, params=GREEDY, chat=False))
    small = replace(SMALL, max_num_batched_tokens=96, max_model_len=400)
    engine = BatchEngine(lm, small)
    outcomes = run_all(engine, asked)
    for request, events in zip(asked, outcomes, strict=True):
        alone = collect(lm._start(request.prompt, GREEDY, chat=False))
        assert reply_of(events).token_ids == alone.token_ids
        assert reply_of(events).usage.image_tokens > 0
    idle(engine)


def lm_encode(lm: LM, tokenizer, content) -> Prompt:
    """A chat, for a model without end markers."""
    lm.is_chat = True
    return lm.encode([{"role": "user", "content": content}])


@needs_extension
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_decoding_low_bit_weights_together_gives_the_bits_of_each_alone(quant, tmp_path, tokenizer):
    config = whole_groups(tiny_config("E2B", vocab_size=tokenizer.vocab_size))
    save_model(random_model(config, dtype=torch.bfloat16), config, tmp_path)
    _, model = load_model(tmp_path, quant=quant)
    ids = prompts(config.text_config.vocab_size, (30, 12, 5))

    def run(count: int, first: int = 0) -> list[list[torch.Tensor]]:
        lm = LM(model, tokenizer, config, speculation="off")  # a row each in every step
        engine = BatchEngine(lm, replace(SMALL, max_num_batched_tokens=64))
        runner, seen = engine._runner, []
        plain = runner.run

        def noted(works):
            found = plain(works)
            seen.append([row.logits_V for rows in found for row in rows])
            return found

        runner.run = noted
        asked = [
            Request(prompt=Prompt(each), params=GREEDY.changed(ignore_eos=True), chat=False)
            for each in ids[first : first + count]
        ]
        run_all(engine, asked)
        return [list(column) for column in zip(*seen, strict=True)]

    together = run(3)
    for i in range(3):
        [alone] = run(1, i)
        for a, b in zip(together[i], alone, strict=True):
            assert torch.equal(a, b)


@needs_extension
def test_a_step_is_one_call_and_so_are_all_layers_where_that_cannot_be(
    tmp_path, tokenizer, monkeypatch
):
    config = whole_groups(tiny_config("E2B", vocab_size=tokenizer.vocab_size))
    save_model(random_model(config, dtype=torch.bfloat16), config, tmp_path)
    lm = LM(load_model(tmp_path, quant="int4")[1], tokenizer, config)
    calls: list[int] = []
    run, read = cpu_layers.run_layers, Decoder.read

    def counted(layers, places, tables, x_MD, ple_MLP):
        calls.append(len(layers))
        return run(layers, places, tables, x_MD, ple_MLP)

    def noted(self, ids, *args, **options):
        calls.append(len(lm.model.layers))
        return read(self, ids, *args, **options)

    monkeypatch.setattr(cpu_layers, "run_layers", counted)
    monkeypatch.setattr(Decoder, "read", noted)
    engine = BatchEngine(lm, replace(SMALL, max_num_batched_tokens=64))
    whole = run_all(engine, requests(lm))
    layers = len(config.text_config.layers)
    assert calls == [layers] * engine.stats().steps
    calls.clear()
    lm.model.native = None
    engine = BatchEngine(lm, replace(SMALL, max_num_batched_tokens=64))
    parts = run_all(engine, requests(lm))
    # Layers that own no K/V run apart in a step where not all rows ask.
    owners = sum(layer.owns_kv for layer in config.text_config.layers)
    assert set(calls) == {layers, owners, layers - owners}
    for one, other in zip(whole, parts, strict=True):
        assert reply_of(one).token_ids == reply_of(other).token_ids


def test_what_several_prompts_begin_with_is_computed_once(tokenizer):
    lm = random_lm("E2B", tokenizer)
    shared = [*prompts(lm.tokenizer.vocab_size, (40,))[0], lm.tokenizer.special.turn_close]
    ids = [[*shared, *end] for end in prompts(lm.tokenizer.vocab_size, (9, 5, 7))]
    # Nothing in common with them, and too little.
    ids += [shared[30:0:-1], [*shared[:3], *shared[30:0:-1]]]
    asked = [Request(prompt=Prompt(each), params=GREEDY, chat=False) for each in ids]
    engine = BatchEngine(lm, replace(SMALL, max_num_batched_tokens=64))
    told = [reply_of(events) for events in run_all(engine, asked)]
    cached = [reply.usage.cached_tokens for reply in told]
    assert cached == [0, 41, 41, 0, 0]
    assert engine.stats().prompt_tokens == sum(map(len, ids)) - sum(cached)
    for reply, request in zip(told, asked, strict=True):
        alone = collect(lm._start(request.prompt, request.params, chat=False))
        assert reply.token_ids == alone.token_ids
    # Another tenant's prompt waits for nobody and is told nothing.
    engine = BatchEngine(lm, replace(SMALL, max_num_batched_tokens=64))
    other = [replace(request, tenant=name) for request, name in zip(asked[:2], "ab", strict=True)]
    assert [reply_of(e).usage.cached_tokens for e in run_all(engine, other)] == [0, 0]
    idle(engine)


def test_the_queue_pushes_back_and_the_impossible_is_refused(tokenizer):
    lm = random_lm("E2B", tokenizer)
    engine = BatchEngine(lm, replace(SMALL, queue_limit=2))
    asked = requests(lm)
    engine.add(asked[0])
    engine.add(asked[1])
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        engine.add(asked[2])
    long = Request(prompt=Prompt([5] * 200))
    with pytest.raises(RequestError, match="the prompt has 200 tokens, but a sequence here holds"):
        engine.add(long)
    with pytest.raises(RequestError, match="token id -1"):
        engine.add(Request(prompt=Prompt([-1])))
    while engine.busy:
        engine.step()
    idle(engine)


def test_a_reply_ends_where_the_sequence_is_full(tokenizer):
    lm = random_lm("E2B", tokenizer)
    engine = BatchEngine(lm, replace(SMALL, max_model_len=50))
    request = Request(
        prompt=Prompt([5] * 40), params=SamplingParams(temperature=0, ignore_eos=True)
    )
    [events] = run_all(engine, [request])
    assert reply_of(events).finish_reason == FinishReason.LENGTH
    assert reply_of(events).usage.completion_tokens == 10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs 0: must be a whole number"),
        ({"kv_bytes": True}, ConfigError, "kv_bytes True: must be a whole number"),
        ({"max_model_len": 5000}, ConfigError, "max_model_len 5000: the model's context holds"),
        ({"max_model_len": 200, "kv_bytes": 99}, CapacityError, "K/V of 99 bytes cannot hold"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, error, message, tokenizer):
    with pytest.raises(error, match=message):
        BatchEngine(random_lm("E2B", tokenizer), EngineConfig(**options))


def test_a_plan_without_a_length_shrinks_to_the_memory_there_is(tokenizer):
    lm = random_lm("E2B", tokenizer)
    engine = BatchEngine(lm, EngineConfig(max_num_seqs=2, kv_bytes=1_000_000))
    assert engine.cache.nbytes == engine.plan.nbytes <= 1_000_000
    assert 64 <= engine.plan.max_model_len < 4096


def low_bit_lm(tokenizer, folder, quant: str = "int4", size: str = "E2B") -> LM:
    config = whole_groups(tiny_config(size, vocab_size=tokenizer.vocab_size))
    save_model(random_model(config, dtype=torch.bfloat16), config, folder)
    return LM(load_model(folder, quant=quant)[1], tokenizer, config)


def logits_of(engine: BatchEngine, request: Request) -> list[torch.Tensor]:
    """Those that each of its tokens was chosen from."""
    taken, take = [], Reply.take

    def noted(self, following):
        taken.append(following.logits_V.clone())
        return take(self, following)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reply, "take", noted)
        run_all(engine, [request])
    return taken


@needs_extension
@pytest.mark.parametrize("size", SIZES)
def test_a_prefix_hit_gives_the_bits_of_a_cold_run(size, tmp_path, tokenizer):
    lm = low_bit_lm(tokenizer, tmp_path, size=size)
    close = tokenizer.special.turn_close
    draw = random.Random(4)

    def turn(count: int) -> list[int]:
        return [*(draw.randrange(40, tokenizer.vocab_size) for _ in range(count)), close]

    warm = BatchEngine(lm, SMALL)
    params = GREEDY.changed(ignore_eos=True)
    first = [*turn(30), *turn(21)]
    [events] = run_all(warm, [Request(prompt=Prompt(first), params=params, chat=False)])
    reply = list(reply_of(events).token_ids)
    second = [*first, *reply, *turn(40)]
    # The next turn; a branch after the first message; the same again.
    branch = [*first[:31], *turn(20)]
    for ids, cached in ((second, len(first) + 8), (branch, 31), (second, len(second) - 1)):
        asked = Request(prompt=Prompt(ids), params=params, chat=False)
        cold = BatchEngine(lm, replace(SMALL, prefix_caching=False))
        before = warm.stats().cached_tokens
        for a, b in zip(logits_of(warm, asked), logits_of(cold, asked), strict=True):
            assert torch.equal(a, b)
        assert warm.stats().cached_tokens - before == cached
    assert warm.stats().prefix_hits == 3
    assert warm.stats().prefix_misses["new"] == 1
    idle(warm)


@pytest.mark.skipif(
    not bfloat16_rows_are_alone(), reason="the rows of a bfloat16 product depend on each other here"
)
@pytest.mark.parametrize("cached", [100, 128, 129, 300])  # before, at and beyond a whole window
def test_a_prefix_hit_gives_the_bits_of_a_cold_run_with_bfloat16_weights(cached):
    # The prefix is mostly a reply: computed a token at a time, and cold in one pass with the rest.
    # Trained weights, since another order of sums shows in few rows, and not in a tiny model.
    lm, decoded = LM.load("pocket"), 80
    text = lm.config.text_config
    assert (lm.model.embed_tokens.weight.dtype, text.sliding_window) == (torch.bfloat16, 128)
    config = replace(SMALL, max_num_batched_tokens=400, max_model_len=400)
    warm, cold = BatchEngine(lm, config), BatchEngine(lm, replace(config, prefix_caching=False))
    params = GREEDY.changed(ignore_eos=True, max_tokens=decoded + 1)
    [ids] = prompts(text.vocab_size, [cached - decoded])
    [events] = run_all(warm, [Request(prompt=Prompt(ids), params=params, chat=False)])
    ids = [*ids, *reply_of(events).token_ids, *prompts(text.vocab_size, [3])[0]]
    params = params.changed(max_tokens=3)
    asked = Request(prompt=Prompt(ids), params=params, chat=False)
    for a, b in zip(logits_of(warm, asked), logits_of(cold, asked), strict=True):
        assert torch.equal(a, b)
    assert warm.stats().cached_tokens == cached


@needs_extension
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_of_a_prompt_do_not_depend_on_its_chunks(size, tmp_path, tokenizer):
    lm = low_bit_lm(tokenizer, tmp_path, size=size)
    [asked] = requests(lm, GREEDY.changed(ignore_eos=True), (150,))
    runs = [
        logits_of(BatchEngine(lm, replace(SMALL, max_num_batched_tokens=budget)), asked)
        for budget in (160, 48, 7)
    ]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_tenants_share_nothing_and_no_caching_shares_nothing(tokenizer):
    lm = random_lm("E2B", tokenizer)
    engine = BatchEngine(lm, SMALL)
    [asked] = requests(lm, lengths=(60,))
    for tenant, cached in (("a", 0), ("b", 0), ("a", 59)):
        [events] = run_all(engine, [replace(asked, tenant=tenant)])
        assert reply_of(events).usage.cached_tokens == cached
    plain = BatchEngine(lm, replace(SMALL, prefix_caching=False))
    run_all(plain, [asked, asked])
    assert plain.stats().cached_tokens == plain.stats().checkpoints == 0
    assert plain.stats().kv_used_bytes == 0
    idle(engine)


def test_replies_held_to_a_grammar_are_those_of_each_alone(tokenizer):
    """Tokens that a grammar forces are read together, beside other sequences and in few steps."""
    special = tokenizer.special
    config = tiny_config("E2B", vocab_size=tokenizer.vocab_size)
    ends = [special.turn_close, special.tool_response_open]
    lm = LM(random_model(config), tokenizer, config, end_ids=ends, kv="float32")
    city = {"type": "string", "enum": ["Berlin", "Bern"]}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    parameters["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    params = GREEDY.changed(max_tokens=80)
    alone, asked = [], []
    for text in ("Hi", "What is the weather?", "Go on."):
        messages = [{"role": "user", "content": text}]
        held = {"tools": tools, "tool_choice": "required"}
        alone.append(lm.generate(messages, **held, sampling=params))
        prompt = lm.encode(messages, tools=tools)
        asked.append(Request(prompt=prompt, params=params, follow=lm.follow(**held)))
    engine = BatchEngine(lm, replace(SMALL, max_model_len=512))
    for outcome, expected in zip(run_all(engine, asked), alone, strict=True):
        assert reply_of(outcome).tool_calls
        assert reply_of(outcome).token_ids == expected.token_ids
    stats = engine.stats()
    assert stats.generated_tokens > 1.3 * 3 * stats.steps, "forced tokens take no steps"
    idle(engine)
