"""The compiled vocabulary beside the `tokenizers` library: memory, time to open, speed.

Each opening is a process of its own: resident memory before and after, after a prompt and the
whole text have been encoded, and at most, as Linux counts it (pages of a mapped file too, though
processes share them). Speed is measured in one process, in turns, after the ids of both have been
compared.

Texts: this repository's prose and code, and Python's own source; the same prose without its spaces
(one long word a line); a letter repeated; random characters of all scripts.

Run: python -m benchmarks.tokenizer FILE     FILE: a tokenizer.json or .gguf of Gemma 4
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from gemsmith.text import vocabulary
from gemsmith.text.compact import CompactVocabulary
from gemsmith.text.tokenizer import Tokenizer

CHARACTERS = 1_000_000

OPEN = """
import json, sys, time
from pathlib import Path

def resident(key="VmRSS"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

from gemsmith.text import vocabulary
from gemsmith.text.tokenizer import Tokenizer
path, compiled = Path(sys.argv[1]), sys.argv[2] == "gemsmith"
if not compiled:
    import tokenizers
    vocabulary.compact.look_at = lambda path: None
text = Path(sys.argv[3]).read_text(encoding="utf-8")
before, start = resident(), time.perf_counter()
tokenizer = Tokenizer.load(path)
seconds, opened = time.perf_counter() - start, resident()
tokenizer.encode(text[:2000])
little = resident()
tokenizer.encode(text)
print(json.dumps({"seconds": seconds, "opened": opened - before, "prompt": little - before,
                  "text": resident() - before, "peak": resident("VmHWM") - before}))
"""


def texts() -> dict[str, str]:
    """CHARACTERS of each kind."""
    root = measure.REPOSITORY
    found = sorted([*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("src/**/*.py")])
    prose = "".join(path.read_text(encoding="utf-8") for path in found)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    prose += "".join(path.read_text(encoding="utf-8", errors="replace") for path in library)
    choose = random.Random(0)
    scripts = ((32, 127), (0xC0, 0x250), (0x400, 0x530), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))
    mixed = "".join(chr(choose.randrange(*choose.choice(scripts))) for _ in range(CHARACTERS))
    return {
        "prose and code": prose[:CHARACTERS],
        "without spaces": prose.replace(" ", "")[:CHARACTERS],
        "one letter": "a" * CHARACTERS,
        "random": mixed,
    }


def openings(file: Path, text: str, *, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians over fresh processes that take turns, the first of each kind not counted."""
    found: dict[str, list[dict[str, float]]] = {"gemsmith": [], "tokenizers": []}
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "text"
        sample.write_text(text, encoding="utf-8")
        for _ in range(repeats + 1):
            for name, results in found.items():
                command = [sys.executable, "-c", OPEN, str(file), name, str(sample)]
                made = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(made.stdout))
    return {
        name: {key: measure.summary([r[key] for r in results[1:]]) for key in results[0]}
        for name, results in found.items()
    }


def reference(file: Path) -> Tokenizer:
    """The same vocabulary in the `tokenizers` library."""
    read = vocabulary._read_gguf if file.suffix == ".gguf" else vocabulary._read_json
    return Tokenizer(read(file, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    measure.add_record(parser)
    options = parser.parse_args()
    about = measure.machine()
    ours, theirs = Tokenizer.load(options.file), reference(options.file)
    if not isinstance(ours._core, CompactVocabulary):
        sys.exit(f"{options.file} is not compiled: no extension, or another kind of vocabulary")
    given = texts()
    opened = openings(options.file, given["prose and code"], repeats=options.repeats)
    for name, found in opened.items():
        mib = {key: found[key]["median"] / 2**20 for key in ("opened", "prompt", "text", "peak")}
        print(
            f"{name:11} opens in {found['seconds']['median'] * 1e3:7.1f} ms and takes "
            f"{mib['opened']:6.1f} MiB, {mib['prompt']:6.1f} after a prompt, "
            f"{mib['text']:6.1f} after {CHARACTERS} characters, "
            f"{mib['peak']:6.1f} at most"
        )
    results: dict[str, Any] = {}
    for name, text in given.items():
        ids = ours.encode(text)
        if ids != theirs.encode(text) or ours.decode(ids) != theirs.decode(ids):
            sys.exit(f"{name}: not what tokenizers gives; nothing was timed")
        runs = {
            "gemsmith": lambda text=text: ours.encode(text),
            "tokenizers": lambda text=text: theirs.encode(text),
            "gemsmith, decode": lambda ids=ids: ours.decode(ids),
            "Python, decode": lambda ids=ids: theirs.decode(ids),
        }
        seconds = measure.interleaved(runs, repeats=options.repeats)
        rates = {run: [len(text) / s / 1e6 for s in found] for run, found in seconds.items()}
        results[name] = {run: measure.summary(found) for run, found in rates.items()}
        median = {run: statistics.median(found) for run, found in rates.items()}
        print(
            f"{name:15} {len(ids):8} ids   "
            + ", ".join(f"{run} {rate:.2f}" for run, rate in median.items())
            + f" million characters a second; {median['gemsmith'] / median['tokenizers']:.2f}x"
        )
    measure.finish(
        "tokenizer",
        {"model": "none", "unit": "10^6 characters/s", "open": opened, "runs": results},
        about,
        record=options.record,
    )


if __name__ == "__main__":
    main()
