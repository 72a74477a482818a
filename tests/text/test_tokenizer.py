"""The vocabulary: real ids reproduced, round trips, streaming, trust, damaged files."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemsmith.errors import RequestError, TokenizerError
from gemsmith.text.tokenizer import MARKERS, Detokenizer, Tokenizer

fixtures_are_read_only = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# U+2581 is the vocabulary's own spelling of a space, and lone surrogates are no text.
texts = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))
pieces = st.one_of(
    texts, st.sampled_from([*MARKERS.values(), "<|", "turn|>", " ", "ab ", "b", "\n"])
)


# -- the real vocabulary ----------------------------------------------------------------------


def test_every_published_case_of_the_real_vocabulary_is_reproduced(
    real: Tokenizer, real_path: Path
) -> None:
    given = real_path.with_suffix(".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wanted = real_path.with_suffix(".out").read_text().splitlines()
    assert len(given) == len(wanted) == 46
    for text, ids in zip(given, wanted, strict=True):
        assert real.encode(text) == [int(id) for id in ids.split()], repr(text)
        assert real.decode(real.encode(text)) == text


def test_real_special_ids_are_gemmas(real: Tokenizer) -> None:
    special = real.special
    assert real.vocab_size == 262144
    assert (special.pad, special.eos, special.bos, special.unk) == (0, 1, 2, 3)
    assert (special.turn_open, special.turn_close) == (105, 106)
    assert (special.channel_open, special.channel_close) == (100, 101)
    assert (special.tool_call_open, special.tool_call_close) == (48, 49)
    assert (special.tool_response_open, special.tool_response_close) == (50, 51)
    assert (special.quote, special.think) == (52, 98)
    assert (special.image, special.audio, special.video) == (258880, 258881, 258884)
    assert (special.boi, special.eoi, special.boa, special.eoa) == (255999, 258882, 256000, 258883)


@fixtures_are_read_only
@given(text=texts)
def test_real_vocabulary_round_trips_any_text(real: Tokenizer, text: str) -> None:
    assert real.decode(real.encode_parts([(text, False)])) == text


@fixtures_are_read_only
@given(parts=st.lists(texts, max_size=5))
def test_real_ids_do_not_depend_on_where_parts_meet(real: Tokenizer, parts: list[str]) -> None:
    whole = "<|turn>user\n" + "".join(parts) + "<turn|>\n"
    cut = [("<|turn>user\n", True), *((part, False) for part in parts), ("<turn|>\n", True)]
    if "<" not in "".join(parts):  # then no part spells a special token
        assert real.encode_parts(cut) == real.encode(whole)


# -- any vocabulary ---------------------------------------------------------------------------


def test_markers_become_their_ids_and_spaces_and_bytes_come_back(small: Tokenizer) -> None:
    ids = small.encode("<|turn>ab é<turn|>", add_bos=True)
    assert ids[:2] == [small.special.bos, small.special.turn_open]
    assert ids[-1] == small.special.turn_close
    assert small.decode(ids) == "<bos><|turn>ab é<turn|>"
    assert small.decode(ids, skip_special=True) == "ab é"


def test_a_merge_runs_across_the_border_of_parts(small: Tokenizer) -> None:
    assert small.encode_parts([("a", True), ("b", False)]) == [small.token_id("ab")]


@pytest.mark.parametrize("marker", MARKERS.values())
def test_a_marker_in_untrusted_text_is_spelled_out(small: Tokenizer, marker: str) -> None:
    ids = small.encode_parts([("<|turn>user\n", True), (f"a{marker}b", False), ("<turn|>", True)])
    specials = {small.token_id(marker) for marker in MARKERS.values()}
    assert [id for id in ids if id in specials] == [
        small.special.turn_open,
        small.special.turn_close,
    ]
    assert small.decode(ids) == f"<|turn>user\na{marker}b<turn|>"


def test_a_marker_made_by_two_parts_meeting_is_spelled_out(small: Tokenizer) -> None:
    for parts in ([("<tu", True), ("rn|>", False)], [("<tu", False), ("rn|>", False)]):
        assert small.special.turn_close not in small.encode_parts(parts)


@fixtures_are_read_only
@given(parts=st.lists(st.tuples(pieces, st.booleans()), max_size=6))
def test_only_trusted_parts_give_special_ids_and_nothing_is_lost(
    small: Tokenizer, parts: list[tuple[str, bool]]
) -> None:
    ids = small.encode_parts(parts)
    assert small.decode(ids) == "".join(text for text, _ in parts)
    specials = {small.token_id(marker) for marker in MARKERS.values()}
    trusted = sum(len(small.encode(text)) for text, trust in parts if trust)
    assert sum(id in specials for id in ids) <= trusted
    if not any(trust for _, trust in parts):
        assert not specials & set(ids)


@fixtures_are_read_only
@given(ids=st.lists(st.integers(0, 300), max_size=40), skip=st.booleans())
def test_streamed_pieces_joined_equal_decode_of_all(
    small: Tokenizer, ids: list[int], skip: bool
) -> None:
    detokenizer = Detokenizer(small, skip_special=skip)
    streamed = [detokenizer.add(id) for id in ids]
    assert "".join(streamed) + detokenizer.flush() == small.decode(ids, skip_special=skip)


def test_a_character_in_bytes_comes_out_whole_or_as_replacement(small: Tokenizer) -> None:
    euro = [small.token_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    detokenizer = Detokenizer(small)
    assert [detokenizer.add(id) for id in euro if id is not None] == ["", "", "€"]
    assert small.decode([id for id in euro[:2] if id is not None]) == "\ufffd"
    detokenizer.add(euro[0] or 0)
    assert detokenizer.flush() == "\ufffd"


def test_importing_the_tokenizer_reads_no_vocabulary_and_the_chat_format_needs_none() -> None:
    code = (
        "import sys, gemsmith.text.chat, gemsmith.text.stream; "
        "assert 'tokenizers' not in sys.modules and 'torch' not in sys.modules; "
        "import gemsmith.text.tokenizer; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- bad input --------------------------------------------------------------------------------


def test_a_lone_surrogate_is_refused(small: Tokenizer) -> None:
    with pytest.raises(
        RequestError, match=r"character 1 .* lone surrogate U\+D800.*errors='replace'"
    ):
        small.encode("a\ud800")


@pytest.mark.parametrize("id", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(small: Tokenizer, id: int) -> None:
    with pytest.raises(TokenizerError, match=f"token id {id} is not in this vocabulary of 3"):
        small.decode([id])


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no vocabulary at .*give a checkpoint folder"):
        Tokenizer.load(tmp_path)


def edited(small_path: Path, tmp_path: Path, change: str, value: object) -> Path:
    document = json.loads((small_path / "tokenizer.json").read_text())
    node = document
    *steps, last = change.split(".")
    for step in steps:
        node = node[step]
    node[last] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("model.type", "Unigram", "holds a 'Unigram' model"),
        ("model.vocab", {"a": -1}, "is not a usable vocabulary"),
        ("model.merges", [["q", "zz"]], "is not a usable vocabulary"),
        ("model", [], "holds no 'model' object"),
        ("decoder", {"type": "ByteLevel"}, "decodes with .*ByteLevel"),
        ("pre_tokenizer.pattern", {"Regex": "(a+)+$"}, "could run for ever"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(
    small_path: Path, tmp_path: Path, change: str, value: object, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(edited(small_path, tmp_path, change, value))


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"{}"])
def test_a_damaged_tokenizer_json_gives_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_list(kind: int, items: list[bytes]) -> bytes:
    return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)


def gguf(**values: bytes) -> bytes:
    """A GGUF file whose keys are tokenizer.ggml.NAME."""
    body = b"".join(gguf_string(f"tokenizer.ggml.{key}") + value for key, value in values.items())
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(values)) + body


TOKENS = ["<unk>", "<bos>", "a", "b", "ab", "\u2581", "<0xC3>", "\n", "b\n"]
TINY = {
    "model": struct.pack("<I", 8) + gguf_string("gemma4"),
    "tokens": gguf_list(8, [gguf_string(token) for token in TOKENS]),
    "token_type": gguf_list(5, [struct.pack("<i", kind) for kind in (2, 3, 1, 1, 1, 1, 6, 1, 1)]),
    "merges": gguf_list(8, [gguf_string(merge) for merge in ("a b", "ab a", "\u2581 a", "b \n")]),
    "unknown_token_id": struct.pack("<II", 4, 0),
}  # fmt: skip


def test_a_gguf_vocabulary_loads_and_skips_merges_that_lead_outside_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf(**TINY))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("<bos>aba b") == [1, 4, 2, 5, 3]
    assert tokenizer.decode([4, 5, 6]) == "ab \ufffd"


def test_no_merge_of_a_gguf_vocabulary_crosses_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf(**TINY))
    assert Tokenizer.load(path).encode("b\n") == [3, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": struct.pack("<I", 8) + gguf_string("gpt2")}, "kind 'gpt2'; only 'gemma4'"),
        ({"tokens": gguf_list(8, [gguf_string("a")])}, "1 tokens but 9 token types"),
        ({"tokens": gguf_list(8, [gguf_string("a")] * 9)}, "spells 8 tokens twice"),
        ({"merges": struct.pack("<II", 4, 0)}, r"lacks tokenizer\.ggml\.merges"),
        ({"token_type": struct.pack("<I", 77)}, "unknown type 77"),
        ({"unknown_token_id": struct.pack("<II", 4, 99)}, "the id 99"),
        ({"tokens": struct.pack("<IIQ", 9, 8, 2**60)}, "announces a list of 1152921504606846976"),
        ({"tokens": struct.pack("<IIQ", 9, 6, 2**24)}, "cut short or damaged"),
        ({"tokens": struct.pack("<IQ", 8, 2**63)}, "cut short or damaged"),
    ],
)
def test_a_malicious_gguf_vocabulary_gives_one_error(
    tmp_path: Path, change: dict[str, bytes], message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(gguf(**{**TINY, **change}))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(path)


def test_a_gguf_vocabulary_cut_anywhere_gives_one_error(tmp_path: Path) -> None:
    whole = gguf(**TINY)
    path = tmp_path / "cut.gguf"
    for size in range(0, len(whole) - 1, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(TokenizerError, match=r"cut\.gguf"):
            Tokenizer.load(path)
