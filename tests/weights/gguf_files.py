"""GGUF files for tests, made by the gguf package: whole small ones, and large ones without data."""

from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from benchmarks import to_gguf
from gemsmith.config import TextConfig
from gemsmith.shapes import Shape
from gemsmith.weights.names import expected_shapes


def kind_of(name: str, shape: Shape) -> Kind:
    return to_gguf.kind_of(name, shape, low=True)


def described(
    path: Path,
    config: TextConfig,
    kind: Callable[[str, Shape], Kind] = kind_of,
    *,
    split: int = 1,
) -> dict[str, int]:
    """Write a model's file with a hole for its data: bytes of each tensor by our names.

    split: it says that it is the first of so many files.
    """
    writer = gguf.GGUFWriter(path, "gemma4")
    if split > 1:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", split)
    to_gguf.add_metadata(writer, config, low=True)
    writer.add_token_list(["a", "", "bc"])
    sizes: dict[str, int] = {}
    end = 0
    for name, shape in expected_shapes(config).items():
        per, size = gguf.GGML_QUANT_SIZES[kind(name, shape)]
        stored = (*shape[:-1], shape[-1] // per * size)
        sizes[name] = int(np.prod(stored, dtype=np.int64))
        end += -end % 32 + sizes[name]
        key, width = to_gguf.gguf_name(name), np.dtype(np.uint8)
        writer.add_tensor_info(key, stored, width, sizes[name], kind(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.fout[0].truncate(writer.fout[0].tell() + end + -end % 32)
    writer.close()
    return sizes


INPUTS = {
    "v.blk.0.attn_q.weight": (64, 48),
    "mm.input_projection.weight": (32, 64),
    "a.conv1d.0.weight": (40, 3),
    "mm.a.input_projection.weight": (32, 40),
}
"""Of image and sound input: names as llama.cpp's, and shapes."""


def inputs(path: Path, *, architecture: str = "clip", names: Iterable[str] = INPUTS) -> int:
    """Write a file of image and sound input, in float16: bytes of its tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    made = {name: np.zeros(INPUTS.get(name, (2, 3)), np.float16) for name in names}
    for name, values in made.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sum(values.nbytes for values in made.values())


def small(path: Path) -> bytes:
    """A file of a few hundred bytes with values of every sort; no model."""
    writer = gguf.GGUFWriter(path, "gemma4")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window_pattern([True, False])
    writer.add_token_list(["a", "", "bc"])
    writer.add_token_scores([0.0] * 3)
    writer.add_add_space_prefix(False)
    writer.add_tensor("token_embd.weight", np.ones((3, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 18), np.uint8), raw_dtype=Kind.Q4_0)
    writer.add_tensor("odd", np.ones((5, 2), np.uint8), raw_dtype=Kind.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
