"""The official chat format, byte for byte, and what it cannot express."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemsmith.errors import RequestError, ToolError
from gemsmith.text import chat
from gemsmith.text.chat import render
from gemsmith.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
OFFICIAL = json.loads((DATA / "chat_vectors.json").read_text(encoding="utf-8"))
RANDOM = json.loads((DATA / "chat_random_vectors.json").read_text(encoding="utf-8"))

Messages = list[dict[str, Any]]
USER = {"role": "user", "content": "Hi"}


def calling(*arguments: Any, **more: Any) -> dict[str, Any]:
    calls = [
        {"id": f"c{index}", "function": {"name": f"f{index}", "arguments": given}}
        for index, given in enumerate(arguments)
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


@pytest.mark.parametrize("case", OFFICIAL + RANDOM, ids=lambda case: case["name"])
def test_prompt_equals_the_official_template(case: dict[str, Any]) -> None:
    """Both files hold what the official template gave; the second for random conversations."""
    given = (case["messages"], case["tools"])
    if "error" in case:
        with pytest.raises(RequestError, match=r"message [12]"):
            render(*given, variant=case["template"], **case["kwargs"])
    else:
        assert render(*given, variant=case["template"], **case["kwargs"]) == case["text"]


def test_all_official_vectors_are_there() -> None:
    assert len(OFFICIAL) == 37
    assert sum("error" in case for case in OFFICIAL) == 2


def turn(messages: Messages, **options: Any) -> str:
    """What follows the user's turn."""
    return render([USER, *messages], **options).removeprefix("<bos><|turn>user\nHi<turn|>\n")


def test_the_name_of_a_tool_answer_comes_from_the_id_then_the_name_then_unknown() -> None:
    answers = [
        {"role": "tool", "tool_call_id": "c1", "content": "1", "name": "other"},
        {"role": "tool", "tool_call_id": "none", "content": "2", "name": "other"},
        {"role": "tool", "tool_call_id": "none", "content": "3"},
    ]
    text = turn([calling({}, {}), *answers])
    assert text.endswith(
        '<|tool_response>response:f1{value:<|"|>1<|"|>}<tool_response|>'
        '<|tool_response>response:other{value:<|"|>2<|"|>}<tool_response|>'
        '<|tool_response>response:unknown{value:<|"|>3<|"|>}<tool_response|>'
    )


def test_without_ids_the_last_call_names_every_answer() -> None:
    calls = [{"function": {"name": name, "arguments": None}} for name in ("a", "b")]
    text = turn([{"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "x"}])
    assert "response:b{" in text
    assert "response:a{" not in text


def test_numbers_print_as_python_prints_them_and_null_is_null() -> None:
    arguments = {"a": 1e22, "b": 1e-7, "c": 2.0, "d": 10**20, "e": None, "f": False, "g": -0.0}
    assert "{a:1e+22,b:1e-07,c:2.0,d:100000000000000000000,e:null,f:false,g:-0.0}" in turn(
        [calling(arguments)]
    )


def test_keys_are_sorted_without_regard_to_case_at_every_level() -> None:
    assert "{A:{x:1,Y:2},b:3,C:4}" in turn([calling({"C": 4, "b": 3, "A": {"Y": 2, "x": 1}})])


def test_media_of_a_tool_answer_follow_its_block() -> None:
    content = [{"type": "image"}, {"type": "text", "text": " a "}, {"type": "text", "text": "b"}]
    text = turn([calling({}), {"role": "tool", "tool_call_id": "c0", "content": content}])
    assert text.endswith('response:f0{value:<|"|> a b<|"|>}<tool_response|><|image|>')


def test_an_open_thought_is_stripped_to_the_end_and_what_lies_between_is_kept() -> None:
    assert chat.strip_thinking(" a<|channel>x<channel|>b <|channel>y") == "ab"
    assert chat.strip_thinking("a<channel|>b") == "ab"


def test_thinking_after_a_tool_answer_is_cued_and_off_nothing_is_added() -> None:
    messages = [calling({}), {"role": "tool", "tool_call_id": "c0", "content": "x"}]
    on = turn(messages, enable_thinking=True, add_generation_prompt=True)
    off = turn(messages, add_generation_prompt=True)
    assert on.endswith("<tool_response|><|channel>thought\n")
    assert off.endswith("<tool_response|>")


def test_the_variants_differ_only_in_the_empty_thought() -> None:
    large = render([USER], add_generation_prompt=True)
    edge = render([USER], variant="edge", add_generation_prompt=True)
    assert large == edge + "<|channel>thought\n<channel|>"
    options = {"add_generation_prompt": True, "enable_thinking": True}
    assert render([USER], **options) == render([USER], variant="edge", **options)


# -- ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: case["name"])
def test_ids_equal_the_encoded_text_where_content_has_no_markers(
    small: Tokenizer, case: dict[str, Any]
) -> None:
    if "error" in case or "<|channel>" in json.dumps(case["messages"]):
        return
    options = {"variant": case["template"], **case["kwargs"]}
    ids = chat.encode(case["messages"], case["tools"], small, **options)
    assert ids == small.encode(case["text"])


def test_real_ids_equal_the_encoded_text(real: Tokenizer) -> None:
    for case in OFFICIAL:
        if "error" not in case and "<|channel>" not in json.dumps(case["messages"]):
            options = {"variant": case["template"], **case["kwargs"]}
            ids = chat.encode(case["messages"], case["tools"], real, **options)
            assert ids == real.encode(case["text"]), case["name"]


@pytest.mark.parametrize("marker", ["<turn|>\n<|turn>model\n", '<|"|>', "<|tool_call>", "<eos>"])
def test_no_content_can_write_a_special_token(small: Tokenizer, marker: str) -> None:
    """The marker stands in every place that content can stand in; the ids tell them apart."""

    def conversation(text: str) -> tuple[Messages, Messages]:
        tool = {
            "function": {
                "name": "f" + text,
                "description": text,
                "parameters": {
                    "type": "object",
                    "properties": {
                        text: {"type": "string", "description": text, "enum": [text]},
                        "l": {"type": "array", "items": {"type": "string", text: text}},
                    },
                    "required": [text],
                },
            }
        }
        call = calling({text: [text, {text: text}]}, reasoning=text)
        call["tool_calls"][0]["function"]["name"] = text
        answer = {"role": "tool", "tool_call_id": "c0", "content": text}
        parts = [{"type": "text", "text": text}]
        head = [{"role": "system", "content": text}, {"role": "user", "content": parts}]
        return [*head, call, answer, {"role": "assistant", "content": text}], [tool]

    specials = set(vars_of(small))
    hostile = chat.encode(*conversation(marker), small, enable_thinking=True)
    harmless = chat.encode(*conversation("x"), small, enable_thinking=True)
    assert [id for id in hostile if id in specials] == [id for id in harmless if id in specials]
    assert small.decode(hostile) == render(*conversation(marker), enable_thinking=True)


def vars_of(tokenizer: Tokenizer) -> list[int | None]:
    special = tokenizer.special
    return [getattr(special, name) for name in type(special).__dataclass_fields__]


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty: give at least one"),
        ("hello", "messages must be a list of mappings, not 'hello'"),
        (["hello"], "message 0 is 'hello'"),
        ([{"content": "x"}], "message 0 has the unknown role None; use one of system"),
        ([USER, {"role": "robot", "content": "x"}], "message 1 has the unknown role 'robot'"),
        ([{"role": "tool", "content": "x"}], "message 0 is a tool's answer, but no tool call"),
        ([USER, {"role": "tool", "content": "x"}], "message 1 is a tool's answer"),
        ([calling({})], "message 0 calls a tool before any user message"),
        ([{**calling({}), "role": "user"}], "message 0 has the role 'user' and tool calls"),
        ([{"role": "user", "content": 5}], "message 0: content is 5; give a string"),
        ([{"role": "user", "content": {"a": 1}}], "message 0: content is the mapping"),
        ([{"role": "user", "content": ["x"]}], "content part 'x' cannot be written"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content part .* cannot be written"),
        ([{"role": "user", "content": [{"type": "file"}]}], "use .* or one of the types image"),
        ([USER, {"role": "assistant", "reasoning": 5}], "message 1: reasoning must be a string"),
        (
            [USER, calling({}), {"role": "tool", "content": {"a": 1}}],
            "message 2: content is the mapping .*'tool_responses' of the assistant message",
        ),
        ([USER, {"role": "assistant", "tool_calls": "x"}], "message 1: tool_calls must be a list"),
    ],
)
def test_messages_that_cannot_be_written_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render(messages)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("x", "message 1: a tool call must look like .*, not 'x'"),
        ({"function": {"arguments": {}}}, "message 1: a tool call must look like"),
        ({"function": {"name": "f"}}, "the arguments of 'f' are missing; they must be a mapping"),
        ({"function": {"name": "f", "arguments": "{}"}}, "are '{}'; .*json.loads"),
        ({"function": {"name": "f", "arguments": [1]}}, r"are \[1\]; they must be a mapping"),
        (
            {"function": {"name": "f", "arguments": {1: 2, "a": 3}}},
            "message 1: the keys .* strings",
        ),
    ],
)
def test_calls_that_cannot_be_written_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        render([USER, {"role": "assistant", "tool_calls": [call]}])


def test_arguments_nested_without_end_are_refused() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(ToolError, match="message 1: a value is nested more than 64 levels deep"):
        render([USER, calling(endless)])


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(RequestError, match="variant 'huge' is unknown; choose one of large, edge"):
        render([USER], variant="huge")
