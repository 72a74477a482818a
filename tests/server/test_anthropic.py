"""Anthropic's messages: what the model reads of them, and the events of the stream."""

import json
from typing import Any

import pytest
from tests.server.conftest import CALL, COLD, THOUGHT, WEATHER, events, run, serving, user

from gemsmith.server.anthropic import MessagesRequest, ask_of
from gemsmith.server.errors import ApiError

URL = "/v1/messages"
TOOL = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": WEATHER["function"]["parameters"],
}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "gemma", "max_tokens": 200, "messages": user("Hi"), **fields}


def joined(told: list[Any]) -> dict[str, Any]:
    """The message that the events of a stream make, as a client puts it together."""
    message: dict[str, Any] = {}
    written = ""
    for event in told:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                written = ""
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                written += delta.get("partial_json", "")
                for name in ("text", "thinking", "signature"):
                    if name in delta:
                        block[name] += delta[name]
            case "content_block_stop":
                if message["content"][-1]["type"] == "tool_use":
                    message["content"][-1]["input"] = json.loads(written)
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert told[-1]["type"] == "message_stop"
    return message


def stable(message: dict[str, Any]) -> dict[str, Any]:
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return message | {"id": "", "content": content}


@pytest.mark.parametrize(
    ("script", "kinds", "reason"),
    [
        ("Good day.<turn|>", ["text"], "end_turn"),
        (f"{THOUGHT}So.<turn|>", ["thinking", "text"], "end_turn"),
        (
            f"{THOUGHT}{CALL}{CALL}<|tool_response>",
            ["thinking", "tool_use", "tool_use"],
            "tool_use",
        ),
        (f"Well{CALL}<|tool_response>", ["text", "tool_use"], "tool_use"),
        ("Well<|tool_call>weather Rome<tool_call|><turn|>", ["text"], "end_turn"),
        ("a" * 300, ["text"], "max_tokens"),
    ],
)
def test_a_stream_says_what_the_whole_message_says(says, script, kinds, reason):
    async def scenario():
        async with serving(says(script), config=COLD) as (client, _):
            body = asked(tools=[TOOL])
            whole = (await client.post(URL, json=body)).json()
            told = events((await client.post(URL, json=body | {"stream": True})).text)
            assert stable(joined(told)) == stable(whole)
            assert [block["type"] for block in whole["content"]] == kinds
            assert whole["stop_reason"] == reason
            starts = [e["index"] for e in told if e["type"] == "content_block_start"]
            stops = [e["index"] for e in told if e["type"] == "content_block_stop"]
            assert starts == stops == list(range(len(kinds)))

    run(scenario)


def test_the_stop_sequence_that_ended_a_reply_is_named(says):
    async def scenario():
        async with serving(says(f"{THOUGHT}one two<turn|>")) as (client, _):
            body = asked(stop_sequences=["rain", "zwei", " two"])
            whole = (await client.post(URL, json=body)).json()
            assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", " two")
            assert whole["content"][-1]["text"] == "one"
            whole = (await client.post(URL, json=asked(stop_sequences=["rain"]))).json()
            assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)

    run(scenario)


def test_a_conversation_is_read_as_it_was_sent(says):
    messages = [
        *user("Rain?"),
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {
                    "type": "tool_use",
                    "id": "t1",
                    "name": "weather",
                    "input": {"city": "Rome", "days": 2},
                },
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True, "content": "no net"},
                {"type": "text", "text": "Try."},
            ],
        },
    ]

    async def scenario():
        lm = says("So.<turn|>")
        async with serving(lm) as (client, _):
            body = asked(messages=messages, tools=[TOOL], system="Be kind.")
            answer = await client.post(URL, json=body)
            assert answer.status_code == 200, answer.text
            counted = await client.post(
                f"{URL}/count_tokens",
                json={name: body[name] for name in body if name != "max_tokens"},
            )
            assert counted.json() == {"input_tokens": answer.json()["usage"]["input_tokens"]}
        [prompt] = lm.asked
        assert prompt.startswith("<bos><|turn>system\nBe kind.<|tool>declaration:weather{")
        assert f'{CALL}<|tool_response>response:weather{{value:<|"|>error: no net<|"|>}}' in prompt
        assert "<|turn>user\nTry.<turn|>\n<|turn>model\n" in prompt

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "think", "budget"),
    [
        ({}, False, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True, 1024),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"thinking": {"type": "adaptive"}}, True, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, True, 512),
        ({"output_config": {"effort": "low"}}, False, None),
    ],
)
def test_thinking_is_bounded_as_asked(fields, think, budget):
    ask = ask_of(MessagesRequest.model_validate(asked(**fields)))
    assert (ask.enable_thinking, ask.params.get("thinking_budget")) == (think, budget)


def test_an_image_comes_as_bytes():
    source = {"type": "base64", "media_type": "image/png", "data": "eA=="}
    request = asked(messages=user([{"type": "image", "source": source}]))
    [message] = ask_of(MessagesRequest.model_validate(request)).messages
    [part] = message["content"]
    assert part == {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"max_tokens": None}, "max_tokens"),
        ({"top_k": "x"}, "top_k"),
        ({"messages": user([{"type": "document", "source": {}}])}, "'document' cannot be read"),
        ({"messages": user([{"type": "image", "source": {"type": "file"}}])}, "base64 or url"),
        (
            {"messages": user([{"type": "tool_result", "tool_use_id": "t", "content": "x"}])},
            "answers no call",
        ),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_1"}]}}, "clear_tool_uses_1"),
        ({"context_management": 3}, "context_management"),
        ({"context_management": {"edits": 3}}, "context_management"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(says, fields, words):
    async def scenario():
        async with serving(says("So.<turn|>")) as (client, _):
            answer = await client.post(URL, json=asked(**fields))
            assert answer.status_code == 400, answer.text
            assert answer.json()["type"] == "error"
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert words in answer.json()["error"]["message"]

    run(scenario)


def test_results_of_tools_come_first_in_a_turn():
    result = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
    content = [{"type": "text", "text": "x"}, result]
    request = MessagesRequest.model_validate(asked(messages=user(content)))
    with pytest.raises(ApiError, match="come before everything else"):
        ask_of(request)


def test_what_changes_nothing_is_accepted_as_clients_send_it(says):
    mark = {"cache_control": {"type": "ephemeral"}}
    harmless = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "system": [{"type": "text", "text": "Be kind.", **mark}],
        "tools": [TOOL | mark | {"eager_input_streaming": True}],
        "tool_choice": {"type": "auto"},
        "messages": user([{"type": "text", "text": "Hi", **mark}]),
        "container": None,
    }

    async def scenario():
        async with serving(says("So.<turn|>")) as (client, _):
            answer = await client.post(
                f"{URL}?beta=true",
                json=asked(**harmless),
                headers={"anthropic-version": "2023-06-01", "anthropic-beta": "x"},
            )
            assert answer.status_code == 200, answer.text

    run(scenario)
