"""`gemsmith fit`: what a model takes and how fast it will be, or what fits; needs no torch.

Forward, a table of one model: memory by part for each format, and speed. Inverse, without a model:
every combination that fits. The figures are fit.py's; here they are asked for and shown.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gemsmith import fit, shapes, sizing
from gemsmith.cli.plot import drawable
from gemsmith.config import PRESETS, Gemma4Config, preset
from gemsmith.errors import ConfigError, RequestError
from gemsmith.fit import Plan, Range, Target, gib

FORMATS = ("bfloat16", "int8", "int4", "mobile")
"""Shown where none was asked for."""
DEFAULT_CONTEXT = 8192
HERE = ("auto", "cpu", "gpu")
# Parts as a reader knows them, and those of `shapes.Tensor.part` in each.
ROWS = {
    "embedding, head": ("embedding", "head"),
    "layers": ("attention", "mlp", "norms", "router"),
    "experts": ("experts",),
    "per-layer inputs": ("ple", "ple_projection", "ple_table"),
    "image input": ("vision", "vision_projection"),
    "sound input": ("audio", "audio_projection"),
    "drafter": ("drafter",),
    "of no known part": ("other",),
}
# GB of weights by ai.google.dev/gemma/docs/core: BF16, SFP8, Q4_0, mobile, mobile text-only.
PUBLISHED: Mapping[str, tuple[float | None, ...]] = {
    "E2B": (11.4, 5.7, 2.9, 1.1, 0.84),
    "E4B": (17.9, 8.9, 4.5, 2.5, 2.2),
    "12B": (26.7, 13.4, 6.7, None, None),
    "26B-A4B": (57.7, 28.8, 14.4, None, None),
    "31B": (69.9, 34.9, 17.5, None, None),
}
PUBLISHED_FORMATS = {"BF16": "bfloat16", "SFP8": "int8", "Q4_0": "int4"}
NOT_RUN = (
    "gemsmith does not run GGUF: the weights are those of the file; K/V, workspace and runtime are "
    "what gemsmith takes for the same model in safetensors, and other programs differ in these."
)
APART = (
    "Image and sound input are a file of their own (mmproj), which counts where it lies in the "
    "folder that is named."
)
FREE_SCALES = (
    "A weight that scales in steps would spoil (outliers, a grid it was trained on) keeps free "
    "ones: it takes up to 6 % more than counted here at 4 bits, 11 % at 2."
)
MARGIN = 1.2
GUESSED = "~"
"""Before a speed whose share was measured on another kind of processor."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a name on the command line stands for."""

    name: str
    config: Gemma4Config
    format: str | None = None
    """Of a checkpoint: that of its weights, where it is one of ours."""
    stored: Mapping[str, int] | None = None
    """Of a checkpoint: bytes in its files by part."""
    gguf: bool = False
    """A GGUF file, which others run."""
    inputs: str | None = None
    """Beside a GGUF file, that of image and sound input."""
    floats: bool = False
    """Whether most of its bytes are floats."""


def model_of(name: str) -> Model:
    """A preset by name, or a checkpoint's own headers: a folder, "pocket", a hub id or GGUF.

    Raises:
      GemsmithError: neither, or headers that cannot be true.
    """
    if not Path(name).exists():
        try:
            config = preset(name)
        except ConfigError as error:
            if name != "pocket" and re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(f"{error} Or give a folder that is here, or a hub id.") from None
        else:
            known = next(size for size, each in PRESETS.items() if each == config)
            return Model(known, config)
    from gemsmith.headers import read_headers
    from gemsmith.weights.gguf import input_part
    from gemsmith.weights.names import module_name, unused_shapes

    headers = read_headers(name)
    config, tensors = headers.config, headers.tensors
    text = config.text_config
    parts = {
        tensor.name.removesuffix(".weight"): tensor.part
        for tensor in (*shapes.decoder(text), *shapes.towers(config))
    }
    parts.setdefault("lm_head", "head")
    skipped = unused_shapes(text)
    stored: dict[str, int] = {}
    floats = sum(t.nbytes for t in tensors.values() if t.dtype in ("F32", "F16", "BF16"))
    for key, tensor in tensors.items():
        below = key.removeprefix("model.")
        stem = next((s for n in (module_name(key), below) if (s := _stem(n, parts))), "")
        if f"{stem}.weight" in skipped:
            continue  # no layer reads it
        part = parts.get(stem) or (input_part(key) if headers.gguf else None) or "other"
        stored[part] = stored.get(part, 0) + tensor.nbytes
    format = None if headers.gguf else _format_of(config, stored)
    most = 2 * floats > headers.nbytes
    return Model(name, config, format, stored, headers.gguf, headers.inputs, most)


def _stem(name: str, parts: Mapping[str, str]) -> str:
    """The module, or tensor, that a key of a checkpoint belongs to; empty if none does."""
    for stem in (name, name.rpartition(".")[0], name.rpartition("_")[0]):
        if stem in parts:
            return stem
    return ""


def _format_of(config: Gemma4Config, stored: Mapping[str, int]) -> str | None:
    """The format whose files have exactly these bytes."""
    towers = any(part.startswith(("vision", "audio")) for part in stored)
    for format in sizing.FORMATS:
        with suppress(ConfigError):
            for floats in sizing.FLOATS:
                said = sizing.weight_bytes(config, format, "file", towers=towers, stored=floats)
                if said == {part: n for part, n in stored.items() if n}:
                    return format
    return None


def target_of(device: str, memory: str | None) -> Target:
    """The machine that is meant; `memory`, where it is said, is what can be had there.

    Raises:
      ConfigError: no such device, or no size.
    """
    size = fit.size_of(memory) if memory else None
    if size and device == "auto":
        return Target("a GPU of unknown speed", "gpu", size, about="memory as given")
    if device in (*HERE, "cuda"):
        return fit.this_machine("gpu" if device == "cuda" else device, size)
    target = fit.named(device)
    return replace(target, memory=size) if size else target


def forward(
    model: Model,
    target: Target,
    *,
    formats: tuple[str, ...] | None,
    context: int,
    users: int,
    kv: str,
    prompt: int,
    media: bool,
    drafter: bool,
) -> list[Plan]:
    """A plan for each format; of a checkpoint, for the format that it has.

    Raises:
      ConfigError: as `fit.plan`.
    """
    options = {"context": context, "users": users, "kv": kv, "prompt": prompt}
    own = model.stored is not None and model.format not in sizing.FLOATS
    if formats is not None and model.gguf:
        raise ConfigError(
            f"{model.name} is GGUF, of which the weights count as they are; leave --quant out, or "
            "name a size such as E4B"
        )
    if formats is not None and own and formats != (model.format,):
        has = model.format or "a format of its own"
        raise ConfigError(
            f"{model.name} is quantized already, in {has}; leave --quant out, or name the "
            "checkpoint it was made from"
        )
    if formats is None and model.stored is not None:
        if model.format:
            formats = (model.format,)
        else:
            held = dict(model.stored) | ({"ple_table": 0} if "ple_table" in model.stored else {})
            if not media:
                held = {p: n for p, n in held.items() if not p.startswith(("vision", "audio"))}
            format = "bfloat16" if model.floats else "int4"
            found = fit.plan(model.name, model.config, format, target, weights=held, **options)
            if model.gguf:  # the bounds are any program's, what is expected is gemsmith's alone
                speed = replace(found.speed, decode=None, ttft=None, guess=None)
                found = replace(found, speed=speed)
            return [found]
    if formats is None:
        formats = FORMATS
        if model.config.text_config.enable_moe_block:
            formats = (*FORMATS[:-1], "int2")
    return [
        fit.plan(
            model.name, model.config, format, target, media=media, drafter=drafter, **options
        )
        for format in formats
    ]  # fmt: skip


def facts(plans: list[Plan], model: Model | None = None) -> dict[str, Any]:
    """What `--json` prints; sizes in bytes, seconds, tokens a second. loads: False for what
    `gemsmith.load` does not take."""
    target = asdict(plans[0].target)
    found = [asdict(plan) | {"total": plan.memory.total, "fits": plan.fits} for plan in plans]
    for each in found:
        del each["target"]
    loads = {} if model is None else {"loads": not model.gguf}
    return {"target": target, "plans": found, **loads}


# -- for people -----------------------------------------------------------------------------------


def show(plans: list[Plan], model: Model, console: Console) -> None:
    """One model: a column for each format."""
    first = plans[0]
    target, users = first.target, first.users
    whose = f"{users} users with {first.context:,} tokens each" if users > 1 else (
        f"one user with {first.context:,} tokens"
    )  # fmt: skip
    console.print(f"[bold]{escape(model.name)}[/bold], {whose}, K/V in {first.kv}", highlight=False)
    console.print(f"on {target.name}: {gib(target.memory)} ({target.about})", highlight=False,
                  soft_wrap=True, markup=False)  # fmt: skip
    stored = model.stored is not None and model.format is None
    names = ["as stored"] if stored else [plan.format for plan in plans]
    table = Table(box=SIMPLE_HEAD)
    table.add_column("memory")
    for name in names:
        table.add_column(name, justify="right")
    for row, parts in ROWS.items():
        sums = [sum(plan.memory.weights.get(part, 0) for part in parts) for plan in plans]
        if any(sums):
            table.add_row(row, *(gib(n) for n in sums))
    table.add_row("K/V", *(gib(plan.memory.kv) for plan in plans))
    table.add_row("workspace, about", *(gib(plan.memory.activations) for plan in plans))
    table.add_row("runtime, about", *(gib(plan.memory.runtime) for plan in plans))
    table.add_section()
    table.add_row("all", *(gib(plan.memory.total) for plan in plans))
    table.add_row("fits", *(_fits(plan) for plan in plans))
    table.add_row("largest context", *(f"{p.largest_context:,}" for p in plans))
    files = [sum(sizing.weight_bytes(model.config, p.format).values()) for p in plans]
    if model.stored is not None and model.format in (None, first.format):
        files = [sum(model.stored.values())]
    table.add_row("files on disk", *(gib(n) for n in files))
    table.add_section()
    each = " a user" if users > 1 else ""
    table.add_row(f"tokens/s{each} <=", *(_rate(p.speed.decode_bound) for p in plans))
    if any(plan.speed.decode for plan in plans):
        table.add_row("  expected", *(_marked(p, _range(p.speed.decode)) for p in plans))
    table.add_row("  waits for", *(plan.speed.limit for plan in plans))
    table.add_row("first token >=", *(_seconds(p.speed.ttft_bound) for p in plans))
    if any(plan.speed.ttft for plan in plans):
        table.add_row("  expected", *(_marked(p, _seconds_range(p.speed.ttft)) for p in plans))
    console.print(table)
    console.print(_notes(plans, model), highlight=False, markup=False, soft_wrap=True)


def _notes(plans: list[Plan], model: Model) -> str:
    notes: list[str] = []
    if model.gguf:
        towers = any(part.startswith(("vision", "audio")) for part in plans[0].memory.weights)
        notes.append(NOT_RUN)
        if towers or model.inputs is None:
            notes.append(f"Image and sound input are {model.inputs}." if towers else APART)
    if any("ple_table" in plan.memory.weights for plan in plans) or any(
        "ple" in plan.memory.weights for plan in plans
    ):
        notes.append("The per-layer table stays on disk; rows are read as they are needed.")
    grouped = any(plan.format in ("int4", "int2") for plan in plans)
    if grouped and plans[0].target.place == "cpu" and not model.gguf:
        notes.append(FREE_SCALES)
    if plans[0].users > 1:
        notes.append("Several users count as sequences of one batch.")
    if model.gguf:
        notes.append("Bounds are what the machine allows.")
    elif not any(plan.speed.decode or plan.speed.ttft for plan in plans):
        notes.append(
            "Bounds are what the machine allows; on such a machine nothing was measured yet."
        )
    guess = next((plan.speed.guess for plan in plans if plan.speed.guess), None)
    lines = [" ".join(notes), f"{GUESSED} a guess: {guess}." if guess else ""]
    return "\n".join(line for line in lines if line)


def show_search(plans: list[Plan], console: Console) -> None:
    """Combinations that fit, the best first."""
    first = plans[0]
    console.print(
        f"{first.users} x {first.context:,} tokens in {gib(first.target.memory)} "
        f"({first.target.name}): {len(plans)} combinations fit",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    table = Table(box=SIMPLE_HEAD)
    for name in ("model", "weights", "K/V"):
        table.add_column(name)
    for name in ("all", "left", "largest context"):
        table.add_column(name, justify="right")
    table.add_column("limited by")
    table.add_column("tokens/s <=", justify="right")
    for plan, following in zip(plans, [*plans[1:], None], strict=True):
        table.add_row(
            plan.model, plan.format, plan.kv, gib(plan.memory.total),
            gib(plan.target.memory - plan.memory.total), f"{plan.largest_context:,}",
            "K/V" if plan.limit.startswith("memory") else "the model",
            _rate(plan.speed.decode_bound),
            end_section=following is not None and _trained(following) != _trained(plan),
        )  # fmt: skip
    console.print(table)
    console.print(
        "Best first: the larger model, then more bits. mobile and int2, at the end, are good only "
        "from weights trained for them.",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _trained(plan: Plan) -> bool:
    return plan.format in fit.TRAINED_FOR


def _fits(plan: Plan) -> str:
    return "yes" if plan.fits else f"{gib(plan.missing)} short"


def _marked(plan: Plan, text: str) -> str:
    return GUESSED + text if plan.speed.guess and text != "?" else text


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _range(found: Range | None) -> str:
    return "?" if found is None else f"{found.mid:.3g} ({found.low:.3g}-{found.high:.3g})"


def _seconds(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def _seconds_range(found: Range | None) -> str:
    if found is None:
        return "?"
    return f"{_seconds(found.mid)} ({_seconds(found.low)}-{_seconds(found.high)})"


# -- the official table ---------------------------------------------------------------------------


def published() -> list[dict[str, Any]]:
    """The maker's memory table beside ours; GiB of weights, K/V and software left out of both."""
    rows = []
    for size, (bf16, sfp8, q4, mobile, text_only) in PUBLISHED.items():
        config = PRESETS[size]
        values = sizing.stored_values(config)
        row: dict[str, Any] = {"model": size}
        for (name, format), bits, theirs in zip(
            PUBLISHED_FORMATS.items(), (16, 8, 4), (bf16, sfp8, q4), strict=True
        ):
            row[name] = {
                "published": theirs,
                "their_rule": values * bits / 8 * MARGIN / fit.GIB,
                "files": sum(sizing.weight_bytes(config, format).values()) / fit.GIB,
                "memory": sum(sizing.weight_bytes(config, format, "gpu").values()) / fit.GIB,
            }
        for name, theirs, towers in (("mobile", mobile, True), ("mobile text", text_only, False)):
            if theirs is not None:
                row[name] = {
                    "published": theirs,
                    "their_rule": None,
                    "files": sum(sizing.weight_bytes(config, "mobile", towers=towers).values())
                    / fit.GIB,
                    "memory": sum(
                        sizing.weight_bytes(config, "mobile", "gpu", towers=towers).values()
                    )
                    / fit.GIB,
                }
        rows.append(row)
    return rows


EXPLAINED = (
    "Published: ai.google.dev/gemma/docs/core. BF16, SFP8 and Q4_0 are, but for rounding, all "
    "values of the checkpoint x 16, 8 or 4 bits x 1.2, in units of 2^30 bytes. The page says that "
    "K/V is not in them, and does not say what the fifth on top is. Towers are counted, and the "
    "whole per-layer table (E2B, E4B), which gemsmith leaves on disk. 4 bits are counted as 4.0; "
    "our files have a scale for every 32 weights, 4.5 bits, and int8 for towers and per-layer "
    "inputs; a scale is float32 on a GPU. mobile is another mix there. Ours has no margin: K/V, "
    "workspace and runtime are counted by themselves in `gemsmith fit MODEL`."
)


def show_published(rows: list[dict[str, Any]], console: Console) -> None:
    """Published, our files, our memory: a line for each model and format."""
    table = Table(box=SIMPLE_HEAD, title="weights, GiB", title_justify="left")
    for name in ("model", "format", "published", "values x bits x 1.2", "our files", "in memory"):
        table.add_column(name, justify="left" if name in ("model", "format") else "right")
    for row in rows:
        for name, found in row.items():
            if name == "model":
                continue
            rule = found["their_rule"]
            table.add_row(
                row["model"], name, f"{found['published']:g}",
                "" if rule is None else f"{rule:.1f}",
                f"{found['files']:.2f}", f"{found['memory']:.2f}",
            )  # fmt: skip
    console.print(table)
    console.print(EXPLAINED, highlight=False, markup=False)


# -- the picture ----------------------------------------------------------------------------------


def draw(plans: list[Plan], model: Model, path: Path, *, media: bool, drafter: bool) -> None:
    """Memory against context: a line for each format, and the machine's memory across them."""
    from matplotlib.figure import Figure

    text, first = model.config.text_config, plans[0]
    contexts = [1024]
    while contexts[-1] * 2 <= text.max_position_embeddings:
        contexts.append(contexts[-1] * 2)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines = []
    for plan in plans:
        totals = [
            sizing.memory(
                model.config, plan.format, n, kv=plan.kv, sequences=plan.users,
                place=plan.target.place, towers=media, drafter=drafter,
                weights=dict(plan.memory.weights),
                multiplies_bfloat16=plan.target.multiplies_bfloat16,
            ).total / fit.GIB
            for n in contexts
        ]  # fmt: skip
        [line] = axes.plot(contexts, totals, marker="o", markersize=3)
        lines.append((totals[-1], plan, line.get_color()))
        if 0 < plan.largest_context < text.max_position_embeddings:
            at = plan.target.memory / fit.GIB
            axes.plot(plan.largest_context, at, "x", color=line.get_color(), markersize=9)
    memory = first.target.memory / fit.GIB
    axes.axhline(memory, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"{first.target.name}: {gib(first.target.memory)}", (contexts[0], memory), (0, 4),
        textcoords="offset points", fontsize="small",
    )  # fmt: skip
    whose = f"{first.users} users" if first.users > 1 else "one user"
    axes.set_title(f"{model.name}, {whose}, K/V in {first.kv}: memory by context", parse_math=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{n // 1024}K" for n in contexts])
    axes.minorticks_off()
    axes.set(xlabel="tokens of context, each user", ylabel="GiB (2^30 bytes)", ylim=(0, None))
    axes.margins(x=0.02)
    # Each line is named beside its end; names that would lie on one another are moved apart.
    room, above = 0.045 * axes.get_ylim()[1], float("-inf")
    for total, plan, color in sorted(lines, key=lambda line: line[0]):
        above = max(total, above + room)
        axes.annotate(
            plan.format if model.stored is None or model.format else "as stored",
            (1.01, above), xycoords=("axes fraction", "data"), color=color, va="center",
        )  # fmt: skip
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# -- the command ----------------------------------------------------------------------------------


def run(
    name: str | None,
    *,
    quant: str | None,
    context: str | None,
    users: int,
    device: str,
    memory: str | None,
    kv: str,
    prompt: int,
    media: bool,
    drafter: bool,
    plot: str | None,
    as_json: bool,
) -> None:
    """Answer, and draw if asked.

    Raises:
      GemsmithError: what was asked makes no sense, or nothing fits.
    """
    if plot and name is None:
        raise RequestError("--plot draws one model: name it, such as gemsmith fit E4B --plot a.png")
    path = drawable(plot) if plot else None
    tokens = fit.tokens_of(context) if context else DEFAULT_CONTEXT
    if prompt < 1:
        raise ConfigError(f"prompt {prompt}: must be at least one token")
    formats = (fit.format_of(quant),) if quant else None
    model = model_of(name) if name else None
    target = target_of(device, memory)
    console = Console()
    if model is None:
        plans = fit.search(
            target,
            context=tokens,
            users=users,
            kv=kv,
            formats=formats or fit.SEARCHED,
            prompt=prompt,
            media=media,
        )
    else:
        if context is None:
            tokens = min(tokens, model.config.text_config.max_position_embeddings)
        plans = forward(
            model, target, formats=formats, context=tokens, users=users, kv=kv, prompt=prompt,
            media=media, drafter=drafter,
        )  # fmt: skip
    if as_json:
        print(json.dumps(facts(plans, model), ensure_ascii=False))
    elif model is None:
        show_search(plans, console)
    else:
        show(plans, model, console)
    if path and model:
        draw(plans, model, path, media=media, drafter=drafter)
