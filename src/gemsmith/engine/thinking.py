"""The thought channel as the engine sees it: counts its tokens and closes it when they are spent.

A thought is `<|channel>thought` + newline, the text, newline, `<channel|>`. Counted is the text
with its last newline. What this is not: it splits no text (see `text.stream`).
"""

from weakref import WeakKeyDictionary

from gemsmith.text.tokenizer import Tokenizer


class Thought:
    """Follows the tokens of one reply. `tokens` counts those of thoughts, markers left out.

    prompt_ids: a prompt may end inside a thought that it has opened for the model.
    budget: most tokens of thought; None never interferes.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], budget: int | None) -> None:
        special = tokenizer.special
        self._open, self._close = special.channel_open, special.channel_close
        self._call = special.tool_call_open
        self._tokenizer, self._budget = tokenizer, budget
        self._header, self._newline = _frame(tokenizer)
        self.tokens = 0
        self._inside: int | None = None
        """Tokens since the open marker; None outside a thought."""
        self._last = -1
        opened = _last_index(prompt_ids, self._open)
        if opened > _last_index(prompt_ids, self._close):
            self._inside, self._last = len(prompt_ids) - opened - 1, prompt_ids[-1]

    @property
    def inside(self) -> bool:
        """Whether the next token belongs to a thought (or its header)."""
        return self._inside is not None

    def observe(self, token_id: int) -> None:
        """Follow one token of the reply."""
        if token_id == self._open and self._inside is None:
            self._inside = 0
        elif token_id in (self._close, self._call):
            # A call ends a thought that was not closed: nothing may be forced into it.
            self._inside = None
        elif self._inside is not None:
            self._inside += 1
            self.tokens += self._inside > len(self._header)
        self._last = token_id

    def forced(self) -> int | None:
        """The token that must come next because the budget is spent; None where the model chooses.

        The newline before the close marker counts as thought, so it takes the budget's last token.
        A budget of 0 or 1 leaves an empty thought, as the official template writes it.
        """
        if self._budget is None or self._inside is None or self._close is None:
            return None
        if self._inside < len(self._header):
            return self._header[self._inside] if self._budget <= 1 else None
        if self.tokens + 1 < self._budget:
            return None
        if len(self._newline) != 1 or self._tokenizer.piece(self._last).endswith(b"\n"):
            return self._close
        return self._newline[0]


_frames: WeakKeyDictionary[Tokenizer, tuple[list[int], list[int]]] = WeakKeyDictionary()


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens of a thought's header and of a line's end, encoded once."""
    if tokenizer not in _frames:
        _frames[tokenizer] = tokenizer.encode("thought\n"), tokenizer.encode("\n")
    return _frames[tokenizer]


def _last_index(ids: list[int], id: int | None) -> int:
    """Position of the last `id`; -1 if there is none."""
    if id not in ids:  # mostly; this looks ten times as fast
        return -1
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == id), -1)
