"""Probes pass where an endpoint keeps its word, and fail, with the bytes, where it does not."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gemsmith.errors import RequestError
from gemsmith.evals.conformance import GROUPS, Outcome, run, select
from gemsmith.evals.endpoint import Answer, Endpoint, Failed, events, read_key, streamed, whole

Given = tuple[int, Any]
"""A status, and a body: bytes as they are, an iterable of chunks as a stream, else JSON."""


def reply(content: str | None = "Hello there, all of you.", **message: Any) -> dict[str, Any]:
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": "same-for-all", "object": "chat.completion", "created": 1, "model": "fake",
        "choices": [{"index": 0, "finish_reason": finish,
                     "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }  # fmt: skip


def call(arguments: str, name: str = "get_weather") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": "c1", "type": "function", "function": function}


def sse(*deltas: dict[str, Any], done: bool = True) -> bytes:
    head = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
    lines = [
        head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in deltas
    ]
    if lines:
        lines[-1]["choices"][0]["finish_reason"] = "stop"
    text = "".join(f"data: {json.dumps(line)}\n\n" for line in lines)
    return (text + "data: [DONE]\n\n" * done).encode()


@contextmanager
def fake(answers: Callable[[dict[str, Any]], Given], models: Any = None) -> Iterator[Endpoint]:
    """An endpoint that answers chat requests as it is told to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = {"object": "list", "data": [{"id": "fake", "object": "model"}]}
            self._answer(*(models or (200, found)))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self._answer(*answers(json.loads(body)))

        def _answer(self, status: int, body: Any) -> None:
            made = body if isinstance(body, bytes) else json.dumps(body).encode()
            kind = "text/event-stream" if made.startswith(b"data:") else "application/json"
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(made)))
            self.end_headers()
            with suppress(BrokenPipeError):  # who asked may have left: some probes do
                self.wfile.write(made)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with Endpoint(url, timeout_s=5) as endpoint:
            yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def one(name: str, answers: Callable[[dict[str, Any]], Given]) -> Outcome:
    with fake(answers) as endpoint:
        endpoint.connect()
        [outcome] = run(endpoint, select([name])).outcomes
    return outcome


BROKEN: dict[str, tuple[Any, str, str]] = {
    # probe: what comes, the reason, what the evidence holds
    "chat-clean": (reply("Hi<turn|>"), "<turn|> shows in content", "Hi<turn|>"),
    "chat-ids": (reply(), "both have the id same-for-all", "same-for-all"),
    "chat-system": (reply(), "it costs nothing", "prompt_tokens"),
    "usage-sums": (
        reply() | {"usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 14}},
        "do not sum up", '"total_tokens": 14',
    ),
    "usage-bounded": (
        reply() | {"usage": {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}},
        "7 tokens of 6", '"completion_tokens": 7',
    ),
    "stream-done": (sse({"content": "Hi"}, done=False), "it is not", '"Hi"'),
    "stream-role": (sse({"content": "Hi"}), "it has none", '"content": "Hi"'),
    "tool-auto": (reply(None), "neither came", '"content": null'),
    "tool-auto-finish": (
        reply(None, tool_calls=[call("{}")])
        | {"choices": [{"index": 0, "finish_reason": "stop",
                        "message": {"role": "assistant", "tool_calls": [call("{}")]}}]},
        "finish_reason is 'stop', not tool_calls", "get_weather",
    ),
    "tool-required": (reply("It rains."), "no tool was called", "It rains."),
    "tool-cut": (
        reply("call:write{text:") | {"choices": [
            {"index": 0, "finish_reason": "length",
             "message": {"role": "assistant", "content": "call:write{text:"}},
        ]},
        "half of it came", "call:write{text:",
    ),
    "tool-named": (
        reply(None, tool_calls=[call('{"city": "Rome"}')]), "get_time was named", "get_weather",
    ),
    "tool-none": (reply(None, tool_calls=[call("{}")]), "one is called", "tool_calls"),
    "tool-ids": (reply(None, tool_calls=[call('{"city": "Rome"}')]), "both have the id c1", "c1"),
    "tool-integer": (
        reply(None, tool_calls=[call('{"value": "2"}', "use")]), "do not fit the schema",
        '\\"2\\"',
    ),
    "tool-text-quotes": (
        reply(None, tool_calls=[call('{"text": "say hi"}', "say")]), "the only value allowed",
        "say hi",
    ),
    "tool-parallel-off": (
        reply(None, tool_calls=[call('{"city": "Rome"}')] * 2), "2 calls came", "Rome",
    ),
    "result-loop": (reply(None), "no tool was called", "null"),
    "thinking-apart": (
        reply("Let me see. It is 42.", reasoning_content="Let me see."),
        "the thought stands in content", "Let me see. It is 42.",
    ),
    "thinking-off": (reply("Yes.", reasoning_content="Hm."), "there are", "Hm."),
    "json-schema": (reply("Here: {}"), "no JSON in UTF-8", "Here: {}"),
    "json-thinking": (
        reply('{"kind": "child", "age": 7}', reasoning_content="Hm."), "does not fit the schema",
        '"age": 7',
    ),
    "image-read": (reply(), "a picture costs 0 tokens", "prompt_tokens"),
    "audio-read": (reply(), "4 s of sound cost 0 tokens", "prompt_tokens"),
    "stop-anywhere": (reply(), "stop 'o'", "Hello there"),
    "length-one": (reply(), "4 tokens", "completion_tokens"),
    "n-replies": (reply(), "indexes [0]", '"index": 0'),
    "error-role": (reply(), "status 200", "Hello there"),
    "error-model": (reply(), "status 200", "Hello there"),
    "error-context": (reply(), "status 200", "Hello there"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_endpoint_fails_with_the_bytes_that_show_it(name):
    body, reason, evidence = BROKEN[name]
    outcome = one(name, lambda _: (200, body))
    assert outcome.status == "fail"
    assert reason in outcome.reason
    assert evidence in outcome.evidence
    assert json.loads(outcome.request)["model"]


def test_a_cache_that_answers_otherwise_the_second_time_is_found():
    seen: list[str] = []

    def answers(body: dict[str, Any]) -> Given:
        text = body["messages"][0]["content"]
        seen.append(text)
        return 200, reply("warm" if seen.count(text) > 1 else "cold")

    outcome = one("cache-same", answers)
    assert (outcome.status, outcome.reason) == ("fail", "cold 'cold', warm 'warm'")


def test_a_stream_that_says_something_else_is_found():
    def answers(body: dict[str, Any]) -> Given:
        return 200, sse({"role": "assistant", "content": "Hi"}) if body.get("stream") else reply()

    outcome = one("stream-same", answers)
    assert outcome.status == "fail"
    assert outcome.reason.startswith("content: whole 'Hello there, all of you.', streamed 'Hi'")


def test_an_endpoint_that_runs_on_after_clients_left_is_found(monkeypatch):
    from gemsmith.evals.probes import ordinary

    times = iter([0.01, 9.0])
    monkeypatch.setattr(ordinary, "_usual_s", lambda e: next(times))
    outcome = one("cancel-stream", lambda _: (200, sse({"content": "1"})))
    assert outcome.reason == "a short request took 9.0 s; before, 0.01 s"


@pytest.mark.parametrize(
    ("status", "what", "became"),
    [(400, "seed: unknown", "skip"), (501, "later", "skip"), (500, "no", "fail"),
     (500, "seed is not supported", "skip")],
)  # fmt: skip
def test_what_is_refused_with_a_word_is_skipped_and_what_breaks_fails(status, what, became):
    outcome = one("same-seed", lambda _: (status, {"error": {"message": what, "type": "x"}}))
    assert outcome.status == became
    assert f"status {status}: {what}" in outcome.reason


def test_an_ordinary_request_may_not_be_refused():
    outcome = one("chat-shape", lambda _: (400, {"error": {"message": "no", "type": "x"}}))
    assert outcome.status == "fail"
    assert outcome.reason == "an ordinary request is answered with status 400: no"


@pytest.mark.parametrize(
    "body",
    [[], {}, {"choices": 5}, {"choices": []}, {"choices": [{"index": 0, "message": None}]},
     {"choices": [{"index": 0, "message": {"role": "assistant", "content": 5}}]}, b"", b"\xff",
     reply(None, tool_calls=[5]), reply() | {"usage": 7}, b"[" * 100_000],
)  # fmt: skip
def test_no_answer_of_any_shape_stops_a_run(body):
    with fake(lambda _: (200, body)) as endpoint:
        endpoint.connect()
        report = run(endpoint, select(["chat", "usage", "tool-auto", "tool-required", "n-replies"]))
    assert report.complete
    assert report.count("fail") > 10


def test_an_answer_that_never_ends_is_left():
    with fake(lambda _: (200, reply())) as endpoint:
        endpoint.connect()
        endpoint.timeout_s = 0.2
        stuck = threading.Event()
        with fake(lambda _: (stuck.wait(2), (200, reply()))[1]) as slow:
            slow.connect()
            slow.timeout_s = 0.2
            [outcome] = run(slow, select(["chat-shape"])).outcomes
            stuck.set()
    assert (outcome.status, outcome.reason) == ("fail", "no answer within 0.2 s")


def test_calls_and_texts_of_a_stream_are_put_together():
    deltas = (
        {"role": "assistant", "content": "He"},
        {"content": "llo", "reasoning_content": "hm"},
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
    )
    choice = streamed(Answer(200, {}, b": ping\r\n\r\n" + sse(*deltas))).first
    assert (choice.content, choice.reasoning, choice.finish) == ("Hello", "hm", "stop")
    assert choice.calls[0]["id"] == "c1"
    assert choice.arguments() == {"a": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"choices": []}\n\n', "a line is no event's"),
        (b"data: {\n\n", "no JSON"),
        (b"data: \xff\n\n", "not UTF-8"),
        (b'data: {"error": {"message": "no"}}\n\n', "the stream holds an error"),
        (b"data: [DONE]\n\n", "the stream has no choices"),
        (sse({"tool_calls": [{"index": 3, "id": "x"}]}), "a call's index 3 comes after 0"),
    ],
)
def test_what_is_no_stream_is_told(body, message):
    with pytest.raises(Failed, match=message):
        streamed(Answer(200, {}, body))


def test_a_whole_reply_is_read():
    made = whole(Answer(200, {}, json.dumps(reply(reasoning="hm")).encode()))
    assert (made.content, made.first.reasoning) == ("Hello there, all of you.", "hm")
    assert events(Answer(200, {}, b"data: a\ndata: b\n\n")) == ["a\nb"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://here", "no http"),
        ("http://", "no http"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1 does not answer .*refused.*is the server up"),
        ("http://here:no", "no address"),
    ],
)
def test_an_address_where_nobody_answers_is_named(url, message):
    with pytest.raises(RequestError, match=message), Endpoint(url, timeout_s=2) as endpoint:
        endpoint.connect()


@pytest.mark.parametrize(
    ("models", "name", "message"),
    [
        ((401, {}), None, "asks for an API key .status 401.; give one with --api-key-file"),
        ((404, b"<html>"), None, "lists no model .status 404.*name one with --model"),
        ((200, {"data": [{"id": "a"}]}), "b", "'b' is not served at .*; these are: a"),
    ],
)
def test_what_is_no_endpoint_is_told(models, name, message):
    with fake(lambda _: (200, reply()), models) as endpoint:
        endpoint.model = name or ""
        with pytest.raises(RequestError, match=message):
            endpoint.connect()


def test_probes_have_names_groups_and_one_line_each():
    probes = select()
    assert len({each.name for each in probes}) == len(probes) > 150
    assert {each.group for each in probes} == set(GROUPS)
    assert all(each.what and "\n" not in each.what and len(each.what) < 100 for each in probes)
    assert [each.name for each in select(["stop-reason"])] == ["stop-reason"]
    with pytest.raises(RequestError, match="--only tool: no such group; these are: models, chat"):
        select(["tool"])


def test_a_key_is_the_first_line_that_is_one(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# mine\n\nabc \ndef\n")
    assert read_key(path) == "abc"
    path.write_text("# none\n")
    with pytest.raises(RequestError, match="holds no API key"):
        read_key(path)
