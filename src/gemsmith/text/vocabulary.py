"""Files that hold a vocabulary, and the vocabulary in the `tokenizers` library.

Reads a `tokenizer.json` or the key-value block of a GGUF file, strictly: whatever is damaged, too
large or not Gemma's kind is one TokenizerError. A large vocabulary is compiled once (`compact`)
where it is Gemma's to the letter and the C++ extension is there; `Reference` does the rest and says
what is right. `tokenizers` is imported only then. Encoding and trust are `tokenizer`'s business.

Sources: tokenizer.json of google/gemma-4; ggml-org/llama.cpp PR 21343 (newline runs).
"""

import hashlib
import json
import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from gemsmith.errors import TokenizerError
from gemsmith.text import compact
from gemsmith.text.compact import CompactVocabulary, Entries

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
"""How the vocabulary spells a space."""

MAX_FILE_BYTES = 256 * 2**20
"""Largest tokenizer.json read; Gemma 4's is about 32 MiB."""
MAX_TOKENS = 4 * 2**20
"""Most tokens, and a quarter of the most merges, a vocabulary may claim; Gemma 4 has 262144."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


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


class Vocabulary(Protocol):
    """What a tokenizer needs of its vocabulary: `tokenizers`' or a compiled one."""

    size: int
    """Number of ids, special ones included."""
    markers: dict[str, int]
    """Ids of the tokens that only trusted text may hold."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, markers in it spelled out as ordinary characters."""
        ...

    def decode(self, ids: Iterable[int]) -> bytes | None:
        """The bytes that ids stand for; None if one is outside the vocabulary."""
        ...

    def token_id(self, token: str) -> int | None: ...

    def token(self, id: int) -> str | None: ...


def read(path: Path) -> "tokenizers.Tokenizer | CompactVocabulary":
    """The vocabulary of a tokenizer.json or .gguf file, compiled where it can be.

    Raises:
      TokenizerError: a file that is damaged, too large or not Gemma's kind.
    """
    source = compact.look_at(path)
    found = compact.find(source) if source else None
    if found:
        return found
    return (_read_gguf if path.suffix == ".gguf" else _read_json)(path, source)


# -- the reference ----------------------------------------------------------------------------


class Reference:
    """A vocabulary in the `tokenizers` library."""

    def __init__(self, core: "tokenizers.Tokenizer") -> None:
        self.size: int = core.get_vocab_size(with_added_tokens=True)
        added = core.get_added_tokens_decoder()
        self.markers = {token.content: id for id, token in added.items() if token.special}
        # A marker the file does not list as special must be out of a user's reach too.
        for marker in MARKERS.values():
            id = core.token_to_id(marker)
            if id is not None:
                self.markers[marker] = id
        self._plain = _without_markers(core, added.values(), self.markers)
        self._pieces: dict[int, bytes] = {}
        self.token_id, self._id_to_token = core.token_to_id, core.id_to_token

    def encode(self, text: str) -> list[int]:
        text.encode()  # a lone surrogate is told as everywhere in Python
        return self._plain.encode(text, add_special_tokens=False).ids

    def token(self, id: int) -> str | None:
        return self._id_to_token(id) if 0 <= id < self.size else None

    def decode(self, ids: Iterable[int]) -> bytes | None:
        pieces = [self._piece(id) for id in ids]
        return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)

    def _piece(self, id: int) -> bytes | None:
        piece = self._pieces.get(id)
        if piece is None:
            token = self.token(id)
            if token is None:
                return None
            byte = _BYTE_TOKEN.fullmatch(token)
            piece = bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
            self._pieces[id] = piece
        return piece


def _without_markers(
    core: "tokenizers.Tokenizer",
    added: "Iterable[tokenizers.AddedToken]",
    markers: dict[str, int],
) -> "tokenizers.Tokenizer":
    """The same model (shared, not copied) that spells special markers out as text."""
    import tokenizers

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


def _read_json(
    path: Path, source: compact.Source | None
) -> "tokenizers.Tokenizer | CompactVocabulary":
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {size} bytes; a vocabulary file may have {MAX_FILE_BYTES} at most"
        )
    try:
        content = path.read_bytes()
        text = content.decode()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not readable JSON: {_first_line(error)}") from None

    document = cache(lambda: _parsed(text, path))
    if source:
        digest = hashlib.sha256(content).digest()
        compiled = compact.obtain(source, digest, lambda: _entries_of_json(document()))
        if compiled:
            return compiled
    document()
    import tokenizers

    return _guarded(lambda: tokenizers.Tokenizer.from_str(text), path)


class _Repeated(dict[str, Any]):
    """A JSON object that gives a key twice; which of the two counts is anyone's guess."""


def _parsed(text: str, path: Path) -> dict[str, Any]:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        return made if len(made) == len(pairs) else _Repeated(made)

    try:
        document = json.loads(text, object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not readable JSON: {_first_line(error)}") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise TokenizerError(f"{path} is not a tokenizer.json: it holds no 'model' object")
    kind = document["model"].get("type", "BPE")
    if kind != "BPE":
        raise TokenizerError(f"{path} holds a {kind!r} model; Gemma 4 vocabularies are 'BPE'")
    _check_steps(document, path)
    return document


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


# What of a tokenizer.json can be compiled: exactly this, beside the decoder above.
_KNOWN = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
    "post_processor", "decoder", "model",
}  # fmt: skip
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_LINES = {"type": "Split", "pattern": {"Regex": "\n+"}, "behavior": "Isolated", "invert": False}
# Spaces are gone when it looks for them, so this splits nothing.
_NO_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_MODEL: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": True,
    "ignore_merges": False,
}
_ADDED = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _entries_of_json(document: dict[str, Any]) -> Entries | None:
    """What to compile; None for anything that is not known to the letter."""
    model, pre_tokenizer = document["model"], document.get("pre_tokenizer")
    # With all 256 byte tokens, which a compiled vocabulary has, no text is ever unknown.
    facts = {
        k: v for k, v in model.items() if k not in ("vocab", "merges", "unk_token", "fuse_unk")
    }
    if (
        not document.keys() <= _KNOWN
        or any(document.get(key) is not None for key in ("truncation", "padding"))
        or not _same(document.get("normalizer"), _NORMALIZER)
        or not any(_same(pre_tokenizer, known) for known in (None, _LINES, _NO_SPLIT))
        or not _same({"ignore_merges": False} | facts, _MODEL)
        or any(isinstance(node, _Repeated) for node in (document, model, model.get("vocab")))
    ):
        return None
    vocab, merges = model.get("vocab"), model.get("merges")
    added = document.get("added_tokens", [])
    if not all(
        isinstance(part, kind) for part, kind in ((vocab, dict), (merges, list), (added, list))
    ):
        return None
    tokens = [""] * len(vocab)
    for token, id in vocab.items():
        if type(id) is not int or not 0 <= id < len(tokens) or tokens[id] or not token:
            return None
        tokens[id] = token
    pairs = _pairs(merges)
    specials, others = set[int](), set[int]()
    for entry in added:
        if not isinstance(entry, dict) or isinstance(entry, _Repeated):
            return None
        content, flags = entry.get("content"), [entry.get(name) for name in _ADDED]
        if (
            entry.keys() != {"id", "content", *_ADDED}
            or not isinstance(content, str)
            or type(entry["id"]) is not int
            or vocab.get(content) != entry["id"]
            or entry["id"] in specials | others
            or not all(isinstance(flag, bool) for flag in flags)
        ):
            return None
        if entry["special"]:
            specials.add(entry["id"])
        elif content in MARKERS.values():
            continue  # a marker whatever the file says
        elif any(flags):
            return None
        else:
            others.add(entry["id"])
    if pairs is None:
        return None
    return _entries(tokens, vocab, pairs, specials, others, lines=_same(pre_tokenizer, _LINES))


def _same(found: object, known: object) -> bool:
    """Equality of JSON, where 1 is not true and the order of keys does not matter."""
    return json.dumps(found, sort_keys=True) == json.dumps(known, sort_keys=True)


def _pairs(merges: list[Any]) -> list[tuple[str, str]] | None:
    """Merges as pairs, in either spelling; None if one is neither, or the spellings are mixed."""
    if merges and isinstance(merges[0], str):
        if any(not isinstance(merge, str) or merge.startswith("#version") for merge in merges):
            return None
        merges = [merge.split(" ") for merge in merges]
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        if not isinstance(merge, list) or len(merge) != 2:
            return None
        left, right = merge
        if not isinstance(left, str) or not isinstance(right, str):
            return None
        pairs.append((left, right))
    return pairs


def _entries(
    tokens: list[str],
    vocab: dict[str, int],
    pairs: list[tuple[str, str]],
    specials: Iterable[int],
    added: Iterable[int],
    *,
    lines: bool,
) -> Entries | None:
    merges: dict[tuple[int, int], int] = {}
    for left, right in pairs:
        first, second, merged = vocab.get(left), vocab.get(right), vocab.get(left + right)
        if first is None or second is None or merged is None:
            return None
        merges.pop((first, second), None)  # of a merge given twice the last counts
        merges[first, second] = merged
    markers = {*specials, *(vocab[marker] for marker in MARKERS.values() if marker in vocab)}
    return Entries(
        tokens=tokens,
        merges=merges,
        markers=sorted(markers),
        added=sorted({*added} - markers),
        lines=lines,
    )


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


def _read_gguf(
    path: Path, source: compact.Source | None
) -> "tokenizers.Tokenizer | CompactVocabulary":
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _KeyValues(data, path)
            values = reader.read("tokenizer.ggml.")
            digest = hashlib.sha256(memoryview(data)[: reader.at]).digest() if source else b""
    except (OSError, ValueError, struct.error, OverflowError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path} is not a readable GGUF file: {_first_line(error)}") from None
    parts = _GgufParts.of(values, path)
    compiled = compact.obtain(source, digest, parts.entries) if source else None
    return compiled or _guarded(parts.build, path)


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


@dataclass(frozen=True, slots=True)
class _GgufParts:
    tokens: list[str]
    types: list[Any]
    vocab: dict[str, int]
    pairs: list[tuple[str, str]]
    unknown: str

    @classmethod
    def of(cls, values: dict[str, Any], path: Path) -> Self:
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
            # A piece may itself begin with a space, never hold one further on: split after the
            # first character.
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            # Some merges lead outside the vocabulary (kekzl/imp PR 37); they can never apply.
            if cut > 0 and left in vocab and right in vocab and left + right in vocab:
                pairs.append((left, right))
        unknown_id = values.get("unknown_token_id", 3)
        if not isinstance(unknown_id, int) or not 0 <= unknown_id < len(tokens):
            raise TokenizerError(
                f"{path} gives the unknown token the id {unknown_id!r}, outside it"
            )
        return cls(tokens, types, vocab, pairs, tokens[unknown_id])

    def entries(self) -> Entries | None:
        """What to compile."""
        ids = range(len(self.tokens))
        return _entries(
            self.tokens,
            self.vocab,
            self.pairs,
            [id for id in ids if self.types[id] in (_CONTROL, _UNKNOWN)],
            [id for id in ids if self.types[id] == _USER_DEFINED],
            lines=True,
        )

    def build(self) -> "tokenizers.Tokenizer":
        """The same in the `tokenizers` library."""
        import tokenizers
        from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

        core = tokenizers.Tokenizer(
            models.BPE(
                vocab=self.vocab,
                merges=self.pairs,
                unk_token=self.unknown,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        core.normalizer = normalizers.Replace(" ", SPACE)
        core.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
        core.add_tokens(
            [
                AddedToken(token, normalized=False, special=type != _USER_DEFINED)
                for token, type in zip(self.tokens, self.types, strict=True)
                if type in (_CONTROL, _UNKNOWN, _USER_DEFINED)
            ]
        )
        return core


def _strings(values: dict[str, Any], key: str, path: Path) -> list[str]:
    value = values.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TokenizerError(f"{path} lacks tokenizer.ggml.{key}, a list of strings")
    return value


def _guarded(build: Any, path: Path) -> "tokenizers.Tokenizer":
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
