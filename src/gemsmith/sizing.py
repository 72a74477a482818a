"""What a model costs: parameters, bytes of weights and K/V, operations. Standard library only.

The engine allocates by these functions and `info` reports by them, so the two cannot disagree.
GiB is 2^30 bytes.

Sources: exact shapes of the checkpoints (model/text.py for the decoder, transformers 5.23
modeling_gemma4.py and modeling_gemma4_unified.py for the towers).
"""

from gemsmith.config import (
    AudioConfig,
    Gemma4Config,
    LayerPlan,
    TextConfig,
    UnifiedAudioConfig,
    UnifiedVisionConfig,
    VisionConfig,
)

SLAB_STEP = 256
MEL_BINS = 128
KV_SCALE_BYTES = 4
"""int8 K/V has a float32 scale a token and head, for keys and for values."""


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
    if not plan.owns_kv:
        return 0
    held = slab_tokens(tokens)
    if plan.window is not None:
        held = min(held, plan.window)
    copies = 1 if plan.k_eq_v else 2
    return held * plan.num_key_value_heads * copies * _head_bytes(plan.head_dim, bytes_per_value)


def _head_bytes(head_dim: int, bytes_per_value: int) -> int:
    """One token's keys or values in one head."""
    return head_dim * bytes_per_value + (KV_SCALE_BYTES if bytes_per_value == 1 else 0)


def kv_bytes(config: TextConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """K/V bytes of one sequence of `tokens` tokens in all layers."""
    return sum(kv_layer_bytes(plan, tokens, bytes_per_value) for plan in config.layers)


def attention_parameters(config: TextConfig, plan: LayerPlan) -> int:
    """Weights of one layer's attention, its q and k norms included."""
    q = config.num_attention_heads * plan.head_dim
    kv = plan.num_key_value_heads * plan.head_dim
    owned = (kv * (1 if plan.k_eq_v else 2)) * config.hidden_size + plan.head_dim
    return 2 * q * config.hidden_size + plan.head_dim + (owned if plan.owns_kv else 0)


def layer_parameters(config: TextConfig, plan: LayerPlan) -> dict[str, int]:
    """Trainable weights of one layer by part: attention, mlp, experts, ple, norms."""
    d, p = config.hidden_size, config.hidden_size_per_layer_input
    parts = {
        "attention": attention_parameters(config, plan),
        "mlp": 3 * d * plan.intermediate_size,
        "norms": 4 * d,
    }
    if config.enable_moe_block:
        experts, width = config.num_experts or 0, config.moe_intermediate_size or 0
        parts["experts"] = experts * 3 * width * d
        parts["router"] = experts * d + d + experts
        parts["norms"] += 3 * d
    if p:
        parts["ple"] = 2 * p * d + d
    return parts


def parameters(config: Gemma4Config) -> dict[str, int]:
    """Trainable weights by part of the model; their sum is the model's size.

    Parts: embedding (tied to the head, or else head beside it), ple_table, ple_projection,
    attention, mlp, norms, and where the size has them experts, router, ple, vision, audio with
    their projections.
    """
    text = config.text_config
    d, p = text.hidden_size, text.hidden_size_per_layer_input
    parts = {"embedding": text.vocab_size * d}
    if not text.tie_word_embeddings:
        parts["head"] = text.vocab_size * d
    if p:
        width = text.num_hidden_layers * p
        parts["ple_table"] = text.vocab_size_per_layer_input * width
        parts["ple_projection"] = width * d + p
    for plan in text.layers:
        for name, count in layer_parameters(text, plan).items():
            parts[name] = parts.get(name, 0) + count
    parts["norms"] += d
    if config.vision_config is not None:
        parts["vision"] = _vision(config.vision_config)
        parts["vision_projection"] = _vision_width(config.vision_config) * d
    if config.audio_config is not None:
        audio = config.audio_config
        unified = isinstance(audio, UnifiedAudioConfig)
        parts["audio"] = 0 if unified else _audio(audio)
        parts["audio_projection"] = d * (
            audio.audio_embed_dim if unified else audio.output_proj_dims
        )
    return parts


def text_parameters(config: TextConfig) -> int:
    """Trainable weights of the decoder alone."""
    return sum(parameters(Gemma4Config(text_config=config)).values())


def active_parameters(config: TextConfig) -> int:
    """Weights that one token passes through, the embedding included."""
    parts = parameters(Gemma4Config(text_config=config))
    if config.enable_moe_block:
        chosen, experts = config.top_k_experts or 0, config.num_experts or 1
        parts["experts"] = parts["experts"] * chosen // experts
    return sum(parts.values())


def shared_kv_leftovers(config: TextConfig) -> int:
    """Values of the K/V projections that released files store for layers that never use them."""
    return sum(
        2 * plan.num_key_value_heads * plan.head_dim * config.hidden_size + plan.head_dim
        for plan in config.layers
        if not plan.owns_kv
    )


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


def prefill_flops(config: TextConfig, tokens: int, rows: int, *, skip: bool = True) -> int:
    """Operations (2 a multiply-add) to prefill a prompt and give the logits of `rows` tokens.

    With `skip`, layers that own no K/V and their per-layer inputs run on the rows alone.
    Attention scores are counted at what the causal window lets each token see.
    """
    d, p = config.hidden_size, config.hidden_size_per_layer_input
    total = 2 * rows * config.vocab_size * d
    for plan in config.layers:
        n = rows if skip and not plan.owns_kv else tokens
        parts = layer_parameters(config, plan)
        weights = parts["attention"] + parts["mlp"] + parts.get("ple", 0)
        if config.enable_moe_block:
            chosen, experts = config.top_k_experts or 0, config.num_experts or 1
            weights += parts["experts"] * chosen // experts + experts * d
        weights += p * d
        seen = tokens if plan.window is None else min(tokens, plan.window)
        scores = 4 * config.num_attention_heads * plan.head_dim * seen
        total += n * (2 * weights + (scores if n == rows != tokens else scores // 2))
    return total


def decode_bytes(
    config: TextConfig, context: int, bytes_per_value: int = 2, kv_bytes_per_value: int = 2
) -> int:
    """Bytes of weights and K/V read to generate one token at `context`, every value once."""
    active = active_parameters(config)
    if config.hidden_size_per_layer_input:
        width = config.num_hidden_layers * config.hidden_size_per_layer_input
        active -= (config.vocab_size_per_layer_input - 1) * width
    if not config.tie_word_embeddings:
        active -= (config.vocab_size - 1) * config.hidden_size
    reads = 0
    for plan in config.layers:
        source = config.layers[plan.kv_source]
        seen = context if plan.window is None else min(context, plan.window)
        copies = 1 if source.k_eq_v else 2
        head = _head_bytes(source.head_dim, kv_bytes_per_value)
        reads += seen * source.num_key_value_heads * copies * head
    return active * bytes_per_value + reads


def _vision_width(config: VisionConfig | UnifiedVisionConfig) -> int:
    return (
        config.output_proj_dims if isinstance(config, UnifiedVisionConfig) else config.hidden_size
    )


def _vision(config: VisionConfig | UnifiedVisionConfig) -> int:
    if isinstance(config, UnifiedVisionConfig):
        d, patch = config.mm_embed_dim, config.patch_values
        norms = 2 * patch + 2 * d + 2 * d
        return norms + (patch + 1) * d + 2 * config.mm_posemb_size * d
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = 2 * heads * d + 2 * kv * d + 2 * config.head_dim
    layer = attention + 3 * d * config.intermediate_size + 4 * d
    patch = 3 * config.patch_size**2 * d + 2 * config.position_embedding_size * d
    return patch + config.num_hidden_layers * layer


def _audio(config: AudioConfig) -> int:
    d = config.hidden_size
    first, second = config.subsampling_conv_channels
    convolutions = 9 * first + first + 9 * first * second + second
    subsample = convolutions + second * (MEL_BINS // 4) * d
    feed_forward = 2 * (8 * d * d + 2 * d)
    attention = 5 * d * d + d // config.num_attention_heads
    light_conv = 3 * d * d + config.conv_kernel_size * d + 2 * d
    layers = config.num_hidden_layers * (feed_forward + attention + light_conv + 3 * d)
    return subsample + layers + (d + 1) * config.output_proj_dims
