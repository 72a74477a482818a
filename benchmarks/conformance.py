"""The probes of `gemsmith probe` at gemsmith's server and at llama.cpp's, on the same weights.

Both serve the trained pocket, with room for a few requests at a time. What llama-server cannot be
asked here is skipped: the towers are not in its file.

Run: python -m benchmarks.conformance [--only GROUP ...] [--record]
"""

import argparse
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks import measure, servers
from gemsmith.cli.probe import watched
from gemsmith.errors import RequestError
from gemsmith.evals.conformance import GROUPS, Report, select
from gemsmith.evals.endpoint import Endpoint
from gemsmith.weights.hub import POCKET

SEQUENCES, ROOM = 4, 8192
TIMEOUT_S = 60.0
"""Of a probe."""


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
            with Endpoint(f"http://127.0.0.1:{server.port}/v1", timeout_s=TIMEOUT_S) as endpoint:
                report = watched(endpoint, probes)
            found = counted(report)
            programs[server.name] = {"missing": "", "seconds": time.monotonic() - began, **found}
            counts = (f"{report.count(status)} {status}" for status in ("pass", "fail", "skip"))
            print(f"{server.name:15} {', '.join(counts)}")
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
