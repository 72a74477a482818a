"""Gemma 4 vision tower of E2B, E4B, 26B-A4B and 31B: patches in, soft tokens out.

Takes the patches of one or several images, packed one after another without padding, and their
places in the image; returns one row for each cell of 3 x 3 patches. Images do not see each other.
Cutting an image into patches is not done here, nor is the encoder-free input of the 12B.

Shapes: P packed patches, C values of a patch (row, column, channel), S soft tokens,
        D hidden_size, N heads, K key/value heads, H head_dim, F MLP width.

Differs from the decoder in: every patch sees its whole image; learned positions by column and row
besides a rotary embedding that turns one half of a head by column, the other by row; no final norm.
E2B and E4B clamp the inputs and outputs of linear layers to stored bounds; 26B-A4B and 31B shift
and scale the rows at the end.

Numerics: norms, pooling and standardization in float32. The pooled values reach 1e5 before
std_bias is subtracted, so rounding them to the weights' dtype first would lose most digits.

Module names are the checkpoint's own, below `model.vision_tower.`; of SoftProjection, below
`model.embed_vision.` and `model.embed_audio.`.
Source: transformers 5.23 modeling_gemma4.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemsmith.config import RopeParameters, VisionConfig
from gemsmith.errors import ConfigError, MediaError
from gemsmith.model.text import Linear, RMSNorm, rms_norm, rope_table, rotate
from gemsmith.ops.attention import masked_attention


class ClippableLinear(nn.Module):
    """A matrix product between two clamps; without clamps only its place in the names remains.

    The bounds are part of the checkpoint. Allocated, they are infinite: nothing is clamped.
    """

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, inputs: int, outputs: int, clipped: bool, **where: Any) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs, **where)
        self.clipped = clipped
        if clipped:
            for side in ("input", "output"):
                self.register_buffer(f"{side}_min", torch.full((), -math.inf, **where))
                self.register_buffer(f"{side}_max", torch.full((), math.inf, **where))

    def forward(self, x: Tensor) -> Tensor:
        if not self.clipped:
            return self.linear(x)
        out = self.linear(clamp(x, self.input_min, self.input_max))
        return clamp(out, self.output_min, self.output_max)


def clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x between two bounds that are tensors of shape []."""
    if x.device.type == "cpu":
        # Bounds given as numbers are four times faster here, which saves a tenth of the tower's
        # time. On other devices reading them would wait for the work before.
        least, most = low.item(), high.item()
        return x if (least, most) == (-math.inf, math.inf) else x.clamp(least, most)
    return x.clamp(low, high)


class SoftProjection(nn.Module):
    """Rows of a tower to rows of the decoder's embedding: norm without weight, then linear."""

    def __init__(self, inputs: int, outputs: int, eps: float, **where: Any) -> None:
        super().__init__()
        self.embedding_projection = Linear(inputs, outputs, **where)
        self.eps = eps

    def forward(self, x_SD: Tensor) -> Tensor:
        normed = rms_norm(x_SD, None, self.eps)
        return self.embedding_projection(normed.to(self.embedding_projection.weight.dtype))


class PatchEmbedder(nn.Module):
    """Patches to rows, plus one learned row for the column and one for the row they stand in."""

    def __init__(self, config: VisionConfig, **where: Any) -> None:
        super().__init__()
        D, places = config.hidden_size, config.position_embedding_size
        self.input_proj = Linear(3 * config.patch_size**2, D, **where)
        self.position_embedding_table = nn.Parameter(torch.empty(2, places, D, **where))

    def forward(self, values_PC: Tensor, positions_P2: Tensor) -> Tensor:
        columns, rows = self.position_embedding_table
        check_positions(positions_P2, len(columns), "position_embedding_size")
        x_PD = self.input_proj((2 * (values_PC - 0.5)).to(columns.dtype))
        return x_PD + (
            F.embedding(positions_P2[:, 0], columns) + F.embedding(positions_P2[:, 1], rows)
        )


class Attention(nn.Module):
    """Every patch of an image sees every other. Softmax scale 1, as in the decoder."""

    def __init__(self, config: VisionConfig, **where: Any) -> None:
        super().__init__()
        D, H, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        q_dim, kv_dim = config.num_attention_heads * H, config.num_key_value_heads * H
        clipped = config.use_clipped_linears
        self.head_dim, self.eps = H, eps
        self.q_proj = ClippableLinear(D, q_dim, clipped, **where)
        self.k_proj = ClippableLinear(D, kv_dim, clipped, **where)
        self.v_proj = ClippableLinear(D, kv_dim, clipped, **where)
        self.o_proj = ClippableLinear(q_dim, D, clipped, **where)
        self.q_norm = RMSNorm(H, eps, **where)
        self.k_norm = RMSNorm(H, eps, **where)

    def forward(
        self, x_PD: Tensor, tables: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int]
    ) -> Tensor:
        heads = (x_PD.shape[0], -1, self.head_dim)
        q_PNH = rotate_2d(self.q_norm(self.q_proj(x_PD).view(heads)), tables)
        k_PKH = rotate_2d(self.k_norm(self.k_proj(x_PD).view(heads)), tables)
        v_PKH = rms_norm(self.v_proj(x_PD).view(heads), None, self.eps)
        # Image by image: no mask, no padding, and no work on pairs of different images.
        images = zip(*(t.split(list(lengths)) for t in (q_PNH, k_PKH, v_PKH)), strict=True)
        out_PNH = torch.cat([masked_attention(q, k, v, None) for q, k, v in images])
        return self.o_proj(out_PNH.flatten(1))


class MLP(nn.Module):
    """Gated MLP with tanh-approximated GELU."""

    def __init__(self, config: VisionConfig, **where: Any) -> None:
        super().__init__()
        D, width, clipped = (
            config.hidden_size,
            config.intermediate_size,
            config.use_clipped_linears,
        )
        self.gate_proj = ClippableLinear(D, width, clipped, **where)
        self.up_proj = ClippableLinear(D, width, clipped, **where)
        self.down_proj = ClippableLinear(width, D, clipped, **where)

    def forward(self, x_PD: Tensor) -> Tensor:
        gate_PF = F.gelu(self.gate_proj(x_PD), approximate="tanh")
        return self.down_proj(gate_PF * self.up_proj(x_PD))


class EncoderLayer(nn.Module):
    """Attention and MLP, each between two norms."""

    def __init__(self, config: VisionConfig, **where: Any) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, **where)
        self.mlp = MLP(config, **where)
        self.input_layernorm = RMSNorm(D, eps, **where)
        self.post_attention_layernorm = RMSNorm(D, eps, **where)
        self.pre_feedforward_layernorm = RMSNorm(D, eps, **where)
        self.post_feedforward_layernorm = RMSNorm(D, eps, **where)

    def forward(
        self, x_PD: Tensor, tables: Sequence[tuple[Tensor, Tensor]], lengths: Sequence[int]
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_PD), tables, lengths)
        x_PD = x_PD + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x_PD))
        return x_PD + self.post_feedforward_layernorm(fed)


class Encoder(nn.Module):
    """The layers, and the two rotations that all of them share."""

    def __init__(self, config: VisionConfig, **where: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config, **where) for _ in range(config.num_hidden_layers)
        )
        self.rope = RopeParameters(rope_theta=config.rope_theta)
        self.axis_dim = config.head_dim // 2

    def forward(self, x_PD: Tensor, positions_P2: Tensor, lengths: Sequence[int]) -> Tensor:
        tables = [rope_table(positions_P2[:, axis], self.rope, self.axis_dim) for axis in (0, 1)]
        for layer in self.layers:
            x_PD = layer(x_PD, tables, lengths)
        return x_PD


class VisionTower(nn.Module):
    """The tower. Weights are allocated, not initialised."""

    std_bias: Tensor
    std_scale: Tensor

    def __init__(
        self,
        config: VisionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if config.head_dim % 4:
            raise ConfigError(
                f"vision_config: head_dim {config.head_dim} is not a multiple of 4; "
                "each half of a head turns in pairs"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ConfigError(
                f"vision_config: num_attention_heads {config.num_attention_heads} is not a "
                f"multiple of num_key_value_heads {config.num_key_value_heads}"
            )
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.patch_embedder = PatchEmbedder(config, **where)
        self.encoder = Encoder(config, **where)
        if config.standardize:
            self.register_buffer("std_bias", torch.zeros(config.hidden_size, **where))
            self.register_buffer("std_scale", torch.ones(config.hidden_size, **where))

    def forward(self, values_PC: Tensor, positions_P2: Tensor, lengths: Sequence[int]) -> Tensor:
        """Soft tokens [S, D] in the weights' dtype, image after image, cells row by row.

        values: patches in [0, 1]; positions: (column, row) of each in its image, int64; lengths:
        patches of each image. The patches of an image fill a grid of whole cells, in any order.

        Raises:
          MediaError: a position outside the learned table, or patches that fill no such grid.
        """
        x_PD = self.patch_embedder(values_PC, positions_P2)
        order_P = pooling_order(positions_P2, lengths, self.config.pooling_kernel_size)
        return self.pool(self.encoder(x_PD, positions_P2, lengths), order_P)

    def pool(self, x_PD: Tensor, order_P: Tensor) -> Tensor:
        """Mean over each cell times sqrt(D), standardized where the size has it; [S, D]."""
        cell = self.config.pooling_kernel_size**2
        z_SD = x_PD[order_P].float().unflatten(0, (-1, cell)).mean(1) * x_PD.shape[1] ** 0.5
        if self.config.standardize:
            z_SD = (z_SD - self.std_bias.float()) * self.std_scale.float()
        return z_SD.to(x_PD.dtype)


def rotate_2d(x_PNH: Tensor, tables: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Turn the first half of each head by the column's table, the second by the row's."""
    halves = zip(x_PNH.chunk(2, -1), tables, strict=True)
    return torch.cat([rotate(half, table) for half, table in halves], -1)


def check_positions(positions_P2: Tensor, limit: int, name: str) -> None:
    """Refuse a column or row that has no learned embedding.

    Raises:
      MediaError: naming the first such patch.
    """
    outside = (positions_P2 < 0) | (positions_P2 >= limit)
    if outside.any():
        patch = int(outside.any(1).nonzero()[0])
        column, row = positions_P2[patch].tolist()
        raise MediaError(
            f"patch {patch} is at column {column}, row {row}, but the model knows places from 0 "
            f"to {limit - 1} only ({name} {limit}); use a smaller or less elongated image"
        )


def pooling_order(positions_P2: Tensor, lengths: Sequence[int], pool: int) -> Tensor:
    """Indices [P] that put the pool * pool patches of each cell side by side, cells row by row.

    Raises:
      MediaError: some image's patches do not fill a grid of whole cells.
    """
    offset, cells = 0, []
    for at_n2 in positions_P2.split(list(lengths)):
        across = (at_n2[:, 0].max() + 1) // pool
        cells.append(offset + at_n2[:, 0] // pool + across * (at_n2[:, 1] // pool))
        offset += len(at_n2) // pool**2
    cell_P = torch.cat(cells)
    order_P = cell_P.argsort(stable=True)
    expected = torch.arange(offset, device=cell_P.device).repeat_interleave(pool**2)
    if len(expected) != len(cell_P) or not torch.equal(cell_P[order_P], expected):
        raise MediaError(
            f"images of {', '.join(str(n) for n in lengths)} patches: each must fill a grid of "
            f"whole {pool} x {pool} cells; resize it to a multiple of {pool} patches both ways"
        )
    return order_P
