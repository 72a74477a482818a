"""Every tensor of a model by name: its shape and which part of the model it belongs to.

What sizing.py counts, what checkpoints are held to (weights/names.py), and what a header read from
afar is compared with. From the config alone; standard library only.

Names are those of the modules, the decoder's and the towers' as in a saved checkpoint below
`model.language_model.` and `model.`. Shapes are [out, in], as stored.

Source: tensor lists of transformers 5.23 `Gemma4ForConditionalGeneration` X
"""

from collections.abc import Iterator
from dataclasses import dataclass

from gemsmith.config import (
    AudioConfig,
    DrafterConfig,
    Gemma4Config,
    LayerPlan,
    TextConfig,
    UnifiedAudioConfig,
    UnifiedVisionConfig,
    VisionConfig,
)

Shape = tuple[int, ...]
BOUNDS = ("input_min", "input_max", "output_min", "output_max")
TOKEN_ORDERING = "masked_embedding.token_ordering"
"""A drafter's token ids by centroid: the one tensor of whole numbers, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model."""

    name: str
    shape: Shape
    part: str
    """embedding, head, ple_table, ple_projection, ple, attention, mlp, experts, router, norms,
    vision, vision_projection, audio, audio_projection or drafter."""
    linear: bool = False
    """A matrix, or a stack of them, that a low-bit format may hold."""
    trained: bool = True
    """False: a number kept beside the weights, which no model page counts as a parameter."""


def decoder(config: TextConfig) -> Iterator[Tensor]:
    """The decoder, in the order of its modules."""
    d, p = config.hidden_size, config.hidden_size_per_layer_input
    yield Tensor("embed_tokens.weight", (config.vocab_size, d), "embedding", True)
    for plan in config.layers:
        yield from layer(config, plan)
    yield Tensor("norm.weight", (d,), "norms")
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", (config.vocab_size, d), "head", True)
    if p:
        width = config.num_hidden_layers * p
        table = (config.vocab_size_per_layer_input, width)
        yield Tensor("embed_tokens_per_layer.weight", table, "ple_table", True)
        yield Tensor("per_layer_model_projection.weight", (width, d), "ple_projection", True)
        yield Tensor("per_layer_projection_norm.weight", (p,), "ple_projection")


def shared_kv(config: TextConfig) -> Iterator[Tensor]:
    """K/V tensors that released files hold for layers which never use them."""
    for plan in config.layers:
        if not plan.owns_kv:
            yield from _keys_values(config, plan)


def towers(config: Gemma4Config) -> Iterator[Tensor]:
    """Image and audio input, in the order of its modules."""
    vision, audio, d = config.vision_config, config.audio_config, config.text_config.hidden_size
    if isinstance(vision, VisionConfig):
        yield from _vision(vision)
        shape = (d, vision.hidden_size)
        name = "embed_vision.embedding_projection.weight"
        yield Tensor(name, shape, "vision_projection", True)
    elif vision is not None:
        yield from _unified_vision(vision, d)
    if isinstance(audio, AudioConfig):
        yield from _audio(audio)
    if audio is not None:
        unified = isinstance(audio, UnifiedAudioConfig)
        width = audio.audio_embed_dim if unified else audio.output_proj_dims
        name = "embed_audio.embedding_projection.weight"
        yield Tensor(name, (d, width), "audio_projection", True)


def drafter(config: DrafterConfig) -> Iterator[Tensor]:
    """A drafter, in the order of its modules, named as in its own checkpoint."""
    text, part = config.text_config, "drafter"
    d, f, backbone = text.hidden_size, text.intermediate_size, config.backbone_hidden_size
    yield Tensor("model.embed_tokens.weight", (text.vocab_size, d), part, True)
    for plan in text.layers:
        at, q = f"model.layers.{plan.index}.", text.num_attention_heads * plan.head_dim
        yield Tensor(at + "layer_scalar", (1,), part, trained=False)
        yield Tensor(at + "self_attn.q_proj.weight", (q, d), part, True)
        yield Tensor(at + "self_attn.q_norm.weight", (plan.head_dim,), part)
        yield Tensor(at + "self_attn.o_proj.weight", (d, q), part, True)
        yield Tensor(at + "mlp.gate_proj.weight", (f, d), part, True)
        yield Tensor(at + "mlp.up_proj.weight", (f, d), part, True)
        yield Tensor(at + "mlp.down_proj.weight", (d, f), part, True)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield Tensor(f"{at}{norm}_layernorm.weight", (d,), part)
    yield Tensor("model.norm.weight", (d,), part)
    yield Tensor("pre_projection.weight", (d, 2 * backbone), part, True)
    yield Tensor("post_projection.weight", (backbone, d), part, True)
    if config.use_ordered_embeddings:
        yield Tensor(TOKEN_ORDERING, (text.vocab_size,), part, trained=False)
        yield Tensor("masked_embedding.centroids.weight", (config.num_centroids, d), part, True)


def layer(config: TextConfig, plan: LayerPlan) -> Iterator[Tensor]:
    """One layer of the decoder."""
    d, p, at = config.hidden_size, config.hidden_size_per_layer_input, f"layers.{plan.index}."
    q, f = config.num_attention_heads * plan.head_dim, plan.intermediate_size
    yield Tensor(at + "layer_scalar", (1,), "norms", trained=False)
    yield Tensor(at + "self_attn.q_proj.weight", (q, d), "attention", True)
    yield Tensor(at + "self_attn.q_norm.weight", (plan.head_dim,), "attention")
    if plan.owns_kv:
        yield from _keys_values(config, plan)
    yield Tensor(at + "self_attn.o_proj.weight", (d, q), "attention", True)
    yield Tensor(at + "mlp.gate_proj.weight", (f, d), "mlp", True)
    yield Tensor(at + "mlp.up_proj.weight", (f, d), "mlp", True)
    yield Tensor(at + "mlp.down_proj.weight", (d, f), "mlp", True)
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield Tensor(f"{at}{norm}_layernorm.weight", (d,), "norms")
    if config.enable_moe_block:
        e, w = config.num_experts or 0, config.moe_intermediate_size or 0
        # The router decides which experts are used and is a thousandth of them: it stays floats.
        yield Tensor(at + "router.scale", (d,), "router")
        yield Tensor(at + "router.per_expert_scale", (e,), "router")
        yield Tensor(at + "router.proj.weight", (e, d), "router")
        yield Tensor(at + "experts.gate_up_proj", (e, 2 * w, d), "experts", True)
        yield Tensor(at + "experts.down_proj", (e, d, w), "experts", True)
        for norm in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
            yield Tensor(f"{at}{norm}.weight", (d,), "norms")
        yield Tensor(at + "pre_feedforward_layernorm_2.weight", (d,), "norms")
    if p:
        yield Tensor(at + "per_layer_input_gate.weight", (p, d), "ple", True)
        yield Tensor(at + "per_layer_projection.weight", (d, p), "ple", True)
        yield Tensor(at + "post_per_layer_input_norm.weight", (d,), "ple")


def _keys_values(config: TextConfig, plan: LayerPlan) -> Iterator[Tensor]:
    kv, at = plan.num_key_value_heads * plan.head_dim, f"layers.{plan.index}.self_attn."
    yield Tensor(at + "k_proj.weight", (kv, config.hidden_size), "attention", True)
    yield Tensor(at + "k_norm.weight", (plan.head_dim,), "attention")
    if not plan.k_eq_v:
        yield Tensor(at + "v_proj.weight", (kv, config.hidden_size), "attention", True)


def _clipped(name: str, shape: Shape, part: str, clipped: bool) -> Iterator[Tensor]:
    """A linear layer of a tower; where its inputs and outputs are clipped, four bounds beside."""
    for bound in BOUNDS if clipped else ():
        yield Tensor(f"{name}.{bound}", (), part, trained=False)
    yield Tensor(f"{name}.linear.weight", shape, part, True)


def _vision(config: VisionConfig) -> Iterator[Tensor]:
    d, f, clipped = config.hidden_size, config.intermediate_size, config.use_clipped_linears
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    part, at = "vision", "vision_tower."
    if config.standardize:
        yield Tensor(at + "std_bias", (d,), part, trained=False)
        yield Tensor(at + "std_scale", (d,), part, trained=False)
    places = (2, config.position_embedding_size, d)
    yield Tensor(at + "patch_embedder.position_embedding_table", places, part)
    patch = (d, 3 * config.patch_size**2)
    yield Tensor(at + "patch_embedder.input_proj.weight", patch, part, True)
    for layer in range(config.num_hidden_layers):
        at = f"vision_tower.encoder.layers.{layer}."
        for name, shape in (("q", (q, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, q))):
            yield from _clipped(f"{at}self_attn.{name}_proj", shape, part, clipped)
        yield Tensor(at + "self_attn.q_norm.weight", (config.head_dim,), part)
        yield Tensor(at + "self_attn.k_norm.weight", (config.head_dim,), part)
        for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
            yield from _clipped(f"{at}mlp.{name}_proj", shape, part, clipped)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield Tensor(f"{at}{norm}_layernorm.weight", (d,), part)


def _unified_vision(config: UnifiedVisionConfig, hidden_size: int) -> Iterator[Tensor]:
    d, patch, part, at = config.mm_embed_dim, config.patch_values, "vision", "embed_vision."
    yield Tensor(at + "pos_embedding", (config.mm_posemb_size, 2, d), part)
    yield Tensor(at + "patch_ln1.weight", (patch,), part)
    yield Tensor(at + "patch_ln1.bias", (patch,), part)
    yield Tensor(at + "patch_dense.weight", (d, patch), part, True)
    for name in ("patch_dense.bias", *(f"{n}.{w}" for n in ("patch_ln2", "pos_norm") for w in
                                       ("weight", "bias"))):  # fmt: skip
        yield Tensor(at + name, (d,), part)
    name = at + "multimodal_embedder.embedding_projection.weight"
    yield Tensor(name, (hidden_size, config.output_proj_dims), "vision_projection", True)


def _audio(config: AudioConfig) -> Iterator[Tensor]:
    d, part, clipped = config.hidden_size, "audio", config.use_clipped_linears
    first, second = config.subsampling_conv_channels
    at = "audio_tower.subsample_conv_projection."
    for layer, (inputs, outputs) in enumerate(((1, first), (first, second))):
        yield Tensor(f"{at}layer{layer}.conv.weight", (outputs, inputs, 3, 3), part)
        yield Tensor(f"{at}layer{layer}.norm.weight", (outputs,), part)
    width = first // 4 * second  # as many mel bins as first channels; a quarter is left
    yield Tensor(at + "input_proj_linear.weight", (d, width), part, True)
    for layer in range(config.num_hidden_layers):
        at = f"audio_tower.layers.{layer}."
        yield from _feed_forward(at + "feed_forward1.", d, clipped)
        yield Tensor(at + "norm_pre_attn.weight", (d,), part)
        head = (d // config.num_attention_heads,)
        yield Tensor(at + "self_attn.per_dim_scale", head, part)
        for name in ("q_proj", "k_proj", "v_proj", "post"):
            yield from _clipped(f"{at}self_attn.{name}", (d, d), part, clipped)
        yield Tensor(at + "self_attn.relative_k_proj.weight", (d, d), part, True)
        yield Tensor(at + "norm_post_attn.weight", (d,), part)
        yield Tensor(at + "lconv1d.pre_layer_norm.weight", (d,), part)
        yield from _clipped(at + "lconv1d.linear_start", (2 * d, d), part, clipped)
        kernel = (d, 1, config.conv_kernel_size)
        yield Tensor(at + "lconv1d.depthwise_conv1d.weight", kernel, part)
        yield Tensor(at + "lconv1d.conv_norm.weight", (d,), part)
        yield from _clipped(at + "lconv1d.linear_end", (d, d), part, clipped)
        yield from _feed_forward(at + "feed_forward2.", d, clipped)
        yield Tensor(at + "norm_out.weight", (d,), part)
    outputs = config.output_proj_dims
    yield Tensor("audio_tower.output_proj.weight", (outputs, d), part, True)
    yield Tensor("audio_tower.output_proj.bias", (outputs,), part)


def _feed_forward(at: str, d: int, clipped: bool) -> Iterator[Tensor]:
    yield Tensor(at + "pre_layer_norm.weight", (d,), "audio")
    yield from _clipped(at + "ffw_layer_1", (4 * d, d), "audio", clipped)
    yield from _clipped(at + "ffw_layer_2", (d, 4 * d), "audio", clipped)
    yield Tensor(at + "post_layer_norm.weight", (d,), "audio")
