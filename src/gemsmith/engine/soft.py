"""The soft tokens of a prompt as the decoder takes them: their rows, and which see each other.

What this is not: images and sounds are read, and find their places, in `media`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gemsmith.config import TextConfig
from gemsmith.engine.context import Soft
from gemsmith.engine.media import Prompt
from gemsmith.model.towers import Towers


class SoftTokens:
    """Makes soft tokens with a model's image and audio towers."""

    def __init__(
        self, config: TextConfig, load_towers: Callable[[], Towers] | None, device: torch.device
    ) -> None:
        """load_towers: called when the first image or sound comes; None: none may come."""
        self.load_towers, self.device = load_towers, device
        self.loaded: Towers | None = None
        """The towers, once something needed them."""
        self._images_are_whole = config.use_bidirectional_attention == "vision"

    @property
    def towers(self) -> Towers:
        """Read the first time they are needed."""
        if self.loaded is None:
            assert self.load_towers is not None, "media were refused"
            self.loaded = self.load_towers()
        return self.loaded

    @torch.inference_mode()
    def rows(self, prompt: Prompt, cached: int) -> Soft | None:
        """Indices and rows of the soft tokens beyond the first `cached`; a run at a time."""
        at, rows = [], []
        for span in prompt.spans:
            if span.stop <= cached:
                continue
            features, places = (
                torch.from_numpy(array).to(self.device)
                for array in (span.run.features, span.run.places)
            )
            if span.run.kind == "audio":
                rows_SD = self.towers.hear(features, places)
            else:
                rows_SD = self.towers.see(features, places, [len(features)])
            first = max(cached - span.start, 0)
            at += range(span.start + first - cached, span.stop - cached)
            rows.append(rows_SD[first:])
        return (torch.tensor(at, device=self.device), torch.cat(rows)) if rows else None

    def see_each_other(self, prompt: Prompt) -> bool:
        """Whether the tokens of an image attend to those after them, up to its end."""
        return self._images_are_whole and bool(prompt.spans)

    def blocks(self, prompt: Prompt, cached: int) -> Tensor | None:
        """`Prompt.blocks` of the tokens beyond the first `cached`; None where none see others."""
        if not self.see_each_other(prompt):
            return None
        return torch.tensor(prompt.blocks()[cached:], device=self.device)
