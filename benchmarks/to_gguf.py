"""Writes a decoder of a checkpoint folder as the GGUF file that llama.cpp reads, for benchmarks.

Of a bfloat16 folder matrices stay bfloat16. Of a 4-bit one (groups of 32) the file has the types
that llama.cpp's own quantizer gives under Q4_0: Q4_0 for matrices, Q6_K for embedding and per-layer
table, bfloat16 for the projection of per-layer inputs. Q4_0 holds our codes and scales as they are,
Q6_K holds them too where 256 weights share a scale, as in random checkpoints. So both programs
multiply with the same numbers, and need not be asked to quantize 9 GB first. Only what we keep in 8
bits and Q4_0 does not (gate and projection of per-layer inputs, the per-layer table) is rounded.

What it is not: an export. There is no chat template in it, and towers are left out.

Sources: llama.cpp's `conversion/gemma.py` for names and metadata, its `ggml-common.h` for blocks.

Run: python -m benchmarks.to_gguf FOLDER FILE
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from gemsmith.config import Gemma4Config, TextConfig
from gemsmith.errors import CapacityError
from gemsmith.quant.formats import unpack
from gemsmith.text.tokenizer import MARKERS
from gemsmith.weights import layouts
from gemsmith.weights.gguf import NAMES
from gemsmith.weights.layouts import LowBit
from gemsmith.weights.names import EMBEDDING, PLE_TABLE, expected_shapes, written_key
from gemsmith.weights.tensors import StoredTensor, read_checkpoint

BITS = {Kind.Q4_0: 4, Kind.Q6_K: 6, Kind.Q8_0: 8}
PIECE_WEIGHTS = 1 << 22
SHOWN = {
    MARKERS[role]
    for role in ("channel_open", "channel_close", "tool_call_open", "tool_call_close",
                 "tool_response_open", "tool_response_close", "quote")
}  # fmt: skip
"""Markers that llama.cpp's reader of replies must see; of others it makes no text."""

Bytes = NDArray[np.uint8]


def write(folder: Path, path: Path) -> Path:
    """Make `path` the GGUF of the checkpoint in `folder`; a complete one is kept.

    Raises:
      CapacityError: the disk has no room for it.
    """
    config = Gemma4Config.load(folder)
    text = config.text_config
    stored = read_checkpoint(folder)
    shapes = expected_shapes(text)
    low = layouts.fold(stored, shapes)[1]
    kinds = {name: kind_of(name, shape, low=bool(low)) for name, shape in shapes.items()}
    sizes = {name: _bytes(shape, kinds[name]) for name, shape in shapes.items()}
    newest = max(tensor.file.stat().st_mtime for tensor in stored.values())
    kept = path.stat() if path.is_file() else None
    if kept and kept.st_size > sum(sizes.values()) and kept.st_mtime > newest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < sum(sizes.values()) + (1 << 30):
        raise CapacityError(
            f"{path}: needs {sum(sizes.values()) / 2**30:.1f} GiB and 1 GiB to spare, "
            f"{free / 2**30:.1f} GiB are free; name another --folder"
        )
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "gemma4")
    add_metadata(writer, text, low=bool(low))
    _vocabulary(writer, folder, text.vocab_size)
    factors = rope_factors(text)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, shape in shapes.items():
        kind = kinds[name]
        if kind == Kind.F32:
            writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), sizes[name])
        else:
            per, size = gguf.GGML_QUANT_SIZES[kind]
            stored_shape = (*shape[:-1], shape[-1] // per * size)
            writer.add_tensor_info(
                gguf_name(name), stored_shape, np.dtype(np.uint8), sizes[name], kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout, "the file that was just written to"
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    file.write(factors.data)
    writer.write_padding(file, factors.nbytes)
    for name in shapes:
        key = written_key(name)
        for values, scales, bits in _rows(stored, key, low.get(key)):
            file.write(encode(values, kinds[name], scales, bits).data)
        writer.write_padding(file, sizes[name])
    writer.close()
    part.rename(path)
    return path


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor of ours."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    block, rest = (f"blk.{found[1]}.", found[2]) if found else ("", name)
    ours = next(ours for ours in NAMES if rest.removesuffix("weight") == ours)
    return block + rest.replace(ours, NAMES[ours])


def kind_of(name: str, shape: tuple[int, ...], *, low: bool) -> Kind:
    """The type of a tensor: what llama.cpp's quantizer gives under Q4_0 if `low`."""
    if len(shape) == 1 or ".router." in name:
        return Kind.F32
    if not low or name == "per_layer_model_projection.weight" or shape[-1] % 32:
        return Kind.BF16  # a block is 32 weights of one row
    if name not in (EMBEDDING, PLE_TABLE):
        return Kind.Q4_0
    return Kind.Q6_K if shape[-1] % 256 == 0 else Kind.Q8_0


def bytes_per_token(config: TextConfig) -> int:
    """Bytes of a 4-bit file's weights that one token reads: of experts those chosen, no table."""
    total = 0
    for name, shape in expected_shapes(config).items():
        nbytes = _bytes(shape, kind_of(name, shape, low=True))
        if "experts." in name:
            nbytes = nbytes * (config.top_k_experts or 0) // (config.num_experts or 1)
        total += 0 if name == PLE_TABLE else nbytes
    return total


def encode(q: NDArray[Any], kind: Kind, scale: NDArray[np.float32] | None, bits: int) -> Bytes:
    """Rows as bytes of a type: floats [n, K], or codes [n, K] of so many bits, scales [n, G].

    Raises:
      ValueError: weights that this type gives one scale have several.
    """
    if scale is None:
        return q.astype(np.float32).view(np.uint8) if kind == Kind.F32 else bfloat16(q)
    K, groups = q.shape[-1], scale.shape[-1]
    if kind == Kind.BF16:
        return bfloat16(q * np.repeat(scale, K // groups, axis=-1))
    per = gguf.GGML_QUANT_SIZES[kind][0]
    of_blocks = np.repeat(scale, max(1, K // per // groups), axis=-1).reshape(q.size // per, -1)
    if (of_blocks != of_blocks[:, :1]).any():
        raise ValueError(f"{kind.name}: {per} weights with several scales")
    least, lost = 1 << (BITS[kind] - 1), max(0, bits - BITS[kind])
    q = q.reshape(-1, per)
    if lost:  # codes of more bits than the type has: rounded to those it has
        q = np.clip((q.astype(np.int16) + (1 << lost >> 1)) >> lost, -least, least - 1)
    u: Bytes = np.add(q.astype(np.uint8), np.uint8(least), dtype=np.uint8)
    d = (of_blocks[:, :1] * (1 << lost)).astype(np.float16).view(np.uint8)
    if kind == Kind.Q8_0:
        parts = [d, u ^ 128]
    elif kind == Kind.Q4_0:
        parts = [d, u[:, :16] | u[:, 16:] << 4]
    else:
        # Q6_K: of each half four runs of 32; low four bits of two runs in a byte, high two of four.
        runs = u.reshape(-1, 2, 4, 32)
        low, high = runs & 15, runs >> 4
        low = low[:, :, :2] | low[:, :, 2:] << 4
        high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
        ones = np.ones((len(u), 16), np.uint8)
        parts = [low.reshape(len(u), -1), high.reshape(len(u), -1), ones, d]
    return np.concatenate(parts, axis=-1).astype(np.uint8, copy=False)


def bfloat16(values: NDArray[Any]) -> Bytes:
    """Bytes of values that bfloat16 holds exactly."""
    return torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.uint8).numpy()


def rope_factors(config: TextConfig) -> NDArray[np.float32]:
    """Divisors of the frequencies of full layers: those not rotated are switched off."""
    half = config.global_head_dim // 2
    rotated = int(config.full_rope.partial_rotary_factor * half)
    return np.where(np.arange(half) < rotated, 1, 1e30).astype(np.float32)


def _bytes(shape: tuple[int, ...], kind: Kind) -> int:
    per, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // per * size


def _rows(
    stored: dict[str, StoredTensor], key: str, low: LowBit | None
) -> Iterator[tuple[NDArray[Any], NDArray[np.float32] | None, int]]:
    """Some rows at a time: floats, or codes with their scales and bits."""

    def mapped(key: str) -> Tensor:
        with safe_open(stored[key].file, "pt") as file:
            tensor = file.get_tensor(key)
        return tensor.reshape(-1, tensor.shape[-1])

    values = mapped(low.codes if low else key)
    step = max(1, PIECE_WEIGHTS // values.shape[-1])
    scales = mapped(low.scales) if low else values
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        if low is None:
            yield rows.float().numpy(), None, 0
            continue
        q = unpack(layouts.codes_of(rows.contiguous(), low), low.format.bits)
        yield q.numpy(), scales[start : start + step].float().numpy(), low.format.bits


def add_metadata(writer: gguf.GGUFWriter, config: TextConfig, *, low: bool) -> None:
    """The keys of a decoder."""
    plans = config.layers
    writer.add_name("random")
    writer.add_block_count(len(plans))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length([plan.intermediate_size for plan in plans])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([plan.num_key_value_heads for plan in plans])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for width in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        width(config.global_head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base(config.full_rope.rope_theta)
    writer.add_rope_freq_base_swa(config.sliding_rope.rope_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([plan.window is not None for plan in plans])
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts or 0)
        writer.add_expert_used_count(config.top_k_experts or 0)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size or 0)
    file_type = gguf.LlamaFileType.MOSTLY_Q4_0 if low else gguf.LlamaFileType.MOSTLY_BF16
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """The folder's own tokens, which llama.cpp joins in the same order.

    It has one way to split a text first, Gemma 4's (at line ends alone), whatever the folder says.
    """
    told = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids: dict[str, int] = told["model"]["vocab"]
    tokens = [f"<unused{id}>" for id in range(size)]
    types = [int(gguf.TokenType.NORMAL)] * size
    for token, id in ids.items():
        tokens[id] = token
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[id] = int(gguf.TokenType.BYTE)
    for added in told["added_tokens"]:
        tokens[added["id"]] = added["content"]
        shown = added["content"] in SHOWN
        types[added["id"]] = int(gguf.TokenType.USER_DEFINED if shown else gguf.TokenType.CONTROL)
    merges = [" ".join(pair) for pair in told["model"]["merges"]]
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(types)
    writer.add_token_merges(merges or ["? ?"])  # a list may not be empty; these never meet
    for add, token in (
        (writer.add_pad_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):
        add(token)
    writer.add_add_space_prefix(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    print(write(options.folder, options.file))
