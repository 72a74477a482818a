"""Sampling parameters: their ranges, and how single ones are changed."""

from dataclasses import fields

import pytest

from gemsmith.engine.request import FinishReason, Generation, SamplingParams, Usage
from gemsmith.errors import RequestError
from gemsmith.text.calls import ToolCall

BAD = {
    "temperature -1: must be 0 \\(greedy\\) or a number from 1e-06 to 100": {"temperature": -1},
    "temperature 1e-07: must be 0": {"temperature": 1e-7},
    "temperature nan: must be 0": {"temperature": float("nan")},
    "temperature False: must be 0": {"temperature": False},
    "temperature '1': must be 0": {"temperature": "1"},
    "repetition_penalty 0: must be a number from 0.01 to 100": {"repetition_penalty": 0},
    "top_k -1: must be a whole number from 0 to 2147483648": {"top_k": -1},
    "top_k 2.5: must be a whole number": {"top_k": 2.5},
    "top_p -1: must be a number from 0 to 1": {"top_p": -1},
    "top_p 1.5: must be a number": {"top_p": 1.5},
    "min_p -0.1: must be a number from 0 to 1": {"min_p": -0.1},
    "seed -1: must be a whole number from 0 to 9223372036854775807": {"seed": -1},
    "max_tokens 0: must be a whole number from 1 to": {"max_tokens": 0},
    "max_tokens True: must be a whole number": {"max_tokens": True},
    "logprobs 65: must be a whole number from 0 to 64": {"logprobs": 65},
    "thinking_budget -1: must be a whole number from 0": {"thinking_budget": -1},
    "ignore_eos 1: must be true or false": {"ignore_eos": 1},
    "stop \\(''\\,\\): must be a text or a list of non-empty texts": {"stop": ("",)},
    "stop 3: must be a text or a list": {"stop": 3},
    "stop \\['a', 3\\]: must be a text or a list": {"stop": ["a", 3]},
    "stop: 65 texts, the longest of 2 characters; at most 64 of at most 1024": {
        "stop": [f"{i:02}" for i in range(65)]
    },
    "stop: 1 texts, the longest of 1025 characters; at most 64": {"stop": "x" * 1025},
}


@pytest.mark.parametrize("text", BAD)
def test_values_outside_their_range_are_refused_by_name(text):
    with pytest.raises(RequestError, match=f"^{text}"):
        SamplingParams(**BAD[text])


def test_every_parameter_is_checked():
    given = {name for bad in BAD.values() for name in bad}
    assert given == {spec.name for spec in fields(SamplingParams)}


def test_one_stop_string_may_stand_alone():
    assert SamplingParams().changed(stop="END").stop == ("END",)
    assert SamplingParams().changed(stop=["a", "b"]).stop == ("a", "b")


def test_changing_keeps_the_other_parameters():
    params = SamplingParams(top_k=5, stop=("x",)).changed(temperature=0, max_tokens=3)
    assert params == SamplingParams(top_k=5, stop=("x",), temperature=0, max_tokens=3)


def test_an_unknown_parameter_is_refused_with_near_matches():
    with pytest.raises(
        RequestError,
        match="no sampling parameter 'max_token'; did you mean max_tokens\\? known are repet",
    ):
        SamplingParams().changed(max_token=3)


def test_a_changed_parameter_is_checked():
    with pytest.raises(RequestError, match="top_p 7"):
        SamplingParams().changed(top_p=7)


def test_speeds_count_computed_prompt_tokens_and_tokens_after_the_first():
    usage = Usage(
        prompt_tokens=110,
        cached_tokens=10,
        completion_tokens=31,
        thinking_tokens=0,
        time_to_first_token_s=0.5,
        total_s=2.0,
    )
    assert usage.prefill_tokens_per_s == 200
    assert usage.decode_tokens_per_s == 20


def test_a_reply_becomes_a_message_that_the_chat_format_reads():
    from gemsmith.text import chat

    usage = Usage(
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=1,
        thinking_tokens=0,
        time_to_first_token_s=0.0,
        total_s=0.0,
    )
    reply = Generation(
        text="",
        thinking="Look it up.",
        tool_calls=(ToolCall("find", {"x": 1}), ToolCall("find", {"x": 2})),
        finish_reason=FinishReason.TOOL_CALLS,
        usage=usage,
    )
    calls = reply.message["tool_calls"]
    answers = [
        {"role": "tool", "tool_call_id": call["id"], "content": str(i)}
        for i, call in enumerate(calls)
    ]
    text = chat.render([{"role": "user", "content": "Go"}, reply.message, *answers])
    assert text.endswith(
        "<|channel>thought\nLook it up.\n<channel|>"
        "<|tool_call>call:find{x:1}<tool_call|><|tool_call>call:find{x:2}<tool_call|>"
        '<|tool_response>response:find{value:<|"|>0<|"|>}<tool_response|>'
        '<|tool_response>response:find{value:<|"|>1<|"|>}<tool_response|>'
    )
