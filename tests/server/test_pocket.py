"""The embedded model behind the server: the chat, a call and its answer, with streaming."""

import json
from typing import Any

import openai
import pytest
from tests.server.conftest import on_a_socket, user

from gemsmith.engine.batching import EngineConfig

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


@pytest.mark.slow
def test_pocket_calls_a_tool_and_says_what_it_gave(pocket):
    config = EngineConfig(max_num_seqs=4, max_model_len=1024)
    with (
        on_a_socket(pocket, config) as (url, service),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        messages: list[Any] = user("What is the weather in Paris?")
        cached = []
        for _ in range(2):
            with client.chat.completions.stream(
                model="gemma",
                messages=messages,
                tools=[TOOL],  # pyright: ignore[reportArgumentType]
                temperature=0,
                stream_options={"include_usage": True},
            ) as stream:
                for _ in stream:
                    pass
                made = stream.get_final_completion()
            message = made.choices[0].message
            assert made.usage is not None
            assert made.usage.prompt_tokens_details is not None
            cached.append(made.usage.prompt_tokens_details.cached_tokens)
            messages.append(message.model_dump())
            for call in message.tool_calls or ():
                assert call.function.name == "get_weather"
                assert json.loads(call.function.arguments) == {"city": "Paris"}
                given = '{"temperature": 18, "sky": "sunny"}'
                messages.append({"role": "tool", "tool_call_id": call.id, "content": given})
        assert messages[1]["tool_calls"]
        assert message.content
        assert cached[0] == 0 < (cached[1] or 0)  # the second prompt goes on from the first
        assert service.engine.stats().failed == 0
