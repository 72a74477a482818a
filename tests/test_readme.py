"""What the README says can be done can be done."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gemsmith.config import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    """Every line of the shell examples that runs by itself."""
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if "gemsmith" in line and "gemsmith chat" not in line]


def test_the_examples_are_found():
    assert len(blocks("python")) == 1
    assert len(commands()) == 7


@pytest.mark.slow
def test_the_python_example_runs():
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Hello! What can I do for you? stop" in done.stdout
    assert "Finished(" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_a_command_runs(line: str):
    told, _, command = line.rpartition("|")
    data = shlex.split(told)[1] if told else None
    arguments = shlex.split(command)
    assert arguments[0] == "gemsmith"
    done = subprocess.run(
        [sys.executable, "-m", *arguments], input=data, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_link_inside_the_repository_leads_somewhere(page: str):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text("utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_tree_of_the_architecture_page_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    [tree] = re.findall(r"^```\n(src/.*?)^```", page, re.M | re.S)
    for line in tree.splitlines():
        name = line.split()[0]
        place = ROOT / "src" / "gemsmith" / name if line.startswith("  ") else ROOT / name
        if not line.startswith("   "):
            assert place.exists(), name


@pytest.mark.parametrize("make", ["demo", "test"])
def test_the_targets_of_the_makefile_are_there(make: str):
    assert f"make {make}" in README
    assert re.search(rf"^{make}:", (ROOT / "Makefile").read_text("utf-8"), re.M)


def test_layers_that_prompts_skip_are_counted_right():
    [row] = [line for line in README.splitlines() if line.startswith("| prompt tokens skip")]
    cells = [cell.strip() for cell in row.split("|")[2:7]]
    for cell, config in zip(cells, PRESETS.values(), strict=True):
        text = config.text_config
        shared = text.num_kv_shared_layers
        known = (
            f"{shared} of {text.num_hidden_layers}",
            f"{shared} of {text.num_hidden_layers} layers",
        )
        assert cell in (known if shared else ("no such layers",))
