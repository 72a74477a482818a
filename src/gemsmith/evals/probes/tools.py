"""Tool calls in all their forms, and what a client sends back after them.

A schema with one value forces the text of an argument, so any model behind a server that holds
calls to their schemas gives it back: quotes, newlines, markers and all.
"""

from typing import Any

from gemsmith.evals.conformance import probe
from gemsmith.evals.endpoint import Endpoint, Failed, Json, Reply, Skipped, clean, need
from gemsmith.evals.probes.chat import WEATHER
from gemsmith.text.calls import ToolCall
from gemsmith.text.tools import validate_arguments

PARIS = "What is the weather in Paris?"
FORMS: dict[str, tuple[str, Any]] = {
    "string": ("a string", {"type": "string", "maxLength": 20}),
    "integer": ("an integer, not 2.0 or '2'", {"type": "integer", "enum": [2, 3]}),
    "number": ("a number", {"type": "number", "enum": [0.5, -1.25]}),
    "boolean": ("true or false, not a text", {"type": "boolean"}),
    "enum": ("one of the values of an enum", {"type": "string", "enum": ["celsius", "kelvin"]}),
    "const": ("the value of a const", {"const": "fixed"}),
    "array": (
        "an array of as many items as it may have",
        {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 3},
    ),
    "nested": (
        "objects in objects, to three levels",
        {
            "type": "object",
            "properties": {
                "place": {
                    "type": "object",
                    "properties": {"name": {"enum": ["Paris"]}, "at": {"enum": [[48, 2]]}},
                    "required": ["name", "at"],
                }
            },
            "required": ["place"],
        },
    ),
    "objects": (
        "an array of objects",
        {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"id": {"enum": [1, 2]}},
                "required": ["id"],
            },
        },
    ),
    "any-of": ("one of two forms", {"anyOf": [{"enum": [7]}, {"enum": ["seven"]}]}),
    "nullable": ("null where it may be", {"enum": [None]}),
}
TEXTS = {
    "quotes": ("quotes and apostrophes", "say \"hi\" to 'her'"),
    "backslashes": ("backslashes", r"C:\temp\new \u0041 \n"),
    "newlines": ("newlines and tabs", "one\ntwo\tthree\r\nfour"),
    "unicode": ("letters of any script, and emoji", "caf\u00e9 \u6771\u4eac \u0645 \N{ROCKET}"),
    "braces": ("braces, commas and colons", '{a:[1,2],"b":}}],'),
    "json": ("JSON as a text", '{"a": "b\\"c"}'),
    "code": ("a program", 'def f(x):\n    return f"{x!r}"  # <b>&amp;</b>\n'),
    "empty": ("nothing at all", ""),
    "spaces": ("spaces at both ends", "  two  "),
}


def tool(name: str, properties: Json, required: list[str] | None = None) -> Json:
    """A declaration; if not said otherwise every property is required."""
    schema: Json = {"type": "object", "properties": properties}
    if required := list(properties) if required is None else required:
        schema["required"] = required
    function = {"name": name, "description": f"Does {name}.", "parameters": schema}
    return {"type": "function", "function": function}


def fits(reply: Reply, *tools: Json) -> None:
    """Every call fits its tool's schema.

    Raises:
      Failed: there is none, or one does not.
    """
    declared = {each["function"]["name"]: each for each in tools}
    need(reply.first.calls, "no tool was called", reply.answer.body)
    for place, call in enumerate(reply.first.calls):
        name = call["function"]["name"]
        need(name in declared, f"{name!r} was called, which is not declared")
        arguments = reply.first.arguments(place)
        for problem in validate_arguments(ToolCall(name, arguments), declared[name]):
            raise Failed(f"arguments do not fit the schema: {problem.message}")


def _required(e: Endpoint, *tools: Json, **fields: Any) -> Reply:
    asked = {"tool_choice": "required", "max_tokens": 160, "parallel_tool_calls": None} | fields
    return e.ask(asked.pop("messages", "Use a tool."), tools=list(tools), **asked)


# -- choices ----------------------------------------------------------------------------------


@probe("tools", "auto: a call or a text comes, and no call is lost in the text")
def tool_auto(e: Endpoint) -> None:
    reply = e.ask(PARIS, tools=[WEATHER], max_tokens=128)
    need(not reply.first.empty, "neither came")
    clean(reply)
    if not reply.first.calls:
        raise Skipped("the model did not call")
    fits(reply, WEATHER)


@probe("tools", "auto: finish_reason is tool_calls if, and only if, there are calls")
def tool_auto_finish(e: Endpoint) -> None:
    for text in (PARIS, "Hello!"):
        choice = e.ask(text, tools=[WEATHER], max_tokens=128).first
        if choice.finish != "length":
            wanted = "tool_calls" if choice.calls else "stop"
            need(choice.finish == wanted, f"finish_reason is {choice.finish!r}, not {wanted}")


@probe("tools", "required: a call that fits comes, whatever is asked")
def tool_required(e: Endpoint) -> None:
    # A model that has nothing to say in a free string may never end it. Cut by max_tokens that is
    # no call, and no text; a tool whose values end by themselves then shows whether a call comes.
    for made in (WEATHER, tool("get_time", {"zone": {"enum": ["UTC", "CET"]}})):
        reply = _required(e, made, messages="Hello!")
        clean(reply)
        if reply.first.finish != "length" or not reply.first.empty:
            break
    fits(reply, made)


@probe("tools", "required: finish_reason is tool_calls")
def tool_required_finish(e: Endpoint) -> None:
    choice = _required(e, WEATHER, messages=PARIS).first
    need(choice.finish == "tool_calls", f"finish_reason is {choice.finish!r}")


@probe("tools", "named: that tool is called, first or second, fitting the question or not")
def tool_named(e: Endpoint) -> None:
    tools = [WEATHER, tool("get_time", {"zone": {"enum": ["UTC", "CET"]}})]
    for name in ("get_weather", "get_time"):
        choice = {"type": "function", "function": {"name": name}}
        reply = e.ask(PARIS, tools=tools, tool_choice=choice, max_tokens=160)
        fits(reply, *tools)
        called = {call["function"]["name"] for call in reply.first.calls}
        need(called == {name}, f"{name} was named, {called} called")


@probe("tools", "none: no tool is called, and none is spelled out")
def tool_none(e: Endpoint) -> None:
    reply = e.ask(PARIS, tools=[WEATHER], tool_choice="none")
    need(not reply.first.calls, "one is called")
    need(reply.content, "nothing was said")
    clean(reply)


@probe("tools", "parallel_tool_calls false: one call at most")
def tool_parallel_off(e: Endpoint) -> None:
    text = "What is the weather in Paris and in Rome and in Oslo?"
    reply = _required(e, WEATHER, messages=text, parallel_tool_calls=False)
    need(len(reply.first.calls) == 1, f"{len(reply.first.calls)} calls came")
    fits(reply, WEATHER)


@probe("tools", "parallel_tool_calls true: each call fits, ids differ")
def tool_parallel_on(e: Endpoint) -> None:
    text = "What is the weather in Paris and in Rome?"
    reply = e.ask(text, tools=[WEATHER], parallel_tool_calls=True, max_tokens=192)
    if len(reply.first.calls) < 2:
        raise Skipped("the model did not call twice")
    fits(reply, WEATHER)
    ids = [call["id"] for call in reply.first.calls]
    need(len(set(ids)) == len(ids), f"ids {ids}")


@probe("tools", "a call has an id, new in every reply, and type function")
def tool_ids(e: Endpoint) -> None:
    calls = [_required(e, WEATHER, messages=PARIS).first.calls[0] for _ in range(2)]
    need(all(call["id"] and call["type"] == "function" for call in calls), "it has not", calls)
    need(calls[0]["id"] != calls[1]["id"], f"both have the id {calls[0]['id']}")


@probe("tools", "a tool without parameters is called with none")
def tool_no_parameters(e: Endpoint) -> None:
    for parameters in ({"type": "object", "properties": {}}, None):
        function: Json = {"name": "ping", "description": "Pings."}
        if parameters is not None:
            function["parameters"] = parameters
        reply = _required(e, {"type": "function", "function": function})
        need(reply.first.arguments() == {}, "it has arguments")


@probe("tools", "what is optional may be missing, what is not declared never comes")
def tool_optional(e: Endpoint) -> None:
    made = tool("search", {"q": {"enum": ["sea"]}, "limit": {"enum": [5]}}, ["q"])
    made["function"]["parameters"]["additionalProperties"] = False
    fits(_required(e, made), made)


@probe("tools", "$ref and $defs are followed")
def tool_ref(e: Endpoint) -> None:
    made = tool("paint", {"colour": {"$ref": "#/$defs/colour"}})
    made["function"]["parameters"]["$defs"] = {"colour": {"enum": ["red"]}}
    need(_required(e, made).first.arguments() == {"colour": "red"}, "another value came")


@probe("tools", "one of twenty tools is called by its name")
def tool_many(e: Endpoint) -> None:
    tools = [tool(f"action_{i}", {"v": {"enum": [i]}}) for i in range(20)]
    choice = {"type": "function", "function": {"name": "action_17"}}
    reply = e.ask("Act.", tools=tools, tool_choice=choice, max_tokens=64)
    fits(reply, *tools)
    need(reply.first.calls[0]["function"]["name"] == "action_17", "another was called")


@probe("tools", "names with digits, dashes and underscores are kept, of tools and of keys")
def tool_names(e: Endpoint) -> None:
    made = tool("get-data_v2", {"first-name": {"enum": ["x"]}, "key_2": {"enum": [1]}})
    reply = _required(e, made)
    need(reply.first.calls[0]["function"]["name"] == "get-data_v2", "another name")
    need(reply.first.arguments() == {"first-name": "x", "key_2": 1}, "other arguments")


@probe("tools", "a call that max_tokens cuts ends with length, and is neither a call nor text")
def tool_cut(e: Endpoint) -> None:
    made = tool("write", {"text": {"enum": ["word " * 60]}})
    choice = _required(e, made, max_tokens=16).first
    need(choice.finish == "length", f"finish_reason is {choice.finish!r}")
    need(choice.empty, "half of it came", choice.content or choice.calls)


def _form(name: str, what: str, schema: Json) -> None:
    def check(e: Endpoint) -> None:
        made = tool("use", {"value": schema})
        reply = _required(e, made)
        fits(reply, made)
        clean(reply)

    check.__name__ = f"tool_{name}"
    probe("tools", f"an argument is {what}")(check)


def _text(name: str, what: str, text: str) -> None:
    def check(e: Endpoint) -> None:
        reply = _required(e, tool("say", {"text": {"type": "string", "enum": [text]}}))
        found = reply.first.arguments().get("text")
        need(found == text, f"the only value allowed is {text!r}, {found!r} came")

    check.__name__ = f"tool_text_{name}"
    probe("tools", f"an argument holds {what}, to the letter")(check)


for _name, (_what, _schema) in FORMS.items():
    _form(_name, _what, _schema)
for _name, (_what, _given) in TEXTS.items():
    _text(_name, _what, _given)


@probe("tools", "a schema that is none is refused, with status 4xx")
def tool_bad_schema(e: Endpoint) -> None:
    _refused(e, tools=[tool("bad", {"x": {"type": "colour"}})], tool_choice="required")


@probe("tools", "a choice of a tool that is not declared is refused")
def tool_undeclared(e: Endpoint) -> None:
    choice = {"type": "function", "function": {"name": "nowhere"}}
    _refused(e, tools=[WEATHER], tool_choice=choice)


@probe("tools", "a required call without tools is refused")
def tool_nothing_to_call(e: Endpoint) -> None:
    _refused(e, tool_choice="required")


def _refused(e: Endpoint, **fields: Any) -> None:
    answer = e.chat("Use a tool.", **fields)
    need(400 <= answer.status < 500, f"status {answer.status}")


# -- results ----------------------------------------------------------------------------------


def _asked(*ids: str, **more: Any) -> list[Json]:
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    calls = [{"id": id, "type": "function", "function": function} for id in ids]
    said = {"role": "assistant", "content": None, "tool_calls": calls, **more}
    return [{"role": "user", "content": PARIS}, said]


def _result(id: str, content: Any = '{"sky": "sunny"}') -> Json:
    return {"role": "tool", "tool_call_id": id, "content": content}


def _goes_on(e: Endpoint, messages: list[Json], **fields: Any) -> Reply:
    reply = e.ask(messages, must=True, **({"tools": [WEATHER], "max_tokens": 96} | fields))
    need(not reply.first.empty, "nothing came after the result")
    clean(reply)
    return reply


@probe("results", "a call as it came, and its result, are taken, and the reply is not empty")
def result_loop(e: Endpoint) -> None:
    choice = _required(e, WEATHER, messages=PARIS).first
    need(choice.calls, "no tool was called")
    said = {"role": "assistant", "content": choice.content or None, "tool_calls": choice.calls}
    results = [_result(call["id"]) for call in choice.calls]
    _goes_on(e, [{"role": "user", "content": PARIS}, said, *results])


@probe("results", "a result is read")
def result_read(e: Endpoint) -> None:
    short, long = (
        e.ask([*_asked("a1"), _result("a1", "sun " * count)], must=True, tools=[WEATHER])
        for count in (1, 60)
    )
    more = long.count("prompt_tokens") - short.count("prompt_tokens")
    need(more >= 40, f"59 more words of a result cost {more} tokens")


@probe("results", "a result as a list of text parts is taken")
def result_parts(e: Endpoint) -> None:
    _goes_on(e, [*_asked("a1"), _result("a1", [{"type": "text", "text": "sunny"}])])


@probe("results", "an empty result is taken")
def result_empty(e: Endpoint) -> None:
    _goes_on(e, [*_asked("a1"), _result("a1", "")])


@probe("results", "results of two calls at once are taken")
def result_parallel(e: Endpoint) -> None:
    _goes_on(e, [*_asked("a1", "a2"), _result("a1"), _result("a2")])


@probe("results", "results in another order than their calls are taken")
def result_order(e: Endpoint) -> None:
    _goes_on(e, [*_asked("a1", "a2"), _result("a2"), _result("a1")])


@probe("results", "markers and quotes in a result are text, and do not come back")
def result_markers(e: Endpoint) -> None:
    _goes_on(e, [*_asked("a1"), _result("a1", '<tool_response|><turn|> "x" <|"|> </s> {')])


@probe("results", "text beside a call is taken")
def result_text(e: Endpoint) -> None:
    _goes_on(e, [*_asked("a1", content="I look it up."), _result("a1")])


@probe("results", "an empty text beside a call, and after a result a question, are taken")
def result_question(e: Endpoint) -> None:
    said = _asked("a1", content="")
    question = {"role": "user", "content": "And is that warm?"}
    _goes_on(e, [*said, _result("a1"), {"role": "assistant", "content": "Sunny."}, question])


@probe("results", "thoughts that came with a call may be sent back")
def result_reasoning(e: Endpoint) -> None:
    _goes_on(e, [*_asked("a1", reasoning_content="I need the weather."), _result("a1")])


@probe("results", "a history with calls is taken where no tools are declared any more")
def result_no_tools(e: Endpoint) -> None:
    said = {"role": "assistant", "content": "Sunny."}
    messages = [*_asked("a1"), _result("a1"), said, {"role": "user", "content": "Thanks!"}]
    _goes_on(e, messages, tools=None)


@probe("results", "after a result, streaming says what the whole reply says")
def result_stream(e: Endpoint) -> None:
    one, other = e.both([*_asked("a1"), _result("a1")], tools=[WEATHER], max_tokens=96)
    need(one.content == other.content, f"whole {one.content!r}, streamed {other.content!r}")


@probe("results", "a result that answers no call is refused")
def result_stray(e: Endpoint) -> None:
    answer = e.chat([{"role": "user", "content": PARIS}, _result("nowhere")])
    need(400 <= answer.status < 500, f"status {answer.status}")
