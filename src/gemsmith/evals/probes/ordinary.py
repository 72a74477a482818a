"""What every request relies on: the same again, where replies end, errors, leaving."""

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

from gemsmith.evals.conformance import probe
from gemsmith.evals.endpoint import Answer, Endpoint, Json, Reply, Skipped, need, whole
from gemsmith.evals.probes.chat import YOU

CHAT = "/v1/chat/completions"


# -- the prefix cache -------------------------------------------------------------------------


def _long(words: int = 150) -> str:
    """A text that nobody has sent before, from its first word on."""
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return f"{uuid4().hex}: " + " ".join(numbers[i % 10] for i in range(words)) + "."


def _cached(reply: Reply) -> int:
    found = reply.detail("prompt_tokens_details", "cached_tokens")
    if found is None:
        raise Skipped("cached tokens are not told")
    return found


def _user(text: str) -> Json:
    return {"role": "user", "content": text}


@probe("cache", "the answer is the same cold and warm")
def cache_same(e: Endpoint) -> None:
    text = _long() + " Go on."
    replies = [e.ask(text, must=True, max_tokens=16) for _ in range(3)]
    for reply in replies[1:]:
        need(reply.content == replies[0].content, f"cold {replies[0].content!r}, warm "
             f"{reply.content!r}")  # fmt: skip


@probe("cache", "log-probabilities are the same cold and warm, to a hundredth")
def cache_logprobs(e: Endpoint) -> None:
    text = _long() + " Go on."
    asked: Json = {"logprobs": True, "top_logprobs": 1, "max_tokens": 4}
    cold, warm = (e.ask(text, **asked).first.logprobs for _ in range(2))
    if not cold:
        raise Skipped("no log-probabilities are given")
    for a, b in zip(cold, warm, strict=True):
        need(a["token"] == b["token"], f"cold {a['token']!r}, warm {b['token']!r}")
        gap = abs(a["logprob"] - b["logprob"])
        need(gap < 0.01, f"{a['token']!r} differs by {gap:.3g} nats")


@probe("cache", "the second time, cached tokens are told; the first time, few are")
def cache_told(e: Endpoint) -> None:
    text = _long() + " Go on."
    cold, warm = (e.ask(text, must=True, max_tokens=2) for _ in range(2))
    total = cold.count("prompt_tokens")
    need(_cached(cold) < total // 2, "of a text that is new half is cached", cold.usage)
    if not _cached(warm):
        raise Skipped("nothing is reused of a prompt that was sent twice")
    need(_cached(warm) <= total, "more is cached than there is", warm.usage)


@probe("cache", "a turn goes on from the one before it")
def cache_turns(e: Endpoint) -> None:
    messages = [_user(_long())]
    first = e.ask(messages, must=True, max_tokens=12)
    messages += [{"role": "assistant", "content": first.content}, _user("And then?")]
    second = e.ask(messages, must=True, max_tokens=12)
    if not _cached(second):
        raise Skipped("nothing of the first turn is reused")
    need(_cached(second) < second.count("prompt_tokens"), "all of it is cached", second.usage)
    again = e.ask(messages, must=True, max_tokens=12)
    need(second.content == again.content, f"{second.content!r}, then {again.content!r}")


@probe("cache", "branches of one conversation do not mix")
def cache_branches(e: Endpoint) -> None:
    head = [_user(_long()), {"role": "assistant", "content": "Yes."}]
    ends = ("And then?", "Say hello.", "Count to three.")
    first = [e.ask([*head, _user(end)], must=True, max_tokens=12).content for end in ends]
    again = [e.ask([*head, _user(end)], must=True, max_tokens=12).content for end in ends[::-1]]
    need(first == again[::-1], f"{first}, in the other order {again[::-1]}")


@probe("cache", "a prompt that differs in its first words reuses nothing of what follows them")
def cache_first_words(e: Endpoint) -> None:
    tail = _long()
    one = e.ask(f"{uuid4().hex} {tail}", must=True, max_tokens=2)
    other = e.ask(f"{uuid4().hex} {tail}", must=True, max_tokens=2)
    need(_cached(other) < one.count("prompt_tokens") // 2, "it does", other.usage)


# -- determinism ------------------------------------------------------------------------------


@probe("determinism", "at temperature 0 the same request has the same reply")
def same_greedy(e: Endpoint) -> None:
    found = {e.ask(YOU, must=True, max_tokens=32).content for _ in range(3)}
    need(len(found) == 1, f"{len(found)} replies: {sorted(found)}")


@probe("determinism", "with a seed the same request has the same reply")
def same_seed(e: Endpoint) -> None:
    found = {e.ask(YOU, temperature=1, seed=7, max_tokens=32).content for _ in range(3)}
    need(len(found) == 1, f"{len(found)} replies: {sorted(found)}")


@probe("determinism", "other seeds have other replies")
def other_seeds(e: Endpoint) -> None:
    found = {e.ask(YOU, temperature=1.5, seed=seed, max_tokens=32).content for seed in range(6)}
    if len(found) == 1:
        raise Skipped("six seeds, one reply: the model may be that sure")


@probe("determinism", "asked together, requests have the replies that they have alone")
def same_together(e: Endpoint) -> None:
    texts = [YOU, "Count to five.", "Say hello.", "What is a tree?"]
    alone = [e.ask(text, must=True, max_tokens=16).content for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        bodies = [e.body(text, max_tokens=16) for text in texts]
        answers = pool.map(lambda body: e.together(CHAT, body), bodies)
        together = [whole(answer).content for answer in answers]
    need(alone == together, f"alone {alone}, together {together}")


def _logprobs(e: Endpoint, **fields: Any) -> list[Json]:
    asked = {"logprobs": True, "top_logprobs": 4, "max_tokens": 12, **fields}
    found = e.ask(YOU, **asked).first.logprobs
    if not found:
        raise Skipped("no log-probabilities are given")
    return found


@probe("determinism", "log-probabilities are none above 0, and do not sum up beyond 1")
def logprobs_sum(e: Endpoint) -> None:
    for entry in _logprobs(e):
        need(entry["logprob"] <= 1e-6, f"{entry['token']!r} has {entry['logprob']}", entry)
        told = {str(top.get("bytes") or top["token"]): top for top in entry["top_logprobs"]}
        total = sum(math.exp(top["logprob"]) for top in told.values())
        need(total <= 1.001, f"probabilities at {entry['token']!r} sum up to {total:.4f}", entry)


@probe("determinism", "greedy takes the likeliest, and the top ones come in order")
def logprobs_order(e: Endpoint) -> None:
    for entry in _logprobs(e):
        top = [each["logprob"] for each in entry["top_logprobs"]]
        need(top == sorted(top, reverse=True), "they are not in order", entry)
        need(len(top) <= 4, f"{len(top)} came, 4 were asked for", entry)
        need(not top or entry["logprob"] >= top[0] - 1e-4, "another token was taken", entry)


@probe("determinism", "tokens of log-probabilities, joined, are the reply")
def logprobs_tokens(e: Endpoint) -> None:
    reply = e.ask(YOU, logprobs=True, max_tokens=12)
    entries = reply.first.logprobs
    if not entries or reply.first.reasoning:
        raise Skipped("no log-probabilities, or a thought before the reply")
    if not all(isinstance(entry.get("bytes"), list) for entry in entries):
        joined = "".join(entry["token"] for entry in entries).encode()
    else:
        joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    need(reply.content.encode().strip() in joined, f"{joined!r} for {reply.content!r}")


@probe("determinism", "log-probabilities are the same again, to a thousandth")
def logprobs_same(e: Endpoint) -> None:
    one, other = (_logprobs(e) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        need(a["token"] == b["token"], f"{a['token']!r}, then {b['token']!r}")
        gap = abs(a["logprob"] - b["logprob"])
        need(gap < 1e-3, f"{a['token']!r} differs by {gap:.3g} nats")


# -- stop strings -----------------------------------------------------------------------------


def _said(e: Endpoint) -> str:
    text = e.ask(YOU, must=True).content
    if len(text) < 16:
        raise Skipped("the reply is too short to be stopped")
    return text


@probe("stop", "the reply ends before a stop string, wherever tokens end")
def stop_anywhere(e: Endpoint) -> None:
    text = _said(e)
    for start, length in ((4, 1), (5, 4), (7, 8)):
        stop = text[start : start + length]
        choice = e.ask(YOU, stop=stop).first
        wanted = text[: text.find(stop)]
        need(choice.content == wanted, f"stop {stop!r}: {choice.content!r}, not {wanted!r}")


@probe("stop", "finish_reason is stop")
def stop_reason(e: Endpoint) -> None:
    choice = e.ask(YOU, stop=[_said(e)[6:10]]).first
    need(choice.finish == "stop", f"finish_reason is {choice.finish!r}")


@probe("stop", "of several, the one that comes first ends the reply")
def stop_several(e: Endpoint) -> None:
    text = _said(e)
    late, early = text[10:14], text[5:8]
    choice = e.ask(YOU, stop=[late, early, "never to be said"]).first
    wanted = text[: min(text.find(late), text.find(early))]
    need(choice.content == wanted, f"{choice.content!r}, not {wanted!r}")


@probe("stop", "one that never comes changes nothing")
def stop_never(e: Endpoint) -> None:
    text = _said(e)
    found = e.ask(YOU, stop=["\N{SNOWMAN}\N{SNOWMAN}\N{SNOWMAN}"]).content
    need(found == text, f"{text!r} became {found!r}")


@probe("stop", "one that only begins in the reply takes nothing away from its end")
def stop_begun(e: Endpoint) -> None:
    text = _said(e)
    found = e.ask(YOU, stop=[text[-1] + "\N{SNOWMAN}"]).content
    need(found == text, f"{text!r} became {found!r}")


# -- lengths ----------------------------------------------------------------------------------


@probe("limits", "max_tokens 1 gives one token, and the reason is length")
def length_one(e: Endpoint) -> None:
    reply = e.ask(YOU, must=True, max_tokens=1)
    need(reply.count("completion_tokens") == 1, f"{reply.count('completion_tokens')} tokens")
    need(reply.first.finish == "length", f"finish_reason is {reply.first.finish!r}")


@probe("limits", "max_completion_tokens is max_tokens by its new name")
def length_new_name(e: Endpoint) -> None:
    reply = e.ask(YOU, max_tokens=None, max_completion_tokens=3)
    need(reply.count("completion_tokens") <= 3, f"{reply.count('completion_tokens')} tokens of 3")
    need(reply.first.finish == "length", f"finish_reason is {reply.first.finish!r}")


@probe("limits", "a reply that ends by itself says stop")
def length_stop(e: Endpoint) -> None:
    reply = e.ask("Hello!", must=True, max_tokens=256)
    if reply.count("completion_tokens") >= 256:
        raise Skipped("the model did not come to an end")
    need(reply.first.finish == "stop", f"finish_reason is {reply.first.finish!r}")


@probe("limits", "a shorter reply is the beginning of the longer one")
def length_prefix(e: Endpoint) -> None:
    short, long = (e.ask(YOU, must=True, max_tokens=most).content for most in (5, 20))
    need(long.startswith(short.rstrip("\ufffd")), f"{short!r} is not how {long!r} begins")


@probe("limits", "a length below 0 is refused")
def length_negative(e: Endpoint) -> None:
    _refused(e.chat(YOU, max_tokens=-5))


@probe("limits", "n replies come, with indexes from 0 on, at temperature 0 the same")
def n_replies(e: Endpoint) -> None:
    choices = e.ask(YOU, n=3, max_tokens=8).choices
    need([each.index for each in choices] == [0, 1, 2], f"indexes {[c.index for c in choices]}")
    need(len({each.content for each in choices}) == 1, f"{[c.content for c in choices]}")


@probe("limits", "n = 0 is refused")
def n_none(e: Endpoint) -> None:
    _refused(e.chat(YOU, n=0))


# -- errors -----------------------------------------------------------------------------------


def _refused(answer: Answer) -> None:
    """Refused with a status of the 400s and a body of OpenAI's shape.

    Raises:
      Failed: it is not.
    """
    need(400 <= answer.status < 500, f"status {answer.status}")
    body = answer.json
    found = body.get("error") if isinstance(body, dict) else None
    need(isinstance(found, dict), "the body has no object `error`")
    error: Json = found or {}
    need(isinstance(error.get("message"), str) and error["message"], "error.message is no text")
    need(isinstance(error.get("type"), str), "error.type is no text")


_BAD: dict[str, tuple[str, Json]] = {
    "no_messages": ("no messages", {"messages": None}),
    "empty_messages": ("an empty list of messages", {"messages": []}),
    "messages_type": ("messages that are no list", {"messages": {"role": "user"}}),
    "role": ("a role that is none", {"messages": [{"role": "pirate", "content": "Hi"}]}),
    "content_type": ("content that is a number", {"messages": [{"role": "user", "content": 5}]}),
    "part_type": (
        "a part of an unknown type",
        {"messages": [{"role": "user", "content": [{"type": "smell", "smell": "tar"}]}]},
    ),
    "temperature_type": ("a temperature in words", {"temperature": "hot"}),
    "temperature": ("a temperature below 0", {"temperature": -1}),
    "top_p": ("top_p above 1", {"top_p": 1.5}),
    "tools_type": ("tools that are no list", {"tools": "hammer"}),
    "tool_name": ("a tool without a name", {"tools": [{"type": "function", "function": {}}]}),
    "tool_choice": ("a tool_choice that is none", {"tool_choice": "perhaps"}),
    "top_logprobs": ("thousands of top_logprobs", {"logprobs": True, "top_logprobs": 5000}),
}


def _bad(name: str, what: str, fields: Json) -> None:
    def check(e: Endpoint) -> None:
        body = e.body("Hi", max_tokens=2) | fields
        _refused(e.send("POST", CHAT, {k: v for k, v in body.items() if v is not None}))

    check.__name__ = f"error_{name}"
    probe("errors", f"{what}: refused with 4xx and OpenAI's error object")(check)


for _name, (_what, _fields) in _BAD.items():
    _bad(_name, _what, _fields)


@probe("errors", "a body that is no JSON, cut, or no object: 4xx and OpenAI's error object")
def error_body(e: Endpoint) -> None:
    for content in (b"hello", b'{"model": "x", "mess', b"[]", b"", b'"text"', b"\xff\xfe{}"):
        _refused(e.send("POST", CHAT, content=content))


@probe("errors", "a body nested very deeply harms nobody")
def error_deep(e: Endpoint) -> None:
    deep = b"[" * 50_000 + b"]" * 50_000
    content = b'{"model": "x", "messages": ' + deep + b"}"
    answer = e.send("POST", CHAT, content=content)
    need(400 <= answer.status < 500, f"status {answer.status}")


@probe("errors", "half of a surrogate pair is read or refused")
def error_surrogate(e: Endpoint) -> None:
    body = json.dumps(e.body("Hi \ud83d there", max_tokens=2)).encode()
    answer = e.send("POST", CHAT, content=body)
    need(answer.status == 200 or 400 <= answer.status < 500, f"status {answer.status}")


@probe("errors", "a model that is not served: 404, or another 4xx")
def error_model(e: Endpoint) -> None:
    _refused(e.chat("Hi", model="no-such-model", max_tokens=2))


@probe("errors", "a context too long: refused with 4xx at once, not cut in silence")
def error_context(e: Endpoint) -> None:
    told = e.facts.get("max_model_len") or (e.facts.get("meta") or {}).get("n_ctx_train")
    words = min(2 * int(told), 1_500_000) if told else 600_000
    _refused(e.chat("word " * words, max_tokens=2))


@probe("errors", "an address that is none: 404; a wrong method: 405 or 404")
def error_path(e: Endpoint) -> None:
    need(e.send("GET", "/v1/nowhere").status == 404, "status is not 404")
    need(e.send("GET", CHAT).status in (404, 405), "status is neither 404 nor 405")


@probe("errors", "after errors an ordinary request is answered")
def error_after(e: Endpoint) -> None:
    e.send("POST", CHAT, content=b"{")
    e.chat("Hi", temperature="hot")
    e.ask("Hi", must=True, max_tokens=4)


# -- leaving ----------------------------------------------------------------------------------


def _usual_s(e: Endpoint) -> float:
    started = time.monotonic()
    e.ask("Hi", must=True, max_tokens=2)
    return time.monotonic() - started


def _answers_soon(e: Endpoint, usual_s: float) -> None:
    limit = max(3.0, 8 * usual_s)
    took = _usual_s(e)
    need(took <= limit, f"a short request took {took:.1f} s; before, {usual_s:.2f} s")


def _leave(e: Endpoint, *, after: bytes, **fields: Any) -> None:
    """Ask for much, read until some bytes have come, and go."""
    body = e.body("Count from 1 to 1000.", max_tokens=512, stream=True, **fields)
    with e.opened("POST", CHAT, body) as response:
        need(response.status_code == 200, f"status {response.status_code}")
        for block in response.iter_bytes():
            e.last += block
            if after in e.last:
                return


@probe("cancel", "after a client left a stream, the next is answered at once")
def cancel_stream(e: Endpoint) -> None:
    usual = _usual_s(e)
    _leave(e, after=b'"content":')
    _answers_soon(e, usual)


@probe("cancel", "a client that leaves before its whole reply came frees its place")
def cancel_whole(e: Endpoint) -> None:
    usual = _usual_s(e)
    body = e.body("Count from 1 to 1000.", max_tokens=512)
    e.leave_after("POST", CHAT, body, seconds=0.15)
    _answers_soon(e, usual)


@probe("cancel", "of many that leave, none keeps its place")
def cancel_many(e: Endpoint) -> None:
    usual = _usual_s(e)
    for count in range(12):
        _leave(e, after=b"data:", temperature=1, seed=count)
    _answers_soon(e, usual)


@probe("cancel", "/metrics says that nothing runs once everybody left")
def cancel_metrics(e: Endpoint) -> None:
    def running() -> float:
        answer = e.send("GET", "/metrics")
        names = r"^(?:vllm:num_requests_running|llamacpp:requests_processing)(?:\{.*\})? (\S+)"
        found = re.findall(names, answer.body.decode("utf-8", "replace"), re.M)
        if answer.status != 200 or not found:
            raise Skipped("no count of running requests is told at /metrics")
        return sum(float(each) for each in found)

    running()
    for _ in range(3):
        _leave(e, after=b'"content":')
    end = time.monotonic() + 5
    while running() > 0:
        need(time.monotonic() < end, "requests run on, 5 s after their clients left")
        time.sleep(0.05)
