"""A checkpoint's own chat template, and how it differs from ours.

A template is a program that came with the weights. It runs in a jinja2 sandbox inside a process of
its own (see `template_worker`), with a deadline, a bounded output and bounded memory; whatever it
does wrong becomes a TemplateError. It need not be Gemma's.

Content is kept apart from markup here too: `encode` marks special markers inside message texts
before rendering and spells them out afterwards, so that they never become special tokens.
"""

import json
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gemsmith.errors import RequestError, TemplateError
from gemsmith.text import chat
from gemsmith.text.chat import Message
from gemsmith.text.tools import Part

if TYPE_CHECKING:
    from gemsmith.text.tokenizer import Tokenizer

FILE_NAME = "chat_template.jinja"
MAX_SOURCE_BYTES = 2**20
"""Longest template read; Gemma 4's has 18 KiB."""
MAX_CHARS = 16 * 2**20
"""Longest prompt a template may write."""
DEADLINE_S = 10.0
"""Longest time one rendering may take."""
START_S = 60.0
"""Longest time the rendering process may take to start."""

_SENTINEL = "\ue0f7"
"""Private-use character put into markers that stand in content, to know them again."""
_MARKER = re.compile(r"<(?=\|?[a-z0-9_\"]+\|?>)")


class ChatTemplate:
    """A template ready to render. Safe to share between threads; they wait for each other."""

    def __init__(
        self, source: str, *, name: str = FILE_NAME, deadline_s: float = DEADLINE_S
    ) -> None:
        """Take a template's text.

        Raises:
          TemplateError: it is too long.
        """
        if len(source.encode(errors="replace")) > MAX_SOURCE_BYTES:
            raise TemplateError(
                f"{name} is longer than {MAX_SOURCE_BYTES} bytes, which no chat template needs; "
                "remove it to use the built-in format"
            )
        self.source, self.name, self.deadline_s = source, name, deadline_s
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """The template of a checkpoint folder; None where it has none.

        Raises:
          TemplateError: there is one that cannot be read.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return None
        try:
            # One byte more than is allowed, so that the length check can tell.
            with path.open("rb") as file:
                source = file.read(MAX_SOURCE_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"{path} cannot be read: {error}") from None
        return cls(source, name=str(path))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = False,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = False,
        bos_token: str = "<bos>",
    ) -> str:
        """The prompt as the template writes it.

        Raises:
          TemplateError: the template failed, refused the messages, or ran over a limit.
          RequestError: the messages or tools are not JSON.
        """
        values = {
            "messages": messages,
            "tools": tools,
            "enable_thinking": enable_thinking,
            "preserve_thinking": preserve_thinking,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
        }
        request = {"source": self.source, "values": values, "max_chars": MAX_CHARS}
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"messages and tools must be plain JSON values for a template: {error}"
            ) from None
        with self._lock:
            if self._worker is None or not self._worker.alive():
                self._worker = _Worker()
            answer = self._worker.ask(line, self.deadline_s)
        if "text" not in answer:
            raise TemplateError(
                f"{self.name} failed: {answer.get('error', 'no reason given')}. Correct the "
                "messages, or remove the template to use the built-in format"
            )
        return answer["text"]

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        tokenizer: "Tokenizer",
        *,
        enable_thinking: bool = False,
        preserve_thinking: bool = False,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """The prompt as ids; markers inside message texts, tools and arguments stay ordinary text.

        Raises: as `render`.
        """
        text = self.render(
            [_marked(message, thoughts=message.get("role") == "assistant") for message in messages],
            _marked(tools, thoughts=False),
            enable_thinking=enable_thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=add_generation_prompt,
        )
        return tokenizer.encode_parts(_parts(text))


def _marked(node: Any, *, thoughts: bool) -> Any:
    """A copy of JSON-like data with the sentinel inside every marker.

    thoughts: leave the markers of the thought channel, which templates strip from answers.
    """
    if isinstance(node, str):
        text = _MARKER.sub("<" + _SENTINEL, node.replace(_SENTINEL, "\ufffd"))
        if thoughts:
            for marker in ("<|channel>", "<channel|>"):
                text = text.replace(marker[0] + _SENTINEL + marker[1:], marker)
        return text
    if isinstance(node, Mapping):
        return {
            _marked(key, thoughts=False): _marked(value, thoughts=thoughts)
            for key, value in node.items()
        }
    if isinstance(node, list | tuple):
        return [_marked(item, thoughts=thoughts) for item in node]
    return node


def _parts(text: str) -> list[Part]:
    """Markup and content of a rendered text: a sentinel says that its `<` is content."""
    pieces = text.split("<" + _SENTINEL)
    parts: list[Part] = []
    for index, piece in enumerate(pieces):
        if index:
            # With its first character alone made content, a marker is no marker any more.
            parts.append(("<", False))
        parts.append((piece.replace(_SENTINEL, ""), True))
    return parts


class _Worker:
    """One process that renders. Killed when it oversteps; the next request starts another."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("template_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        # The pipe is talked to by a thread, so that the deadline holds on every platform.
        self._talker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chat-template")
        weakref.finalize(self, _stop, self._process, self._talker)
        self._started = False

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str, deadline_s: float) -> dict[str, Any]:
        try:
            if not self._started:
                self._talker.submit(_talk, self._process, "").result(timeout=START_S)
                self._started = True
            reply = self._talker.submit(_talk, self._process, line + "\n").result(deadline_s)
            answer = json.loads(reply)
        except FutureTimeout:
            _stop(self._process, self._talker)
            if not self._started:
                return {"error": f"its process did not start within {START_S:g} s"}
            return {"error": f"it ran longer than {deadline_s:g} s"}
        except (OSError, ValueError):
            _stop(self._process, self._talker)
            return {"error": "its process ended, which running out of memory can do"}
        return answer if isinstance(answer, dict) else {}


def _talk(process: "subprocess.Popen[str]", line: str) -> str:
    assert process.stdin is not None, "started with pipes"
    assert process.stdout is not None, "started with pipes"
    process.stdin.write(line)
    process.stdin.flush()
    return process.stdout.readline()


def _stop(process: "subprocess.Popen[str]", talker: ThreadPoolExecutor) -> None:
    process.kill()
    talker.shutdown(wait=True)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
    process.wait()


# -- comparing --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """One conversation that two formats write differently. An error stands as `error: ...`."""

    name: str
    ours: str
    theirs: str


def compare_templates(template: ChatTemplate, *, variant: str = "large") -> list[Difference]:
    """Conversations of the built-in corpus that `template` and our `variant` write differently.

    Two errors count as the same, whatever their texts.
    """
    differences: list[Difference] = []
    for name, (messages, tools, options) in CORPUS.items():
        try:
            ours = chat.render(messages, tools, variant=variant, **options)
        except RequestError as error:
            ours = f"error: {error}"
        try:
            theirs = template.render(messages, tools, **options)
        except RequestError as error:
            theirs = f"error: {error}"
        failed = ours.startswith("error: ") and theirs.startswith("error: ")
        if ours != theirs and not failed:
            differences.append(Difference(name, ours, theirs))
    return differences


_PING: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "ping",
        "description": "Check a host.",
        "parameters": {
            "type": "object",
            "properties": {
                "host": {"type": "string", "description": "Name of the host"},
                "count": {"type": "integer"},
                "mode": {"type": "string", "enum": ["fast", "slow"], "nullable": True},
                "tags": {"type": "array", "items": {"type": "string"}},
                "options": {
                    "type": "object",
                    "properties": {"deep": {"type": "boolean"}},
                    "required": ["deep"],
                },
            },
            "required": ["host"],
        },
    },
}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _says(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _calls(*arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    calls = [
        {"id": f"c{index}", "type": "function", "function": {"name": "ping", "arguments": given}}
        for index, given in enumerate(arguments)
    ]
    return _says(None, tool_calls=calls, **more)


def _told(text: Any, index: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{index}", "content": text}


_THINK = {"enable_thinking": True, "add_generation_prompt": True}
_GO = {"add_generation_prompt": True}

CORPUS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]] = {
    "one question": ([_user("Hello")], None, _GO),
    "one question, thinking": ([_user("Hello")], None, _THINK),
    "no generation prompt": ([_user("Hello")], None, {}),
    "text is trimmed": ([_user("  Hello \n")], None, _GO),
    "system": ([{"role": "system", "content": " Be brief. "}, _user("Hi")], None, _GO),
    "system, thinking": ([{"role": "system", "content": "Be brief."}, _user("Hi")], None, _THINK),
    "developer": ([{"role": "developer", "content": "Be brief."}, _user("Hi")], None, _GO),
    "several turns": ([_user("a"), _says("b"), _user("c"), _says("d"), _user("e")], None, _GO),
    "finished conversation": ([_user("a"), _says("b")], None, {}),
    "two answers in a row": ([_user("a"), _says("b"), _says("c"), _user("d")], None, _GO),
    "thought inside an answer": (
        [_user("a"), _says("<|channel>thought\nx\n<channel|>b"), _user("c")],
        None,
        _THINK,
    ),
    "old reasoning": ([_user("a"), _says("b", reasoning="x"), _user("c")], None, _THINK),
    "fresh reasoning": ([_user("a"), _says("b", reasoning_content="x")], None, _THINK),
    "tool declared": ([_user("Check")], [_PING], _GO),
    "tool called": ([_user("Check"), _calls({"host": "a"})], [_PING], _GO),
    "arguments of every type": (
        [
            _user("Check"),
            _calls({"host": 'q"{}', "count": 3, "x": 1.5, "y": None, "z": [True, {"k": "v"}]}),
        ],
        [_PING],
        {},
    ),
    "tool answered": ([_user("Check"), _calls({"host": "a"}), _told("up")], [_PING], _GO),
    "tool answered, thinking": (
        [_user("Check"), _calls({"host": "a"}), _told("up")],
        [_PING],
        _THINK,
    ),
    "two calls answered": (
        [_user("Check"), _calls({"host": "a"}, {"host": "b"}), _told("up"), _told("down", 1)],
        [_PING],
        _GO,
    ),
    "calls in a chain": (
        [
            _user("Check"),
            _calls({"host": "a"}),
            _told("up"),
            _calls({"host": "b"}),
            _told("down"),
            _says("One is down."),
            _user("Thanks"),
        ],
        [_PING],
        _GO,
    ),
    "reasoning preserved": (
        [_user("a"), _calls({"host": "a"}, reasoning="x"), _told("up"), _says("b"), _user("c")],
        [_PING],
        {**_THINK, "preserve_thinking": True},
    ),
    "structured answer": (
        [_user("a"), _calls({}, tool_responses=[{"name": "ping", "response": {"ms": 2}}])],
        [_PING],
        _GO,
    ),
    "arguments as a string": (
        [
            _user("a"),
            _says(None, tool_calls=[{"function": {"name": "ping", "arguments": "{}"}}]),
        ],
        [_PING],
        _GO,
    ),
    "pictures, sound and film": (
        [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": " Describe "},
                    {"type": "audio"},
                    {"type": "video"},
                ],
            }
        ],
        None,
        _GO,
    ),
}
"""Conversations by name: messages, tools, options. They touch every rule of the official format."""
