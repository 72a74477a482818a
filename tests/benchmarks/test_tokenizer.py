"""The benchmark of the compiled vocabulary compares before it times, and says why it cannot."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import tokenizer
from gemsmith import pocket
from gemsmith.text import compact, vocabulary
from gemsmith.text.tokenizer import Tokenizer

POCKET = Path(next(iter(pocket.__path__))) / "checkpoint" / "tokenizer.json"


def run(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(tokenizer, "CHARACTERS", 2000)
    monkeypatch.setattr(sys, "argv", ["tokenizer", str(file), "--repeats", "1"])
    tokenizer.main()


@pytest.mark.skipif(compact._native() is None, reason="needs the C++ extension")
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's count of resident memory")
def test_the_last_line_is_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compact, "SMALLEST", 0)
    made = json.loads(POCKET.read_text(encoding="utf-8")) | {"pre_tokenizer": vocabulary._LINES}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(made), encoding="utf-8")
    run(monkeypatch, file)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["open"].keys() == {"gemsmith", "tokenizers"}
    assert record["runs"].keys() == tokenizer.texts().keys()

    theirs = tokenizer.reference(file)
    monkeypatch.setattr(theirs, "_encode_plain", lambda text: [1])
    monkeypatch.setattr(tokenizer, "reference", lambda file: theirs)
    monkeypatch.setattr(tokenizer, "openings", lambda *_, **__: {})
    with pytest.raises(SystemExit, match="not what tokenizers gives; nothing was timed"):
        run(monkeypatch, file)


def test_a_vocabulary_that_is_not_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(Tokenizer.load(POCKET)._core, compact.CompactVocabulary)
    with pytest.raises(SystemExit, match="is not compiled"):
        run(monkeypatch, POCKET)
