"""Thoughts in their own field, and answers held to a JSON schema, with and without them."""

import json
from typing import Any

from gemsmith.evals.conformance import probe
from gemsmith.evals.endpoint import Endpoint, Failed, Json, Reply, Skipped, clean, need, parsed
from gemsmith.evals.probes.chat import WEATHER
from gemsmith.evals.probes.tools import fits
from gemsmith.text.calls import ToolCall
from gemsmith.text.tools import validate_arguments

QUESTION = "A train leaves at 9:40 and takes 35 minutes. When does it arrive?"


def _thought(e: Endpoint, messages: Any = QUESTION, **fields: Any) -> Reply:
    reply = e.thought(messages, **fields)
    clean(reply)
    return reply


@probe("thinking", "with effort none there are no thoughts, in no field")
def thinking_off(e: Endpoint) -> None:
    reply = e.ask(QUESTION, reasoning_effort="none", max_tokens=96)
    need(not reply.first.reasoning, "there are", reply.first.reasoning)
    clean(reply)


@probe("thinking", "not asked for and short of tokens, markers show nowhere")
def thinking_default(e: Endpoint) -> None:
    for most in (1, 3, 24):
        clean(e.ask(QUESTION, max_tokens=most))


@probe("thinking", "thoughts have a field of their own; no marker shows")
def thinking_apart(e: Endpoint) -> None:
    reply = _thought(e)
    if not reply.first.reasoning:
        raise Skipped("the model did not think here")
    start = reply.first.reasoning.strip()[:40]
    need(start not in reply.content, "the thought stands in content, too", reply.content)


@probe("thinking", "a reply that ends by itself has an answer after the thought")
def thinking_answers(e: Endpoint) -> None:
    choice = _thought(e).first
    need(choice.finish != "stop" or choice.content.strip(), "finish_reason stop, and no answer")


@probe("thinking", "cut off inside a thought, the thought is no answer, and length is the reason")
def thinking_cut(e: Endpoint) -> None:
    for most in (1, 2, 4, 8):
        choice = _thought(e, max_tokens=most).first
        need(choice.finish in ("length", "stop"), f"finish_reason is {choice.finish!r}")
        need(not choice.content.lstrip().startswith("thought\n"), "the thought's header shows")


@probe("thinking", "streamed piece by piece, no marker shows, not even its beginning")
def thinking_streamed(e: Endpoint) -> None:
    choice = _thought(e, stream=True).first
    for text in (choice.content, choice.reasoning):
        for end in ("<|", "<chan", "<|chan", "<turn"):
            need(not text.endswith(end), f"it ends with {end!r}", text)


@probe("thinking", "thoughts count as completion tokens, and are told apart")
def thinking_usage(e: Endpoint) -> None:
    reply = _thought(e)
    told = reply.detail("completion_tokens_details", "reasoning_tokens")
    if told is None or not reply.first.reasoning:
        raise Skipped("no thought, or reasoning_tokens are not told")
    need(0 < told <= reply.count("completion_tokens"), "of completion_tokens", reply.usage)


@probe("thinking", "a call after a thought fits its schema, and leaves no marker")
def thinking_call(e: Endpoint) -> None:
    reply = _thought(e, "The weather in Paris?", tools=[WEATHER], tool_choice="required")
    if reply.first.finish == "length":
        raise Skipped("the thought took all tokens")
    fits(reply, WEATHER)


@probe("thinking", "after a result: no thought leaks into the answer, and there is one")
def thinking_result(e: Endpoint) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    messages = [
        {"role": "user", "content": "The weather in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "The tool knows.",
            "tool_calls": [{"id": "a1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "a1", "content": "sunny, 18 degrees"},
    ]
    choice = _thought(e, messages, tools=[WEATHER]).first
    need(choice.finish == "length" or not choice.empty, "neither text nor call came")


@probe("thinking", "thoughts of earlier turns may be sent back, and cost less than they hold")
def thinking_history(e: Endpoint) -> None:
    def costs(thought: str) -> int:
        said = {"role": "assistant", "content": "10:15.", "reasoning_content": thought}
        messages = [
            {"role": "user", "content": QUESTION}, said, {"role": "user", "content": "Thanks."},
        ]  # fmt: skip
        return e.ask(messages, must=True, max_tokens=2).count("prompt_tokens")

    more = costs("nine forty and so on " * 20) - costs("so")
    need(more < 20, f"a thought of an earlier turn costs {more} tokens; it should be left out")


# -- JSON -------------------------------------------------------------------------------------

PERSON: Json = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["child", "adult"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
}


def _format(schema: Json) -> Json:
    named = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": named}


def _object(reply: Reply, schema: Json = PERSON) -> Json:
    choice = reply.first
    if choice.finish == "length":
        raise Skipped("the answer was cut by max_tokens")
    made = parsed(choice.content.encode("utf-8", "replace"))
    need(isinstance(made, dict), "it is no object", choice.content)
    tool = {"type": "function", "function": {"name": "answer", "parameters": schema}}
    for problem in validate_arguments(ToolCall("answer", made), tool):
        raise Failed(f"it does not fit the schema: {problem.message}", choice.content)
    clean(reply)
    return made


@probe("json", "json_schema: the answer is JSON that fits, and nothing else")
def json_schema(e: Endpoint) -> None:
    _object(e.ask("Who is it?", response_format=_format(PERSON), max_tokens=800))


@probe("json", "json_schema: the only value allowed comes to the letter")
def json_exact(e: Endpoint) -> None:
    text = 'He said: "caf\u00e9\\bar"\n\N{ROCKET}'
    schema = {"type": "object", "properties": {"t": {"type": "string", "enum": [text]}},
              "required": ["t"], "additionalProperties": False}  # fmt: skip
    made = _object(e.ask("Say it.", response_format=_format(schema), max_tokens=800), schema)
    need(made["t"] == text, f"{text!r} is the only value allowed")


@probe("json", "json_schema: objects in arrays in objects fit")
def json_nested(e: Endpoint) -> None:
    item = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "ok": {"type": "boolean"}},
            "required": ["n", "ok"], "additionalProperties": False}  # fmt: skip
    schema = {"type": "object", "required": ["items"], "additionalProperties": False,
              "properties": {"items": {"type": "array", "items": item, "minItems": 2,
                                       "maxItems": 2}}}  # fmt: skip
    _object(e.ask("List two.", response_format=_format(schema), max_tokens=800), schema)


@probe("json", "json_schema with thinking: the thought is free, the answer fits")
def json_thinking(e: Endpoint) -> None:
    reply = e.thought("Who is it?", response_format=_format(PERSON), max_tokens=900)
    _object(reply)


@probe("json", "json_schema with thinking, streamed: the answer begins with its brace")
def json_thinking_streamed(e: Endpoint) -> None:
    reply = e.thought("Who is it?", response_format=_format(PERSON), max_tokens=900, stream=True)
    _object(reply)
    need(reply.content.lstrip().startswith("{"), "it begins with something else", reply.content)


@probe("json", "json_object: the answer is a JSON object")
def json_object(e: Endpoint) -> None:
    asked = {"type": "json_object"}
    choice = e.ask("Answer as JSON: is it day?", response_format=asked, max_tokens=256).first
    if choice.finish == "length":
        raise Skipped("the answer was cut by max_tokens")
    need(isinstance(parsed(choice.content.encode()), dict), "it is no object", choice.content)


@probe("json", "text: the format that is none changes nothing")
def json_text(e: Endpoint) -> None:
    one = e.ask("Hello!")
    other = e.ask("Hello!", response_format={"type": "text"})
    need(one.content == other.content, f"{one.content!r} became {other.content!r}")


@probe("json", "an answer that max_tokens cuts says length")
def json_cut(e: Endpoint) -> None:
    choice = e.ask("Who is it?", response_format=_format(PERSON), max_tokens=3).first
    need(choice.finish == "length", f"finish_reason is {choice.finish!r}")


@probe("json", "a schema that is none, and a format that is unknown, are refused")
def json_refused(e: Endpoint) -> None:
    for asked in (_format({"type": "colour"}), {"type": "verse"}):
        answer = e.chat("Who is it?", response_format=asked)
        need(400 <= answer.status < 500, f"status {answer.status} for {json.dumps(asked)}")
