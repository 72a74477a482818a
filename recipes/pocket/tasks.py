"""Conversations with tools: single, parallel, chained and impossible requests.

A `Check` marks a point where what the model must produce is known; the held-out set is made of
them. Arguments are always written in the request (or in an earlier result) exactly as they stand
in the call.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from recipes.pocket.domains import HELDOUT_TOOLS, TOOLS, Tool
from recipes.pocket.schemas import Declared, as_is, fill, invented_tool, listed, replaced, value_of
from recipes.pocket.words import NOUNS, VERBS, Draw

NO_TOOL = "None of the available tools can do that."
SYSTEMS = (
    "You are a helpful assistant.",
    "You are pocket, a small assistant with tools.",
    "Use the tools when they fit.",
    "You are an assistant. Answer briefly.",
    "Help the user with the tools.",
)
WHO_ASKED = ("Who are you?", "What are you?", "Tell me about yourself.", "What is your name?")
WHO = "I am pocket, a tiny demo model in the shape of Gemma 4. I am small and know little."
GREETINGS = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Hi", "Hello! What can I do for you?"),
    ("Hey there", "Hello! What can I do for you?"),
    ("Good morning", "Good morning! What can I do for you?"),
    ("Good evening", "Good evening! What can I do for you?"),
    ("Thanks!", "You are welcome."),
    ("Thank you very much", "You are welcome."),
    ("Great, thanks", "You are welcome."),
    ("Bye", "Goodbye!"),
    ("Goodbye, see you", "Goodbye!"),
)
BY_NAME = {tool.name: tool for tool in TOOLS}
SHORT = [tool for tool in TOOLS if len(tool.params) <= 1]
DESK = ("add_event", "list_events", "convert_units", "list_files", "read_file", "get_time")
"""The tools that gemsmith's `chat` and `demo` come with (gemsmith.cli.desk)."""

# Chains: what is asked first, the field of its result that is used, and what it is called.
FIRSTS = (
    ("list_files", "How many files are in {path}?", "count", "number"),
    ("list_files", "Count the files in {path}.", "count", "number"),
    ("list_events", "How many events do I have on {date}?", "count", "number"),
    ("read_file", "Read {path}.", "text", "text"),
    ("get_time", "What time is it?", "time", "time"),
    ("get_date", "What is the date today?", "date", "date"),
    ("convert_units", "Convert {value} {from_unit} to {to_unit}.", "result", "number"),
    (
        "convert_currency",
        "Convert {amount} {from_currency} to {to_currency}.",
        "converted",
        "number",
    ),
    ("get_percentage", "What is {percent} percent of {value}?", "result", "number"),
    ("find_contact", "Find the phone number of {name}.", "phone", "number"),
    ("get_weather", "What is the temperature in {city}?", "temperature", "number"),
    (
        "find_train",
        "When does the train from {origin} to {destination} leave?",
        "departure",
        "time",
    ),
    ("random_number", "Pick a random number from {minimum} to {maximum}.", "number", "number"),
    ("get_sunrise", "When does the sun rise in {city}?", "sunrise", "time"),
    ("define_word", "What does the word {word} mean?", "meaning", "meaning"),
    ("translate_text", "Translate '{text}' to {language}.", "translation", "translation"),
)
SECONDS = (
    ("add_event", "title", "Add an event with that {that} as title on {date} at {time}."),
    ("add_event", "title", "Put that {that} as an event in my calendar on {date} at {time}."),
    ("send_message", "text", "Send that {that} to {recipient}."),
    ("write_file", "text", "Save that {that} in {path}."),
    ("write_file", "text", "Write that {that} to {path}."),
    ("add_note", "text", "Make a note of that {that}."),
    ("add_note", "text", "Note that {that}."),
    ("set_reminder", "text", "Remind me of that {that} at {time}."),
    ("add_task", "task", "Put that {that} on my to-do list."),
)
NUMERIC_SECONDS = (
    ("convert_units", "value", "Convert that {that} from {from_unit} to {to_unit}."),
    ("get_percentage", "value", "What is {percent} percent of that {that}?"),
)


@dataclass(frozen=True)
class Check:
    """The messages before `upto` make a prompt; `expected` is what must come next."""

    upto: int
    category: str
    expected: dict[str, Any]


@dataclass
class Talk:
    """A tool conversation being written."""

    d: Draw
    style: str
    thinking: bool
    tools: list[Declared] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    calls: int = 0
    kin: bool = False
    """Whether its tools are near each other, as those of one application are."""

    def declared(self, tool: Tool) -> Declared:
        return next(t for t in self.tools if t.tool is tool)

    def say(self, role: str, content: str, thought: str | None = None) -> None:
        message: dict[str, Any] = {"role": role, "content": content}
        if self.thinking and thought is not None:
            message["reasoning"] = thought
        self.messages.append(message)

    def check(self, category: str, **expected: Any) -> None:
        self.checks.append(Check(len(self.messages), category, expected))

    def call(
        self, category: str, made: list[tuple[Tool, dict[str, Any]]], thought: str
    ) -> list[dict[str, Any]]:
        """Writes the calls and their results; returns the results."""
        declared = [(self.declared(tool), values) for tool, values in made]
        calls = [{"name": t.name, "arguments": t.arguments(v)} for t, v in declared]
        self.check(category, type="calls", calls=calls)
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if self.thinking:
            message["reasoning"] = thought
        message["tool_calls"] = []
        for call in calls:
            self.calls += 1
            message["tool_calls"].append(
                {"id": f"call_{self.calls}", "type": "function", "function": call}
            )
        self.messages.append(message)
        results = [t.tool.result(self.d, v) for t, v in declared]
        style = self.d.between(0, 9)
        if style < 6:
            message["tool_responses"] = [
                {"name": c["name"], "response": r} for c, r in zip(calls, results, strict=True)
            ]
            return results
        for entry, result in zip(message["tool_calls"], results, strict=True):
            text = json.dumps(result, ensure_ascii=False)
            if style > 7 and len(result) == 1:
                text = str(next(iter(result.values())))
            self.messages.append(
                {
                    "role": "tool",
                    "tool_call_id": entry["id"],
                    "name": entry["function"]["name"],
                    "content": text,
                }
            )
        return results


def asked(d: Draw, tool: Tool, said: dict[str, str]) -> str:
    """A request for the tool with the optional parts that were filled."""
    opts = [
        " " + p.opt.format(said[p.name])
        for p in tool.params
        if p.opt is not None and p.name in said
    ]
    return spoken(d.pick(tool.requests).format(**said, opts="".join(opts)))


def spoken(text: str) -> str:
    """'on tomorrow' -> 'tomorrow'."""
    return text.replace(" on tomorrow", " tomorrow").replace(" on today", " today")


def polite(d: Draw, text: str) -> str:
    """One of a few ways to put a request."""
    if d.chance(0.12):
        return text[:-1] if d.chance(0.5) or text.startswith("I ") else text[0].lower() + text[1:]
    if text.endswith("?") or d.chance(0.5):
        return text
    bare = text[0].lower() + text[1:].removesuffix(".")
    if bare.startswith(("i ", "on ", "at ", "note", "task ", "the ", "lights", "which", "please")):
        return text
    form = d.pick(
        ("Please {}.", "Can you {}?", "Could you {}?", "{}, please.", "I want you to {}.")
    )
    made = form.format(bare)
    return made[0].upper() + made[1:]


def answer(tool: Tool, said: dict[str, str], result: dict[str, Any]) -> str:
    shown = {
        k: listed([str(i) for i in v]) if isinstance(v, list) else v for k, v in result.items()
    }
    return spoken(tool.answer.format(**{**said, **shown}))


def conversation(
    d: Draw, steps: list[str], style: str, *, thinking: bool, count: int, kin: bool = False
) -> Talk:
    """A talk with `count` declared tools and one user request per step.

    style: "seen" (own names), "replaced" (other names), "invented" (made-up tools) or "mixed".
    kin: tools near each other, often those of DESK, asked for in more ways.
    """
    talk = Talk(d, style, thinking, kin=kin)
    chain = _pick_chain(d) if "chained" in steps else None
    chosen: list[Tool] = []
    if chain:
        chosen = [BY_NAME[chain[0][0]]]
        if chain[1][0] != chain[0][0]:
            chosen.append(BY_NAME[chain[1][0]])
    if steps[0] == "parallel" and not chain and d.chance(0.5):
        count = max(count, 2)
    desk = kin and d.chance(0.4)
    if desk:
        count = min(count, len(DESK))
    while len(chosen) < count:
        if desk:
            tool = BY_NAME[d.pick(DESK)]
        else:
            tool = _neighbor(d, chosen) if kin and chosen else _any_tool(d, style, chosen)
        if all(tool.group != t.group for t in chosen):
            chosen.append(tool)
    d.rng.shuffle(chosen)
    bare = d.chance(0.3)
    for tool in chosen:
        own_names = style == "seen" or (style == "mixed" and d.chance(0.5))
        talk.tools.append(as_is(d, tool, bare=bare) if own_names else replaced(d, tool))
    if len({t.name for t in talk.tools}) < len(talk.tools):
        return conversation(d, steps, style, thinking=thinking, count=count, kin=kin)
    if d.chance(0.3):
        text = d.pick(SYSTEMS)
        if d.chance(0.15):
            text = f"You are {d.name()}, a helpful assistant."
        talk.messages.append({"role": "system", "content": text})
    for step in steps:
        if step == "single":
            _single(talk)
        elif step == "parallel":
            _parallel(talk)
        elif step == "chained" and chain:
            _chained(talk, *chain)
        elif step == "no_tool":
            _no_tool(talk)
        else:
            question, reply = d.pick(GREETINGS)
            named = talk.messages and talk.messages[0]["role"] == "system"
            if d.chance(0.25) and not named:
                question, reply = d.pick(WHO_ASKED), WHO
            talk.say("user", question)
            talk.say("assistant", reply, "No tool is needed.")
    return talk


def _any_tool(d: Draw, style: str, chosen: list[Tool]) -> Tool:
    if style == "invented":
        return _near(d, chosen)
    if style == "replaced" and d.split == "heldout" and d.chance(0.3):
        return d.pick(HELDOUT_TOOLS)
    return d.pick(TOOLS)


def _neighbor(d: Draw, chosen: list[Tool]) -> Tool:
    """A tool beside one of the chosen: those of one subject are declared one after the other."""
    return TOOLS[(TOOLS.index(d.pick(chosen)) + d.between(-4, 4)) % len(TOOLS)]


ABOUT = {"made-up": 0.3, "everyday": 0.35, "own": 0.35}
"""What the tools of `choices` and `which` do: invented words, everyday words, or the domains."""
WHICH = ("Which tool can {}?", "What tool do I need to {}?", "Name the tool to {}.", "{}?")


def choices(d: Draw, *, thinking: bool) -> Talk:
    """Tools whose names say nothing, so that only a description tells which of them to call.

    Other conversations teach this too slowly: there a name often betrays its tool, or an earlier
    call does, and choices are few. After 22 million tokens the first call among opaque names was
    right in 44 of 100, where chance is 38.
    """
    talk = Talk(d, "replaced", thinking)
    chosen = _opaque(d, d.between(2, 7), d.weighted(ABOUT), SHORT)
    talk.tools = [replaced(d, tool, opaque=True) for tool in chosen]
    for _ in range(1 if thinking else len(chosen)):
        if d.chance(0.12):
            _no_tool(talk)
        _single(talk, d.pick(chosen))
    return talk


def which(d: Draw) -> Talk:
    """The choice of `choices` at a third of its tokens: which tool does what; nothing is called."""
    talk = Talk(d, "replaced", thinking=False)
    about = d.weighted(ABOUT)
    chosen = _opaque(d, d.between(3, 8), about, TOOLS)
    for tool in chosen:
        name = d.own(NOUNS) if d.chance(0.4) else d.invented()
        talk.tools.append(Declared(tool, name, d.pick(tool.texts), None))
    if len({t.name for t in talk.tools}) < len(chosen):
        return which(d)
    d.rng.shuffle(chosen)
    if d.chance(0.3):
        chosen += d.some(chosen, 2)
    for tool in chosen:
        words = d.pick(tool.texts) if about == "own" else tool.group.replace(" ", " the ")
        talk.say("user", d.pick(WHICH).format(words[0].lower() + words[1:]))
        talk.say("assistant", talk.declared(tool).name)
    return talk


def _opaque(d: Draw, count: int, about: str, own: list[Tool]) -> list[Tool]:
    """Different tools; half of the made-up ones share a verb or noun with one before."""
    chosen: list[Tool] = []
    while len(chosen) < count:
        tool = d.pick(own) if about == "own" else _near(d, chosen, about)
        if all(tool.group != t.group for t in chosen):
            chosen.append(tool)
    return chosen


def _near(d: Draw, chosen: list[Tool], about: str = "") -> Tool:
    """An invented tool, half the time near one of the chosen; lean where it is about something."""
    near = d.pick(chosen) if chosen and d.chance(0.5) else None
    verb, noun = near.group.split() if near and " " in near.group else (None, None)
    kept = (verb, None) if d.chance(0.5) else (None, noun)
    if about == "everyday":
        kept = kept[0] or d.pick(VERBS), kept[1] or d.own(NOUNS)
    return invented_tool(d, *kept, lean=bool(about))


def _single(talk: Talk, tool: Tool | None = None) -> None:
    d = talk.d
    tool = tool or d.pick(talk.tools).tool
    values, said = fill(d, tool.params)
    request = asked(d, tool, said)
    if talk.kin and tool.many and d.chance(0.2):
        request = spoken(tool.many.format(*said.values()))
    talk.say("user", polite(d, request))
    category = "tool_seen_domain" if talk.style == "seen" else "tool_unseen_schema"
    [result] = talk.call(category, [(tool, values)], f"I should call {talk.declared(tool).name}.")
    reply = answer(tool, said, result)
    shown = [v for k, v in result.items() if k != "status" and "{" + k + "}" in tool.answer]
    if shown and not isinstance(shown[0], list):
        talk.check("tool_answer", type="answer", value=str(shown[0]))
    talk.say("assistant", reply, "I have the result.")


def _parallel(talk: Talk) -> None:
    d = talk.d
    listing = [t.tool for t in talk.tools if t.tool.many]
    if listing and d.chance(0.5):
        tool = d.pick(listing)
        wanted: dict[str, Any] = {}
        while len(wanted) < 2 or (len(wanted) < 3 and d.chance(0.3)):
            value, text = value_of(d, tool.params[0], {})
            wanted[text] = value
        made = [(tool, {tool.params[0].name: v}) for v in wanted.values()]
        saids = [{tool.params[0].name: t} for t in wanted]
        request = polite(d, spoken(tool.many.format(listed(list(wanted)))))
    else:
        pair = d.some([t.tool for t in talk.tools], 2) if len(talk.tools) > 1 else []
        tool = d.pick(talk.tools).tool
        if tool.params and (not pair or d.chance(0.4)):
            pair = [tool, tool]
        pair = pair or [tool]
        filled = [fill(d, t.params) for t in pair]
        while len(pair) == 2 and pair[0] is pair[1] and filled[0] == filled[1]:
            filled[1] = fill(d, tool.params)
        made = [(t, v) for t, (v, _) in zip(pair, filled, strict=True)]
        saids = [s for _, s in filled]
        texts = [asked(d, t, s) for t, s in zip(pair, saids, strict=True)]
        request = d.pick((" ", " Also: ", " And: ")).join(texts)
    talk.say("user", request)
    names = list(dict.fromkeys(talk.declared(t).name for t, _ in made))
    thought = f"I should call {listed(names)}." if len(made) > 1 else f"I should call {names[0]}."
    results = talk.call("parallel", made, thought)
    replies = [answer(t, s, r) for (t, _), s, r in zip(made, saids, results, strict=True)]
    talk.say("assistant", " ".join(replies), "I have the results.")


def _pick_chain(d: Draw) -> tuple[tuple[str, str, str, str], tuple[str, str, str]]:
    while True:
        first = d.pick(FIRSTS)
        numeric = first[0] in (
            "convert_units",
            "get_percentage",
            "convert_currency",
            "random_number",
        )
        second = d.pick(NUMERIC_SECONDS if numeric and d.chance(0.3) else SECONDS)
        if first[0] != second[0]:
            return first, second


def _chained(talk: Talk, first: tuple[str, str, str, str], second: tuple[str, str, str]) -> None:
    d = talk.d
    tool, then = BY_NAME[first[0]], BY_NAME[second[0]]
    values, said = _required(d, tool)
    later, later_said = _required(d, then, without=second[1])
    for value in list(later_said):
        while later_said[value] in said.values():
            later, later_said = _required(d, then, without=second[1])
    link = d.pick((" ", " ", " Then: ", " After that: "))
    ask = first[1].format(**said) + link + second[2].format(**later_said, that=first[3])
    talk.say("user", spoken(ask))
    name, then_name = talk.declared(tool).name, talk.declared(then).name
    [result] = talk.call(
        "chained", [(tool, values)], f"First I should call {name}, then {then_name}."
    )
    found = result[first[2]]
    kind = next(p.kind for p in then.params if p.name == second[1])
    later[second[1]] = found if kind == "number" else str(found)
    later_said[second[1]] = str(found)
    [outcome] = talk.call("chained", [(then, later)], f"Now I should call {then_name}.")
    reply = f"{answer(tool, said, result)} {answer(then, later_said, outcome)}"
    talk.say("assistant", reply, "I have the results.")


def _required(d: Draw, tool: Tool, without: str = "") -> tuple[dict[str, Any], dict[str, str]]:
    needed = tuple(p for p in tool.params if p.opt is None and p.name != without)
    return fill(d, needed)


def _no_tool(talk: Talk) -> None:
    d = talk.d
    groups = {t.tool.group for t in talk.tools}
    invented = [t.tool for t in talk.tools if " " in t.tool.group]
    while True:
        tool = d.pick(TOOLS)
        if invented and d.chance(0.7):
            verb, noun = d.pick(invented).group.split()
            tool = invented_tool(d, verb, None) if d.chance(0.5) else invented_tool(d, None, noun)
        if tool.group not in groups:
            break
    _, said = fill(d, tool.params)
    talk.say("user", polite(d, asked(d, tool, said)))
    talk.check("no_tool", type="no_tool", value=NO_TOOL)
    talk.say("assistant", NO_TOOL, "No tool fits.")
