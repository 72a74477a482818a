"""The dependency order of the package: every import, at top level and inside functions.

ROOMS is the layer table of docs/architecture.md. A room may import itself and the rooms it lists,
nothing else of the package; THIRD_PARTY says which libraries the lower rooms may use.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "gemsmith"

BASE = {"errors", "config", "shapes", "sizing", "work", "devices"}
LOW = BASE | {"hardware", "ops"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "shapes": {"config"},
    "sizing": {"errors", "config", "shapes"},
    "work": {"config", "sizing"},
    "devices": {"errors"},
    "choose": BASE | {"fit"},
    "hardware": BASE,
    "probe": {"hardware", "_native"},
    "fit": BASE | {"hardware", "probe"},
    "_native": set(),  # the C++ extension
    "ops": BASE | {"hardware", "_native"},
    "text": BASE | {"hardware", "_native"},
    "media": BASE | {"hardware"},
    "model": LOW,
    "quant": LOW,
    "cache": LOW,
    "weights": LOW | {"model", "quant", "cache"},
    "headers": BASE | {"weights"},
    "engine": LOW | {"text", "media", "model", "quant", "cache", "weights"},
    "train": LOW | {"text", "media", "model", "quant", "cache", "weights"},
    "agent": {"errors", "config", "text"},
    "server": LOW | {"text", "media", "model", "quant", "cache", "weights", "engine"},
    "evals": LOW | {"text", "media", "model", "quant", "cache", "weights", "engine"},
    # The command line may use everything; it is used by `python -m gemsmith` alone.
    "cli": {*LOW, "text", "media", "model", "quant", "cache", "weights", "headers", "engine"}
    | {"fit", "choose", "train", "agent", "server", "evals", ""},
    "__main__": {"cli"},
    # `import gemsmith` gives its public names lazily, from wherever they live.
    "": LOW | {"text", "model", "cache", "weights", "engine"},
    "testing": LOW | {"text", "model", "cache", "weights", "engine"},
}
NO_TORCH = {"text", "headers", "agent"}
STDLIB_ONLY = BASE | {"choose"}


def room(module: str) -> str:
    """The room of a dotted module name inside the package: "" is the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            for alias in node.names:
                # `from gemsmith import config` imports a room, not a name of the package.
                inside = base == "gemsmith" and (
                    (SOURCE / alias.name).is_dir() or (SOURCE / f"{alias.name}.py").is_file()
                )
                yield node.lineno, f"{base}.{alias.name}" if inside else base
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            first = node.args[0] if node.args else None
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def offences(source: str, path: Path) -> list[str]:
    """What one file imports against the table, one line each."""
    relative = path.relative_to(SOURCE).with_suffix("")
    is_package = relative.name == "__init__"
    module = ".".join(["gemsmith", *(p for p in relative.parts if p != "__init__")])
    own, found = room(module), []
    for line, name in imports(ast.parse(source), module, is_package=is_package):
        top, other = name.split(".")[0], room(name)
        where = f"{path.relative_to(SOURCE)}:{line} imports {name}"
        if top == "gemsmith":
            if other == "testing":
                found.append(f"{where}: testing is for tests")
            elif other not in ROOMS:
                found.append(f"{where}: {other!r} has no row in ROOMS")
            elif other != own and other not in ROOMS[own]:
                found.append(f"{where}: {own or 'gemsmith'} may use {sorted(ROOMS[own])}")
        elif own in STDLIB_ONLY and top not in sys.stdlib_module_names:
            found.append(f"{where}: {own} uses the standard library only")
        elif own in NO_TORCH and top == "torch":
            found.append(f"{where}: {own} runs without torch")
        elif top == "transformers":
            found.append(f"{where}: transformers is the reference in tests, never imported")
    return found


def sources() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if "__pycache__" not in path.parts)


def test_every_import_respects_the_layers():
    found = [line for path in sources() for line in offences(path.read_text("utf-8"), path)]
    assert not found, "\n".join(found)


def test_every_room_has_a_row():
    rooms = {room(".".join(["gemsmith", *p.relative_to(SOURCE).with_suffix("").parts])) for p in
             sources()} - {"__init__"}  # fmt: skip
    assert rooms <= ROOMS.keys(), rooms - ROOMS.keys()


def test_the_table_has_no_cycle():
    """Rooms can be put in an order in which each imports only earlier ones."""
    left = dict(ROOMS)
    while left:
        ready = [name for name, uses in left.items() if not uses & left.keys() - {name}]
        assert ready, f"cycle among {sorted(left)}"
        for name in ready:
            del left[name]


@pytest.mark.parametrize(
    ("where", "source", "message"),
    [
        ("config/text.py", "import numpy", "standard library only"),
        ("sizing.py", "def f():\n    import torch", "standard library only"),
        ("text/chat.py", "import torch.nn as nn", "text runs without torch"),
        ("agent/loop.py", "from gemsmith.engine import LM", "agent may use"),
        ("model/text.py", "def f():\n    from ..cache import ring", "model may use"),
        ("model/text.py", "from gemsmith import engine", "model may use"),
        ("quant/linear.py", "import gemsmith._native as native", "quant may use"),
        (
            "ops/cpu.py",
            "from x import import_module\nimport_module('gemsmith.model')",
            "ops may use",
        ),
        ("engine/engine.py", "from gemsmith.testing import tiny_config", "testing is for tests"),
        ("weights/load.py", "import transformers", "never imported"),
    ],
)
def test_an_import_against_the_order_is_found(where: str, source: str, message: str):
    [line] = offences(source, SOURCE / where)
    assert line.startswith(where)
    assert message in line
