"""Messages to prompt text and token ids, byte for byte as the official chat template of 2026-07-09.

`render` gives the text, `encode` the ids. Both walk the same parts: markup that this file writes,
and content that came from outside. In `encode` only markup can become a special token, so that a
user who types `<turn|>` has typed seven letters and not ended the turn. What this is not: it reads
no checkpoint's own template (see `template`) and parses no model output (see `stream`).

Messages are OpenAI's: mappings with `role`, `content` (text, or a list of parts), and on assistant
messages `tool_calls`, `tool_responses` and `reasoning` or `reasoning_content`.

Variants: "large" (12B, 26B-A4B, 31B) opens and closes an empty thought where thinking is off;
"edge" (E2B, E4B) does not. "large_april" and "edge_april" are the revision of April 2026 that older
files carry: null is written None, reasoning is kept for tool calls alone, consecutive answers each
end their turn, arguments given as a string are pasted.

Source: chat_template.jinja of google/gemma-4-31B-it and google/gemma-4-E2B-it. What looks odd here
is the template's own: the comments say where.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gemsmith.errors import RequestError, ToolError
from gemsmith.text import tools as protocol
from gemsmith.text.tools import Part, show

if TYPE_CHECKING:  # the renderer alone needs no vocabulary
    from gemsmith.text.tokenizer import Tokenizer

VARIANTS: tuple[str, ...] = ("large", "edge", "large_april", "edge_april")
ROLES: tuple[str, ...] = ("system", "developer", "user", "assistant", "model", "tool")

THOUGHT_OPEN, THOUGHT_CLOSE = "<|channel>thought\n", "<channel|>"
_CHANNEL_OPEN = "<|channel>"
_MEDIA = {
    "image": "<|image|>",
    "image_url": "<|image|>",
    "audio": "<|audio|>",
    "input_audio": "<|audio|>",
    "video": "<|video|>",
}

Message = Mapping[str, Any]


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    variant: str = "large",
    enable_thinking: bool = False,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = False,
) -> str:
    """The prompt as text, `<bos>` included.

    tools: declared in the system turn. enable_thinking: ask for a thought first. preserve_thinking:
    keep the reasoning of earlier tool-calling messages. add_generation_prompt: end where the model
    is to go on.

    Raises:
      RequestError: messages that cannot be written; names the message, the value and the way out.
      ToolError: a tool, call or argument list that cannot be written.
    """
    return "".join(
        text
        for text, _ in parts(
            messages,
            tools,
            variant=variant,
            enable_thinking=enable_thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=add_generation_prompt,
        )
    )


def encode(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    tokenizer: "Tokenizer",
    *,
    variant: str = "large",
    enable_thinking: bool = False,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = False,
) -> list[int]:
    """The prompt as token ids, `<bos>` included; markers inside content stay ordinary text.

    Raises: as `render`.
    """
    return tokenizer.encode_parts(
        parts(
            messages,
            tools,
            variant=variant,
            enable_thinking=enable_thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=add_generation_prompt,
        )
    )


def parts(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    variant: str = "large",
    enable_thinking: bool = False,
    preserve_thinking: bool = False,
    add_generation_prompt: bool = False,
) -> list[Part]:
    """The prompt as (text, is_markup) pairs; joined they are `render`.

    Raises: as `render`.
    """
    if variant not in VARIANTS:
        raise RequestError(f"variant {variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
    _check(messages, tools, pasted_arguments=variant.endswith("_april"))
    writer = _Renderer(
        messages,
        april=variant.endswith("_april"),
        enable_thinking=bool(enable_thinking),
        preserve_thinking=bool(preserve_thinking),
    )
    written = [*writer.head(tools or ()), *writer.history()]
    if add_generation_prompt:
        written += writer.prompt(cued=variant.startswith("large") and not enable_thinking)
    if variant.endswith("_april"):
        written = [("None", True) if part == ("null", True) else part for part in written]
    return written


class _Renderer:
    """One rendering. `last` is what the latest message ended with, as the template remembers it."""

    def __init__(
        self,
        messages: Sequence[Message],
        *,
        april: bool,
        enable_thinking: bool,
        preserve_thinking: bool,
    ) -> None:
        self.april = april
        self.enable_thinking, self.preserve_thinking = enable_thinking, preserve_thinking
        self.system: Message | None = None
        self.first = 0
        if messages and messages[0]["role"] in ("system", "developer"):
            self.system, self.first = messages[0], 1
        self.messages = messages[self.first :]
        self.last: Literal["call", "response", "media"] | None = None
        users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        self.last_user = users[-1] if users else -1

    def head(self, tools: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
        yield "<bos>", True
        if not (self.enable_thinking or tools or self.system):
            return
        yield "<|turn>system\n", True
        if self.enable_thinking:
            yield "<|think|>\n", True
        content = self.system.get("content") if self.system else None
        if isinstance(content, str):
            yield content.strip(), False
        else:
            # Every part is followed by a space, the last one and pictures too.
            for item in content or ():
                yield item.get("text", "").strip() + " ", False
        for tool in tools:
            yield "<|tool>", True
            yield from protocol.declaration_parts(tool)
            yield "<tool|>", True
        yield "<turn|>\n", True

    def history(self) -> Iterator[Part]:
        previous_role = None
        for index, message in enumerate(self.messages):
            if message["role"] == "tool":
                continue  # written with the call it answers
            role = "model" if message["role"] == "assistant" else message["role"]
            if not (role == "model" and previous_role == "assistant"):
                yield f"<|turn>{role}\n", True
            try:
                yield from self.message(index, message, role)
            except ToolError as error:
                raise ToolError(f"message {self.first + index}: {error}") from None
            previous_role = message["role"]

    def message(self, index: int, message: Message, role: str) -> Iterator[Part]:
        calls = message.get("tool_calls") or ()
        self.last = "call" if calls else None
        yield from self.thought(index, message)
        for call in calls:
            yield from self.call(call["function"])
        responded = False
        for part in self.responses(index, message, calls):
            responded, self.last = True, "response"
            yield part
        content = list(self.content(message.get("content"), role))
        yield from content
        has_content = any(text.strip() for text, _ in content)
        following = next(
            (m["role"] for m in self.messages[index + 1 :] if m["role"] != "tool"), None
        )
        if self.last == "call":
            yield protocol.RESPONSE_OPEN, True
        elif self.april:
            if has_content or not responded:
                yield "<turn|>\n", True
        elif role == "model" and following == "assistant":
            pass  # the next message goes on in the same turn
        elif has_content or following or not responded:
            yield "<turn|>\n", True

    def thought(self, index: int, message: Message) -> Iterator[Part]:
        thought = message.get("reasoning") or message.get("reasoning_content")
        calls = bool(message.get("tool_calls"))
        fresh = index > self.last_user
        kept = fresh and calls if self.april else fresh or (self.preserve_thinking and calls)
        if thought and kept:
            yield THOUGHT_OPEN, True
            yield thought, False
            yield "\n" + THOUGHT_CLOSE, True

    def call(self, function: Mapping[str, Any]) -> Iterator[Part]:
        arguments = function.get("arguments")
        if self.april and isinstance(arguments, str):
            yield f"{protocol.CALL_OPEN}call:", True
            yield function["name"], False
            yield "{", True
            yield arguments, False
            yield "}" + protocol.CALL_CLOSE, True
        else:
            yield from protocol.call_parts(function["name"], arguments)

    def responses(
        self, index: int, message: Message, calls: Sequence[Mapping[str, Any]]
    ) -> Iterator[Part]:
        given = message.get("tool_responses")
        if given:
            for response in given:
                # A response left out is written as an empty list.
                name, body = response.get("name") or "unknown", response.get("response", [])
                yield from protocol.response_parts(name, body)
            return
        if not calls:
            return
        for answer in self.messages[index + 1 :]:
            if answer["role"] != "tool":
                return
            name = answer.get("name") or "unknown"
            for call in calls:
                # Where neither has an id they count as equal, and the last call gives the name.
                if call.get("id") == answer.get("tool_call_id"):
                    name = call["function"]["name"]
            yield from self.answer(name, answer.get("content"))

    def answer(self, name: str, content: Any) -> Iterator[Part]:
        if isinstance(content, str) or not isinstance(content, Sequence):
            yield from protocol.response_parts(name, content)
            return
        text = "".join(item["text"] for item in content if item["type"] == "text")
        yield from protocol.response_parts(name, text)
        if not self.april:
            for item in content:
                if item["type"] in _MEDIA:
                    yield _MEDIA[item["type"]], True

    def content(self, content: Any, role: str) -> Iterator[Part]:
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
        for item in items:
            kind = item["type"]
            if kind == "text":
                text = item["text"]
                yield strip_thinking(text) if role == "model" else text.strip(), False
            elif not self.april or kind in ("image", "audio", "video"):
                if self.april:
                    self.last = "media"
                yield _MEDIA[kind], True

    def prompt(self, *, cued: bool) -> list[Part]:
        """Where the model goes on: in a new turn, or after calls and responses in its own.

        The template looks at what the last message had, not at whether its turn was closed: after
        an answer that also called a tool no turn is opened.
        """
        if self.last not in ("call", "response"):
            cue = [(THOUGHT_OPEN + THOUGHT_CLOSE, True)] if cued else []
            return [("<|turn>model\n", True), *cue]
        if self.last == "response" and self.enable_thinking and not self.april:
            return [(THOUGHT_OPEN, True)]
        return []


def strip_thinking(text: str) -> str:
    """`text` without its thought channels, trimmed; a channel left open reaches to the end."""
    kept = (part.split(_CHANNEL_OPEN, 1)[0] for part in text.split(THOUGHT_CLOSE))
    return "".join(kept).strip()


# -- what cannot be written -------------------------------------------------------------------


def _check(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    pasted_arguments: bool,
) -> None:
    """Refuse what the template would fail on, or would silently leave out of the prompt."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of mappings, not {show(messages)}")
    if isinstance(tools, str | bytes) or not isinstance(tools, Sequence | None):
        raise ToolError(f"tools must be a list of mappings, not {show(tools)}")
    if not messages and not tools:
        raise RequestError("messages is empty: give at least one message with the role 'user'")
    seen_user = False
    answerable = False
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"message {index} is {show(message)}; it must be a mapping with 'role'"
            )
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(
                f"message {index} has the unknown role {show(role)}; use one of {', '.join(ROLES)}"
            )
        seen_user = seen_user or role == "user"
        if role == "tool":
            if not answerable:
                raise RequestError(
                    f"message {index} is a tool's answer, but no tool call stands before it; put "
                    "it right after the assistant message with the tool_calls it answers"
                )
        else:
            answerable = bool(message.get("tool_calls"))
            _check_calls(index, message, seen_user, pasted_arguments)
            _check_thought(index, message)
        _check_content(index, message)


def _check_calls(index: int, message: Message, seen_user: bool, pasted_arguments: bool) -> None:
    calls = message.get("tool_calls") or ()
    responses = message.get("tool_responses") or ()
    if (calls or responses) and message["role"] not in ("assistant", "model"):
        raise RequestError(
            f"message {index} has the role {message['role']!r} and tool calls; only an assistant "
            "message may have them"
        )
    if (calls or responses) and not seen_user:
        raise RequestError(
            f"message {index} calls a tool before any user message; begin with a user message"
        )
    for name, entries in (("tool_calls", calls), ("tool_responses", responses)):
        if isinstance(entries, str) or not isinstance(entries, Sequence):
            raise RequestError(f"message {index}: {name} must be a list, not {show(entries)}")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ToolError(
                f"message {index}: a tool call must look like {{'function': {{'name': ..., "
                f"'arguments': {{...}}}}}}, not {show(call)}"
            )
        arguments = function.get("arguments", ...)
        if arguments is None or isinstance(arguments, Mapping):
            continue
        if not (pasted_arguments and isinstance(arguments, str)):
            given = "missing" if arguments is ... else show(arguments)
            raise ToolError(
                f"message {index}: the arguments of {function['name']!r} are {given}; "
                "they must be a mapping. Decode a JSON string with json.loads first"
            )
    for response in responses:
        if not isinstance(response, Mapping) or not isinstance(response.get("name") or "", str):
            raise ToolError(
                f"message {index}: a tool response must look like {{'name': ..., "
                f"'response': ...}}, not {show(response)}"
            )


def _check_thought(index: int, message: Message) -> None:
    for key in ("reasoning", "reasoning_content"):
        if not isinstance(message.get(key) or "", str):
            raise RequestError(f"message {index}: {key} must be a string, not {show(message[key])}")


def _check_content(index: int, message: Message) -> None:
    content = message.get("content")
    role = message["role"]
    if content is None or isinstance(content, str):
        return
    if isinstance(content, Mapping):
        way_out = (
            "give a string, or put the mapping into 'tool_responses' of the assistant message"
            if role == "tool"
            else "give a string or a list of parts"
        )
        raise RequestError(f"message {index}: content is the mapping {show(content)}; {way_out}")
    if isinstance(content, bytes) or not isinstance(content, Sequence):
        if role == "tool" and isinstance(content, bool | int | float):
            return
        raise RequestError(
            f"message {index}: content is {show(content)}; give a string or a list of parts"
        )
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str):
            continue
        if kind not in _MEDIA:
            raise RequestError(
                f"message {index}: content part {show(item)} cannot be written; use "
                f"{{'type': 'text', 'text': ...}} or one of the types {', '.join(_MEDIA)}"
            )
