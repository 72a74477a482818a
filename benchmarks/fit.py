"""What `gemsmith fit` predicts beside what is measured: weights, K/V, peak memory, speed.

Each combination of format, context and number of users runs in a process of its own, where `worker`
fills a context for each user; one of them decodes, the others' memory is there. Bytes are what the
modules and the caches hold, the peak is the process's. The speed of a prompt does not depend on who
else is there, and is measured with one user.

Speed is predicted from this machine's rates, medians of what each process measured just after, and
from the shares in calibration.json. With --calibrate the shares are taken from these very runs
instead and written there, beside those of other kinds of processors: then the errors say how well
a few numbers a kind (of tokens shares of the bound and of the reading of K/V, and seconds a layer;
of prompts a share, and seconds a token and layer) describe all models, contexts and formats, and no
more.
All combinations are measured round after round, and of each the median counts. Without a record
for a kind, its speed has no prediction.

What is measured is noted in --progress at once, and taken from there by the next run on the same
machine, at whatever commit: a run that was stopped goes on where it was. --fresh measures anew.

Run: python -m benchmarks.fit [--models E2B pocket] [--formats int4] [--record] [--calibrate]
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from operator import mul
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import measure, random_checkpoint, report
from benchmarks.llama_worker import ids_of, status_bytes
from gemsmith import fit, hardware, probe, sizing
from gemsmith.config import Gemma4Config
from gemsmith.engine.context import CHUNK_TOKENS, Context
from gemsmith.engine.engine import LM
from gemsmith.fit import Target
from gemsmith.ops import native
from gemsmith.weights.hub import POCKET

BITS = {"bfloat16": None, "int8": "8", "int4": "4", "mobile": "mobile"}
KINDS = {"bfloat16": "float", "int8": "rows", "int4": "groups", "mobile": "mobile"}
"""Of calibration.json. The mobile mix is one of its own: unpacking 2 bits takes longer than reading
them."""
CONTEXTS, USERS = (512, 8192, 32_768), (1, 8)
LENGTHS = range(33, 49)
"""Of short prompts, as agents have them: no two alike."""
PROMPT, STEPS, REPEATS = 512, 8, 5
LIMITS = {"weights": 0.005, "kv": 0.005, "peak": 0.05, "decode": 0.15, "prefill": 0.25}
"""Of the error, as a part of what was measured."""
MODELS = random_checkpoint.SIZES
CALIBRATION = Path(fit.__file__).with_name("calibration.json")
PROGRESS = measure.REPOSITORY / "build" / "fit.jsonl"
KEY = ("probe", "machine", "model", "format", "context", "users", "round")
"""What a row is known by."""
LOAD = """\
import sys
from gemsmith import LM
LM.load(sys.argv[1], device="cpu")
"""
Row = dict[str, Any]


@torch.inference_mode()
def worker(folder: str, context: int, users: int) -> Row:
    """One combination, measured in this process.

    A context is filled with zeros up to the prompt's last pass, which is a real one. Neither time
    nor memory tell that from a whole prompt: K/V are as large and every key is read whatever it
    holds, all storage is written to, and no pass of a prompt takes more than the last, which sees
    the most keys.
    """
    lm = LM.load(folder, device="cpu")
    vocabulary = lm.config.text_config.vocab_size
    ids = ids_of(context - STEPS * (REPEATS + 1), vocabulary)
    held = [Context(lm.model, lm.kv) for _ in range(users)]
    for each in held:
        each.reserve(context)
    first, prompt, prefill = held[0], min(PROMPT, context // 2), []
    if users == 1:
        for _ in range(REPEATS + 1):
            first.rewind_for([])
            start = time.perf_counter()
            first.run(ids[:prompt])
            prefill.append(prompt / (time.perf_counter() - start))
    for length in LENGTHS:
        first.rewind_for([])
        first.run(ids[:length])
    read = max(0, len(ids) - CHUNK_TOKENS)
    for each in held:
        fill(each, read)
    first.run(ids[read:])
    decode = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for id in ids_of(STEPS, vocabulary, 1):
            first.run([id])
        decode.append(STEPS / (time.perf_counter() - start))
    peak = status_bytes("VmHWM")
    rates = probe.measure(native.threads())
    return {
        "prompt": prompt,
        "rates": {"bandwidth": rates.bandwidth, **rates.operations},
        "measured": {
            "weights": lm.memory()["weights"],
            "kv": sum(each.nbytes for each in held),
            "peak": peak,
            # The first of each does what is done once.
            "decode": median(decode[1:]),
            "prefill": median(prefill[1:]) if prefill else None,
        },
    }


def fill(context: Context, tokens: int) -> None:
    """Make so many tokens of a context its past, with zeros for K/V."""
    context.rewind_for([])
    for layer in context.kv._layers.values():
        for tensor in layer.tensors.values():
            tensor.zero_()
    context.kv.length = tokens
    context.keys += [0] * tokens


def combinations(
    models: list[str],
    formats: list[str],
    contexts: list[int],
    users: list[int],
    rounds: int,
    machine: str,
) -> list[Row]:
    """What is to be measured, one round after the other: the keys of the rows."""
    return [
        dict(zip(KEY, (probe.VERSION, machine, model, format, context, count, round), strict=True))
        for round in range(1, rounds + 1)
        for model in models
        for format in formats
        if (model, format) != (POCKET, "mobile")  # it has no such checkpoint
        for context in contexts
        if context <= random_checkpoint.config_of(model).text_config.max_position_embeddings
        for count in users
    ]


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def rows_of(wanted: list[Row], progress: Path, *, fresh: bool = False) -> list[Row]:
    """The rows of these combinations, in order: noted before, or measured now and noted.

    fresh: forget what was noted of them.
    """
    noted = {key_of(row): row for row in measure.noted(progress)}
    keys = [key_of(each) for each in wanted]
    if fresh:
        progress.unlink(missing_ok=True)
        for key, row in noted.items():
            if key not in keys:
                measure.note(progress, row)
        noted.clear()
    rows: list[Row] = []
    now: Row = {"run": f"commit {measure.commit()}, {measure.now()} UTC"}
    with Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        refresh_per_second=1,  # it runs beside what is measured
    ) as bar:
        task = bar.add_task("", total=len(wanted))
        for number, (key, each) in enumerate(zip(keys, wanted, strict=True), 1):
            what = f"{each['model']} {each['format']}, {each['context']} x {each['users']}"
            what += f", round {each['round']}"
            bar.update(task, description=what)
            row = noted.get(key)
            if row is None:
                began = time.monotonic()
                row = each | now | measured(each)
                measure.note(progress, row)
                how = f"{time.monotonic() - began:.0f} s"
            else:
                how = f"measured before, {row['run']}"
            found = row["measured"]
            print(
                f"{number} of {len(wanted)}: {what}: {found['decode']:.2f} tok/s, "
                f"peak {found['peak'] / 1e9:.2f} GB ({how})",
                flush=True,
            )
            bar.advance(task)
            rows.append(row)
    return rows


def measured(combination: Row) -> Row:
    """What a process of its own measures of it."""
    folder = checkpoint(combination["model"], combination["format"])
    made = subprocess.run(
        [sys.executable, "-m", "benchmarks.fit", "--worker", str(folder),
         "--contexts", str(combination["context"]), "--users", str(combination["users"])],
        capture_output=True, text=True, cwd=measure.REPOSITORY,
    )  # fmt: skip
    if made.returncode:
        sys.exit(f"measuring {key_of(combination)[2:]} failed: {made.stderr.strip()}")
    return json.loads(made.stdout.splitlines()[-1])


@cache
def checkpoint(model: str, format: str) -> Path:
    """The folder of a model in a format.

    It is loaded once: packing weights, which is done at the first load, would be a peak of its own.
    """
    folder = random_checkpoint.made(model, BITS[format], None)
    subprocess.run([sys.executable, "-c", LOAD, str(folder)], check=True, cwd=measure.REPOSITORY)
    return folder


def predicted(config: Gemma4Config, format: str, row: Row) -> Row:
    """What fit says of the same combination on a machine of these rates; memory for all users,
    speed for one, the others idle. A vocabulary is left out: random checkpoints have hardly any."""
    rates, here = row["rates"], hardware.machine()
    target = Target(
        "here", "cpu", 1 << 50, rates["bandwidth"], rates,
        arch=hardware.arch(), multiplies_bfloat16=here.multiplies_bfloat16,
    )  # fmt: skip
    options: dict[str, Any] = {"context": row["context"], "kv": "int8", "prompt": row["prompt"]}
    options["media"] = False
    memory = fit.plan("", config, format, target, users=row["users"], **options).memory
    speed = fit.plan("", config, format, target, **options).speed
    vocabulary = sizing.VOCABULARY_BYTES * config.text_config.vocab_size
    return {
        "weights": sum(memory.weights.values()),
        "kv": memory.kv,
        "peak": memory.total - vocabulary,
        "decode": speed.decode and speed.decode.mid,
        "prefill": speed.ttft and row["prompt"] / speed.ttft.mid,
        "bounds": {
            "decode": speed.decode_bound,
            "attention": speed.attention_bound,
            "prefill": speed.prefill_bound,
            "last": speed.last_bound,
        },
    }


def merged(rows: list[Row]) -> list[Row]:
    """Of all rounds of a combination one row, with their medians.

    The machine's rates are the medians of all rows: one machine was measured, again and again.
    """
    rates = {name: median(row["rates"][name] for row in rows) for name in rows[0]["rates"]}
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(key_of(row)[2:-1], []).append(row)
    out = []
    for key, rounds in found.items():
        values = {name: [row["measured"][name] for row in rounds] for name in rounds[0]["measured"]}
        taken = {name: None if None in each else median(each) for name, each in values.items()}
        made = dict(zip(KEY[2:-1], key, strict=True)) | {"prompt": rounds[0]["prompt"]}
        out.append(made | {"rates": rates, "measured": taken, "speeds": values["decode"]})
    return out


def shares(rows: list[Row], arch: str, source: str) -> list[Row]:
    """Records for calibration.json, measured on a processor of kind `arch`: of each kind of format
    the part of its bound, that of the reading of K/V, and what a layer takes besides, so that

        seconds of a token = (bound - K/V) / share + K/V / kv_share + layers * layer_seconds
        seconds of a prompt = (bound - last) / share + tokens * layers that own K/V * row_seconds
                              + passes * layers that own K/V * layer_seconds
                              + what its last token takes in the others, as a token does.

    They are those of the least squares of relative errors; the error bar is the worst of them.
    """
    records = []
    for kind in dict.fromkeys(KINDS.values()):
        its = [row for row in rows if KINDS[row["format"]] == kind]
        tokens = [_token(row) for row in its if row["predicted"]["bounds"]["decode"]]
        if not tokens:
            continue
        slopes = least_squares(tokens)
        made = {"place": "cpu", "arch": arch, "kind": kind}
        shares, seconds = _shares(tokens, slopes), _short(slopes[2], 3)
        record = made | {"what": "decode", "share": shares, "kv_share": _short(1 / slopes[1], 4)}
        records.append(record | {"layer_seconds": seconds, "source": source})
        prompts = [
            _prompt(row, slopes)
            for row in its
            if row["predicted"]["bounds"]["prefill"] and row["measured"]["prefill"]
        ]
        if prompts:
            slopes = line(prompts)
            record = made | {"what": "prefill", "share": _shares(prompts, slopes)}
            records.append(record | {"row_seconds": _short(slopes[1], 3), "source": source})
    return records


def _shares(points: list[tuple[float, ...]], slopes: tuple[float, ...]) -> list[float]:
    """The least, usual and most: of the last of a point, all its parts before it."""
    off = [sum(map(mul, slopes, point)) / point[-1] for point in points]
    return [_short(f / slopes[0], 4) for f in (min(1.0, *off), 1.0, max(1.0, *off))]


def _short(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def with_others(records: list[Row]) -> list[Row]:
    """These, and what calibration.json has of other kinds of processors."""
    kinds = {record["arch"] for record in records}
    return [*(record for record in fit.calibration() if record["arch"] not in kinds), *records]


def _token(row: Row) -> tuple[float, float, int, float]:
    """Seconds of a token's bound without K/V, of K/V, layers run, seconds measured."""
    bounds = row["predicted"]["bounds"]
    kv = bounds["attention"]
    return 1 / bounds["decode"] - kv, kv, row["layers"], 1 / row["measured"]["decode"]


def _prompt(row: Row, token: tuple[float, float, float]) -> tuple[float, int, float]:
    """Seconds of a prompt's bound without what its last token alone takes, rows that run through
    layers, seconds measured without what that token and calling layers take by `token`, see
    `least_squares`."""
    bounds, prompt = row["predicted"]["bounds"], row["prompt"]
    last = bounds["last"] * token[0] + row["layers"] * token[2]  # no prompt here has two passes
    rest = max(prompt / row["measured"]["prefill"] - last, 1e-9)
    return prompt / bounds["prefill"] - bounds["last"], prompt * row["owned"], rest


def line(points: list[tuple[float, int, float]]) -> tuple[float, float]:
    """What a second of the bound and a row take: by least squares of relative errors, but no second
    less than one, since a bound is a bound, and no row less than nothing."""
    made = np.array(points)
    x = made[:, :2] / made[:, 2:]
    size = np.linalg.norm(x, axis=0)
    found, _, rank, _ = np.linalg.lstsq(x / size, np.ones(len(x)), rcond=1e-6)
    found /= size
    if rank < 2 or found[1] < 0:
        found = np.array([x[:, 0].sum() / size[0] ** 2, 0.0])
    if found[0] < 1:
        found = np.array([1.0, max(0.0, (x[:, 1] * (1 - x[:, 0])).sum() / size[1] ** 2)])
    return float(found[0]), float(found[1])


def least_squares(points: list[tuple[float, float, int, float]]) -> tuple[float, float, float]:
    """What a second of the bound, one of K/V and a layer take, none of them negative.

    A part that the points cannot tell from the others, or that would be negative, is left out: K/V
    then count as the bound does, or a layer as nothing, whichever errs less.
    """
    made = np.array(points)
    x = made[:, :3] / made[:, 3:]
    best, least = (0.0, 0.0, 0.0), np.inf
    for parts in (
        np.eye(3),
        np.array([[1, 0, 0], [0, 1, 0]]),
        np.array([[1, 1, 0], [0, 0, 1]]),
        np.array([[1, 1, 0]]),
    ):
        found, _, rank, _ = np.linalg.lstsq(x @ parts.T, np.ones(len(x)), rcond=1e-6)
        error = np.square(x @ (found @ parts) - 1).sum()
        if rank == len(parts) and (found > 0).all() and error < least - 1e-12:
            best, least = tuple((found @ parts).tolist()), error
    return best


def error(row: Row, what: str) -> float | None:
    """Predicted over measured, less 1; None without one of them."""
    said, found = row["predicted"][what], row["measured"][what]
    return said / found - 1 if said and found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["E2B", "pocket"], choices=MODELS)
    parser.add_argument("--formats", nargs="+", default=[*BITS], choices=[*BITS])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many count")
    parser.add_argument("--calibrate", action="store_true", help="write calibration.json anew")
    parser.add_argument("--progress", type=Path, default=PROGRESS, help="where rows are noted")
    parser.add_argument("--fresh", action="store_true", help="measure what is noted there, too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    measure.add_record(parser)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(options.worker, options.contexts[0], options.users[0])))
        return
    about = measure.machine()
    machine = report.machine_of({"machine": about})
    asked = options.models, options.formats, options.contexts, options.users, options.rounds
    wanted = combinations(*asked, machine)
    try:
        rows = rows_of(wanted, options.progress, fresh=options.fresh)
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on from what {options.progress} has")
    configs = {name: random_checkpoint.config_of(name) for name in options.models}
    runs = Counter(row["run"] for row in rows)
    rows = merged(rows)
    for row in rows:
        text = configs[row["model"]].text_config
        row["layers"], row["owned"] = text.num_hidden_layers, text.first_kv_shared_layer
    if options.calibrate:
        for row in rows:
            row["predicted"] = predicted(configs[row["model"]], row["format"], row)
        source = (
            f"benchmarks.fit, {', '.join(configs)}, {about['cpu']}, {about['threads']} threads, "
            f"commit {measure.commit()}"
        )
        records = with_others(shares(rows, hardware.arch(), source))
        CALIBRATION.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        fit.calibration.cache_clear()
    worst: dict[str, float] = {}
    for row in rows:
        row["predicted"] = predicted(configs[row["model"]], row["format"], row)
        errors = {what: error(row, what) for what in LIMITS}
        row["errors"] = errors
        for what, value in errors.items():
            if value is not None:
                worst[what] = max(worst.get(what, 0.0), abs(value))
        shown = "  ".join(
            f"{what} {'?' if value is None else f'{value:+.1%}'}" for what, value in errors.items()
        )
        print(f"{row['model']:8} {row['format']:9} {row['context']:6} x {row['users']}: {shown}")
    for what, limit in LIMITS.items():
        found = worst.get(what)
        verdict = "nothing to compare" if found is None else "holds" if found <= limit else "MISSED"
        shown = "" if found is None else f"at most {found:.2%} off, "
        print(f"{what:8} {shown}limit {limit:.1%}: {verdict}")
    results = {
        "model": ", ".join(configs),
        "dtype": ", ".join(options.formats),
        "runs": runs,
        "rounds": options.rounds,
        "rows": rows,
        "worst": worst,
        "limits": LIMITS,
        "calibrated_here": options.calibrate,
    }
    measure.finish("fit", results, about, record=options.record)


if __name__ == "__main__":
    main()
