"""Decoder layers of low-bit weights in a call of the C++ extension each, or many in one.

The modules of `model.text` say what a layer computes; native/layer.cpp computes the same bits.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemsmith.errors import WeightsError
from gemsmith.ops import native
from gemsmith.ops.cpu import PackedWeight
from gemsmith.ops.cpu_attention import INT8, Readers, StoredKV, addresses


class Layer:
    """A decoder layer of low-bit weights, but for its attention; `model.text.DecoderLayer`'s halves
    in two calls of the extension, for float32 hidden states. Needs the extension.

    Shapes: M rows, D hidden size, N query heads, K key/value heads (0: reads another layer's), H
    head size, F width of the MLP, P per-layer inputs (0: none).
    """

    __slots__ = ("_D", "_H", "_K", "_N", "_P", "_kept", "_layer")

    WEIGHTS = ("q", "k", "v", "o", "gate", "up", "down", "ple_gate", "ple_projection")
    NORMS = ("input", "q", "k", "attention", "before_mlp", "after_mlp", "ple")
    EXPERTS = ("router", "router_norm", "scale", "before", "after_mlp", "after")

    def __init__(
        self,
        weights: Mapping[str, PackedWeight],
        norms: Mapping[str, Tensor],
        *,
        heads: int,
        head_dim: int,
        eps: float,
        scalar: float,
    ):
        """weights, norms: by WEIGHTS and NORMS; without "k" the layer owns no keys and values,
        without "v" its values are its keys, without the "ple" ones it has no per-layer inputs.

        Raises:
          WeightsError: something is missing, or the sizes do not belong together.
        """
        kernels = native.extension()
        if kernels is None:
            raise RuntimeError("gemsmith._native is not built; run the layer's modules instead")
        q, gate = weights["q"], weights["gate"]
        D, H, F = q.inputs, head_dim, gate.outputs
        K = weights["k"].outputs // H if "k" in weights else 0
        P = weights["ple_gate"].outputs if "ple_gate" in weights else 0
        sizes = {
            "q": (heads * H, D), "k": (K * H, D), "v": (K * H, D), "o": (D, heads * H),
            "gate": (F, D), "up": (F, D), "down": (D, F), "ple_gate": (P, D),
            "ple_projection": (D, P),
        }  # fmt: skip
        optional = (
            {"v"} | (set() if K else {"k"}) | (set() if P else {"ple_gate", "ple_projection"})
        )
        for name in self.WEIGHTS:
            found = (weights[name].outputs, weights[name].inputs) if name in weights else None
            if found != sizes[name] and not (found is None and name in optional):
                raise WeightsError(f"weight {name} of the layer is {found}, not {sizes[name]}")
        lengths = {"q": H, "k": H if K else 0, "ple": D if P else 0}
        for name in self.NORMS:
            length = lengths.get(name, D)
            if length:
                native.check(norms[name], f"norm {name}", torch.float32, (length,))
        if H % 2:
            raise WeightsError(f"heads of {H} values cannot be turned in pairs")
        kept_norms = [norms.get(name) for name in self.NORMS]
        kept_weights = [weights.get(name) for name in self.WEIGHTS]
        self._kept: tuple[object, ...] = (kept_weights, kept_norms)
        """What the addresses belong to."""
        self._D, self._N, self._K, self._H, self._P = D, heads, K, H, P
        self._layer = kernels.layer(
            [D, heads, K, H, F, P],
            eps,
            scalar,
            [[0] * 7 if w is None else w.arguments for w in kept_weights],
            [0 if n is None else n.data_ptr() for n in kept_norms],
        )

    def add_experts(
        self,
        gate_up: Sequence[PackedWeight],
        down: Sequence[PackedWeight],
        arrays: Mapping[str, Tensor],
        *,
        top_k: int,
    ) -> None:
        """Put experts beside the MLP; gate_up [2F, D] and down [D, F] of each of the E.

        arrays: "router" [E, D]; "router_norm" [D], by which the router's normed input is
        multiplied; "scale" [E] of each expert's output; the norms [D] "before" the experts, of the
        MLP's output "after_mlp", and of theirs "after".

        Raises:
          WeightsError: the sizes do not belong together.
        """
        E, D = len(gate_up), self._D
        F = down[0].inputs if down else 0
        shapes = {(w.outputs, w.inputs) for w in gate_up}, {(w.outputs, w.inputs) for w in down}
        if shapes != ({(2 * F, D)}, {(D, F)}) or len(down) != E or not 0 < top_k <= E:
            raise WeightsError(
                f"{E} and {len(down)} experts, {top_k} at a time, of {shapes[0]} and {shapes[1]}: "
                f"each must be [2F, {D}] and [{D}, F] with one F"
            )
        sizes = {"router": (E, D), "scale": (E,)}
        for name in self.EXPERTS:
            native.check(arrays[name], name, torch.float32, sizes.get(name, (D,)))
        kept = [arrays[name] for name in self.EXPERTS]
        self._kept += (list(gate_up), list(down), kept)
        kernels = native.ready()
        assert kernels is not None, "the layer was made by the extension"
        kernels.set_experts(
            self._layer, top_k, F, [w.arguments for w in gate_up], [w.arguments for w in down],
            [array.data_ptr() for array in kept],
        )  # fmt: skip

    def before(
        self, x_MD: Tensor, cos_MR: Tensor, sin_MR: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """q [M, N, H], and k and v [M, K, H] or None, normed and turned: R of the H/2 pairs of
        a head turn, by angles of these cosines and sines."""
        M, R = x_MD.shape[0], cos_MR.shape[-1]
        native.check(x_MD, "x", torch.float32, (M, self._D))
        native.check(cos_MR, "cos", torch.float32, (M, min(R, self._H // 2)))
        native.check(sin_MR, "sin", torch.float32, (M, R))
        native.ready()
        q_MNH = torch.empty((M, self._N, self._H))
        k_MKH = torch.empty((M, self._K, self._H)) if self._K else None
        v_MKH = torch.empty((M, self._K, self._H)) if self._K else None
        self._layer.before(
            x_MD.data_ptr(), M, cos_MR.data_ptr(), sin_MR.data_ptr(), R, q_MNH.data_ptr(),
            k_MKH.data_ptr() if k_MKH is not None else 0,
            v_MKH.data_ptr() if v_MKH is not None else 0,
        )  # fmt: skip
        return q_MNH, k_MKH, v_MKH

    def after(self, x_MD: Tensor, o_MNH: Tensor, ple_MP: Tensor | None) -> Tensor:
        """The layer's output [M, D] from its input and attention's output."""
        M = x_MD.shape[0]
        native.check(x_MD, "x", torch.float32, (M, self._D))
        native.check(o_MNH, "o", torch.float32, (M, self._N, self._H))
        place, stride = 0, 0
        if ple_MP is not None:
            if ple_MP.stride(-1) != 1 or ple_MP.dtype != torch.float32:
                ple_MP = ple_MP.float().contiguous()
            if tuple(ple_MP.shape) != (M, self._P):
                raise WeightsError(f"per-layer inputs {list(ple_MP.shape)}, not {[M, self._P]}")
            place, stride = ple_MP.data_ptr(), ple_MP.stride(0)
        elif self._P:
            raise WeightsError(f"the layer wants per-layer inputs [{M}, {self._P}]")
        native.ready()
        y_MD = torch.empty((M, self._D))
        self._layer.after(
            x_MD.data_ptr(), o_MNH.data_ptr(), place, stride, M, y_MD.data_ptr()
        )  # fmt: skip
        return y_MD


class Place(NamedTuple):
    """What a layer does with the keys and values of a step, for `run_layers`."""

    into: StoredKV | None
    """Where it stores its own, None if it owns none."""
    slots_M: Tensor | None
    """int64: the slot of each row there."""
    storages: Sequence[StoredKV]
    readers: Readers
    """As `attention_of_many` takes them."""


def run_layers(
    layers: Sequence[Layer],
    places: Sequence[Place],
    tables: Sequence[tuple[Tensor, Tensor]],
    x_MD: Tensor,
    ple_MLP: Tensor | None,
) -> Tensor:
    """`Layer.before`, the storing of keys and values as int8, `attention` and `Layer.after` of one
    layer after the other, in one call: the same bits, and no Python in between.

    A place, and cos and sin [M, R], for each layer; ple_MLP: the per-layer inputs of them all.

    Raises:
      WeightsError: sizes, types or slots that do not belong together.
    """
    M, D = x_MD.shape
    native.check(x_MD, "x", torch.float32, (M, layers[0]._D))
    P = layers[0]._P
    ple, stride = 0, 0
    if P:
        shape = (M, len(layers), P)
        if ple_MLP is None:
            raise WeightsError(f"the layers want per-layer inputs {list(shape)}")
        if tuple(ple_MLP.shape) != shape:
            raise WeightsError(f"per-layer inputs {list(ple_MLP.shape)}, not {list(shape)}")
        if ple_MLP.stride()[1:] != (P, 1) or ple_MLP.dtype != torch.float32:
            ple_MLP = ple_MLP.float().contiguous()
        ple, stride = ple_MLP.data_ptr(), ple_MLP.stride(0)
    fields: list[list[int]] = []
    known: dict[tuple[int, ...], list[int]] = {}
    readings: list[Readers] = []
    for layer, place, (cos_MR, sin_MR) in zip(layers, places, tables, strict=True):
        # Layers that are alike and read the same keys, as most of E2B do, need one look.
        kind = id(place), id(cos_MR), id(sin_MR), layer._N, layer._K, layer._H
        if kind not in known:
            if place.readers not in readings:
                readings.append(place.readers)
            reading = readings.index(place.readers)
            known[kind] = _fields(layer, place, reading, cos_MR, sin_MR, M)
        fields.append(known[kind])
    kernels = native.ready()
    assert kernels is not None, "the layers were made by the extension"
    y_MD = torch.empty((M, D))
    kernels.run_layers(
        [layer._layer for layer in layers], fields,
        [(each.sequences, each.spans, each.ranges_R2.data_ptr()) for each in readings],
        x_MD.data_ptr(), ple, stride, M, y_MD.data_ptr(),
    )  # fmt: skip
    return y_MD


def _fields(
    layer: Layer, place: Place, reading: int, cos_MR: Tensor, sin_MR: Tensor, M: int
) -> list[int]:
    """What `run_layers` of the extension wants to know of a layer's place, checked."""
    R, H = cos_MR.shape[-1], layer._H
    native.check(cos_MR, "cos", torch.float32, (M, min(R, H // 2)))
    native.check(sin_MR, "sin", torch.float32, (M, R))
    into, slots_M, storages, readers = place
    readers.check(storages)
    if readers.rows != M:
        raise WeightsError(f"{M} rows, of which {readers.rows} ask")
    if (into is None) != (layer._K == 0) or (into is None) != (slots_M is None):
        raise WeightsError(f"a layer of {layer._K} key/value heads was given {into}")
    heads = storages[0].heads
    for kv, wanted in ((into, layer._K), (storages[0], heads)):
        if kv and (kv.formats != INT8 or kv.rule or (kv.heads, kv.head_dim) != (wanted, H)):
            raise WeightsError(
                f"keys and values [{kv.heads}, {kv.head_dim}] of formats {kv.formats}; "
                f"the layer runs on int8 [{wanted}, {H}]"
            )
    if layer._N % heads:
        raise WeightsError(f"{layer._N} query heads do not share {heads} key/value heads")
    where, slots = (0, 0, 0, 0), 0
    if into is not None and slots_M is not None:
        native.check(slots_M, "slots", torch.int64, (M,))
        least, most = (int(at) for at in torch.aminmax(slots_M))
        into.check_slots(least, most + 1 - least)
        where, slots = into.arguments, slots_M.data_ptr()
    tables = (cos_MR.data_ptr(), sin_MR.data_ptr())
    return [*where, slots, heads, *tables, R, reading, *addresses(storages)]
