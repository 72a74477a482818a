"""Decoder layers of packed weights, computed by the C++ extension: two calls each, or one for all;
and whole models, one call a pass.

The same numbers as the modules they hold, up to the order in which norms add; a step of one token
spends its time reading weights then, and not on calls.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gemsmith.errors import WeightsError
from gemsmith.model.text import (
    DecoderLayer,
    Experts,
    KVStore,
    Layers,
    Tables,
    TextModel,
    rope_frequencies,
)
from gemsmith.ops import cpu, cpu_layers, native
from gemsmith.ops.cpu_decoder import Decoder, Scales, Stage
from gemsmith.ops.cpu_layers import Layer, Place
from gemsmith.ops.linear import MIN_ROWS
from gemsmith.quant.linear import QuantModule
from gemsmith.quant.packed import Packed

WEIGHTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "ple_gate": "per_layer_input_gate",
    "ple_projection": "per_layer_projection",
}
NORMS = {
    "input": "input_layernorm",
    "q": "self_attn.q_norm",
    "k": "self_attn.k_norm",
    "attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
    "ple": "post_per_layer_input_norm",
}
"""What ops/cpu_layers.py calls each, and where the layer has it."""


class PackedLayer(DecoderLayer):
    """A decoder layer whose two halves, before and after attention, the extension computes."""

    def __init__(self, layer: DecoderLayer) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)  # the same modules under the same names
        modules: dict[str, Any] = dict(layer.named_modules())
        weights: dict[str, cpu.PackedWeight] = {}
        for name, at in WEIGHTS.items():
            if at in modules:
                weights[name] = modules[at].stored.weight
        norms: dict[str, Any] = {
            name: modules[at].weight.detach() for name, at in NORMS.items() if at in modules
        }
        self._native = Layer(
            weights,
            norms,
            heads=layer.self_attn.q_proj.out_features // layer.plan.head_dim,
            head_dim=layer.plan.head_dim,
            eps=layer.self_attn.eps,
            scalar=float(layer.layer_scalar),
        )
        self.products = sum(weight.outputs * weight.inputs for weight in weights.values())
        """Multiplications that a row takes in matrices."""
        if layer.has_experts:
            self._add_experts()

    def _add_experts(self) -> None:
        router: Any = self.router
        experts: Any = self.experts
        gate_up, down = experts.gate_up_proj.stored, experts.down_proj.stored
        count = gate_up.shape[0]
        arrays = {
            "router": router.proj.weight,
            "router_norm": router.scale * router.root,
            "scale": router.per_expert_scale,
            "before": self.pre_feedforward_layernorm_2.weight,
            "after_mlp": self.post_feedforward_layernorm_1.weight,
            "after": self.post_feedforward_layernorm_2.weight,
        }
        self._native.add_experts(
            [gate_up[expert].weight for expert in range(count)],
            [down[expert].weight for expert in range(count)],
            {name: array.detach().contiguous() for name, array in arrays.items()},
            top_k=router.top_k,
        )
        experts = (gate_up[0].weight, down[0].weight)
        self.products += router.top_k * sum(weight.outputs * weight.inputs for weight in experts)

    def before_attention(
        self, x_TD: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        cos, sin = (angle.flatten(1) for angle in table)
        return self._native.before(x_TD.contiguous(), cos, sin)

    def after_attention(self, x_TD: Tensor, o_TNH: Tensor, ple_TP: Tensor | None) -> Tensor:
        return self._native.after(x_TD.contiguous(), o_TNH.contiguous(), ple_TP)


def takes(layer: DecoderLayer) -> bool:
    """Whether `PackedLayer` can stand in: its matrices packed, all else float32 on the CPU."""
    if not native.available():
        return False
    for name, module in layer.named_modules():
        if name == "router.proj":
            fits = isinstance(module, nn.Linear)
        elif isinstance(module, QuantModule):
            fits = isinstance(module.stored, Packed)
        else:
            fits = not isinstance(module, nn.Linear | Experts)
        if not fits:
            return False
    return all(p.dtype == torch.float32 and p.is_cpu for p in layer.parameters())


MOST_PRODUCTS = 2**36
"""Up to so many multiplications layers run in one call, some tenths of a second; beyond, calls cost
nothing beside the products, and between them a signal is heard."""


Places = Callable[[int, Tensor | None], Place | None]
"""`place` of a `KVStore` whose K/V the extension can store and find by itself, see `RingCache`."""


class PackedLayers(Layers):
    """Layers of which as many on end as possible run in one call of the extension."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(layers)
        self._products = [getattr(layer, "products", 0) for layer in self]

    def run(
        self,
        first: int,
        stop: int,
        x_TD: Tensor,
        ple_TLP: Tensor | None,
        tables: Tables,
        kv: KVStore,
        rows_R: Tensor | None,
    ) -> Tensor:
        place_of: Places | None = getattr(kv, "place", None)
        if len(x_TD) * sum(self._products[first:stop]) > MOST_PRODUCTS or place_of is None:
            return super().run(first, stop, x_TD, ple_TLP, tables, kv, rows_R)
        angles = {key: (c.flatten(1), s.flatten(1)) for key, (c, s) in tables.items()}
        done = first
        while done < stop:
            layers: list[Layer] = []
            places: list[Place] = []
            turns: list[tuple[Tensor, Tensor]] = []
            for index in range(done, stop):
                layer: Any = self._modules[str(index)]
                place = place_of(index, rows_R) if isinstance(layer, PackedLayer) else None
                if place is None:
                    break
                layers.append(layer._native)
                places.append(place)
                turns.append(angles[layer.plan.rope, layer.plan.head_dim])
            after = done + len(layers)
            part = None if ple_TLP is None else ple_TLP[:, done - first : after - first]
            if layers:
                x_TD = cpu_layers.run_layers(layers, places, turns, x_TD.contiguous(), part)
            if after < stop:  # one that cannot
                part = None if ple_TLP is None else ple_TLP[:, after - first :]
                x_TD = super().run(after, after + 1, x_TD, part, tables, kv, rows_R)
            done = after + 1
        return x_TD


KEPT_TABLE = 4 << 20
"""Up to so many bytes the per-layer table is kept as floats; of a larger one rows are read."""


def fuse(model: TextModel) -> None:
    """Replace the layers that can be by `PackedLayer`s, in place, and have the extension compute
    whole passes where all of the model can be."""
    model.layers = PackedLayers(
        PackedLayer(layer) if isinstance(layer, DecoderLayer) and takes(layer) else layer
        for layer in model.layers
    )
    model.native = _decoder(model)


def _decoder(model: TextModel) -> Decoder | None:
    """All of the model as the extension computes it; None where it cannot."""
    config, layers = model.config, list[Any](model.layers)
    embedding, P = _packed(model.embed_tokens), config.hidden_size_per_layer_input
    head = embedding if config.tie_word_embeddings else _packed(model.lm_head)
    turns: list[set[Any]] = [set(), set()]
    for plan in config.layers:
        turns[plan.window is not None].add((plan.rope, plan.head_dim))
    alike = all(isinstance(layer, PackedLayer) for layer in layers) and max(map(len, turns)) == 1
    norm = model.norm.weight.detach()
    if embedding is None or head is None or not alike or norm.dtype != torch.float32:
        return None
    full, sliding = (rope_frequencies(*kind.pop()) if kind else None for kind in turns)
    most = MOST_PRODUCTS // sum(layer.products for layer in layers)
    scales = Scales(eps=config.rms_norm_eps, embedding=config.hidden_size**0.5)
    inputs: dict[str, Any] = {}
    if P:
        projection = _projection(model.per_layer_model_projection)
        norm_P = model.per_layer_projection_norm.weight.detach()
        kept, table = _table(model.embed_tokens_per_layer, config.vocab_size)
        if projection is None or P % cpu.BLOCK or norm_P.dtype != torch.float32 or not kept:
            return None
        scales = replace(scales, projection=config.hidden_size**-0.5, identity=P**0.5, sum=2**-0.5)
        inputs = {"projection": projection, "projection_norm": norm_P, "table": table}
        if isinstance(projection, Tensor):
            # Of more rows torch multiplies with bfloat16, and adds up in another order.
            most = min(most, MIN_ROWS - 1)
    return Decoder(
        [
            Stage(layer._native, plan.kv_source, plan.window is not None)
            for layer, plan in zip(layers, config.layers, strict=True)
        ],
        shared=config.first_kv_shared_layer,
        window=config.sliding_window,
        embedding=embedding,
        head=head,
        norm=norm,
        frequencies=(full, sliding),
        scales=scales,
        most_tokens=most,
        **inputs,
    )


def _table(store: Any, vocab_size: int) -> tuple[bool, Tensor | None]:
    """Whether a per-layer table gives float32 rows, and all of them if they are few."""
    try:
        row = store(torch.zeros(1, dtype=torch.long))
        if row.dtype != torch.float32 or not row.is_cpu:
            return False, None
        small = row.nbytes * vocab_size <= KEPT_TABLE and store.num_embeddings == vocab_size
        return True, store(torch.arange(vocab_size)).contiguous() if small else None
    except WeightsError:  # it is named when the row is read that is wrong
        return False, None


def _packed(matrix: Any) -> cpu.PackedWeight | None:
    if isinstance(matrix, QuantModule) and isinstance(matrix.stored, Packed):
        return matrix.stored.weight
    return None


def _projection(matrix: Any) -> cpu.PackedWeight | Tensor | None:
    """A weight that is packed, or bfloat16 on the CPU."""
    if isinstance(matrix, nn.Linear) and matrix.weight.dtype == torch.bfloat16:
        weight = matrix.weight.detach()
        return weight if weight.is_cpu and weight.is_contiguous() else None
    return _packed(matrix)


def same_bits_in_any_pass(model: TextModel) -> bool:
    """Whether a token's logits have the same bits whatever other tokens a pass runs over: products
    of floats add up in an order that depends on their number, those of the extension do not."""

    def packed(matrix: object) -> bool:
        return isinstance(matrix, QuantModule) and isinstance(matrix.stored, Packed)

    config = model.config
    return (
        packed(model.embed_tokens)
        and (config.tie_word_embeddings or packed(model.lm_head))
        and (not config.hidden_size_per_layer_input or packed(model.per_layer_model_projection))
        and all(isinstance(layer, PackedLayer) for layer in model.layers)
    )
