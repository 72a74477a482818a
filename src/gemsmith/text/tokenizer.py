"""Text to token ids and back, whole or piece by piece, with markers out of the reach of users.

What a tokenizer is not: it knows no chat format (see `chat`) and never adds a beginning-of-text
token unless asked, because the chat format writes its own. Files are read in `vocabulary`.

Gemma 4's vocabulary is byte-pair encoding over characters with U+2581 for a space, runs of newlines
kept apart, and 256 byte tokens for characters it lacks. A text that holds U+2581 itself comes back
with a space in its place: the vocabulary cannot tell the two apart. Every other text round-trips.
"""

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from gemsmith.errors import RequestError, TokenizerError
from gemsmith.text import vocabulary
from gemsmith.text.compact import CompactVocabulary
from gemsmith.text.vocabulary import MARKERS, SPACE, Reference, Vocabulary

if TYPE_CHECKING:
    import tokenizers

__all__ = ["MARKERS", "SPACE", "Detokenizer", "SpecialIds", "Tokenizer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """Ids of the special markers by role; None where a vocabulary lacks one."""

    pad: int | None = None
    eos: int | None = None
    bos: int | None = None
    unk: int | None = None
    turn_open: int | None = None
    turn_close: int | None = None
    channel_open: int | None = None
    channel_close: int | None = None
    tool_open: int | None = None
    tool_close: int | None = None
    tool_call_open: int | None = None
    tool_call_close: int | None = None
    tool_response_open: int | None = None
    tool_response_close: int | None = None
    quote: int | None = None
    think: int | None = None
    image: int | None = None
    """Soft token an image row is written over; boi and eoi stand around the run."""
    audio: int | None = None
    video: int | None = None
    boi: int | None = None
    eoi: int | None = None
    boa: int | None = None
    eoa: int | None = None


class Tokenizer:
    """A loaded vocabulary. Safe to share between threads."""

    def __init__(self, core: "tokenizers.Tokenizer | CompactVocabulary") -> None:
        """core: a compiled vocabulary, or a `tokenizers` object whose decoder is Gemma's.

        Gemma's decoder makes spaces from U+2581, and bytes from byte tokens.
        """
        self._core = core
        self._vocabulary: Vocabulary = (
            core if isinstance(core, CompactVocabulary) else Reference(core)
        )
        self.vocab_size: int = self._vocabulary.size
        """Number of ids, special ones included."""
        self._markers = markers = self._vocabulary.markers
        self._marker_pattern = _alternatives(markers)
        self.special = SpecialIds(
            **{field.name: markers.get(MARKERS[field.name]) for field in fields(SpecialIds)}
        )
        """Ids of the special markers by role."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint folder, a tokenizer.json, or the vocabulary of a .gguf file.

        Raises:
          TokenizerError: nothing there, or a file that is damaged, too large or not Gemma's kind.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"no vocabulary at {path}: give a checkpoint folder that holds tokenizer.json, "
                "a tokenizer.json, or a .gguf file"
            )
        return cls(vocabulary.read(path))

    def token_id(self, marker: str) -> int | None:
        """Id of one vocabulary entry by its exact spelling, such as `<turn|>`; None if absent."""
        return self._vocabulary.token_id(marker)

    def token(self, id: int) -> str:
        """Spelling of one id as the vocabulary stores it (spaces as U+2581).

        Raises:
          TokenizerError: the id lies outside the vocabulary.
        """
        token = self._vocabulary.token(id) if 0 <= id < self.vocab_size else None
        if token is None:
            raise self._outside(id)
        return token

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Ids of `text`; special markers written in it become their ids.

        Never use this on text from outside that sits in a prompt: see `encode_parts`.

        Raises:
          RequestError: the text holds a lone surrogate, so it is no Unicode text.
          TokenizerError: add_bos, and the vocabulary has no `<bos>`.
        """
        return self.encode_parts([(text, True)], add_bos=add_bos)

    def encode_parts(
        self, parts: Iterable[tuple[str, bool]], *, add_bos: bool = False
    ) -> list[int]:
        """Ids of the parts read as one text; markers count only inside trusted parts.

        parts: (text, trusted) pairs. Merges run across the borders, so that the ids equal
        `encode` of the joined text whenever no untrusted part holds a marker. A marker in an
        untrusted part is spelled out as ordinary characters, and one that only comes about where
        two parts meet is too.

        Raises: as `encode`.
        """
        ids: list[int] = []
        if add_bos:
            if self.special.bos is None:
                raise TokenizerError(
                    "add_bos was asked for, but this vocabulary has no <bos> token"
                )
            ids.append(self.special.bos)
        plain: list[str] = []
        for text, trusted in parts:
            if not trusted:
                plain.append(text)
                continue
            # With one group the split alternates ordinary text and markers.
            for index, piece in enumerate(self._marker_pattern.split(text)):
                if index % 2 == 0:
                    plain.append(piece)
                else:
                    ids += self._encode_plain("".join(plain))
                    plain.clear()
                    ids.append(self._markers[piece])
        return ids + self._encode_plain("".join(plain))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD.

        Raises:
          TokenizerError: an id outside the vocabulary.
        """
        hidden = self.special_ids() if skip_special else frozenset()
        shown = [id for id in ids if id not in hidden]
        text = self._vocabulary.decode(shown)
        if text is None:
            raise self._outside(next(i for i in shown if self._vocabulary.decode([i]) is None))
        return text.decode(errors="replace")

    def piece(self, id: int) -> bytes:
        """The bytes one id stands for; a byte token is one byte, maybe a part of a character.

        Raises:
          TokenizerError: the id lies outside the vocabulary.
        """
        piece = self._vocabulary.decode([id])
        if piece is None:
            raise self._outside(id)
        return piece

    def _outside(self, id: int) -> TokenizerError:
        return TokenizerError(
            f"token id {id} is not in this vocabulary of {self.vocab_size} entries; "
            "the model and the tokenizer may belong to different checkpoints"
        )

    def special_ids(self) -> frozenset[int]:
        """Ids of the markers, which only trusted text may hold."""
        return frozenset(self._markers.values())

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            return self._vocabulary.encode(text)
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the text is the lone surrogate "
                f"U+{ord(text[error.start]):04X}, which no UTF-8 text holds; decode the input with "
                "errors='replace' first"
            ) from None


class Detokenizer:
    """Turns ids into text one at a time; the pieces joined equal `Tokenizer.decode` of all ids.

    A character spelled in byte tokens is held back until its last byte has come.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids() if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, id: int) -> str:
        """Text that id completes; empty while a character is unfinished."""
        if id in self._hidden:
            return ""
        return self._decoder.decode(self._tokenizer.piece(id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)


def _alternatives(markers: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(markers, key=lambda marker: (-len(marker), marker))
    # An empty vocabulary of markers must match nowhere rather than everywhere.
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if markers else r"((?!))")
