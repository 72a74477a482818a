"""OpenAI's responses: what the model reads of the items, and the events of the stream."""

from typing import Any

import pytest
from tests.server.conftest import CALL, COLD, THOUGHT, WEATHER, events, run, serving

from gemsmith.engine.media import Prompt

URL = "/v1/responses"
TOOL = {"type": "function", **WEATHER["function"]}


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "gemma", "input": "Hi", **fields}


def stable(items: list[Any]) -> list[Any]:
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


@pytest.mark.parametrize(
    ("script", "kinds", "status"),
    [
        ("Good day.<turn|>", ["message"], "completed"),
        (f"{THOUGHT}So.<turn|>", ["reasoning", "message"], "completed"),
        (
            f"{THOUGHT}{CALL}{CALL}<|tool_response>",
            ["reasoning", *["function_call"] * 2],
            "completed",
        ),
        ("Well<|tool_call>weather Rome<tool_call|><turn|>", ["message"], "completed"),
        ("a" * 300, ["message"], "incomplete"),
    ],
)
def test_a_stream_says_what_the_whole_response_says(says, script, kinds, status):
    async def scenario():
        async with serving(says(script), config=COLD) as (client, _):
            body = asked(tools=[TOOL], max_output_tokens=200)
            whole = (await client.post(URL, json=body)).json()
            told = events((await client.post(URL, json=body | {"stream": True})).text)
        assert [event["sequence_number"] for event in told] == list(range(len(told)))
        assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
        assert told[0]["response"]["output"] == []
        last = told[-1]
        assert last["type"] == f"response.{status}"
        assert [item["type"] for item in whole["output"]] == kinds
        assert whole["status"] == status
        assert stable(last["response"]["output"]) == stable(whole["output"])
        assert last["response"]["usage"] == whole["usage"]
        done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
        assert done == last["response"]["output"]
        for index, item in enumerate(done):
            mine = [event for event in told if event.get("output_index") == index]
            written = "".join(event["delta"] for event in mine if "delta" in event)
            said = item["arguments"] if "arguments" in item else item["content"][0]["text"]
            assert written == said
            assert mine[0]["type"] == "response.output_item.added"
            assert mine[0]["item"].get("content", []) == []

    run(scenario)


def test_items_are_read_as_they_were_sent(says):
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        {
            "type": "reasoning",
            "id": "rs",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {
            "type": "function_call",
            "call_id": "c",
            "name": "weather",
            "arguments": '{"city": "Rome", "days": 2}',
        },
        {"type": "function_call_output", "call_id": "c", "output": "dry"},
    ]

    async def scenario():
        lm = says("So.<turn|>")
        async with serving(lm) as (client, _):
            answer = await client.post(URL, json=asked(input=items, tools=[TOOL], store=False))
            assert answer.status_code == 200, answer.text
        [prompt] = lm.asked
        assert prompt.startswith("<bos><|turn>system\nBe kind.<|tool>declaration:weather{")
        assert (
            "<|turn>user\nRain?<turn|>\n<|turn>model\n<|channel>thought\nhm\n<channel|>"
            f'{CALL}<|tool_response>response:weather{{value:<|"|>dry<|"|>}}<tool_response|>'
        ) in prompt

    run(scenario)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
            "input.0.function.arguments",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input.0.content.0.type",
        ),
        ({"input": 5}, "input"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(says, fields, param):
    async def scenario():
        async with serving(says("So.<turn|>")) as (client, _):
            answer = await client.post(URL, json=asked(**fields))
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"].startswith(param)

    run(scenario)


def test_a_reply_that_fails_midway_ends_its_stream_with_an_event(says):
    async def scenario():
        async with serving(says("FAIL")) as (client, _):
            told = events((await client.post(URL, json=asked(stream=True))).text)
            assert told[-1]["type"] == "response.failed"
            assert told[-1]["response"]["error"]["code"] == "server_error"

    run(scenario)


def test_what_of_the_media_could_not_be_read_is_said(says, monkeypatch):
    monkeypatch.setattr(Prompt, "notes", lambda _: ("the film ends at 3 s",))

    async def scenario():
        async with serving(says("Well.<turn|>"), config=COLD) as (client, _):
            whole = (await client.post(URL, json=asked())).json()
            told = events((await client.post(URL, json=asked(stream=True))).text)
        assert whole["notes"] == told[-1]["response"]["notes"] == ["the film ends at 3 s"]

    run(scenario)
