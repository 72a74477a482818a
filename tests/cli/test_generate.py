"""`gemsmith generate`: what reaches the model, and what is printed where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.fake import FakeLM, Reply
from typer.testing import CliRunner

import gemsmith
from gemsmith.cli.main import app
from gemsmith.config import PRESETS
from gemsmith.errors import RequestError
from gemsmith.text.calls import Problem, ToolCall
from gemsmith.text.stream import Content, Thinking, ToolCallEvent, ToolProblem

FULL: Reply = [
    Thinking("Let me see."),
    Content("Hello"),
    ToolCallEvent(ToolCall("f", {"x": [1, "é"]})),
    ToolProblem(Problem("truncated", "the text ends inside a tool call", "<|tool_call>ca")),
]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the command over one reply; gives the result and what the model was asked."""

    def run(reply: Reply, *arguments: str, **options: Any) -> Any:
        lm = FakeLM(reply)
        monkeypatch.setattr(gemsmith, "load", lambda name, **given: lm)
        result = CliRunner().invoke(app, ["generate", *arguments], **options)
        return result, lm.asked

    return run


def test_the_answer_goes_to_stdout_and_the_thought_to_stderr(generate: Any):
    result, _ = generate(FULL, "Hi", "--think")
    assert result.stdout == 'Hello\n-> f(x=[1, "é"])\n'
    assert result.stderr.startswith("Let me see.\nunreadable tool call: the text ends inside")
    assert result.exit_code == 0


def test_json_is_one_object_on_stdout(generate: Any):
    result, _ = generate(FULL, "Hi", "--json")
    assert result.stdout.count("\n") == 1
    reply = json.loads(result.stdout)
    assert reply["text"] == "Hello"
    assert reply["thinking"] == "Let me see."
    assert reply["tool_calls"] == [{"name": "f", "arguments": {"x": [1, "é"]}}]
    assert reply["problems"][0]["kind"] == "truncated"
    assert reply["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 2


def test_only_options_that_were_given_reach_the_model(generate: Any):
    _, asked = generate([Content("x")], "Hi")
    assert asked == [("Hi", {"tools": None, "enable_thinking": False})]


def test_options_reach_the_model_by_their_names(generate: Any, tmp_path: Path):
    (tmp_path / "tools.json").write_text('[{"type": "function", "function": {"name": "f"}}]')
    line = (
        "Hi --system Brief. --think --temperature 0 --top-k 5 --top-p 0.5 --min-p 0.1 --seed 7 "
        "--max-tokens 9 --stop a --stop b --thinking-budget 3 --repetition-penalty 1.1"
    )
    _, [(prompt, options)] = generate(
        [Content("x")], *line.split(), "--tools", str(tmp_path / "tools.json")
    )
    assert [message["content"] for message in prompt] == ["Brief.", "Hi"]
    assert options == {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "enable_thinking": True,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "max_tokens": 9,
        "stop": ("a", "b"),
        "thinking_budget": 3,
    }


def test_stdin_is_the_message_when_there_is_no_other(generate: Any):
    _, asked = generate([Content("x")], input=b"from a pipe\n")
    assert asked[0][0] == "from a pipe\n"


def test_invalid_stdin_is_one_error_before_any_model_is_loaded(generate: Any):
    result, asked = generate([], input=b"caf\xe9")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: stdin is not UTF-8: byte 0xe9 at offset 3")
    assert asked == []


def test_ctrl_c_in_the_middle_of_a_reply_is_exit_code_130(generate: Any):
    result, _ = generate([Content("Hel"), KeyboardInterrupt()], "Hi")
    assert result.exit_code == 130
    assert result.stdout == "Hel"
    assert result.stderr == "\n"


def test_what_the_engine_refuses_is_one_error(generate: Any):
    result, _ = generate([RequestError("top_p 2.0: must be a number from 1e-06 to 1")], "Hi")
    assert result.exit_code == 2
    assert result.stderr == "error: top_p 2.0: must be a number from 1e-06 to 1\n"


def test_files_stand_beside_the_text_pictures_first_and_sounds_last(
    generate: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("gemsmith.media.video.survey", lambda source: f"survey of {source}")
    asked_plans: list[tuple[str, bool]] = []

    def plan(source: str, *, sound: bool) -> str:
        asked_plans.append((source, sound))
        return "32 frames x 66 tokens = 2112 tokens"

    monkeypatch.setattr("gemsmith.media.video.plan", plan)
    monkeypatch.setattr(FakeLM, "config", PRESETS["31B"], raising=False)
    files = ("--image", "a.png", "--image", "b.png", "--audio", "c.wav", "--video", "d.mp4")
    result, asked = generate([Content("x")], "Hi", *files, "--budget", "auto")
    assert result.stderr.startswith("d.mp4: 32 frames x 66 tokens = 2112 tokens\n")
    assert asked_plans == [("survey of d.mp4", False)]
    [(messages, options)] = asked
    assert messages == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "image", "image": "b.png"},
                {"type": "video", "video": "survey of d.mp4"},
                {"type": "text", "text": "Hi"},
                {"type": "audio", "audio": "c.wav"},
            ],
        }
    ]
    assert options["image_budget"] == "auto"


def test_a_model_is_quantized_while_it_is_loaded(tmp_path):
    """The reply is that of the folder that `gemsmith quantize` writes, or the error names why."""
    asked = ["generate", "What is 2 + 3?", "--temperature", "0", "--max-tokens", "4"]
    result = CliRunner().invoke(app, [*asked, "--quant", "int2"])
    folder = str(tmp_path / "low")
    assert CliRunner().invoke(app, ["quantize", "pocket", folder, "--bits", "2"]).exit_code == 0
    assert result.output == CliRunner().invoke(app, [*asked, "--model", folder]).output != ""
    refused = CliRunner().invoke(app, [*asked, "--model", folder, "--quant", "int2"])
    assert (refused.exit_code, "is quantized already" in refused.output) == (2, True)
    refused = CliRunner().invoke(app, [*asked, "--quant", "int5"])
    assert (refused.exit_code, "quant 'int5': must be int8" in refused.output) == (2, True)


def test_a_schema_and_a_choice_of_tool_reach_the_model(generate: Any, tmp_path: Path):
    (tmp_path / "s.json").write_text('{"type": "integer"}')
    options = ["--schema", str(tmp_path / "s.json"), "--tool-choice", "none"]
    _, asked = generate([Content("1")], "Hi", *options)
    assert asked[0][1]["response_format"] == {"type": "json_schema", "schema": {"type": "integer"}}
    assert asked[0][1]["tool_choice"] == "none"


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "holds a JSON list; a schema is an object"), ("{", "is not JSON")]
)
def test_a_file_that_is_no_schema_is_refused(generate: Any, tmp_path: Path, text, message):
    (tmp_path / "s.json").write_text(text)
    result, asked = generate([Content("x")], "Hi", "--schema", str(tmp_path / "s.json"))
    assert message in result.output
    assert (result.exit_code, asked) == (2, [])
