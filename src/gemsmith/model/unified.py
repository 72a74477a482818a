"""Image and audio inputs of the 12B, which has no towers: patches and samples straight to rows.

One merged patch of 48 x 48 pixels is one soft token, and so are 640 samples (40 ms) of sound. Each
is computed alone, so images and clips need no bounds here; the decoder does the seeing.

Shapes: S soft tokens, C values of a merged patch (row, column, channel), D hidden_size of the
        decoder, M mm_embed_dim.

Module names are the checkpoint's own, below `model.embed_vision.` and `model.embed_audio.`.
Source: transformers 5.23 modeling_gemma4_unified.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gemsmith.config import UnifiedAudioConfig, UnifiedVisionConfig
from gemsmith.model.vision import SoftProjection, check_positions


class UnifiedVision(nn.Module):
    """Norm, linear, norm; plus a learned row for column and row; norm; projection.

    These are LayerNorms with the library's own eps, 1e-5; rms_norm_eps is the projection's alone.
    """

    def __init__(self, config: UnifiedVisionConfig, hidden_size: int, **where: Any) -> None:
        super().__init__()
        C, M = config.patch_values, config.mm_embed_dim
        self.patch_ln1 = nn.LayerNorm(C, **where)
        self.patch_dense = nn.Linear(C, M, **where)
        self.patch_ln2 = nn.LayerNorm(M, **where)
        self.pos_embedding = nn.Parameter(torch.empty(config.mm_posemb_size, 2, M, **where))
        self.pos_norm = nn.LayerNorm(M, **where)
        self.multimodal_embedder = SoftProjection(M, hidden_size, config.rms_norm_eps, **where)

    def forward(self, values_SC: Tensor, positions_S2: Tensor) -> Tensor:
        """Rows [S, D] of any number of images; values in [0, 1], positions (column, row), int64.

        Raises:
          MediaError: a position outside the learned table.
        """
        columns, rows = self.pos_embedding.unbind(1)
        check_positions(positions_S2, len(columns), "mm_posemb_size")
        x_SM = self.patch_ln2(self.patch_dense(self.patch_ln1(values_SC.to(columns.dtype))))
        x_SM = x_SM + (columns[positions_S2[:, 0]] + rows[positions_S2[:, 1]])
        return self.multimodal_embedder(self.pos_norm(x_SM))


class UnifiedAudio(SoftProjection):
    """Raw samples, 640 a row, in [-1, 1]: norm without weight, then linear. [S, 640] -> [S, D]."""

    def __init__(self, config: UnifiedAudioConfig, hidden_size: int, **where: Any) -> None:
        super().__init__(config.audio_embed_dim, hidden_size, config.rms_norm_eps, **where)
