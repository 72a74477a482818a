"""Benchmarks of servers without a peer: traffic, client, loops, soak; what records become."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from PIL import Image
from tests.benchmarks.test_measurements import record

from benchmarks import (
    agent,
    client,
    conformance,
    llama,
    measure,
    musts,
    report,
    serve,
    servers,
    soak,
    soak_worker,
    to_gguf,
)
from gemsmith.evals.conformance import Outcome, Report
from gemsmith.weights.hub import resolve

SHAPE = serve.Shape(20, 6, 3, 5, turns=3, generated=4, pause_s=0.01)
EVENTS = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"usage": {"completion_tokens": 4}}\n\n'
Respond = Callable[[str, dict[str, Any]], bytes]


def reply(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def chunked(*pieces: bytes) -> bytes:
    parts = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + parts


@asynccontextmanager
async def fake(respond: Respond) -> AsyncIterator[servers.Server]:
    """A server that answers each request, by path and body, with these bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.partition("Content-Length: ")[2].partition("\r\n")[0])
        body = json.loads(await reader.readexactly(length) or b"{}")
        writer.write(respond(head.split()[1], body))
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        yield servers.Server("fake", port, None, None)  # pyright: ignore[reportArgumentType]


def test_prompts_grow_by_turns_that_are_the_same_for_every_server() -> None:
    talks = serve.conversations(SHAPE, 3, 1024, "1")
    assert talks == serve.conversations(SHAPE, 3, 1024, "1")
    for prompts in talks:
        assert [len(prompt) for prompt in prompts] == [26, 34, 42]
        assert prompts[1][:26] == prompts[0]
        assert prompts[2][:34] == prompts[1]
        ends = [at + 1 for at, id in enumerate(prompts[2]) if id == 106]
        assert ends == [20, 26, 29, 34, 37, 42]
        assert all(256 <= id < 960 for id in prompts[2] if id not in (2, 106))
    assert SHAPE.longest == 46


def test_clients_share_the_beginning_of_a_round_and_no_more() -> None:
    (one, *_), (two, *_) = serve.conversations(SHAPE, 2, 1024, "1")
    (other, *_), *_ = serve.conversations(SHAPE, 1, 1024, "2")
    assert one[:20] == two[:20]
    assert one[20:] != two[20:]
    assert other[:2] != one[:2]


def test_time_in_which_a_request_was_open_leaves_out_pauses_and_counts_overlaps_once() -> None:
    assert serve.open_seconds([(5, 6), (0, 2), (1, 3), (1.5, 2)]) == 4


def test_a_round_counts_every_token_and_tells_first_turns_from_later_ones() -> None:
    prompts: list[list[int]] = []

    def respond(path: str, body: dict[str, Any]) -> bytes:
        prompts.append(body["prompt"])
        assert (path, body["ignore_eos"], body["max_tokens"]) == ("/v1/completions", True, 4)
        return chunked(EVENTS[:20], EVENTS[20:])

    async def run() -> serve.Round:
        async with fake(respond) as server:
            return await serve.play(server, SHAPE, serve.conversations(SHAPE, 2, 1024, "1"), "1")

    done = asyncio.run(run())
    assert sorted(map(len, prompts)) == [26, 26, 34, 34, 42, 42]
    assert done.tokens_per_s > 0
    assert 0 < done.first_turn_s < 5
    assert 0 < done.later_turns_s < 5


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(b"no room", 503), "fake: status 503: b'no room'"),
        (reply(EVENTS.replace(b"4}", b"3}")), "fake: 4 tokens were asked for"),
        (reply(b"data: {}\n\n"), "fake: 4 tokens were asked for"),
    ],
)
def test_a_reply_of_another_length_ends_the_measurement(answer: bytes, words: str) -> None:
    async def run() -> None:
        async with fake(lambda *_: answer) as server:
            found = await client.ask(server.port, "/", {})
            serve.check(found, server.name, 4)

    with pytest.raises(RuntimeError, match=words):
        asyncio.run(run())


def test_a_body_in_chunks_is_joined_and_one_that_was_cut_off_is_an_error() -> None:
    assert client.joined(b"3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n") == b"abc0123456789"
    with pytest.raises(ConnectionError, match="cut off after 3 bytes"):
        client.joined(b"3\r\nabc\r\n")


def test_a_client_can_turn_its_back_on_an_answer() -> None:
    async def run() -> None:
        async with fake(lambda *_: reply(b"x" * 1000)) as server:
            assert (await client.ask(server.port, "/")).body == b"x" * 1000
            await client.ask(server.port, "/", most=10)

    with pytest.raises(ConnectionAbortedError, match="more not wanted"):
        asyncio.run(run())


def call(city: str) -> bytes:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    message = {"role": "assistant", "tool_calls": [{"id": "x", "function": function}]}
    choices = [{"message": message}]
    return reply(json.dumps({"choices": choices, "usage": {"completion_tokens": 7}}).encode())


def test_a_loop_takes_the_calls_that_came_and_the_expected_ones_where_none_did() -> None:
    asked: list[agent.Messages] = []

    def respond(path: str, body: dict[str, Any]) -> bytes:
        asked.append(body["messages"])
        assert (path, body["tool_choice"], body["max_tokens"]) == (
            "/v1/chat/completions", "required", 9)  # fmt: skip
        return (call("Quito"), reply(b"broken", 500), call("Atlantis"))[len(asked) % 3]

    async def run() -> agent.Loop:
        async with fake(respond) as server:
            return await agent.loop(server, 0, 9)

    done = asyncio.run(run())
    assert (done.calls, sum(done.tokens)) == (3, 6 * 7)
    assert [len(messages) for messages in asked] == [2 + 2 * step for step in range(10)]
    cities = [
        json.loads(message["tool_calls"][0]["function"]["arguments"])["city"]
        for message in asked[-1]
        if message.get("tool_calls")
    ]
    assert cities == ["Paris", "Tokyo", "Quito", "Quito", "Delhi", "Quito", "Tokyo", "Lagos",
                      "Quito"]  # fmt: skip


def test_a_call_with_more_than_the_schema_has_is_none_that_came() -> None:
    told = json.loads(call("Quito").partition(b"\r\n\r\n")[2])
    assert agent.call_of(told) == "Quito"
    function = told["choices"][0]["message"]["tool_calls"][0]["function"]
    function["arguments"] = '{"city": "Quito", "sky": 1}'
    assert agent.call_of(told) is None
    function |= {"arguments": '{"city": "Quito"}', "name": "other"}
    assert agent.call_of(told) is None


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_server_is_there_once_it_is_healthy_and_gone_at_the_end() -> None:
    command = [sys.executable, "-c", SERVER]
    with servers.running("it", command, threads=1, cores=[]) as server:
        assert server.peak() >= server.resident() > 1 << 20
        assert server.process.poll() is None
        assert "GET /health" in server.said()
    assert server.process.returncode is not None


def test_a_server_that_does_not_start_says_why() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(RuntimeError, match="it did not start: no such model"),
        servers.running("it", command, threads=1, cores=[]),
    ):
        pass


def test_llama_server_can_be_named_and_must_then_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-server"
    monkeypatch.setenv(llama.NAMED, str(program))
    assert llama.server() == (None, f"GEMSMITH_LLAMA_SERVER: no file {program}")
    program.touch()
    assert llama.server() == (program, "")


def test_chats_are_formatted_as_for_small_models_where_llama_cpps_source_is(tmp_path: Path) -> None:
    program, file = tmp_path / "build" / "bin" / "llama-server", tmp_path / "x.gguf"
    assert servers.chat_template(program, file) is None
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "CMakeCache.txt").write_text(
        f"A:B=c\nCMAKE_HOME_DIRECTORY:INTERNAL={tmp_path}\nD:E=f\n"
    )
    template = tmp_path / servers.TEMPLATE
    template.parent.mkdir(parents=True)
    template.write_text(r"<|turn>model{{- '<|channel>thought\n<channel|>' -}}")
    made = servers.chat_template(program, file)
    assert made == tmp_path / "x.jinja"
    assert (tmp_path / "x.jinja").read_text() == "<|turn>model{{- '' -}}"


def test_a_gguf_file_has_the_folders_own_tokens(tmp_path: Path) -> None:
    folder = resolve("pocket")
    told = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    fields = gguf.GGUFReader(to_gguf.write(folder, tmp_path / "x.gguf")).fields
    held = {
        name: fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("tokens", "token_type", "merges")
    }
    assert all(held["tokens"][id] == token for token, id in told["model"]["vocab"].items())
    assert held["merges"] == [" ".join(pair) for pair in told["model"]["merges"]]
    kinds = dict(zip(held["tokens"], held["token_type"], strict=True))
    kind = gguf.TokenType
    assert [kinds[token] for token in ("<bos>", "<|tool_call>", '<|"|>', "<0x41>", "a")] == [
        kind.CONTROL, kind.USER_DEFINED, kind.USER_DEFINED, kind.BYTE, kind.NORMAL]  # fmt: skip


def test_probes_are_counted_by_group_and_those_that_failed_are_named() -> None:
    asked = [
        Outcome("a", "chat", "", "pass"),
        Outcome("b", "chat", "", "fail", "why"),
        Outcome("c", "stop", "", "skip"),
    ]
    found = conformance.counted(Report("http://x", "m", asked))
    assert found["groups"]["chat"] == {"pass": 1, "fail": 1}
    assert found["groups"]["stop"] == {"skip": 1}
    assert found["groups"]["tools"] == {}
    assert found["failed"] == {"b": "why"}


@pytest.mark.slow
def test_our_server_is_probed_and_a_missing_peer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(llama.NAMED, "nowhere")
    options = ["--only", "models", "tool-const", "--threads", "1", "--record", str(tmp_path / "n")]
    monkeypatch.setattr(sys, "argv", ["conformance", *options])
    conformance.main()
    [found] = report.latest(tmp_path / "n")
    groups = found["programs"]["gemsmith serve"]["groups"]
    assert set(groups["models"]) == {"pass"}
    assert groups["tools"] == {"pass": 1}
    page = report.page([found])
    assert "| tools | 1 of 1 |  |" in page
    assert "llama-server: GEMSMITH_LLAMA_SERVER: no file nowhere." in page
    verdicts = {must.text: must.verdict for must in musts.musts([found])}
    few = "not measured: run python -m benchmarks.conformance"
    assert verdicts["probes that fail at gemsmith serve"] == few
    verdicts = {must.text: must.verdict for must in musts.musts([found | {"complete": True}])}
    assert verdicts["probes that fail at gemsmith serve"] == "pass"


@pytest.mark.parametrize("benchmark", ["serve", "agent"])
def test_rounds_go_on_where_they_were_stopped(
    benchmark: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    played: list[int] = []
    stop: list[int] = []

    async def play(*_: Any) -> Any:
        if len(played) in stop:
            raise KeyboardInterrupt
        played.append(1)
        n = len(played)
        return agent.Loop(n, [n], 1) if benchmark == "agent" else serve.Round(n, n, n)

    peaks = iter([9, 50, *[7] * 10])
    up = SimpleNamespace(name=servers.OURS, port=0, peak=lambda: next(peaks))
    weights = servers.Weights(tmp_path, tmp_path, "4-bit", 1024)
    monkeypatch.setattr(agent, "loop", play)
    monkeypatch.setattr(serve, "play", play)
    monkeypatch.setattr(servers, "weights_of", lambda *_, **__: weights)
    monkeypatch.setattr(servers, "both", lambda *_, **__: ([up], {servers.LLAMA: "gone"}))
    monkeypatch.setattr(measure, "UNFINISHED", tmp_path)
    command = [benchmark, "--model", "tiny-E2B", "--rounds", "4"]
    monkeypatch.setattr(sys, "argv", command + ["--clients", "2"] * (benchmark == "serve"))
    main = {"serve": serve.main, "agent": agent.main}[benchmark]
    warm = {"serve": 1, "agent": 2}[benchmark]  # the agent's finds the longest reply before
    stop[:] = [warm + 3]
    with pytest.raises(KeyboardInterrupt):
        main()
    capsys.readouterr()
    stop.clear()
    played.clear()
    main()
    assert len(played) == warm + 1
    ours = json.loads(capsys.readouterr().out.splitlines()[-1])["programs"][servers.OURS]
    times = ours["loads"]["2"]["tokens_per_s"] if benchmark == "serve" else ours["seconds"]
    assert times == {"median": warm + 1.5, "min": warm + 1, "max": warm + 3, "n": 4}
    assert ours.get("peak", 50) == 50  # the most of both runs
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dry_run_without_a_peer_says_so_in_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(measure, "UNFINISHED", tmp_path)
    monkeypatch.setenv(llama.NAMED, "nowhere")
    options = ["--model", "tiny-E2B", "--rounds", "1", "--threads", "1"]
    options += ["--record", str(tmp_path / "numbers")]
    monkeypatch.setattr(sys, "argv", ["serve", "--clients", "2", *options])
    serve.main()
    monkeypatch.setattr(sys, "argv", ["agent", *options])
    agent.main()
    loop, load = report.latest(tmp_path / "numbers")
    assert loop["programs"]["gemsmith serve"]["calls"] == 10
    assert load["programs"]["gemsmith serve"]["loads"]["2"]["tokens_per_s"]["n"] == 1
    for found in (loop, load):
        missing = found["programs"]["llama-server"]["missing"]
        assert missing == "GEMSMITH_LLAMA_SERVER: no file nowhere"
        assert missing in report.page([found])


# -- soak -------------------------------------------------------------------------------------


def test_growth_leaves_the_warm_up_out() -> None:
    assert soak.growth([1] * 5 + [100] * 10 + [103] * 5) == pytest.approx(0.03)
    assert soak.growth([1, 50, *[100] * 18]) == 0


def test_failures_are_found_in_the_log() -> None:
    log = '{"status": 200}\n{"status": 503}\nTraceback (most recent call last):\nValueError: x\nhi'
    assert soak.failures(log) == log.splitlines()[1:4]


@pytest.mark.parametrize(
    ("answer", "body", "found"),
    [
        (reply(b"{}"), {}, None),
        (reply(b""), {}, "an empty answer"),
        (reply(b"{}", 500), {}, "status 500"),
        (reply(b"data: {}\n\ndata: [DONE]\n\n"), {"stream": True}, None),
        (reply(b"data: {}\n\n"), {"stream": True}, "a stream without an end"),
        (reply(b'data: {"error": {"x": 1}}\n\ndata: [DONE]'), {"stream": True}, "a stream that f"),
        (reply(b"data: {\n\n"), {"stream": True}, "a stream that is no JSON"),
    ],
)
def test_what_is_wrong_with_an_answer_is_told(
    answer: bytes, body: dict[str, Any], found: str | None
) -> None:
    async def run() -> str | None:
        async with fake(lambda *_: answer) as server:
            return soak_worker.fault(await client.ask(server.port, "/", {}), body)

    assert (asyncio.run(run()) or "").startswith(found or "")
    assert (asyncio.run(run()) is None) == (found is None)


def test_a_crowd_that_was_stopped_ends_and_tells_of_every_fault() -> None:
    with servers.running("it", [sys.executable, "-c", SERVER], threads=1, cores=[]) as server:
        crowd = soak.Crowd(server.port, clients=3, seconds=1.5, seed=0)
        while not crowd.stops:
            crowd.tick()
        told, faults = crowd.end()
    assert sum(told.values()) > 10
    assert any("status 501" in fault for fault in faults)  # that server knows no POST
    assert not any("ended with" in fault for fault in faults)


def test_memory_is_drawn_whatever_it_does(tmp_path: Path) -> None:
    for series in ([5 << 20], [100 << 20, 120 << 20, 121 << 20], [9 << 20] * 50):
        soak.picture(tmp_path / "made" / "x.png", series, 60, 0.02)
        with Image.open(tmp_path / "made" / "x.png") as image:
            assert image.size == (960, 320)
            assert (31, 78, 140) in {color for _, color in image.getcolors(1 << 16) or ()} or (
                len(series) == 1
            )


def test_every_sort_of_request_is_among_those_of_a_soak() -> None:
    draw = Random(0)
    paths = {make(draw)[0] for make in soak_worker.GOOD for _ in range(60)}
    paths |= {soak_worker.wrong(draw)[0] for _ in range(200)}
    assert paths == {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
        "/v1/messages/count_tokens", "/v1/audio/transcriptions", "/v1/models", "/v1/models/model",
        "/health", "/ready", "/metrics", "/debug/cache", "/openapi.json", "/no/such/path",
    }  # fmt: skip


# -- records ----------------------------------------------------------------------------------


def served(**speeds: float) -> dict[str, Any]:
    def run(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value, "n": 5}

    programs = {
        name: {
            "loads": {
                clients: {
                    "tokens_per_s": run(speed),
                    "first_turn_s": run(1 / speed),
                    "later_turns_s": run(1 / speed),
                }
                for clients in ("1", "8")
            },
            "peak": 1e9,
            "missing": "",
        }
        for name, speed in zip(musts.SERVERS, speeds.values(), strict=True)
    }
    shape = {"shared": 1, "task": 1, "call": 1, "result": 1, "turns": 2, "generated": 1,
             "pause_s": 0.1}  # fmt: skip
    return record(name="serve", model="pocket", dtype="4-bit", shape=shape, programs=programs)


def looped(missing: str = "") -> dict[str, Any]:
    run = {"median": 2.0, "min": 2.0, "max": 2.0, "n": 5}
    found = {"missing": "", "seconds": run, "calls": 50, "tokens": 150}
    theirs = {"missing": missing} if missing else found | {"seconds": run | {"median": 5.0}}
    programs = dict(zip(musts.SERVERS, (found, theirs), strict=True))
    return record(name="agent", model="pocket", dtype="bfloat16", steps=10, programs=programs)


def soaked(minutes: float, growth: float) -> dict[str, Any]:
    made = record(name="soak", model="pocket", minutes=minutes, clients=32, requests=9, stops=3)
    del made["dtype"]
    return made | {"faults": 0, "growth": growth, "resident": [1 << 20, 2 << 20]}


def test_servers_are_judged_by_the_ratios_of_one_run() -> None:
    found = {must.text: must for must in musts.musts([served(ours=50, theirs=20), looped()])}
    speed = "pocket, 8 clients, tokens/s, gemsmith serve over llama-server"
    assert (found[speed].measured, found[speed].verdict) == (2.5, "pass")
    first = found["pocket, 1 client, time to first token from turn 2 on, gemsmith serve over "
                  "llama-server"]  # fmt: skip
    assert first.verdict.startswith("33% over: most of a prompt of so small a model is no product")
    assert found["pocket, time of ten tool calls, gemsmith serve over llama-server"].passed
    thirty = found["pocket, 32 clients, tokens/s, gemsmith serve over llama-server"]
    assert thirty.verdict == "not measured: run python -m benchmarks.serve --model pocket"
    assert sum("over llama-server" in text for text in found) == 14


def test_a_soak_counts_where_it_was_long_enough() -> None:
    short, long = (
        {must.text: must.verdict for must in musts.musts([soaked(minutes, -0.03)])}
        for minutes in (4, 60)
    )
    growth = "soak of an hour, change of resident memory"
    assert short[growth] == (
        "not measured: 4 minutes of 32 clients are too little; run python -m benchmarks.soak"
    )
    assert long[growth] == "50% over: cause not measured"
    assert long["soak of an hour, errors that are not the client's"] == "pass"


def test_the_page_shows_both_servers_or_why_one_is_missing() -> None:
    page = report.page([served(ours=50, theirs=20), looped("no compiler"), soaked(60, 0.01)])
    assert "| 8 | gemsmith serve | 50.0 (50.0 - 50.0) | 0.020 (0.020 - 0.020) |" in page
    assert "| 8 | llama-server | 20.0" in page
    assert "Peak: gemsmith serve 1.00 GB, llama-server 1.00 GB." in page
    assert "| llama-server | no compiler | | | | |" in page
    assert "| gemsmith serve | 2.00 | 2.00 - 2.00 | 5 | 150 | 50 of 50 |" in page
    assert "not measured: llama-server: no compiler" in page
    assert "memory after the warm-up changed by +1.00%, and was 1 to 2 MiB in all." in page
