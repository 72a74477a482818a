"""The probes of `gemsmith probe` at gemsmith's server and at llama.cpp's, on the same weights.

Both serve the trained pocket, with room for a few requests at a time. What llama-server cannot be
asked here is skipped: the towers are not in its file.

Run: python -m benchmarks.conformance [--only GROUP ...] [--record]
"""

import argparse
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import measure, servers
from gemsmith.errors import RequestError
from gemsmith.evals.conformance import GROUPS, Outcome, Probe, Report, run, select
from gemsmith.evals.endpoint import Endpoint
from gemsmith.weights.hub import POCKET

SEQUENCES, ROOM = 4, 8192
TIMEOUT_S = 60.0
"""Of a probe."""


def ask(server: servers.Server, probes: list[Probe]) -> Report:
    """Every probe, one after the other."""
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    entry = bar.add_task(server.name, total=len(probes))

    def advance(outcome: Outcome) -> None:
        bar.update(entry, advance=1, description=f"{server.name}: {outcome.group}")

    url = f"http://127.0.0.1:{server.port}/v1"
    with Endpoint(url, timeout_s=TIMEOUT_S) as endpoint:
        endpoint.connect()
        with bar if console.is_terminal else nullcontext():
            return run(endpoint, probes, advance)


def counted(report: Report) -> dict[str, Any]:
    """How many passed, failed and were skipped, by group, and why those failed that did."""
    groups = {
        group: Counter(each.status for each in report.outcomes if each.group == group)
        for group in GROUPS
    }
    failed = {each.name: each.reason for each in report.outcomes if each.status == "fail"}
    return {"groups": {name: dict(found) for name, found in groups.items()}, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[], metavar="GROUP", help="or single probes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    measure.add_record(parser)
    options = parser.parse_args()
    try:
        probes = select(options.only)
    except RequestError as error:
        parser.error(str(error))
    about = measure.machine() | {"threads": options.threads}
    weights = servers.weights_of(POCKET, trained=True)
    programs: dict[str, Any] = {}
    with ExitStack() as stack:
        up, missing = servers.both(
            stack, weights, sequences=SEQUENCES, longest=ROOM, threads=options.threads
        )
        for server in up:
            began = time.monotonic()
            found = counted(ask(server, probes))
            programs[server.name] = {"missing": "", "seconds": time.monotonic() - began, **found}
            total = sum((Counter(each) for each in found["groups"].values()), Counter())
            print(f"{server.name:15} {', '.join(f'{n} {status}' for status, n in total.items())}")
            for name, reason in found["failed"].items():
                print(f"    {name}: {reason}")
    for name, why in missing.items():
        programs[name] = {"missing": why}
        print(f"{name:15} {why}")
    results = {"model": POCKET, "dtype": weights.dtype, "programs": programs}
    results |= {"complete": not options.only}
    measure.finish("conformance", results, about, record=options.record)


if __name__ == "__main__":
    main()
