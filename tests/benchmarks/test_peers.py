import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from benchmarks import (
    decode,
    llama,
    llama_worker,
    measure,
    peers,
    random_checkpoint,
    to_gguf,
    workers,
)
from gemsmith.config import PRESETS, Gemma4Config, text_only
from gemsmith.engine.batching import BatchEngine, Outcome
from gemsmith.engine.context import Context
from gemsmith.engine.engine import LM
from gemsmith.engine.request import Request
from gemsmith.errors import CapacityError
from gemsmith.weights.load import load_model
from gemsmith.weights.names import expected_shapes


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint.made("tiny-E2B", "4", tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q6_K, Kind.Q8_0, Kind.BF16])
def test_codes_of_four_bits_are_exact_in_every_type(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    q = rng.integers(-8, 8, (3, 512)).astype(np.int8)
    scale = np.float32([[0.5, 2], [1, 0.25], [3, 1.5]])
    made = to_gguf.encode(q, kind, scale, 4).reshape(3, -1)
    assert_equal(gguf.quants.dequantize(made, kind), q * np.repeat(scale, 256, axis=1))


@pytest.mark.parametrize(("kind", "step"), [(Kind.Q4_0, 16), (Kind.Q6_K, 4), (Kind.Q8_0, 1)])
def test_codes_of_eight_bits_are_rounded_to_those_of_the_type(kind: Kind, step: int) -> None:
    q = np.arange(-128, 128).astype(np.int8)[None]
    made = gguf.quants.dequantize(to_gguf.encode(q, kind, np.float32([[1]]), 8), kind)
    wrong = np.abs(made.reshape(-1)[: 256 - step] - q.reshape(-1)[: 256 - step])
    assert wrong.max() == step // 2
    assert made.max() == 128 - step  # the largest code of the type, times what was lost


def test_weights_with_several_scales_are_refused_where_the_type_has_one() -> None:
    q, scale = np.zeros((1, 256), np.int8), np.arange(8, dtype=np.float32)[None]
    with pytest.raises(ValueError, match="Q6_K: 256 weights with several scales"):
        to_gguf.encode(q, Kind.Q6_K, scale, 4)


@pytest.mark.parametrize("bits", [None, "4"])
@pytest.mark.parametrize("size", ["tiny-E2B", "tiny-26B-A4B", "tiny-31B", "pocket"])
def test_a_gguf_file_holds_the_weights_of_the_folder(
    size: str, bits: str | None, tmp_path: Path
) -> None:
    folder = random_checkpoint.made(size, bits, tmp_path / "folder")
    file = gguf.GGUFReader(to_gguf.write(folder, tmp_path / "x.gguf"))
    held = {tensor.name: tensor for tensor in file.tensors}
    config = Gemma4Config.load(folder).text_config
    assert {*held} == {"rope_freqs.weight", *map(to_gguf.gguf_name, expected_shapes(config))}
    shapes = expected_shapes(config)
    for name, values in floats_of(folder).items():
        tensor = held[to_gguf.gguf_name(name)]
        assert tuple(tensor.shape[::-1]) == shapes[name]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        assert_equal(found, values)


def test_a_complete_gguf_file_is_kept_and_an_older_one_written_again(
    four: Path, tmp_path: Path
) -> None:
    path = to_gguf.write(four, tmp_path / "x.gguf")
    first = path.stat().st_mtime_ns
    assert to_gguf.write(four, path).stat().st_mtime_ns == first
    path.write_bytes(path.read_bytes()[:1000])
    assert len(to_gguf.write(four, path).read_bytes()) > 1000


def test_a_full_disk_is_found_before_the_gguf_file_is_begun(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = to_gguf.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(to_gguf.shutil, "disk_usage", lambda _: usage._replace(free=1 << 30))
    with pytest.raises(
        CapacityError, match=r"needs 0\.0 GiB and 1 GiB to spare, 1\.0 GiB are free"
    ):
        to_gguf.write(four, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_q4_0_token_of_e2b_reads_what_llama_quantize_makes_it_read() -> None:
    # 1.407 GB: sizes that llama.cpp's quantizer prints for its Q4_0 file, less the table.
    config = text_only(PRESETS["E2B"]).text_config
    assert to_gguf.bytes_per_token(config) == pytest.approx(1.407e9, rel=1e-3)


def test_a_token_of_e2b_reads_every_weight_but_the_table(tmp_path: Path) -> None:
    # At 4 bits with a byte to 32, and a float32 step a row; projections of per-layer inputs 8.
    folder = random_checkpoint.made("tiny-E2B", "4", tmp_path)
    config = Gemma4Config.load(folder).text_config
    eights = fours = floats = 0
    for name, shape in expected_shapes(config).items():
        count = int(np.prod(shape))
        if name == "embed_tokens_per_layer.weight":
            continue
        if len(shape) == 1:
            floats += 2 * count
        elif "per_layer" in name:
            eights += count + 4 * shape[0]
        else:
            fours += count * 17 // 32 + 4 * shape[0]
    assert decode.weight_bytes(folder) == eights + fours + floats


def test_only_the_chosen_experts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_checkpoint.made("tiny-26B-A4B", "4", tmp_path)
    config = Gemma4Config.load(folder)
    two_of_six = decode.weight_bytes(folder)
    every = replace(config, text_config=replace(config.text_config, top_k_experts=6))
    monkeypatch.setattr(Gemma4Config, "load", lambda _: every)
    # Six layers of six; gate and up at 4.25 bits and a step, down of 32 inputs with a scale a row.
    experts = 6 * 6 * (2 * 32 * (64 * 17 // 32 + 4) + 64 * 32 * 5 // 8)
    assert decode.weight_bytes(folder) - two_of_six == experts * 4 // 6


def test_every_program_is_given_the_same_tokens() -> None:
    ids = llama_worker.ids_of(300, 1024)
    assert len({*ids}) > 250
    assert 3 <= min(ids) <= max(ids) < 1024
    assert llama_worker.ids_of(100, 1024, 200) == ids[200:]


@torch.inference_mode()
def test_a_worker_does_its_tasks_and_reports_each(four: Path, tmp_path: Path) -> None:
    engine = workers.Gemsmith(str(four))
    tasks: dict[str, list[Any]] = {**peers.tasks_of("tiny-E2B"), "read": ["read", 1 << 20]}
    done = llama_worker.work(engine, tasks)
    assert list(done) == [*tasks]
    assert done["decode 16"]["result"].keys() == {"seconds", "fill"}
    assert all(found["peak"] > 1 << 20 for found in done.values())
    assert len(done["8 streams"]["result"]) == len(done["read"]["result"]) == 1
    ids = [5, 6, 7]
    engine.logits(ids, str(tmp_path / "logits"))
    found = np.fromfile(tmp_path / "logits", np.float32)
    assert_equal(found, Context(engine.lm.model).run(ids).numpy())


@torch.inference_mode()
def test_streams_are_distinct_requests_timed_while_all_of_them_decode(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []
    asked: list[int] = []
    """Of each step, the requests that got a token."""
    clock: list[int] = []
    """Steps done when the time was taken."""

    class Watched(BatchEngine):
        def add(self, request: Request) -> int:
            prompts.append(request.prompt.ids)
            return super().add(request)

        def step(self) -> list[tuple[int, Outcome]]:
            outcomes = super().step()
            asked.append(len(outcomes))
            return outcomes

    def now() -> float:
        clock.append(len(asked))
        return float(len(asked))

    engine = workers.Gemsmith(str(four))
    monkeypatch.setattr(workers, "BatchEngine", Watched)
    monkeypatch.setattr(workers, "time", SimpleNamespace(perf_counter=now))
    assert engine.streams(4, 300, 5) == [5.0]
    assert prompts == [llama_worker.ids_of(300, 1024, 1000 * n) for n in range(4)]
    assert len({tuple(ids) for ids in prompts}) == 4
    assert asked == [4] * 7
    assert clock == [2, 7]


@torch.inference_mode()
def test_transformers_does_the_same_tasks_to_the_same_logits(tmp_path: Path) -> None:
    folder = random_checkpoint.made("tiny-E2B", None, tmp_path / "folder")
    theirs = workers.Transformers(str(folder))
    tasks = {"streams": ["streams", 2, 8, 2], "decode": ["decode", 8, 2], "prefill": ["prefill", 8]}
    assert list(llama_worker.work(theirs, tasks)) == [*tasks]
    ids = llama_worker.ids_of(20, theirs.vocabulary)
    theirs.logits(ids, str(tmp_path / "theirs"))
    workers.Gemsmith(str(folder)).logits(ids, str(tmp_path / "ours"))
    a, b = (np.fromfile(tmp_path / name, np.float32) for name in ("theirs", "ours"))
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


class Stand:
    """Stands where `peers.run` does: a program that fails, or gives made-up seconds."""

    def __init__(
        self, failing: tuple[str, ...] = (), wrong: float = 0.0, stop: int | None = None
    ) -> None:
        """stop: calls after which somebody stops it."""
        self.calls: list[tuple[str, list[str]]] = []
        self.failing, self.wrong, self.stop = failing, wrong, stop

    def __call__(self, program: Any, tasks: dict[str, Any], where: dict[str, Any]) -> Any:
        if len(self.calls) == self.stop:
            raise KeyboardInterrupt
        self.calls.append((program.name, list(tasks)))
        if program.name in self.failing:
            raise RuntimeError("exit code 1: out of luck")
        done = {}
        for name, (method, *arguments) in tasks.items():
            if method == "logits":
                values = np.ones(8, np.float32)
                values[0] += self.wrong if "llama" in program.name else 0.0
                values.tofile(arguments[1])
            seconds = 0.5 if "gemsmith" in program.name else 1.0
            result = {"seconds": seconds, "fill": 2.0} if method == "decode" else [seconds]
            done[name] = {"result": result, "peak": 1000}
        return {"load": 0.1, "about": "an ISA", "version": "1", "tasks": done}


def measured(
    stand: Stand,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    python: tuple[str, str] = ("python", ""),
) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr(peers, "run", stand)
    monkeypatch.setattr(measure, "UNFINISHED", folder / "unfinished")
    monkeypatch.setattr(llama, "python", lambda: python)
    argv = ["peers", "--size", "tiny-E2B", "--folder", str(folder), "--rounds", "2"]
    monkeypatch.setattr("sys.argv", argv)
    peers.main()
    out = capsys.readouterr().out
    return json.loads(out.splitlines()[-1]), out


def test_programs_take_turns_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(failing=("Transformers bf16",))
    record, out = measured(stand, tmp_path, monkeypatch, capsys)
    order = [name for name, tasks in stand.calls if tasks != ["logits"]]
    turn = ["gemsmith int4", "gemsmith mobile", "llama.cpp Q4_0"]
    assert order == [*turn, "Transformers bf16", *turn]
    speeds = record["programs"]["gemsmith int4"]["speeds"]
    assert speeds["decode 16"] == {"median": 8.0, "min": 8.0, "max": 8.0, "n": 2}
    assert speeds["8 streams"]["median"] == 32.0
    assert speeds["prefill 64"]["median"] == 32.0  # the fill of "decode 64"
    assert record["programs"]["llama.cpp Q4_0"]["speeds"]["decode 16"]["median"] == 4.0
    assert record["programs"]["Transformers bf16"]["missing"] == "exit code 1: out of luck"
    assert record["logit_distance"] == 0.0
    assert "gemsmith int4      8 streams  " in out


def test_programs_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two compare logits; then one round of four programs, and one program of the next.
    with pytest.raises(KeyboardInterrupt):
        measured(Stand(stop=7), tmp_path, monkeypatch, capsys)
    again = Stand()
    record, out = measured(again, tmp_path, monkeypatch, capsys)
    left = ["gemsmith mobile", "llama.cpp Q4_0", "Transformers bf16"]
    assert [name for name, tasks in again.calls if tasks != ["logits"]] == left
    assert "goes on after 5 measurements in " in out
    runs = [program["speeds"]["decode 16"]["n"] for program in record["programs"].values()]
    assert runs == [2, 2, 2, 2]
    once_more = Stand()
    measured(once_more, tmp_path, monkeypatch, capsys)
    assert len(once_more.calls) == 2 + 8


def test_without_llama_gemsmith_is_measured_and_the_reason_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ("", "not installed (no compiler)")
    record, out = measured(Stand(), tmp_path, monkeypatch, capsys, absent)
    assert "llama.cpp Q4_0     not installed (no compiler)" in out
    assert record["programs"]["gemsmith int4"]["speeds"]["decode 16"]["n"] == 2
    assert record["logit_distance"] is None
    assert not list(tmp_path.glob("*.gguf"))


def test_nothing_is_timed_where_logits_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand = Stand(wrong=3.0)
    with pytest.raises(SystemExit, match=r"logits are 0\.\d+ off llama.cpp's, more than 0.25"):
        measured(stand, tmp_path, monkeypatch, capsys)
    assert all(tasks == ["logits"] for _, tasks in stand.calls)


def test_a_worker_that_fails_is_quoted(tmp_path: Path) -> None:
    program = peers.Program("x", ["bash", "-c", "echo no luck >&2; exit 3"], tmp_path, 1)
    with pytest.raises(RuntimeError, match="exit code 3: no luck"):
        peers.run(program, {}, {})


def floats_of(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Some weights of a folder as floats, read by gemsmith."""
    _, model = load_model(folder, ple="memory", dtype=torch.float32)
    names = ["embed_tokens", "layers.0.mlp.up_proj", "layers.1.self_attn.o_proj"]
    if hasattr(model, "embed_tokens_per_layer"):
        names += ["embed_tokens_per_layer", "layers.0.per_layer_input_gate"]
        names += ["per_layer_model_projection"]
    out = {}
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if not isinstance(weight, torch.Tensor):
            weight = weight.stored.dequantize()
        out[f"{name}.weight"] = weight.detach().numpy()
    norm: Any = model.norm.weight
    return out | {"norm.weight": norm.detach().numpy()}


def assert_equal(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found, expected)


def test_a_language_model_loads_what_peers_runs(four: Path) -> None:
    assert LM.load(four, device="cpu").generate("x", max_tokens=2).usage.completion_tokens <= 2
