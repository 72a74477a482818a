"""`gemsmith probe`: the table, JSON, exit codes, and what a user can get wrong."""

import json

import pytest
from tests.evals.test_conformance import fake, reply
from typer.testing import CliRunner

from gemsmith.cli.main import app


def probed(*arguments: str, body=None):
    with fake(lambda _: (200, body or reply("Hi \x1b[31m<turn|>"))) as endpoint:
        return CliRunner().invoke(app, ["probe", endpoint.root, *arguments])


def test_a_failure_is_shown_with_its_bytes_and_ends_with_1():
    done = probed("--only", "chat-clean", "--only", "chat-shape", "--all")
    assert done.exit_code == 1
    assert "fail chat chat-clean: <turn|> shows in content" in done.stdout
    assert "should hold: a reply is not empty" in done.stdout
    assert 'sent: {"model": "fake"' in done.stdout
    assert "pass chat chat-shape" in done.stdout
    assert "1 passed, 1 failed, 0 skipped" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_bytes_of_a_failure_are_not_changed():
    done = probed("--only", "chat-clean", body=reply("{a:x:b}<turn|>"))
    assert "{a:x:b}<turn|>" in done.stdout


def test_a_good_endpoint_ends_with_0_and_names_no_probe():
    done = probed("--only", "chat-shape", "--only", "usage-cached")
    assert done.exit_code == 0
    assert "chat-shape" not in done.stdout
    assert "skip usage usage-cached: cached tokens are not told" in done.stdout
    assert "1 passed, 0 failed, 1 skipped" in done.stdout


def test_json_holds_every_outcome():
    done = probed("--only", "usage", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1
    assert told["model"] == "fake"
    assert told["complete"]
    assert told["pass"] + told["fail"] + told["skip"] == len(told["probes"]) == 5
    [failed] = [each for each in told["probes"] if each["name"] == "usage-grows"]
    assert failed["status"] == "fail"
    assert failed["reason"] == "120 more words cost 0 tokens"
    assert '"prompt_tokens": 9' in failed["evidence"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer"),
        (["ftp://here"], "ftp://here: no http(s) address"),
        (["http://127.0.0.1:1", "--only", "wit"], "--only wit: no such group"),
        (["http://127.0.0.1:1", "--timeout", "0"], "--timeout 0: must be from 1 to 3600 seconds"),
        (["http://127.0.0.1:1", "--api-key-file", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, words):
    done = CliRunner().invoke(app, ["probe", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
