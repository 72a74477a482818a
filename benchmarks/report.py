"""Makes docs/numbers.md from the records in docs/numbers/*.jsonl, or a page from another folder's.

Of each benchmark, model, format and machine the latest record is shown, and for each machine what
must be reached and whether it was (musts.py). Nothing is typed by hand: change the page by
measuring again with --record.

Run: python -m benchmarks.report [--check] [FOLDER]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import musts
from benchmarks.measure import NUMBERS
from benchmarks.musts import LLAMA, OURS, SERVERS

Record = dict[str, Any]
HEAD = """# Numbers

Made by `python -m benchmarks.report` from `docs/numbers/*.jsonl`; do not edit. Every speed stands
beside its ceiling: what the machine could do at best, measured just before by the same program.
"""


def latest(folder: Path) -> list[Record]:
    """The last record of each name, model, format and machine, in a stable order."""
    found: dict[tuple[str, str, str, str], Record] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record: Record = json.loads(line)
            key = record["name"], record["model"], record.get("dtype", "")
            found[*key, machine_of(record)] = record
    return [found[key] for key in sorted(found)]


def machine_of(record: Record) -> str:
    about = record["machine"]
    return f"{about['cpu']} ({', '.join(about['isa'])}), {about['threads']} threads"


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
    ]
    if record.get("page_cache") is not None:
        cached = record["page_cache"] / 2**30
        lines += ["", f"The page cache then held {cached:.2f} GiB of the checkpoint's files."]
    if record["kv"]:
        lines += ["", "| tokens | K/V bytes held | by sizing |", "|--:|--:|--:|"]
    return lines + [
        f"| {tokens} | {kv['held']} | {kv['sizing']} |" for tokens, kv in record["kv"].items()
    ]


def decode(record: Record) -> list[str]:
    passes = record["passes_seconds"]
    one, start = passes["1"]["median"], record["first_token_seconds"]
    lines = [
        f"## Decoding, {record['model']}, {record['dtype']}, one sequence",
        "",
        "| context | tok/s, median | spread | n | GB a token | ceiling | of it |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for context, run in record["contexts"].items():
        lines.append(
            f"| {context} | {run['median']:.2f} | {run['min']:.2f} - {run['max']:.2f} | {run['n']} "
            f"| {run['bytes'] / 1e9:.3f} | {run['ceiling']:.1f} | "
            f"{run['median'] / run['ceiling']:.0%} |"
        )
    times = ", ".join(f"of {rows} {p['median'] / one:.2f}" for rows, p in passes.items())
    return [
        *lines,
        "",
        f"A pass of one token takes {one * 1e3:.1f} ms; in multiples of it, {times}. The first "
        f"token of a {record['prompt_tokens']}-token prompt is there {start['median']:.2f} s "
        f"({start['min']:.2f} - {start['max']:.2f}) after the start of the process, whose exit is "
        f"counted too. The machine reads {record['gb_s_measured']:.1f} GB/s.",
    ]


def peers(record: Record) -> list[str]:
    lines = [
        f"## Beside others, {record['model']}, {record['dtype']}, in turn",
        "",
        "| | tok/s, median | spread | n | int4 is |",
        "|---|--:|--:|--:|--:|",
    ]
    programs = record["programs"]
    ours = programs[OURS]["speeds"]
    for name, program in programs.items():
        for task, run in program["speeds"].items():
            ratio = ours[task]["median"] / run["median"] if task in ours and name != OURS else None
            lines.append(
                f"| {name}: {task} | {run['median']:.2f} | {run['min']:.2f} - "
                f"{run['max']:.2f} | {run['n']} | {f'{ratio:.2f}x' if ratio else ''} |"
            )
        if program["missing"]:
            lines.append(f"| {name} | {program['missing']} | | | |")
    lines += ["", "| | GB a token | peak GB, short context | in all | load s |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for name, program in programs.items():
        if program["peak"]:
            peaks = list(program["peak"].values())
            lines.append(
                f"| {name} | {program['bytes_per_token'] / 1e9:.3f} | {peaks[0] / 1e9:.2f} | "
                f"{max(peaks) / 1e9:.2f} | {program['load']['median']:.1f} |"
            )
    apart, rate = record["logit_distance"], record["gb_s_measured"]
    said = [] if rate is None else [f"The machine reads {rate:.1f} GB/s."]
    if apart is not None:
        said.append(f"Logits of gemsmith and llama.cpp are {apart:.3f} apart, on equal weights.")
    said.append(f"llama.cpp: {programs[LLAMA]['about'] or 'absent'}.")
    return [*lines, "", " ".join(said)]


def kernels(record: Record) -> list[str]:
    lines = [
        f"## Products of few rows, {record['isa']}",
        "",
        "| | GB/s, median | spread | n | of plain reading |",
        "|---|--:|--:|--:|--:|",
    ]
    return lines + [
        f"| {name} | {run['median']:.1f} | {run['min']:.1f} - {run['max']:.1f} | {run['n']} | "
        f"{run['median'] / run['ceiling']:.0%} |"
        for name, run in record["runs"].items()
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


def fit(record: Record) -> list[str]:
    how = "taken from these runs" if record["calibrated_here"] else "of earlier runs"
    lines = [
        f"## `gemsmith fit` beside what was measured, {record['model']}",
        "",
        f"Predicted over measured, less 1; speeds by shares of the bound {how}. Rows by when they "
        f"were measured: {'; '.join(f'{rows} at {run}' for run, rows in record['runs'].items())}.",
        "",
        "| model | format | context | users | " + " | ".join(record["limits"]) + " |",
        "|---|---|--:|--:|" + "--:|" * len(record["limits"]),
    ]
    for row in record["rows"]:
        errors = (row["errors"][what] for what in record["limits"])
        cells = " | ".join("-" if error is None else f"{error:+.1%}" for error in errors)
        where = f"{row['model']} | {row['format']} | {row['context']} | {row['users']}"
        lines.append(f"| {where} | {cells} |")
    worst = (
        f"{what} {record['worst'][what]:.1%} of {limit:.1%}"
        for what, limit in record["limits"].items()
        if what in record["worst"]
    )
    return [*lines, "", f"At most off, of what is allowed: {', '.join(worst)}."]


def grammar(record: Record) -> list[str]:
    return [
        f"## Calls of tools with random schemas, {record['model']}, {record['dtype']}",
        "",
        f"| schemas | calls | of them right | cut short by {record['max_tokens']} tokens | "
        "empty replies | failures | s |",
        "|--:|--:|--:|--:|--:|--:|--:|",
        f"| {record['schemas']} | {record['calls']} | {record['good_calls']} | "
        f"{record['cut_short']} | {record['empty_replies']} | {record['failures']} | "
        f"{record['seconds']:.0f} |",
    ]


def serve(record: Record) -> list[str]:
    shape = record["shape"]
    lines = [
        f"## Serving agents, {record['model']}, {record['dtype']}, in turn",
        "",
        f"Each client: {shape['turns']} turns; prompts of {shape['shared']} tokens that all share, "
        f"{shape['task']} of its own, {shape['call'] + shape['result']} more each turn; replies of "
        f"{shape['generated']}; pauses of up to {shape['pause_s']:g} s.",
        "",
        "| clients | | tok/s, all clients | first token, turn 1, s | from turn 2 on, s | n |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    programs = record["programs"]
    for clients in programs[SERVERS[0]]["loads"]:
        for name in SERVERS:
            if load := programs[name]["loads"].get(clients):
                cells = (
                    "{median:.{0}f} ({min:.{0}f} - {max:.{0}f})".format(digits, **run)
                    for run, digits in zip(load.values(), (1, 3, 3), strict=True)
                )
                n = load["tokens_per_s"]["n"]
                lines.append(f"| {clients} | {name} | {' | '.join(cells)} | {n} |")
    peaks = (
        f"{name} {each['missing'] or format(each['peak'] / 1e9, '.2f') + ' GB'}"
        for name, each in programs.items()
    )
    return [*lines, "", f"Medians with least and most of the rounds. Peak: {', '.join(peaks)}."]


def agent(record: Record) -> list[str]:
    lines = [
        f"## A loop of {record['steps']} tool calls, {record['model']}, {record['dtype']}, in turn",
        "",
        "| | s, median | spread | n | tokens generated | calls that fit the tool |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, found in record["programs"].items():
        if found["missing"]:
            lines.append(f"| {name} | {found['missing']} | | | | |")
            continue
        run = found["seconds"]
        lines.append(
            f"| {name} | {run['median']:.2f} | {run['min']:.2f} - {run['max']:.2f} | {run['n']} | "
            f"{found['tokens']:.0f} | {found['calls']} of {record['steps'] * run['n']} |"
        )
    return lines


def conformance(record: Record) -> list[str]:
    lines = [
        f"## `gemsmith probe`, {record['model']}, {record['dtype']}",
        "",
        "Passed, of those that could be asked; what is skipped is not counted.",
        "",
        "| | " + " | ".join(record["programs"]) + " |",
        "|---|" + "--:|" * len(record["programs"]),
    ]
    asked = {name: each for name, each in record["programs"].items() if not each["missing"]}
    for group in next(iter(asked.values()))["groups"]:
        cells = []
        for program in record["programs"].values():
            found = program.get("groups", {}).get(group, {})
            passed, failed = found.get("pass", 0), found.get("fail", 0)
            cells.append(f"{passed} of {passed + failed}" if passed + failed else "")
        if any(cells):
            lines.append(f"| {group} | {' | '.join(cells)} |")
    for name, program in record["programs"].items():
        if program["missing"]:
            lines += ["", f"{name}: {program['missing']}."]
        elif program["failed"]:
            lines += ["", f"Failed at {name}: {', '.join(program['failed'])}."]
    return lines


def soak(record: Record) -> list[str]:
    least, most = (f"{of(record['resident']) / 2**20:.0f}" for of in (min, max))
    return [
        f"## Soak, {record['model']}, {record['minutes']:g} minutes",
        "",
        f"{record['clients']} clients sent {record['requests']} requests, good, broken and given "
        f"up; their processes were stopped and continued {record['stops']} times. Faults that are "
        f"not the client's: {record['faults']}. Resident memory after the warm-up changed by "
        f"{record['growth']:+.2%}, and was {least} to {most} MiB in all.",
    ]


def provenance(record: Record) -> str:
    about = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{about['cpu']} ({', '.join(about['isa'])}), {about['threads']} threads, "
        f"{about['memory_gib']} GiB, load before {about['load_before']}; {versions}; commit "
        f"{record['commit']}; {record['date']} UTC; `{record['command']}`"
    )


SECTIONS = {
    "agent": agent,
    "conformance": conformance,
    "decode": decode,
    "fit": fit,
    "grammar": grammar,
    "kernels": kernels,
    "media": media,
    "memory": memory,
    "peers": peers,
    "prefill": prefill,
    "serve": serve,
    "soak": soak,
}


COUNTED = ("conformance", "grammar", "soak")
"""Benchmarks whose results are no speeds: they hold wherever they were run."""


def required(records: list[Record]) -> list[str]:
    """What must be reached, for each machine that measured the speed of some of it."""
    lines: list[str] = []
    counted = [record for record in records if record["name"] in COUNTED]
    timed = [record for record in records if record["name"] not in COUNTED]
    for machine in dict.fromkeys(map(machine_of, timed)):
        mine = [record for record in timed if machine_of(record) == machine]
        if not any(must.measured is not None for must in musts.musts(mine)):
            continue
        found = musts.musts(mine + counted)
        passed = sum(must.passed for must in found)
        lines += [f"## Must reach, {machine}: {passed} of {len(found)}", ""]
        lines += ["| | needed | measured | |", "|---|--:|--:|---|"]
        lines += ["| " + " | ".join(must.cells) + " |" for must in found]
        lines.append("")
    return lines


def page(records: list[Record]) -> str:
    parts = [HEAD, *(["\n".join(needed)] if (needed := required(records)) else [])]
    for record in records:
        parts.append("\n".join([*SECTIONS[record["name"]](record), "", provenance(record)]) + "\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=NUMBERS, help="of the records")
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    path = options.folder.with_suffix(".md")
    records = latest(options.folder)
    text = page(records)
    if not options.check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print("\n".join([*required(records), f"all of it: {path}"]))
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path} is not what its records say; run python -m benchmarks.report")


if __name__ == "__main__":
    main()
