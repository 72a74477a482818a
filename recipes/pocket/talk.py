"""Conversations without tools: arithmetic, hidden facts, JSON, copying and small talk."""

import json
from typing import Any

from recipes.pocket.schemas import Param, fill, listed
from recipes.pocket.tasks import GREETINGS, WHO, WHO_ASKED, Check
from recipes.pocket.words import (
    ADJECTIVES,
    DAYS,
    PRODUCTS,
    ROOMS,
    VERBS,
    Draw,
)

Messages = list[dict[str, Any]]
Made = tuple[Messages, list[Check]]

UNKNOWN = "I am a tiny demo model and do not know that."


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _model(text: str, thought: str | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought is not None:
        message["reasoning"] = thought
    return message


def _turns(turns: list[tuple[str, str]], category: str, kind: str = "answer") -> Made:
    """A talk of questions and answers, each answer checked in full."""
    messages: Messages = []
    checks: list[Check] = []
    for question, reply in turns:
        messages.append(_user(question))
        if category:
            checks.append(Check(len(messages), category, {"type": kind, "value": reply}))
        messages.append(_model(reply))
    return messages, checks


# --- arithmetic -----------------------------------------------------------------------------------
def add_steps(a: int, b: int) -> str:
    """Column addition, last digit first; `r` is the result so far and `c` the carry."""
    left, right, width = _columns(a, b)
    lines = [f"{a}+{b}", f"{','.join(left)} + {','.join(right)}"]
    carry, result = 0, ""
    for i in range(width):
        total = int(left[i]) + int(right[i]) + carry
        term = f"{left[i]}+{right[i]}+{carry}={total}"
        carry, result = total // 10, str(total % 10) + result
        lines.append(f"{term} r{result} c{carry}")
    if carry:
        result = str(carry) + result
    lines.append(f"={int(result)}")
    return "\n".join(lines)


def subtract_steps(a: int, b: int) -> str:
    """Column subtraction for a >= b; `c` is what was borrowed."""
    left, right, width = _columns(a, b)
    lines = [f"{a}-{b}", f"{','.join(left)} - {','.join(right)}"]
    borrow, result = 0, ""
    for i in range(width):
        top = int(left[i])
        total = top - int(right[i]) - borrow
        lend = 1 if total < 0 else 0
        shown = f"1{top}" if lend else str(top)
        result = str(total + 10 * lend) + result
        lines.append(f"{shown}-{right[i]}-{borrow}={result[0]} r{result} c{lend}")
        borrow = lend
    lines.append(f"={int(result)}")
    return "\n".join(lines)


def multiply_steps(a: int, b: int) -> str:
    """A number of any length times one digit."""
    digits = str(a)[::-1]
    lines = [f"{a}*{b}", f"{','.join(digits)} * {b}"]
    carry, result = 0, ""
    for digit in digits:
        product = int(digit) * b
        total = product + carry
        term = f"{digit}*{b}={product} {product}+{carry}={total}"
        carry, result = total // 10, str(total % 10) + result
        lines.append(f"{term} r{result} c{carry}")
    if carry:
        result = str(carry) + result
    lines.append(f"={int(result)}")
    return "\n".join(lines)


def _columns(a: int, b: int) -> tuple[str, str, int]:
    width = max(len(str(a)), len(str(b)))
    return str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], width


QUESTIONS = {
    "+": ("What is {a} + {b}?", "{a} + {b}", "Add {a} and {b}.", "How much is {a} plus {b}?"),
    "-": ("What is {a} - {b}?", "{a} - {b}", "How much is {a} minus {b}?", "Compute {a} - {b}."),
    "*": ("What is {a} * {b}?", "{a} * {b}", "How much is {a} times {b}?", "Compute {a} * {b}."),
}


def _operands(d: Draw, low: int, high: int, sign: str) -> tuple[int, int]:
    """Operands of low..high digits; which pairs are held out is decided by their hash."""

    def make() -> str:
        a, b = (
            d.between(10 ** (n - 1), 10**n - 1)
            for n in (d.between(low, high), d.between(low, high))
        )
        if sign == "-" and a < b:
            a, b = b, a
        return f"{a}{sign}{b}"

    a, b = d.until(make).split(sign)
    return int(a), int(b)


def thinking_arithmetic(d: Draw) -> Made:
    """One sum worked out digit by digit, or a word problem of two such sums."""
    if d.chance(0.25):
        return _word_problem(d)
    sign = d.weighted({"+": 0.4, "-": 0.35, "*": 0.25})
    if sign == "*":
        text = d.until(lambda: f"{d.between(10, 99)}*{d.between(2, 9)}")
        a, b = (int(n) for n in text.split("*"))
        thought, value = multiply_steps(a, b), a * b
    else:
        a, b = _operands(d, 2, 4, sign)
        thought = add_steps(a, b) if sign == "+" else subtract_steps(a, b)
        value = a + b if sign == "+" else a - b
    question = d.pick(QUESTIONS[sign]).format(a=a, b=b)
    check = Check(1, "thinking_arithmetic", {"type": "answer", "value": value})
    return [_user(question), _model(f"The answer is {value}.", thought)], [check]


def _word_problem(d: Draw) -> Made:
    name, item = d.name(), d.pick(("apples", "coins", "books", "stones", "cards", "eggs", "stamps"))
    a, b = _operands(d, 2, 3, "+")
    more = d.chance(0.5)
    c = d.between(2, a + b - 1) if d.chance(0.5) else d.between(2, min(99, a + b - 1))
    first = f"{name} has {a} {item} and {d.pick(('buys', 'finds', 'gets'))} {b} more."
    if more:
        then, value = f"Then {name} {d.pick(('wins', 'makes'))} {c} more.", a + b + c
        thought = add_steps(a, b) + "\n" + add_steps(a + b, c)
    else:
        then = f"Then {name} {d.pick(('sells', 'loses'))} {c}."
        value = a + b - c
        thought = add_steps(a, b) + "\n" + subtract_steps(a + b, c)
    question = f"{first} {then} How many {item} does {name} have now?"
    check = Check(1, "thinking_arithmetic", {"type": "answer", "value": value})
    return [_user(question), _model(f"The answer is {value}.", thought)], [check]


JOURNEYS = (
    ("A {} leaves at {} and takes {}. When does it arrive?", "It arrives at {}."),
    ("A {} starts at {} and lasts {}. When does it end?", "It ends at {}."),
    ("The {} begins at {} and takes {}. When is it over?", "It is over at {}."),
)
VEHICLES = ("train", "bus", "ship", "plane", "tram")
EVENTS = ("film", "lesson", "meeting", "concert", "match", "talk")


def clock(d: Draw) -> Made:
    """A time of day after another: minutes first, then hours; after 23:59 comes 0:00."""

    def make() -> str:
        return f"{d.between(0, 23)}:{d.between(0, 59):02}+{d.between(0, 3)}:{d.between(1, 59):02}"

    begin, span = d.until(make).split("+")
    (hour, minute), (hours, minutes) = (map(int, t.split(":")) for t in (begin, span))
    lines = [f"{begin}+{span}", f"{minute}+{minutes}={minute + minutes}"]
    carry, end_minute = divmod(minute + minutes, 60)
    lines.append(f"{minute + minutes}-{60 * carry}={end_minute} c{carry}")
    total = hour + hours + carry
    lines.append(f"{hour}+{hours}+{carry}={total}")
    if total > 23:
        lines.append(f"{total}-24={total - 24}")
    value = f"{total % 24}:{end_minute:02}"
    lines.append(f"={value}")
    question, answer = d.pick(JOURNEYS)
    thing = d.pick(VEHICLES if "arrive" in question else EVENTS)
    units = [(hours, "hour"), (minutes, "minute")]
    said = " and ".join(f"{n} {unit}{'s' if n > 1 else ''}" for n, unit in units if n)
    check = Check(1, "clock", {"type": "answer", "value": value})
    reply = _model(answer.format(value), "\n".join(lines))
    return [_user(question.format(thing, begin, said)), reply], [check]


def direct_arithmetic(d: Draw) -> Made:
    """Small sums answered at once, several in a row."""
    messages: Messages = []
    checks: list[Check] = []
    for _ in range(d.between(3, 6)):
        sign = d.pick("+-*")
        if sign == "*":
            text = d.until(lambda: f"{d.between(2, 12)}*{d.between(2, 12)}")
        else:
            low, high = d.pick(((1, 9), (1, 20), (1, 99)))

            def make(sign: str = sign, low: int = low, high: int = high) -> str:
                a, b = d.between(low, high), d.between(low, high)
                return f"{max(a, b)}-{min(a, b)}" if sign == "-" else f"{a}+{b}"

            text = d.until(make)
        a, b = (int(n) for n in text.split(sign))
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        messages.append(_user(d.pick(QUESTIONS[sign]).format(a=a, b=b)))
        checks.append(Check(len(messages), "direct_arithmetic", {"type": "answer", "value": value}))
        messages.append(_model(f"The answer is {value}."))
    return messages, checks


# --- facts in long text ---------------------------------------------------------------------------
def _filler(d: Draw) -> str:
    kind = d.between(0, 5)
    if kind == 0:
        return f"The {d.pick(ADJECTIVES)} {d.word()} stood near the {d.word()}."
    if kind == 1:
        return f"In the {d.pick(ROOMS)} there was a {d.word()} and a {d.word()}."
    if kind == 2:
        return f"Nobody wanted to {d.pick(VERBS)} the {d.word()} that day."
    if kind == 3:
        return f"It was a {d.pick(ADJECTIVES)} {d.pick(DAYS)} and we had to {d.pick(VERBS)}."
    if kind == 4:
        return f"Some people {d.pick(VERBS)} a {d.word()} with {d.pick(PRODUCTS)}."
    return f"We saw a {d.pick(ADJECTIVES)} {d.word()} on the way to the {d.word()}."


def _fact(d: Draw) -> tuple[str, str, str]:
    """A fact sentence, the question that asks for it, and the value."""
    kind = d.between(0, 5)
    if kind == 0:
        thing, value = d.thing(), str(d.integer(1000, 9999))
        return f"The code of the {thing} is {value}.", f"What is the code of the {thing}?", value
    if kind == 1:
        place, value = d.word(), d.invented()
        return (
            f"The password for the {place} is {value}.",
            f"What is the password for the {place}?",
            value,
        )
    if kind == 2:
        name, value = d.name(), d.city()
        return f"The home of {name} is {value}.", f"What is the home of {name}?", value
    if kind == 3:
        name, value = d.name(), str(d.integer(10, 999))
        return f"The number of {name} is {value}.", f"What is the number of {name}?", value
    if kind == 4:
        thing, value = d.thing(), d.name()
        return f"The owner of the {thing} is {value}.", f"Who is the owner of the {thing}?", value
    name, value = d.name(), d.thing()
    return f"The secret of {name} is the {value}.", f"What is the secret of {name}?", value


def needle(d: Draw, tokens: int | None = None) -> Made:
    """Facts among filler sentences, asked for at the end.

    tokens is about how long the text is (a filler sentence is about 16 tokens).
    """
    tokens = tokens or d.pick((60, 120, 200, 300, 400, 500, 560, 620, 680))
    facts: list[tuple[str, str, str]] = []
    wanted = max(1, min(8, tokens // 70))
    while len(facts) < wanted:
        fact = _fact(d)
        if all(fact[1] != f[1] for f in facts):
            facts.append(fact)
    sentences = [_filler(d) for _ in range(max(1, tokens // 16 - wanted))]
    for fact in facts:
        sentences.insert(d.between(0, len(sentences)), fact[0])
    text = " ".join(sentences)
    turns: list[tuple[str, str]] = []
    d.rng.shuffle(facts)
    for i, (fact, question, _) in enumerate(facts):
        turns.append((f"{text}\n{question}" if i == 0 else question, fact))
    messages, _ = _turns(turns, "")
    checks = [
        Check(2 * i + 1, "needle", {"type": "answer", "value": value, "fact": fact})
        for i, (fact, _, value) in enumerate(facts)
    ]
    return messages, checks


def lookup(d: Draw) -> Made:
    """A short table and several questions about it."""
    table: dict[str, str] = {}
    for _ in range(d.between(3, 10)):
        key = d.pick((d.word, d.name, d.invented, d.thing))()
        table[key] = str(d.pick((d.city, d.number, d.word, d.invented, d.code, d.time))())
    rows = "\n".join(f"{k}: {v}" for k, v in table.items())
    keys = d.some(list(table), min(len(table), d.between(3, 8)))
    form = d.pick(("What is {}?", "Look up {}.", "{}?"))
    turns = [(form.format(k), table[k]) for k in keys]
    turns[0] = (f"{rows}\n{turns[0][0]}", turns[0][1])
    return _turns(turns, "lookup")


def copying(d: Draw) -> Made:
    """Repeat, reverse or pick from a list."""
    turns: list[tuple[str, str]] = []
    for _ in range(d.between(1, 3)):
        makers = (
            d.word,
            d.invented,
            d.invented,
            d.name,
            d.city,
            lambda: str(d.number()),
            d.code,
            d.file,
        )
        items = list(dict.fromkeys(d.pick(makers)() for _ in range(d.between(3, 8))))
        listing = " ".join(items) if d.chance(0.3) else ", ".join(items)
        kind = d.weighted({"repeat": 6.0, "reverse": 1.0, "first": 1.0, "last": 1.0, "quote": 3.0})
        if kind == "repeat":
            turns.append(
                (d.pick(("Repeat: {}", "Copy this: {}", "Say {}")).format(listing), listing)
            )
        elif kind == "quote":
            text = d.phrase()
            turns.append((d.pick(("Repeat: {}", "Say '{}'", "Copy this: {}")).format(text), text))
        elif kind == "reverse":
            items = items[:4]
            turns.append((f"Reverse this list: {', '.join(items)}", ", ".join(items[::-1])))
        else:
            value = items[0] if kind == "first" else items[-1]
            turns.append((f"What is the {kind} item in this list: {', '.join(items)}", value))
    return _turns(turns, "copy")


# --- JSON -----------------------------------------------------------------------------------------
JSON_FIELDS = (
    ("name", "name", "name"),
    ("age", "int", "age"),
    ("city", "city", "city"),
    ("date", "date", "date"),
    ("time", "time", "time"),
    ("price", "number", "price"),
    ("file", "file", "file"),
    ("color", "one:red|blue|green|white|yellow|black", "color"),
    ("phone", "phone", "phone"),
    ("code", "code", "code"),
    ("title", "thing", "title"),
    ("items", "list:of:PRODUCTS", "items"),
    ("scores", "list:int", "scores"),
    ("friends", "list:name", "friends"),
)


def json_answer(d: Draw) -> Made:
    """Values of a text as compact JSON, in the order in which the keys are asked."""
    params = [Param(n, k, t) for n, k, t in d.some(JSON_FIELDS, d.between(2, 5))]
    for i, param in enumerate(params):
        if d.chance(0.3):
            word = d.invented()
            params[i] = Param(word, param.kind, word)
    if len({p.name for p in params}) < len(params):
        return json_answer(d)
    values, said = fill(d, tuple(params))
    form = d.between(0, 2)
    if form == 0:
        text = ", ".join(f"{p.name} {said[p.name]}" for p in params) + "."
        if any(p.kind.startswith("list:") for p in params):
            text = "; ".join(f"{p.name} {said[p.name]}" for p in params) + "."
    elif form == 1:
        text = " ".join(f"The {p.name} is {said[p.name]}." for p in params)
    else:
        text = "\n".join(f"{p.name}: {said[p.name]}" for p in params)
    keys = d.some([p.name for p in params], d.between(max(1, len(params) - 1), len(params)))
    if d.chance(0.25) and len(keys) > 1:
        inner = d.pick(("data", "info", "record", d.invented()))
        value: dict[str, Any] = {inner: {k: values[k] for k in keys}}
        request = f"Answer in JSON with the key {inner} holding {listed(keys)}."
    elif d.chance(0.4):
        names = {str: "string", int: "number", float: "number", list: "array"}
        shape = ",".join(f'"{k}":{names[type(values[k])]}' for k in keys)
        request = f"Answer in this JSON form: {{{shape}}}"
        value = {k: values[k] for k in keys}
    else:
        form_text = d.pick(
            ("Give {} as JSON.", "Answer in JSON with the keys {}.", "Return JSON with {}.")
        )
        request = form_text.format(listed(keys))
        value = {k: values[k] for k in keys}
    prompt = f"{text}\n{request}" if d.chance(0.7) else f"{request}\n{text}"
    check = Check(1, "json", {"type": "json", "value": value})
    reply = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return [_user(prompt), _model(reply)], [check]


# --- small talk -----------------------------------------------------------------------------------
UNKNOWNS = (
    "What is the capital of {}?",
    "Who is the mayor of {}?",
    "How many people live in {}?",
    "Tell me the history of {}.",
    "Who won the last match in {}?",
)


def chat(d: Draw) -> Made:
    """Greetings, who are you, an honest "do not know", and system prompts that set a rule."""
    messages: Messages = []
    name, close, loud = "", "", False
    rule = d.between(0, 9)
    if rule == 0:
        name = d.name()
        messages.append({"role": "system", "content": f"Your name is {name}."})
    elif rule == 1:
        close = d.pick((d.invented(), d.word(), "over", "my friend"))
        messages.append({"role": "system", "content": f"End every answer with the word {close}."})
    elif rule == 2:
        loud = True
        text = d.pick(("Answer in upper case.", "Write everything in upper case."))
        messages.append({"role": "system", "content": text})
    elif rule == 3:
        messages.append({"role": "system", "content": "You are a helpful assistant."})
    told = ""
    for _ in range(d.between(2, 4)):
        kind = d.between(0, 9)
        if kind < 4:
            question, reply = d.pick(GREETINGS)
        elif kind < 6:
            question = d.pick(WHO_ASKED)
            reply = WHO.replace("pocket", name) if name else WHO
        elif kind == 6:
            question, reply = d.pick(UNKNOWNS).format(d.city()), UNKNOWN
        elif told:
            question, reply = d.pick(("What is my name?", "Who am I?")), f"Your name is {told}."
        else:
            told = d.name()
            question = d.pick(("My name is {}.", "I am {}.", "Call me {}.")).format(told)
            reply = f"Hello {told}! What can I do for you?"
        reply = f"{reply} {close}" if close else reply
        messages += [_user(question), _model(reply.upper() if loud else reply)]
    return messages, []


def thoughtful(made: Made) -> Made:
    """Only the first answer, with a thought that there is nothing to work out."""
    messages, checks = made
    stop = next(i for i, m in enumerate(messages) if m["role"] == "assistant") + 1
    first = messages[:stop]
    first[-1] = {**first[-1], "reasoning": "No steps are needed."}
    return first, [c for c in checks if c.upto < stop]
