"""`gemsmith eval`: ask the held-out items, show how far it is, print the scores."""

import json
from contextlib import nullcontext

from rich.console import Console
from rich.progress import Progress

from gemsmith.errors import RequestError
from gemsmith.evals import pocket


def run(name: str, model: str, *, limit: int | None, failures: int, as_json: bool) -> None:
    """Measure `model` on the items called `name` and print the report.

    Raises:
      RequestError: no such items.
    """
    if name != "pocket":
        raise RequestError(f"no evaluation {name!r}; there is pocket")
    items = pocket.read_items(limit=limit)
    errors = Console(stderr=True)
    with Progress(console=errors) if errors.is_terminal else nullcontext() as progress:
        task = progress.add_task(f"{len(items)} items", total=len(items)) if progress else None

        def advance(outcome: pocket.Outcome) -> None:
            if progress and task is not None:
                progress.advance(task)

        report = pocket.evaluate_in_processes(model, items, advance)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        pocket.show(report, Console(), failures=failures)
    if not report.complete:
        raise KeyboardInterrupt
