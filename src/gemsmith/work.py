"""What a model does: operations of a prompt and of a token, and the bytes that are read for them.

The ceilings beside every measured speed, and the speeds that `fit` foretells, are made of these.
"""

from gemsmith.config import LayerPlan, TextConfig
from gemsmith.sizing import active_parameters, head_bytes, layer_parameters


def prefill_flops(config: TextConfig, tokens: int, rows: int, *, skip: bool = True) -> int:
    """Operations (2 a multiply-add) to prefill a prompt and give the logits of `rows` tokens.

    With `skip`, layers that own no K/V and their per-layer inputs run on the rows alone.
    Attention scores are counted at what the causal window lets each token see.
    """
    d, p = config.hidden_size, config.hidden_size_per_layer_input
    total = 2 * rows * config.vocab_size * d
    for plan in config.layers:
        n = rows if skip and not plan.owns_kv else tokens
        seen = tokens if plan.window is None else min(tokens, plan.window)
        scores = 4 * config.num_attention_heads * plan.head_dim * seen
        weights = _layer_weights(config, plan) + p * d
        total += n * (2 * weights + (scores if n == rows != tokens else scores // 2))
    return total


def prompt_flops(config: TextConfig, tokens: int) -> tuple[int, int]:
    """Operations on a prompt in the layers that own K/V, which run on every token: of matrix
    products, and of attention. What the others do for the last token is in neither."""
    products = scores = 0
    for plan in config.layers[: config.first_kv_shared_layer]:
        weights = _layer_weights(config, plan)
        weights += config.hidden_size_per_layer_input * config.hidden_size
        products += 2 * tokens * weights
        seen = tokens if plan.window is None else min(tokens, plan.window)
        pairs = tokens * seen - seen * (seen - 1) // 2  # of a token and one that it sees
        scores += 4 * config.num_attention_heads * plan.head_dim * pairs
    return products, scores


def decode_flops(config: TextConfig, context: int) -> int:
    """Operations to generate one token at `context`."""
    d, p = config.hidden_size, config.hidden_size_per_layer_input
    total = 2 * config.vocab_size * d
    for plan in config.layers:
        seen = context if plan.window is None else min(context, plan.window)
        scores = 4 * config.num_attention_heads * plan.head_dim * seen
        total += 2 * (_layer_weights(config, plan) + p * d) + scores
    return total


def decode_bytes(
    config: TextConfig, context: int, bytes_per_value: int = 2, kv_bytes_per_value: int = 2
) -> int:
    """Bytes of weights and K/V read to generate one token at `context`, every value once, where
    all weights have `bytes_per_value`; formats have `decode_weight_bytes`."""
    active = active_parameters(config)
    if config.hidden_size_per_layer_input:
        width = config.num_hidden_layers * config.hidden_size_per_layer_input
        active -= (config.vocab_size_per_layer_input - 1) * width
    if not config.tie_word_embeddings:
        active -= (config.vocab_size - 1) * config.hidden_size
    return active * bytes_per_value + decode_kv_bytes(config, context, kv_bytes_per_value)


def decode_weight_bytes(config: TextConfig, weights: dict[str, int], sequences: int = 1) -> int:
    """Bytes of weights, given by part, that a step of `sequences` tokens reads, one of each.

    Of experts those that so many tokens choose, were each choice independent; of the per-layer
    table, and of an embedding that is not the head, rows alone, which are not counted; of towers
    and a drafter nothing.
    """
    return sum(_read(config, weights, sequences).values())


def _read(config: TextConfig, weights: dict[str, int], sequences: int) -> dict[str, int]:
    """`decode_weight_bytes` by part."""
    skipped = {"ple_table", "drafter", "vision", "vision_projection", "audio", "audio_projection"}
    if "head" in weights:
        skipped.add("embedding")
    parts = {part: nbytes for part, nbytes in weights.items() if part not in skipped}
    if config.enable_moe_block and "experts" in parts:
        share = (config.top_k_experts or 0) / (config.num_experts or 1)
        parts["experts"] = round(parts["experts"] * (1 - (1 - share) ** sequences))
    return parts


def prompt_weight_bytes(
    config: TextConfig, weights: dict[str, int], tokens: int
) -> tuple[int, int]:
    """Bytes of weights, given by part, that a pass of so many tokens of a prompt reads for all of
    them, and those that are read once, for the last token: the head, and layers without K/V, which
    have of a part's bytes what they have of its parameters."""
    every, last = _read(config, weights, tokens), 0
    shared = [plan for plan in config.layers if not plan.owns_kv]
    counts = [layer_parameters(config, plan) for plan in config.layers]
    for part, nbytes in every.items():
        if part in ("embedding", "head"):
            last += nbytes
        elif all_of_it := sum(each.get(part, 0) for each in counts):
            its = sum(counts[plan.index].get(part, 0) for plan in shared)
            last += nbytes * its // all_of_it
    return sum(every.values()) - last, last


def decode_kv_bytes(config: TextConfig, context: int, bytes_per_value: int = 2) -> int:
    """Bytes of K/V that one token of one sequence at `context` reads; layers that share K/V read
    theirs each for itself."""
    reads = 0
    for plan in config.layers:
        source = config.layers[plan.kv_source]
        seen = context if plan.window is None else min(context, plan.window)
        copies = 1 if source.k_eq_v else 2
        head = head_bytes(source.head_dim, bytes_per_value)
        reads += seen * source.num_key_value_heads * copies * head
    return reads


def _layer_weights(config: TextConfig, plan: LayerPlan) -> int:
    """Weights of a layer's matrices that one token is multiplied with."""
    parts = layer_parameters(config, plan)
    weights = parts["attention"] + parts["mlp"] + parts.get("ple", 0)
    if config.enable_moe_block:
        experts = config.num_experts or 1
        weights += parts["experts"] * (config.top_k_experts or 0) // experts
        weights += experts * config.hidden_size
    return weights
