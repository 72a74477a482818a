"""Checkpoint folders: what is read, what is refused and why, and how much memory it takes."""

import json
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.weights.folders import assert_same, halves, tensors, write, write_shards
from torch import Tensor

from gemsmith import hardware, sizing
from gemsmith.cache.none import NoCache
from gemsmith.config import Gemma4Config
from gemsmith.errors import CapacityError, ConfigError, WeightsError
from gemsmith.model.text import TextModel
from gemsmith.testing import SIZES, random_model, tiny_config, whole_groups
from gemsmith.weights.load import load_model
from gemsmith.weights.names import PREFIXES, unused_shapes
from gemsmith.weights.ple import PLEStore
from gemsmith.weights.save import save_model

IDS = torch.tensor([5, 9, 5, 31, 2, 77, 95, 0, 5, 64, 12, 3])


def logits(model: TextModel, ids: Tensor = IDS) -> Tensor:
    kv = NoCache(model.config, [len(ids)])
    return model.logits(model(ids, torch.arange(len(ids)), kv))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ple", ["disk", "memory"])
def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path, size, ple):
    config, model = load_model(write(tmp_path, tensors(size), size), ple=ple)
    assert config == tiny_config(size)
    assert_same(model, tensors(size))
    assert torch.equal(logits(model), logits(random_model(config)))
    assert not any(p.requires_grad for p in model.parameters())


def test_the_per_layer_table_stays_on_disk_unless_asked_for(tmp_path):
    write(tmp_path, tensors())
    _, model = load_model(tmp_path)
    assert isinstance(model.embed_tokens_per_layer, PLEStore)
    _, model = load_model(tmp_path, ple="memory")
    assert isinstance(model.embed_tokens_per_layer, torch.nn.Embedding)
    with pytest.raises(ConfigError, match="ple 'mmap': must be disk"):
        load_model(tmp_path, ple="mmap")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_prefix_loads(tmp_path, prefix):
    state = tensors()
    write(tmp_path, {prefix + k.removeprefix(PREFIXES[0]): v for k, v in state.items()})
    assert_same(load_model(tmp_path)[1], state)


def test_shards_load_as_one(tmp_path):
    state = tensors("26B-A4B")
    _, model = load_model(write_shards(tmp_path, halves(state), "26B-A4B"))
    assert_same(model, state)


def test_towers_unused_kv_and_the_tied_head_are_left_aside(tmp_path):
    state = tensors()
    extra = {
        PREFIXES[0] + n: torch.ones(s)
        for n, s in unused_shapes(tiny_config("E2B").text_config).items()
    }
    extra[PREFIXES[0] + "lm_head.weight"] = state[PREFIXES[0] + "embed_tokens.weight"].clone()
    extra["model.vision_tower.patch_embedder.input_proj.weight"] = torch.ones(3, 3)
    extra["model.audio_tower.counts"] = torch.ones(3, dtype=torch.int64)
    write(tmp_path, state | extra)
    assert_same(load_model(tmp_path)[1], state)


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path):
    state = tensors()
    head = state[PREFIXES[0] + "embed_tokens.weight"].clone()
    head[7] += 1
    write(tmp_path, state | {"lm_head.weight": head})
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from .*embed_tokens.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_dtype_none_keeps_the_stored_one(tmp_path, stored):
    state = tensors(dtype=stored)
    _, model = load_model(write(tmp_path, state))
    assert {p.dtype for p in model.parameters()} == {stored}
    assert_same(model, state)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ple", ["disk", "memory"])
def test_dtypes_are_converted_on_the_way(tmp_path, stored, asked, ple):
    state = {k: v.to(stored) for k, v in tensors().items()}
    _, model = load_model(write(tmp_path, state), dtype=asked, ple=ple)
    assert_same(model, {k: v.to(asked) for k, v in state.items()})
    assert torch.isfinite(logits(model)).all()
    rows = model.embed_tokens_per_layer(IDS)
    assert torch.equal(rows, state[PREFIXES[0] + "embed_tokens_per_layer.weight"][IDS].to(asked))


def test_float16_is_refused_as_the_dtype_of_computation(tmp_path):
    write(tmp_path, {k: v.half() for k, v in tensors().items()})
    with pytest.raises(WeightsError, match=r"stored in float16, in which .* overflows .*bfloat16"):
        load_model(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype float16: .*65504; use bfloat16 or float32"):
        load_model(tmp_path, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"dtype torch.int8: must be torch.bfloat16"):
        load_model(tmp_path, dtype=torch.int8)


def test_weights_of_odd_byte_offsets_load(tmp_path):
    # A tower's single byte before the decoder puts every weight at an odd address.
    state = tensors(dtype=torch.bfloat16)
    header, at = (
        {"model.vision_tower.flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
        1,
    )
    body = b"\1"
    for name, tensor in state.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        offsets = [at, at + len(raw)]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        body, at = body + raw, at + len(raw)
    text = json.dumps(header).encode()
    tiny_config("E2B").save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    for ple in ("disk", "memory"):
        _, model = load_model(tmp_path, ple=ple)
        assert_same(model, state)
        assert torch.equal(
            logits(model), logits(random_model(tiny_config("E2B"), dtype=torch.bfloat16))
        )


def test_writing_to_loaded_weights_leaves_the_file_alone(tmp_path):
    state = tensors()
    _, model = load_model(write(tmp_path, state))
    with torch.no_grad():
        model.norm.weight.fill_(7)
    assert_same(load_model(tmp_path)[1], state)


AFTER_A_LOAD = """
import resource, sys, torch
from gemsmith.weights.load import load_model
load_model(sys.argv[1])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def activations():
    return [torch.ones(2 << 20, dtype=torch.uint8) for _ in range(20)]
activations()
before = faults()
for _ in range(10):
    activations()
print((faults() - before) * resource.getpagesize() >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries free otherwise")
def test_activations_lie_in_the_same_memory_pass_after_pass_where_weights_are_floats(tmp_path):
    """400 MiB of them are not had from the system once more."""
    command = [sys.executable, "-c", AFTER_A_LOAD, str(write(tmp_path, tensors()))]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) < 16


def test_a_deleted_checkpoint_stays_readable_to_the_model(tmp_path):
    state = tensors()
    _, model = load_model(write(tmp_path, state))
    (tmp_path / "model.safetensors").unlink()
    assert_same(model, state)
    assert torch.equal(logits(model), logits(random_model(tiny_config("E2B"))))


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("warp", "device 'warp': must be cpu, cuda"),
        ("meta", "device meta: must be cpu, cuda"),
        ("cuda:99", r"device cuda:99: this PyTorch .* sees \d+ CUDA devices; use device='cpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(tmp_path, device, text):
    with pytest.raises(ConfigError, match=text):
        load_model(write(tmp_path, tensors()), device=device)


def test_weights_that_the_memory_cannot_hold_are_refused_with_a_way(tmp_path, monkeypatch):
    config = whole_groups(tiny_config("E2B"))
    state = random_model(config, dtype=torch.bfloat16).state_dict()
    state = {PREFIXES[0] + name: tensor for name, tensor in state.items()}
    config.save(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    room = sum(sizing.weight_bytes(config, "int8", "cpu").values())
    monkeypatch.setattr(hardware, "free_bytes", lambda device: room)
    with pytest.raises(CapacityError, match=r"for its weights.*free on cpu; quant='int8' needs"):
        load_model(tmp_path, dtype=torch.float32)
    load_model(tmp_path, quant="int8")
    monkeypatch.setattr(hardware, "free_bytes", lambda device: room - 1)
    with pytest.raises(CapacityError, match=r"quant='int4' needs .* `gemsmith fit` lists what fi"):
        load_model(tmp_path, quant="int8")
    monkeypatch.setattr(hardware, "free_bytes", lambda device: 1)
    with pytest.raises(CapacityError, match=r"free on cpu; `gemsmith fit` lists what fits$"):
        load_model(tmp_path, quant="int2")
    # Mapped weights need no memory of their own; reading them again and again is slow.
    with pytest.warns(RuntimeWarning, match="will be read from the disk again and again"):
        load_model(tmp_path)
    monkeypatch.setattr(hardware, "free_bytes", lambda device: None)
    load_model(tmp_path, dtype=torch.float32)


def test_running_out_of_device_memory_says_how_far_it_came(tmp_path, monkeypatch):
    write(tmp_path, tensors(dtype=torch.bfloat16))
    real, calls = Tensor.to, []

    def to(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("no room")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    with pytest.raises(CapacityError, match=r"cpu: out of memory at model.*after 0.0 GiB"):
        load_model(tmp_path)


# What is refused, and why.


def test_missing_unexpected_and_misshapen_tensors_are_named_together(tmp_path):
    state = tensors()
    del state[PREFIXES[0] + "norm.weight"]
    state[PREFIXES[0] + "layers.0.mlp.bias"] = torch.ones(3)
    state[PREFIXES[0] + "layers.1.layer_scalar"] = torch.ones(2)
    with pytest.raises(WeightsError) as error:
        load_model(write(tmp_path, state))
    text = str(error.value)
    assert "1 tensor missing:\n  model.language_model.norm.weight" in text
    assert "1 tensor in model.safetensors with no place in this model:" in text
    assert "layers.0.mlp.bias" in text
    assert "layers.1.layer_scalar is [2], expected [1]" in text


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.float64])
def test_weights_that_are_no_plain_floats_are_refused(tmp_path, dtype):
    state = tensors()
    key = PREFIXES[0] + "layers.2.mlp.up_proj.weight"
    state[key] = state[key].to(dtype)
    with pytest.raises(WeightsError, match=rf"{key} is stored as \w+; this version reads BF16"):
        load_model(write(tmp_path, state))


def test_the_weights_of_another_size_are_refused_before_any_module_is_built(tmp_path, monkeypatch):
    write(tmp_path, tensors("31B"), "E2B")
    monkeypatch.setattr("gemsmith.weights.load.TextModel", None)
    with pytest.raises(WeightsError, match="missing"):
        load_model(tmp_path)


def header_of(raw: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """The bytes of a safetensors file with one thing wrong."""
    size = int.from_bytes(raw[:8], "little")
    kind = rng.randrange(5)
    if kind == 0:
        return raw[: rng.choice([0, 1, 7, 8, 9, 8 + size, len(raw) - 1, rng.randrange(len(raw))])]
    if kind == 1:
        lie = rng.choice([0, 1, size - 1, size + 1, len(raw), 2**31, 2**63, 2**64 - 1])
        return lie.to_bytes(8, "little") + raw[8:]
    if kind == 2:
        at = 8 + rng.randrange(size)
        return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    header, body = header_of(raw)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    wild = rng.choice([-1, 2**31, 2**63, 2**64, 1e308, None, "x", [], {}, True, 3.5])
    if kind == 3:
        field = rng.choice(["shape", "data_offsets", "dtype"])
        entry[field] = rng.choice(
            [wild, [wild], [wild, wild], [0, wild], entry["data_offsets"][::-1], [2**32, 2**32]]
        )
    else:
        other = rng.choice([n for n in header if n != "__metadata__"])
        change = rng.randrange(4)
        if change == 0:
            entry["data_offsets"] = header[other]["data_offsets"]
        elif change == 1:
            del header[name]
        elif change == 2:
            header[name + rng.choice(["x", "\0", "\ud800", "é" * 9])] = header.pop(name)
        else:
            header["__metadata__"] = wild
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def test_damaged_files_never_give_anything_but_a_weights_error(tmp_path):
    state = tensors("31B")
    write(tmp_path, state, "31B")
    path = tmp_path / "model.safetensors"
    raw, rng = path.read_bytes(), random.Random(5)
    refused = longest = 0
    for _ in range(250):
        path.unlink()  # what is mapped must not be rewritten in place
        path.write_bytes(damaged(raw, rng))
        try:
            _, model = load_model(tmp_path)
        except WeightsError as error:
            refused += 1
            longest = max(longest, len(str(error)))
        else:
            assert_same(model, state)
    assert refused > 200
    assert longest < 4000


@pytest.mark.parametrize("size", ["E2B", "31B"])
def test_shapes_of_absurd_size_allocate_nothing(tmp_path, size):
    # config.json and header agree on an embedding of 2^37 values that the file does not hold.
    state = tensors(size)
    write(tmp_path, state, size)
    data = json.loads((tmp_path / "config.json").read_text())
    data["text_config"] |= {"vocab_size": 1 << 22, "vocab_size_per_layer_input": 1 << 22}
    (tmp_path / "config.json").write_text(json.dumps(data))
    path = tmp_path / "model.safetensors"
    header, body = header_of(path.read_bytes())
    header[PREFIXES[0] + "embed_tokens.weight"]["shape"] = [1 << 22, 1 << 15]
    text = json.dumps(header).encode()
    path.unlink()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(WeightsError, match="cut short or damaged"):
        load_model(tmp_path)


# Memory and start-up, in a process of their own.

MEASURE = """
import sys, torch
torch.set_num_threads(1)
import gemsmith.weights.load as load
import torch.nn.functional as F
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
dtype = getattr(torch, sys.argv[2])
F.linear(torch.ones(2, 2), torch.ones(2, 2)).to(torch.bfloat16).sum()
before = status("VmHWM")
config, model = load.load_model(sys.argv[1], dtype=dtype)
loaded = status("VmHWM")
weights = 0
with torch.no_grad():
    for tensor in model.state_dict().values():
        weights += tensor.nbytes
        tensor.view(torch.int16).view(-1)[::1024].sum().item()
    model.embed_tokens_per_layer(torch.arange(0, 16384, 512))
print(weights, loaded - before, status("VmHWM") - before, "torch._dynamo" in sys.modules)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """About 100 MB of bfloat16 weights and a per-layer table of 160 MB."""
    folder = tmp_path_factory.mktemp("large")
    tiny = tiny_config("E2B").to_dict()
    tiny["text_config"] |= {
        "vocab_size": 16384,
        "vocab_size_per_layer_input": 16384,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "hidden_size_per_layer_input": 640,
    }
    config = Gemma4Config.from_dict(tiny)
    model = TextModel(config.text_config, device="meta", dtype=torch.bfloat16).to_empty(
        device="cpu"
    )
    for tensor in model.state_dict().values():
        tensor.zero_()
    save_model(model, config, folder)
    return folder


def measure(folder: Path, dtype: str) -> tuple[int, int, int, bool]:
    command = [sys.executable, "-c", MEASURE, str(folder), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(out[0]), int(out[1]), int(out[2]), out[3] == "True"


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@linux
@pytest.mark.slow
def test_loading_in_the_stored_dtype_copies_nothing(large):
    weights, loaded, peak, compiler = measure(large, "bfloat16")
    assert weights > 90e6
    assert loaded < 0.15 * weights
    assert 0.9 * weights < peak < 1.15 * weights
    assert not compiler


@linux
@pytest.mark.slow
def test_converting_never_holds_two_copies_of_the_weights(large):
    weights, _, peak, _ = measure(large, "float32")
    assert weights > 180e6
    # At most 32 MiB of mapped source and one tensor more: the embedding's 32 MiB.
    assert 0.9 * weights < peak < 1.05 * weights + (64 << 20)


# Transformers.


def hf_model(size: str, folder: Path, *, whole: bool) -> tuple[torch.nn.Module, Gemma4Config]:
    """A random transformers model saved into `folder`: a whole model or its decoder alone."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    config = tiny_config(size)
    prefix = "Gemma4Unified" if config.model_type == "gemma4_unified" else "Gemma4"
    text = getattr(transformers, prefix + "TextConfig")(**config.text_config.to_dict())
    torch.manual_seed(3)
    if whole:
        hf_config = getattr(transformers, prefix + "Config")(
            text_config=text, vision_config=None, audio_config=None
        )
        hf = getattr(transformers, prefix + "ForConditionalGeneration")(hf_config)
    else:
        hf = getattr(transformers, prefix + "ForCausalLM")(text)
    with torch.no_grad():
        for name, tensor in (*hf.named_parameters(), *hf.named_buffers()):
            if "inv_freq" not in name and "embed_scale" not in name:
                tensor.add_(0.05 * torch.randn_like(tensor))
    hf.save_pretrained(folder)
    return hf.eval(), config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_saved_by_transformers_gives_the_same_logits(tmp_path, size, whole):
    hf, _ = hf_model(size, tmp_path, whole=whole)
    _, model = load_model(tmp_path)
    with torch.no_grad():
        theirs = hf(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(model), theirs, atol=2e-4, rtol=1e-4)
    assert theirs.abs().max() > 0.5


def test_a_sharded_checkpoint_saved_by_transformers_loads(tmp_path):
    hf, _ = hf_model("E2B", tmp_path / "one", whole=True)
    hf.save_pretrained(tmp_path / "many", max_shard_size="50KB")  # pyright: ignore[reportCallIssue]
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (load_model(tmp_path / name)[1] for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))
