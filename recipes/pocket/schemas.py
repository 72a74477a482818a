"""How a tool is declared in one conversation: its names as they are, or replaced.

A replaced tool gets another name and other parameter names (affixed, a synonym, or an invented
word) and keeps a description that says what it means, so that the declaration must be read.
Replaced names are split by hash: held-out names never occur in training.
"""

from dataclasses import dataclass
from typing import Any

from recipes.pocket.domains import Param, Tool
from recipes.pocket.words import (
    CURRENCIES,
    DISHES,
    GENRES,
    LANGUAGES,
    NOUNS,
    PRODUCTS,
    ROOMS,
    UNITS,
    Draw,
)

POOLS = {
    "CURRENCIES": CURRENCIES,
    "DISHES": DISHES,
    "GENRES": GENRES,
    "LANGUAGES": LANGUAGES,
    "PRODUCTS": PRODUCTS,
    "ROOMS": ROOMS,
}
VERB_SYNONYMS = {
    "add": ("create", "insert", "make", "new", "store"),
    "list": ("show", "display", "fetch", "view"),
    "get": ("fetch", "query", "lookup", "check", "load"),
    "set": ("change", "adjust", "apply", "update", "put"),
    "delete": ("remove", "erase", "drop", "discard"),
    "find": ("locate", "lookup", "search", "seek"),
    "send": ("deliver", "post", "push", "write"),
    "book": ("reserve", "order", "arrange", "request"),
    "read": ("open", "load", "show", "view"),
    "convert": ("change", "transform", "exchange", "calc"),
}
AFFIXES = ("{}_value", "the_{}", "my_{}", "{}_arg", "in_{}", "{}_x", "{}_name", "new_{}", "{}_key")


@dataclass(frozen=True)
class Names:
    """A parameter as declared: its name, description, and the same for its fields."""

    param: Param
    name: str
    text: str | None
    fields: tuple["Names", ...] = ()


@dataclass(frozen=True)
class Declared:
    """A tool as declared in one conversation."""

    tool: Tool
    name: str
    text: str
    params: tuple[Names, ...] | None
    """None: the declaration says nothing of parameters."""

    def schema(self, d: Draw) -> dict[str, Any]:
        """The OpenAI-style declaration."""
        function: dict[str, Any] = {"name": self.name, "description": self.text}
        if self.params is not None:
            function["parameters"] = _object(d, self.params, None)
        return {"type": "function", "function": function}

    def arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values keyed by the tool's own parameter names -> keyed by the declared names."""
        return _rename(self.params or (), values)


def _rename(params: tuple[Names, ...], values: dict[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for names in params:
        if names.param.name not in values:
            continue
        value = values[names.param.name]
        if names.param.kind == "object":
            value = _rename(names.fields, value)
        elif names.param.kind == "objects":
            value = [_rename(names.fields, item) for item in value]
        renamed[names.name] = value
    return renamed


def _object(d: Draw, params: tuple[Names, ...], text: str | None) -> dict[str, Any]:
    required = [n.name for n in params if n.param.opt is None]
    d.rng.shuffle(required)
    schema: dict[str, Any] = {"type": "object", "properties": {n.name: _type(d, n) for n in params}}
    if text:
        schema = {"description": text, **schema}
    if required:
        schema["required"] = required
    return schema


def _type(d: Draw, names: Names) -> dict[str, Any]:
    kind = names.param.kind
    if kind == "object":
        return _object(d, names.fields, names.text)
    if kind == "objects":
        inner = _object(d, names.fields, None)
        schema: dict[str, Any] = {"type": "array", "items": inner}
    elif kind.startswith("list:"):
        inner_type = "integer" if kind == "list:int" else "string"
        schema = {"type": "array", "items": {"type": inner_type}}
    elif kind.startswith("one:"):
        options = kind[4:].split("|")
        d.rng.shuffle(options)
        schema = {"type": "string", "enum": options}
    else:
        named = {"int": "integer", "small": "integer", "number": "number"}
        schema = {"type": "boolean" if kind.startswith("bool:") else named.get(kind, "string")}
    return {"description": names.text, **schema} if names.text else schema


def as_is(d: Draw, tool: Tool, *, bare: bool = False) -> Declared:
    """The tool under its own names; bare leaves the parameter descriptions out."""

    def keep(param: Param) -> Names:
        return Names(
            param, param.name, None if bare else param.text, tuple(map(keep, param.fields))
        )

    return Declared(tool, tool.name, d.pick(tool.texts), tuple(map(keep, tool.params)))


def replaced(d: Draw, tool: Tool, *, opaque: bool = False) -> Declared:
    """The tool under other names; opaque: its name is an invented word, so it says nothing."""
    taken: set[str] = set()

    def fresh(make: Any) -> str:
        while True:
            name = d.until(make)
            if name.lower() not in taken:
                taken.add(name.lower())
                return name

    def other(param: Param) -> Names:
        name = fresh(lambda: _param_name(d, param.name))
        return Names(param, name, param.text, tuple(map(other, param.fields)))

    name = d.until(d.invented if opaque else lambda: _tool_name(d, tool.name))
    return Declared(tool, name, d.pick(tool.texts), tuple(map(other, tool.params)))


def _param_name(d: Draw, name: str) -> str:
    if d.chance(0.4):
        return d.invented()
    made = d.pick(AFFIXES).format(name)
    if d.chance(0.3):
        made += str(d.between(1, 9))
    return _camel(made) if d.chance(0.3) else made


def _tool_name(d: Draw, name: str) -> str:
    kind = d.between(0, 9)
    if kind < 3:
        return d.invented()
    if kind < 5:
        return f"{d.invented()}_{d.pick((d.invented(), d.pick(NOUNS)))}"
    verb, _, noun = name.partition("_")
    verb = d.pick(VERB_SYNONYMS.get(verb, ("do", "run", "start", "call")))
    made = f"{noun}_{verb}" if d.chance(0.4) else f"{verb}_{noun}"
    if d.chance(0.5):
        made += d.pick(("_tool", "_now", "_v2", "_v3", "_api", "_fn", f"_{d.invented()}"))
    return _camel(made) if d.chance(0.3) else made


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


PREPOSITIONS = (
    ("city", "City", "in {}"),
    ("name", "Person", "for {}"),
    ("date", "Date", "on {}"),
    ("time", "Time", "at {}"),
    ("file", "File", "from {}"),
    ("list:name", "People", "together with {}"),
)


def invented_tool(
    d: Draw, verb: str | None = None, noun: str | None = None, *, lean: bool = False
) -> Tool:
    """A tool whose subject is made up: only the words of its description can identify it.

    lean: at most one parameter.
    """
    verb = verb or d.invented()
    noun = noun or d.invented()
    params: list[Param] = []
    request = f"{verb} the {noun}"
    if not lean and d.chance(0.35):
        unit = d.invented()
        kind, of = d.pick((("int", "a {} of {}"), ("number", "a {} of {}"), ("word", "the {} {}")))
        params.append(Param(unit, kind, f"The {unit}"))
        request += " with " + of.format(unit, "{" + unit + "}")
    for kind, text, said in d.some(PREPOSITIONS, d.pick((0, 0, 0, 1) if lean else (0, 1, 1, 2))):
        name = text.lower()
        params.append(Param(name, kind, text))
        request += " " + said.format("{" + name + "}")
    return Tool(
        f"{verb}_{noun}",
        f"{verb} {noun}",
        (f"Can {verb} the {noun}", f"Used to {verb} the {noun}"),
        tuple(params),
        # Never at the start of a sentence: the invented verb must look as it does when declared.
        (f"Please {request}.", f"Can you {request}?", f"I want you to {request}."),
        lambda d, a: {"status": d.pick(("done", "ok"))} if d.chance(0.5) else {"code": d.code()},
        f"The {noun} is done.",
    )


def value_of(d: Draw, param: Param, before: dict[str, Any]) -> tuple[Any, str]:
    """A value of the parameter's kind and how a request writes it."""
    kind = param.kind
    if kind == "object":
        values, said = fill(d, param.fields)
        return values, param.say.format(**said)
    if kind == "objects":
        made = [fill(d, param.fields) for _ in range(d.between(1, 3))]
        made = list({str(v["dish"]): (v, s) for v, s in made}.values())
        return [v for v, _ in made], listed([param.say.format(**s) for _, s in made])
    if kind.startswith("list:"):
        inner = Param(param.name, kind[5:], param.text)
        values_list: list[Any] = []
        count = d.between(2, 4)
        while len(values_list) < count:
            value, _ = value_of(d, inner, before)
            if value not in values_list:
                values_list.append(value)
        return values_list, listed([str(v) for v in values_list])
    if kind.startswith("one:"):
        value = d.pick(kind[4:].split("|"))
        return value, value
    if kind.startswith("bool:"):
        yes, no = kind[5:].split("|")
        truth = d.chance(0.5)
        return truth, yes if truth else no
    if kind.startswith("of:"):
        value = d.pick(POOLS[kind[3:]])
        return value, value
    made_value = _simple(d, kind, before)
    return made_value, str(made_value)


def _simple(d: Draw, kind: str, before: dict[str, Any]) -> Any:
    match kind:
        case "int":
            return d.integer(2, 99)
        case "small":
            return d.between(2, 9)
        case "unit":
            return d.pick(d.pick(UNITS))
        case "other_unit":
            row = next(r for r in UNITS if before["from_unit"] in r)
            return d.pick(row)
        case "phone":
            return d.until(lambda: f"555-{d.between(1000, 9999)}")
        case "street":
            return d.until(lambda: f"{d.word().capitalize()} Street {d.between(1, 99)}")
        case "place":
            return d.until(lambda: d.thing().title())
        case _:
            return getattr(d, kind)()


def fill(d: Draw, params: tuple[Param, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """Values for all required and some optional parameters, and how they are written.

    No two string values of one call are equal, so each has one source in the request.
    """
    values: dict[str, Any] = {}
    said: dict[str, str] = {}
    for param in params:
        if param.opt is not None and d.chance(0.55):
            continue
        value, text = value_of(d, param, values)
        while text in said.values():
            value, text = value_of(d, param, values)
        values[param.name], said[param.name] = value, text
    return values, said


def listed(items: list[str]) -> str:
    """'none', 'a', 'a and b', 'a, b and c'."""
    if len(items) < 2:
        return items[0] if items else "none"
    return ", ".join(items[:-1]) + " and " + items[-1]
