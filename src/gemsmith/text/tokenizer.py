"""The vocabulary: text to token ids and back, whole or piece by piece.

Reads a `tokenizer.json` or the vocabulary inside a GGUF file. What a tokenizer is not: it knows no
chat format (see `chat`) and never adds a beginning-of-text token unless asked, because the chat
format writes its own.

Gemma 4's vocabulary is byte-pair encoding over characters with U+2581 for a space, runs of newlines
kept apart, and 256 byte tokens for characters it lacks. A text that holds U+2581 itself comes back
with a space in its place: the vocabulary cannot tell the two apart. Every other text round-trips.

Sources: tokenizer.json of google/gemma-4; ggml-org/llama.cpp PR 21343 (newline runs).
"""

import codecs
import json
import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from gemsmith.errors import RequestError, TokenizerError

SPACE = "\u2581"
"""How the vocabulary spells a space."""

MAX_FILE_BYTES = 256 * 2**20
"""Largest tokenizer.json read; Gemma 4's is about 32 MiB."""
MAX_TOKENS = 4 * 2**20
"""Most tokens, and a quarter of the most merges, a vocabulary may claim; Gemma 4 has 262144."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


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


MARKERS: dict[str, str] = {
    "pad": "<pad>",
    "eos": "<eos>",
    "bos": "<bos>",
    "unk": "<unk>",
    "turn_open": "<|turn>",
    "turn_close": "<turn|>",
    "channel_open": "<|channel>",
    "channel_close": "<channel|>",
    "tool_open": "<|tool>",
    "tool_close": "<tool|>",
    "tool_call_open": "<|tool_call>",
    "tool_call_close": "<tool_call|>",
    "tool_response_open": "<|tool_response>",
    "tool_response_close": "<tool_response|>",
    "quote": '<|"|>',
    "think": "<|think|>",
    "image": "<|image|>",
    "audio": "<|audio|>",
    "video": "<|video|>",
    "boi": "<|image>",
    "eoi": "<image|>",
    "boa": "<|audio>",
    "eoa": "<audio|>",
}
"""Spelling of every role of `SpecialIds`."""


class Tokenizer:
    """A loaded vocabulary. Safe to share between threads."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        """Wrap a `tokenizers` object whose decoder is Gemma's (spaces from U+2581, byte tokens)."""
        self._core = core
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        """Number of ids, special ones included."""
        added = core.get_added_tokens_decoder()
        markers = {token.content: id for id, token in added.items() if token.special}
        # A marker the file does not list as special must be out of a user's reach too.
        for marker in MARKERS.values():
            id = core.token_to_id(marker)
            if id is not None:
                markers[marker] = id
        self._markers = markers
        self._plain = _without_markers(core, added.values(), markers)
        self._marker_pattern = _alternatives(markers)
        self._pieces: dict[int, bytes] = {}
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
        core = _read_gguf(path) if path.suffix == ".gguf" else _read_json(path)
        return cls(core)

    def token_id(self, marker: str) -> int | None:
        """Id of one vocabulary entry by its exact spelling, such as `<turn|>`; None if absent."""
        return self._core.token_to_id(marker)

    def token(self, id: int) -> str:
        """Spelling of one id as the vocabulary stores it (spaces as U+2581).

        Raises:
          TokenizerError: the id lies outside the vocabulary.
        """
        token = self._core.id_to_token(id) if 0 <= id < self.vocab_size else None
        if token is None:
            raise TokenizerError(
                f"token id {id} is not in this vocabulary of {self.vocab_size} entries; "
                "the model and the tokenizer may belong to different checkpoints"
            )
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
        hidden = self._special_ids() if skip_special else frozenset()
        return b"".join(self.piece(id) for id in ids if id not in hidden).decode(errors="replace")

    def piece(self, id: int) -> bytes:
        """The bytes one id stands for; a byte token is one byte, maybe a part of a character.

        Raises:
          TokenizerError: the id lies outside the vocabulary.
        """
        piece = self._pieces.get(id)
        if piece is None:
            token = self.token(id)
            byte = _BYTE_TOKEN.fullmatch(token)
            piece = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
            self._pieces[id] = piece
        return piece

    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._markers.values())

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"character {error.start} of the text is the lone surrogate "
                f"U+{ord(text[error.start]):04X}, which no UTF-8 text holds; decode the input with "
                "errors='replace' first"
            ) from None
        return self._plain.encode(text, add_special_tokens=False).ids


class Detokenizer:
    """Turns ids into text one at a time; the pieces joined equal `Tokenizer.decode` of all ids.

    A character spelled in byte tokens is held back until its last byte has come.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer._special_ids() if skip_special else frozenset()
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


def _without_markers(
    core: tokenizers.Tokenizer, added: Iterable[AddedToken], markers: dict[str, int]
) -> tokenizers.Tokenizer:
    """The same model (shared, not copied) that spells special markers out as text."""
    plain = tokenizers.Tokenizer(core.model)
    if core.normalizer is not None:
        plain.normalizer = core.normalizer
    if core.pre_tokenizer is not None:
        plain.pre_tokenizer = core.pre_tokenizer
    plain.add_tokens([token for token in added if token.content not in markers])
    for token in added:
        id = core.token_to_id(token.content)
        if token.content not in markers and plain.token_to_id(token.content) != id:
            raise TokenizerError(
                f"the added token {token.content!r} has the id {id}, outside the vocabulary of the "
                "model; list it as special or put it into the vocabulary"
            )
    return plain


# -- tokenizer.json ---------------------------------------------------------------------------


def _read_json(path: Path) -> tokenizers.Tokenizer:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {size} bytes; a vocabulary file may have {MAX_FILE_BYTES} at most"
        )
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not readable JSON: {_first_line(error)}") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise TokenizerError(f"{path} is not a tokenizer.json: it holds no 'model' object")
    kind = document["model"].get("type", "BPE")
    if kind != "BPE":
        raise TokenizerError(f"{path} holds a {kind!r} model; Gemma 4 vocabularies are 'BPE'")
    _check_steps(document, path)
    return _guarded(lambda: tokenizers.Tokenizer.from_str(text), path)


_DECODER = (
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)


def _check_steps(document: dict[str, Any], path: Path) -> None:
    """Refuse decoders that are not Gemma's and patterns that could run for ever."""
    decoder = document.get("decoder")
    steps = decoder.get("decoders") if isinstance(decoder, dict) else None
    for step in steps if isinstance(steps, list) else [decoder]:
        if step not in _DECODER:
            raise TokenizerError(
                f"{path} decodes with {str(step)[:80]}; a Gemma 4 vocabulary decodes with "
                "Replace (U+2581 by a space), ByteFallback and Fuse"
            )
    pending: list[Any] = [document.get("normalizer"), document.get("pre_tokenizer")]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += node
        elif isinstance(node, dict):
            pattern = node.get("Regex")
            if isinstance(pattern, str) and (len(pattern) > 512 or _REPEATED_GROUP.search(pattern)):
                raise TokenizerError(
                    f"{path} splits text with the pattern {pattern[:60]!r}, which repeats a group "
                    "and could run for ever on some texts; use a pattern without ')*', ')+' or '){'"
                )
            pending += node.values()


# -- GGUF -------------------------------------------------------------------------------------
# The gguf package makes one object per array element, half a minute for this vocabulary, and trusts
# every count in the file. Only the key-value block at the head is needed, so it is read here.

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def _read_gguf(path: Path) -> tokenizers.Tokenizer:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values = _KeyValues(data, path).read("tokenizer.ggml.")
    except (OSError, ValueError, struct.error, OverflowError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path} is not a readable GGUF file: {_first_line(error)}") from None
    return _guarded(lambda: _build_bpe(values, path), path)


class _KeyValues:
    """Reader of the key-value block; every length is checked against what the file still holds."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def read(self, prefix: str) -> dict[str, Any]:
        """Values of all keys that start with `prefix`, the prefix taken off."""
        magic, version, _, num_keys = struct.unpack("<4sIQQ", self.take(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise TokenizerError(
                f"{self.path} begins with {magic!r}, version {version}; GGUF 2 or 3 is expected"
            )
        values: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            value = self.value(self.scalar("I"), depth=0)
            if key.startswith(prefix):
                values[key.removeprefix(prefix)] = value
        return values

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self.data) - self.at:
            raise TokenizerError(
                f"{self.path} is cut short or damaged: {num_bytes} bytes are announced at byte "
                f"{self.at}, {len(self.data) - self.at} are left; fetch the file again"
            )
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(int.from_bytes(self.take(8), "little")).decode()

    def value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise TokenizerError(f"{self.path} holds a value of the unknown type {kind}")
        item_kind, count = self.scalar("I"), self.scalar("Q")
        if count > 4 * MAX_TOKENS:
            raise TokenizerError(
                f"{self.path} announces a list of {count} entries; {4 * MAX_TOKENS} is the most"
            )
        if item_kind in _SCALARS:
            code = _SCALARS[item_kind]
            raw = self.take(count * struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", raw))
        if item_kind == _STRING:
            return [self.string() for _ in range(count)]
        return [self.value(item_kind, depth + 1) for _ in range(count)]


def _build_bpe(values: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    kind = values.get("model")
    if kind != "gemma4":
        raise TokenizerError(
            f"{path} holds a vocabulary of kind {kind!r}; only 'gemma4' is read from GGUF. "
            "Use the checkpoint's tokenizer.json instead"
        )
    tokens, merges = _strings(values, "tokens", path), _strings(values, "merges", path)
    types = values.get("token_type")
    if not isinstance(types, list):
        raise TokenizerError(f"{path} lacks tokenizer.ggml.token_type")
    if len(types) != len(tokens) or not 0 < len(tokens) <= MAX_TOKENS:
        raise TokenizerError(f"{path} has {len(tokens)} tokens but {len(types)} token types")
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise TokenizerError(f"{path} spells {len(tokens) - len(vocab)} tokens twice")
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        # A piece may itself begin with a space, never hold one further on: split after the first
        # character.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        # Some merges lead outside the vocabulary (kekzl/imp PR 37); they can never apply.
        if cut > 0 and left in vocab and right in vocab and left + right in vocab:
            pairs.append((left, right))
    unknown_id = values.get("unknown_token_id", 3)
    if not isinstance(unknown_id, int) or not 0 <= unknown_id < len(tokens):
        raise TokenizerError(f"{path} gives the unknown token the id {unknown_id!r}, outside it")
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=pairs,
            unk_token=tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Replace(" ", SPACE)
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
    core.add_tokens(
        [
            AddedToken(token, normalized=False, special=type != _USER_DEFINED)
            for token, type in zip(tokens, types, strict=True)
            if type in (_CONTROL, _UNKNOWN, _USER_DEFINED)
        ]
    )
    return core


def _strings(values: dict[str, Any], key: str, path: Path) -> list[str]:
    value = values.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TokenizerError(f"{path} lacks tokenizer.ggml.{key}, a list of strings")
    return value


def _guarded(build: Any, path: Path) -> tokenizers.Tokenizer:
    """Run a build in the tokenizers library; whatever it throws becomes one TokenizerError."""
    try:
        return build()
    except TokenizerError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its panics are BaseException, not Exception
        raise TokenizerError(f"{path} is not a usable vocabulary: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
