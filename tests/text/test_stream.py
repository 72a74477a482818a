"""Model output split as it comes: the same events however it is cut, and never half a marker."""

import time
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemsmith.text.calls import ToolCall, parse_calls
from gemsmith.text.stream import (
    Content,
    Event,
    ParsedOutput,
    Splitter,
    Thinking,
    ToolCallEvent,
    ToolProblem,
    parse_output,
)

MARKERS = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]
MARKERS += ["<turn|>", "<eos>"]


def split(pieces: Iterable[str], *, started_in_thinking: bool = False) -> list[Event]:
    splitter = Splitter(started_in_thinking=started_in_thinking)
    return [event for piece in pieces for event in splitter.feed(piece)] + splitter.finish()


def merged(events: list[Event]) -> list[Event]:
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Thinking) and isinstance(last, Thinking):
            result[-1] = Thinking(last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        else:
            result.append(event)
    return result


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("Hello", ParsedOutput(content="Hello")),
        ("Hello<turn|>rest", ParsedOutput(content="Hello")),
        ("Hello<eos>", ParsedOutput(content="Hello")),
        ("<|channel>thought\nhm\nso\n<channel|>Hi", ParsedOutput(thinking="hm\nso", content="Hi")),
        ("<|channel>thought\n<channel|>Hi", ParsedOutput(content="Hi")),
        ("<|channel>thought<channel|>Hi", ParsedOutput(content="Hi")),
        ("<|channel>plan\n<channel|>Hi", ParsedOutput(thinking="plan", content="Hi")),
        ("<|channel>thought\nhm", ParsedOutput(thinking="hm")),
        ("<|channel>thought\nhm\n<turn|>", ParsedOutput(thinking="hm\n")),
        ("a < b <| c <tool", ParsedOutput(content="a < b <| c <tool")),
        ("a<channel|>b", ParsedOutput(content="ab")),
        (
            'On it.<|tool_call>call:f{a:<|"|><turn|><|"|>}<tool_call|><|tool_response>x',
            ParsedOutput(content="On it.", calls=[ToolCall("f", {"a": "<turn|>"})]),
        ),
        (
            "<|channel>thought\nhm<|tool_call>call:f{}<tool_call|>",
            ParsedOutput(thinking="hm", calls=[ToolCall("f", {})]),
        ),
        ("<|tool_call>call:f{} Hi", ParsedOutput(content=" Hi", calls=[ToolCall("f", {})])),
    ],
)
def test_an_output_is_taken_apart(text: str, output: ParsedOutput) -> None:
    assert parse_output(text) == output


def test_a_prompt_that_opened_the_thought_begins_inside_it() -> None:
    output = parse_output("hm\n<channel|>Hi", started_in_thinking=True)
    assert output == ParsedOutput(thinking="hm", content="Hi")


@pytest.mark.parametrize("text", ["<|tool_call>call:f{a:1", "<|tool_call>", "x<tool_call|>y"])
def test_what_is_no_call_is_told_with_its_place(text: str) -> None:
    (problem,) = parse_output(text).problems
    assert text[problem.start : problem.end] == problem.raw
    assert "<" in problem.raw


def test_text_flows_at_once_and_a_call_comes_when_it_is_closed() -> None:
    splitter = Splitter()
    assert splitter.feed("Hello ") == [Content("Hello ")]
    assert splitter.feed("you<|to") == [Content("you")]
    assert splitter.feed("ol_call>call:f{a:") == []
    assert splitter.feed("1}<tool_cal") == []
    assert splitter.feed("l|>") == [ToolCallEvent(ToolCall("f", {"a": 1}))]
    assert splitter.feed("<|tool_response>") == []
    assert splitter.ended
    assert splitter.feed("more") == splitter.finish() == []


def test_a_call_cut_short_comes_out_as_a_problem_at_the_end() -> None:
    splitter = Splitter()
    assert splitter.feed("<|tool_call>call:f{a:") == []
    (event,) = splitter.finish()
    assert isinstance(event, ToolProblem)
    assert event.problem.kind == "truncated"


@pytest.mark.parametrize(
    "text",
    [
        'So.<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>',
        'So.<|tool_call>call:f{a:[1,{b:<|"|>x<|"|>}]}, call:g{b:1}<tool_call|>',
        'So.<|tool_call>{"name":"f","arguments":{}}<tool_call|>',
        'So.<|tool_call>call : f {<|"|>a<|"|>:[1]}; call : g(b=1)<tool_call|>',
        "So.<|tool_call>f<tool_call|>",
    ],
)
def test_a_call_cut_anywhere_leaves_no_text(text: str) -> None:
    """Even inside its closing marker, where that came in letters."""
    for end in range(text.index("call>") + len("call>"), len(text)):
        output = parse_output(text[:end])
        shown = output.content + "".join(problem.text for problem in output.problems)
        assert shown == "So.", text[:end]


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("before", ["So.", "<|channel>thought\nSo.", "<|tool_call>call:f{} So."])
def test_the_beginning_of_a_marker_is_text_unless_the_output_was_cut_there(
    before: str, marker: str
) -> None:
    """However it came; of a `<` alone nobody can tell."""
    for end in range(len(marker)):
        for pieces in ([before + marker[:end]], [before, *marker[:end]]):
            for cut in (False, True):
                splitter = Splitter()
                events = [event for piece in pieces for event in splitter.feed(piece)]
                events += splitter.finish(cut=cut)
                texts = [event.text for event in events if isinstance(event, Content | Thinking)]
                shown = "".join(texts).strip()
                assert shown == "So." + ("" if cut and end > 1 else marker[:end])


def test_a_call_that_cannot_be_read_is_shown_without_markers() -> None:
    text = '<|tool_call>f, <|tool_<|"|>call>{a:<|"|>x<|"|>}<tool_call|><|tool_call>call:'
    whole, cut = parse_output(text).problems
    assert whole.text == " f, <|tool_ call>{a: x } "
    assert cut.text == ""


@pytest.mark.parametrize(
    "text",
    [
        '<|tool_call>call:f{"q":"x"<turn|>y:1 <tool_call|>}k:v"q" [z',
        '<|tool_call>call:f{"a\'<tool_call|><|channel>b(]:c{d:["q":k <channel|>][,y',
        '<|tool_call>call:f{a:<|"|>x<tool_call|>y<|"|>, b<|"|>,c:1}<tool_call|>z',
        "<|tool_call>call:f{}}<tool_call|>z",
    ],
)
def test_a_close_marker_that_closes_nothing_is_not_judged_before_its_time(text: str) -> None:
    assert merged(split(text)) == merged(split([text]))


# -- properties -------------------------------------------------------------------------------

tokens = st.one_of(
    st.sampled_from(MARKERS),
    st.sampled_from(["thought\n", "thought", "call:f{", "call:g(", "x:1", ",y:", '<|"|>', "Hi"]),
    st.sampled_from("{}()[]<|>:=\"'\\ \né"),
)
soup = st.lists(tokens, max_size=25).map("".join)
outputs = st.one_of(soup, soup.map("<|tool_call>call:f{".__add__), soup.map("<|channel>".__add__))


@st.composite
def cut_outputs(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(outputs)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=800, deadline=None)
@given(cut=cut_outputs(), started=st.booleans())
def test_any_chunking_gives_the_same_events(cut: tuple[str, list[str]], started: bool) -> None:
    text, pieces = cut
    whole = merged(split([text], started_in_thinking=started))
    assert merged(split(pieces, started_in_thinking=started)) == whole
    assert merged(split(text, started_in_thinking=started)) == whole


@settings(max_examples=400, deadline=None)
@given(text=outputs)
def test_no_marker_and_no_part_of_one_leaks(text: str) -> None:
    """Joined text never holds a marker; text emitted early is never taken back."""
    splitter = Splitter()
    early = ""
    for char in text:
        for event in splitter.feed(char):
            if isinstance(event, Thinking | Content):
                early += event.text
    splitter.finish()
    output = parse_output(text)
    for marker in MARKERS:
        assert marker not in output.thinking
        assert marker not in output.content
    # What came early is what the whole text gives, in the same order, up to what was held back.
    joined = "".join(event.text for event in split([text]) if isinstance(event, Thinking | Content))
    assert joined.startswith(early)


@settings(max_examples=300, deadline=None)
@given(text=soup.filter(lambda text: not any(end in text for end in ("<turn|>", "<eos>"))))
def test_streamed_calls_equal_parsed_calls(text: str) -> None:
    text = text.replace("<|tool_response>", "")
    assert parse_output(text).calls == parse_calls(text).calls


@pytest.mark.parametrize(
    "text",
    [
        '<|tool_call>call:a{x:<|"|>' + "<tool_call|>" * 5_000,
        '<|tool_call>call:a{x:<|"|><tool_call|>' + '<|"|>a' * 5_000,
        '<|tool_call>call:a{x:<|"|>' + "y" * 50_000 + '<|"|>}<tool_call|>',
        "<|tool_call>call:a{}" * 3_000,
        "<tool_call|><channel|>" * 3_000,
        "<" * 50_000,
    ],
    ids=lambda text: text[:44],
)
def test_streaming_hostile_text_takes_linear_time(text: str) -> None:
    begun = time.process_time()
    split(text[index : index + 3] for index in range(0, len(text), 3))
    assert time.process_time() - begun < 10
