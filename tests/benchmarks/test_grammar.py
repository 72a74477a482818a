"""Random schemas: what is done is not done again, failures are found, batches change no reply."""

import json
from typing import Any

import pytest

from benchmarks import grammar, musts, report
from gemsmith.engine.batching import BatchEngine
from gemsmith.engine.engine import LM


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command without a model: seeds that were asked, and what it prints at last."""
    monkeypatch.setattr(grammar, "PIECE", 2)
    monkeypatch.setattr(grammar, "BatchEngine", lambda *_: None)
    monkeypatch.setattr(grammar.LM, "load", lambda *_, **__: None)

    def go(*arguments: str, wrong: int | None = None, stop: int | None = None):
        asked: list[int] = []

        def piece(_: Any, seeds: Any, **__: Any) -> dict[str, Any]:
            if stop in seeds:
                raise KeyboardInterrupt
            asked.extend(seeds)
            failures = [{"seed": wrong, "wrong": ["empty reply"]}] if wrong in seeds else []
            counts = dict.fromkeys(grammar.COUNTED, len(seeds))
            return {**counts, "failures": failures, "seconds": 1.0}

        monkeypatch.setattr(grammar, "measure_piece", piece)
        progress = ["--progress", str(tmp_path / "progress.jsonl")]
        monkeypatch.setattr("sys.argv", ["grammar", *progress, *arguments])
        code = grammar.main()
        return asked, code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return go


def test_a_run_that_was_stopped_goes_on_where_it_was(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("--count", "7", stop=4)
    asked, code, record = run("--count", "7", "--record", str(tmp_path / "numbers"))
    assert (asked, code) == ([4, 5, 6], 0)
    assert (record["schemas"], record["in_a_row"], record["calls"]) == (7, 7, 7)
    # Other settings are another measurement.
    assert run("--count", "7", "--temperature", "1")[0] == [*range(7)]
    [kept] = report.latest(tmp_path / "numbers")
    page = report.page([kept])
    assert "| 7 | 7 | 7 | 7 | 7 | 0 | 4 |" in page
    [must] = [must for must in musts.musts([kept]) if must.measured is not None]
    assert must.cells[1:] == (">= 10000 schemas", "7 schemas", "100% short: no more were asked")


def test_a_failure_fails_the_run_and_ends_what_is_on_end(run):
    _, code, record = run("--count", "8", wrong=5)
    assert (code, record["failures"], record["in_a_row"]) == (1, 1, 5)
    assert record["first_failures"] == [{"seed": 5, "wrong": ["empty reply"]}]
    must = next(must for must in musts.musts([record]) if must.measured is not None)
    assert must.verdict == "100% short: a call or reply is wrong"
    assert run("--count", "8", "--free", wrong=5)[1] == 0


@pytest.mark.slow
def test_a_batch_gives_the_calls_that_each_schema_gives_alone():
    lm = LM.load("pocket", quant="int4")
    alone = [
        grammar.measure_piece(BatchEngine(lm, grammar.ENGINE), [seed], temperature=2.0)
        for seed in range(2)
    ]
    together = grammar.measure_piece(BatchEngine(lm, grammar.ENGINE), range(2), temperature=2.0)
    assert together["calls"] == together["good_calls"] > 0
    for name in grammar.COUNTED:
        assert together[name] == sum(each[name] for each in alone), name
