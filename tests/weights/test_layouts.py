"""Low-bit checkpoints: every part is accounted for, and what is not read is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import needs_extension
from tests.weights.low_bit import floats, low_config
from torch import Tensor

from gemsmith.config import Gemma4Config
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.linear import QuantLinear
from gemsmith.quant.packed import Packed
from gemsmith.weights.convert import Recipe, quantize_checkpoint
from gemsmith.weights.layouts import LowBit, check_section, codes_of, words
from gemsmith.weights.load import load_model

STEM = "model.language_model.layers.1.mlp.up_proj.weight"
TABLE = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    quantize_checkpoint(floats(folder / "floats"), folder / "low", Recipe("4"))
    quantize_checkpoint(folder / "floats", folder / "mobile", Recipe("mobile"))
    return folder


def changed(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose tensors `change` was let at."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_eight_codes_of_four_bits_are_one_word_first_lowest(low):
    """As the format's own packer does: u = q + 8, bits 4 i of the word for the i-th."""
    state = load_file(low / "low" / "model.safetensors")
    word, scales = int(state[STEM + "_packed"][0, 0]), state[STEM + "_scale"]
    codes = [((word >> (4 * i)) & 15) - 8 for i in range(8)]
    _, model = load_model(low / "low")
    layer: Any = model.get_submodule("layers.1.mlp.up_proj")
    wanted = torch.tensor(codes) * scales[0, 0].float()
    assert torch.equal(layer.stored.dequantize()[0, :8], wanted)
    assert state[STEM + "_shape"].tolist() == [64, 64]
    assert scales.dtype == torch.bfloat16


@pytest.mark.parametrize("columns", [4, 12, 20, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_filled_up_to_words_and_cut_again(columns, bits):
    codes = torch.arange(3 * columns, dtype=torch.int64).view(3, columns) % (1 << bits)
    weight = Quantized.from_codes(
        Format(bits), (codes - (1 << (bits - 1))).char(), torch.ones(3, 1)
    )
    stored = words(weight.packed)
    assert stored.dtype == torch.int32
    assert stored.shape == (3, -(-columns * bits // 32))
    place = LowBit(weight.format, weight.shape, "", "", None)
    assert torch.equal(codes_of(stored, place), weight.packed)


def test_codes_in_memory_are_the_file(low, monkeypatch):
    """No copy, where no kernel wants another order: they lie in a private mapping of the file."""
    monkeypatch.setattr(Packed, "takes", lambda *_: False)
    _, model = load_model(low / "low")
    layer = model.get_submodule("layers.1.mlp.up_proj")
    assert isinstance(layer, QuantLinear)
    address = layer.codes.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith(str(low / "low" / "model.safetensors"))
            return
    raise AssertionError("the codes are nowhere in the memory map")


def test_int8_weights_stored_plainly_are_read_in_either_layout(low, tmp_path):
    """`int-quantized` of compressed-tensors: int8 codes under the weight's own name."""

    def plain(state: dict[str, Tensor]) -> None:
        for part in ("_packed", "_shape"):
            del state[STEM + part]
        state[STEM] = (torch.arange(64 * 64) % 255 - 127).view(64, 64).char()
        state[STEM + "_scale"] = torch.full((64, 1), 0.5, dtype=torch.bfloat16)

    _, model = load_model(changed(low / "low", tmp_path / "plain", plain))
    layer: Any = model.get_submodule("layers.1.mlp.up_proj")
    assert str(layer.format) == "int8"
    assert layer.stored.dequantize().flatten()[:3].tolist() == [-63.5, -63, -62.5]


def test_tables_of_several_scales_a_row_and_static_scales_are_read(low, tmp_path):
    """Some mobile files hold a PLE scale for each layer; scales of activations are left aside."""
    key = "model.language_model.embed_tokens_per_layer.embedding_scale"

    def several(state: dict[str, Tensor]) -> None:
        rows = len(state[key])
        state[key] = torch.arange(1.0, 9.0).repeat(rows, 1) * 0.001
        state["model.language_model.layers.0.self_attn.k_cache_scale"] = torch.tensor(0.1)

    folder = changed(low / "mobile", tmp_path / "several", several)
    for ple in ("disk", "memory"):
        _, model = load_model(folder, ple=ple)
        rows = model.embed_tokens_per_layer(torch.tensor([7])).float().view(8, -1)
        codes = (rows / (torch.arange(1.0, 9.0) * 0.001)[:, None]).round()
        assert codes.abs().max() <= 8
        assert codes.ne(0).any(-1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop(STEM + "_scale"),
            r"up_proj.weight_packed is there without .*weight_scale",
        ),
        (
            lambda s: s.pop(STEM + "_shape"),
            r"up_proj.weight_packed is there without .*weight_shape",
        ),
        (lambda s: s.pop(STEM + "_packed"), r"1 tensor missing:\n.*up_proj.weight\n"),
        (lambda s: s.update({STEM: torch.zeros(64, 64)}), r"up_proj.weight is stored twice"),
        (
            lambda s: s.update({STEM + "_zero_point": torch.zeros(64, 2)}),
            r"no place in this model:\n.*weight_zero_point\n.*quantized in a way that is not read",
        ),
        (
            lambda s: s.update({STEM + "_packed": s[STEM + "_packed"][:, :-1].contiguous()}),
            r"weight_packed is I32 \[64, 7\], which is not \[64, 64\] in 2, 4 or 8 bits",
        ),
        (
            lambda s: s.update({STEM + "_packed": s[STEM + "_packed"][:-1].contiguous()}),
            r"weight_packed is I32 \[63, 8\], which is not \[64, 64\]",
        ),
        (
            lambda s: s.update({STEM + "_packed": torch.zeros(64, 32, dtype=torch.uint8)}),
            r"weight_packed is U8 \[64, 32\], which is not",
        ),
        (
            lambda s: s.update({STEM + "_scale": torch.ones(64, 3)}),
            r"weight_scale is F32 \[64, 3\]; scales of .* a divisor of 64",
        ),
        (
            lambda s: s.update({STEM + "_scale": torch.ones(64, 2, dtype=torch.int32)}),
            r"weight_scale is I32 \[64, 2\]; scales of .*F32, BF16, F16",
        ),
        (
            lambda s: s.update({STEM + "_shape": torch.tensor([64, 60])}),
            r"weight_shape says \[64, 60\], this model has \[64, 64\]",
        ),
        (
            lambda s: s.update({"model.language_model.norm.weight_packed": torch.zeros(1).int()}),
            r"norm.weight_packed is there without",
        ),
        (
            lambda s: s.update(
                {"model.language_model.nowhere.weight_packed": torch.zeros(1).int()}
            ),
            r"no place in this model:\n.*nowhere.weight_packed",
        ),
    ],
)
def test_damaged_parts_are_named(low, tmp_path, change, message):
    with pytest.raises(WeightsError, match=message):
        load_model(changed(low / "low", tmp_path / "bad", change))


def test_a_tied_head_must_be_the_embedding_code_for_code(low, tmp_path):
    def with_head(state: dict[str, Tensor]) -> None:
        for part in ("_packed", "_scale", "_shape"):
            state["lm_head.weight" + part] = state[TABLE + part].clone()

    load_model(changed(low / "low", tmp_path / "same", with_head))

    def other(state: dict[str, Tensor]) -> None:
        with_head(state)
        state["lm_head.weight_packed"][0, 0] += 1

    with pytest.raises(WeightsError, match=r"lm_head.weight differs from .*embed_tokens.weight"):
        load_model(changed(low / "low", tmp_path / "other", other))


GROUP = {"weights": {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group"}}


def section(**weights: Any) -> dict[str, Any]:
    group = {"weights": GROUP["weights"] | weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "quantization_config: expected a JSON object, got list"),
        ({}, "quant_method None is not read; gemsmith reads compressed-tensors and gemma"),
        ({"quant_method": "gptq"}, r"quant_method 'gptq' is not read.*\(gemsmith quantize\)"),
        ({"quant_method": ["x" * 500]}, r"quant_method .{80} is not read"),
        (section(num_bits=3), "weights of 'group_0' have num_bits 3; read are symmetric integers"),
        (section(type="float", num_bits=8), "have type 'float'"),
        (section(symmetric=False), "have symmetric False"),
        (section(strategy="tensor"), "have strategy 'tensor'"),
        (section(actorder="group", num_bits=[4]), r"have num_bits \[4\], actorder 'group'"),
    ],
)
def test_methods_that_are_not_read_are_named(low, tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        check_section(data)
    config = json.loads((low / "low" / "config.json").read_text()) | {"quantization_config": data}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((low / "low" / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("groups", [None, [], 3, {"a": None}, {"a": {"weights": None}}])
def test_sections_without_weights_say_nothing(groups):
    check_section({"quant_method": "compressed-tensors", "config_groups": groups})


def test_a_section_of_nonsense_is_refused():
    groups = {"a": {"weights": {"type": {}, "num_bits": None}}}
    with pytest.raises(ConfigError, match=r"weights of 'a' have type {}, num_bits None"):
        check_section({"quant_method": "compressed-tensors", "config_groups": groups})


def test_patterns_in_config_json_are_never_run(low, tmp_path):
    """A regular expression that would take years is only text here."""
    config = json.loads((low / "mobile" / "config.json").read_text())
    evil = {"(a*)*(b|model)+$" * 20: {"num_bits": 2}}
    config["quantization_config"]["module_quant_configs"] = evil
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(
        (low / "mobile" / "model.safetensors").read_bytes()
    )
    load_model(tmp_path)


def test_the_config_says_what_was_written(low):
    config = json.loads((low / "low" / "config.json").read_text())
    assert Gemma4Config.from_dict(config) == low_config()
    groups = config["quantization_config"]["config_groups"].values()
    found = {
        name: (group["weights"]["num_bits"], group["weights"]["group_size"])
        for group in groups
        for name in group["targets"]
    }
    prefix = "model.language_model."
    assert found[prefix + "layers.0.self_attn.q_proj"] == (4, 32)
    assert found[prefix + "embed_tokens"] == (4, 32)
    assert found[prefix + "layers.0.per_layer_projection"] == (8, None)
    assert prefix + "norm" not in found
    mobile = json.loads((low / "mobile" / "config.json").read_text())
    assert mobile["tie_word_embeddings"] is False
    section = mobile["quantization_config"]
    assert section["modules_to_not_convert"] == [prefix + "per_layer_model_projection"]
    assert section["module_quant_configs"][r"(^|\.)lm_head$"] == {"num_bits": 2}


def formats(folder: Path) -> dict[str, str]:
    modules = load_model(folder)[1].named_modules()
    return {name: str(m.format) for name, m in modules if isinstance(m, QuantLinear)}


def noted(folder: Path, target: Path, change) -> Path:
    """A copy of the 4-bit checkpoint whose notes of steps `change` was let at."""
    changed(folder / "low", target, lambda state: None)
    config = json.loads((target / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        change(group)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_the_config_says_which_scales_are_steps(low, tmp_path):
    """Without the note they are read as any others; both give nearly the same products."""
    found = formats(low / "low")
    assert found["layers.0.self_attn.q_proj"] == found["layers.7.mlp.down_proj"] == "int4-g32s"
    assert found["layers.0.per_layer_projection"] == "int8"
    folder = noted(low, tmp_path / "free", lambda g: g["weights"].update(observer_kwargs={}))
    assert formats(folder)["layers.0.self_attn.q_proj"] == "int4-g32"
    layers: list[Any] = [
        load_model(each)[1].get_submodule("layers.1.mlp.up_proj") for each in (low / "low", folder)
    ]
    assert torch.equal(*(layer.stored.dequantize() for layer in layers))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g["weights"].update(observer_kwargs=3),
        lambda g: g["weights"].update(observer_kwargs={"steps": "yes"}),
        lambda g: g.update(targets={"a": 1}),
        lambda g: g.update(targets=[[], None, 3, "re:.*"]),
        lambda g: g.update(weights=None),
    ],
)
def test_notes_of_nonsense_say_nothing(low, tmp_path, change):
    assert formats(noted(low, tmp_path / "x", change))["layers.0.self_attn.q_proj"] == "int4-g32"


def test_a_note_on_a_format_without_steps_says_nothing(low, tmp_path):
    folder = noted(
        low, tmp_path / "x", lambda g: g["weights"].update(observer_kwargs={"steps": True})
    )
    assert formats(folder) == formats(low / "low")


@needs_extension
def test_scales_that_are_no_steps_as_the_config_says_are_named(low, tmp_path):
    def change(state: dict[str, Tensor]) -> None:
        state[STEM + "_scale"][3, 1] *= 1.0625 * 1.125

    folder = changed(low / "low", tmp_path / "x", change)
    message = r"layers.1.mlp.up_proj.weight: scales of row 3 are not .* config.json says they are"
    with pytest.raises(WeightsError, match=message):
        load_model(folder)
