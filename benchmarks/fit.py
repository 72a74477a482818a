"""What `gemsmith fit` predicts beside what is measured: weights, K/V, peak memory, speed.

Each combination of format, context and number of users runs in a process of its own: the model is
loaded, one conversation is filled by a real prompt, those of the other users with zeros (their
memory is touched, nothing is computed: gemsmith runs one sequence at a time). Then tokens are
decoded. Bytes are what the modules and the caches hold, the peak is the process's.

Speed is predicted from this machine's rates, measured in the same process just after, and from the
shares in calibration.json. With --calibrate the shares are taken from these very runs instead and
written there: then the errors say how well two numbers a kind (share of the bound, seconds a layer)
describe all models, contexts and formats, and nothing more. Without a record for a kind, its speed
has no prediction.

Run: python -m benchmarks.fit [--models E2B pocket] [--formats int4] [--record] [--calibrate]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure, random_checkpoint
from benchmarks.llama_worker import ids_of, status_bytes
from gemsmith import fit, probe, sizing
from gemsmith.config import Gemma4Config
from gemsmith.engine.context import Context
from gemsmith.engine.engine import LM
from gemsmith.fit import Target
from gemsmith.ops import native
from gemsmith.weights.hub import POCKET, resolve

BITS = {"bfloat16": None, "int8": "8", "int4": "4", "mobile": "mobile"}
CONTEXTS, USERS = (512, 8192, 32_768), (1, 8)
PROMPT, STEPS, REPEATS = 512, 8, 5
LIMITS = {"weights": 0.005, "kv": 0.005, "peak": 0.05, "decode": 0.15, "prefill": 0.25}
"""Of the error, as a part of what was measured."""
MODELS = random_checkpoint.SIZES
CALIBRATION = Path(fit.__file__).with_name("calibration.json")


def config_of(name: str) -> Gemma4Config:
    if name == POCKET:
        return Gemma4Config.load(resolve(POCKET))
    return random_checkpoint.config_of(name)


@torch.inference_mode()
def worker(folder: str, quant: str | None, context: int, users: int) -> dict[str, Any]:
    """One combination, measured in this process."""
    lm = LM.load(folder, device="cpu", quant=quant)
    text = lm.config.text_config
    room, prompt = STEPS * (REPEATS + 1), min(PROMPT, context // 2)
    first = Context(lm.model, lm.kv)
    first.reserve(context)
    ids = ids_of(context - room, text.vocab_size)
    first.run(ids[:prompt])  # whatever is done once is done
    prefill = []
    for _ in range(REPEATS):
        first.rewind_for([])
        start = time.perf_counter()
        first.run(ids[:prompt])
        prefill.append(prompt / (time.perf_counter() - start))
    if len(ids) > prompt:
        first.run(ids[prompt:])
    held = [first]
    for _ in range(users - 1):
        held.append(Context(lm.model, lm.kv))
        held[-1].reserve(context)
        for layer in held[-1]._cache._layers.values():
            for tensor in layer.tensors.values():
                tensor.zero_()
    decode = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for id in ids_of(STEPS, text.vocab_size, 1):
            first.run([id])
        decode.append(STEPS / (time.perf_counter() - start))
    peak = status_bytes("VmHWM")
    rates = probe.measure(native.threads())
    return {
        "weights": lm.memory()["weights"],
        "kv": sum(each.nbytes for each in held),
        "peak": peak,
        "decode": median(decode[1:]),
        "prefill": median(prefill),
        "prompt": prompt,
        "rates": {"bandwidth": rates.bandwidth, "float": rates.float_rate, "low": rates.int_rate},
    }


def measured(folder: Path, quant: str | None, context: int, users: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.fit", "--worker", str(folder)]
    command += ["--contexts", str(context), "--users", str(users)]
    command += ["--quant", quant] if quant else []
    made = subprocess.run(command, capture_output=True, text=True, cwd=measure.REPOSITORY)
    if made.returncode:
        sys.exit(f"measuring {folder} at {context} x {users} failed: {made.stderr.strip()}")
    return json.loads(made.stdout.splitlines()[-1])


def predicted(config: Gemma4Config, format: str, row: dict[str, Any]) -> dict[str, Any]:
    """What fit says of the same combination on a machine of these rates; memory for all users,
    speed for one, the others idle."""
    rates = row["rates"]
    target = Target("here", "cpu", 1 << 50, rates["bandwidth"], rates)
    options: dict[str, Any] = {"context": row["context"], "kv": "int8", "prompt": row["prompt"]}
    options["media"] = False
    memory = fit.plan("", config, format, target, users=row["users"], **options).memory
    speed = fit.plan("", config, format, target, **options).speed
    return {
        "weights": sum(memory.weights.values()),
        "kv": memory.kv,
        "peak": memory.total,
        "decode": speed.decode and speed.decode.mid,
        "prefill": speed.ttft and row["prompt"] / speed.ttft.mid,
        "bounds": {"decode": speed.decode_bound, "prefill": speed.prefill_bound},
    }


def shares(rows: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Records for calibration.json: of each kind the part of its bound and what a layer takes
    besides, so that seconds = bound / share + layers * layer_seconds.

    The two are those of the least squares of relative errors; the error bar is the worst of them.
    """
    records = []
    for kind in ("float", "low"):
        for what in ("decode", "prefill"):
            points = [
                _point(row, what)
                for row in rows
                if (row["format"] in sizing.FLOATS) == (kind == "float")
                and row["predicted"]["bounds"][what]
            ]
            if not points:
                continue
            slope, layer = _least_squares(points)
            off = [(slope * bound + layer * layers) / seconds for bound, layers, seconds in points]
            share = [round(f / slope, 4) for f in (min(1.0, *off), 1.0, max(1.0, *off))]
            record = {"place": "cpu", "kind": kind, "what": what, "share": share}
            records.append(record | {"layer_seconds": float(f"{layer:.3g}"), "source": source})
    return records


def _point(row: dict[str, Any], what: str) -> tuple[float, int, float]:
    """Seconds of the bound, layers run, seconds measured: of a token, or of a prompt."""
    tokens = row["prompt"] if what == "prefill" else 1
    passes = -(-tokens // sizing.CHUNK_TOKENS)
    bound = tokens / row["predicted"]["bounds"][what]
    return bound, passes * row["layers"], tokens / row["measured"][what]


def _least_squares(points: list[tuple[float, int, float]]) -> tuple[float, float]:
    """slope and layer of seconds = slope * bound + layer * layers, neither negative; of points of
    one depth, or too few, the slope alone."""
    xs = [(bound / seconds, layers / seconds) for bound, layers, seconds in points]
    xx, xy, yy = (sum(a[i] * a[j] for a in xs) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = sum(a for a, _ in xs), sum(b for _, b in xs)
    determinant = xx * yy - xy * xy
    if len({layers for _, layers, _ in points}) > 1 and determinant > 1e-9 * xx * yy:
        slope, layer = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
        if slope > 0 and layer >= 0:
            return slope, layer
    return x / xx, 0.0


def error(row: dict[str, Any], what: str) -> float | None:
    """Predicted over measured, less 1; None without a prediction."""
    said, found = row["predicted"][what], row["measured"][what]
    return said / found - 1 if said and found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["E2B", "pocket"], choices=MODELS)
    parser.add_argument("--formats", nargs="+", default=[*BITS], choices=[*BITS])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--calibrate", action="store_true", help="write calibration.json anew")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--quant", help=argparse.SUPPRESS)
    measure.add_record(parser)
    options = parser.parse_args()
    if options.worker:
        print(
            json.dumps(worker(options.worker, options.quant, options.contexts[0], options.users[0]))
        )
        return
    about = measure.machine()
    configs = {name: config_of(name) for name in options.models}
    rows: list[dict[str, Any]] = []
    for name, config in configs.items():
        text = config.text_config
        for format in options.formats:
            if name == POCKET and format == "mobile":
                continue  # it has no such checkpoint
            folder = resolve(POCKET) if name == POCKET else None
            folder = folder or random_checkpoint.made(name, BITS[format], None)
            quant = format if name == POCKET and format != "bfloat16" else None
            for context in options.contexts:
                if context > text.max_position_embeddings:
                    continue
                for users in options.users:
                    found = measured(folder, quant, context, users)
                    row = {"model": name, "format": format, "context": context, "users": users}
                    row |= {"layers": text.num_hidden_layers}
                    row |= {key: found.pop(key) for key in ("rates", "prompt")}
                    rows.append(row | {"measured": found})
    if options.calibrate:
        for row in rows:
            row["predicted"] = predicted(configs[row["model"]], row["format"], row)
        source = (
            f"benchmarks.fit, {', '.join(configs)}, {about['cpu']}, {about['threads']} threads, "
            f"commit {measure.commit()}"
        )
        records = shares(rows, source)
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
        verdict = "no prediction" if found is None else "holds" if found <= limit else "MISSED"
        shown = "" if found is None else f"at most {found:.2%} off, "
        print(f"{what:8} {shown}limit {limit:.1%}: {verdict}")
    results = {
        "model": ", ".join(configs),
        "dtype": ", ".join(options.formats),
        "rows": rows,
        "worst": worst,
        "limits": LIMITS,
        "calibrated_here": options.calibrate,
    }
    measure.finish("fit", results, about, record=options.record)


if __name__ == "__main__":
    main()
