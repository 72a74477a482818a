"""Gemma 4 audio tower of E2B and E4B, a conformer: mel frames in, soft tokens out.

Takes the log-mel frames of one clip, 10 ms apart; returns one row for each 40 ms. Each row sees
about half a second of its past in each layer and 30 ms ahead, so cost grows linearly with length.
The mel front end is not here, nor is the encoder-free input of the 12B.

Shapes: T mel frames, F mel bins, S soft tokens, D hidden_size, N heads, H head_dim,
        W keys that a query sees, B blocks, C queries of a block, X keys of a block (C + W - 1).

Differs from a textbook conformer in: RMS norms; attention to the last W rows only, with relative
positions and capped scores; causal convolution; norms before and after each part; linear layers
that clamp their inputs and outputs to stored bounds.

Numerics: norms and attention in float32. The reference also clamps the stream to +-1e10 before
norms, a guard for training that no inference reaches; it is left out.

Module names are the checkpoint's own, below `model.audio_tower.`.
Source: transformers 5.23 modeling_gemma4.py.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemsmith.config import AudioConfig
from gemsmith.errors import ConfigError, MediaError
from gemsmith.model.text import Linear, RMSNorm
from gemsmith.model.vision import ClippableLinear

K_SCALE = math.log(1 + math.e) / math.log(2)
SLOWEST = 10_000.0


def window(config: AudioConfig) -> int:
    """Keys that a query sees, itself included: distances 0 to window - 1.

    12 in the released models, whose attention_context_left is 13. Here the reference
    implementations disagree: Transformers and llama.cpp stop at distance 11, Google's JAX code and
    mlx-vlm at 12. Followed are the former, so that outputs equal those of Transformers.
    """
    return config.attention_context_left - 1


class SubsampleLayer(nn.Module):
    """Convolution that halves time and frequency, norm over channels, ReLU."""

    def __init__(self, inputs: int, outputs: int, eps: float, **where: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False, **where)
        self.norm = nn.LayerNorm(outputs, eps, bias=False, **where)

    def forward(self, x_KTF: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x_KTF).movedim(0, -1))).movedim(-1, 0)


class Subsample(nn.Module):
    """Mel frames to a quarter as many rows."""

    def __init__(self, config: AudioConfig, **where: Any) -> None:
        super().__init__()
        first, second = config.subsampling_conv_channels
        self.layer0 = SubsampleLayer(1, first, config.rms_norm_eps, **where)
        self.layer1 = SubsampleLayer(first, second, config.rms_norm_eps, **where)
        # As many mel bins as first channels; a quarter of them is left.
        self.input_proj_linear = Linear(first // 4 * second, config.hidden_size, **where)

    def forward(self, mel_TF: Tensor) -> Tensor:
        x_KSF = self.layer1(self.layer0(mel_TF[None]))
        return self.input_proj_linear(x_KSF.permute(1, 2, 0).flatten(1))


class FeedForward(nn.Module):
    """Four times wider and back, with SiLU; a part of it joins the stream."""

    def __init__(self, config: AudioConfig, **where: Any) -> None:
        super().__init__()
        D, eps, clipped = config.hidden_size, config.rms_norm_eps, config.use_clipped_linears
        self.pre_layer_norm = RMSNorm(D, eps, **where)
        self.ffw_layer_1 = ClippableLinear(D, 4 * D, clipped, **where)
        self.ffw_layer_2 = ClippableLinear(4 * D, D, clipped, **where)
        self.post_layer_norm = RMSNorm(D, eps, **where)
        self.residual_weight = config.residual_weight

    def forward(self, x_SD: Tensor) -> Tensor:
        hidden = F.silu(self.ffw_layer_1(self.pre_layer_norm(x_SD)))
        return x_SD + self.residual_weight * self.post_layer_norm(self.ffw_layer_2(hidden))


class LocalAttention(nn.Module):
    """Attention of each row to the last W rows, with relative positions, a block at a time."""

    def __init__(self, config: AudioConfig, **where: Any) -> None:
        super().__init__()
        D, clipped = config.hidden_size, config.use_clipped_linears
        self.num_heads, self.head_dim = config.num_attention_heads, D // config.num_attention_heads
        self.window, self.block = window(config), config.attention_chunk_size
        self.cap = config.attention_logit_cap
        self.q_proj = ClippableLinear(D, D, clipped, **where)
        self.k_proj = ClippableLinear(D, D, clipped, **where)
        self.v_proj = ClippableLinear(D, D, clipped, **where)
        self.post = ClippableLinear(D, D, clipped, **where)
        self.relative_k_proj = Linear(D, D, **where)
        self.per_dim_scale = nn.Parameter(torch.empty(self.head_dim, **where))

    def forward(self, x_SD: Tensor, waves_WD: Tensor) -> Tensor:
        """score(i, j) = cap(q_i . k_j + q_i . r_(i - j)) where 0 <= i - j < W; float32.

        waves: row d is the sinusoid of distance d, which relative_k_proj makes r_d.
        """
        S, W, C = x_SD.shape[0], self.window, self.block
        heads = (-1, self.num_heads, self.head_dim)
        q_SNH = self.q_proj(x_SD).float().view(heads) * self.q_scale()
        k_SNH = self.k_proj(x_SD).float().view(heads) * K_SCALE
        v_SNH = self.v_proj(x_SD).float().view(heads)
        r_WNH = self.relative_k_proj(waves_WD).float().view(heads)

        # Block b holds queries b * C .. and, of the keys, those and the W - 1 before them.
        tail = -S % C
        q_BNCH = F.pad(q_SNH, (0, 0, 0, 0, 0, tail)).unflatten(0, (-1, C)).transpose(1, 2)
        k_BNHX, v_BNHX = (
            F.pad(t, (0, 0, 0, 0, W - 1, tail)).unfold(0, C + W - 1, C) for t in (k_SNH, v_SNH)
        )
        c, x = (torch.arange(n, device=x_SD.device) for n in (C, C + W - 1))
        distance_CX = c[:, None] + (W - 1) - x
        starts_B = C * torch.arange(q_BNCH.shape[0], device=x_SD.device)
        # Padding behind the last row is later than any query; that before the first is masked.
        real_BX = starts_B[:, None] + x >= W - 1
        seen_BCX = (distance_CX >= 0) & (distance_CX < W) & real_BX[:, None]

        by_distance_BNCW = q_BNCH @ r_WNH.permute(1, 2, 0)
        relative_BNCX = by_distance_BNCW.take_along_dim(distance_CX.clamp(0, W - 1)[None, None], -1)
        scores_BNCX = self.cap * torch.tanh((q_BNCH @ k_BNHX + relative_BNCX) / self.cap)
        weights_BNCX = scores_BNCX.masked_fill(~seen_BCX[:, None], -math.inf).softmax(-1)
        out_BNCH = weights_BNCX @ v_BNHX.transpose(-1, -2)
        out_SD = out_BNCH.transpose(1, 2).flatten(0, 1)[:S].flatten(1)
        return self.post(out_SD.to(x_SD.dtype))

    def q_scale(self) -> Tensor:
        """[H] float32; softplus(0) = ln 2, so a scale of 0 leaves the usual H^-0.5."""
        return self.head_dim**-0.5 / math.log(2) * F.softplus(self.per_dim_scale.float())


class LightConv(nn.Module):
    """Gated linear unit, causal convolution of each channel, SiLU, linear; joins the stream."""

    def __init__(self, config: AudioConfig, **where: Any) -> None:
        super().__init__()
        D, eps, clipped = config.hidden_size, config.rms_norm_eps, config.use_clipped_linears
        kernel = config.conv_kernel_size
        self.pre_layer_norm = RMSNorm(D, eps, **where)
        self.linear_start = ClippableLinear(D, 2 * D, clipped, **where)
        self.depthwise_conv1d = nn.Conv1d(D, D, kernel, groups=D, bias=False, **where)
        self.conv_norm = RMSNorm(D, eps, **where)
        self.linear_end = ClippableLinear(D, D, clipped, **where)

    def forward(self, x_SD: Tensor) -> Tensor:
        gated_SD = F.glu(self.linear_start(self.pre_layer_norm(x_SD)))
        past = self.depthwise_conv1d.kernel_size[0] - 1
        mixed_SD = self.depthwise_conv1d(F.pad(gated_SD.T, (past, 0))).T
        return x_SD + self.linear_end(F.silu(self.conv_norm(mixed_SD)))


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, norm."""

    def __init__(self, config: AudioConfig, **where: Any) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.feed_forward1 = FeedForward(config, **where)
        self.norm_pre_attn = RMSNorm(D, eps, **where)
        self.self_attn = LocalAttention(config, **where)
        self.norm_post_attn = RMSNorm(D, eps, **where)
        self.lconv1d = LightConv(config, **where)
        self.feed_forward2 = FeedForward(config, **where)
        self.norm_out = RMSNorm(D, eps, **where)

    def forward(self, x_SD: Tensor, waves_WD: Tensor) -> Tensor:
        x_SD = self.feed_forward1(x_SD)
        x_SD = x_SD + self.norm_post_attn(self.self_attn(self.norm_pre_attn(x_SD), waves_WD))
        return self.norm_out(self.feed_forward2(self.lconv1d(x_SD)))


class AudioTower(nn.Module):
    """The tower. Weights are allocated, not initialised."""

    def __init__(
        self,
        config: AudioConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if window(config) < 1 or config.attention_context_right:
            raise ConfigError(
                f"audio_config: attention_context_left {config.attention_context_left} and right "
                f"{config.attention_context_right}; left must be 2 or more, right 0 as in every "
                "Gemma 4"
            )
        if config.hidden_size % (2 * config.num_attention_heads):
            raise ConfigError(
                f"audio_config: hidden_size {config.hidden_size} does not divide into "
                f"{config.num_attention_heads} heads of even size"
            )
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        D = config.hidden_size
        self.config = config
        self.subsample_conv_projection = Subsample(config, **where)
        self.layers = nn.ModuleList(
            ConformerLayer(config, **where) for _ in range(config.num_hidden_layers)
        )
        self.output_proj = nn.Linear(D, config.output_proj_dims, **where)

    def forward(self, mel_TF: Tensor, valid_T: Tensor) -> Tensor:
        """Rows [S, output_proj_dims] of the valid frames of one clip; S = ceil(ceil(T / 2) / 2).

        Frames after the last valid one are dropped here, which gives what masking them in every
        part of the tower would.

        Raises:
          MediaError: no valid frame, one behind an invalid one, or another number of mel bins.
        """
        frames, bins = int(valid_T.sum()), self.config.subsampling_conv_channels[0]
        if not frames or not valid_T[:frames].all():
            raise MediaError(
                f"audio of {len(valid_T)} frames, {frames} of them valid: the valid ones must "
                "come first, and there must be one at least"
            )
        if mel_TF.shape[1] != bins:
            raise MediaError(f"audio of {mel_TF.shape[1]} mel bins; this model hears {bins}")
        x_SD = self.subsample_conv_projection(mel_TF[:frames].to(self.output_proj.weight.dtype))
        waves_WD = sinusoids(window(self.config), x_SD.shape[1], x_SD.device).to(x_SD.dtype)
        for layer in self.layers:
            x_SD = layer(x_SD, waves_WD)
        return self.output_proj(x_SD)


def sinusoids(distances: int, dim: int, device: torch.device) -> Tensor:
    """[distances, dim] float32: sines, then cosines, of dim / 2 speeds from 1 down to 1e-4."""
    half = dim // 2
    step = math.log(SLOWEST) / max(half - 1, 1)
    speed = torch.exp(-step * torch.arange(half, device=device))
    angle = torch.arange(distances, device=device)[:, None] * speed
    return torch.cat((angle.sin(), angle.cos()), -1)
