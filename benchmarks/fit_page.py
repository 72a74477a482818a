"""Makes docs/fit.md and its picture from what `gemsmith fit` prints, so that neither is typed.

Machines are named ones, of which the figures are in devices.py: the page is the same everywhere.
The comparison with measurements is in docs/numbers.md, once `benchmarks.fit --record` has run.

Run: python -m benchmarks.fit_page [--check]
"""

import argparse
import sys

from typer.testing import CliRunner

from benchmarks.measure import REPOSITORY
from gemsmith import sizing
from gemsmith.cli.main import app
from gemsmith.config import PRESETS

PAGE, PICTURE = REPOSITORY / "docs" / "fit.md", REPOSITORY / "docs" / "fit.svg"
GIB = 1 << 30
WIDTH = "100"
DRAWN = ("E4B", "--device", "rtx-3060-12gb", "--users", "4")
HEAD = """# What it will cost

Made by `python -m benchmarks.fit_page` from `gemsmith fit`; do not edit. Nothing is downloaded for
it and no torch imported: parts, shapes and layers are in the config, and the engine allocates by
the same functions (`sizing.py`). Weights and K/V are exact to the byte, in files and in memory, for
every checkpoint gemsmith writes, but for weights of 4 and 2 bits whose scales could not be steps:
those take up to 6 and 11 % more in a CPU's memory. Workspace and runtime are estimates. Speeds are
bounds: what the machine could do at best. Where gemsmith's share of it was measured, what is
expected stands below; `~` marks a share that was measured on another kind of processor.
"""
KV = """## Keys and values

bfloat16, one sequence, GiB. "K and V" keeps both where K = V, as other engines do; gemsmith keeps V
and rebuilds K, exactly. "Every layer" is the formula of most calculators: all layers keep all
tokens, with the sliding layers' heads.

| | a token | fixed | 32K, K and V | longest, K and V | gemsmith | int8 | every layer |
|---|--:|--:|--:|--:|--:|--:|--:|"""


def told(*arguments: str) -> str:
    """A command and what it prints, as Markdown."""
    result = CliRunner().invoke(app, ["fit", *arguments], env={"COLUMNS": WIDTH})
    if result.exit_code:
        sys.exit(f"gemsmith fit {' '.join(arguments)}: {result.output}")
    text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
    return f"```\n$ gemsmith fit {' '.join(arguments)}\n{text}\n```\n"


def kv_table() -> str:
    lines = [KV]
    for size, config in PRESETS.items():
        text = config.text_config
        most = text.max_position_embeddings
        token = sizing.kv_twice_bytes(text, most) - sizing.kv_twice_bytes(text, most - 1)
        fixed = sizing.kv_twice_bytes(text, most) - most * token
        twice = sizing.kv_twice_bytes(text, most)
        ours, narrow = sizing.kv_bytes(text, most), sizing.kv_bytes(text, most, 1)
        naive = sizing.kv_naive_bytes(text, most)
        lines.append(
            f"| {size} | {token >> 10} KiB | {fixed >> 20} MiB "
            f"| {sizing.kv_twice_bytes(text, 32_768) / GIB:.2f} | {twice / GIB:.2f} "
            f"| {ours / GIB:.2f} | {narrow / GIB:.2f} "
            f"| {naive / GIB:.1f}, {naive / twice:.1f} times too much |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    return "\n".join([
        HEAD,
        "## One model\n",
        told("E2B", "--device", "rtx-4090", "--context", "32K"),
        told("26B-A4B", "--device", "a100-80gb", "--context", "128K", "--users", "8"),
        f"`gemsmith fit {' '.join(DRAWN)} --plot fit.svg`; a cross marks the largest context that "
        "fits:\n\n![Memory by context](fit.svg)\n",
        "## What fits\n",
        told("--device", "rtx-3060-12gb", "--users", "4", "--context", "32K"),
        kv_table(),
        "## Google's table beside ours\n",
        told("--published"),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    text = page()
    if options.check:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not what the command prints; run python -m benchmarks.fit_page")
        return
    PAGE.write_text(text, encoding="utf-8")
    told(*DRAWN, "--plot", str(PICTURE))
    print(f"written: {PAGE}, {PICTURE}")


if __name__ == "__main__":
    main()
