"""`gemsmith info`: what a model is and costs, from its config alone; needs no torch.

Of a folder with weights also what these take as they are stored, from the files' headers; and if
`gemsmith eval fidelity --save` was told to keep its report there, its headline.
"""

import json
import math
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gemsmith import sizing
from gemsmith.cli.console import write
from gemsmith.config import Gemma4Config, LayerPlan, TextConfig, preset
from gemsmith.errors import ConfigError, GemsmithError
from gemsmith.weights import hub
from gemsmith.weights.hub import FIDELITY

CONTEXTS = (4096, 32_768, 131_072, 262_144)
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
KV_BYTES = {"int8": 1, **DTYPE_BYTES}
GIB = 1 << 30
MAX_FIDELITY_BYTES = 1 << 22
"""A report has some kilobytes."""


def config_of(name: str) -> Gemma4Config:
    """The config of a preset by name, of whatever checkpoint `gemsmith.load` would take, or of a
    GGUF file.

    Raises:
      GemsmithError: neither a preset nor a checkpoint that can be found and read.
    """
    if not Path(name).exists():
        with suppress(ConfigError):
            return preset(name)
    if name.lower().endswith(".gguf"):
        from gemsmith.headers import read_headers

        return read_headers(name).config
    return Gemma4Config.load(hub.resolve(name))


def describe(name: str, config: Gemma4Config) -> dict[str, Any]:
    """Everything `info` shows, as JSON-ready data; sizes in bytes."""
    text = config.text_config
    parts = sizing.parameters(config)
    contexts = [*(n for n in CONTEXTS if n < text.max_position_embeddings)]
    contexts.append(text.max_position_embeddings)
    folder = hub.resolve(name) if name == hub.POCKET else Path(name)
    report = folder / FIDELITY
    return {
        "name": name,
        "model_type": config.model_type,
        "layers": _runs(text),
        "config": config.to_dict(),
        "parameters": parts,
        "total_parameters": sum(parts.values()),
        "text_parameters": sizing.text_parameters(text),
        "active_parameters": sizing.active_parameters(text),
        "ple_table_parameters": parts.get("ple_table", 0),
        "kv_bytes": {
            dtype: {str(n): sizing.kv_bytes(text, n, size) for n in contexts}
            for dtype, size in KV_BYTES.items()
        },
        "weights_bytes": {
            dtype: {
                "text": sizing.text_parameters(text) * size,
                "text_without_ple_table": (
                    (sizing.text_parameters(text) - parts.get("ple_table", 0)) * size
                ),
            }
            for dtype, size in DTYPE_BYTES.items()
        },
        **({"stored": stored(folder)} if [*folder.glob("*.safetensors")] else {}),
        **({"fidelity": fidelity(report)} if report.is_file() else {}),
    }


def stored(folder: Path) -> list[dict[str, Any]] | str:
    """Weights and bytes by part and format, or why the files cannot be read."""
    from gemsmith.cli.quantize import summarize  # these need torch
    from gemsmith.weights.convert import stored_weights

    try:
        kinds = summarize(stored_weights(folder))
    except GemsmithError as error:
        return str(error)
    return [
        {"part": k.kind, "format": k.format, "weights": k.weights, "bytes": k.nbytes} for k in kinds
    ]


def fidelity(path: Path) -> str:
    """The headline of a saved fidelity report, or that there is none in this file."""
    try:
        with path.open("rb") as file:
            report = json.loads(file.read(MAX_FIDELITY_BYTES))
        replies, tools = report["replies"]["all"], report["tools"]
        top1, kl = 100 * float(replies["top1"]), float(replies["kl"]["mean"])
        points = float(tools["all"]["valid"]["points"]) if tools else 0.0
        if not all(map(math.isfinite, (top1, kl, points))):
            raise ValueError("a figure is no number")
        count, reference = int(replies["positions"]), str(report["reference"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        return f"{FIDELITY} cannot be read ({type(error).__name__})"
    # Whoever made the file chose the name: nothing in it may steer a terminal.
    reference = "".join(c for c in reference if c.isprintable())[:80]
    calls = f", valid tool calls {points:+.1f} points" if tools else ""
    return f"beside {reference}: top-1 {top1:.2f} %, mean KL {kl:.2g}{calls} ({count:,} positions)"


def _runs(text: TextConfig) -> list[dict[str, Any]]:
    """The per-layer plan, one entry a kind of layer, with the layers that are of it."""

    def kind(plan: LayerPlan) -> tuple[Any, ...]:
        source = -1 if plan.owns_kv else plan.kv_source
        head = (plan.num_key_value_heads, plan.head_dim)
        return source, plan.layer_type, plan.window or 0, head, plan.intermediate_size

    plans = sorted(text.layers, key=kind)
    return [
        {
            "count": len(layers),
            "layers": [plan.index for plan in layers],
            "layer_type": layers[0].layer_type,
            "window": layers[0].window,
            "num_key_value_heads": layers[0].num_key_value_heads,
            "head_dim": layers[0].head_dim,
            "intermediate_size": layers[0].intermediate_size,
            "k_eq_v": layers[0].k_eq_v,
            "reads_kv_of_layer": None if layers[0].owns_kv else layers[0].kv_source,
        }
        for layers in (list(group) for _, group in groupby(plans, kind))
    ]


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what `describe` found."""
    text = facts["config"]["text_config"]
    console.print(f"[bold]{facts['name']}[/bold] ({facts['model_type']})", highlight=False)
    console.print(_features(text), highlight=False, soft_wrap=True)
    if "fidelity" in facts:
        line = f"fidelity {facts['fidelity']}"
        write(console, line + "\n")
    console.print(layer_table(facts))
    console.print(parameter_table(facts))
    if isinstance(facts.get("stored"), str):
        line = f"stored weights cannot be read: {facts['stored']}"
        write(console, line + "\n")
    elif "stored" in facts:
        console.print(stored_table(facts["stored"]))
    console.print(memory_table(facts))


def stored_table(parts: list[dict[str, Any]]) -> Table:
    table = _table("as stored", "", "format", "weights", "bits each", "")
    for part in parts:
        bits = 8 * part["bytes"] / max(1, part["weights"])
        table.add_row(
            part["part"], part["format"], f"{part['weights']:,}", f"{bits:.2f}", size(part["bytes"])
        )
    table.add_section()
    weights, nbytes = (sum(part[key] for part in parts) for key in ("weights", "bytes"))
    table.add_row("all", "", f"{weights:,}", f"{8 * nbytes / max(1, weights):.2f}", size(nbytes))
    return table


def _features(text: dict[str, Any]) -> str:
    words = [
        f"{text['num_hidden_layers']} layers of {text['hidden_size']}",
        f"{text['num_attention_heads']} query heads",
        f"vocabulary {text['vocab_size']:,}",
        f"context {text['max_position_embeddings']:,}",
    ]
    if text["hidden_size_per_layer_input"]:
        words.append(f"per-layer embeddings of {text['hidden_size_per_layer_input']}")
    if text["num_kv_shared_layers"]:
        words.append(f"the last {text['num_kv_shared_layers']} layers share K/V")
    if text["enable_moe_block"]:
        words.append(f"{text['top_k_experts']} of {text['num_experts']} experts beside the MLP")
    return ", ".join(words)


def layer_table(facts: dict[str, Any]) -> Table:
    table = _table("layers", "", "attention", "window", "K/V heads", "MLP width", "K/V")
    for run in facts["layers"]:
        source, held = run["reads_kv_of_layer"], "V only, K rebuilt" if run["k_eq_v"] else "its own"
        table.add_row(
            f"{run['count']} x",
            run["layer_type"].removesuffix("_attention"),
            f"{run['window']:,}" if run["window"] else "all",
            f"{run['num_key_value_heads']} x {run['head_dim']}",
            f"{run['intermediate_size']:,}",
            held if source is None else f"of layer {source}",
        )
    return table


def parameter_table(facts: dict[str, Any]) -> Table:
    table = _table("parameters", "", "count", "share")
    total = facts["total_parameters"]
    for part, count in facts["parameters"].items():
        table.add_row(part.replace("_", " "), f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("all", f"{total:,}", "100.0%")
    if facts["active_parameters"] != facts["text_parameters"]:
        table.add_row("active for one token", f"{facts['active_parameters']:,}", "")
    return table


def memory_table(facts: dict[str, Any]) -> Table:
    table = _table("memory", "", *KV_BYTES)
    weights = facts["weights_bytes"]

    def row(label: str, figures: dict[str, int]) -> None:
        known = (size(figures[dtype]) if dtype in figures else "" for dtype in KV_BYTES)
        table.add_row(label, *known)

    row("text weights", {dtype: weights[dtype]["text"] for dtype in DTYPE_BYTES})
    if facts["ple_table_parameters"]:
        row(
            "  with the PLE table on disk",
            {dtype: weights[dtype]["text_without_ple_table"] for dtype in DTYPE_BYTES},
        )
    for context in facts["kv_bytes"]["bfloat16"]:
        kv = {dtype: facts["kv_bytes"][dtype][context] for dtype in KV_BYTES}
        row(f"K/V of {int(context):,} tokens", kv)
    return table


def size(count: int) -> str:
    """Bytes in the unit that suits, GiB = 2^30."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.2f} MiB"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
