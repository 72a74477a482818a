"""Weights for the towers: random in every value, or by the closed formula of the golden file."""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

DATA = Path(__file__).parents[1] / "data"
Fill: TypeAlias = Callable[..., Any]


@pytest.fixture
def randomise() -> Fill:
    """randomise(module, seed=0): no two tensors alike, bounds that clamp, nothing left at rest."""

    def fill(module: nn.Module, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            last = name.rsplit(".", 1)[-1]
            if last.endswith(("_min", "_max")):
                value = (1.0 + 0.2 * noise) * (-1 if last.endswith("min") else 1)
            elif ("norm" in name and last == "weight") or last == "std_scale":
                value = 1 + 0.2 * noise
            elif last in ("bias", "per_dim_scale", "std_bias"):
                value = 0.3 * noise
            else:
                value = noise / math.sqrt(max(1, tensor[0].numel())) if tensor.ndim else noise
            tensor.data.copy_(value)
        return module.eval().requires_grad_(False)

    return fill


@pytest.fixture
def golden_fill() -> Fill:
    """golden_fill(module, prefix): the weights that the golden file's rule gives these names."""

    def formula(name: str, shape: torch.Size) -> Tensor:
        index = torch.arange(math.prod(shape), dtype=torch.float64)
        w = torch.sin(0.37 * index + zlib.crc32(name.encode()) % 1000).reshape(shape)
        last = name.rsplit(".", 1)[-1]
        if last == "layer_scalar":
            return torch.full(shape, 0.9)
        if last in ("input_min", "output_min", "input_max", "output_max"):
            return torch.full(shape, -1.5 if last.endswith("min") else 1.5)
        if last in ("std_bias", "per_dim_scale", "bias"):
            return (0.1 * w).float()
        if "norm" in name or last == "std_scale":
            return (1 + 0.1 * w).float()
        return (0.2 * w).float()

    def fill(module: nn.Module, prefix: str) -> Any:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensor.data.copy_(formula(f"{prefix}.{name}", tensor.shape))
        return module.eval().requires_grad_(False)

    return fill


@pytest.fixture(scope="session")
def stored_shapes() -> Callable[[str, str], dict[str, tuple[int, ...]]]:
    """stored_shapes(size, part): names and shapes of that part of the released checkpoint."""
    lists = json.loads((DATA / "tower_shapes.json").read_text())

    def expand(size: str, part: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, by_shape in lists[size].items():
            if not name.startswith(part + "."):
                continue
            for shape, layers in by_shape.items():
                first, _, last = (layers or "0").partition("-")
                for layer in range(int(first), int(last or first) + 1):
                    key = name.replace("layers.N.", f"layers.{layer}.").removeprefix(part + ".")
                    shapes[key] = tuple(json.loads(shape))
        return shapes

    return expand
