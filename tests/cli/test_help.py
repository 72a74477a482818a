"""docs/cli.md is what the commands say of themselves.

`python tests/cli/test_help.py` writes it anew.
"""

from pathlib import Path

from typer.testing import CliRunner

from gemsmith.cli.main import app, evaluation

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
COMMANDS = (
    "", "demo", "chat", "generate", "detect", "point", "transcribe",
    "serve", "probe", "quantize", "info", "fit", "choose", "doctor",
    "eval pocket", "eval fidelity",
)  # fmt: skip


def reference() -> str:
    """The page: the help of every command."""
    parts = ["# The command line\n\nGenerated from `--help`; see `tests/cli/test_help.py`.\n"]
    for command in COMMANDS:
        arguments = [*command.split(), "--help"]
        text = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}, prog_name="gemsmith")
        parts.append(f"## gemsmith {command}".rstrip() + f"\n\n```\n{text.output.strip()}\n```\n")
    return "\n".join(parts)


def test_the_reference_page_is_current():
    assert PAGE.read_text("utf-8") == reference(), "run: python tests/cli/test_help.py"


def test_every_command_is_on_the_page():
    groups = {"": app, "eval ": evaluation}
    assert {f"{group.name} " for group in app.registered_groups} == set(groups) - {""}
    names = {
        prefix + (command.name or getattr(command.callback, "__name__", ""))
        for prefix, group in groups.items()
        for command in group.registered_commands
    }
    assert names == set(COMMANDS) - {""}


if __name__ == "__main__":
    PAGE.write_text(reference(), "utf-8")
