"""What a model takes: parameters, bytes of weights and K/V, workspace. What it does is in work.py.

The cache allocates by these functions, `load` refuses by them, and `info` and `fit` report by them,
so that none can disagree. Standard library only; nothing is measured here but what is said to be.
GiB is 2^30 bytes.

Three places where a weight takes room, which differ by up to a fifth:
  file    as `gemsmith quantize` and `save_model` write it
  cpu     as the CPU's kernels read it: rows filled up to blocks of 16, what stays floats in float32
          (but for a projection that the mobile mix leaves in bfloat16)
  gpu     codes as in the file with float32 scales, what stays floats in bfloat16

Formats are those of weights/recipe.py: float32 and bfloat16 as they are, int8, int4, int2 (groups
of 32 at 4 and 2 bits), and Google's mobile mix. Scales of groups are taken to be steps; a weight
that steps would spoil keeps free ones (quant/quantize.py): for the CPU's kernels a 17th more at 4
bits, a 9th at 2.

Sources: exact shapes of the checkpoints (shapes.py); weights/layouts.py and ops/cpu.py for bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from gemsmith import shapes
from gemsmith.config import Gemma4Config, LayerPlan, TextConfig, VisionConfig, published_drafter
from gemsmith.errors import CapacityError, ConfigError
from gemsmith.shapes import Tensor

Place = Literal["file", "cpu", "gpu"]
FLOATS = {"float32": 4, "bfloat16": 2}
"""Bytes of a value."""
LOW_BITS = {"int8": 8, "int4": 4, "int2": 2}
FORMATS = (*FLOATS, *LOW_BITS, "mobile")
GROUP = 32
"""Weights to a scale at 4 and 2 bits."""
WORD, BLOCK, LINE = 4, 16, 64
"""Bytes a row of codes is filled up to in compressed-tensors' layout; rows of a block and bytes of
a line in the order of the CPU's kernels."""
KV_VALUES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of a value, by how K/V are stored."""
KV_SCALE_BYTES = 4
"""int8 K/V has a float32 scale a token and head, for keys and for values."""
SLAB_STEP = 256
BLOCK_TOKENS = 64
"""Tokens of a block of paged K/V: half a block is unused in a sequence, on average."""
CHUNK_TOKENS = 512
"""Prompt tokens run in one pass, as in engine/context.py."""
RUNTIME_BYTES: dict[str, int] = {"cpu": 253 << 20, "gpu": 600 << 20}
"""What a process takes before any weight. cpu: resident memory of a process that answered with the
smallest models, their weights taken off (Linux, x86-64, torch 2.13 for CPUs). gpu: a CUDA context
with torch's kernels; an estimate, not measured by us."""
PRODUCTS_BYTES = 60 << 20
"""What torch keeps of products of bfloat16s that the CPU multiplies itself: code made for each
shape and number of rows, as much as `gemsmith.PRODUCTS_KEPT` allows. Measured, of pocket and of E2B
with prompts of ever new lengths."""
VOCABULARY_BYTES = 100
"""Of each entry of a compiled vocabulary, mapped: 25 MiB of Gemma's."""

# -- parameters -----------------------------------------------------------------------------------


def parameters(config: Gemma4Config) -> dict[str, int]:
    """Trainable weights by part of the model, see `shapes.Tensor.part`; their sum is its size."""
    return _counted([*shapes.decoder(config.text_config), *shapes.towers(config)])


def layer_parameters(config: TextConfig, plan: LayerPlan) -> dict[str, int]:
    """Trainable weights of one layer by part."""
    return _counted(shapes.layer(config, plan))


def text_parameters(config: TextConfig) -> int:
    """Trainable weights of the decoder alone."""
    return sum(_counted(shapes.decoder(config)).values())


def active_parameters(config: TextConfig) -> int:
    """Weights that one token passes through, the embedding included."""
    parts = _counted(shapes.decoder(config))
    if config.enable_moe_block:
        parts["experts"] *= config.top_k_experts or 0
        parts["experts"] //= config.num_experts or 1
    return sum(parts.values())


def shared_kv_leftovers(config: TextConfig) -> int:
    """Values of the K/V projections that released files store for layers that never use them."""
    return sum(_counted(shapes.shared_kv(config)).values())


def stored_values(config: Gemma4Config) -> int:
    """Values in a released checkpoint, clip scalars left out, as model pages count them."""
    vision = config.vision_config
    std_values = 0
    if isinstance(vision, VisionConfig) and vision.standardize:
        std_values = 2 * vision.hidden_size
    return (
        sum(parameters(config).values())
        + shared_kv_leftovers(config.text_config)
        + config.text_config.num_hidden_layers
        + std_values
    )


def drafter_parameters(config: Gemma4Config) -> int:
    """Trainable weights of the drafter that is published beside this size."""
    return _counted(shapes.drafter(published_drafter(config.text_config)))["drafter"]


def _counted(tensors: Iterable[Tensor]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for tensor in tensors:
        if tensor.trained:
            parts[tensor.part] = parts.get(tensor.part, 0) + math.prod(tensor.shape)
    return parts


# -- weights --------------------------------------------------------------------------------------


def low_bits(tensor: Tensor, config: TextConfig, format: str) -> tuple[int, int | None] | None:
    """Bits and weights to a scale (None: a row) of a tensor in a format; None: floats.

    The rule of `weights.recipe.Recipe`, which says why.
    """
    part = tensor.part
    if format in FLOATS or not tensor.linear or part == "drafter":
        return None
    mobile = format == "mobile"
    if part == "ple_table":
        return (4, None) if mobile else (8, config.hidden_size_per_layer_input)
    if part == "ple_projection" and mobile:
        return None
    if part in ("ple", "ple_projection") or part.startswith(("vision", "audio")):
        return 8, None
    if not mobile:
        bits = LOW_BITS[format]
        return bits, None if bits == 8 else GROUP
    if part == "mlp":
        return (4 if config.layers[_layer_of(tensor)].owns_kv else 2), None
    return (2 if part in ("embedding", "head") else 4), None


def weight_bytes(
    config: Gemma4Config,
    format: str,
    place: Place = "file",
    *,
    towers: bool = True,
    drafter: bool = False,
    ple_in_memory: bool = False,
    stored: str = "bfloat16",
) -> dict[str, int]:
    """Bytes of weights by part of the model.

    file: all tensors of the checkpoint that gemsmith writes, its header left out (the K/V tensors
    that no layer uses are not written). cpu, gpu: what is held in memory; the per-layer table is 0
    unless `ple_in_memory`, its rows are read from the disk. stored: the floats of the file.

    Raises:
      ConfigError: no such format, or its layout has no place for this model's experts.
    """
    options = (towers, drafter, ple_in_memory, stored)
    return dict(_weight_bytes(config, format, place, *options))


@lru_cache(maxsize=512)
def _weight_bytes(
    config: Gemma4Config,
    format: str,
    place: Place,
    towers: bool,
    drafter: bool,
    ple_in_memory: bool,
    stored: str,
) -> tuple[tuple[str, int], ...]:
    text = check_format(config, format)
    tensors = [*shapes.decoder(text)]
    if format == "mobile" and text.tie_word_embeddings:
        # The mobile layout has the head apart from the embedding.
        tensors.append(Tensor("lm_head.weight", tensors[0].shape, "head", linear=True))
    tensors += shapes.towers(config) if towers else ()
    tensors += shapes.drafter(published_drafter(text)) if drafter else ()
    width = FLOATS[stored if format not in FLOATS else format]
    if place != "file" and format not in FLOATS:
        width = 4 if place == "cpu" else 2
    parts: dict[str, int] = {}
    for tensor in tensors:
        if tensor.part == "ple_table" and place != "file" and not ple_in_memory:
            continue
        bits = low_bits(tensor, text, format)
        if bits is None:
            each = width
            if format == "mobile" and tensor.part == "ple_projection" and tensor.linear:
                each = min(width, FLOATS[stored])  # kernels read it as it is stored
            if tensor.part == "drafter":
                each = 8 if tensor.name == shapes.TOKEN_ORDERING else 2
            nbytes = math.prod(tensor.shape) * each
        elif place == "file":
            nbytes = _in_file(tensor, *bits, mobile=format == "mobile")
        else:
            steps = bits[0] < 8 and bits[1] is not None
            nbytes = held_bytes(tensor.shape, *bits, place, steps=steps)
        parts[tensor.part] = parts.get(tensor.part, 0) + nbytes
    return tuple(parts.items())


def check_format(config: Gemma4Config, format: str) -> TextConfig:
    """The decoder's config, if the format is known and can hold it.

    Raises:
      ConfigError: it is not, or cannot.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r}: must be one of {', '.join(FORMATS)}")
    if format == "mobile" and config.text_config.enable_moe_block:
        raise ConfigError("format 'mobile': its layout has no place for experts; use int4")
    return config.text_config


def _in_file(tensor: Tensor, bits: int, group: int | None, *, mobile: bool) -> int:
    """Codes, scales, and what the layout puts beside them."""
    *rows, K = tensor.shape
    row = K * bits // 8
    scales = K // group if group else 1
    if mobile:
        # Scales of activations stand beside every matrix that is no table.
        beside = 0 if tensor.part in ("embedding", "ple_table") else 8
        return math.prod(rows) * (row + 4 * scales) + beside
    row += -row % WORD
    return math.prod(rows) * (row + (2 if group else 4) * scales) + 8 * len(tensor.shape)


def held_bytes(
    shape: tuple[int, ...], bits: int, group: int | None, place: Place, *, steps: bool = False
) -> int:
    """Bytes in memory of a low-bit weight [..., N, K]: as ops/cpu.py lays codes and scales out, or
    on a GPU as they are, scales in float32. steps: whether scales of several groups are steps."""
    *stack, N, K = shape
    scales = K // group if group else 1
    if place != "cpu":
        return math.prod(stack) * N * (K * bits // 8 + 4 * scales)
    blocks, lines = -(-N // BLOCK), -(-K * bits // 32)
    if steps and scales > 1:
        return math.prod(stack) * blocks * LINE * (lines + 1 + -(-scales // 4))
    width = 2 if scales > 1 and blocks * scales % 2 == 0 else 4
    return math.prod(stack) * blocks * (lines * LINE + scales * BLOCK * width)


def _layer_of(tensor: Tensor) -> int:
    return int(tensor.name.split(".")[1])


# -- keys and values ------------------------------------------------------------------------------


def slab_tokens(tokens: int) -> int:
    """Tokens a growing K/V slab holds once it must hold `tokens`.

    Steps of an eighth of the power of two below, at least 256: appending copies each token a
    bounded number of times on average, and at most an eighth is unused.
    """
    if tokens <= 0:
        return 0
    step = max(SLAB_STEP, (1 << (tokens.bit_length() - 1)) // 8)
    return -(-tokens // step) * step


def kv_layer_bytes(plan: LayerPlan, tokens: int, bytes_per_value: int = 2) -> int:
    """K/V bytes of one sequence of `tokens` tokens in one layer.

    A sliding layer stops growing at its window. A K = V layer stores V alone and rebuilds K when
    it is read. A layer that reads another layer's K/V stores nothing. One byte a value is int8,
    which has scales beside it.
    """
    return _kv(plan, slab_tokens(tokens), bytes_per_value) if plan.owns_kv else 0


def kv_bytes(config: TextConfig, tokens: int, bytes_per_value: int = 2, sequences: int = 1) -> int:
    """K/V bytes of so many sequences of `tokens` tokens each in all layers."""
    return sequences * sum(kv_layer_bytes(p, tokens, bytes_per_value) for p in config.layers)


def kv_twice_bytes(config: TextConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """What exactly `tokens` tokens take where K = V layers store both, as other engines do."""
    return sum(
        _kv(plan, tokens, bytes_per_value) * (2 if plan.k_eq_v else 1)
        for plan in config.layers
        if plan.owns_kv
    )


def kv_naive_bytes(config: TextConfig, tokens: int) -> int:
    """What the usual formula says: every layer keeps every token, all heads alike, 16 bits."""
    values = config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * tokens * values * 2 * 2


def largest_context(
    config: TextConfig,
    memory: int,
    bytes_per_value: int = 2,
    sequences: int = 1,
    *,
    value_bytes: int | None = None,
) -> int:
    """The most tokens a sequence may have so that all K/V fit `memory` bytes; 0: none does.

    value_bytes: of a float in computing; with it the workspace has to fit beside K/V.
    """
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        need = kv_bytes(config, middle, bytes_per_value, sequences)
        if value_bytes is not None:
            need += activation_bytes(config, middle, value_bytes=value_bytes)
        if need <= memory:
            low = middle
        else:
            high = middle - 1
    return low


def _kv(plan: LayerPlan, held: int, bytes_per_value: int) -> int:
    held = held if plan.window is None else min(held, plan.window)
    copies = 1 if plan.k_eq_v else 2
    return held * plan.num_key_value_heads * copies * head_bytes(plan.head_dim, bytes_per_value)


def head_bytes(head_dim: int, bytes_per_value: int) -> int:
    """One token's keys or values in one head."""
    return head_dim * bytes_per_value + (KV_SCALE_BYTES if bytes_per_value == 1 else 0)


# -- keys and values of many sequences ------------------------------------------------------------


def blocks_spanned(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Most blocks that `tokens` consecutive tokens lie in, wherever the first of them is."""
    return -(-(tokens - 1) // block_tokens) + 1 if tokens > 0 else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class KVPlan:
    """How much K/V there is for many sequences: blocks of full layers, and of sliding ones."""

    full_blocks: int
    sliding_blocks: int
    window: int | None
    """Tokens that sliding layers see; None where there are none of them."""
    block_tokens: int
    max_model_len: int
    """Tokens of the longest sequence that surely fits, alone."""
    max_num_seqs: int
    max_num_batched_tokens: int
    nbytes: int

    @property
    def full_tokens(self) -> int:
        """Tokens of all sequences that full layers can hold at a time."""
        return self.full_blocks * self.block_tokens


def kv_block_bytes(
    config: TextConfig,
    *,
    sliding: bool,
    bytes_per_value: int = 2,
    block_tokens: int = BLOCK_TOKENS,
) -> int:
    """Bytes of a block in all layers of a kind, sliding or full, that own K/V."""
    return sum(
        block_tokens
        * plan.num_key_value_heads
        * (1 if plan.k_eq_v else 2)
        * head_bytes(plan.head_dim, bytes_per_value)
        for plan in config.layers
        if plan.owns_kv and (plan.window is not None) == sliding
    )


def kv_plan(
    config: TextConfig,
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    cached_windows: int = 0,
    budget_bytes: int | None = None,
    bytes_per_value: int = 2,
    block_tokens: int = BLOCK_TOKENS,
) -> KVPlan:
    """Divide a budget of K/V bytes between sliding and full layers.

    Sliding layers get what `max_num_seqs` sequences can need of them: a window each, and a step's
    tokens. Full layers get the rest, at most as much as that many sequences of `max_model_len`
    tokens fill. Without a budget both get all that they can use. cached_windows: windows beyond
    those, for a prefix cache to keep.

    Raises:
      CapacityError: not even one sequence of max_model_len tokens fits.
    """
    sizes = {
        sliding: kv_block_bytes(
            config, sliding=sliding, bytes_per_value=bytes_per_value, block_tokens=block_tokens
        )
        for sliding in (False, True)
    }
    window = config.sliding_window if sizes[True] else None
    most_full = -(-max_model_len // block_tokens)
    sliding = 0
    if window is not None:
        # A step's tokens begin inside a block of each sequence, which its past has counted.
        past = blocks_spanned(min(window - 1, max_model_len), block_tokens)
        step = -(-max_num_batched_tokens // block_tokens) + max_num_seqs
        sliding = (max_num_seqs + cached_windows) * min(past, most_full) + step
    full = most_full * max_num_seqs if sizes[False] else 0
    if budget_bytes is not None and sizes[False]:
        full = min(full, (budget_bytes - sliding * sizes[True]) // sizes[False])
    needed = most_full if sizes[False] else 0
    nbytes = full * sizes[False] + sliding * sizes[True]
    if full < needed or (budget_bytes is not None and nbytes > budget_bytes):
        least = needed * sizes[False] + sliding * sizes[True]
        fits = max(0, full) * block_tokens if sizes[False] else 0
        raise CapacityError(
            f"K/V of {budget_bytes} bytes cannot hold one sequence of {max_model_len} tokens "
            f"beside the windows of {max_num_seqs}: {least} bytes are needed. Give more, or a "
            f"max_model_len of at most {fits}, or fewer sequences at a time"
        )
    return KVPlan(
        full_blocks=full,
        sliding_blocks=sliding,
        window=window,
        block_tokens=block_tokens,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        nbytes=nbytes,
    )


# -- workspace ------------------------------------------------------------------------------------


def activation_bytes(
    config: TextConfig, context: int, *, value_bytes: int = 4, chunk: int = CHUNK_TOKENS
) -> int:
    """The most that one pass of a prompt holds beside weights and K/V; value_bytes of a float.

    What stays through the pass (residual stream, per-layer inputs), and the largest of: the rows of
    the per-layer table widened beside their projection, the MLP's three widths, keys rebuilt from
    values with their float32 temporaries, and logits.
    """
    T, d, p = min(chunk, max(1, context)), config.hidden_size, config.hidden_size_per_layer_input
    owned = config.first_kv_shared_layer
    per_layer = T * owned * p * value_bytes
    table = T * config.num_hidden_layers * p * (value_bytes + 2) + 4 * per_layer
    widest = max(plan.intermediate_size for plan in config.layers[:owned])
    mlp = 3 * T * widest * value_bytes
    if config.enable_moe_block:
        routed = T * (config.top_k_experts or 0)
        mlp += 3 * routed * (config.moe_intermediate_size or 0) * value_bytes + routed * d * 4
    rebuilt = 0
    for plan in config.layers:
        if plan.k_eq_v:
            seen = slab_tokens(context) * plan.num_key_value_heads * plan.head_dim
            rebuilt = max(rebuilt, seen * (2 * value_bytes + 4))
    logits = 3 * config.vocab_size * 4
    return 6 * T * d * value_bytes + per_layer + max(table, mlp, rebuilt, logits)


def compute_bytes(format: str, place: Place) -> int:
    """Bytes of a float that a model of this format computes with: on a CPU float32, but for
    bfloat16 weights."""
    return 4 if format == "float32" or (place == "cpu" and format != "bfloat16") else 2


def runtime_bytes(config: TextConfig, place: Place, *, products: bool = False) -> int:
    """The process without weights: of its machine, or on a GPU what the device holds.

    products: whether torch makes code for them, see PRODUCTS_BYTES.
    """
    if place != "cpu":
        return RUNTIME_BYTES["gpu"]
    made = PRODUCTS_BYTES if products else 0
    return RUNTIME_BYTES["cpu"] + VOCABULARY_BYTES * config.vocab_size + made


@dataclass(frozen=True, slots=True)
class Memory:
    """Everything that has to be in memory at once, in bytes."""

    weights: dict[str, int]
    """By part of the model."""
    kv: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.kv + self.activations + self.runtime


def memory(
    config: Gemma4Config,
    format: str,
    context: int,
    *,
    kv: str = "bfloat16",
    sequences: int = 1,
    place: Place = "cpu",
    towers: bool = True,
    drafter: bool = False,
    weights: dict[str, int] | None = None,
    multiplies_bfloat16: bool = False,
) -> Memory:
    """What running a model takes: weights in `format`, `sequences` of `context` tokens each.

    weights: bytes by part, where they are known better than from the format. multiplies_bfloat16:
    whether the CPU does, see PRODUCTS_BYTES.

    Raises:
      ConfigError: as `weight_bytes`; an unknown way to store K/V.
    """
    if kv not in KV_VALUES:
        raise ConfigError(f"kv {kv!r}: must be one of {', '.join(KV_VALUES)}")
    text = config.text_config
    if weights is None:
        weights = weight_bytes(config, format, place, towers=towers, drafter=drafter)
    return Memory(
        weights=weights,
        kv=kv_bytes(text, context, KV_VALUES[kv], sequences),
        activations=activation_bytes(text, context, value_bytes=compute_bytes(format, place)),
        runtime=runtime_bytes(text, place, products=multiplies_bfloat16 and format == "bfloat16"),
    )
