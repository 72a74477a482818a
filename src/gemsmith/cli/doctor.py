"""`gemsmith doctor`: what this machine offers, which of it is used, and whether templates agree."""

import platform
import sys
from dataclasses import asdict
from difflib import unified_diff
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemsmith import __version__, hardware
from gemsmith.cli.console import write
from gemsmith.cli.info import size
from gemsmith.config import Gemma4Config
from gemsmith.text import template
from gemsmith.weights import hub

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "huggingface-hub", "gguf")


def examine() -> dict[str, Any]:
    """The machine, the versions and the paths taken, as JSON-ready data; sizes in bytes."""
    machine = hardware.machine()
    gpus = hardware.gpus() if find_spec("torch") else []
    return {
        "machine": {
            "system": machine.system,
            "cpu": machine.cpu,
            "cores": machine.cores,
            "cpu_limit": machine.cpu_limit,
            "isa": list(machine.isa),
            "memory_bytes": machine.memory_bytes,
            "available_bytes": machine.available_bytes,
            "memory_limit": machine.memory_limit,
            "gpus": [
                {"name": g.name, "memory_bytes": g.memory_bytes, "free_bytes": g.free_bytes}
                for g in gpus
            ],
        },
        "versions": {
            "gemsmith": __version__,
            "python": platform.python_version(),
            **dict(map(_version, LIBRARIES)),
        },
        "paths": _paths(gpus),
    }


def _version(library: str) -> tuple[str, str | None]:
    try:
        return library, version(library)
    except PackageNotFoundError:
        return library, None


def _paths(gpus: list[hardware.Gpu]) -> dict[str, str]:
    """What runs what in this version, in words."""
    if find_spec("torch") is None:
        return {"device": "none: torch is not installed"}
    import torch

    from gemsmith.ops import native

    libraries = [
        name
        for name, there in (
            ("MKL", torch.backends.mkl.is_available()),
            ("oneDNN", torch.backends.mkldnn.is_available()),
            ("OpenBLAS or another BLAS", not torch.backends.mkl.is_available()),
        )
        if there
    ]
    return {
        "device": "cuda" if gpus else "cpu: torch sees no CUDA device",
        "torch on cpu": (
            f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
            f"{' and '.join(libraries)}"
        ),
        "attention": (
            "own kernels on the CPU (int8 K/V, short steps), scaled_dot_product_attention elsewhere"
            if native.available()
            else "torch.nn.functional.scaled_dot_product_attention"
        ),
        "own kernels": (
            f"{native.isa()} (of {', '.join(native.isas())}), {native.threads()} threads"
            if native.available()
            else "not built: torch does their work, slower"
        ),
    }


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what `examine` found."""
    machine = facts["machine"]
    rows = [
        ("system", machine["system"]),
        ("cpu", f"{machine['cpu']}, {machine['cores']} logical processors"),
        ("instructions", " ".join(machine["isa"]) or "none of those that matter here"),
        ("memory", _memory(machine)),
    ]
    if machine["cpu_limit"] is not None:
        rows.append(("cgroup", f"{machine['cpu_limit']:g} processors' worth of time"))
    rows += [
        ("gpu", f"{gpu['name']}, {size(gpu['free_bytes'])} of {size(gpu['memory_bytes'])} free")
        for gpu in machine["gpus"]
    ] or [("gpu", "none")]
    rows += [(name, found or "not installed") for name, found in facts["versions"].items()]
    rows.append(("from", sys.prefix))
    rows += list(facts["paths"].items())
    _print(rows, console)


def _memory(machine: dict[str, Any]) -> str:
    if machine["memory_bytes"] is None:
        return "unknown"
    text = f"{size(machine['available_bytes'])} of {size(machine['memory_bytes'])} available"
    if machine["memory_limit"] is not None:
        text += f", cgroup limit {size(machine['memory_limit'])}"
    return text


def compare(name: str) -> dict[str, Any]:
    """How a checkpoint's own chat template differs from gemsmith's, over the built-in corpus.

    Of the format's revisions for the model's size, the one that is nearest is compared.

    Raises:
      GemsmithError: no such checkpoint, or a template that cannot be read.
    """
    folder = hub.resolve(name)
    found = template.ChatTemplate.load(folder)
    if found is None:
        return {"template": None, "variant": None, "compared": 0, "differing": []}
    edge = Gemma4Config.load(folder).text_config.hidden_size_per_layer_input
    variants = ("edge", "edge_april") if edge else ("large", "large_april")
    differing = {v: template.compare_templates(found, variant=v) for v in variants}
    nearest = min(variants, key=lambda v: len(differing[v]))
    return {
        "template": found.name,
        "variant": nearest,
        "compared": len(template.CORPUS),
        "differing": [asdict(difference) for difference in differing[nearest]],
    }


def show_differences(facts: dict[str, Any], console: Console) -> None:
    """Print what `compare` found."""
    if facts["template"] is None:
        console.print("no chat_template.jinja: gemsmith's own format is used")
        return
    for difference in facts["differing"]:
        console.print(f"\n{difference['name']}", style="bold", markup=False)
        lines = unified_diff(
            difference["ours"].splitlines(), difference["theirs"].splitlines(),
            "gemsmith", "template", lineterm="",
        )  # fmt: skip
        for line in lines:
            style = {"-": "red", "+": "green"}.get(line[:1])
            write(console, line + "\n", style=style)
    console.print(
        f"{facts['template']}: {len(facts['differing'])} of {facts['compared']} conversations "
        f"differ from gemsmith's {facts['variant']} format",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print(rows: list[tuple[str, str]], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(f"[bold]{label}[/bold]", escape(value))
    console.print(table)
