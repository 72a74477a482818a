"""Who may ask, and how much: each limit with its status; nothing secret in answers or logs."""

import asyncio
import json
import logging

import pytest
from tests.server.conftest import events, run, serving, user

from gemsmith.engine.batching import EngineConfig
from gemsmith.engine.speculative import Speculation
from gemsmith.errors import ConfigError
from gemsmith.server.limits import Keys, Limits

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
KEY = "sk-a-very-secret-key"
ASKED = {"model": "gemma", "messages": user("zanzibar"), "max_tokens": 40}


def test_without_a_key_nothing_but_health_is_told(says):
    async def scenario():
        async with serving(says("Yes.<turn|>"), keys=(KEY, "another-key")) as (client, _):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                assert (await client.get(path)).status_code == 401, path
            for header in (
                {},
                {"authorization": "Bearer wrong-key"},
                {"authorization": f"Basic {KEY}"},
                {"x-api-key": ""},
                {"authorization": f"Bearer {KEY}x"},
            ):
                answer = await client.post(CHAT, json=ASKED, headers=header)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
            answer = await client.post(MESSAGES, json=ASKED)
            assert answer.json()["type"] == "error"
            for path in ("/health", "/ready"):
                assert (await client.get(path)).status_code == 200
            for header in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": "another-key"}):
                assert (await client.post(CHAT, json=ASKED, headers=header)).status_code == 200

    run(scenario)


def test_only_names_of_its_own_are_answered_under(says):
    """A page that has its name point here would be of the same origin to a browser."""

    async def scenario():
        async with serving(says("Yes.<turn|>"), hosts=("localhost", "[::1]", "Gpu.lan")) as (
            client,
            _,
        ):
            for name in ("localhost", "LOCALHOST:8000", "[::1]:8000", "gpu.lan", "localhost."):
                answer = await client.get("/ready", headers={"host": name})
                assert answer.status_code == 200, name
            for name in ("evil.example", "localhost.evil.example:8000", "127.0.0.1", "[::2]",
                         "evil@localhost", "localhost:80:80", "", "http://localhost"):  # fmt: skip
                answer = await client.post(CHAT, json=ASKED, headers={"host": name})
                assert answer.status_code == 403, name
                assert answer.json()["error"] == {
                    "message": f"nothing is served under the name {name!r}; ask at localhost or "
                    "127.0.0.1, or name it when the server is started: --allow-host NAME",
                    "type": "permission_error",
                    "param": None,
                    "code": None,
                }
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.get("/ready", headers={"host": "whatever.example"})
            assert answer.status_code == 200

    run(scenario)


def test_keys_come_from_a_file_and_from_the_environment(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# for Ann\n{KEY}\n\nanother-key\n", "utf-8")
    keys = Keys.read(path, "third-key-here, ")
    tenants = [keys.tenant(key) for key in (KEY, "another-key", "third-key-here")]
    assert len({*tenants, None, ""}) == 5
    assert keys.tenant("wrong") is keys.tenant(None) is keys.tenant("é") is None
    assert not any(KEY in str(value) for value in vars(keys).values())
    assert Keys.read(None, None).tenant(None) == ""
    path.write_text("# nothing\n", "utf-8")
    with pytest.raises(ConfigError, match="holds no API key; write one a line"):
        Keys.read(path, None)
    with pytest.raises(ConfigError, match="has 5 characters: at least 8"):
        Keys.read(None, "short")


def test_a_body_is_read_up_to_its_limit(says):
    async def pieces():
        for _ in range(50):
            yield b" " * 100

    async def scenario():
        limits = Limits(body_bytes=1000)
        async with serving(says("Yes.<turn|>"), limits=limits) as (client, _):
            for path in (CHAT, MESSAGES):
                declared = await client.post(path, content=b" " * 1001)
                assert declared.status_code == 413
                streamed = await client.post(
                    path, content=pieces(), headers={"content-type": "application/json"}
                )
                assert streamed.status_code == 413
                assert streamed.json()["error"]["type"] == "request_too_large"
                assert "1000 bytes" in streamed.json()["error"]["message"]
            assert (await client.post(CHAT, json=ASKED)).status_code == 200
            assert 'status="413"} 4.0' in (await client.get("/metrics")).text

    run(scenario)


def test_a_full_queue_says_when_to_come_back(says):
    async def scenario():
        config = EngineConfig(max_num_seqs=1, max_model_len=2000, queue_limit=1)
        async with serving(says("a" * 1500), config=config) as (client, service):
            body = ASKED | {"max_tokens": 1500}
            stats = service.engine.stats
            tasks = [asyncio.create_task(client.post(CHAT, json=body))]
            while not stats().running:
                await asyncio.sleep(0.001)
            tasks.append(asyncio.create_task(client.post(CHAT, json=body)))
            while not stats().waiting:
                await asyncio.sleep(0.001)
            for path in (CHAT, MESSAGES):
                refused = await client.post(path, json=body)
                assert refused.status_code == 503
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert refused.json()["error"]["type"] == "overloaded_error"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(scenario)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_request_that_takes_too_long_is_ended(says, streaming):
    async def scenario():
        limits = Limits(request_s=0.3)
        async with serving(says("a" * 2500), limits=limits) as (client, service):
            body = ASKED | {"max_tokens": 2500, "stream": streaming}
            answer = await client.post(CHAT, json=body)
            error = events(answer.text)[-1] if streaming else answer.json()
            assert answer.status_code == (200 if streaming else 504)
            assert error["error"]["code"] == "timeout"
            while not service.engine.stats().aborted:
                await asyncio.sleep(0.01)
            assert service.engine.stats().aborted == 1

    run(scenario)


def test_a_prompt_beyond_the_context_is_refused_with_its_size(says):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.post(CHAT, json=ASKED | {"messages": user("a" * 3100)})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
            assert "holds 3000" in error["message"]

    run(scenario)


def test_pages_of_other_origins_may_not_ask_unless_told(says):
    async def scenario():
        header = {"origin": "https://page.example"}
        preflight = header | {"access-control-request-method": "POST"}
        async with serving(says("Yes.<turn|>")) as (client, _):
            answer = await client.post(CHAT, json=ASKED, headers=header)
            assert not [name for name in answer.headers if name.startswith("access-control")]
            answer = await client.options(CHAT, headers=preflight)
            assert answer.status_code == 405
        async with serving(says("Yes.<turn|>"), keys=(KEY,), origins=("https://page.example",)) as (
            client,
            _,
        ):
            answer = await client.options(CHAT, headers=preflight)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://page.example"
            other = await client.options(
                CHAT, headers=preflight | {"origin": "https://evil.example"}
            )
            assert "access-control-allow-origin" not in other.headers

    run(scenario)


def test_logs_hold_a_line_a_request_and_nothing_secret(says, caplog):
    async def scenario():
        lm = says(lambda prompt: "FAIL" if "fail" in prompt else "moonshine<turn|>")
        async with serving(lm, keys=(KEY,)) as (client, _):
            header = {"authorization": f"Bearer {KEY}", "x-request-id": "mine-1"}
            await client.post(CHAT, json=ASKED, headers=header)
            for content in ("fail zanzibar", "\ud800 zanzibar"):
                body = json.dumps(ASKED | {"messages": user(content)})
                typed = header | {"content-type": "application/json"}
                await client.post(CHAT, content=body, headers=typed)
            await client.post(CHAT, json=ASKED, headers={"x-request-id": "a\tb" * 100})

    with caplog.at_level(logging.INFO, logger="gemsmith.server"):
        run(scenario)
    lines = [json.loads(record.getMessage()) for record in caplog.records
             if record.name == "gemsmith.server"]  # fmt: skip
    assert [line["status"] for line in lines] == [200, 500, 400, 401]
    assert lines[0]["id"] == "mine-1"
    assert lines[3]["id"].startswith("req_")
    assert lines[0]["completion_tokens"] == 10
    assert lines[0]["prompt_tokens"] > 10
    assert lines[0]["tenant"]
    assert lines[1]["error"] == "GemsmithError"
    assert any("take" in frame for frame in lines[1]["trace"])
    for secret in ("zanzibar", "moonshine", KEY, "secret detail"):
        assert secret not in caplog.text


def test_an_error_of_the_server_itself_tells_nothing(says, monkeypatch, caplog):
    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, service):
            monkeypatch.setattr(service, "start", broken)
            for path, kind in ((CHAT, "server_error"), (MESSAGES, "api_error")):
                answer = await client.post(path, json=ASKED)
                assert answer.status_code == 500
                assert answer.json()["error"]["type"] == kind
                assert "secret" not in answer.text
                assert answer.headers["x-request-id"]

    with caplog.at_level(logging.INFO, logger="gemsmith.server"):
        run(scenario)
    assert '"error": "RuntimeError"' in caplog.text
    assert "secret" not in caplog.text


def test_guesses_are_counted_under_the_names_that_dashboards_know(says, monkeypatch):
    monkeypatch.setattr(Speculation, "_depths", lambda self, texts, reaches, rows, room: reaches)
    lm = says("abcdefgh " * 9 + "<turn|>")
    monkeypatch.setattr(lm, "speculates", True)

    async def scenario():
        async with serving(lm) as (client, service):
            usage = (await client.post(CHAT, json=ASKED | {"max_tokens": 80})).json()["usage"]
            while service.engine.stats().running:
                await asyncio.sleep(0.01)
            stats, text = service.engine.stats(), (await client.get("/metrics")).text
            assert usage["completion_tokens"] == stats.generated_tokens
            assert stats.draft_tokens >= stats.accepted_tokens > stats.drafts > 0
            for name in ("drafts", "draft_tokens", "accepted_tokens"):
                line = f'vllm:spec_decode_num_{name}_total{{model_name="gemma"}}'
                assert f"{line} {float(getattr(stats, name))}" in text
            counts = stats.accepted_by_place
            assert len(counts) > 1
            # A guess is right only after those before it.
            assert stats.drafts >= counts[0]
            assert list(counts) == sorted(counts, reverse=True)
            assert sum(counts) == stats.accepted_tokens
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            for place, count in enumerate(counts):
                line = f'{name}{{model_name="gemma",position="{place}"}}'
                assert f"{line} {float(count)}" in text

    run(scenario)


def test_metrics_have_the_names_that_dashboards_know(says):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, service):
            for _ in range(2):
                last = (await client.post(CHAT, json=ASKED)).json()["usage"]
            await client.post(CHAT, json=ASKED | {"n": 0})
            while service.engine.stats().running:
                await asyncio.sleep(0.01)
            text = (await client.get("/metrics")).text
            cached = last["prompt_tokens_details"]["cached_tokens"]
            assert 0 < cached < last["prompt_tokens"]
            told = (await client.get("/debug/cache")).json()
            assert (told["hits"], told["cached_tokens"]) == (1, cached)
            assert sum(told["misses"].values()) >= 1
            assert f'vllm:prefix_cache_hits_total{{model_name="gemma"}} {float(cached)}' in text
        for line in (
            'vllm:num_requests_running{model_name="gemma"} 0.0',
            'vllm:kv_cache_usage_perc{model_name="gemma"} 0.0',
            'vllm:generation_tokens_total{model_name="gemma"} 10.0',
            'vllm:request_success_total{finished_reason="stop",model_name="gemma"} 2.0',
            'vllm:time_to_first_token_seconds_count{model_name="gemma"} 2.0',
            'vllm:e2e_request_latency_seconds_count{model_name="gemma"} 2.0',
            'gemsmith:request_errors_total{model_name="gemma",status="400"} 1.0',
        ):
            assert line in text, line

    run(scenario)


def test_the_prefix_cache_says_what_it_had_for_ones_own_requests_alone(says):
    async def scenario():
        keys = (KEY, "another-key")
        async with serving(says("Yes.<turn|>"), keys=keys) as (client, service):
            ann, ben = ({"authorization": f"Bearer {key}"} for key in keys)
            for header in (ann, ann, ben):
                answer = await client.post(CHAT, json=ASKED, headers=header)
            prompt = answer.json()["usage"]["prompt_tokens"]
            while service.engine.stats().running:
                await asyncio.sleep(0.01)
            told = await client.get("/debug/cache", headers=ann)
            assert "zanzibar" not in told.text
            second, first = told.json()["recent"]
            assert first.pop("seconds_ago") >= second.pop("seconds_ago") >= 0
            assert first == {
                "prompt_tokens": prompt,
                "cached_tokens": 0,
                "known_tokens": 0,
                "miss": "new",
                "why": "nothing that begins so is kept for this key",
            }
            assert second == first | {
                "cached_tokens": prompt - 1, "known_tokens": prompt - 1, "miss": None, "why": None
            }  # fmt: skip
            # Another key has kept the same; nobody is told.
            [theirs] = (await client.get("/debug/cache", headers=ben)).json()["recent"]
            assert theirs.pop("seconds_ago") >= 0
            assert theirs == first

    run(scenario)


def test_a_server_that_drains_is_alive_but_not_ready(says):
    async def scenario():
        async with serving(says("Yes.<turn|>")) as (client, service):
            await service.engine.drain()
            assert (await client.get("/ready")).status_code == 503
            refused = await client.post(CHAT, json=ASKED)
            assert refused.status_code == 503
            assert refused.headers["retry-after"]

    run(scenario)
