"""Headers of GGUF: those of the gguf package's files, configs from them, and hostile ones."""

import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.weights.gguf_files import described, small

from benchmarks import random_checkpoint, to_gguf
from gemsmith.config import PRESETS, Gemma4Config, TextConfig
from gemsmith.errors import ConfigError, GemsmithError, WeightsError
from gemsmith.weights import gguf
from gemsmith.weights.names import expected_shapes, written_key


def parse(data: bytes, size: int | None = None) -> gguf.Header:
    return gguf.parse(lambda start, stop: data[start:stop], size or len(data), "file")


def of_file(path: Path) -> gguf.Header:
    def read(start: int, stop: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    return gguf.parse(read, path.stat().st_size, str(path))


def known(config: TextConfig) -> TextConfig:
    """What a GGUF file says of a decoder."""
    table = config.vocab_size_per_layer_input if config.hidden_size_per_layer_input else 262_144
    return replace(
        config,
        model_type="gemma4_text",
        use_bidirectional_attention=None,
        vocab_size_per_layer_input=table,
    )


# -- files of the gguf package ----------------------------------------------------------------


def test_values_and_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    data = small(tmp_path / "a.gguf")
    header = parse(data)
    assert header.metadata == {
        "general.architecture": "gemma4",
        "gemma4.block_count": 2,
        "gemma4.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "gemma4.attention.sliding_window_pattern": [True, False],
    }
    assert header.tensors == {
        "token_embd.weight": ("F32", (3, 32), 384),
        "blk.0.attn_q.weight": ("Q4_0", (2, 32), 36),
        "odd": ("BF16", (5, 1), 10),
    }
    assert header.nbytes == package.GGUFReader(tmp_path / "a.gguf").data_offset


@pytest.mark.parametrize("kind", package.GGML_QUANT_SIZES, ids=lambda kind: kind.name)
def test_every_type_has_the_bytes_that_the_package_gives_it(tmp_path: Path, kind: Kind) -> None:
    size = package.GGML_QUANT_SIZES[kind][1]
    writer = package.GGUFWriter(tmp_path / "a.gguf", "gemma4")
    writer.add_tensor("a", np.zeros((3, 2 * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [tensor] = package.GGUFReader(tmp_path / "a.gguf").tensors
    shape = tuple(int(n) for n in reversed(tensor.shape))
    assert of_file(tmp_path / "a.gguf").tensors == {"a": (kind.name, shape, tensor.n_bytes)}


@pytest.mark.parametrize("size", PRESETS)
def test_every_released_size_is_recovered_from_metadata_and_shapes(
    tmp_path: Path, size: str
) -> None:
    text = PRESETS[size].text_config
    sizes = described(tmp_path / "a.gguf", text)
    header = of_file(tmp_path / "a.gguf")
    assert gguf.config_of(header, "file").text_config == known(text)
    found = {gguf.our_key(key): tensor[1:] for key, tensor in header.tensors.items()}
    assert found == {
        written_key(name): (shape, sizes[name]) for name, shape in expected_shapes(text).items()
    }


@pytest.mark.parametrize("size", ["tiny-E2B", "tiny-26B-A4B", "tiny-31B", "pocket"])
def test_a_whole_file_with_its_vocabulary_is_recovered(tmp_path: Path, size: str) -> None:
    folder = random_checkpoint.made(size, "4", tmp_path / "folder")
    header = of_file(to_gguf.write(folder, tmp_path / "a.gguf"))
    assert gguf.config_of(header, "file").text_config == known(
        Gemma4Config.load(folder).text_config
    )
    # A tensor that only llama.cpp has keeps its name.
    assert gguf.our_key("rope_freqs.weight") == "rope_freqs.weight"


def test_a_list_that_no_model_has_is_not_kept() -> None:
    lists = [key(b"gemma4.x%d" % n, 9, struct.pack("<IQ", 0, n) + bytes(n)) for n in (4096, 4097)]
    assert parse(file(*lists, keys=2)).metadata == {"gemma4.x4096": [0] * 4096}


# -- headers that lie -------------------------------------------------------------------------


def test_every_cut_is_one_error(tmp_path: Path) -> None:
    data = small(tmp_path / "a.gguf")
    last = data.index(b"odd") + 3 + 4 + 2 * 8 + 4 + 8
    whole = parse(data).nbytes + 384 + 64 + 10  # what fills up the last tensor may be missing
    assert parse(data[:whole])
    for length in range(whole):
        with pytest.raises(WeightsError, match=r"cut short|describes"):
            parse(data[:length])
        if length < last:  # the file says that it is whole, and is not
            with pytest.raises(WeightsError, match="ends within its header"):
                parse(data[:length], len(data))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_damaged_header_is_read_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    whole = path.read_bytes() if path.exists() else small(path)
    bent = bytearray(whole)
    header = parse(whole).nbytes
    for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=6)):
        bent[at] = data.draw(st.integers(0, 255))
    read = 0

    def reading(start: int, stop: int) -> bytes:
        nonlocal read
        read += stop - start
        return bytes(bent[start:stop])

    try:
        found = gguf.parse(reading, len(bent), "file")
        gguf.config_of(found, "file")
    except GemsmithError:
        pass
    assert read < 50 * len(bent)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(
    name: bytes = b"a", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(sizes))
    return head + struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)


def file(*parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, data: int = 0) -> bytes:
    made = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return made + bytes(-len(made) % 32 + data)


HUGE = struct.pack("<Q", 1 << 63)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(40), r"begins with b'GGML', version 0; GGUF 2 or 3"),
        (file(version=1), "version 1; GGUF 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648; GGUF 2 or 3, little endian"),
        (file(tensors=65_537), "announces 65537 tensors, at most 65536"),
        (file(keys=1 << 63), "announces 9223372036854775808 keys, at most 4096"),
        (file(HUGE + b"k", keys=1), "a key of 9223372036854775808 bytes at byte 32; at most 1024"),
        (file(struct.pack("<Q", 2) + b"\xff\xff", keys=1), "a key at byte 34 is not UTF-8"),
        (file(key(b"k", 13, b""), keys=1), "k is of the unknown type 13"),
        (file(key(b"k", 9, struct.pack("<IQ", 9, 1)), keys=1), "k is of the unknown type 9"),
        (file(key(b"k", 8, HUGE), keys=1), "9223372036854775816 bytes are announced at byte 37"),
        (file(key(b"k", 9, struct.pack("<I", 8) + HUGE), keys=1), "bytes are announced at byte"),
        (file(key(b"k", 9, struct.pack("<I", 10) + HUGE), keys=1), "bytes are announced at byte"),
        (file(key(b"k", 0, b"1"), key(b"k", 0, b"1"), keys=2), "the key k is there twice"),
        (
            file(key(b"gemma4.x", 8, struct.pack("<Q", 1025) + bytes(1025)), keys=1),
            "the value of gemma4.x of 1025 bytes",
        ),
        *(
            (
                file(key(b"general.alignment", 4, struct.pack("<I", align)), keys=1),
                f"general.alignment is {align}; a multiple of 8, at most 1048576",
            )
            for align in (0, 12, 1 << 31)
        ),
        (file(key(b"general.alignment", 6, bytes(4)), keys=1), "general.alignment is 0.0; a mul"),
        (file(tensor(sizes=(1,) * 5), tensors=1), "a has 5 dimensions, at most 4"),
        (file(tensor(sizes=(0,)), tensors=1), r"a has the sizes \(0,\)"),
        (file(tensor(sizes=(1 << 41,)), tensors=1), "a has the sizes"),
        (file(tensor(kind=4), tensors=1), "a has the type 4, which the gguf package installed"),
        (file(tensor(kind=1 << 31), tensors=1), "a has the type 2147483648"),
        (file(tensor(sizes=(31,), kind=2), tensors=1), "a has rows of 31, but a block of Q4_0 "),
        (file(tensor(), tensor(), tensors=2, data=256), "the tensor a is there twice"),
        (file(tensor(offset=32), tensors=1, data=160), "a begins at byte 32, but behind what"),
        (
            file(tensor(), tensor(b"b", offset=96), tensors=2, data=224),
            "b begins at byte 96, but behind what ends at 128 it begins at 128",
        ),
        (
            file(tensor(), tensor(b"b", offset=160), tensors=2, data=288),
            "b begins at byte 160, but behind what ends at 128 it begins at 128",
        ),
        (
            file(tensor(sizes=(1 << 40,) * 4), tensors=1, data=128),
            "its header describes 5846006549323611672814739330865132078623730171904 bytes",
        ),
        (file(tensor(), tensors=1, data=127), "describes 128 bytes of tensors from byte 64 on"),
        (file(tensor(), tensors=1, data=129), "it is cut short or damaged"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_true_is_one_error(data: bytes, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        parse(data)
    assert len(str(caught.value)) < 800


def test_an_endless_header_is_not_read_to_the_end() -> None:
    """A list of empty texts, from a file that says that it has a terabyte."""
    most = 0
    start = file(key(b"k", 9, struct.pack("<IQ", 8, 1 << 36)), keys=1)

    def read(begin: int, stop: int) -> bytes:
        nonlocal most
        most = max(most, stop)
        return start[begin:stop] + bytes(stop - max(begin, len(start)))

    with pytest.raises(WeightsError, match=r"a header of more than .* 64 MiB are read"):
        gguf.parse(read, 1 << 40, "file")
    assert most <= gguf.PIECE  # so many texts have no room, and none is looked at


def test_a_vocabulary_is_not_held_in_memory() -> None:
    texts = (struct.pack("<Q", 4096) + bytes(4096)) * 4096
    data = file(key(b"k", 9, struct.pack("<IQ", 8, 4096) + texts), keys=1)
    tracemalloc.start()
    assert parse(data).nbytes == len(data) > 4 * gguf.PIECE
    assert tracemalloc.get_traced_memory()[1] < 3 * gguf.PIECE
    tracemalloc.stop()


# -- configs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> gguf.Header:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    described(path, PRESETS["26B-A4B"].text_config)
    return of_file(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general.architecture": "llama"}, "its architecture is 'llama'; gemsmith knows gemma4"),
        ({"general.architecture": None}, "its architecture is 'None'; gemsmith knows gemma4"),
        ({"general.architecture": "clip"}, "this is image and sound input alone; name the model's"),
        ({"general.architecture": "gemma4_assistant"}, "this is a drafter"),
        ({"gemma4.block_count": None}, "the key gemma4.block_count is missing"),
        ({"gemma4.block_count": 1 << 31}, "block_count is 2147483648; must be from 1 to 1024"),
        ({"gemma4.block_count": 29}, "has 30 entries for 29 layers"),
        ({"gemma4.attention.sliding_window_pattern": [True] * 30}, "there is one kind alone"),
        ({"gemma4.attention.head_count_kv": [*range(1, 31)]}, "head_count_kv differs within"),
        ({"gemma4.attention.head_count_kv": [0] * 30}, "num_key_value_heads is 0"),
        ({"gemma4.attention.shared_kv_layers": 30}, "shared_kv_layers is 30 of 30"),
        ({"gemma4.feed_forward_length": [5] * 29 + [6]}, "feed_forward_length differs"),
        ({"gemma4.embedding_length": [1]}, "hidden_size is"),
        ({"gemma4.embedding_length": 1 << 31}, "hidden_size is 2147483648"),
        ({"gemma4.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"gemma4.final_logit_softcapping": "x"}, "final_logit_softcapping is 'x'"),
        ({"gemma4.expert_used_count": 200}, "top_k_experts 200 exceeds num_experts 128"),
        ({"gemma4.embedding_length_per_layer_input": 256}, "per_layer_token_embd.weight is mis"),
        ({"gemma4.rope.freq_base": -1.0}, "rope_parameters: theta -1.0"),
    ],
)  # fmt: skip
def test_metadata_that_make_no_model_are_one_error(
    header: gguf.Header, changed: dict[str, Any], message: str
) -> None:
    metadata = {k: v for k, v in (header.metadata | changed).items() if v is not None}
    with pytest.raises(ConfigError, match=message) as caught:
        gguf.config_of(replace(header, metadata=metadata), "file")
    assert str(caught.value).startswith("file: ")
    assert len(str(caught.value)) < 800


def test_layers_that_share_k_and_v_are_as_wide_as_others_or_twice(tmp_path: Path) -> None:
    described(tmp_path / "a.gguf", PRESETS["E2B"].text_config)
    header = of_file(tmp_path / "a.gguf")
    for factor in (1, 2, 3):
        widths = [6144] * 15 + [6144 * factor] * 20
        changed = header.metadata | {"gemma4.feed_forward_length": widths}
        if factor == 3:
            with pytest.raises(ConfigError, match="feed_forward_length differs"):
                gguf.config_of(replace(header, metadata=changed), "file")
        else:
            made = gguf.config_of(replace(header, metadata=changed), "file").text_config
            assert [plan.intermediate_size for plan in made.layers] == widths


def test_values_where_k_is_v_must_be_left_out(header: gguf.Header) -> None:
    tensors = header.tensors | {"blk.5.attn_v.weight": ("F32", (1, 1), 4)}
    with pytest.raises(ConfigError, match="full layers have other K/V heads, though they store V"):
        gguf.config_of(replace(header, tensors=tensors), "file")


def test_a_head_of_its_own_is_told(header: gguf.Header) -> None:
    assert gguf.config_of(header, "file").text_config.tie_word_embeddings
    tensors = header.tensors | {"output.weight": ("F32", (1, 1), 4)}
    config = gguf.config_of(replace(header, tensors=tensors), "file")
    assert not config.text_config.tie_word_embeddings
