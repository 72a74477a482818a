"""Stop strings: end an answer before any of some strings, however the text is cut into pieces.

The answer ends with the stop string that is complete first (of two that end together, the longer);
the text before it is the answer. Text that may yet turn out to begin a stop string is held back.
"""

from collections.abc import Sequence


class StopStrings:
    """Passes text on, piece by piece, until a stop string is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Text that is surely part of the answer. Once `stopped`, nothing more comes."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        cut = len(text) - self._possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text can complete a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
