"""`gemsmith doctor`: the machine, and a checkpoint's template against ours."""

import json
from pathlib import Path

import pytest
from tests.conftest import needs_extension
from typer.testing import CliRunner

from gemsmith.cli.main import app
from gemsmith.config import PRESETS, text_only
from gemsmith.ops import native

NEARLY = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text_only(PRESETS["E2B"]).save(tmp_path)
    return tmp_path


def doctor(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_machine_and_the_versions_are_told():
    facts = json.loads(doctor("--json"))
    assert facts["machine"]["cores"] >= 1
    assert facts["versions"]["torch"]
    told = facts["paths"]["attention"]
    assert told.startswith("own kernels on the CPU") == native.available()
    assert "scaled_dot_product_attention" in told
    assert facts["machine"]["cpu"] in doctor()


@needs_extension
def test_the_instruction_set_in_use_is_told():
    native.force_isa("generic")
    try:
        assert "own kernels" in doctor()
        told = json.loads(doctor("--json"))["paths"]["own kernels"]
        assert told.startswith("generic (of generic")
    finally:
        native.force_isa(None)
    assert json.loads(doctor("--json"))["paths"]["own kernels"].startswith(
        f"{native.isas()[-1]} (of"
    )


def test_the_absence_of_the_extension_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "extension", lambda: None)
    told = json.loads(doctor("--json"))["paths"]["own kernels"]
    assert told == "not built: torch does their work, slower"


def test_a_template_that_differs_is_shown_and_exits_1(folder: Path):
    (folder / "chat_template.jinja").write_text(NEARLY)
    text = doctor("--template", str(folder), code=1)
    assert "\n tool declared\n" in text or "\ntool declared\n" in text
    assert "conversations differ from gemsmith's edge format" in text.replace("\n", " ")
    facts = json.loads(doctor("--template", str(folder), "--json", code=1))
    names = [difference["name"] for difference in facts["differing"]]
    assert "one question" not in names
    assert 0 < len(names) < facts["compared"]


def test_without_a_template_there_is_nothing_to_compare(folder: Path):
    assert "gemsmith's own format is used" in doctor("--template", str(folder))


def test_a_checkpoint_that_is_not_there_is_an_error():
    assert "error: no folder 'nowhere'" in doctor("--template", "nowhere", code=2)


def test_a_template_cannot_steer_the_terminal(folder: Path):
    """What it writes may hold control characters; they are shown as text."""
    from io import StringIO

    from rich.console import Console

    from gemsmith.cli.doctor import compare, show_differences

    (folder / "chat_template.jinja").write_text("\x1b]0;owned\x07 evil")
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None)
    show_differences(compare(str(folder)), console)
    assert "evil" in screen.getvalue()
    assert "\x1b]" not in screen.getvalue()
