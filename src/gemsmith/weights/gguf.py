"""The header of a GGUF file: its metadata, its tensors without their weights, a config from both.

Whoever made the file wrote the header. It is read piece by piece and nothing in it is believed:
lengths, counts, types, sizes and offsets that cannot be true are one WeightsError each. Of the
metadata only what describes a model is kept; the vocabulary, most of a header, is passed over.

What it is not: a reader of weights. gemsmith does not run them; benchmarks/to_gguf.py writes such
files for others.

File, little endian: "GGUF", version, counts of tensors and of keys; of each key its name, type and
value; of each tensor its name, sizes (innermost first), type and offset; then, at multiples of the
alignment, the data of each.
Sources: ggml's docs/gguf.md for the file; llama.cpp's `conversion/gemma.py` for names and metadata,
its `clip-impl.h` for those of image and sound input.
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gemsmith.config import Gemma4Config
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.weights.files import short
from gemsmith.weights.names import written_key

ARCHITECTURE, INPUTS = "gemma4", "clip"
"""Of a model, and of a file of image and sound input."""
NAMES = {
    "embed_tokens.": "token_embd.",
    "norm.": "output_norm.",
    "lm_head.": "output.",
    "embed_tokens_per_layer.": "per_layer_token_embd.",
    "per_layer_model_projection.": "per_layer_model_proj.",
    "per_layer_projection_norm.": "per_layer_proj_norm.",
    "input_layernorm.": "attn_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "self_attn.q_norm.": "attn_q_norm.",
    "self_attn.k_norm.": "attn_k_norm.",
    "post_attention_layernorm.": "post_attention_norm.",
    "pre_feedforward_layernorm.": "ffn_norm.",
    "post_feedforward_layernorm.": "post_ffw_norm.",
    "pre_feedforward_layernorm_2.": "pre_ffw_norm_2.",
    "post_feedforward_layernorm_1.": "post_ffw_norm_1.",
    "post_feedforward_layernorm_2.": "post_ffw_norm_2.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.": "inp_gate.",
    "per_layer_projection.": "proj.",
    "post_per_layer_input_norm.": "post_norm.",
    "router.proj.": "ffn_gate_inp.",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
"""Our name of a tensor, below its layer, and llama.cpp's; after a dot comes `weight` in both."""
_OURS = {
    theirs + "weight" * theirs.endswith("."): ours + "weight" * ours.endswith(".")
    for ours, theirs in NAMES.items()
}

MAX_BYTES = 64 << 20
"""Of a header. Gemma 4's have 16 MiB, nearly all of it vocabulary."""
MAX_KEYS, MAX_TENSORS, MAX_NAME, MAX_LIST = 1 << 12, 1 << 16, 1 << 10, 1 << 12
MAX_DIMENSIONS, MAX_DIMENSION = 4, 1 << 40
MAX_ALIGNMENT = 1 << 20
PIECE = 4 << 20
"""Bytes held at a time."""
_WANTED = re.compile(rf"general\.(architecture|alignment)|split\.count|{ARCHITECTURE}\..*")
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

Read = Callable[[int, int], bytes]
"""Bytes [start, stop) of a file."""


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says of itself."""

    metadata: dict[str, Any]
    """Of the model: its architecture and that one's keys."""
    tensors: dict[str, tuple[str, tuple[int, ...], int]]
    """By the file's names: type, shape as [out, in], bytes."""
    nbytes: int
    """Of the header, padding included."""


def parse(read: Read, size: int, where: str, budget: int = MAX_BYTES) -> Header:
    """The header of a GGUF file of `size` bytes.

    `budget`: what is left for headers, of all files. `where` names the file in errors.

    Raises:
      WeightsError: the header is too long, cut short, or not true.
    """
    cursor = _Cursor(read, size, where, budget)
    magic, version = struct.unpack("<4sI", cursor.take(8))
    if magic != b"GGUF" or version not in (2, 3):
        raise WeightsError(
            f"{where}: begins with {magic!r}, version {version}; GGUF 2 or 3, little endian, is "
            "read"
        )
    num_tensors, num_keys = struct.unpack("<QQ", cursor.take(16))
    for count, most, what in (
        (num_tensors, MAX_TENSORS, "tensors"),
        (num_keys, MAX_KEYS, "keys"),
    ):
        if count > most:
            raise WeightsError(
                f"{where}: announces {count} {what}, at most {most} are read. No Gemma 4 needs that"
            )
    metadata = _metadata(cursor, num_keys)
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or not 8 <= align <= MAX_ALIGNMENT or align % 8:
        raise WeightsError(
            f"{where}: general.alignment is {short(align)}; a multiple of 8, at most "
            f"{MAX_ALIGNMENT}, is expected"
        )
    return _tensors(cursor, num_tensors, metadata, align)


def _metadata(cursor: "_Cursor", count: int) -> dict[str, Any]:
    seen: set[str] = set()
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("a key")
        if key in seen:
            raise WeightsError(f"{cursor.where}: the key {short(key)} is there twice")
        seen.add(key)
        value = cursor.value(key, wanted=_WANTED.fullmatch(key) is not None)
        if value is not None:
            metadata[key] = value
    return metadata


def _tensors(cursor: "_Cursor", count: int, metadata: dict[str, Any], align: int) -> Header:
    import gguf  # takes a fifth of a second

    where = cursor.where
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    offsets: dict[str, int] = {}
    for _ in range(count):
        name = cursor.name("a tensor's name")
        if name in tensors:
            raise WeightsError(f"{where}: the tensor {short(name)} is there twice")
        dimensions = cursor.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise WeightsError(
                f"{where}: {short(name)} has {dimensions} dimensions, at most {MAX_DIMENSIONS} "
                "are read"
            )
        sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
        if not all(0 < n <= MAX_DIMENSION for n in sizes):
            raise WeightsError(f"{where}: {short(name)} has the sizes {short(sizes)}")
        kind, offsets[name] = cursor.number("I"), cursor.number("Q")
        try:
            type_name = gguf.GGMLQuantizationType(kind).name
            per, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise WeightsError(
                f"{where}: {short(name)} has the type {kind}, which the gguf package installed "
                "here does not know; fetch the file anew, or install a newer gguf"
            ) from None
        inner = sizes[0] if sizes else 1
        if inner % per:
            raise WeightsError(
                f"{where}: {short(name)} has rows of {inner}, but a block of {type_name} has {per}"
            )
        tensors[name] = type_name, sizes[::-1], math.prod(sizes) // per * nbytes
    start = cursor.at + -cursor.at % align
    reached = 0
    for name in sorted(offsets, key=lambda name: offsets[name]):
        begin = offsets[name]
        padded = reached + -reached % align
        if begin != padded:
            raise WeightsError(
                f"{where}: {short(name)} begins at byte {begin}, but behind what ends at {reached} "
                f"it begins at {padded}; fetch the file anew"
            )
        reached = begin + tensors[name][2]
    # What follows the last tensor may be filled up too.
    if count and not start + reached <= cursor.size <= start + reached + -reached % align:
        raise WeightsError(
            f"{where}: its header describes {reached} bytes of tensors from byte {start} on, the "
            f"file has {cursor.size}; it is cut short or damaged, fetch it anew"
        )
    return Header(metadata, tensors, start)


class _Cursor:
    """A place in the file, and a piece of the file around it."""

    def __init__(self, read: Read, size: int, where: str, budget: int) -> None:
        self.read, self.size, self.where, self.budget = read, size, where, budget
        self.held, self.start, self.at = b"", 0, 0

    def need(self, count: int) -> int:
        """Makes sure that the next `count` bytes, at most a piece, are held; where they begin."""
        if self.at + count > min(self.size, self.budget):
            self.refuse(count)
        begin = self.at - self.start
        if begin + count > len(self.held):
            stop = min(self.at + max(count, PIECE), self.size, self.budget)
            self.held, self.start, begin = self.read(self.at, stop), self.at, 0
            if len(self.held) < count:
                raise WeightsError(f"{self.where}: ends within its header; fetch it anew")
        return begin

    def refuse(self, count: int) -> None:
        if self.at + count > self.size:
            raise WeightsError(
                f"{self.where}: {count} bytes are announced at byte {self.at}, but the file has "
                f"{self.size}; it is cut short or damaged, fetch it anew"
            )
        raise WeightsError(
            f"{self.where}: a header of more than {self.at} bytes; of all files of a model "
            f"{MAX_BYTES >> 20} MiB are read. No Gemma 4 needs that"
        )

    def take(self, count: int) -> bytes:
        begin = self.need(count)
        self.at += count
        return self.held[begin : begin + count]

    def skip(self, count: int) -> None:
        """Past bytes that need not be read."""
        if self.at + count > min(self.size, self.budget):
            self.refuse(count)
        self.at += count

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def name(self, what: str) -> str:
        length = self.number("Q")
        if length > MAX_NAME:
            raise WeightsError(
                f"{self.where}: {what} of {length} bytes at byte {self.at}; at most {MAX_NAME} are "
                "read. It is damaged, fetch it anew"
            )
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise WeightsError(
                f"{self.where}: {what} at byte {self.at} is not UTF-8; fetch it anew"
            ) from None

    def value(self, key: str, *, wanted: bool) -> Any:
        """The value of a key, None if it is not wanted or a list that is too long or of text."""
        kind, count, code = self.number("I"), 1, None
        if kind == _STRING:
            return self.name(f"the value of {short(key)}") if wanted else self.skip_strings(1)
        several = kind == _ARRAY
        if several:
            kind, count = self.number("I"), self.number("Q")
            if kind == _STRING:
                return self.skip_strings(count)
        code = _SCALARS.get(kind)
        if code is None:
            raise WeightsError(f"{self.where}: {short(key)} is of the unknown type {kind}")
        width = struct.calcsize(code)
        if not wanted or count > MAX_LIST:
            return self.skip(count * width)
        values = struct.unpack(f"<{count}{code}", self.take(count * width))
        return list(values) if several else values[0]

    def skip_strings(self, count: int) -> None:
        """Past so many texts: of each the length has to be read."""
        if self.at + 8 * count > min(self.size, self.budget):
            self.refuse(8 * count)
        length = struct.Struct("<Q").unpack_from
        while count:
            text = following = self.need(8)
            held, last = self.held, len(self.held) - 8
            while count and following <= last:
                text, following = following, following + 8 + length(held, following)[0]
                count -= 1
            self.at = self.start + text
            self.skip(following - text)


# -- the model --------------------------------------------------------------------------------


def our_key(name: str) -> str:
    """The key of a tensor in a checkpoint written here; of one that is unknown its own name."""
    found = re.fullmatch(r"(?:blk\.([0-9]{1,8})\.)?(.+)", name)
    ours = _OURS.get(found[2]) if found else None
    if not found or ours is None:
        return name
    return written_key(f"layers.{found[1]}.{ours}" if found[1] else ours)


def input_part(name: str) -> str | None:
    """The part that a tensor of image and sound input is of, as in shapes.py; None: of neither."""
    if name.startswith(("a.", "mm.a.")):
        return "audio"
    return "vision" if name.startswith(("v.", "mm.")) else None


def config_of(header: Header, where: str) -> Gemma4Config:
    """The decoder that a file's metadata describe. Image and sound input are files of their own.

    Raises:
      ConfigError: another architecture; keys that are missing, or make no Gemma 4.
    """
    found = header.metadata.get("general.architecture")
    if found != ARCHITECTURE:
        hint = "gemsmith knows gemma4"
        if found == INPUTS:
            hint = "this is image and sound input alone; name the model's own file"
        elif str(found).startswith(ARCHITECTURE):
            hint = "this is a drafter, which runs beside its model; name the model's own file"
        raise ConfigError(f"{where}: its architecture is {short(found)!r}; {hint}")
    try:
        return Gemma4Config.from_dict(_text(header))
    except ConfigError as error:
        raise ConfigError(f"{where}: its metadata make no Gemma 4: {short(error)}") from None


def _text(header: Header) -> dict[str, Any]:
    """The metadata as a `text_config` of config.json, whose reader checks each of them."""
    metadata, tensors = header.metadata, header.tensors

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise ConfigError(f"the key {ARCHITECTURE}.{key} is missing")
        # A number of 32 bits, as it was written.
        return float(f"{value:.7g}") if isinstance(value, float) else value

    layers = get("block_count")
    if type(layers) is not int or not 1 <= layers <= 1024:
        raise ConfigError(f"block_count is {short(layers)}; must be from 1 to 1024")

    def each(key: str) -> list[Any]:
        value = get(key)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers:
            raise ConfigError(f"{key} has {len(values)} entries for {layers} layers")
        return values

    def of(key: str, which: list[int]) -> Any:
        """The value that all of these layers share."""
        values = each(key)
        if any(values[i] != values[which[0]] for i in which):
            raise ConfigError(f"{key} differs within layers that are alike: {short(values)}")
        return values[which[0]]

    def rows(name: str) -> int:
        shape = tensors[name][1] if name in tensors else ()
        if len(shape) != 2:
            raise ConfigError(f"{name} is missing or no matrix")
        return shape[0]

    sliding = [bool(value) for value in each("attention.sliding_window_pattern")]
    kinds = [[i for i in range(layers) if sliding[i] is kind] for kind in (True, False)]
    if not all(kinds):
        raise ConfigError("of sliding and full layers there is one kind alone")
    shared = get("attention.shared_kv_layers", 0)
    if type(shared) is not int or not 0 <= shared < layers:
        raise ConfigError(f"attention.shared_kv_layers is {short(shared)} of {layers}")
    owners, wide = [*range(layers - shared)], [*range(layers - shared, layers)]
    width = of("feed_forward_length", owners)
    doubled = bool(wide) and of("feed_forward_length", wide) == 2 * width
    if wide and not doubled:
        of("feed_forward_length", [0, *wide])  # must be alike
    heads, full_heads = (of("attention.head_count_kv", kind) for kind in kinds)
    per_layer, experts = get("embedding_length_per_layer_input", 0), get("expert_count", 0)
    # Where K = V the file has no V.
    k_eq_v = f"blk.{kinds[1][0]}.attn_v.weight" not in tensors
    if full_heads != heads and not k_eq_v:
        raise ConfigError("full layers have other K/V heads, though they store V")
    softcap = get("final_logit_softcapping", 0.0)
    data = {
        "model_type": "gemma4_text",
        "vocab_size": rows("token_embd.weight"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": of("attention.head_count", [*range(layers)]),
        "num_key_value_heads": heads,
        "num_global_key_value_heads": full_heads if k_eq_v else None,
        "head_dim": get("attention.key_length_swa"),
        "global_head_dim": get("attention.key_length"),
        "layer_types": [f"{'sliding' if kind else 'full'}_attention" for kind in sliding],
        "sliding_window": get("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": k_eq_v,
        "use_double_wide_mlp": doubled,
        "hidden_size_per_layer_input": per_layer,
        "enable_moe_block": bool(experts),
        "max_position_embeddings": get("context_length"),
        "final_logit_softcapping": softcap or None,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if per_layer:
        data["vocab_size_per_layer_input"] = rows("per_layer_token_embd.weight")
    if experts:
        data["num_experts"], data["top_k_experts"] = experts, get("expert_used_count")
        data["moe_intermediate_size"] = get("expert_feed_forward_length")
    for kind, key in (
        ("sliding_attention", "rope.freq_base_swa"),
        ("full_attention", "rope.freq_base"),
    ):
        rope = data.setdefault("rope_parameters", {})
        rope[kind] = {"rope_type": "default", "rope_theta": get(key)}
    rope["full_attention"] |= {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    return data
