"""`gemsmith eval pocket`: ask the held-out items, show how far it is, print the scores."""

import json
from contextlib import nullcontext

from rich.console import Console
from rich.progress import Progress

from gemsmith.cli.console import write
from gemsmith.config import Gemma4Config
from gemsmith.evals import pocket
from gemsmith.evals.items import held_out
from gemsmith.weights.hub import resolve


def run(
    model: str, *, quant: str | None = None, limit: int | None, failures: int, as_json: bool
) -> None:
    """Measure `model` on the held-out items and print the report.

    Raises:
      HubError, ConfigError, WeightsError, TokenizerError: the model cannot be loaded.
    """
    config = Gemma4Config.load(resolve(model))
    items, left_out = held_out(config, limit=limit)
    errors = Console(stderr=True)
    with Progress(console=errors) if errors.is_terminal else nullcontext() as progress:
        task = progress.add_task(f"{len(items)} items", total=len(items)) if progress else None

        def advance(outcome: pocket.Outcome) -> None:
            if progress and task is not None:
                progress.advance(task)

        report = pocket.evaluate_in_processes(model, items, advance, quant=quant)
    report.left_out = left_out
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        console = Console()
        pocket.show(report, console)
        show_failures(report.failures(failures), console)
    if not report.complete:
        raise KeyboardInterrupt


def show_failures(outcomes: list[pocket.Outcome], console: Console) -> None:
    """Print wrong replies beside what was asked and expected."""
    for outcome in outcomes:
        item, reply = outcome.item, outcome.reply
        last = next((m["content"] for m in reversed(item.messages) if m["role"] == "user"), "")
        parts = [{"type": "text", "text": last}] if isinstance(last, str) else last
        asked = " ".join(
            part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in parts
        )
        got = [{"name": name, "arguments": values} for name, values in reply.calls] or reply.text
        write(console, f"\n{item.category} {item.id}: {outcome.wrong}\n", style="bold")
        for label, value in (("asked", asked), ("wanted", item.expected), ("got", got)):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            shown = text if len(text) <= 600 else f"{text[:200]} ... {text[-400:]}"
            write(console, f"  {label:7}{shown}\n")
