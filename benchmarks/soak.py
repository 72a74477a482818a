"""A server under clients of every sort for an hour: nothing may fail, leak or grow.

Processes of clients (soak_worker.py) ask for everything that there is: good requests, broken ones,
and ones they turn their back on; the processes themselves are stopped (SIGSTOP) and continued at
random, so that answers pile up. At the end: every answer was whole or a refusal of something wrong,
the server logged no failure, every K/V block is free or held by the prefix cache, and resident
memory after the warm-up stayed within 2 %. Exits with 1 where any of it does not hold.

Memory is compared by medians: of the first fifth of what follows the warm-up with the last fifth.

Run: python -m benchmarks.soak [--minutes 60] [--clients 32] [--record]
"""

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageDraw

from benchmarks import measure, servers
from benchmarks.client import ask
from gemsmith.weights.hub import POCKET, resolve

GROWTH = 0.02
PROCESSES = 8
WARM_UP = 0.25
"""Of the time: caches fill, and allocators find their size."""
TICK_S = 0.25
STOPS_PER_S = 0.5
STOPPED_S = (0.2, 5.0)
PICTURE = measure.REPOSITORY / "build" / "soak.png"


def growth(series: list[int]) -> float:
    """Change from the first fifth of a series, after the warm-up, to the last, of the first."""
    steady = series[int(len(series) * WARM_UP) :]
    fifth = max(1, len(steady) // 5)
    first, last = median(steady[:fifth]), median(steady[-fifth:])
    return (last - first) / first


class Crowd:
    """The processes of clients."""

    def __init__(self, port: int, *, clients: int, seconds: float, seed: int) -> None:
        count = min(PROCESSES, clients)
        self._draw = Random(seed)
        self._stopped: dict[int, float] = {}
        self.stops = 0
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.soak_worker", str(port), str(seconds),
                 str(clients // count + (number < clients % count)), f"{seed}{number}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=measure.REPOSITORY,
            )
            for number in range(count)
        ]  # fmt: skip

    def tick(self) -> None:
        """Stop some, continue those whose time has come."""
        now = time.monotonic()
        for number, until in list(self._stopped.items()):
            if now >= until:
                self._processes[number].send_signal(signal.SIGCONT)
                del self._stopped[number]
        number = self._draw.randrange(len(self._processes))
        if number not in self._stopped and self._draw.random() < STOPS_PER_S * TICK_S:
            self._processes[number].send_signal(signal.SIGSTOP)
            self._stopped[number] = now + self._draw.uniform(*STOPPED_S)
            self.stops += 1

    def end(self) -> tuple[Counter[str], list[str]]:
        """What they asked for, and what went wrong, once all are done."""
        told, faults = Counter[str](), []
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
        for process in self._processes:
            out, errors = process.communicate()
            if process.returncode:
                faults.append(f"clients ended with {process.returncode}: {errors[-500:]!r}")
                continue
            said = json.loads(out)
            told.update(said["told"])
            faults += said["faults"]
        return told, faults


def failures(log: str) -> list[str]:
    """Lines of the server's log that tell of a failure of its own."""
    found = []
    for line in log.splitlines():
        status = json.loads(line).get("status", 0) if line.startswith("{") else 0
        if status >= 500 or re.match(r"Traceback|\w+Error\b", line):
            found.append(line[:300])
    return found


def picture(path: Path, series: list[int], seconds: float, limit: float) -> None:
    """Resident memory over time, with the band around the first fifth after the warm-up."""
    width, height, edge = 960, 320, 48
    mib = [value / 2**20 for value in series]
    warm = int(len(mib) * WARM_UP)
    steady = mib[warm:]
    first = median(steady[: max(1, len(steady) // 5)])
    top = max(*mib, first * (1 + limit)) * 1.02
    low = min(min(steady), first * (1 - limit)) * 0.98

    def at(index: float, value: float) -> tuple[float, float]:
        x = edge + (width - 2 * edge) * index / max(1, len(mib) - 1)
        return x, height - edge - (height - 2 * edge) * max(0, value - low) / (top - low)

    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    band = [at(warm, first * (1 + limit)), at(len(mib) - 1, first * (1 - limit))]
    draw.rectangle(band, fill="#e3efe3")
    draw.line([at(index, value) for index, value in enumerate(mib)], fill="#1f4e8c", width=2)
    draw.text((edge, 12), f"Resident memory, MiB; green: within {limit:.0%}", fill="black")
    for value in (low, top):
        draw.text((4, at(0, value)[1] - 6), f"{value:.0f}", fill="black")
    draw.text((edge, height - edge + 8), "0 min", fill="black")
    draw.text((width - edge - 30, height - edge + 8), f"{seconds / 60:.0f} min", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=POCKET, help="pocket, or a folder")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", type=Path, default=PICTURE, help="of memory over time")
    measure.add_record(parser)
    options = parser.parse_args()
    about = measure.machine() | {"threads": options.threads}
    command = [sys.executable, "-m", "benchmarks.soak_server", "serve", str(resolve(options.model)),
               "--name", "model", "--max-model-len", "2048", "--max-num-seqs", "8"]  # fmt: skip
    seconds = options.minutes * 60
    series: list[int] = []
    with servers.running("gemsmith serve", command, threads=options.threads, cores=[]) as server:
        crowd = Crowd(server.port, clients=options.clients, seconds=seconds, seed=options.seed)
        began = time.monotonic()
        while (spent := time.monotonic() - began) < seconds:
            crowd.tick()
            if spent >= len(series) * seconds / 600:
                series.append(server.resident())
                if len(series) % 10 == 0:
                    print(
                        f"{spent / 60:.1f} of {options.minutes:g} minutes, resident "
                        f"{series[-1] / 2**20:.0f} MiB, {crowd.stops} stops of clients",
                        flush=True,
                    )
            time.sleep(TICK_S)
        told, faults = crowd.end()
        time.sleep(2)
        idle = asyncio.run(ask(server.port, "/idle")).json()
        series.append(server.resident())
        faults += failures(server.said())
    if idle["running"] or idle["waiting"] or idle["leaked"]:
        faults.append(f"at the end, with no client left: {idle}")
    picture(options.picture, series, seconds, GROWTH)
    grown = growth(series)
    return report(options, told, faults, crowd.stops, series, grown, about)


def report(
    options: argparse.Namespace,
    told: Counter[str],
    faults: list[str],
    stops: int,
    series: list[int],
    grown: float,
    about: dict[str, Any],
) -> int:
    """Print the findings and the JSON line; the exit code."""
    for what, count in sorted(told.items()):
        print(f"{count:7} {what}")
    print(f"{stops:7} times a process of clients was stopped and continued")
    print("resident MiB:", *(f"{value / 2**20:.0f}" for value in series[:: len(series) // 40 + 1]))
    print(f"all of them: {options.picture}")
    print(f"change after the warm-up {grown:+.2%} (at most {GROWTH:.0%} either way)")
    for what, count in Counter(faults).most_common(20):
        print(f"fault, {count} times: {what}")
    print(f"{len(faults)} faults that are not the client's")
    results = {
        "model": Path(options.model).name,
        "minutes": options.minutes,
        "clients": options.clients,
        "requests": sum(count for what, count in told.items() if not what.startswith("status")),
        "stops": stops,
        "faults": len(faults),
        "growth": grown,
        "resident": series[:: len(series) // 100 + 1],
    }
    measure.finish("soak", results, about, record=options.record)
    return 1 if faults or abs(grown) > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
