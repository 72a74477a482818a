"""`gemsmith quantize`: what is written runs, and is called what it is."""

import json
import re
from collections import defaultdict
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from tests.weights.low_bit import pocket_off_the_grid
from typer.testing import CliRunner

from gemsmith.cli import quantize as worker
from gemsmith.cli.main import app
from gemsmith.errors import RequestError, WeightsError
from gemsmith.quant.formats import Format
from gemsmith.weights import sensitivity
from gemsmith.weights.convert import Recipe
from gemsmith.weights.hub import resolve
from gemsmith.weights.mixed import Choice, Option
from gemsmith.weights.tensors import read_checkpoint

POCKET = resolve("pocket")


def gemsmith(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The embedded model at 4 bits, and what was said of it."""
    folder = tmp_path_factory.mktemp("quantize") / "low"
    return folder, gemsmith("quantize", "pocket", folder)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pocket_off_the_grid(tmp_path_factory.mktemp("exact") / "pocket")


def test_every_kind_of_weight_is_in_the_table(low):
    folder, said = low
    for kind in ("embedding", "attention", "MLP", "PLE table", "PLE projections", "norms"):
        assert kind in said
    assert "int4-g32" in said
    assert f"{folder}: a 4-bit checkpoint; every matrix is in few bits" in said


def test_the_low_bit_model_answers_through_the_command_line(low):
    asked = "What is 2 + 3?"
    options = ("--temperature", 0, "--max-tokens", 12)
    original = gemsmith("generate", asked, *options, "--dtype", "float32")
    assert gemsmith("generate", asked, *options, "--model", low[0]) == original


def in_eighty_columns(table: Table) -> str:
    said = StringIO()
    Console(width=80, file=said, color_system=None).print(table)
    assert "\N{HORIZONTAL ELLIPSIS}" not in said.getvalue()
    return re.sub(r" +", " ", said.getvalue())


@pytest.mark.parametrize("calibrated", [0, 7_531])
def test_the_table_is_whole_in_eighty_columns(calibrated):
    """The largest numbers there are: a 26B-A4B whose stacks of experts count one by one."""
    experts = worker.Kind("experts", "int4-g128", 7_680, 22_749_904_896, 14_118_510_592)
    experts.squares, experts.matrices, experts.calibrated = [1.0, 812.0], 7_680, calibrated
    floats = worker.Kind("PLE projections", "BF16", 512, 12_345_678, 24_691_356)
    said = in_eighty_columns(worker.table([experts, floats]))
    count = "7,531/7,680" if calibrated else "7,680"
    assert f"experts int4-g128 {count} 22,749,904,896 4.96 13.15 GiB 1.2e-03" in said
    assert all(word in said for word in ("PLE", "projections", "16.00", "22,762,250,574"))


def test_the_table_of_choices_is_whole_in_eighty_columns():
    unit = tuple(f"layers.29.experts.{name}_proj.weight" for name in ("gate_up", "down"))
    smaller, larger = (
        Option(Format(2, 128), 7 << 30, 1.2e-5),
        Option(Format(4, 128), 14 << 30, 1e-6),
    )
    said = in_eighty_columns(
        worker.choice_table([Choice(unit, smaller, 1e-12, larger)], calibrated=True)
    )
    assert "29.experts gate_up int2-g128 7.00 GiB 1.2e-05 1.0e-06 int4-g128 1.5e-09" in said
    assert "\n down" in said


def test_the_report_for_programs_adds_up(tmp_path):
    facts = json.loads(gemsmith("quantize", "pocket", tmp_path / "low", "--bits", 8, "--json"))
    assert facts["verdict"].startswith("an 8-bit checkpoint; every matrix")
    sizes = {(kind["kind"], kind["format"]): kind for kind in facts["weights"]}
    assert sizes["attention", "int8"]["relative_squared_error"] < 1e-4
    assert sizes["norms and scalars", "BF16"]["relative_squared_error"] == 0
    stored = (tmp_path / "low" / "model.safetensors").stat().st_size
    header = stored - sum(kind["bytes"] for kind in facts["weights"])
    # An entry is a key of up to 80 letters, a dtype, a shape and two offsets.
    assert 60 < header / len(read_checkpoint(tmp_path / "low")) < 200


def test_tables_left_as_they_are_are_named_and_the_name_is_withheld(tmp_path):
    said = gemsmith("quantize", "pocket", tmp_path / "low", "--float-tables", "--group", 64)
    assert "not a 4-bit checkpoint: as asked" in said
    assert "model.language_model.embed_tokens.weight" in said
    assert "embed_tokens_per_layer.weight stayed floats" in said
    assert "int4-g64" in said


def test_a_checkpoint_is_not_called_what_it_is_not(low, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "_format", without(Recipe._format, "o_proj"))
    with pytest.raises(
        WeightsError, match=r"is not a 4-bit .*: 9 matrices stayed floats: .*o_proj"
    ):
        worker.run(
            "pocket", str(tmp_path / "low"), bits="4", group=None, float_tables=False, as_json=True
        )


def test_a_mixed_checkpoint_says_of_every_unit_what_it_got_and_why(
    low, exact, tmp_path, monkeypatch
):
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", 64)
    monkeypatch.setattr(sensitivity, "SEQUENCE_TOKENS", 32)
    stored = (low[0] / "model.safetensors").stat().st_size
    arguments = ("--bits", "mixed", "--budget", "8.25MB")
    said = gemsmith("quantize", exact, tmp_path / "mix", *arguments)
    assert (tmp_path / "mix" / "model.safetensors").stat().st_size < stored
    rows = {line.split(" int")[0].strip(): line.split() for line in said.splitlines()}
    for unit in ("embed_tokens", "4.self_attn q k v", "8.mlp gate up"):
        assert unit in rows
    assert "measured on random tokens, for there is no data" in " ".join(said.split())
    used = re.search(r"^([\d,]+) bytes of the 8,250,000 there were\.$", said, re.MULTILINE)
    assert used
    assert 8_230_000 < int(used[1].replace(",", "")) <= 8_250_000
    assert f"{tmp_path / 'mix'}: a mixed checkpoint; every matrix is in few bits" in said
    facts = json.loads(gemsmith("quantize", exact, tmp_path / "x", *arguments, "--json"))
    assert facts["budget"] == 8_250_000
    assert sum(kind["bytes"] for kind in facts["weights"]) == int(used[1].replace(",", ""))
    choices = {choice["weights"][0]: choice for choice in facts["choices"]}
    assert rows["embed_tokens"][1] == choices["embed_tokens.weight"]["format"]
    assert len({choice["format"] for choice in facts["choices"]}) > 1
    assert max(choice["removed_per_byte"] or 0 for choice in facts["choices"]) > 0
    offers = [choice["offered_per_byte"] for choice in facts["choices"] if choice["next"]]
    assert max(offers) > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3.2GB", 3_200_000_000),
        ("3.2 gb", 3_200_000_000),
        ("900MiB", 900 << 20),
        ("1.5KiB", 1536),
        ("0.0000000019GB", 1),
        ("4645746", 4_645_746),
    ],
)
def test_budgets_are_read_as_they_are_written(text, size):
    assert worker.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "0", "0.4", "3.2G", "1e9", "3,2GB", "nan", "٣GB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RequestError, match=r"a size such as 3\.2GB"):
        worker.parse_bytes(text)


def without(original, part):
    def format(self, name, *rest):
        return None if part in name else original(self, name, *rest)

    return format


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "3"), "bits '3': choose 8, 4, 2, mobile"),
        (("--group", "48"), "group 48: choose 32, 64, 128"),
        (("--bits", "mobile", "--group", "32"), "the mobile layout has one scale a row"),
        (("--bits", "mobile", "--float-tables"), "the mobile mix includes its tables"),
        (("--bits", "mixed"), "bits 'mixed' needs a budget: how many bytes"),
        (("--bits", "mixed", "--budget", "3G"), "budget '3G': a size such as 3.2GB"),
        (("--bits", "mixed", "--budget", "1MB"), "the smallest that this model can be made is 6,"),
        (("--budget", "4MB"), "a budget is for bits 'mixed', not '4'; leave it out"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path, arguments, message
):
    target = tmp_path / "low"
    result = CliRunner().invoke(app, ["quantize", "pocket", str(target), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not target.exists()


def conversations(path: Path, count: int = 3) -> Path:
    messages = [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "The answer is 7."},
    ]
    lines = [json.dumps({"messages": messages, "kind": "sum"}) for _ in range(count)]
    path.write_text("\n\n".join(lines))
    return path


def test_calibration_is_reported(exact, tmp_path):
    data = conversations(tmp_path / "talks.jsonl")
    said = gemsmith("quantize", exact, tmp_path / "low", "--data", data)
    assert "calibrated" in said
    # Three matrices of each of nine MLPs; some keep free scales, as the embedding does.
    told = re.findall(r"MLP +int4-g32s? .* (\d+)/(\d+)", said)
    assert [sum(map(int, column)) for column in zip(*told, strict=True)] == [27, 27]
    assert re.search(r"Calibrated on \d\d tokens of", said)
    facts = json.loads(gemsmith("quantize", exact, tmp_path / "x", "--data", data, "--json"))
    kinds: dict[str, int] = defaultdict(int)
    for kind in facts["weights"]:
        kinds[kind["kind"]] += kind["calibrated"]
    assert kinds["MLP"] == 27
    assert kinds["embedding"] == kinds["PLE projections"] == 0
    assert "end in s: scales are multiples of a step" in " ".join(said.split())
    assert {"int4-g32", "int4-g32s"} < {kind["format"] for kind in facts["weights"]}
    assert facts["calibration_tokens"] == sum(map(len, worker.read_tokens(str(data), POCKET)))


def test_data_is_read_until_there_is_enough(tmp_path, monkeypatch):
    data = conversations(tmp_path / "talks.jsonl", 9)
    one = worker.read_tokens(str(data), POCKET)[0]
    monkeypatch.setattr(worker, "MAX_TOKENS", 2 * len(one) + 5)
    assert worker.read_tokens(str(data), POCKET) == [one, one, one[:5]]
    monkeypatch.setattr(worker, "MAX_SEQUENCE", 4)
    assert worker.read_tokens(str(data), POCKET) == [one[:4]] * 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; give at least one conversation, .*messages"),
        ("\n{", "talks.jsonl:2: not JSON"),
        ("[1]", "talks.jsonl:1: no messages; a line is"),
        ('{"messages": 3}', "talks.jsonl:1: no messages; a line is"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "talks.jsonl:1: .*king"),
        ("\udc80", "not a text file"),
    ],
)
def test_data_that_holds_no_conversations_is_refused_by_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "talks.jsonl"
    path.write_text(text, "utf-8", errors="surrogateescape")
    with pytest.raises(RequestError, match=message):
        worker.read_tokens(str(path), POCKET)
    with pytest.raises(RequestError, match="absent does not exist; --data takes a JSON-lines file"):
        worker.read_tokens(str(tmp_path / "absent"), POCKET)
    with pytest.raises(RequestError, match=r"pocket: .*gemsmith brings no conversations to calib"):
        worker.read_tokens("pocket", POCKET)
