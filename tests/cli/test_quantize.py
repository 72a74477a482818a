"""`gemsmith quantize`: what is written runs, and is called what it is."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gemsmith.cli import quantize as worker
from gemsmith.cli.main import app
from gemsmith.errors import WeightsError
from gemsmith.weights.convert import Recipe


def gemsmith(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The embedded model at 4 bits, and what was said of it."""
    folder = tmp_path_factory.mktemp("quantize") / "low"
    return folder, gemsmith("quantize", "pocket", folder)


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


def test_the_report_for_programs_adds_up(tmp_path):
    facts = json.loads(gemsmith("quantize", "pocket", tmp_path / "low", "--bits", 8, "--json"))
    assert facts["verdict"].startswith("an 8-bit checkpoint; every matrix")
    sizes = {(kind["kind"], kind["format"]): kind for kind in facts["weights"]}
    assert sizes["attention", "int8"]["relative_squared_error"] < 1e-4
    assert sizes["norms and scalars", "BF16"]["relative_squared_error"] == 0
    stored = (tmp_path / "low" / "model.safetensors").stat().st_size
    assert 0 < stored - sum(kind["bytes"] for kind in facts["weights"]) < 60_000  # its header


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
