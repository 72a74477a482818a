"""Modules that stand where the model has linear layers, tables and experts, with low-bit weights.

The model does not learn of it: each has a `weight` that may be sliced by rows and given to
`ops.linear`, like the tensor it replaces. The head therefore reads the embedding's codes.

On a CPU inputs are rounded to int8, each token with its own scale, and products are of integers:

    x8 = round(x / sx), sx = max|x| / 127         ties to even; sx = 1 where x is all zeros
    y  = sx * sum over groups of scale * (sum of q * x8 within the group)

The integer sums are exact, groups are added in ascending order in float32, each step rounded by
itself: any implementation that keeps to this gives the same bits. Where scales are multiples of a
step of their row (`Format.steps`) the sum over groups is of integers, too:

    y  = sx * (step * sum over groups of multiple * (sum of q * x8 within the group))

This one is that definition, not fast. Elsewhere weights become floats of x's dtype, some rows at a
time, and x stays as it is.

Shapes: T tokens, K inputs, N outputs, G groups of a row, g weights of a group, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemsmith.errors import WeightsError
from gemsmith.ops import cpu, moe
from gemsmith.quant.formats import Quantized
from gemsmith.quant.packed import Packed

BLOCK_WEIGHTS = 1 << 20
"""Weights unpacked at once: 4 to 8 MB beside the model."""


def quantize_rows(x_TK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [T, K] and float32 scales [T, 1]; x is about values * scales.

    A row with an infinity or a NaN has the scale NaN and values 0: its products are NaN.
    """
    values, scale = cpu.quantize_rows_reference(x_TK.float())
    return values, scale[:, None]


def integer_product(x_TK: Tensor, weight: Quantized) -> Tensor:
    """The definition above: float32 [T, N] of any float x [T, K] and a weight [N, K]."""
    N, K = weight.shape
    G = weight.scales.shape[-1]
    x8, sx = quantize_rows(x_TK)
    # Every partial sum is an integer that this dtype holds, so the order of adding is no matter.
    exact = 127 * weight.format.offset * (K // G) <= 1 << 24
    dtype = torch.float32 if exact else torch.float64
    x_GTg = x8.view(-1, G, K // G).transpose(0, 1).to(dtype)
    out_TN = torch.empty((x8.shape[0], N), dtype=torch.float32, device=x_TK.device)
    rows = max(1, BLOCK_WEIGHTS // K)
    for start in range(0, N, rows):
        part = weight[start : start + rows]
        codes_GgN = part.codes().view(-1, G, K // G).permute(1, 2, 0).to(dtype)
        sums_GTN = torch.bmm(x_GTg, codes_GgN)
        if weight.format.steps:
            multiples_NG, steps_N = cpu.steps_of(part.scales)
            exact_TN = (sums_GTN.double() * multiples_NG.T[:, None]).sum(0)
            out_TN[:, start : start + rows] = exact_TN.float() * steps_N * sx
            continue
        sums_GTN = sums_GTN.float()
        total_TN = part.scales[:, 0] * sums_GTN[0]
        for group in range(1, G):
            total_TN = total_TN + part.scales[:, group] * sums_GTN[group]
        out_TN[:, start : start + rows] = total_TN * sx
    return out_TN


def float_product(x_TK: Tensor, weight: Quantized) -> Tensor:
    """[T, N] in x's dtype; the weight is widened some rows at a time."""
    rows = max(1, BLOCK_WEIGHTS // weight.shape[-1])
    out_TN = x_TK.new_empty((x_TK.shape[0], weight.shape[0]))
    for start in range(0, weight.shape[0], rows):
        wide = weight[start : start + rows].dequantize().to(x_TK.dtype)
        out_TN[:, start : start + rows] = F.linear(x_TK, wide)
    return out_TN


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """What the model sees as a weight: sliced by rows, multiplied with. An `ops.linear.Factor`."""

    stored: Quantized | Packed
    dtype: torch.dtype
    """What rows read from it, and hidden states, are in."""
    skipped: int = 0
    """Rows at the beginning of `stored` that are not asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = self.stored.shape
        return (*stack, rows - self.skipped, columns)

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def __getitem__(self, index: int | slice) -> "QuantWeight":
        if isinstance(index, int) or isinstance(self.stored, Quantized):
            return QuantWeight(self.stored[index], self.dtype)
        start, stop, _ = index.indices(self.shape[-2])
        start, stop = start + self.skipped, stop + self.skipped
        aligned = start - start % cpu.BLOCK
        return QuantWeight(self.stored[aligned:stop], self.dtype, start - aligned)

    def multiply(self, x_TD: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x_TD.requires_grad:
            raise WeightsError(
                f"a product with weights in {self.stored.format} gives its input no gradient; "
                "train the checkpoint of floats"
            )
        x_TK = x_TD.reshape(-1, x_TD.shape[-1])
        if isinstance(self.stored, Packed):
            y_TN = self.stored.product(x_TK)[:, self.skipped :]
        elif x_TK.device.type == "cpu":
            y_TN = integer_product(x_TK, self.stored)
        else:
            y_TN = float_product(x_TK, self.stored)
        return y_TN.to(x_TD.dtype).view(*x_TD.shape[:-1], -1)

    def multiply_by_rows(self, x_TD: Tensor, ids_n: Tensor) -> Tensor:
        if not isinstance(self.stored, Packed):
            return self.multiply(x_TD)[..., ids_n]
        ids_n = ids_n + self.skipped
        y_Tn = cpu.linear_of(self.stored.weight, x_TD.float().contiguous(), ids_n)
        return y_Tn.to(x_TD.dtype)

    def top(
        self, x_TD: Tensor, count: int, skipped: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        # Rounded to fewer bits than float32, outputs would have another order.
        if not isinstance(self.stored, Packed) or self.skipped or x_TD.dtype != torch.float32:
            return None
        return cpu.top(self.stored.weight, x_TD.contiguous(), count, skipped)


class QuantModule(nn.Module):
    """Holds a weight's codes and scales as buffers, which follow the module to a device."""

    def __init__(self, weight: Quantized | Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = weight.format, weight.shape, dtype
        self._kind = type(weight)
        codes = weight.lines if isinstance(weight, Packed) else weight.packed
        self.register_buffer("codes", codes)
        self.register_buffer("scales", weight.scales)
        self.codes: Tensor
        self.scales: Tensor

    @property
    def stored(self) -> Quantized | Packed:
        return self._kind(self.format, self.shape, self.codes, self.scales)

    @property
    def weight(self) -> QuantWeight:
        return QuantWeight(self.stored, self.dtype)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, {self.format}"


class QuantLinear(QuantModule):
    """Replaces nn.Linear: [..., K] to [..., N]."""

    def __init__(
        self, weight: Quantized | Packed, dtype: torch.dtype, bias: Tensor | None = None
    ) -> None:
        super().__init__(weight, dtype)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.multiply(x)
        return y if self.bias is None else y + self.bias


class QuantEmbedding(QuantModule):
    """Replaces nn.Embedding: the rows asked for, in `dtype`."""

    def __init__(self, weight: Quantized | Packed, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        return self.stored.rows(ids).to(self.dtype)


class QuantExperts(nn.Module):
    """Replaces the model's experts: gate_up [E, 2F, D], gate first, and down [E, D, F]."""

    def __init__(
        self, gate_up: Quantized | Packed, down: Quantized | Packed, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = QuantModule(gate_up, dtype), QuantModule(down, dtype)

    def forward(self, x_TD: Tensor, index_TA: Tensor, weight_TA: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj.weight, self.down_proj.weight
        return moe.experts(x_TD, index_TA, weight_TA, gate_up, down)
