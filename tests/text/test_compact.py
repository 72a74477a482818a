"""The compiled vocabulary: equal to `tokenizers`, rebuilt when anything differs, never needed."""

import copy
import errno
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemsmith import pocket
from gemsmith.errors import RequestError, TokenizerError
from gemsmith.text import compact, vocabulary
from gemsmith.text.compact import CompactVocabulary
from gemsmith.text.tokenizer import MARKERS, SPACE, Tokenizer

ROOT = Path(__file__).parents[2]
POCKET = Path(next(iter(pocket.__path__))) / "checkpoint" / "tokenizer.json"
LINES, NO_SPLIT = vocabulary._LINES, vocabulary._NO_SPLIT
needs_extension = pytest.mark.skipif(
    compact._native() is None, reason="needs the C++ extension of this version"
)
Change = Callable[[dict[str, Any]], object]


def document(pre_tokenizer: object = LINES) -> dict[str, Any]:
    """pocket's tokenizer.json, made compilable: its pattern is not one of those known."""
    return json.loads(POCKET.read_text(encoding="utf-8")) | {
        "pre_tokenizer": copy.deepcopy(pre_tokenizer)
    }


def add_tokens(made: dict[str, Any], *tokens: str) -> None:
    """Puts in tokens that are cut out of a text first."""
    for token in tokens:
        id = made["model"]["vocab"].setdefault(token, len(made["model"]["vocab"]))
        flags = dict.fromkeys(vocabulary._ADDED, False)
        made["added_tokens"].append({"id": id, "content": token, **flags})


def add_merges(made: dict[str, Any], *merges: tuple[str, str]) -> None:
    for merge in merges:
        made["model"]["vocab"].setdefault("".join(merge), len(made["model"]["vocab"]))
        made["model"]["merges"].append(list(merge))


def reference(path: Path) -> Tokenizer:
    return Tokenizer(vocabulary._read_json(path, None))


def is_compiled(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer._core, CompactVocabulary)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for vocabularies of any size and age."""
    monkeypatch.setenv("GEMSMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compact, "SMALLEST", 0)
    monkeypatch.setattr(compact, "SETTLED", -60.0)
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document()), encoding="utf-8")
    return path


# -- equal to tokenizers ----------------------------------------------------------------------


def _plain_lines(made: dict[str, Any]) -> None:
    pass


def _one_word(made: dict[str, Any]) -> None:
    made["pre_tokenizer"] = None
    add_merges(made, ("\n", "\n"), ("a", "\n"), (">", SPACE), (">" + SPACE, "a"))


def _no_split_and_added(made: dict[str, Any]) -> None:
    made["pre_tokenizer"] = NO_SPLIT
    add_tokens(made, "\n\n", "\n\n\n", SPACE * 2, "  ", "<h1>", "<h", "é", "<turn|>x")
    made["model"]["merges"] = [" ".join(merge) for merge in made["model"]["merges"]]


def _odd_merges(made: dict[str, Any]) -> None:
    merges = made["model"]["merges"]
    merges += [merges[0], merges[7]]  # given twice: the last counts
    add_merges(made, ("<0xE2>", "<0x96>"), ("<0xC3>", SPACE), ("<", "0"), ("<0", "x"))


KINDS: dict[str, Change] = {
    "lines": _plain_lines,
    "one word": _one_word,
    "added tokens": _no_split_and_added,
    "odd merges": _odd_merges,
}


@pytest.fixture(scope="session", params=KINDS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    """A compiled vocabulary and the same in `tokenizers`."""
    made = document()
    KINDS[request.param](made)
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    entries = vocabulary._entries_of_json(json.loads(path.read_text(encoding="utf-8")))
    block = entries and compact.compile_entries(entries, bytes(32))
    if block is None:
        assert compact._native() is None
        pytest.skip("needs the C++ extension")
    return Tokenizer(CompactVocabulary(block)), reference(path)


RUNS = (" ", "\n", "\t", SPACE, ">", "> ", "</", "a", "\0", "<h1>", "<h", "<0x41>", "é", "e\u0301")
RUNS += ("😀", "\u200d", "\r\n", "<turn|>", "th", " the", "中", "\u2582", "0")
pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.builds(str.__mul__, st.sampled_from(RUNS), st.integers(1, 40)),
    st.sampled_from([*MARKERS.values(), "turn|>", "<|"]),
    st.text("etaoin shrdlu\n.<>", max_size=30),
)
same_for_any = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@same_for_any
@given(parts=st.lists(st.tuples(pieces, st.booleans()), max_size=8))
def test_any_text_has_the_ids_that_tokenizers_gives(
    pair: tuple[Tokenizer, Tokenizer], parts: list[tuple[str, bool]]
) -> None:
    mine, theirs = pair
    text = "".join(text for text, _ in parts)
    assert mine.encode_parts([(text, False)]) == theirs.encode_parts([(text, False)])
    assert mine.encode(text, add_bos=True) == theirs.encode(text, add_bos=True)
    ids = mine.encode_parts(parts)
    assert ids == theirs.encode_parts(parts)
    assert mine.decode(ids, skip_special=True) == theirs.decode(ids, skip_special=True)


def test_every_token_is_spelled_found_and_decoded_as_by_tokenizers(
    pair: tuple[Tokenizer, Tokenizer],
) -> None:
    mine, theirs = pair
    assert (mine.vocab_size, mine.special) == (theirs.vocab_size, theirs.special)
    assert mine._markers == theirs._markers
    for id in range(mine.vocab_size):
        token = theirs.token(id)
        assert (mine.token(id), mine.token_id(token)) == (token, id)
        assert mine.piece(id) == theirs.piece(id)
    for absent in ("", "no such token", "\ud800"):
        assert mine.token_id(absent) is None
    ids = [random.Random(0).randrange(mine.vocab_size) for _ in range(5000)]
    assert mine.decode(ids) == theirs.decode(ids)
    assert mine.decode(iter(ids)) == mine.decode(ids)


@pytest.mark.parametrize("id", [-1, 10**6, 2**32, 2**64])
def test_an_id_outside_is_refused_alike(pair: tuple[Tokenizer, Tokenizer], id: int) -> None:
    told = pytest.raises(TokenizerError, match=f"token id {id} is not in this vocabulary of 4")
    for tokenizer in pair:
        for use in (tokenizer.piece, tokenizer.token):
            with told:
                use(id)
        with told:
            tokenizer.decode([5, id])


def test_a_lone_surrogate_is_refused_alike(pair: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in pair:
        with pytest.raises(RequestError, match=r"character 1 .* lone surrogate U\+D800"):
            tokenizer.encode("a\ud800")


@pytest.mark.parametrize("letter", ["a", " ", "\n", "<h1>", "th", "e t", "😀"])
def test_a_long_run_ends_and_is_the_same(pair: tuple[Tokenizer, Tokenizer], letter: str) -> None:
    mine, theirs = pair
    text = letter * (60_000 // len(letter))
    assert mine.encode(text) == theirs.encode(text)


def test_a_long_word_of_many_merges_ends_and_is_the_same(
    pair: tuple[Tokenizer, Tokenizer],
) -> None:
    mine, theirs = pair
    text = "".join(random.Random(0).choices("etaoinshrdlu", k=60_000))
    assert mine.encode(text) == theirs.encode(text)


def test_threads_share_one_vocabulary(pair: tuple[Tokenizer, Tokenizer]) -> None:
    mine, theirs = pair
    texts = [f"thread {i} counts to {i} " * 50 for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(mine.encode, texts)) == list(map(theirs.encode, texts))


def test_a_compiled_vocabulary_can_be_sent_to_another_process(
    pair: tuple[Tokenizer, Tokenizer],
) -> None:
    other = pickle.loads(pickle.dumps(pair[0]))
    assert other.encode("the same <turn|>") == pair[0].encode("the same <turn|>")


@needs_extension
def test_the_real_vocabulary_is_compiled_and_equal(
    real: Tokenizer, real_reference: Tokenizer
) -> None:
    assert is_compiled(real)
    assert real._markers == real_reference._markers
    choose = random.Random(0)
    tokens = [real_reference.token(id) for id in range(real.vocab_size)]
    for id in range(0, real.vocab_size, 7):
        assert (real.token(id), real.token_id(tokens[id])) == (tokens[id], id)
        assert real.piece(id) == real_reference.piece(id)
    for _ in range(4000):
        parts = [choose.choice(tokens)[: choose.randint(1, 20)] for _ in range(6)]
        parts += [choose.choice(RUNS) * choose.randint(1, 40), chr(choose.randrange(0xD800))]
        choose.shuffle(parts)
        text = "".join(parts).replace(SPACE, choose.choice((" ", SPACE)))
        found = real.encode_parts([(text, False)])
        assert found == real_reference.encode_parts([(text, False)]), repr(text)
        assert real.decode(found) == text.replace(SPACE, " ")


# -- kept on disk -----------------------------------------------------------------------------

SAMPLE = "the <turn|> user asked:\n\n  what is é?"


@needs_extension
def test_the_second_start_reads_the_source_no_more(
    cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Tokenizer.load(path).encode(SAMPLE)
    assert ids == reference(path).encode(SAMPLE)
    assert sorted(p.suffix for p in cache.rglob("*.*")) == [".bin", ".json"]
    monkeypatch.setattr(vocabulary, "_read_json", None)
    again = Tokenizer.load(path)
    assert is_compiled(again)
    assert again.encode(SAMPLE) == ids


@needs_extension
def test_one_block_serves_all_copies_of_a_file_and_a_file_that_was_only_touched(
    cache: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tokenizer.load(path)
    second = tmp_path / "second.json"
    shutil.copy(path, second)
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(vocabulary, "_parsed", None)
    assert is_compiled(Tokenizer.load(second))
    assert is_compiled(Tokenizer.load(path))
    assert len([*cache.rglob("*.bin")]) == 1


@needs_extension
@pytest.mark.usefixtures("cache")
def test_a_source_that_changes_is_compiled_again(path: Path) -> None:
    before = path.stat()
    old = Tokenizer.load(path).token_id("the")
    made = document()
    vocab = made["model"]["vocab"]
    vocab["the"], vocab["he"] = vocab["he"], vocab["the"]
    path.write_text(json.dumps(made), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert Tokenizer.load(path).token_id("he") == old


@needs_extension
def test_a_file_just_written_is_not_noted(
    cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "SETTLED", 60.0)
    Tokenizer.load(path)
    assert [p.suffix for p in cache.rglob("*.*")] == [".bin"]
    assert is_compiled(Tokenizer.load(path))


def cut(block: bytearray) -> None:
    del block[len(block) // 2 :]


def flip(at: int) -> Callable[[bytearray], None]:
    def change(block: bytearray) -> None:
        block[at] ^= 1

    return change


def turn_bytes(block: bytearray) -> None:
    """As a machine of the other byte order would have written the numbers at the head."""
    block[8:96] = b"".join(block[at : at + 4][::-1] for at in range(8, 96, 4))


@needs_extension
@pytest.mark.parametrize(
    "damage",
    [
        cut, bytearray.clear, turn_bytes, lambda block: block.append(0),
        *(flip(at) for at in (0, 8, 12, 16, 24, 40, 64, 100, 300, 5000, 70_000, -1)),
    ],
)  # fmt: skip
def test_a_damaged_block_is_made_again(
    cache: Path, path: Path, damage: Callable[[bytearray], None]
) -> None:
    ids = Tokenizer.load(path).encode(SAMPLE)
    [file] = cache.rglob("*.bin")
    good = file.read_bytes()
    bad = bytearray(good)
    damage(bad)
    file.write_bytes(bad)
    again = Tokenizer.load(path)
    assert is_compiled(again)
    assert again.encode(SAMPLE) == ids
    assert file.read_bytes() == good


@needs_extension
def test_the_block_of_another_source_is_not_taken(cache: Path, path: Path) -> None:
    ids = Tokenizer.load(path).encode(SAMPLE)
    [file] = cache.rglob("*.bin")
    entries = vocabulary._entries_of_json(document(None))
    assert entries is not None
    file.write_bytes(compact.compile_entries(entries, bytes(32)) or b"")
    assert Tokenizer.load(path).encode(SAMPLE) == ids


@needs_extension
@pytest.mark.parametrize(
    "note",
    [b"", b"[", b"[" * 4000, b"\xff", b"null", b"[]", b"{}", b'{"state": 1, "digest": 2}',
     b'{"state": STATE, "digest": "zz"}', b'{"state": STATE, "digest": 7}',
     b'{"state": STATE, "digest": "../../other"}', b'{"state": STATE, "digest": "00"}'],
)  # fmt: skip
def test_a_damaged_note_is_written_again(cache: Path, path: Path, note: bytes) -> None:
    ids = Tokenizer.load(path).encode(SAMPLE)
    [file] = cache.rglob("*.json")
    good = file.read_bytes()
    file.write_bytes(note.replace(b"STATE", json.dumps(json.loads(good)["state"]).encode()))
    again = Tokenizer.load(path)
    assert is_compiled(again)
    assert again.encode(SAMPLE) == ids
    assert file.read_bytes() == good


@needs_extension
def test_a_made_up_block_gives_wrong_ids_at_worst(path: Path) -> None:
    entries = vocabulary._entries_of_json(document())
    assert entries is not None
    good = compact.compile_entries(entries, bytes(32)) or b""
    choose = random.Random(0)
    for _ in range(60):
        block = bytearray(good)
        for _ in range(200):
            at = choose.choice((choose.randrange(64, 1800), choose.randrange(1800, len(block))))
            block[at] = choose.randrange(256)
        head = choose.choice((0, 64))
        block[64:96] = good[64:96] if head else block[64:96]
        try:
            tokenizer = Tokenizer(CompactVocabulary(bytes(block)))
            ids = tokenizer.encode(SAMPLE * 20)
            assert all(0 <= id < tokenizer.vocab_size for id in ids)
            tokenizer.decode([id for id in ids if tokenizer._vocabulary.decode([id]) is not None])
        except ValueError as error:
            assert "no vocabulary" in str(error)  # noqa: PT017
    with pytest.raises(ValueError, match="no vocabulary"):
        CompactVocabulary(b"")


@needs_extension
def test_without_a_place_to_write_the_block_stays_in_memory(
    cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    ids = reference(path).encode(SAMPLE)
    tokenizer = Tokenizer.load(path)
    assert is_compiled(tokenizer)
    assert tokenizer.encode(SAMPLE) == ids

    cache.unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", full)
    assert Tokenizer.load(path).encode(SAMPLE) == ids
    assert [p for p in cache.rglob("*") if p.is_file()] == []

    monkeypatch.setattr(compact.hardware, "cache_folder", lambda: None)
    assert Tokenizer.load(path).encode(SAMPLE) == ids


@needs_extension
def test_starts_at_the_same_time_do_not_disturb_each_other(cache: Path, path: Path) -> None:
    ids = reference(path).encode(SAMPLE)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(Tokenizer.load, [path] * 8))
    assert all(tokenizer.encode(SAMPLE) == ids for tokenizer in loaded)
    assert sorted(p.suffix for p in cache.rglob("*.*")) == [".bin", ".json"]


@needs_extension
def test_tokenizers_is_not_imported_where_a_compiled_vocabulary_serves(
    cache: Path, path: Path
) -> None:
    Tokenizer.load(path)
    code = (
        "import sys; from pathlib import Path; from gemsmith.text import compact; "
        "compact.SMALLEST = 0; from gemsmith.text.tokenizer import Tokenizer; "
        "Tokenizer.load(Path(sys.argv[1])).encode('x'); assert 'tokenizers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, env={**os.environ})


# -- what is not compiled ---------------------------------------------------------------------


def test_without_the_extension_tokenizers_serves_and_nothing_is_written(
    cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "_native", lambda: None)
    tokenizer = Tokenizer.load(path)
    assert not is_compiled(tokenizer)
    assert tokenizer.encode(SAMPLE) == reference(path).encode(SAMPLE)
    assert not cache.exists()


def test_a_small_vocabulary_is_not_worth_it(
    cache: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "SMALLEST", 2**20)
    assert not is_compiled(Tokenizer.load(path))
    assert not cache.exists()


def _set(*steps: str | int, value: object) -> Change:
    def change(made: Any) -> None:
        for step in steps[:-1]:
            made = made[step]
        made[steps[-1]] = value

    return change


OTHER_KINDS: dict[str, Change] = {
    "a pattern of its own": _set("pre_tokenizer", "pattern", "Regex", value="[a-z]+|\\n+"),
    "lines cut otherwise": _set("pre_tokenizer", "behavior", value="MergedWithNext"),
    "no normalizer": _set("normalizer", value=None),
    "another normalizer": _set("normalizer", value={"type": "NFC"}),
    "another spelling of spaces": _set("normalizer", "content", value="_"),
    "dropout": _set("model", "dropout", value=0.5),
    "a prefix": _set("model", "continuing_subword_prefix", value=""),
    "a suffix": _set("model", "end_of_word_suffix", value=""),
    "no bytes": _set("model", "byte_fallback", value=False),
    "whole words first": _set("model", "ignore_merges", value=True),
    "truncation": _set(
        "truncation",
        value={"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    ),
    "a byte token missing": lambda made: made["model"]["vocab"].update(
        {"<0xgg>": made["model"]["vocab"].pop("<0x80>")}
    ),
    "an id left out": lambda made: made["model"]["vocab"].update(extra=10**4),
    "an empty token": lambda made: made["model"]["vocab"].update({"": 4096}),
    "a long added token": lambda made: add_tokens(made, "x" * 256),
    "an added token with options": lambda made: (
        add_tokens(made, "<h1>"),
        made["added_tokens"][-1].update(lstrip=True),
    ),
    "an added token of normalized text": lambda made: (
        add_tokens(made, "<h1>"),
        made["added_tokens"][-1].update(normalized=True),
    ),
}


@pytest.mark.parametrize("change", OTHER_KINDS.values(), ids=OTHER_KINDS.keys())
def test_another_kind_of_vocabulary_stays_with_tokenizers(
    cache: Path, path: Path, change: Change
) -> None:
    made = document()
    change(made)
    path.write_text(json.dumps(made), encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    assert not is_compiled(tokenizer)
    assert not cache.exists()


def test_a_key_given_twice_is_not_compiled(path: Path, cache: Path) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"dropout": null', '"dropout": 0.5, "dropout": null', 1))
    assert vocabulary._entries_of_json(vocabulary._parsed(path.read_text(), path)) is None


@pytest.mark.parametrize(
    "change",
    [
        _set("model", "vocab", "the", value="5"),
        _set("model", "vocab", "the", value=True),
        _set("model", "merges", 3, value=["q", "no such token"]),
        _set("model", "merges", 3, value=["o"]),
        _set("model", "merges", value=None),
        _set("model", "vocab", value=[]),
        _set("added_tokens", value={}),
        _set("added_tokens", 0, value=5),
        _set("added_tokens", 0, "id", value="0"),
        _set("added_tokens", 0, "content", value=None),
    ],
)
def test_what_tokenizers_refuses_is_refused_as_before(
    cache: Path, path: Path, change: Change
) -> None:
    made = document()
    change(made)
    path.write_text(json.dumps(made), encoding="utf-8")
    assert vocabulary._entries_of_json(made) is None
    with pytest.raises(TokenizerError, match="is not a usable vocabulary"):
        Tokenizer.load(path)
    assert not cache.exists()


def test_the_extension_refuses_parts_that_do_not_agree() -> None:
    native = compact._native()
    if native is None:
        pytest.skip("needs the C++ extension")

    def build(tokens: list[bytes], merges: list[int], offsets: list[int] | None = None) -> object:
        offsets = offsets or [len(b"".join(tokens[:i])) for i in range(len(tokens) + 1)]
        numbers = (struct.pack(f"<{len(part)}I", *part) for part in (offsets, merges))
        return native.vocabulary_build(b"".join(tokens), *numbers, b"", b"", True, bytes(32))

    tokens = [b"<0x%02X>" % byte for byte in range(256)] + [b"a", b"aa"]
    assert build(tokens, [256, 256, 257]) is not None
    assert build(tokens[1:], []) is None
    assert build([*tokens, b""], []) is None
    assert build(tokens, [256, 256, 258]) is None
    assert build(tokens, [], [*range(257), 1530, 1529, 1539]) is None
    with pytest.raises(ValueError, match="sizes do not agree"):
        build(tokens, [], [0, 5])


# -- the sanitizer ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tokenizer_runs_clean_under_sanitizers(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None or not (shutil.which("ninja") or shutil.which("make")):
        pytest.skip("no CMake here, or nothing for it to drive")
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ["-S", ROOT / "native", "-B", tmp_path, "-DGEMSMITH_SANITIZE=address,undefined"]
    configured = subprocess.run([cmake, *ninja, *options], capture_output=True, text=True)
    if configured.returncode and "CXX" in configured.stderr:
        pytest.skip("no C++ compiler here")
    assert configured.returncode == 0, configured.stderr
    build = [cmake, "--build", tmp_path, "--target", "gemsmith_check_tokenizer"]
    built = subprocess.run(build, capture_output=True, text=True)
    told = built.stdout + built.stderr
    if built.returncode and "cannot find" in told and "san" in told:
        pytest.skip("the compiler lacks the libraries of -fsanitize=address,undefined")
    assert built.returncode == 0, told
    # Looking for leaks needs ptrace, which containers may forbid.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    program = tmp_path / "gemsmith_check_tokenizer"
    ran = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 threads: as they should be" in ran.stdout
