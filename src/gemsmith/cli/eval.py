"""The commands `gemsmith eval`: how good a model is, and one build of it beside another."""

from typing import Annotated

import typer

from gemsmith.cli.options import POCKET, Device, Json, Model, Quant

evaluation = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a model, or one build of it by another.",
)


@evaluation.command("pocket")
def evaluate(
    model: Model = POCKET,
    quant: Quant = None,
    limit: Annotated[int | None, typer.Option(help="Ask only this many items.")] = None,
    failures: Annotated[int, typer.Option(help="Show this many wrong replies.")] = 0,
    json: Json = False,
) -> None:
    """Held-out items for the built-in model; prints counts and 95 % intervals."""
    from gemsmith.cli import evaluate as worker

    worker.run(model, quant=quant, limit=limit, failures=failures, as_json=json)


@evaluation.command()
def fidelity(
    a: Annotated[str, typer.Argument(help="The reference: pocket, a folder, or a hub id.")],
    b: Annotated[str, typer.Argument(help="The build to judge by it, such as one of 4 bits.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON lines of messages, with tools or not; if not given, pocket's held-out items."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many of each category.")] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Fail below this top-1 agreement, in percent.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Fail above this mean KL, in nats.")] = None,
    max_validity_loss: Annotated[
        float | None,
        typer.Option(help="Fail if this many more points of tool calls are lost."),
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Save a chart: .png, .svg or .pdf.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Write fidelity.json into B's folder; info shows it.")
    ] = False,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of A: float32, bfloat16, or auto.")] = "auto",
    dtype_b: Annotated[str, typer.Option(help="Of B: float32, bfloat16, or auto.")] = "auto",
    json: Json = False,
) -> None:
    """Judge build B of a model by reference A: KL, top-1 agreement, tool calls.

    Exit code 1 if a bound is broken.
    """
    from gemsmith.cli import fidelity as worker

    bounds = {"min_top1": min_top1, "max_kl": max_kl, "max_validity_loss": max_validity_loss}
    loading = ({"device": device, "dtype": dtype}, {"device": device, "dtype": dtype_b})
    kept = worker.run(
        (a, b), loading, data=data, limit=limit, bounds=bounds, plot=plot, save=save, as_json=json
    )
    if not kept:
        raise typer.Exit(1)
