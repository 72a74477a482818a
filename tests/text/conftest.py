"""Vocabularies for the tests: the real one where it is at hand, and a small one made here."""

import os
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from gemsmith.text import vocabulary
from gemsmith.text.tokenizer import MARKERS, Tokenizer

BESIDE = Path(__file__).parents[3] / "shared" / "data" / "gemma4-tokenizer.gguf"


@pytest.fixture(scope="session")
def real_path() -> Path:
    path = Path(os.environ.get("GEMSMITH_GEMMA4_VOCAB", BESIDE))
    if not path.is_file():
        pytest.skip("needs the Gemma 4 vocabulary: set GEMSMITH_GEMMA4_VOCAB to its .gguf file")
    return path


@pytest.fixture(scope="session")
def real(real_path: Path) -> Tokenizer:
    return Tokenizer.load(real_path)


@pytest.fixture(scope="session")
def real_reference(real_path: Path) -> Tokenizer:
    """The same in the `tokenizers` library."""
    return Tokenizer(vocabulary._read_gguf(real_path, None))


@pytest.fixture(scope="session")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary with all markers, all bytes, a few letters and two merges."""
    tokens = [*MARKERS.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", *"\nabcdefghijklmnopqrstuvwxyz<|>_", "ab", "b\u2581"]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=[("a", "b"), ("b", "\u2581")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(
        [AddedToken(marker, special=True, normalized=False) for marker in MARKERS.values()]
    )
    folder = tmp_path_factory.mktemp("vocabulary")
    core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def small(small_path: Path) -> Tokenizer:
    return Tokenizer.load(small_path)
