"""What a reply ends with, keeps to itself and tells: scripted ones, token by token."""

from itertools import groupby

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.engine.conftest import short_context

from gemsmith.engine.request import Finished, FinishReason
from gemsmith.text.calls import ToolCall
from gemsmith.text.stream import Content, Thinking, ToolCallEvent


def test_events_come_in_order_and_end_with_the_usage(scripted):
    lm = scripted(f"<|channel>thought\nWhy\n<channel|>Né.{CALL}<|tool_response>")
    events = list(lm.stream("Hello"))
    kinds = [kind for kind, _ in groupby(type(event) for event in events)]
    assert kinds == [Thinking, Content, ToolCallEvent, Finished]
    assert [event.text for event in events if isinstance(event, Content)] == ["N", "é", "."]
    usage = events[-1].usage
    assert usage.completion_tokens == len(lm.model.script)
    assert usage.thinking_tokens == len("Why\n")
    assert 0 < usage.time_to_first_token_s <= usage.total_s


# -- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["<eos>", "<turn|>", "<|tool_response>"])
def test_every_end_token_ends_the_reply_unseen(scripted, end):
    lm = scripted(f"Good day.{end}more")
    reply = lm.generate("Hello")
    assert reply.text == "Good day."
    assert reply.finish_reason is FinishReason.STOP
    assert reply.token_ids[-1] == lm.tokenizer.token_id(end)
    assert reply.usage.completion_tokens == len("Good day.") + 1


def test_end_tokens_of_a_chat_end_it_even_where_the_checkpoint_forgot_them(scripted):
    lm = scripted("Yes.<|tool_response>more", end_ids=[scripted("").tokenizer.special.turn_close])
    assert lm.generate("Hello").text == "Yes."


def test_end_tokens_are_passed_over_where_asked(scripted):
    lm = scripted("one<eos>two<turn|>three<turn|>")
    reply = lm.generate("Hello", ignore_eos=True, max_tokens=12)
    assert reply.text == "onetwothre"
    assert reply.finish_reason is FinishReason.LENGTH


def test_an_end_marker_spelled_out_in_letters_ends_the_reply(scripted):
    lm = scripted("")
    lm.model.script = lm.tokenizer.encode_parts([("Yes.<turn|>more", False)])
    reply = lm.generate("Hello")
    assert (reply.text, reply.finish_reason) == ("Yes.", FinishReason.STOP)
    assert len(reply.token_ids) == len("Yes.<turn|>")


CALL = "<|tool_call>call:find{x:1}<tool_call|>"


@pytest.mark.parametrize("end", ["<|tool_response>", "<turn|>"])
def test_a_turn_that_calls_tools_ends_for_them(scripted, end):
    reply = scripted(f"Let me see.{CALL}{end}").generate("Find 1")
    assert reply.finish_reason is FinishReason.TOOL_CALLS
    assert reply.tool_calls == (ToolCall("find", {"x": 1}),)
    assert reply.text == "Let me see."


def test_a_call_cut_off_by_max_tokens_is_a_problem_and_no_call(scripted):
    reply = scripted(f"{CALL}<turn|>").generate("Find 1", max_tokens=13)
    assert reply.finish_reason is FinishReason.LENGTH
    assert reply.tool_calls == ()
    assert [problem.kind for problem in reply.problems] == ["truncated"]


def test_a_reply_cut_off_after_a_call_did_not_end_for_tools(scripted):
    reply = scripted(f"{CALL} and so on<turn|>").generate(
        "Find 1", max_tokens=len("call:find{x:1}") + 4
    )
    assert reply.finish_reason is FinishReason.LENGTH
    assert reply.tool_calls


def test_a_call_that_cannot_be_read_is_no_reason_to_run_tools(scripted):
    reply = scripted("<|tool_call>no call at all<tool_call|><|tool_response>").generate("Find 1")
    assert reply.finish_reason is FinishReason.STOP
    assert reply.tool_calls == ()
    assert reply.problems


def test_max_tokens_is_exact(scripted):
    reply = scripted("Good day.<turn|>").generate("Hello", max_tokens=4)
    assert (reply.text, reply.finish_reason) == ("Good", FinishReason.LENGTH)
    assert reply.usage.completion_tokens == 4


def test_an_unfinished_character_comes_out_as_a_replacement(scripted):
    assert scripted("né").generate("Hello", max_tokens=2).text == "n\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("max_tokens", [None, 30])
def test_the_reply_ends_where_the_context_does(scripted, max_tokens):
    lm = short_context(scripted("x" * 50), 40)
    reply = lm.complete([5] * 30, max_tokens=max_tokens)
    assert reply.usage.completion_tokens == 10
    assert reply.finish_reason is FinishReason.LENGTH


def test_stop_strings_cut_the_answer_exactly(scripted):
    reply = scripted("One. Two. Three.<turn|>").generate("Count", stop=[". T", "Three"])
    assert (reply.text, reply.finish_reason) == ("One", FinishReason.STOP)
    assert len(reply.token_ids) == len("One. T")


def test_stop_strings_neither_read_thoughts_nor_calls_nor_reach_over_them(scripted):
    lm = scripted(f"<|channel>thought\nSTOP\n<channel|>ST{CALL}OP<turn|>")
    reply = lm.generate("Hello", stop="STOP")
    assert reply.thinking == "STOP"
    assert reply.tool_calls
    assert reply.text == "STOP"


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(text="a<b", stops=["<"], max_tokens=2)  # complete only once nothing more can come
@given(
    text=st.text("ab<é", max_size=12),
    stops=st.lists(st.text("ab<é", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 20),
)
def test_no_event_ever_shows_what_a_stop_string_takes_away(scripted, text, stops, max_tokens):
    lm = scripted("")
    lm.model.script = [*lm.tokenizer.encode_parts([(text, False)]), 1]
    events = list(lm.stream("Hello", stop=stops, max_tokens=max_tokens))
    shown = "".join(event.text for event in events if isinstance(event, Content))
    made = bytes(
        byte for id in lm.model.script[:-1][:max_tokens] for byte in lm.tokenizer.piece(id)
    ).decode(errors="replace")
    ends = {made.find(stop) + len(stop): stop for stop in sorted(stops, key=len) if stop in made}
    expected = made[: min(ends) - len(ends[min(ends)])] if ends else made
    assert shown == expected
    finished = events[-1]
    assert isinstance(finished, Finished)
    cut_short = not ends and max_tokens < len(lm.model.script)
    assert finished.finish_reason == ("length" if cut_short else "stop")


# -- thinking ---------------------------------------------------------------------------------


THOUGHT = "<|channel>thought\nabcdefghij\n<channel|>Done.<turn|>"


def test_a_thought_within_its_budget_is_left_alone(scripted):
    reply = scripted(THOUGHT).generate("Hello", enable_thinking=True, thinking_budget=11)
    assert (reply.thinking, reply.text) == ("abcdefghij", "Done.")
    assert reply.usage.thinking_tokens == 11


@pytest.mark.parametrize(
    ("budget", "thought"), [(0, ""), (1, ""), (2, "a"), (5, "abcd"), (10, "abcdefghi")]
)
def test_a_spent_budget_closes_the_thought_cleanly_and_the_answer_follows(
    scripted, budget, thought
):
    lm = scripted(THOUGHT)
    # The script answers the position, so after a forced close it goes on in the old thought.
    reply = lm.generate("Hello", enable_thinking=True, thinking_budget=budget)
    frame = f"<|channel>thought\n{thought}" + ("\n" if thought else "") + "<channel|>"
    assert lm.tokenizer.decode(reply.token_ids).startswith(frame)
    assert reply.thinking == thought
    assert reply.usage.thinking_tokens == min(budget, len(thought) + 1) * bool(thought)
    assert reply.text.endswith("Done.")
    assert reply.finish_reason is FinishReason.STOP


def test_a_thought_that_the_prompt_opened_is_counted_and_closed(scripted):
    lm = scripted("abcdefghij<turn|>")
    messages = [
        {"role": "user", "content": "Find"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "find", "arguments": {}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    reply = lm.generate(messages, enable_thinking=True, thinking_budget=4)
    assert reply.thinking == "abc"
    assert reply.text == "fghij"  # d and e gave way to the newline and the marker


def test_a_call_ends_a_thought_that_was_not_closed_and_stays_whole(scripted):
    lm = scripted(f"<|channel>thought\nabc{CALL}<|tool_response>")
    reply = lm.generate("Hello", enable_thinking=True, thinking_budget=6)
    assert reply.thinking == "abc"
    assert reply.tool_calls == (ToolCall("find", {"x": 1}),)
    assert reply.usage.thinking_tokens == 3
