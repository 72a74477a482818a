"""OpenAI's chat completions and completions."""

import json
from typing import Any

import pytest
from pydantic import ValidationError
from tests.server.conftest import CALL, COLD, THOUGHT, WEATHER, events, run, serving, user

from gemsmith.engine.engine import LM
from gemsmith.server.chat import ask_of
from gemsmith.server.errors import ApiError
from gemsmith.server.protocol import ChatRequest, CompletionRequest

URL = "/v1/chat/completions"


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "gemma", "messages": user("Hi"), **fields}


def joined(chunks: list[Any], index: int = 0) -> tuple[dict[str, Any], list[str]]:
    """The message that the deltas of a choice make, and its finish reasons."""
    message: dict[str, Any] = {}
    reasons = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            if choice["finish_reason"]:
                reasons.append(choice["finish_reason"])
            for name, value in choice["delta"].items():
                if isinstance(value, str):
                    message[name] = message.get(name, "") + value
                else:
                    message.setdefault(name, []).extend(value)
    return message, reasons


SCRIPTS = {
    "text": ("Good day.<turn|>", "stop"),
    "thought": (f"{THOUGHT}It is.<turn|>", "stop"),
    "call": (f"Let me see.{CALL}<|tool_response>", "tool_calls"),
    "calls": (f"{THOUGHT}{CALL}{CALL}<|tool_response>", "tool_calls"),
    "broken call": ("Well<|tool_call>weather city Rome<tool_call|><turn|>", "stop"),
    "cut call": ("<|tool_call>call:weather{city:<turn|>", "stop"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stream_says_what_the_whole_answer_says(says, name):
    script, reason = SCRIPTS[name]

    async def scenario():
        async with serving(says(script), config=COLD) as (client, _):
            body = asked(tools=[WEATHER], stream_options={"include_usage": True})
            whole = (await client.post(URL, json=body)).json()
            answer = await client.post(URL, json=body | {"stream": True})
            chunks = events(answer.text)
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.text.endswith("data: [DONE]\n\n")
            message, reasons = joined(chunks)
            [choice] = whole["choices"]
            assert reasons == [choice["finish_reason"]] == [reason]
            for call in [*message.get("tool_calls", []), *choice["message"].get("tool_calls", [])]:
                assert call.pop("id").startswith("call_")
                call.pop("index", None)
            assert {k: v for k, v in message.items() if v} == {
                k: v for k, v in choice["message"].items() if v
            }
            assert chunks[-1]["usage"] == whole["usage"]
            assert chunks[-1]["choices"] == []

    run(scenario)


def test_a_call_comes_with_its_arguments_as_json(says):
    async def scenario():
        async with serving(says(SCRIPTS["calls"][0])) as (client, _):
            [choice] = (await client.post(URL, json=asked(tools=[WEATHER]))).json()["choices"]
            message = choice["message"]
            assert message["reasoning_content"] == "rain?"
            assert message["content"] is None
            assert len({call["id"] for call in message["tool_calls"]}) == 2
            for call in message["tool_calls"]:
                assert call["function"]["name"] == "weather"
                assert json.loads(call["function"]["arguments"]) == {"city": "Rome", "days": 2}

    run(scenario)


def test_what_is_no_call_is_neither_lost_nor_silent(says):
    async def scenario():
        async with serving(says(SCRIPTS["broken call"][0])) as (client, _):
            [choice] = (await client.post(URL, json=asked(tools=[WEATHER]))).json()["choices"]
            message = choice["message"]
            assert message["content"] == "Well weather city Rome "
            [told] = message["tool_problems"]
            assert told["kind"] == "malformed"
            assert told["raw"] == "<|tool_call>weather city Rome<tool_call|>"

    run(scenario)


def test_a_stray_mark_is_told_and_is_no_text(says):
    async def scenario():
        async with serving(says("Well<tool_call|> then.<turn|>")) as (client, _):
            [choice] = (await client.post(URL, json=asked())).json()["choices"]
            message = choice["message"]
            assert message["content"] == "Well then."
            [told] = message["tool_problems"]
            assert told["raw"] == "<tool_call|>"

    run(scenario)


def test_a_conversation_is_read_as_it_was_sent(says):
    """A tool loop as the OpenAI client sends it back reaches the model in the official format."""
    call = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *user([{"type": "text", "text": "Rain?"}]),
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "reasoning_content": "hm",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]

    async def scenario():
        lm = says("Sunny.<turn|>")
        async with serving(lm) as (client, _):
            answer = await client.post(URL, json=asked(messages=messages, tools=[WEATHER]))
            assert answer.status_code == 200, answer.text
        [prompt] = lm.asked
        assert "<|turn>system\nBe brief.<|tool>declaration:weather{" in prompt
        assert (
            "<|turn>user\nRain?<turn|>\n<|turn>model\n<|channel>thought\nhm\n<channel|>"
            f'{CALL}<|tool_response>response:weather{{value:<|"|>sunny<|"|>}}<tool_response|>'
        ) in prompt

    run(scenario)


def test_replies_share_the_cost_of_their_prompt(says):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            one = (await client.post(URL, json=asked())).json()
            body = asked(n=3, stream_options={"include_usage": True})
            three = (await client.post(URL, json=body)).json()
            chunks = events((await client.post(URL, json=body | {"stream": True})).text)
            assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
            assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
            assert three["usage"]["completion_tokens"] == 3 * one["usage"]["completion_tokens"]
            assert chunks[-1]["usage"]["total_tokens"] == three["usage"]["total_tokens"]
            for index in range(3):
                assert joined(chunks, index)[0]["content"] == "Yes."

    run(scenario)


def test_log_probabilities_have_an_entry_a_token(says):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            body = asked(logprobs=True, top_logprobs=2)
            whole = (await client.post(URL, json=body)).json()
            [choice] = whole["choices"]
            entries = choice["logprobs"]["content"]
            assert len(entries) == whole["usage"]["completion_tokens"]
            assert "".join(entry["token"] for entry in entries) == "Yes.<turn|>"
            assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
            assert entries[0]["top_logprobs"][0]["token"] == "Y"
            chunks = events((await client.post(URL, json=body | {"stream": True})).text)
            told = [c["choices"][0].get("logprobs") for c in chunks]
            assert [t for t in told if t] == [choice["logprobs"]]

    run(scenario)


def test_a_stop_string_and_a_length_end_a_reply(says):
    async def scenario():
        async with serving(says("one two three<turn|>")) as (client, _):
            stopped = (await client.post(URL, json=asked(stop=" three"))).json()["choices"][0]
            assert (stopped["message"]["content"], stopped["finish_reason"]) == ("one two", "stop")
            for name in ("max_tokens", "max_completion_tokens"):
                cut = (await client.post(URL, json=asked(**{name: 3}))).json()["choices"][0]
                assert (cut["message"]["content"], cut["finish_reason"]) == ("one", "length")

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 3}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": []}, "functions"),
        ({"verbosity": "low"}, "verbosity"),
        ({"store": True}, "store"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning_effort": "a bit"}, "reasoning_effort"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": user([{"type": "file", "file": {}}])}, "messages.0.content.0.type"),
        (
            {"messages": user([{"type": "image", "image": "/etc/passwd"}])},
            "messages.0.content.0.type",
        ),
        (
            {"messages": user([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}])},
            "messages.0.content.0.image_url",
        ),
        (
            {"messages": user([{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}])},
            "messages.0.content.0.image_url",
        ),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages.0"),
        ({"chat_template_kwargs": {"think": True}}, "chat_template_kwargs.think"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(says, fields, param):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, service):
            answer = await client.post(URL, json=asked(**fields))
            error = answer.json()["error"]
            assert answer.status_code == 400
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param
            assert param in error["message"]
            assert service.engine.stats().steps == 0

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"top_p": 7}, "top_p 7"),
        ({"messages": []}, "no messages"),
        ({"stop": ["x"] * 65}, "stop: 65 texts"),
        ({"messages": user("\ud800")}, "surrogate"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 3}}}]},
            "f",
        ),
        (
            {
                "messages": user(
                    [{"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}]
                )
            },
            "takes no images",
        ),
    ],
)
def test_what_the_engine_refuses_is_the_clients_error(says, fields, words):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.post(
                URL,
                content=json.dumps(asked(**fields)),
                headers={"content-type": "application/json"},
            )
            assert answer.status_code == 400, answer.text
            assert words in answer.json()["error"]["message"]

    run(scenario)


def test_what_changes_nothing_is_accepted_as_clients_send_it(says):
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "modalities": ["text"],
        "functions": None,
        "unknown": None,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }

    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.post(URL, json=asked(**harmless))
            assert answer.status_code == 200, answer.text

    run(scenario)


@pytest.mark.parametrize("body", ["{", "[]", "3", '"x"', "", '{"model": NaN}', "[" * 100_000])
def test_a_body_that_is_no_request_is_the_clients_error(says, body):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.post(
                URL, content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"
            form = await client.post(URL, content="{}", headers={"content-type": "text/plain"})
            assert form.status_code == 400  # a page elsewhere can send no more than this

    run(scenario)


def test_another_model_is_not_found(says):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.post(URL, json=asked(model="gpt-9"))
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "gemma"
            assert (await client.get("/v1/models/gemma")).json()["max_model_len"] == 3000

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "think", "budget"),
    [
        ({}, False, None),
        ({"reasoning_effort": "none"}, False, None),
        ({"reasoning_effort": "low"}, True, 512),
        ({"reasoning_effort": "max"}, True, None),
        ({"reasoning_effort": "high", "thinking_budget": 7}, True, 7),
        ({"thinking_budget": 9}, True, 9),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, None),
    ],
)
def test_words_and_numbers_bound_the_thought(fields, think, budget):
    ask = ask_of(ChatRequest.model_validate(asked(**fields)))
    assert (ask.enable_thinking, ask.params.get("thinking_budget")) == (think, budget)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        (["call"], None),
        (["call", "answer"], None),
        (["call", "answer", "answer"], "answers no call"),
        (["call", "user"], "has no answer"),
        (["answer"], "answers no call"),
    ],
)
def test_calls_and_answers_must_match(turns, words):
    made = {
        "user": {"role": "user", "content": "x"},
        "call": {
            "role": "assistant",
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
        },
        "answer": {"role": "tool", "tool_call_id": "c", "content": "1"},
    }
    request = ChatRequest.model_validate(
        asked(messages=[made["user"], *(made[turn] for turn in turns)])
    )
    if words is None:
        ask_of(request)
        return
    with pytest.raises(ApiError, match=words):
        ask_of(request)


def test_a_text_is_gone_on_with(says):
    async def scenario():
        lm = says("de")
        async with serving(lm) as (client, _):
            body = {"model": "gemma", "prompt": ["abc", "xyz"], "n": 2, "max_tokens": 2}
            whole = (await client.post("/v1/completions", json=body)).json()
            assert [choice["text"] for choice in whole["choices"]] == ["de"] * 4
            assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
            assert lm.asked == ["<bos>abc"] * 2 + ["<bos>xyz"] * 2
            assert whole["usage"]["prompt_tokens"] == 8
            assert whole["usage"]["completion_tokens"] == 8
            streamed = await client.post("/v1/completions", json=body | {"stream": True})
            chunks = [chunk["choices"][0] for chunk in events(streamed.text)]
            for index in range(4):
                texts = [chunk["text"] for chunk in chunks if chunk["index"] == index]
                assert "".join(texts) == "de"
            ids = {"model": "gemma", "prompt": [2, 40, 41], "max_tokens": 1}
            assert (await client.post("/v1/completions", json=ids)).status_code == 200
            for bad in ([], [[]], [-1], [10**9]):
                answer = await client.post("/v1/completions", json=ids | {"prompt": bad})
                assert answer.status_code == 400, bad
            answer = await client.post("/v1/completions", json=ids | {"echo": True})
            assert answer.json()["error"]["param"] == "echo"

    run(scenario)


def test_a_seed_gives_the_same_replies_again_and_each_choice_its_own(tiny):
    lm = LM(tiny.model, tiny.tokenizer, tiny.config, end_ids=tiny.end_ids, kv="float32")

    async def scenario():
        async with serving(lm) as (client, _):
            body = asked(n=2, seed=7, temperature=1.0, max_tokens=12)
            made = []
            for _ in range(2):
                choices = (await client.post(URL, json=body)).json()["choices"]
                made.append([choice["message"] for choice in choices])
            assert made[0] == made[1]
            assert made[0][0] != made[0][1]

    run(scenario)


def test_tools_that_may_not_be_called_are_not_shown(says):
    async def scenario():
        lm = says("Yes.<turn|>")
        async with serving(lm) as (client, _):
            for choice in ("auto", "none"):
                await client.post(URL, json=asked(tools=[WEATHER], tool_choice=choice))
        shown, hidden = lm.asked
        assert "declaration:weather" in shown
        assert "weather" not in hidden

    run(scenario)


def test_a_name_that_no_call_can_hold_is_refused_whatever_the_choice(says):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            named = {"type": "function", "function": {"name": "the weather"}}
            for choice in ("none", "auto", "required", named):
                body = asked(tools=[WEATHER, named], tool_choice=choice)
                answer = await client.post(URL, json=body)
                assert answer.status_code == 400, choice
                message = answer.json()["error"]["message"]
                assert message.startswith("the tool's name 'the weather' cannot be written in a c")

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "no tool is declared"),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "tools": [WEATHER],
            },
            "no tool 'f' is declared",
        ),
    ],
)
def test_a_choice_among_tools_that_are_not_there_is_refused(says, fields, words):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.post(URL, json=asked(**fields))
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]

    run(scenario)


def test_replies_are_held_to_tools_and_formats(tiny):
    """A random model, which by itself writes neither JSON nor calls."""
    lm = LM(tiny.model, tiny.tokenizer, tiny.config, end_ids=tiny.end_ids, kv="float32")
    units = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    units["additionalProperties"] = False
    tool = {"type": "function", "function": {"name": "units", "parameters": units}}
    schema = {"type": "json_schema", "json_schema": {"name": "units", "schema": units}}
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}

    async def scenario():
        async with serving(lm) as (client, _):
            answer = await client.post(URL, json=asked(**forced, max_tokens=200))
            choice = answer.json()["choices"][0]
            [call] = choice["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"])["unit"] in ("C", "F")
            assert choice["finish_reason"] == "tool_calls"
            answer = await client.post(URL, json=asked(response_format=schema, max_tokens=200))
            content = answer.json()["choices"][0]["message"]["content"]
            assert json.loads(content)["unit"] in ("C", "F")
            pattern = {**units, "properties": {"unit": {"type": "string", "pattern": "(?=C)"}}}
            tool["function"]["parameters"] = pattern
            answer = await client.post(URL, json=asked(tools=[tool]))
            assert answer.status_code == 400
            assert "parameters.unit" in answer.json()["error"]["message"]

    run(scenario)


def test_of_a_long_prompt_of_the_wrong_kind_one_token_is_told():
    ids: list[Any] = [*range(1000), "no id", *range(1000)]
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"model": "m", "prompt": ids})
    assert caught.value.error_count() <= 4  # one for each thing that it might have been
