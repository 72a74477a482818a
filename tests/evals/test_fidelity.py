"""Which positions and calls of two builds are compared, and what is refused."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from benchmarks import random_checkpoint
from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.errors import GemsmithError, RequestError, WeightsError
from gemsmith.evals import fidelity
from gemsmith.evals.cases import Case, pocket_cases
from gemsmith.evals.divergence import Positions
from gemsmith.evals.fidelity import (
    Answer,
    Gate,
    Outcome,
    Pairs,
    Report,
    check_builds,
    compare,
    is_valid,
)
from gemsmith.evals.scoring import Reply
from gemsmith.text.calls import Problem, ToolCall

ASK = [{"role": "user", "content": "How much?"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sine",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "sine", "arguments": {"x": 1}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Checkpoints of noise, by size and seed."""
    base = tmp_path_factory.mktemp("builds")

    def make(size: str = "tiny-E2B", seed: int = 0) -> str:
        config = random_checkpoint.config_of(size)
        return str(random_checkpoint.write(config, base / f"{size}-{seed}", seed=seed))

    return make


@pytest.fixture
def builds(folder: Callable[..., str]) -> tuple[LM, LM]:
    """A reference, and a build whose embedding is a little off."""
    a, b = (LM.load(folder(), dtype="float32") for _ in range(2))
    weight = b.model.embed_tokens.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight += 0.002 * noise
    return a, b


def case(**changes: Any) -> Case:
    return Case(**{"where": "item 1", "category": "talk", "messages": ASK, **changes})


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def cross_entropy(lm: LM, ids: list[int], start: int) -> float:
    """Mean over ids[start:], worked out from all logits at once."""
    logits = lm.logits(ids[:-1])[:, : lm.tokenizer.vocab_size]
    return float(torch.nn.functional.cross_entropy(logits[start - 1 :], torch.tensor(ids[start:])))


# -- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [1024, 5 * 1024, 1 << 22])
def test_a_given_reply_is_followed_up_to_the_end_of_its_turn(
    builds: tuple[LM, LM], monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    monkeypatch.setattr(fidelity, "BLOCK_VALUES", values)
    a, b = builds
    prompt = a.encode(ASK).ids
    ids = [*prompt, *a.tokenizer.encode("Seven.<turn|>")]
    report = compare(a, b, [case(reply=said("Seven."))])
    replies, prompts = report.replies(), report.prompts()
    assert replies is not None
    assert prompts is not None
    assert replies.positions == len(ids) - len(prompt) == len("Seven.") + 1
    assert prompts.positions == len(prompt) - 1
    wanted = [math.exp(cross_entropy(lm, ids, len(prompt))) for lm in (a, b)]
    assert [replies.perplexity_p, replies.perplexity_q] == pytest.approx(wanted, rel=1e-4)
    assert replies.kl.value > 0
    assert report.to_dict()["followed"] == {"given": 1, "reference_greedy": 0}


def test_without_a_reply_the_reference_s_own_is_followed(
    builds: tuple[LM, LM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "MAX_TOKENS", 12)
    a, b = builds
    own = a.generate(ASK, temperature=0, max_tokens=12).token_ids
    report = compare(a, b, [case()])
    replies = report.replies()
    assert replies is not None
    assert replies.positions == len(own)
    ids = [*a.encode(ASK).ids, *own]
    wanted = math.exp(cross_entropy(b, ids, len(ids) - len(own)))
    assert replies.perplexity_q == pytest.approx(wanted, rel=1e-4)
    assert report.tools() is None
    assert report.to_dict()["followed"] == {"given": 0, "reference_greedy": 1}


def reply_ids(lm: LM, **changes: Any) -> str:
    """The reply followed, as text with its markers."""
    _, reply = fidelity._prompts(lm, lm, case(**changes))
    assert reply is not None
    return lm.tokenizer.decode(reply)


@pytest.mark.parametrize("size", ["tiny-E2B", "tiny-31B"])
def test_replies_of_every_kind_are_what_the_model_would_write(
    folder: Callable[..., str], size: str
) -> None:
    lm = LM.load(folder(size))
    assert reply_ids(lm, reply=said("Seven.")) == "Seven.<turn|>"
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    written = "<|tool_call>call:sine{x:1}<tool_call|><|tool_response>"
    assert reply_ids(lm, tools=[TOOL], reply=calling) == written
    after = [*ASK, {**calling, "tool_calls": [{**CALL, "id": "1"}]},
             {"role": "tool", "tool_call_id": "1", "content": "0.84"}]  # fmt: skip
    assert reply_ids(lm, messages=after, tools=[TOOL], reply=said("0.84")) == "0.84<turn|>"
    thinking = {**said("Seven."), "reasoning": "3 + 4"}
    shown = reply_ids(lm, enable_thinking=True, reply=thinking)
    assert shown == "<|channel>thought\n3 + 4\n<channel|>Seven.<turn|>"


def test_tokens_of_pictures_are_no_positions() -> None:
    def scan(prompt: Prompt, *, block: int) -> Any:
        assert prompt.ids == [5, 9, 9, 6, 7]
        return iter([torch.zeros(3, 10), torch.zeros(2, 10)])

    lm = cast(LM, SimpleNamespace(scan=scan, tokenizer=SimpleNamespace(vocab_size=10)))
    prompt = Prompt([5, 9, 9, 6], [cast(Any, SimpleNamespace(start=1, stop=3))])
    found, is_reply, counts = fidelity._positions(lm, lm, prompt, [7, 8], case())
    assert len(found) == 5
    assert is_reply.tolist() == [False, False, False, True, True]
    assert counts.tolist() == [False, False, True, True, True]


def test_a_build_of_itself_is_faithful_in_every_figure(
    folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "MAX_TOKENS", 8)
    a, b = LM.load(folder()), LM.load(folder())
    report = compare(a, b, [case(), case(tools=[TOOL], category="tools", reply=said("No."))])
    assert report.complete
    assert report.categories == ["talk", "tools"]
    for found in (report.replies(), report.prompts(), report.replies("tools")):
        assert found is not None
        assert found.identical
        assert (found.kl.value, found.top1, found.in_top, found.ratio) == (0, 1, 1, 1)
    tools = report.tools()
    assert tools is not None
    assert (tools.same, tools.valid.points, tools.valid.p_value) == (1, 0, 1)
    assert report.tools("talk") is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_damaged_build_is_named_with_the_conversation(builds: tuple[LM, LM]) -> None:
    a, b = builds
    with torch.no_grad():
        b.model.norm.weight[3] = math.nan
    with pytest.raises(WeightsError, match=r"item 1 .*the build under test gives logits that"):
        compare(a, b, [case(reply=said("Seven."))])


def test_ctrl_c_leaves_what_was_compared(builds: tuple[LM, LM]) -> None:
    seen: list[Outcome] = []

    def interrupt(outcome: Outcome) -> None:
        seen.append(outcome)
        if len(seen) == 2:
            raise KeyboardInterrupt

    report = compare(*builds, [case(reply=said("Seven."))] * 3, on_case=interrupt)
    assert not report.complete
    assert len(report.outcomes) == 2
    assert report.to_dict()["complete"] is False


# -- tool calls -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "due", "valid"),
    [
        (Reply(calls=(("sine", {"x": 1}),)), True, True),
        (Reply(calls=(("sine", {"x": 1}), ("sine", {"x": 2.5}))), True, True),
        (Reply(calls=(("sine", {"x": 1}),)), False, True),
        (Reply(calls=(("sine", {"x": 1}), ("sine", {}))), True, False),
        (Reply(calls=(("sine", {"x": "1"}),)), True, False),
        (Reply(calls=(("sine", {"x": 1, "y": 2}),)), True, False),
        (Reply(calls=(("cosine", {"x": 1}),)), True, False),
        (Reply(calls=(("sine", {"x": 1}),), problems=("truncated: cut",)), True, False),
        (Reply(text="0.84"), True, False),
        (Reply(text="0.84"), False, True),
    ],
)
def test_a_reply_is_valid_if_all_its_calls_fit_and_one_is_there_where_due(
    reply: Reply, due: bool, valid: bool
) -> None:
    assert is_valid(reply, [TOOL], due) is valid


def answering(lm: LM, *calls: ToolCall, problems: tuple[Problem, ...] = ()) -> LM:
    """The same model, whose replies are given: their token ids say which build it is."""

    def generate(messages: Any, **options: Any) -> Any:
        assert options["temperature"] == 0
        return SimpleNamespace(
            text="", tool_calls=calls, problems=problems, finish_reason="stop",
            token_ids=(len(calls) + 3, 106),
        )  # fmt: skip

    lm.generate = generate  # pyright: ignore[reportAttributeAccessIssue]
    return lm


def test_a_call_is_due_where_one_is_expected_or_else_where_the_reference_makes_one(
    builds: tuple[LM, LM],
) -> None:
    a, b = builds
    calls = {"type": "calls", "calls": [{"name": "sine", "arguments": {"x": 1}}]}
    none = {"type": "no_tool", "value": "No."}
    answering(a, ToolCall("sine", {"x": 1}))
    answering(b)
    asked = [
        case(tools=[TOOL], category="unsaid"),
        case(tools=[TOOL], category="calls", expected=calls),
        case(tools=[TOOL], category="none", expected=none),
    ]
    report = compare(a, b, asked)
    found = {c: report.tools(c) for c in report.categories}
    assert {c: s and s.valid for c, s in found.items()} == {
        "unsaid": Pairs(1, 1, 0, 1, 0),
        "calls": Pairs(1, 1, 0, 1, 0),
        "none": Pairs(1, 1, 1, 0, 0),
    }
    assert found["unsaid"] is not None
    assert found["unsaid"].right == Pairs(0, 0, 0, 0, 0)
    assert found["calls"] is not None
    assert found["calls"].right == Pairs(1, 1, 0, 1, 0)
    whole = report.tools()
    assert whole is not None
    assert (whole.valid.points, whole.right.count, whole.same) == (pytest.approx(-200 / 3), 2, 0)
    # Turned round nothing is due in the first: A says nothing, so B may.
    turned = compare(b, a, asked).tools("unsaid")
    assert turned is not None
    assert turned.valid == Pairs(1, 1, 1, 0, 0)


def test_what_was_lost_and_gained_is_counted_in_pairs() -> None:
    both, lost, gained, neither = (True, True), (True, False), (False, True), (False, False)
    pairs = Pairs.of([both] * 4 + [lost] * 5 + [gained] + [neither] * 2)
    assert pairs == Pairs(12, 9, 5, 5, 1)
    assert pairs.points == pytest.approx(-100 / 3)
    # 2 * (C(6, 0) + C(6, 1)) / 2^6
    assert pairs.p_value == 14 / 64
    assert Pairs.of([]).points == 0
    assert Pairs.of([both]).p_value == Pairs.of([lost, gained]).p_value == 1


# -- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "item 1: no messages"),
        ({"messages": [{"role": "king", "content": ""}]}, "item 1: message 0 has the unknown role"),
        (
            {"messages": [{"role": "user", "content": "x" * 5000}]},
            r"item 1: 50\d\d tokens with the reply, but the context of .* holds 4096",
        ),
        (
            {"reply": said("x" * 4090)},
            r"item 1: 41\d\d tokens with the reply, but the context of .* holds 4096",
        ),
        ({"messages": [*ASK, said("a")], "reply": said("b")}, "item 1: its reply cannot follow"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(
    builds: tuple[LM, LM], changes: dict[str, Any], message: str
) -> None:
    def never(outcome: Outcome) -> None:
        raise AssertionError("a conversation was run")

    cases = [case(where="item 0", reply=said("ok")), case(**changes)]
    with pytest.raises(RequestError, match=message):
        compare(*builds, cases, on_case=never)


# -- builds -----------------------------------------------------------------------------------


def vocabulary(*tokens: str) -> Any:
    return SimpleNamespace(vocab_size=len(tokens), token=lambda id: tokens[id])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (vocabulary("a", "b", "c"), r"one and two have different vocabularies \(2 and 3 tokens\)"),
        (vocabulary("a", "x"), r"different vocabularies \(token 1 is 'b' and 'x'\)"),
    ],
)
def test_other_vocabularies_are_refused(other: Any, message: str) -> None:
    a = SimpleNamespace(name="one", tokenizer=vocabulary("a", "b"), is_chat=True)
    b = SimpleNamespace(name="two", tokenizer=other, is_chat=True)
    check_builds(cast(LM, a), cast(LM, a))
    with pytest.raises(RequestError, match=message):
        check_builds(cast(LM, a), cast(LM, b))


def test_base_models_are_refused() -> None:
    a = SimpleNamespace(name="one", tokenizer=vocabulary("a"), is_chat=True)
    b = SimpleNamespace(name="two", tokenizer=vocabulary("a"), is_chat=False)
    with pytest.raises(RequestError, match="two is a base model, and fidelity compares replies"):
        check_builds(cast(LM, a), cast(LM, b))


def test_other_vocabularies_than_pocket_s_need_data(folder: Callable[..., str]) -> None:
    lm = LM.load(folder())
    with pytest.raises(RequestError, match=r"another vocabulary than pocket.* give --data FILE"):
        pocket_cases(lm, lm)


def test_pocket_beside_itself_in_float32_differs_by_rounding_alone() -> None:
    a, b = LM.load("pocket"), LM.load("pocket", dtype="float32")
    short = ("no_tool", "direct_arithmetic")
    cases = [c for c in pocket_cases(a, b, limit=1) if c.category in short]
    assert len(cases) == 2
    report = compare(a, b, cases)
    replies, tools = report.replies(), report.tools()
    assert replies is not None
    assert tools is not None
    assert 0 < replies.kl.value < 1e-3
    assert replies.top1 == 1
    assert (tools.valid.count, tools.right.count) == (1, 1)


# -- the gate ---------------------------------------------------------------------------------


def report_of(same: int, count: int, kl: float, lost: int = 0, asked: int = 0) -> Report:
    agree = np.arange(count) < same
    zeros = np.zeros(count)
    found = Positions(np.full(count, kl), agree, agree, zeros, zeros)
    good, bad = Answer((1,), True, None), Answer((2,), False, None)
    outcomes = [Outcome("talk", found, found.only(agree & ~agree), None, False)]
    nothing = found.only(agree & ~agree)
    outcomes += [
        Outcome("tools", nothing, nothing, (good, bad if n < lost else good), False)
        for n in range(asked)
    ]
    return Report("A", "B", "talks", outcomes, complete=True)


@pytest.mark.parametrize(
    ("report", "broken"),
    [
        (report_of(57, 100, 0.01, 1, 100), []),
        (report_of(569, 1000, 0.01), ["top-1 agreement 56.90 % < --min-top1 57"]),
        (report_of(56_999, 100_000, 0.0), ["top-1 agreement 56.99 % < --min-top1 57"]),
        (report_of(100, 100, 0.0101), ["mean KL 0.0101 > --max-kl 0.01"]),
        (
            report_of(100, 100, 0, 2, 100),
            ["tool-call validity lost 2.00 points > --max-validity-loss 1"],
        ),
    ],
)
def test_the_gate_names_each_bound_that_is_broken(report: Report, broken: list[str]) -> None:
    assert Gate(57, 0.01, 1).broken(report) == broken
    assert Gate().broken(report) == []


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_top1": 101.0}, "--min-top1 101: must be a number from 0 to 100"),
        ({"max_kl": -1.0}, "--max-kl -1: must be a number of at least 0"),
        ({"max_kl": math.nan}, "--max-kl nan: must be"),
        ({"max_validity_loss": -0.5}, "--max-validity-loss -0.5: must be a number from 0 to 100"),
    ],
)
def test_bounds_without_sense_are_refused(bounds: dict[str, float], message: str) -> None:
    with pytest.raises(GemsmithError, match=message):
        Gate(**bounds)


def test_a_bound_on_calls_needs_tools() -> None:
    with pytest.raises(RequestError, match="none of the conversations declares tools"):
        Gate(max_validity_loss=1).check([case()])
    Gate(max_validity_loss=1).check([case(), case(tools=[TOOL])])
    Gate(max_kl=1).check([case()])
