"""Replies held to schemas and formats: on random weights, on pocket, and on scripts that resist."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from benchmarks.grammar import wrong
from jsonschema import Draft202012Validator

from gemsmith.engine import grammar as held
from gemsmith.engine.engine import LM
from gemsmith.engine.grammar import Constraint, Grammar, Grammars, Vocabulary
from gemsmith.engine.reply import collect
from gemsmith.engine.request import FinishReason, SamplingParams
from gemsmith.errors import RequestError, ToolError
from gemsmith.testing import SIZES, random_model, random_tool, tiny_config
from gemsmith.text.calls import ToolCall
from gemsmith.text.stream import parse_output
from gemsmith.text.tokenizer import Tokenizer

OPEN, CLOSE, ANSWERED = "<|tool_call>", "<tool_call|>", "<|tool_response>"


def tool(name: str = "get", **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


GET = tool(a={"enum": ["x", "y"]})
USER = [{"role": "user", "content": "go"}]


@pytest.fixture(scope="module")
def pocket() -> LM:
    return LM.load("pocket")


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    """The vocabulary of Gemma 4, compiled where it can be."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "gemma4-tokenizer.gguf"
    path = Path(os.environ.get("GEMSMITH_GEMMA4_VOCAB", beside))
    if not path.is_file():
        pytest.skip("needs the Gemma 4 vocabulary: set GEMSMITH_GEMMA4_VOCAB to its .gguf file")
    return Tokenizer.load(path)


@pytest.fixture
def insisting(scripted: Callable[..., LM]) -> Callable[..., LM]:
    """An LM whose every next token is the first of `wants` that may come."""

    def make(*wants: int, **options: Any) -> LM:
        lm = scripted("", **options)
        row = torch.zeros(lm.tokenizer.vocab_size)
        row[list(wants)] = torch.arange(20.0, 20.0 - len(wants), -1)
        lm.model.logits = lambda hidden_RD: row.repeat(len(hidden_RD), 1)  # pyright: ignore
        return lm

    return make


# -- every call fits --------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_calls_of_random_weights_fit_their_schemas(size, tokenizer):
    config = tiny_config(size, vocab_size=tokenizer.vocab_size)
    special = tokenizer.special
    lm = LM(random_model(config), tokenizer, config, end_ids=[1, special.turn_close])
    calls = 0
    for seed in range(5, 10):
        declared = random_tool(Random(seed))
        made = lm.generate(
            USER, tools=[declared], tool_choice="required", seed=seed, max_tokens=120
        )
        assert not list(wrong(made, declared)), (seed, made)
        calls += len(made.tool_calls)
    assert calls


def test_calls_of_pocket_fit_their_schemas_at_any_temperature(pocket):
    calls = 0
    for seed in range(100, 108):
        declared = random_tool(Random(seed))
        options = {"temperature": 2.0, "seed": seed, "max_tokens": 120}
        made = pocket.generate(USER, tools=[declared], tool_choice="required", **options)
        assert not list(wrong(made, declared)), (seed, made)
        calls += len(made.tool_calls)
    assert calls >= 4


def test_a_stream_is_the_same_reply(pocket):
    options = {"temperature": 1.5, "seed": 5, "max_tokens": 60, "tools": [random_tool(Random(3))]}
    for choice in ("auto", "required"):
        whole = pocket.generate(USER, tool_choice=choice, **options)
        streamed = collect(pocket.stream(USER, tool_choice=choice, **options))
        assert (whole.token_ids, whole.tool_calls, whole.text) == (
            streamed.token_ids, streamed.tool_calls, streamed.text,
        )  # fmt: skip


def test_forced_tokens_read_in_one_pass_or_one_by_one_give_the_same_reply(pocket):
    for seed in range(4):
        asked = {"tools": [random_tool(Random(seed))], "tool_choice": "required"}
        asked |= {"temperature": 0, "max_tokens": 60}
        together = pocket.generate(USER, **asked)
        alone = pocket.generate(USER, logprobs=0, **asked)
        assert together.token_ids == alone.token_ids
        assert len(alone.logprobs) == len(alone.token_ids)


def test_a_forced_run_costs_one_pass(scripted):
    lm = scripted(f'{OPEN}call:get{{a:<|"|>y<|"|>}}{CLOSE}{ANSWERED}')
    made = lm.generate(USER, tools=[GET], tool_choice="required", parallel_tool_calls=False)
    assert made.tool_calls == (ToolCall("get", {"a": "y"}),)
    assert made.finish_reason is FinishReason.TOOL_CALLS
    # The whole head of the call, then the choice; the end is forced and never read.
    assert lm.model.passes[1:] == [len(lm.tokenizer.encode(f'{OPEN}call:get{{a:<|"|>'))]


# -- what may come ----------------------------------------------------------------------------


def test_a_reply_is_never_empty(insisting, tokenizer):
    special = tokenizer.special
    letter = tokenizer.token_id("b")
    ends = [special.turn_close, special.tool_response_open, special.eos]
    lm = insisting(*ends, special.tool_call_close, special.channel_close, letter)
    made = lm.generate(USER, tools=[GET], max_tokens=5)
    assert (made.text, made.finish_reason) == ("b", FinishReason.STOP)
    free = lm.generate(USER, tools=[GET], max_tokens=5, constrained=False)
    assert free.text == ""


def test_a_call_cannot_be_left_half_way(insisting, tokenizer):
    special = tokenizer.special
    ends = [special.turn_close, special.eos, special.tool_response_open]
    lm = insisting(special.tool_call_open, *ends)
    made = lm.generate(USER, tools=[GET], max_tokens=40, parallel_tool_calls=False)
    assert [call.name for call in made.tool_calls] == ["get"]
    assert not made.problems


def test_calls_go_on_in_parallel_unless_they_may_not(insisting, tokenizer):
    special = tokenizer.special
    lm = insisting(special.tool_call_open, special.tool_response_open)
    size = len(tokenizer.encode(f'{OPEN}call:get{{a:<|"|>x<|"|>}}{CLOSE}'))
    several = lm.generate(USER, tools=[GET], max_tokens=3 * size)
    assert len(several.tool_calls) == 3
    one = lm.generate(USER, tools=[GET], max_tokens=3 * size, parallel_tool_calls=False)
    assert len(one.tool_calls) == 1
    assert one.finish_reason is FinishReason.TOOL_CALLS


def test_no_call_comes_where_the_choice_is_none(insisting, tokenizer):
    special = tokenizer.special
    lm = insisting(special.tool_call_open, tokenizer.token_id("c"))
    made = lm.generate(USER, tools=[GET], tool_choice="none", max_tokens=3)
    assert (made.text, made.tool_calls, made.problems) == ("ccc", (), ())


def test_the_named_tool_is_called(insisting, tokenizer):
    lm = insisting(tokenizer.token_id("c"), tokenizer.special.tool_response_open)
    other = tool("put", b={"type": "null"})
    made = lm.generate(USER, tools=[GET, other], tool_choice="put", max_tokens=40)
    assert made.tool_calls == (ToolCall("put", {"b": None}),)


def test_a_required_call_comes_after_a_thought(scripted):
    said = "<|channel>thought\nhm<turn|>"
    lm = scripted(said + "x" * 200)
    made = lm.generate(
        USER, tools=[GET], tool_choice="required", enable_thinking=True,
        thinking_budget=6, max_tokens=60,
    )  # fmt: skip
    assert made.thinking.startswith("hm")
    assert [call.name for call in made.tool_calls[:1]] == ["get"]
    assert made.text == ""


@pytest.mark.parametrize("marker", [OPEN, CLOSE, "<turn|>", ANSWERED, "<|channel>"])
def test_a_marker_spelled_in_letters_cannot_come_about(scripted, marker):
    """Text that a prompt smuggled in would otherwise become a call, or end the reply."""
    lm = scripted("")
    letters = lm.tokenizer.encode_parts([(f"a{marker}call:get{{}}<tool_call|> b", False)])
    lm.model.script = [*letters, lm.tokenizer.special.turn_close]
    made = lm.generate(USER, tools=[GET], max_tokens=60)
    assert made.text.startswith("a" + marker[:-1])
    assert not made.text.startswith("a" + marker)
    assert (made.tool_calls, made.thinking) == ((), "")
    for name in ("tool_call", "turn", "channel"):
        assert f"<|{name}>" not in made.text
        assert f"<{name}|>" not in made.text


def test_a_schema_is_refused_before_anything_is_run(scripted):
    lm = scripted("abc<turn|>")
    unique = tool(a={"type": "array", "items": {"type": "string"}, "uniqueItems": True})
    with pytest.raises(ToolError, match=r"tool 'get', parameters.a: 'uniqueItems'"):
        lm.stream(USER, tools=[unique])
    assert lm.model.passes == []
    unique["function"]["strict"] = False
    assert lm.generate(USER, tools=[unique]).text == "abc"


def test_a_form_cannot_be_asked_for_without_a_constraint(scripted):
    with pytest.raises(RequestError, match="constrained=False leaves the reply to the model, but"):
        scripted("a").generate(USER, tools=[GET], tool_choice="required", constrained=False)


# -- answers of a form ------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "maximum": 99, "minimum": 0},
        "s": {"enum": ["p", "q"]},
    },
    "required": ["n", "s"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "json_schema": {"name": "r", "schema": SCHEMA}}


@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_fits_its_schema_and_its_thought_is_free(pocket, thinking):
    for seed in range(2):
        made = pocket.generate(
            "How many?", response_format=JSON, enable_thinking=thinking, temperature=1.0,
            seed=seed, max_tokens=100, thinking_budget=20,
        )  # fmt: skip
        if made.finish_reason is FinishReason.STOP:
            Draft202012Validator(SCHEMA).validate(json.loads(made.text))
        assert made.text.startswith("{")
        assert not made.thinking or thinking


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "regex", "pattern": "^(yes|no), [a-d]{3}$"}, "(yes|no), [a-d]{3}"),
        ({"type": "lark", "grammar": 'start: "<" N ">"\nN: /[0-9]{2}/'}, "<[0-9]{2}>"),
        ({"type": "json_schema", "schema": {"const": [1, "a"]}}, r"\[\s*1\s*,\s*\"a\"\s*\]"),
    ],
)
def test_an_answer_keeps_its_form(pocket, form, pattern):
    made = pocket.generate("Say it.", response_format=form, temperature=1.5, seed=1, max_tokens=200)
    assert re.fullmatch(pattern, made.text), made.text
    assert made.finish_reason is FinishReason.STOP


def test_an_answer_of_a_form_or_a_call(insisting, tokenizer):
    special = tokenizer.special
    form = {"type": "regex", "pattern": "^abc$"}
    caller = insisting(special.tool_call_open, special.tool_response_open)
    assert caller.generate(USER, tools=[GET], response_format=form, max_tokens=40).tool_calls
    teller = insisting(*map(tokenizer.token_id, "abc"), special.turn_close)
    made = teller.generate(USER, tools=[GET], response_format=form, max_tokens=40)
    assert (made.text, made.tool_calls) == ("abc", ())


def test_a_form_that_demands_a_marker_is_an_error_not_a_hang(pocket):
    form = {"type": "regex", "pattern": "^x<turn[|]>[ab]$"}
    with pytest.raises(RequestError, match="can only go on with a marker of the chat format"):
        pocket.generate("Say it.", response_format=form, temperature=0, max_tokens=50)


def test_a_base_model_keeps_a_form_too(tokenizer):
    config = tiny_config("E4B", vocab_size=tokenizer.vocab_size)
    lm = LM(random_model(config), tokenizer, config)
    assert not lm.is_chat
    form = {"type": "regex", "pattern": "^[a-c]{4}$"}
    assert re.fullmatch("[a-c]{4}", lm.generate("go", response_format=form, max_tokens=9).text)


# -- the parts --------------------------------------------------------------------------------


def constraint(tokenizer: Tokenizer, **asked: Any) -> Constraint:
    special = tokenizer.special
    ends = [id for id in (special.eos, special.turn_close) if id is not None]
    made = Grammar(tokenizer, **asked)
    return Constraint(made, vocab_size=tokenizer.vocab_size + 3, end_ids=ends)


def test_the_mask_says_what_apply_does(tokenizer):
    random = Random(1)
    for asked in ({"tools": [GET]}, {"tools": [GET], "tool_choice": "required"}):
        followed = constraint(tokenizer, **asked)
        for _ in range(40):
            logits_V = torch.zeros(tokenizer.vocab_size + 3)
            allowed_V = followed.apply(logits_V).isfinite()
            mask_V = followed.allowed_mask()
            assert mask_V is None or torch.equal(mask_V, allowed_V)
            ids = allowed_V.nonzero().flatten().tolist()
            few = followed.allowed_ids(200)
            assert few == (ids if len(ids) <= 200 else None)
            forced = followed.forced()
            if forced:
                assert allowed_V.nonzero().flatten().tolist() == forced[:1]
            ids = allowed_V[: tokenizer.vocab_size].nonzero().flatten().tolist()
            followed.accept(forced[0] if forced else random.choice(ids))


def test_a_string_holds_letters_and_bytes_and_no_marker_but_its_end(tokenizer):
    followed = constraint(tokenizer, tools=[tool(a={"type": "string"})], tool_choice="required")
    while forced := followed.forced():
        followed.accept(forced[0])
    mask_V = followed.allowed_mask()
    assert mask_V is not None
    special = tokenizer.special
    markers = set(tokenizer.special_ids())
    assert {id for id in markers if mask_V[id]} == {special.quote}
    allowed = {
        tokenizer.piece(id) for id in mask_V[: tokenizer.vocab_size].nonzero().flatten().tolist()
    }
    # Bytes that begin a character of UTF-8 may come, those that only go on with one may not.
    assert allowed & {b"\xc3", b"\xa9", b"\xff"} == {b"\xc3"}
    assert not mask_V[tokenizer.vocab_size :].any()
    followed.accept(tokenizer.token_id("<0xC3>"))
    inside = followed.allowed_mask()
    assert inside is not None
    assert not inside[special.quote]


def test_calls_of_the_real_vocabulary_fit_and_are_spelled_as_it_spells_them(real):
    """Its model would have to be 262,144 tokens wide; here chance chooses among what may come."""
    special = real.special
    ends = [special.eos, special.turn_close, special.tool_response_open]
    for seed in range(6):
        random, declared = Random(seed), random_tool(Random(seed), depth=2)
        asked = Grammar(real, tools=[declared], tool_choice="required", parallel_tool_calls=False)
        followed = Constraint(asked, vocab_size=real.vocab_size, end_ids=ends)
        head = real.encode(f"{OPEN}call:use_it{{")
        ids: list[int] = []
        while len(ids) < 200 and ids[-1:] != [special.tool_response_open]:
            forced = followed.forced()
            if not forced:
                mask_V = followed.allowed_mask()
                assert mask_V is not None
                may = mask_V.nonzero().flatten().tolist()
                quotes = [special.quote] * bool(mask_V[special.quote])
                forced = [random.choice(quotes if quotes and random.random() < 0.5 else may)]
            followed.accept(forced[0])
            ids.append(forced[0])
        assert ids[: len(head) - 1] == head[:-1]
        found = parse_output(real.decode(ids))
        if ids[-1] == special.tool_response_open:
            assert {problem.kind for problem in found.problems} <= {"duplicate_key"}
            schema = Draft202012Validator(declared["function"]["parameters"])
            schema.validate(found.calls[0].arguments)


def test_a_wrong_token_is_an_error(tokenizer):
    followed = constraint(tokenizer, tools=[GET], tool_choice="required")
    followed.accept(tokenizer.special.tool_call_open)
    with pytest.raises(RequestError, match="token 3 cannot be followed in the grammar"):
        followed.accept(3)


def test_the_same_request_compiles_once(tokenizer, monkeypatch):
    kept = Grammars(tokenizer)
    first = kept.get(tools=[GET])
    assert first is not None
    assert kept.get(tools=[GET]) is first
    assert kept.get(tools=[GET], tool_choice="required") is not first
    assert kept.get(tools=None) is None
    assert kept.get(tools=None, response_format={"type": "text"}) is None
    assert Vocabulary.of(tokenizer) is first.vocabulary
    monkeypatch.setattr(held, "KEPT", 1)
    kept.get(tools=[GET], tool_choice="none")
    assert kept.get(tools=[GET]) is not first


def test_masks_computed_beside_the_model_are_the_same(tokenizer, monkeypatch):
    asked = {"tools": [random_tool(Random(7))], "tool_choice": "required"}
    here, there = constraint(tokenizer, **asked), constraint(tokenizer, **asked)
    random = Random(2)
    for _ in range(60):
        monkeypatch.setattr(held, "THREADED", 1)
        monkeypatch.setattr(held.os, "cpu_count", lambda: 2)
        there.prepare()
        monkeypatch.setattr(held, "THREADED", 10**9)
        here.prepare()
        one, other = here.allowed_mask(), there.allowed_mask()
        if one is None or other is None:
            assert one is other
            break
        assert torch.equal(one, other)
        ids = one.nonzero().flatten().tolist()
        token = random.choice(ids)
        here.accept(token)
        there.accept(token)


def test_a_vocabulary_without_markers_takes_no_tools(tokenizer):
    bare = Tokenizer(tokenizer._core)
    bare.special = replace(bare.special, quote=None)
    with pytest.raises(ToolError, match="this checkpoint's vocabulary has no tool call markers"):
        Grammar(bare, tools=[GET])


def test_a_penalty_does_not_reach_over_the_grammar(scripted):
    lm = scripted("x" * 99)
    params = SamplingParams(temperature=0, repetition_penalty=100.0, max_tokens=60)
    made = lm.generate(USER, tools=[GET], tool_choice="required", sampling=params)
    assert [call.name for call in made.tool_calls[:1]] == ["get"]
