"""A decoder of floats run one layer at a time, for checkpoints that need not fit into memory.

A layer's weights are read as float32, all tokens go through it, and it is dropped. What calibration
(calibrate.py) and the measure of sensitivity (sensitivity.py) have in common.

Memory: one layer in float32 and the hidden states of all tokens, 4 * T * D bytes.

Shapes: T tokens, D hidden_size, L layers, P width of per-layer inputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gemsmith.cache.none import NoCache
from gemsmith.config import TextConfig
from gemsmith.errors import RequestError, WeightsError
from gemsmith.model.text import DecoderLayer, TextModel, rope_table
from gemsmith.quant.formats import Format
from gemsmith.quant.quantize import quantize
from gemsmith.weights.load import table_on_disk
from gemsmith.weights.names import EMBEDDING, PLE_TABLE
from gemsmith.weights.rounding import settled
from gemsmith.weights.tensors import StoredTensor, read_rows

BATCH_TOKENS = 2048
"""Tokens that run through a layer together, in whole sequences: bounds what activations weigh."""
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("experts",),
)
"""Modules of a layer that have the same inputs, in the order in which they run."""


@dataclass(slots=True)
class Batch:
    """Some sequences, packed, and how far they have come."""

    ids_T: Tensor
    positions_T: Tensor
    kv: NoCache
    x_TD: Tensor = field(default_factory=lambda: torch.empty(0))


class Streamed:
    """The decoder, with no more of it in memory than the layer in work."""

    def __init__(
        self,
        config: TextConfig,
        weights: dict[str, StoredTensor],
        formats: dict[str, Format],
        tokens: Sequence[Sequence[int]],
    ) -> None:
        """weights: where each of the decoder's lies, by name. formats: of those to be rounded.

        Raises:
          RequestError: no tokens, or ids outside the vocabulary.
        """
        self.config, self.weights, self.formats = config, weights, formats
        self._batches = [*_pack(config, tokens)]
        self._model = TextModel(config, device="meta", dtype=torch.float32).eval()

    def _begin(self) -> None:
        """Embeddings, and what per-layer inputs are made of."""
        where = {"low": {}, "dtype": torch.float32, "device": torch.device("cpu")}
        for name in (EMBEDDING, PLE_TABLE):
            if name in self.weights:
                table = table_on_disk(
                    {name: self.weights[name]}, name, format=self.formats.get(name), **where
                )
                self._model.set_submodule(name.removesuffix(".weight"), table)
        for name in ("per_layer_model_projection.weight", "per_layer_projection_norm.weight"):
            if name in self.weights:
                self._put(name, self._plain(name))
        for batch in self._batches:
            batch.x_TD = self._embedded(batch)

    def _embedded(self, batch: Batch) -> Tensor:
        return self._model.embed_tokens(batch.ids_T) * self.config.hidden_size**0.5

    def _through(self, index: int, batch: Batch) -> Tensor:
        """The batch's hidden states after a layer whose weights are in place."""
        plan = self.config.layers[index]
        table = rope_table(batch.positions_T, plan.rope, plan.head_dim)
        return self._model.layers[index](
            batch.x_TD, self._per_layer_input(index, batch), table, batch.kv, None
        )

    def _per_layer_input(self, index: int, batch: Batch) -> Tensor | None:
        if not self.config.hidden_size_per_layer_input:
            return None
        h_TD = self._embedded(batch)
        ple_TLP = self._model.per_layer_inputs(h_TD, batch.ids_T, index, index + 1)
        return None if ple_TLP is None else ple_TLP[:, 0]

    def _drop(self, index: int) -> None:
        """Forget a layer's weights."""
        where = {"device": "meta", "dtype": torch.float32}
        self._model.layers[index] = DecoderLayer(self.config, self.config.layers[index], **where)

    def _plain(self, name: str) -> Tensor:
        """The weight as floats, rounded to its format if it has one."""
        floats = self._floats(name)
        format = self.formats.get(name)
        if format is None:
            return floats
        format, grid = settled(name, self.weights[name], format)
        return quantize(floats, format, grid=grid).dequantize()

    def _floats(self, name: str) -> Tensor:
        stored = self.weights[name]
        values = torch.cat([rows.float() for rows in read_rows(stored)]).view(stored.shape)
        if not torch.isfinite(values).all():
            raise WeightsError(
                f"{stored.file.name}: {name}: a weight is infinite or not a number; the checkpoint "
                "is damaged"
            )
        return values

    def _put(self, name: str, values: Tensor) -> None:
        at, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(at)
        if leaf in module._buffers:
            module.register_buffer(leaf, values)
        else:
            module.register_parameter(leaf, nn.Parameter(values, requires_grad=False))


def _pack(config: TextConfig, tokens: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """Sequences in batches of about BATCH_TOKENS tokens.

    Raises: as `Streamed`.
    """
    if not any(tokens):
        raise RequestError("calibration data holds no tokens; give at least one conversation")
    pack: list[Sequence[int]] = []
    for number, ids in enumerate(tokens, 1):
        wrong = [id for id in ids if not 0 <= id < config.vocab_size]
        if wrong:
            raise RequestError(
                f"calibration data: sequence {number} has the token id {wrong[0]}; the vocabulary "
                f"of this model ends at {config.vocab_size - 1}"
            )
        if ids:
            pack.append(ids)
        full = sum(map(len, pack)) >= BATCH_TOKENS
        if pack and (full or number == len(tokens)):
            yield Batch(
                torch.tensor([id for ids in pack for id in ids]),
                torch.cat([torch.arange(len(ids)) for ids in pack]),
                NoCache(config, [len(ids) for ids in pack]),
            )
            pack = []
