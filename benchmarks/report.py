"""Makes docs/numbers.md from the records in docs/numbers/*.jsonl.

Of each benchmark, model and machine the latest record is shown. Nothing is typed by hand: change
the page by measuring again with --record.

Run: python -m benchmarks.report [--check]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import NUMBERS

Record = dict[str, Any]
HEAD = """# Numbers

Made by `python -m benchmarks.report` from `docs/numbers/*.jsonl`; do not edit. Every speed stands
beside its ceiling: what the machine could do at best, measured just before by the same program.
"""


def latest(folder: Path) -> list[Record]:
    """The last record of each name, model and machine, in a stable order."""
    found: dict[tuple[str, str, str], Record] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record: Record = json.loads(line)
            about = record["machine"]
            machine = f"{about['cpu']} {' '.join(about['isa'])} {about['threads']}"
            found[record["name"], record["model"], machine] = record
    return [found[key] for key in sorted(found)]


def prefill(record: Record) -> list[str]:
    labels = {
        "skip": "gemsmith",
        "no_skip": "gemsmith, skip off",
        "transformers": "Transformers (skips too)",
    }
    rates = ", ".join(f"{name} {r:.0f} GFLOP/s" for name, r in record["gflops_measured"].items())
    lines = [
        f"## Prefill, {record['model']}, {record['dtype']}, {record['tokens']} tokens",
        "",
        "| | tok/s, median | spread | n | ceiling | of it |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, run in record["runs"].items():
        lines.append(
            f"| {labels[name]} | {run['median']:.1f} | {run['min']:.1f} - {run['max']:.1f} | "
            f"{run['n']} | {run['ceiling']:.1f} | {run['median'] / run['ceiling']:.0%} |"
        )
    return [
        *lines,
        "",
        f"Skip is {record['skip_over_no_skip']:.2f} times as fast as no skip and "
        f"{record['skip_over_transformers']:.2f} times as fast as Transformers, in the same run. "
        f"The machine multiplies at {rates} and reads {record['gb_s_measured']:.1f} GB/s.",
    ]


def memory(record: Record) -> list[str]:
    gib = {name: record[name] / 2**30 for name in ("peak", "floor", "ple_table")}
    lines = [
        f"## Memory, {record['model']}, {record['dtype']}, command line",
        "",
        "| peak GiB | weights without PLE | ratio | PLE, stays on disk |",
        "|--:|--:|--:|--:|",
        f"| {gib['peak']:.2f} | {gib['floor']:.2f} | {record['peak_over_floor']:.3f} | "
        f"{gib['ple_table']:.2f} |",
        "",
        "| tokens | K/V bytes held | by sizing |",
        "|--:|--:|--:|",
    ]
    return lines + [
        f"| {tokens} | {kv['held']} | {kv['sizing']} |" for tokens, kv in record["kv"].items()
    ]


def media(record: Record) -> list[str]:
    lines = [
        "## Media, file to model input",
        "",
        "| | ms, median | spread | n | of decoding alone | ours is |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for subject, found in record["subjects"].items():
        runs = found["runs"]
        ours, floor = runs["gemsmith"]["median"], runs["floor"]["median"]
        for name, run in runs.items():
            least, median, most = (run[key] * 1e3 for key in ("min", "median", "max"))
            peer = name not in ("gemsmith", "floor")
            ratio = f"{run['median'] / ours:.2f}x as fast" if peer else ""
            lines.append(
                f"| {subject}: {'decoding alone' if name == 'floor' else name} | {median:.1f} | "
                f"{least:.1f} - {most:.1f} | {run['n']} | {run['median'] / floor:.2f} | "
                f"{ratio} |"
            )
        lines += [
            f"| {subject}: {name} | {why} | | | | |" for name, why in found["missing"].items()
        ]
    return lines


def provenance(record: Record) -> str:
    about = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{about['cpu']} ({', '.join(about['isa'])}), {about['threads']} threads, "
        f"{about['memory_gib']} GiB, load before {about['load_before']}; {versions}; commit "
        f"{record['commit']}; {record['date']} UTC; `{record['command']}`"
    )


SECTIONS = {"prefill": prefill, "memory": memory, "media": media}


def page(records: list[Record]) -> str:
    parts = [HEAD]
    for record in records:
        parts.append("\n".join([*SECTIONS[record["name"]](record), "", provenance(record)]) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    path = NUMBERS.with_suffix(".md")
    text = page(latest(NUMBERS))
    if not options.check:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path} is not what its records say; run python -m benchmarks.report")


if __name__ == "__main__":
    main()
