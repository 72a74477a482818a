"""What several commands have in common: options, and how facts are printed."""

import json
from typing import Annotated, Any

import typer

POCKET = "pocket"

Model = Annotated[
    str, typer.Option("--model", "-m", help="pocket (built in), a folder, or a hub id.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, or auto.")]
KV = Annotated[
    str,
    typer.Option(
        help="How keys and values are kept: float32, bfloat16, int8, or auto (int8 on the CPU)."
    ),
]
Quant = Annotated[
    str | None,
    typer.Option(help="Quantize while loading: int8, int4 or int2; large ones: see quantize."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model think first.")]
Out = Annotated[
    str | None,
    typer.Option(
        help="Where to save the drawing, over what is there; if not given, in this folder: "
        "photo.boxes.png of photo.jpg, photo.points.png of point."
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="Soft tokens a picture may cost: 70, 140, 280, 560, 1120, or auto; if not given, what "
        "the checkpoint says."
    ),
]
System = Annotated[str | None, typer.Option(help="A system message to begin with.")]


def budget_of(text: str | None) -> int | str | None:
    """--budget as the engine takes it, which refuses what is no budget."""
    return int(text) if text and text.isdecimal() else text


def report(facts: dict[str, Any], show: Any, as_json: bool) -> None:
    """Print facts for people or for programs."""
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        from rich.console import Console

        show(facts, Console())
