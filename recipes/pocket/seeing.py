"""The vision tower over pictures of one length at once: `Towers.see`, made to be trained.

`Towers.see` takes pictures one after another, of any lengths, and stops at each product to look at
its bounds. Here a batch is one graph without questions, which torch.compile makes two to three
times as fast; bounds are left out, since pocket's are infinite. Shorter pictures are filled up with
patches that nobody sees.

Shapes: B pictures, P patches of each, C values of a patch, S soft tokens of each, D and N, H as in
gemsmith.model.vision.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gemsmith.model.text import rms_norm, rope_table, rotate
from gemsmith.model.towers import Towers
from gemsmith.model.vision import EncoderLayer, SoftProjection

HIDDEN = -1e9
"""Bias of patches that nobody is to see."""


def see(
    towers: Towers,
    values_BPC: Tensor,
    places_BP2: Tensor,
    positions_BP2: Tensor,
    bias_BP: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Soft tokens [B, S, decoder's D], and the patches [B, P, D] before the last layer.

    values: in [0, 1], the patches of a soft token one after another; places: columns and rows for
    the embeddings; positions: those for the rotation; bias: on the score of each patch, the log of
    how many patches it stands for, HIDDEN where nobody is to see it; None where all count once.
    """
    tower, config = towers.vision_tower, towers.vision_tower.config
    project = towers.embed_vision
    assert isinstance(project, SoftProjection)
    embedder, rope = tower.patch_embedder, tower.encoder.rope
    columns, rows = embedder.position_embedding_table
    x_BPD = F.linear(2 * (values_BPC - 0.5), embedder.input_proj.weight)
    x_BPD = x_BPD + F.embedding(places_BP2[..., 0], columns) + F.embedding(places_BP2[..., 1], rows)
    flat = positions_BP2.flatten(0, 1)
    tables = [rope_table(flat[:, axis], rope, config.head_dim // 2) for axis in (0, 1)]
    below = x_BPD
    for layer in tower.encoder.layers:
        assert isinstance(layer, EncoderLayer)
        below, x_BPD = x_BPD, _layer(layer, x_BPD, tables, bias_BP)
    cells_BSPD = x_BPD.float().unflatten(1, (-1, config.pooling_kernel_size**2))
    pooled = cells_BSPD.mean(2) * x_BPD.shape[-1] ** 0.5
    normed = rms_norm(pooled, None, project.eps)
    return F.linear(normed, project.embedding_projection.weight), below


def _layer(
    layer: EncoderLayer,
    x_BPD: Tensor,
    tables: list[tuple[Tensor, Tensor]],
    bias_BP: Tensor | None,
) -> Tensor:
    attend, mlp = layer.self_attn, layer.mlp
    B, P, _ = x_BPD.shape
    normed = layer.input_layernorm(x_BPD)
    q, k, v = (
        F.linear(normed, part.linear.weight).view(B * P, -1, attend.head_dim)
        for part in (attend.q_proj, attend.k_proj, attend.v_proj)
    )
    q, k = attend.q_norm(q), attend.k_norm(k)
    q, k = (
        torch.cat([rotate(h, t) for h, t in zip(x.chunk(2, -1), tables, strict=True)], -1)
        for x in (q, k)
    )
    q, k, v = (
        x.view(B, P, -1, attend.head_dim).transpose(1, 2)
        for x in (q, k, rms_norm(v, None, attend.eps))
    )
    # Written out: torch's fused backward pass is three times as slow on so few patches.
    scores = (q @ k.transpose(-1, -2)).float()
    if bias_BP is not None:
        scores = scores + bias_BP[:, None, None]
    out = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    x_BPD = x_BPD + layer.post_attention_layernorm(F.linear(out, attend.o_proj.linear.weight))
    normed = layer.pre_feedforward_layernorm(x_BPD)
    gate = F.gelu(F.linear(normed, mlp.gate_proj.linear.weight), approximate="tanh")
    fed = F.linear(gate * F.linear(normed, mlp.up_proj.linear.weight), mlp.down_proj.linear.weight)
    return x_BPD + layer.post_feedforward_layernorm(fed)
