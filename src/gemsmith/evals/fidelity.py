"""How faithful a build of a model is to another: B, of few bits say, beside the reference A.

Two questions, asked of the same conversations (cases.py):

Would B go on as A does? Both read the same tokens and their next-token distributions are compared
(divergence.py), at two kinds of positions that are never mixed:
  reply    what the model itself writes: from the generation prompt to the token that ends its turn.
           The headline. The reply is the one that the conversation comes with; if it has none, A's
           own greedy one, so that top-1 agreement says how often B, from the same history, takes
           A's next step.
  prompt   what users, tools and the format write. No model has to produce it, much of it cannot be
           foreseen (names, numbers), and where a distribution is flat its largest entry changes
           hands easily: agreement is far lower and says little about replies. But it covers more
           text and none of it is A's own, so it is reported beside.
Tokens that stand for pictures and sounds, and what comes after the end of the turn, are no
positions. The forward pass is that of prompts; the calls below are decoded token by token.

Do B's tool calls still work? Both answer, greedily, the conversations that declare tools. A reply
is valid if whatever looks like a call can be read, names a declared tool and fits its schema, and
there is a call where one is due: where the conversation expects calls or, if it does not say, where
A makes one. It is right if scoring.py says so, where it is known what to expect. Conversations are
counted in pairs: what B lost and what it gained. The sign test (McNemar's, exact) says whether that
is more than chance.

Not a judgement of A: a build can be faithful to a bad model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gemsmith.engine.engine import LM
from gemsmith.engine.media import Prompt
from gemsmith.engine.request import Generation
from gemsmith.errors import GemsmithError, RequestError, WeightsError
from gemsmith.evals.cases import Case, difference
from gemsmith.evals.divergence import Divergence, Positions, at_positions
from gemsmith.evals.items import Item
from gemsmith.evals.pocket import greedy, reply_of
from gemsmith.evals.scoring import MAX_TOKENS, Reply, judge
from gemsmith.text.calls import ToolCall
from gemsmith.text.chat import THOUGHT_CLOSE, THOUGHT_OPEN
from gemsmith.text.tools import validate_arguments

BLOCK_VALUES = 1 << 22
"""Logits of one build in memory at a time: 16 positions of the released vocabulary, 64 MiB with
what is computed of them; all of a usual prompt of pocket's."""
ROUNDING = 1e-9
"""By as much a figure may miss a bound that it meets: 100 times 0.57 is a little less than 57."""


# -- whether two builds can be compared -------------------------------------------------------


def check_builds(a: LM, b: LM) -> None:
    """Refuse builds of different vocabularies, and models that know no chat.

    Raises:
      RequestError: with the first token that differs.
    """
    different = difference(a.tokenizer, b.tokenizer)
    if different is not None:
        raise RequestError(
            f"{a.name} and {b.name} have different vocabularies ({different}); fidelity compares "
            "builds of one model, token by token"
        )
    for lm in (a, b):
        if not lm.is_chat:
            raise RequestError(
                f"{lm.name} is a base model, and fidelity compares replies in a chat; give builds "
                "of the instruction-tuned checkpoint (its name ends in -it)"
            )


# -- comparing --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What one build made of a conversation with tools."""

    ids: tuple[int, ...]
    valid: bool
    right: bool | None
    """None where it is not known what is right."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One conversation, compared."""

    category: str
    reply: Positions
    prompt: Positions
    answers: tuple[Answer, Answer] | None
    """Of A and of B; None where no tools are declared."""
    greedy: bool
    """The reply followed was A's own."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """How often something holds of A's answers and of B's, to the same `count` conversations."""

    count: int
    a: int
    b: int
    lost: int
    """Of A's and not of B's."""
    gained: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool]]) -> "Pairs":
        pairs = list(pairs)
        return cls(
            len(pairs),
            sum(a for a, _ in pairs),
            sum(b for _, b in pairs),
            sum(a and not b for a, b in pairs),
            sum(b and not a for a, b in pairs),
        )

    @property
    def points(self) -> float:
        """Change from A to B in percentage points; 0 where nothing was counted."""
        return 100 * (self.b - self.a) / self.count if self.count else 0.0

    @property
    def p_value(self) -> float:
        """That chance alone changes as many, or more unevenly, if either way is equally likely."""
        changed = self.lost + self.gained
        tail = sum(math.comb(changed, k) for k in range(min(self.lost, self.gained) + 1))
        return min(1.0, 2 * tail / 2**changed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "reference": self.a,
            "build": self.b,
            "points": self.points,
            "lost": self.lost,
            "gained": self.gained,
            "p_value": self.p_value,
        }


@dataclass(frozen=True, slots=True)
class ToolScore:
    """Tool calls of one category."""

    valid: Pairs
    right: Pairs
    """Of the conversations of which it is known what is right."""
    same: int
    """Replies that are the same, token by token."""

    @classmethod
    def of(cls, answers: Iterable[tuple[Answer, Answer]]) -> "ToolScore":
        answers = list(answers)
        known = [(a.right, b.right) for a, b in answers if a.right is not None]
        return cls(
            Pairs.of((a.valid, b.valid) for a, b in answers),
            Pairs.of((bool(a), bool(b)) for a, b in known),
            sum(a.ids == b.ids for a, b in answers),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "valid": self.valid.to_dict(),
            "right": self.right.to_dict(),
            "same_reply": self.same,
        }


@dataclass(slots=True)
class Report:
    """Outcomes so far; `complete` is False after Ctrl-C."""

    reference: str
    build: str
    data: str
    outcomes: list[Outcome] = field(default_factory=list)
    complete: bool = False

    @property
    def categories(self) -> list[str]:
        return sorted({outcome.category for outcome in self.outcomes})

    def replies(self, category: str | None = None) -> Divergence | None:
        """Over reply positions, of a category or of all; None where there are none."""
        return Divergence.of(outcome.reply for outcome in self._of(category))

    def prompts(self, category: str | None = None) -> Divergence | None:
        """Over prompt positions."""
        return Divergence.of(outcome.prompt for outcome in self._of(category))

    def tools(self, category: str | None = None) -> ToolScore | None:
        """Over conversations that declare tools."""
        answers = [o.answers for o in self._of(category) if o.answers is not None]
        return ToolScore.of(answers) if answers else None

    def _of(self, category: str | None) -> list[Outcome]:
        return [o for o in self.outcomes if category is None or o.category == category]

    def to_dict(self) -> dict[str, Any]:
        """For programs: shares of 1, nats, unrounded."""
        parts: dict[str, Any] = {}
        for name, score in (
            ("replies", self.replies),
            ("prompts", self.prompts),
            ("tools", self.tools),
        ):
            whole = score()
            by_category = {category: score(category) for category in self.categories}
            parts[name] = whole and {
                "all": whole.to_dict(),
                "categories": {c: s.to_dict() for c, s in by_category.items() if s is not None},
            }
        greedy = sum(outcome.greedy for outcome in self.outcomes)
        return {
            "name": "fidelity",
            "reference": self.reference,
            "build": self.build,
            "data": self.data,
            "complete": self.complete,
            "conversations": len(self.outcomes),
            "followed": {"given": len(self.outcomes) - greedy, "reference_greedy": greedy},
            **parts,
        }


def compare(
    a: LM,
    b: LM,
    cases: Sequence[Case],
    *,
    data: str = "",
    on_case: Callable[[Outcome], None] | None = None,
) -> Report:
    """Compare build b with reference a on every case. Ctrl-C ends it; the report says so.

    All prompts are made before the first is run, so that bad data is found at once.

    Raises:
      RequestError: the builds cannot be compared (`check_builds`), or a case cannot be asked: it
        is malformed, or longer than the context; names the case.
      WeightsError: a build gives logits that are no numbers.
    """
    check_builds(a, b)
    for case in cases:
        _prompts(a, b, case)
    report = Report(a.name, b.name, data)
    try:
        for case in cases:
            outcome = _compare(a, b, case)
            report.outcomes.append(outcome)
            if on_case:
                on_case(outcome)
        report.complete = True
    except KeyboardInterrupt:
        pass
    return report


def _prompts(a: LM, b: LM, case: Case) -> tuple[Prompt, list[int] | None]:
    """The prompt, and the reply to follow if the case has one."""
    try:
        prompt = _encode(a, case)
        reply = None if case.reply is None else _given_reply(a, case, prompt.ids)
    except GemsmithError as error:
        raise RequestError(f"{case.where}: {error}") from None
    tokens = len(prompt.ids) + len(reply or [0])
    for lm in (a, b):
        limit = lm.config.text_config.max_position_embeddings
        if tokens > limit:
            raise RequestError(
                f"{case.where}: {tokens} tokens with the reply, but the context of {lm.name} holds "
                f"{limit}; shorten the conversation or leave it out"
            )
    return prompt, reply


def _encode(lm: LM, case: Case) -> Prompt:
    return lm.encode(case.messages, tools=case.tools, enable_thinking=case.enable_thinking)


def _given_reply(lm: LM, case: Case, prompt: list[int]) -> list[int]:
    """Tokens of the reply that a case comes with, as they follow the prompt.

    A history may be written without the empty thought that opens a reply where thinking is off; it
    stays part of the prompt.
    """
    assert case.reply is not None
    whole = lm.encode(
        [*case.messages, case.reply],
        tools=case.tools,
        enable_thinking=case.enable_thinking,
        reply_follows=False,
    ).ids
    shared = 0
    while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
        shared += 1
    cue = lm.tokenizer.encode(THOUGHT_OPEN + THOUGHT_CLOSE)
    reply = whole[shared:]
    if prompt[shared:] not in ([], cue) or not reply:
        raise RequestError(
            "its reply cannot follow the prompt as the chat format writes the two; leave the last "
            "assistant message out to follow what the reference says"
        )
    end = next((i for i, id in enumerate(reply) if id in lm.end_ids), len(reply) - 1)
    return reply[: end + 1]


def _compare(a: LM, b: LM, case: Case) -> Outcome:
    prompt, given = _prompts(a, b, case)
    made = _ask(a, case) if case.tools or given is None else None
    answers = None
    if case.tools and made is not None:
        first, second = made, _ask(b, case)
        expected = case.expected
        due = expected["type"] == "calls" if expected else bool(first.tool_calls)
        answers = _answer(case, first, due), _answer(case, second, due)
    reply = given if given is not None else list(made.token_ids) if made else []
    positions, is_reply, counts = _positions(a, b, prompt, reply, case)
    return Outcome(
        case.category,
        positions.only(is_reply & counts),
        positions.only(~is_reply & counts),
        answers,
        given is None,
    )


def _answer(case: Case, made: Generation, due: bool) -> Answer:
    reply = reply_of(made)
    valid = is_valid(reply, case.tools or (), due)
    return Answer(made.token_ids, valid, _right(case, reply))


def _ask(lm: LM, case: Case) -> Generation:
    # A grammar would make every build's calls valid.
    return greedy(
        lm, case.messages, case.tools, case.enable_thinking, MAX_TOKENS, constrained=False
    )


def _positions(
    a: LM, b: LM, prompt: Prompt, reply: list[int], case: Case
) -> tuple[Positions, np.ndarray, np.ndarray]:
    """Every position of prompt and reply but the first token, block by block.

    Beside them, bool [T - 1]: which are of the reply, and which count.
    """
    ids = prompt.ids + reply
    read, targets = Prompt(ids[:-1], prompt.spans), torch.tensor(ids[1:])
    # Rows of the head without a token of their own are never written.
    vocab = a.tokenizer.vocab_size
    block = max(1, BLOCK_VALUES // vocab)
    parts: list[Positions] = []
    at = 0
    for p_RV, q_RV in zip(a.scan(read, block=block), b.scan(read, block=block), strict=True):
        p_RV, q_RV = p_RV[:, :vocab], q_RV[:, :vocab].to(p_RV.device)
        target_R = targets[at : at + len(p_RV)].to(p_RV.device)
        try:
            parts.append(at_positions(p_RV, q_RV, target_R))
        except WeightsError as error:
            raise WeightsError(f"{case.where} ({a.name} beside {b.name}): {error}") from None
        at += len(p_RV)
    counts = np.ones(len(ids), bool)
    for span in prompt.spans:
        counts[span.start : span.stop] = False
    is_reply = np.arange(len(ids)) >= len(prompt.ids)
    return Positions.join(parts), is_reply[1:], counts[1:]


# -- tool calls -------------------------------------------------------------------------------


def is_valid(reply: Reply, tools: Sequence[Mapping[str, Any]], due: bool) -> bool:
    """Whether every call can be read and fits its tool, and there is one if it is due."""
    if reply.problems or (due and not reply.calls):
        return False
    declared = {tool["function"]["name"]: tool for tool in tools}
    return all(
        name in declared and not validate_arguments(ToolCall(name, arguments), declared[name])
        for name, arguments in reply.calls
    )


def _right(case: Case, reply: Reply) -> bool | None:
    if case.expected is None:
        return None
    item = Item(
        case.where, case.category, case.messages, case.tools, case.enable_thinking, case.expected
    )
    return judge(item, reply) is None


# -- the gate ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gate:
    """Bounds on all replies together; None is no bound."""

    min_top1: float | None = None
    """Percent."""
    max_kl: float | None = None
    """Mean, nats."""
    max_validity_loss: float | None = None
    """Percentage points."""

    def __post_init__(self) -> None:
        for name, most in (("min_top1", 100.0), ("max_kl", math.inf), ("max_validity_loss", 100.0)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                option = "--" + name.replace("_", "-")
                limit = "a number of at least 0" if most == math.inf else "a number from 0 to 100"
                raise RequestError(f"{option} {value:g}: must be {limit}")

    def check(self, cases: Iterable[Case]) -> None:
        """Refuse a bound that the cases cannot put to the test.

        Raises:
          RequestError: a bound on tool calls, and no case declares tools.
        """
        if self.max_validity_loss is not None and not any(case.tools for case in cases):
            raise RequestError(
                "--max-validity-loss: none of the conversations declares tools, so there is no "
                "validity to lose; leave the bound out or give conversations with tools"
            )

    def broken(self, report: Report) -> list[str]:
        """What is out of bounds, a phrase each; empty if nothing is."""
        replies, tools = report.replies(), report.tools()
        found: list[str] = []
        if replies is not None:
            top1, kl = 100 * replies.top1, replies.kl.value
            if self.min_top1 is not None and top1 < self.min_top1 - ROUNDING:
                found.append(f"top-1 agreement {_below(top1)} % < --min-top1 {self.min_top1:g}")
            if self.max_kl is not None and kl > self.max_kl + ROUNDING:
                found.append(f"mean KL {kl:.3g} > --max-kl {self.max_kl:g}")
        if self.max_validity_loss is not None and tools is not None:
            loss = -tools.valid.points
            if loss > self.max_validity_loss + ROUNDING:
                bound = f"--max-validity-loss {self.max_validity_loss:g}"
                found.append(f"tool-call validity lost {loss:.2f} points > {bound}")
        return found


def _below(percent: float) -> str:
    """Rounded down, so that what is short of a bound is not shown as the bound."""
    return f"{math.floor(percent * 100 + ROUNDING) / 100:.2f}"
