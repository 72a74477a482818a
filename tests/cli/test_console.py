"""Foreign text on its way out: nothing changed, and on a terminal nothing that steers it."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from gemsmith.cli.console import write

TEXT = f"see {{a:b:c}} :100: :x: std [b]x[/b]\n\tif x:\n{'long ' * 50}end  \n"


@pytest.mark.parametrize("style", [None, "dim italic"])
@pytest.mark.parametrize(
    "kind", [{}, {"force_terminal": True, "color_system": None, "legacy_windows": False}]
)
def test_text_comes_out_as_it_is(style: str | None, kind: dict[str, Any]):
    file = StringIO()
    write(Console(file=file, width=40, **kind), TEXT, style)
    assert file.getvalue() == TEXT


def test_off_a_terminal_control_characters_stay_too():
    file = StringIO()
    write(Console(file=file), "\x1b[31mred\r\n\x00")
    assert file.getvalue() == "\x1b[31mred\r\n\x00"


def test_a_style_colors_a_terminal():
    file = StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", legacy_windows=False)
    write(console, ":x:\n\tb", "red")
    assert file.getvalue() == "\x1b[31m:x:\x1b[0m\n\x1b[31m\tb\x1b[0m"
