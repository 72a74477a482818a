"""gemsmith: run, size, serve, tune and prove Google's Gemma 4 open models.

    import gemsmith

    lm = gemsmith.load("pocket")        # embedded; or a folder, or a hub id
    reply = lm.generate("What is 12 + 30?", temperature=0)
    print(reply.text, reply.finish_reason, reply.usage)
    for event in lm.stream("Count to three."):
        print(event)

Names are read from where they live when first asked for: `import gemsmith` loads no PyTorch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from gemsmith.config import Gemma4Config
    from gemsmith.engine.engine import LM
    from gemsmith.engine.request import Finished, FinishReason, Generation, SamplingParams, Usage
    from gemsmith.errors import GemsmithError
    from gemsmith.text.calls import Problem, ToolCall
    from gemsmith.text.stream import Content, Thinking, ToolCallEvent, ToolProblem

__version__ = "0.1.0"

__all__ = [
    "LM",
    "Content",
    "FinishReason",
    "Finished",
    "Gemma4Config",
    "GemsmithError",
    "Generation",
    "Problem",
    "SamplingParams",
    "Thinking",
    "ToolCall",
    "ToolCallEvent",
    "ToolProblem",
    "Usage",
    "__version__",
    "load",
]

# A thread of OpenMP, with which PyTorch computes, keeps its core busy once it has nothing to do: by
# default for some 13 ms (200 with Intel's), which the extension's threads lack then. Two such waits
# a token took a third of the speed of two threads. So it shall wait about 0.2 ms (1): longer than
# what lies between PyTorch's own operations. It is read when PyTorch is loaded, hence here.
OPENMP_WAITS = {"GOMP_SPINCOUNT": "4000", "KMP_BLOCKTIME": "1"}
if "OMP_WAIT_POLICY" not in os.environ:
    for _name, _value in OPENMP_WAITS.items():
        os.environ.setdefault(_name, _value)
# On a CPU that multiplies bfloat16 itself PyTorch makes code for each shape of such a product, rows
# included, and keeps that of 1,024, nearly a megabyte each: of every length that a prompt ever had.
# A process with 13 MB of weights grew from 280 to 960 MiB over a hundred lengths. So it shall keep
# 64: E2B's for four numbers of rows. Read at the first product, by two layers, a name each.
PRODUCTS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
for _name, _value in PRODUCTS_KEPT.items():
    os.environ.setdefault(_name, _value)

_HOMES = {
    "gemsmith.config": ("Gemma4Config",),
    "gemsmith.engine.engine": ("LM",),
    "gemsmith.engine.request": (
        "FinishReason",
        "Finished",
        "Generation",
        "SamplingParams",
        "Usage",
    ),
    "gemsmith.errors": ("GemsmithError",),
    "gemsmith.text.calls": ("Problem", "ToolCall"),
    "gemsmith.text.stream": ("Content", "Thinking", "ToolCallEvent", "ToolProblem"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def load(
    name: "str | Path",
    *,
    device: str = "auto",
    dtype: "str | torch.dtype" = "auto",
    kv: str = "auto",
    quant: str | None = None,
    speculation: str = "auto",
    drafter: "str | Path | None" = None,
    progress: "Callable[[int, int], None] | None" = None,
    revision: str | None = None,
    offline: bool | None = None,
) -> "LM":
    """Load a model: a checkpoint folder, a hub id, or "pocket". See `LM.load`."""
    from gemsmith.engine.engine import LM

    return LM.load(
        name,
        device=device,
        dtype=dtype,
        kv=kv,
        quant=quant,
        speculation=speculation,
        drafter=drafter,
        progress=progress,
        revision=revision,
        offline=offline,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemsmith' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
