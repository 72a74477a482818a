"""Headers of checkpoints: those of folders, those of a hub on this machine, and hostile ones."""

import json
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tests.weights.gguf_files import INPUTS, described, inputs

from benchmarks import to_gguf
from gemsmith import headers
from gemsmith.config import PRESETS
from gemsmith.errors import ConfigError, HubError, WeightsError
from gemsmith.headers import parse_header, read_headers
from gemsmith.testing import tiny_config
from gemsmith.weights import gguf as gguf_module
from gemsmith.weights.files import INDEX, SINGLE
from gemsmith.weights.hub import resolve
from gemsmith.weights.names import written_key
from gemsmith.weights.tensors import read_checkpoint

REPO = "someone/gemma-4-tiny"
TENSORS = {
    "a.weight": torch.ones(3, 5),
    "b.weight": torch.ones(7, dtype=torch.bfloat16),
    "c": torch.ones((), dtype=torch.uint8),
    "d": torch.ones(0, 4),
}
WANTED = {
    "a.weight": ("F32", (3, 5), 60),
    "b.weight": ("BF16", (7,), 14),
    "c": ("U8", (), 1),
    "d": ("F32", (0, 4), 0),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    tiny_config("E2B").save(made)
    save_file(TENSORS, made / SINGLE, metadata={"format": "pt"})
    return made


def shard(folder: Path) -> Path:
    """The same tensors in two files."""
    (folder / SINGLE).unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    mapping = {key: names[n % 2] for n, key in enumerate(TENSORS)}
    for name in names:
        part = {key: TENSORS[key] for key in TENSORS if mapping[key] == name}
        save_file(part, folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))
    return folder


def found(source: str | Path, **options: Any) -> dict[str, tuple[str, tuple[int, ...], int]]:
    made = read_headers(source, **options)
    assert made.config == tiny_config("E2B")
    assert made.nbytes == 75
    return {key: (t.dtype, t.shape, t.nbytes) for key, t in made.tensors.items()}


# -- folders ----------------------------------------------------------------------------------


def test_a_folder_is_described_without_its_weights(folder: Path) -> None:
    assert found(folder) == WANTED
    assert found(shard(folder)) == WANTED


def test_the_embedded_checkpoint_is_described_as_the_loader_sees_it() -> None:
    made = read_headers("pocket")
    stored = read_checkpoint(resolve("pocket"))
    assert {k: (t.dtype, t.shape) for k, t in made.tensors.items()} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()
    }
    assert list(made.tensors) == list(stored)
    size = (resolve("pocket") / SINGLE).stat().st_size
    assert 0 < size - made.nbytes < 100_000


def test_no_torch_is_imported(tmp_path: Path) -> None:
    described(tmp_path / "a.gguf", TEXT)
    code = "import sys; from gemsmith.headers import read_headers as r; r('pocket')\n"
    code += "assert 'gguf' not in sys.modules; r(sys.argv[1])\n"
    code += "assert not {'torch', 'safetensors', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.gguf")], check=True)


def test_a_folder_that_is_none_and_a_wrong_config_are_told(folder: Path) -> None:
    with pytest.raises(HubError, match="no folder 'no-such-folder'"):
        read_headers("no-such-folder")
    (folder / SINGLE).rename(folder / "model.gguf")
    with pytest.raises(WeightsError, match=r"model.gguf: begins with .*; GGUF 2 or 3"):
        read_headers(folder)
    (folder / "model.gguf").rename(folder / SINGLE)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_headers(folder)


# -- headers that lie -------------------------------------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ('{"a": 1, "a": 2}', "not valid JSON .a name is there twice"),
        ('{"a": {"shape": [' + "9" * 5000 + "]}}", "not valid JSON"),
        ("[]", "its header is a list, not an object"),
        ({"a": 7}, "a: described by a int, not an object"),
        ({"a": entry("F31")}, "a: dtype 'F31' is none of BOOL, U8"),
        ({"a": entry(["F32"])}, "dtype .* is none of"),
        ({"a": entry(shape=[2.0])}, "shape .* is not a list of at most 8 sizes"),
        ({"a": entry(shape=[True, 2])}, "is not a list of at most 8 sizes"),
        ({"a": entry(shape=[-2])}, "is not a list"),
        ({"a": entry(shape=[1] * 9)}, "is not a list"),
        ({"a": entry(shape=[1 << 41])}, "is not a list"),
        ({"a": entry(shape=None)}, "is not a list"),
        ({"a": entry(offsets=[0])}, r"data_offsets \[0\] are not \[begin, end\]"),
        ({"a": entry(offsets=[-8, 0])}, "are not"),
        ({"a": entry(offsets=["0", "8"])}, "are not"),
        ({"a": entry(shape=[1 << 40] * 8)}, "has .* bytes, but its data_offsets .* hold 8"),
        ({"a": entry(offsets=[8, 0])}, "has 8 bytes, but its data_offsets .* hold -8"),
        ({"a": entry(offsets=[0, 16])}, r"has 8 bytes, but its data_offsets \[0, 16\] hold 16"),
        ({"a": entry(), "b": entry()}, "b begins at byte 0 and overlaps what ends at 8"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, "b begins at byte 4 and overlaps"),
        ({"a": entry(offsets=[8, 16])}, "a begins at byte 8 and leaves a hole behind what ends at"),
        ({"a": entry()}, "describes 8 bytes of tensors, the file has 16"),
        ({}, "describes 0 bytes of tensors, the file has 16"),
    ],
)
def test_a_header_that_cannot_be_true_is_one_error(header: Any, message: str) -> None:
    text = header if isinstance(header, str) else json.dumps(header)
    with pytest.raises(WeightsError, match=message) as caught:
        parse_header(text.encode("latin-1"), 16, "file")
    assert len(str(caught.value)) < 800


def test_four_bits_are_half_bytes_and_metadata_is_no_tensor() -> None:
    made = {"__metadata__": {"format": "pt"}, "a": entry("F4", [4, 4])}
    tensors = parse_header(json.dumps(made).encode() + b"  ", 8, "file")
    assert [t.nbytes for t in tensors.values()] == [8]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\x02\0\0", "3 bytes are no safetensors file"),
        (b"\xff" * 16, "says that its header has 18446744073709551615 bytes, but the file has 16"),
        ((9).to_bytes(8, "little") + b"{}", "header has 9 bytes, but the file has 10"),
    ],
)
def test_a_length_that_lies_is_not_believed(folder: Path, data: bytes, message: str) -> None:
    (folder / SINGLE).write_bytes(data)
    with pytest.raises(WeightsError, match=message):
        read_headers(folder)


def test_a_gigantic_header_is_not_read(folder: Path) -> None:
    with (folder / SINGLE).open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(2 << 30)
    tracemalloc.start()
    with pytest.raises(WeightsError, match="a header of 1073741824 bytes; of one file at most 8"):
        read_headers(folder)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_headers_of_all_files_share_one_budget(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (shard(folder) / "model-00001-of-00002.safetensors").read_bytes()[:8]
    monkeypatch.setattr(headers, "MAX_ALL_BYTES", int.from_bytes(first, "little") + 20)
    with pytest.raises(WeightsError, match=r"00002-of-00002.*a header of .* of all"):
        read_headers(folder)


# -- GGUF -------------------------------------------------------------------------------------

TEXT = PRESETS["E4B"].text_config


def gguf_found(source: str | Path, **options: Any) -> dict[str, int]:
    made = read_headers(source, **options)
    assert made.gguf
    assert made.config.text_config == TEXT
    return {key: tensor.nbytes for key, tensor in made.tensors.items()}


def keyed(sizes: dict[str, int]) -> dict[str, int]:
    return {written_key(name): size for name, size in sizes.items()}


def split(folder: Path, count: int = 2) -> dict[str, int]:
    """A model in so many files, the first with its metadata, as llama.cpp's tool splits."""
    sizes = {f"odd{n}": 4 * (n + 1) for n in range(1, count)}
    for n in range(count):
        path = folder / f"gemma-{n + 1:05}-of-{count:05}.gguf"
        if n == 0:
            sizes |= keyed(described(path, TEXT, split=count))
            continue
        writer = gguf.GGUFWriter(path, "gemma4")
        writer.add_uint16("split.no", n)
        writer.add_uint16("split.count", count)
        writer.add_tensor(f"odd{n}", np.zeros(n + 1, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return sizes


def test_a_gguf_file_is_described_by_its_path_or_its_folder(tmp_path: Path) -> None:
    sizes = keyed(described(tmp_path / "gemma-Q4_0.GGUF", TEXT))
    assert gguf_found(tmp_path / "gemma-Q4_0.GGUF") == sizes
    assert gguf_found(tmp_path) == sizes
    inputs(tmp_path / "mmproj-F16.gguf")
    assert gguf_found(tmp_path / "gemma-Q4_0.GGUF") == sizes
    (tmp_path / "gemma-Q8_0.gguf").write_bytes(b"another")
    message = r"has 2 models in GGUF: gemma-Q4_0.GGUF, gemma-Q8_0.gguf; name one, such as /.*Q4_0"
    with pytest.raises(WeightsError, match=message):
        read_headers(tmp_path)


def test_image_and_sound_input_beside_a_gguf_model_belong_to_it(tmp_path: Path) -> None:
    sizes = keyed(described(tmp_path / "gemma.gguf", TEXT))
    inputs(tmp_path / "mmproj-F32.gguf", names=["v.odd"])
    found = {name: 2 * rows * columns for name, (rows, columns) in INPUTS.items()}
    assert inputs(tmp_path / "MMPROJ-BF16.gguf") == sum(found.values())
    made = read_headers(tmp_path)
    assert made.inputs == "MMPROJ-BF16.gguf"  # one is loaded: the first
    assert {key: tensor.nbytes for key, tensor in made.tensors.items()} == sizes | found
    assert read_headers(tmp_path / "gemma.gguf").inputs is None


@pytest.mark.parametrize(
    "wrong", [{"architecture": "gemma4"}, {"names": [written_key("norm.weight")]}]
)
def test_a_file_that_is_no_image_and_sound_input_is_told(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    described(tmp_path / "gemma.gguf", TEXT)
    inputs(tmp_path / "mmproj.gguf", **wrong)
    message = r"mmproj.gguf beside .*gemma.gguf is no image and sound input: .*; rename it, or name"
    with pytest.raises(WeightsError, match=message):
        read_headers(tmp_path)
    (tmp_path / "mmproj.gguf").write_bytes(b"image and sound input")
    with pytest.raises(WeightsError, match=r"mmproj.gguf: begins with"):
        read_headers(tmp_path)


def test_the_files_of_a_split_model_are_one(tmp_path: Path) -> None:
    sizes = split(tmp_path, 3)
    first, second, third = sorted(tmp_path.iterdir())
    assert gguf_found(tmp_path) == gguf_found(second) == sizes
    third.rename(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"00003-of-00003.gguf: cannot be read"):
        read_headers(first)
    first.rename(tmp_path / "alone.gguf")
    with pytest.raises(WeightsError, match=r"alone.gguf: says that it is one of 3 files"):
        read_headers(tmp_path / "alone.gguf")


def test_headers_of_split_files_share_one_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split(tmp_path)
    first = min(tmp_path.iterdir())
    size = gguf.GGUFReader(first).data_offset
    monkeypatch.setattr(gguf_module, "MAX_BYTES", size + 20)
    with pytest.raises(WeightsError, match=r"00002-of-00002.gguf: a header of more than"):
        read_headers(first)


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    split(tmp_path)
    first, second = sorted(tmp_path.iterdir())
    second.unlink()
    second.hardlink_to(first)
    with pytest.raises(
        WeightsError, match=r"token_embd.weight is in both .*00001-of.* and .*00002"
    ):
        read_headers(first)


def test_a_tensor_by_two_names_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma4")
    for name in ("output_norm.weight", "model.language_model.norm.weight"):
        writer.add_tensor(name, np.zeros(4, np.float32))
    to_gguf.add_metadata(writer, TEXT, low=True)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), np.float32))
    writer.add_tensor("per_layer_token_embd.weight", np.zeros((8, 4), np.float32))
    writer.add_tensor("blk.5.attn_v.weight", np.zeros((8, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsError, match="a tensor is there by two names"):
        read_headers(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "name", ["gone.gguf", "a/b.gguf", "a/b/x/../c.gguf", "/a/b/c.gguf", "\0.gguf"]
)
def test_a_gguf_file_that_is_not_there_is_told(name: str) -> None:
    with pytest.raises(HubError, match=r"no file .*; give one that is here, or owner/name/FILE"):
        read_headers(name)


# -- a hub ------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What a hub answers for one repository, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ranges, self.sent = folder, True, 0
        self.refusal: str | None = None
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub = self.server
        path = unquote(self.path)
        hub.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        at, _, name = path.removeprefix(f"/{REPO}/resolve/").partition("/")
        file = hub.folder / name
        refusal = hub.refusal
        if path.startswith(f"/api/models/{REPO}") and not refusal:
            names = [{"rfilename": str(p.relative_to(hub.folder))} for p in hub.folder.rglob("*.*")]
            text = json.dumps({"id": REPO, "siblings": names}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        if not path.startswith(f"/{REPO}/"):
            refusal = "RepoNotFound"
        elif at not in ("main", "abc123"):
            refusal = "RevisionNotFound"
        elif not file.is_file():
            refusal = refusal or "EntryNotFound"
        if refusal:
            self.send_response(403 if refusal == "GatedRepo" else 404)
            self.send_header("X-Error-Code", refusal)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        start, stop = 0, size
        if hub.ranges and (wanted := self.headers.get("Range")):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            start, stop = first, min(last + 1, size)
        self.send_response(206 if stop - start < size else 200)
        self.send_header("X-Repo-Commit", "abc123")
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if body:
            with file.open("rb") as data:
                data.seek(start)
                left = stop - start
                while left:
                    piece = data.read(min(left, 1 << 16))
                    try:
                        self.wfile.write(piece)
                    except OSError:
                        return  # the client has what it wanted
                    hub.sent += len(piece)
                    left -= len(piece)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("GEMSMITH_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def test_a_repository_is_described_from_ranges(hub: Hub, folder: Path) -> None:
    with (folder / SINGLE).open("r+b") as file:  # weights that nobody wants to fetch
        header = {"x": entry("U8", [1 << 30], [0, 1 << 30])}
        text = json.dumps(header).encode()
        file.truncate(0)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (1 << 30))
    made = read_headers(REPO)
    assert (made.config, made.nbytes) == (tiny_config("E2B"), 1 << 30)
    assert hub.sent < 600_000
    # After the first answer every file is asked of the same commit.
    assert hub.asked[-1] == f"GET /{REPO}/resolve/abc123/{SINGLE} bytes=0-524287"


def test_shards_are_described_like_one_file(hub: Hub, folder: Path) -> None:
    shard(folder)
    assert found(REPO) == WANTED
    assert found(REPO, revision="abc123") == WANTED


def test_a_header_longer_than_the_first_range_is_read_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headers, "FIRST_BYTES", 40)
    assert found(REPO) == WANTED
    assert re.search(r"bytes=40-\d+$", hub.asked[-1])


def test_a_gguf_file_of_a_repository_is_described_from_ranges(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "deep").mkdir()
    sizes = keyed(described(folder / "deep" / "gemma.gguf", TEXT))
    monkeypatch.setattr(gguf_module, "PIECE", 1 << 16)
    assert gguf_found(REPO) == sizes
    assert hub.sent < 400_000  # of 5 GB
    assert gguf_found(f"{REPO}/deep/gemma.gguf", revision="abc123") == sizes
    inputs(folder / "mmproj.gguf")
    assert gguf_found(REPO) == sizes | {name: 2 * n * m for name, (n, m) in INPUTS.items()}
    parts = split(folder)
    with pytest.raises(WeightsError, match=f"has 2 models .* name one, such as {REPO}/deep/gemma"):
        read_headers(REPO)
    assert gguf_found(f"{REPO}/gemma-00001-of-00002.gguf") == parts
    with pytest.raises(WeightsError, match=f"{REPO}: gone.gguf does not exist; is it the name"):
        read_headers(f"{REPO}/gone.gguf")


def test_offline_a_gguf_file_is_looked_for_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = keyed(described(folder / "gemma.gguf", TEXT))
    asked: list[tuple[Any, ...]] = []

    def cached(repo: str, name: str, **options: Any) -> str | None:
        asked.append((repo, name, options))
        return str(folder / name) if name == "gemma.gguf" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert gguf_found(f"{REPO}/gemma.gguf", revision="abc", offline=True) == sizes
    assert asked == [(REPO, "gemma.gguf", {"revision": "abc"})]
    with pytest.raises(HubError, match=f"{REPO}/gone.gguf is not in the local cache and offline"):
        read_headers(f"{REPO}/gone.gguf", offline=True)


def test_a_server_without_ranges_is_not_read_to_the_end(hub: Hub, folder: Path) -> None:
    hub.ranges = False
    with (folder / SINGLE).open("r+b") as file:
        file.truncate(64 << 20)
    with pytest.raises(WeightsError, match="describes 75 bytes of tensors, the file has 67"):
        read_headers(REPO)
    assert hub.sent < 32 << 20


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ("GatedRepo", "asks for its terms to be accepted"),
        ("RepoNotFound", f"the hub has no repository {REPO}, or it is private"),
        ("RevisionNotFound", f"{REPO} has no revision"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub: Hub, refusal: str, message: str) -> None:
    hub.refusal = refusal
    with pytest.raises(HubError, match=message):
        read_headers(REPO)


def test_a_repository_of_other_files_is_told(hub: Hub, folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(
        WeightsError, match=r"has neither model.safetensors nor .*index.json, nor GGUF; pickle"
    ):
        read_headers(REPO)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(WeightsError, match=r"gone.safetensors is missing, though .* names it"):
        read_headers(REPO)
    many = {str(n): f"{n}.safetensors" for n in range(257)}
    (folder / INDEX).write_text(json.dumps({"weight_map": many}))
    with pytest.raises(WeightsError, match="names 257 files; at most 256"):
        read_headers(REPO)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(WeightsError, match=r"names the file '../a.safetensors'; only"):
        read_headers(REPO)
    with (folder / INDEX).open("r+b") as file:
        file.truncate(9 << 20)
    with pytest.raises(WeightsError, match="larger than 8 MiB; not an index"):
        read_headers(REPO)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json: not valid JSON"):
        read_headers(REPO)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json does not exist; is it a model repository"):
        read_headers(REPO)


def test_without_a_network_one_error_says_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HubError, match=r"the hub .http://127.* cannot be reached for the headers"):
        read_headers(REPO)
    monkeypatch.setenv("GEMSMITH_OFFLINE", "1")
    with pytest.raises(HubError, match="not in the local cache and offline mode is on"):
        read_headers(REPO)
