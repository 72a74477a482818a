"""An OpenAI-compatible endpoint as a probe sees it: what was sent, and every byte that came back.

    endpoint = Endpoint("http://127.0.0.1:8000")
    endpoint.connect()                            # what is served
    reply = endpoint.ask("Hello!", max_tokens=8)  # a `Reply`; of stream=True, put together again

Nothing is believed: an answer is read under a limit of bytes and of time, what is not of OpenAI's
shape raises `Failed`, and no redirect is followed. What this is not: a client to work with.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2 as httpx

from gemsmith.errors import RequestError

Json = dict[str, Any]
MAX_ANSWER_BYTES = 16 << 20
CONNECT_S = 10.0
MARKERS = (
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", "<|channel>",
    "<channel|>", "<|turn>", "<turn|>", '<|"|>', "<|think|>", "<|tool>", "<tool|>", "<think>",
    "</think>", "<tool_call>", "</tool_call>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>",
)  # fmt: skip
"""What models write for machines, Gemma 4 and others; no reader of an answer should see it."""


class Failed(Exception):
    """The endpoint does not do what it should. evidence: the bytes that show it; None for those
    of the last answer."""

    def __init__(self, message: str, evidence: Any = None) -> None:
        super().__init__(message)
        self.evidence = evidence


class Skipped(Exception):
    """It cannot be said whether the endpoint does it: why."""


def need(condition: object, message: str, evidence: Any = None) -> None:
    """Raises:
    Failed: the condition does not hold.
    """
    if not condition:
        raise Failed(message, evidence)


@dataclass(slots=True)
class Answer:
    """One HTTP answer, whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """Raises:
        Failed: it is no JSON, or not UTF-8.
        """
        return parsed(self.body)

    def refusal(self) -> str:
        """What an error says."""
        try:
            told = json.loads(self.body)
            error = told.get("error", told) if isinstance(told, dict) else told
            text = error.get("message") if isinstance(error, dict) else error
        except (ValueError, RecursionError):
            text = None
        return str(text or self.body[:200].decode("utf-8", "replace"))[:300]


@dataclass(slots=True)
class Choice:
    """One reply of an answer."""

    index: int
    content: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    """As OpenAI has them: id, type, function with name and arguments."""
    finish: str | None = None
    logprobs: list[Json] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.content or self.calls)

    def arguments(self, place: int = 0) -> Json:
        """Of one call.

        Raises:
          Failed: there is no such call, or they are no JSON object as text.
        """
        need(len(self.calls) > place, f"{len(self.calls)} tool calls came, not {place + 1}")
        given = _of(_of(self.calls[place], "function", dict), "arguments", str)
        made = parsed(given.encode("utf-8", "replace"))
        need(isinstance(made, dict), "the arguments of a call are no JSON object", given)
        return made


@dataclass(slots=True)
class Reply:
    """What became of a chat request."""

    answer: Answer
    choices: list[Choice]
    usage: Json
    """Empty where none was given."""
    head: Json
    """id, object, created, model."""
    chunks: list[Json] = field(default_factory=list)
    """Of a stream."""

    @property
    def first(self) -> Choice:
        need(self.choices, "the reply has no choices")
        return self.choices[0]

    @property
    def content(self) -> str:
        return self.first.content

    def count(self, *path: str) -> int:
        """A number of `usage`.

        Raises:
          Failed: it is not there.
        """
        found = self.detail(*path)
        need(found is not None, f"usage has no {'.'.join(path)}", self.usage)
        return found or 0

    def detail(self, *path: str) -> int | None:
        """A number of `usage` that need not be there."""
        at: Any = self.usage
        for name in path:
            at = at.get(name) if isinstance(at, dict) else None
        return at if isinstance(at, int) and not isinstance(at, bool) else None


class Endpoint:
    """One address. `deadline` is the monotonic time by which what is asked must have come."""

    def __init__(
        self, url: str, *, key: str | None = None, model: str | None = None, timeout_s: float = 60
    ) -> None:
        """url: with or without /v1. timeout_s: what `connect` may take, and each probe.

        Raises:
          RequestError: no http address.
        """
        given = url if "://" in url else f"http://{url}"
        try:
            parts = httpx.URL(given)
        except httpx.InvalidURL as error:
            raise RequestError(f"{url}: no address ({error}); http://127.0.0.1:8000 is one") from (
                None
            )
        if parts.scheme not in ("http", "https") or not parts.host:
            raise RequestError(f"{url}: no http(s) address; http://127.0.0.1:8000 is one")
        self.root = given.rstrip("/").removesuffix("/v1").rstrip("/")
        self.model, self.timeout_s = model or "", timeout_s
        self.facts: Json = {}
        """What /v1/models says of the model."""
        self.thinks: Json | None = None
        """Fields that ask for thoughts; None until they were looked for."""
        self.deadline = time.monotonic() + timeout_s
        self.sent: bytes = b""
        self.last: bytes = b""
        """The last answer's body, as far as it came."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(headers=headers, timeout=timeout_s, follow_redirects=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def connect(self) -> None:
        """Find out what is served.

        Raises:
          RequestError: nothing answers, or not as an endpoint of this kind.
        """
        self.deadline = time.monotonic() + min(self.timeout_s, CONNECT_S)
        try:
            answer = self.send("GET", "/v1/models")
        except (Failed, httpx.HTTPError) as error:
            raise RequestError(
                f"{self.root} does not answer ({error}); is the server up, and the address and "
                "port right?"
            ) from None
        if answer.status in (401, 403):
            raise RequestError(
                f"{self.root} asks for an API key (status {answer.status}); give one with "
                "--api-key-file"
            )
        try:
            found = [each for each in answer.json["data"] if isinstance(each["id"], str)]
        except (Failed, KeyError, TypeError):
            found = []
        if not found and not self.model:
            raise RequestError(
                f"{self.root}/v1/models lists no model (status {answer.status}); if this is the "
                "address of an OpenAI-compatible endpoint, name one with --model"
            )
        names = [each["id"] for each in found]
        if self.model and names and self.model not in names:
            raise RequestError(
                f"{self.model!r} is not served at {self.root}; these are: {', '.join(names[:8])}"
            )
        self.model = self.model or names[0]
        self.facts = next((each for each in found if each["id"] == self.model), {})

    # -- requests -----------------------------------------------------------------------------

    def send(
        self, method: str, path: str, body: Any = None, *, content: bytes | None = None
    ) -> Answer:
        """One request and all of its answer. content: a body as bytes, instead of JSON.

        Raises:
          Failed: it takes too long or is too large.
        """
        with self.opened(method, path, body, content=content) as response:
            for block in response.iter_bytes():
                self.last += block
                need(len(self.last) <= MAX_ANSWER_BYTES, "the answer does not end", self.last[:400])
                need(time.monotonic() < self.deadline, "the time is up; this is what had come")
            return Answer(response.status_code, response.headers, self.last)

    def together(self, path: str, body: Any) -> Answer:
        """One of several requests at a time, from a thread of its own.

        Raises:
          Failed: no answer in time.
        """
        left = max(0.05, self.deadline - time.monotonic())
        try:
            found = self._client.post(self.root + path, json=body, timeout=left)
        except httpx.HTTPError as error:
            raise Failed(f"no answer to one of several at a time ({error})") from None
        return Answer(found.status_code, found.headers, found.content)

    def leave_after(self, method: str, path: str, body: Any, *, seconds: float) -> None:
        """Send a request, wait for its answer this long, and disconnect."""
        with suppress(httpx.TimeoutException):
            self._client.request(method, self.root + path, json=body, timeout=seconds)

    @contextmanager
    def opened(
        self, method: str, path: str, body: Any = None, *, content: bytes | None = None,
        files: Any = None,
    ) -> Iterator[httpx.Response]:  # fmt: skip
        """An answer whose body is yet to be read; leaving disconnects.

        Raises:
          Failed: nobody answers in time.
        """
        self.sent, self.last = content or b"", b""
        headers = {"content-type": "application/json"} if files is None else {}
        if body is not None and files is None:
            content = self.sent = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        left = max(0.05, self.deadline - time.monotonic())
        given: Any = {"content": content} if files is None else {"files": files, "data": body}
        try:
            with self._client.stream(
                method, self.root + path, headers=headers, timeout=left, **given
            ) as response:
                yield response
        except httpx.TimeoutException:
            raise Failed(f"no answer within {left:.2g} s", self.last) from None
        except httpx.HTTPError as error:
            raise Failed(
                f"the connection broke ({error or type(error).__name__})", self.last
            ) from (None)

    def body(self, messages: Any, **fields: Any) -> Json:
        """Of a chat request: greedy and short, if nothing else is said. A None leaves one out."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        usual = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 32}
        return {name: value for name, value in (usual | fields).items() if value is not None}

    def chat(self, messages: Any, **fields: Any) -> Answer:
        """The answer to a chat request, whatever it is."""
        return self.send("POST", "/v1/chat/completions", self.body(messages, **fields))

    def ask(self, messages: Any, *, must: bool = False, **fields: Any) -> Reply:
        """The reply to a chat request. must: this has to be served; otherwise it may be refused.

        Raises:
          Skipped: it is refused, with a word why. Failed: another error, or no reply at all.
        """
        answer = self.chat(messages, **fields)
        if answer.status != 200:
            self._refused(answer, must)
        return streamed(answer) if fields.get("stream") else whole(answer)

    def both(self, messages: Any, **fields: Any) -> tuple[Reply, Reply]:
        """The same asked in one piece and as a stream."""
        one = self.ask(messages, **fields)
        options = {"include_usage": True}
        return one, self.ask(messages, **fields, stream=True, stream_options=options)

    def thought(self, messages: Any, **fields: Any) -> Reply:
        """A reply with thinking on, in whatever words the endpoint takes.

        Raises:
          Skipped: it takes none.
        """
        words: list[Json] = [
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": True}},
            {"reasoning_effort": "low"},
            {"chat_template_kwargs": {"enable_thinking": True}},
        ]
        if self.thinks is None:
            self.thinks = {}
            for asked in words:
                if self.chat("Hi", **asked, max_tokens=1).status == 200:
                    self.thinks = asked
                    break
        if not self.thinks:
            raise Skipped("thinking can be asked for neither by effort nor by template")
        return self.ask(messages, **{"max_tokens": 256, **self.thinks, **fields})

    def _refused(self, answer: Answer, must: bool) -> None:
        said = f"status {answer.status}: {answer.refusal()}"
        unsupported = answer.status == 501 or "support" in answer.refusal()
        if must or not (400 <= answer.status < 500 or unsupported):
            raise Failed(f"an ordinary request is answered with {said}")
        raise Skipped(f"refused, {said}")


# -- reading ----------------------------------------------------------------------------------


def parsed(text: bytes) -> Any:
    """JSON of the wire.

    Raises:
      Failed: it is none.
    """
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failed(f"no JSON in UTF-8: {error}", text) from None


def whole(answer: Answer) -> Reply:
    """A reply that came in one piece.

    Raises:
      Failed: it is not of OpenAI's shape.
    """
    body = answer.json
    need(isinstance(body, dict), "a reply is no JSON object")
    choices = []
    for entry in _of(body, "choices", list):
        message = _of(entry, "message", dict)
        need(message.get("role") == "assistant", "a message's role is not assistant", message)
        choice = Choice(_of(entry, "index", int), finish=entry.get("finish_reason"))
        _add(choice, message)
        choice.calls = list(message.get("tool_calls") or ())
        choice.logprobs = _logprobs(entry)
        choices.append(choice)
    need(choices, "the reply has no choices")
    return Reply(answer, choices, body.get("usage") or {}, _head(body))


def events(answer: Answer) -> list[str]:
    """The data of server-sent events, in order.

    Raises:
      Failed: it is no event stream.
    """
    try:
        text = answer.body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Failed(f"the stream is not UTF-8: {error}") from None
    found = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        data = [line[5:].removeprefix(" ") for line in lines if line.startswith("data:")]
        other = ("data:", "event:", "id:", "retry:")
        need(all(line.startswith(other) for line in lines), "a line is no event's", block)
        if data:
            found.append("\n".join(data))
    return found


def streamed(answer: Answer) -> Reply:
    """A reply put together from its stream.

    Raises:
      Failed: a chunk is not of OpenAI's shape, or the stream holds an error.
    """
    kept: dict[int, Choice] = {}
    usage: Json = {}
    chunks: list[Json] = []
    for data in events(answer):
        if data == "[DONE]":
            continue
        chunk = parsed(data.encode("utf-8", "replace"))
        need(isinstance(chunk, dict), "a chunk is no JSON object", data)
        need("error" not in chunk, "the stream holds an error", data)
        chunks.append(chunk)
        usage = chunk.get("usage") or usage
        for entry in _of(chunk, "choices", list):
            index = _of(entry, "index", int)
            choice = kept.setdefault(index, Choice(index))
            delta = entry.get("delta") or {}
            _add(choice, delta)
            for piece in delta.get("tool_calls") or ():
                _grow(choice.calls, piece)
            choice.logprobs += _logprobs(entry)
            if entry.get("finish_reason") is not None:
                need(choice.finish is None, "a choice ends twice", data)
                choice.finish = entry["finish_reason"]
    need(kept, "the stream has no choices")
    ordered = [kept[index] for index in sorted(kept)]
    return Reply(answer, ordered, usage, _head(chunks[0]), chunks)


def marked(text: str) -> str | None:
    """The first marker in a text, if there is one."""
    return next((marker for marker in MARKERS if marker in text), None)


def clean(reply: Reply) -> None:
    """No marker shows in any text or call.

    Raises:
      Failed: one does.
    """
    for choice in reply.choices:
        texts = {"content": choice.content, "reasoning": choice.reasoning}
        texts["a tool call"] = json.dumps(choice.calls, ensure_ascii=False)
        for where, text in texts.items():
            found = marked(text)
            need(found is None, f"{found} shows in {where}", text)


def read_key(path: Path) -> str:
    """The first key of a file.

    Raises:
      RequestError: there is none. OSError: no such file.
    """
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    found = next((line for line in lines if line and not line.startswith("#")), None)
    if found is None or not found.isascii() or not found.isprintable():
        raise RequestError(f"{path} holds no API key; write it on a line of its own")
    return found


def _head(body: Mapping[str, Any]) -> Json:
    return {name: body.get(name) for name in ("id", "object", "created", "model")}


def _of(entry: Any, name: str, kind: type) -> Any:
    found = entry.get(name) if isinstance(entry, dict) else None
    need(isinstance(found, kind), f"{name} is missing or no {kind.__name__}", entry)
    return found


def _add(choice: Choice, message: Mapping[str, Any]) -> None:
    content = message.get("content")
    need(content is None or isinstance(content, str), "content is no text", message)
    choice.content += content or ""
    choice.reasoning += str(message.get("reasoning_content") or message.get("reasoning") or "")


def _grow(calls: list[Json], piece: Any) -> None:
    index = _of(piece, "index", int)
    need(0 <= index <= len(calls), f"a call's index {index} comes after {len(calls)}", piece)
    if index == len(calls):
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call, given = calls[index], piece.get("function") or {}
    call["id"] += piece.get("id") or ""
    call["function"]["name"] += given.get("name") or ""
    call["function"]["arguments"] += given.get("arguments") or ""


def _logprobs(entry: Mapping[str, Any]) -> list[Json]:
    found = entry.get("logprobs")
    content: Sequence[Any] = (found.get("content") or ()) if isinstance(found, dict) else ()
    return [each for each in content if isinstance(each, dict)]
