"""Procedural conversations that pocket is trained and measured on.

`generate(split, seed, index)` is a pure function of its arguments, so any worker can make any
conversation. The held-out split draws other names, numbers, texts and tool names (see words.py).
It makes messages; rendering to text is `gemsmith.text.chat.render(..., variant="edge")`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from recipes.pocket import talk, tasks
from recipes.pocket.tasks import Check
from recipes.pocket.words import Draw, Split

# Share of conversations. Those with tools are longest: they have four fifths of the tokens.
KINDS = {
    "tools": 0.40,
    "choices": 0.06,
    "which": 0.08,
    "needle": 0.03,
    "lookup": 0.03,
    "copying": 0.02,
    "json": 0.10,
    "thinking_arithmetic": 0.15,
    "clock": 0.03,
    "direct_arithmetic": 0.06,
    "chat": 0.04,
}
PLAIN = {
    "needle": talk.needle,
    "lookup": talk.lookup,
    "copying": talk.copying,
    "json": talk.json_answer,
    "thinking_arithmetic": talk.thinking_arithmetic,
    "clock": talk.clock,
    "direct_arithmetic": talk.direct_arithmetic,
    "chat": talk.chat,
}
WORKED_OUT = ("thinking_arithmetic", "clock")
EASY = {"chat": 0.3, "copying": 0.1, "json": 0.1, "lookup": 0.1}
"""Kinds that need no thought, and how often they are met with thinking on."""
STYLES = {"seen": 0.27, "replaced": 0.38, "mixed": 0.10, "invented": 0.25}
# Whether any tool fits is the hardest to learn and decided in one token, so it comes up often.
STEPS = {"single": 0.42, "parallel": 0.16, "chained": 0.10, "no_tool": 0.28, "chat": 0.04}
DECLARED = {1: 0.26, 2: 0.36, 3: 0.25, 4: 0.09, 5: 0.04}
REQUESTS = {1: 0.15, 2: 0.2, 3: 0.25, 4: 0.2, 5: 0.12, 6: 0.08}
KIN_STYLES = {"seen": 0.5, "replaced": 0.25, "mixed": 0.25}
KIN_STEPS = {"single": 0.65, "parallel": 0.08, "chained": 0.12, "no_tool": 0.15}


@dataclass(frozen=True)
class Conversation:
    kind: str
    messages: list[dict[str, Any]]
    """OpenAI-style messages as gemsmith.text.chat.render takes them."""
    tools: list[dict[str, Any]] | None
    enable_thinking: bool
    checks: tuple[Check, ...] = ()
    """Points where what the model must produce is known."""


def generate(split: Split, seed: int, index: int, *, kind: str | None = None) -> Conversation:
    """One conversation; kind (a key of KINDS) overrides the mixture."""
    d = Draw(split, f"{split}/{seed}/{index}/{kind or ''}")
    kind = kind or d.weighted(KINDS)
    if kind == "tools":
        return tool_conversation(d)
    if kind == "choices":
        return _with_tools(d, kind, tasks.choices(d, thinking=d.chance(0.1)))
    if kind == "which":
        return _with_tools(d, kind, tasks.which(d))
    made = PLAIN[kind](d)
    thinking = kind in WORKED_OUT
    if kind in EASY and d.chance(EASY[kind]):
        made, thinking = talk.thoughtful(made), True
    messages, checks = made
    if kind != "chat" and d.chance(0.1):
        messages = [{"role": "system", "content": tasks.SYSTEMS[0]}, *messages]
        checks = [replace(c, upto=c.upto + 1) for c in checks]
    return Conversation(kind, messages, None, thinking, tuple(checks))


def tool_conversation(
    d: Draw, steps: list[str] | None = None, style: str | None = None
) -> Conversation:
    """A conversation with tools; steps and style are drawn unless given."""
    thinking = d.chance(0.2)
    if steps is None:
        steps = _steps(d, STEPS, 1 if thinking else d.weighted(REQUESTS))
    if style is None:
        style = d.weighted(STYLES)
    if style == "invented" and "chained" in steps:
        style = "replaced"
    made = tasks.conversation(d, steps, style, thinking=thinking, count=d.weighted(DECLARED))
    return _with_tools(d, f"tools/{steps[0]}", made)


def kin(split: Split, seed: int, index: int) -> Conversation:
    """One conversation with tools near each other, as those of an application are.

    Tools drawn from everywhere are told apart by a word; here two are about files, or two list
    something. After 104 million tokens without these, asked which files there are beside a
    calendar, the model listed events.
    """
    d = Draw(split, f"{split}/{seed}/{index}/kin")
    steps = _steps(d, KIN_STEPS, d.between(1, 5))
    style, count = d.weighted(KIN_STYLES), d.between(3, 7)
    thinking = len(steps) == 1 and d.chance(0.3)
    made = tasks.conversation(d, steps, style, thinking=thinking, count=count, kin=True)
    return _with_tools(d, f"tools/{steps[0]}", made)


def _steps(d: Draw, shares: dict[str, float], count: int) -> list[str]:
    """Of so many steps drawn at most one chain, for it needs its own two tools."""
    steps = [d.weighted(shares) for _ in range(count)]
    return [s for i, s in enumerate(steps) if s != "chained" or "chained" not in steps[:i]]


def _with_tools(d: Draw, kind: str, made: tasks.Talk) -> Conversation:
    tools = [t.schema(d) for t in made.tools]
    return Conversation(kind, made.messages, tools, made.thinking, tuple(made.checks))


def conversations(split: Split, seed: int, start: int, stop: int) -> Iterator[Conversation]:
    """The conversations start..stop-1 of a split."""
    for index in range(start, stop):
        yield generate(split, seed, index)
