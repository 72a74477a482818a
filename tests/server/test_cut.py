"""A reply that max_tokens cut, in every protocol: of what was not finished no marker shows as text,
and a call that was not finished is none."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tests.server import test_anthropic as anthropic
from tests.server import test_chat as chat
from tests.server import test_responses as responses
from tests.server.conftest import SMALL, events, run, serving

OPEN = "<|channel>thought\n"
SHORT = OPEN + 'hm\n<channel|>So.<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
SCRIPT = SHORT + "<|tool_call>call:g{b:1}<tool_call|>"
MARKER_BEGUN = re.compile(r"<[|\w]+$")
"""The beginning of a marker at the end, in letters; of a `<` alone nobody can tell."""
SHOWN = tuple[str, str, list[str], str]
"""Text, thought, names of calls, and why it ended."""


def of_message(message: dict[str, Any], reason: str) -> SHOWN:
    names = [call["function"]["name"] for call in message.get("tool_calls", ())]
    return message.get("content") or "", message.get("reasoning_content", ""), names, reason


def of_blocks(message: dict[str, Any]) -> SHOWN:
    blocks = message["content"]
    text, thought = (
        "".join(block[kind] for block in blocks if block["type"] == kind)
        for kind in ("text", "thinking")
    )
    names = [block["name"] for block in blocks if block["type"] == "tool_use"]
    return text, thought, names, message["stop_reason"]


def of_items(response: dict[str, Any]) -> SHOWN:
    text, thought = (
        "".join(item["content"][0]["text"] for item in response["output"] if item["type"] == kind)
        for kind in ("message", "reasoning")
    )
    names = [item["name"] for item in response["output"] if item["type"] == "function_call"]
    return text, thought, names, response["status"]


def of_chunks(chunks: list[Any]) -> SHOWN:
    message, [reason] = chat.joined(chunks)
    return of_message(message, reason)


@dataclass(frozen=True)
class Protocol:
    url: str
    asked: Callable[..., dict[str, Any]]
    limit: str
    """What max_tokens is called."""
    cut: str
    """How it is told that it was reached."""
    whole: Callable[[Any], SHOWN]
    streamed: Callable[[list[Any]], SHOWN]


PROTOCOLS = {
    "chat": Protocol(
        chat.URL,
        chat.asked,
        "max_tokens",
        "length",
        lambda reply: of_message(
            reply["choices"][0]["message"], reply["choices"][0]["finish_reason"]
        ),
        of_chunks,
    ),
    "messages": Protocol(
        anthropic.URL,
        anthropic.asked,
        "max_tokens",
        "max_tokens",
        of_blocks,
        lambda told: of_blocks(anthropic.joined(told)),
    ),
    "responses": Protocol(
        responses.URL,
        responses.asked,
        "max_output_tokens",
        "incomplete",
        of_items,
        lambda told: of_items(told[-1]["response"]),
    ),
}


@pytest.mark.parametrize("spelled", [False, True], ids=["markers", "letters"])
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_of_what_was_not_finished_nothing_shows(says, protocol, spelled):
    """Cut at every token, whole and streamed; a call is finished with its last bracket. The same of
    markers that the model wrote in letters."""
    lm = says("")
    parts = [(SHORT if spelled else SCRIPT, not spelled), ("<turn|>", True)]
    script = lm.tokenizer.encode_parts(parts)
    says(lambda _: script)
    tokens = [lm.tokenizer.decode([id]) for id in script[:-1]]
    cuts = [end for end in range(1, len(script)) if tokens[end - 1] != "<"]
    config = replace(SMALL, max_num_seqs=8, queue_limit=len(tokens))

    def expected(written: str) -> SHOWN:
        written = MARKER_BEGUN.sub("", written)
        thought, closed, said = written.partition("<channel|>")
        if not closed:
            return "", thought[len(OPEN) :], [], protocol.cut
        names = ["f", "g"][: said.count("}")]
        return said.partition("<|tool_call>")[0], "hm", names, protocol.cut

    async def scenario():
        async with serving(lm, config=config) as (client, _):

            async def check(most: int) -> None:
                body = protocol.asked(**{protocol.limit: most})
                whole = (await client.post(protocol.url, json=body)).json()
                stream = await client.post(protocol.url, json=body | {"stream": True})
                shown = expected("".join(tokens[:most]))
                assert protocol.whole(whole) == shown, most
                assert protocol.streamed(events(stream.text)) == shown, most

            await asyncio.gather(*map(check, cuts))

    run(scenario)
