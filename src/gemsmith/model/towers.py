"""The image and audio inputs of one model, as its config has them: features in, soft tokens out.

E2B and E4B have both towers, 26B-A4B and 31B the image tower; the 12B has none and takes patches
and samples almost as they are. What comes out are rows for `TextModel.forward(soft=...)`.

Module names are the checkpoint's own, below `model.`.

Shapes: P patches, S soft tokens, T audio frames, F values of a frame, D hidden_size of the decoder.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemsmith.config import (
    AudioConfig,
    Gemma4Config,
    UnifiedAudioConfig,
    UnifiedVisionConfig,
    VisionConfig,
)
from gemsmith.model.audio import AudioTower
from gemsmith.model.unified import UnifiedAudio, UnifiedVision
from gemsmith.model.vision import SoftProjection, VisionTower


class Towers(nn.Module):
    """Weights are allocated, not initialised; without a tower there is no module of its name."""

    def __init__(
        self,
        config: Gemma4Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        D = config.text_config.hidden_size
        vision, audio = config.vision_config, config.audio_config
        self.config = config
        self.sees, self.hears = vision is not None, audio is not None
        if isinstance(vision, VisionConfig):
            self.vision_tower = VisionTower(vision, **where)
            self.embed_vision = SoftProjection(vision.hidden_size, D, vision.rms_norm_eps, **where)
        elif isinstance(vision, UnifiedVisionConfig):
            self.embed_vision = UnifiedVision(vision, D, **where)
        if isinstance(audio, AudioConfig):
            self.audio_tower = AudioTower(audio, **where)
            self.embed_audio = SoftProjection(
                audio.output_proj_dims, D, audio.rms_norm_eps, **where
            )
        elif isinstance(audio, UnifiedAudioConfig):
            self.embed_audio = UnifiedAudio(audio, D, **where)

    def see(self, values_PC: Tensor, positions_P2: Tensor, lengths: Sequence[int]) -> Tensor:
        """Soft tokens [S, D] of packed images; lengths are the patches of each.

        values: see `media.image.patches`, or `merged_patches` for the 12B.
        """
        if isinstance(self.embed_vision, UnifiedVision):
            return self.embed_vision(values_PC, positions_P2)
        return self.embed_vision(self.vision_tower(values_PC, positions_P2, lengths))

    def hear(self, features_TF: Tensor, valid_T: Tensor) -> Tensor:
        """Soft tokens [S, D] of one clip; features: `media.audio.mel`, or `frames` for the 12B."""
        if isinstance(self.embed_audio, UnifiedAudio):
            return self.embed_audio(features_TF)
        return self.embed_audio(self.audio_tower(features_TF, valid_T))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill with random weights for training: normal(0, 0.02) matrices and tables, unit norms.

        Bounds of linear layers stay infinite, standardization does nothing, biases and the scales
        of the audio tower's queries are 0.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias") or "per_dim_scale" in name:
                p.zero_()
            elif "norm" in name or "_ln" in name:
                p.fill_(1.0)
            else:
                p.normal_(0.0, 0.02, generator=generator)
