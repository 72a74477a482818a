"""`gemsmith serve`: what it says, what it refuses before a model is loaded, how it ends."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from typer.testing import CliRunner

from gemsmith.cli import serve
from gemsmith.cli.main import app

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--port", "PORT"], {}, "cannot listen on 127.0.0.1 port"),
        (["--host", "192.0.2.1", "--port", "0"], {}, "cannot listen on 192.0.2.1"),
        (["--port", "99999999"], {}, "cannot listen on 127.0.0.1 port 99999999"),
        (["--api-key-file", "nowhere"], {}, "nowhere"),
        ([], {serve.KEYS: "short"}, "an API key has 5 characters"),
        (
            ["--allow-host", "http://gpu"],
            {},
            "--allow-host 'http://gpu': give a name or an address",
        ),
        (
            ["--prefix-cache", "/dev/null/x"],
            {},
            "--prefix-cache /dev/null/x: Not a directory; name a",
        ),
        (["--prefix-cache-size", "0"], {}, "--prefix-cache-size '0': a size such as 3.2GB"),
        (["--timeout", "0"], {}, "--timeout and --max-body-mib must be more than 0"),
        (["--port", "0", "--max-num-seqs", "0"], {}, "max_num_seqs 0"),
        (["--port", "0", "--speculation", "always"], {}, "speculation 'always': must be auto"),
        (["--port", "0", "--drafter", "pocket"], {}, "model_type is 'gemma4'; drafters are"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, environment, words):
    with serve.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["serve", *(port if each == "PORT" else each for each in arguments)]
        done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_the_extra_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: name != "uvicorn" or None)
    done = CliRunner().invoke(app, ["serve"])
    assert done.stderr == (
        "error: the server needs uvicorn: install gemsmith with its extra, "
        "pip install 'gemsmith[serve]'\n"
    )


def test_what_the_cache_tells_is_a_line_of_json(capsys):
    serve._log_to_stderr()
    logs = [logging.getLogger(f"gemsmith.{name}") for name in ("server", "cache")]
    try:
        logs[1].warning("%s is passed over: %s", "a file", "it is\nnone")
        told = json.loads(capsys.readouterr().err)
        assert told.pop("time")
        assert told == {"warning": "a file is passed over: it is\nnone"}
    finally:
        for log in logs:
            log.handlers.clear()
            log.propagate = True


@pytest.mark.slow
def test_it_says_what_fits_answers_and_ends_what_runs_when_told_to_stop(tmp_path):
    """The client call of the README runs against it; SIGTERM drains, and keeps prefixes."""
    command = [sys.executable, "-m", "gemsmith", "serve", "pocket", "--port", "0"]
    command += ["--allow-host", "gpu.example", "--prefix-cache", str(tmp_path / "kept")]
    with subprocess.Popen(
        [*command, "--max-model-len", "600", "--max-num-seqs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {serve.KEYS: "some-key-of-mine"},
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            told = ""
            while "curl" not in told:
                line = server.stdout.readline()
                assert line, server.stderr.read()
                told += line
            assert "up to 2 requests at a time, each of up to 600 tokens" in told
            assert "1200 tokens" in told or "1280 tokens" in told
            [url] = re.findall(r"served at (http://127\.0\.0\.1:\d+)", told)
            header = {"authorization": "Bearer some-key-of-mine"}
            with httpx.Client(base_url=url, headers=header, timeout=60) as client:
                assert client.get("/ready").json() == {"ready": True}
                for name, status in (
                    ("localhost", 200),
                    ("gpu.example", 200),
                    ("evil.example", 403),
                ):
                    assert client.get("/ready", headers={"host": name}).status_code == status
                body = {
                    "model": "pocket",
                    "messages": [{"role": "user", "content": "Hello!"}],
                    "max_tokens": 40,
                    "ignore_eos": True,
                    "stream": True,
                }
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    lines = answer.iter_lines()
                    next(lines)
                    _run_the_readme(url)
                    server.send_signal(signal.SIGTERM)
                    assert list(lines)[-2:] == ["data: [DONE]", ""]
            assert server.wait(30) == 0
            logged = [json.loads(line) for line in server.stderr.read().splitlines()]
            assert [line["status"] for line in logged] == [200, 200, 200, 403, 200, 200]
            assert [*(tmp_path / "kept").glob("*/*.safetensors")]
        finally:
            server.kill()


def _run_the_readme(url: str) -> None:
    [example] = re.findall(r"^```py\n(.*?)^```", README, re.M | re.S)
    names: dict[str, object] = {}
    example = example.replace("http://127.0.0.1:8000", url).replace('"none"', '"some-key-of-mine"')
    exec(example, names)
    reply, client = names["reply"], names["client"]
    assert isinstance(client, openai.OpenAI)
    client.close()
    said = re.findall(r"# (Hello! .*)", example)
    assert [reply.choices[0].message.content] == said  # pyright: ignore[reportAttributeAccessIssue]
