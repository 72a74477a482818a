"""Gemma 4 text decoder, all five sizes.

Takes packed tokens and their positions; returns hidden states and, of those, logits. Knows
nothing of batches, requests or caches: attention asks the KVStore it is given.

Shapes: T packed tokens, R rows whose output is asked for, D hidden_size, N query heads,
        K key/value heads, H head_dim, L layers, P hidden_size_per_layer_input, V vocabulary,
        E experts, A experts a token, F MLP width.

Differs from a Llama decoder in: norms before and after each sublayer; q and k norms with weight,
v norm without; softmax scale 1; two rotary settings; key/value heads and head size by layer type;
last layers that read an earlier layer's K/V; V taken from the K projection (K = V layers);
per-layer inputs (PLE); experts beside a dense MLP; one scalar a layer; capped logits.

Numerics: norms, router softmax, attention softmax and logits in float32, what is stored between
operations in the weights' dtype. float16 is refused: the MLP overflows its range.

Module names are the checkpoint's own, below `model.language_model.`.
Sources: transformers 5.23 modeling_gemma4.py; google-deepmind/gemma gemma/gm/nn/gemma4.
"""

from collections.abc import Sequence
from functools import cache
from math import isfinite
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gemsmith.config import LayerPlan, RopeParameters, TextConfig
from gemsmith.errors import ConfigError
from gemsmith.ops import moe
from gemsmith.ops.cpu_decoder import Decoder, Part, Seen
from gemsmith.ops.linear import linear, linear_rows, top
from gemsmith.ops.rotary import KeyRule, Turns, table
from gemsmith.ops.rows import add_norm, geglu, rms_norm, rotate

SPARE, NEAR = 16, 1e-4
"""Logits asked for beyond those wanted, and how far apart the last of either must be: then no other
is as great as one of the wanted, whatever capping rounds (by 2e-6)."""


class KVStore(Protocol):
    """Where attention finds the keys and values of this and earlier steps."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k_TKH: Tensor | None,
        v_TKH: Tensor | None,
        rows_R: Tensor | None,
    ) -> Tensor:
        """Store this step's K/V of `layer` and return attention's output, shaped as q.

        k and v are None in a layer that owns none: it reads those of `kv_source`, stored earlier
        in the same step. q is [T, N, H], or [R, N, H] where `rows_R` names the tokens of the step
        that ask. Causality and windows are the store's business.
        """
        ...


class Pass(KVStore, Protocol):
    """A KVStore of one pass over tokens of known sequences."""

    @property
    def positions_T(self) -> Tensor: ...

    def seen(self) -> Seen | None:
        """What the extension needs to store and find keys and values by itself; None where it
        cannot. Once a pass."""
        ...


Likeliest = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Logits of rows and their ids, [R, count] each, the greatest first."""


@cache
def _root(dim: int, dtype: torch.dtype) -> float:
    """Square root, rounded to dtype."""
    return torch.tensor(dim**0.5, dtype=dtype).item()


class Linear(nn.Linear):
    """A matrix product without bias, allocated but not filled."""

    def __init__(self, inputs: int, outputs: int, **where: Any) -> None:
        super().__init__(inputs, outputs, bias=False, **where)

    def reset_parameters(self) -> None:
        """Draw nothing: the weight is loaded, or filled by `TextModel.init_weights`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)


class Embedding(nn.Embedding):
    """A table of rows, allocated but not filled."""

    def reset_parameters(self) -> None:
        """Draw nothing, as in Linear."""


class RMSNorm(nn.Module):
    """RMS norm with a plain weight (not 1 + weight)."""

    def __init__(self, dim: int, eps: float, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, **where))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def added(self, x: Tensor, branch: Tensor, scale: Tensor | None = None) -> Tensor:
        """x plus the norm of `branch`, times a scalar."""
        return add_norm(x, branch, self.weight, self.eps, scale)


def rope_table(positions_T: Tensor, rope: RopeParameters, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, 1, pairs] float32, of the pairs that turn at all.

    `proportional` turns the first partial_rotary_factor of the head_dim / 2 pairs with the
    frequencies they would have if all turned.
    """
    return table(positions_T, rope_frequencies(rope, head_dim, positions_T.device))


@cache
@torch.inference_mode(False)  # kept for others
def rope_frequencies(
    rope: RopeParameters, head_dim: int, device: torch.device | None = None
) -> Tensor:
    """Angle from one position to the next, float32 [pairs], of the pairs that turn at all."""
    fraction = rope.partial_rotary_factor if rope.rope_type == "proportional" else 1.0
    pairs = int(fraction * head_dim // 2)
    exponent = torch.arange(0, 2 * pairs, 2, device=device, dtype=torch.float32)
    return 1.0 / (rope.rope_theta ** (exponent / head_dim)) / rope.factor


class Attention(nn.Module):
    """Self-attention of one layer: projections, norms and rotation; the rest is the store's."""

    def __init__(self, config: TextConfig, plan: LayerPlan, **where: Any) -> None:
        super().__init__()
        D, H, eps = config.hidden_size, plan.head_dim, config.rms_norm_eps
        q_dim, kv_dim = config.num_attention_heads * H, plan.num_key_value_heads * H
        self.plan, self.eps = plan, eps
        self.q_proj = Linear(D, q_dim, **where)
        self.q_norm = RMSNorm(H, eps, **where)
        if plan.owns_kv:
            self.k_proj = Linear(D, kv_dim, **where)
            self.k_norm = RMSNorm(H, eps, **where)
            if not plan.k_eq_v:
                self.v_proj = Linear(D, kv_dim, **where)
        self.o_proj = Linear(q_dim, D, **where)

    def queries_keys_values(
        self, x_TD: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normed and rotated q [T, N, H] and k [T, K, H], normed v; no k, v if not owned."""
        heads = (x_TD.shape[0], -1, self.plan.head_dim)
        q_TNH = rotate(self.q_norm(self.q_proj(x_TD).view(heads)), table)
        if not self.plan.owns_kv:
            return q_TNH, None, None
        raw_TKH = self.k_proj(x_TD).view(heads)
        v_TKH = raw_TKH if self.plan.k_eq_v else self.v_proj(x_TD).view(heads)
        return q_TNH, rotate(self.k_norm(raw_TKH), table), rms_norm(v_TKH, None, self.eps)


class MLP(nn.Module):
    """Gated MLP with tanh-approximated GELU."""

    def __init__(self, hidden_size: int, width: int, **where: Any) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, width, **where)
        self.up_proj = Linear(hidden_size, width, **where)
        self.down_proj = Linear(width, hidden_size, **where)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Router(nn.Module):
    """Chooses A experts a token from the residual stream itself, not from its norm's output."""

    def __init__(self, config: TextConfig, num_experts: int, **where: Any) -> None:
        super().__init__()
        self.proj = Linear(config.hidden_size, num_experts, **where)
        self.scale = nn.Parameter(torch.empty(config.hidden_size, **where))
        self.per_expert_scale = nn.Parameter(torch.empty(num_experts, **where))
        self.top_k = config.top_k_experts or 1
        self.eps, self.root = config.rms_norm_eps, config.hidden_size**-0.5

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert indices [T, A] and their weights [T, A], which sum to 1 before expert scales."""
        scores_TE = self.proj(rms_norm(x_TD, None, self.eps) * self.scale * self.root)
        weight_TA, index_TA = scores_TE.softmax(-1, dtype=torch.float32).topk(self.top_k)
        weight_TA = weight_TA / weight_TA.sum(-1, keepdim=True)
        return index_TA, weight_TA * self.per_expert_scale[index_TA]


class Experts(nn.Module):
    """The expert weights, stacked; gate rows before up rows."""

    def __init__(self, num_experts: int, hidden_size: int, width: int, **where: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size, **where))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width, **where))

    def forward(self, x_TD: Tensor, index_TA: Tensor, weight_TA: Tensor) -> Tensor:
        return moe.experts(x_TD, index_TA, weight_TA, self.gate_up_proj, self.down_proj)


Tables = dict[tuple[RopeParameters, int], tuple[Tensor, Tensor]]
"""`rope_table` of each pair of settings and head_dim."""


class DecoderLayer(nn.Module):
    """One layer. Computes before and after attention; between the two the store attends."""

    def __init__(self, config: TextConfig, plan: LayerPlan, **where: Any) -> None:
        super().__init__()
        D, P, eps = config.hidden_size, config.hidden_size_per_layer_input, config.rms_norm_eps
        self.plan = plan
        self.has_experts, self.has_ple = config.enable_moe_block, P > 0
        self.self_attn = Attention(config, plan, **where)
        self.mlp = MLP(D, plan.intermediate_size, **where)
        self.input_layernorm = RMSNorm(D, eps, **where)
        self.post_attention_layernorm = RMSNorm(D, eps, **where)
        self.pre_feedforward_layernorm = RMSNorm(D, eps, **where)
        self.post_feedforward_layernorm = RMSNorm(D, eps, **where)
        if config.enable_moe_block:
            num_experts, width = config.num_experts or 1, config.moe_intermediate_size or 1
            self.router = Router(config, num_experts, **where)
            self.experts = Experts(num_experts, D, width, **where)
            self.post_feedforward_layernorm_1 = RMSNorm(D, eps, **where)
            self.post_feedforward_layernorm_2 = RMSNorm(D, eps, **where)
            self.pre_feedforward_layernorm_2 = RMSNorm(D, eps, **where)
        if self.has_ple:
            self.per_layer_input_gate = Linear(D, P, **where)
            self.per_layer_projection = Linear(P, D, **where)
            self.post_per_layer_input_norm = RMSNorm(D, eps, **where)
        self.layer_scalar: Tensor
        self.register_buffer("layer_scalar", torch.ones(1, **where))

    def forward(
        self,
        x_TD: Tensor,
        ple_TP: Tensor | None,
        table: tuple[Tensor, Tensor],
        kv: KVStore,
        rows_R: Tensor | None,
    ) -> Tensor:
        q, k, v = self.before_attention(x_TD, table)
        return self.after_attention(x_TD, kv.attend(self.plan.index, q, k, v, rows_R), ple_TP)

    def before_attention(
        self, x_TD: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.self_attn.queries_keys_values(self.input_layernorm(x_TD), table)

    def after_attention(self, x_TD: Tensor, o_TNH: Tensor, ple_TP: Tensor | None) -> Tensor:
        attended = self.self_attn.o_proj(o_TNH.reshape(x_TD.shape[0], -1))
        x_TD = self.post_attention_layernorm.added(x_TD, attended)
        # The scalar multiplies the whole residual stream, not a branch: it comes with the last.
        branch_TD, norm = self.feed_forward(x_TD), self.post_feedforward_layernorm
        if ple_TP is not None:
            x_TD = norm.added(x_TD, branch_TD)
            gated_TP = geglu(self.per_layer_input_gate(x_TD), ple_TP)
            branch_TD, norm = self.per_layer_projection(gated_TP), self.post_per_layer_input_norm
        return norm.added(x_TD, branch_TD, self.layer_scalar)

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        dense_TD = self.mlp(self.pre_feedforward_layernorm(x_TD))
        if not self.has_experts:
            return dense_TD
        index_TA, weight_TA = self.router(x_TD)
        sparse_TD = self.experts(self.pre_feedforward_layernorm_2(x_TD), index_TA, weight_TA)
        dense_TD = self.post_feedforward_layernorm_1(dense_TD)
        return self.post_feedforward_layernorm_2.added(dense_TD, sparse_TD)


class Layers(nn.ModuleList):
    """The decoder layers, in order."""

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
        """Hidden states after layers first..stop-1; ple_TLP is of these layers."""
        for index in range(first, stop):
            layer: Any = self[index]
            ple_TP = None if ple_TLP is None else ple_TLP[:, index - first]
            x_TD = layer(x_TD, ple_TP, tables[layer.plan.rope, layer.plan.head_dim], kv, rows_R)
        return x_TD


class TextModel(nn.Module):
    """The decoder. Weights are allocated, not initialised: load a checkpoint or `init_weights`."""

    def __init__(
        self,
        config: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype == torch.float16:
            raise ConfigError(
                "dtype float16: Gemma 4's MLP outputs exceed its largest value, 65504; "
                "use bfloat16 or float32"
            )
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        L, D, P = config.num_hidden_layers, config.hidden_size, config.hidden_size_per_layer_input
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, D, **where)
        self.layers = Layers(DecoderLayer(config, p, **where) for p in config.layers)
        self.norm = RMSNorm(D, config.rms_norm_eps, **where)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(D, config.vocab_size, **where)
        if P:
            # Any module from ids [T] to rows [T, L*P] may stand here; see weights/ple.py.
            self.embed_tokens_per_layer = Embedding(
                config.vocab_size_per_layer_input, L * P, **where
            )
            self.per_layer_model_projection = Linear(D, L * P, **where)
            self.per_layer_projection_norm = RMSNorm(P, config.rms_norm_eps, **where)
        self._rope = {(p.rope, p.head_dim) for p in config.layers}
        self._turns: dict[tuple[RopeParameters, int, torch.device], Turns] = {}
        self.native: Decoder | None = None
        """All of this in one call of the extension, see `weights.fuse`."""

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        kv: KVStore,
        *,
        rows_R: Tensor | None = None,
        soft: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm: [T, D], or [R, D] of the tokens that rows_R names.

        Layers that own no K/V leave nothing behind for other tokens, so they run on the rows
        asked for only: most of the work of a long prompt in E2B and E4B is skipped. An empty
        rows_R stores K/V and returns [0, D].

        soft: (indices_M of tokens, rows [M, D]) of image and audio tokens. The rows replace the
        scaled embeddings as they are; their per-layer identity is that of the padding token.
        """
        h_TD, ids_T = self.embed(input_ids_T), input_ids_T
        if soft is not None:
            at, values = soft
            h_TD = h_TD.index_copy(0, at, values.to(h_TD.dtype))
            ids_T = ids_T.index_fill(0, at, self.config.pad_token_id or 0)
        L = len(self.layers)
        # Where all tokens are asked for, all layers run on the same rows.
        middle = L if rows_R is None else self.config.first_kv_shared_layer
        ple_TLP = self.per_layer_inputs(h_TD, ids_T, 0, middle)
        tables: Tables = {key: rope_table(positions_T, *key) for key in self._rope}
        x = self.layers.run(0, middle, h_TD, ple_TLP, tables, kv, None)
        if rows_R is not None:
            x = x[rows_R]
            if middle < L and len(rows_R):
                tables = {key: (c[rows_R], s[rows_R]) for key, (c, s) in tables.items()}
                ple_TLP = self.per_layer_inputs(h_TD[rows_R], ids_T[rows_R], middle, L)
                x = self.layers.run(middle, L, x, ple_TLP, tables, kv, rows_R)
        return self.norm(x)

    def read(
        self,
        ids: list[int],
        parts: Sequence[Part],
        kv: Pass,
        *,
        soft: tuple[Tensor, Tensor] | None = None,
        count: int = 0,
        skipped: Tensor | None = None,
    ) -> tuple[Tensor, Likeliest | None]:
        """`forward` over tokens of several sequences, [R, D] of the last of each that ask; and, if
        it is cheap now, `likeliest` of these.

        Where the extension can, all in one call: the same bits.
        """
        native = self.native
        seen = kv.seen() if native and soft is None and len(ids) <= native.most_tokens else None
        if native and seen:
            rows_T = self.embed_tokens_per_layer(torch.tensor(ids)) if native.needs_rows else None
            reach = 0 if skipped is None else self._reach(count, skipped)
            hidden_RD, found = native.read(
                ids, parts, seen, rows_T=rows_T, count=reach, skipped=skipped
            )
            if found is None or skipped is None:
                return hidden_RD, None
            return hidden_RD, self._settled(*found, count, skipped)
        device = self.embed_tokens.weight.device
        rows, first = [], 0
        for tokens, asks in parts:
            first += tokens
            rows += range(first - asks, first)
        rows_R = None
        # Where every row is asked for there is nothing to pick.
        if len(rows) < len(ids):
            rows_R = torch.tensor(rows, dtype=torch.long, device=device)
        ids_T = torch.tensor(ids, device=device)
        return self(ids_T, kv.positions_T, kv, rows_R=rows_R, soft=soft), None

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """Token embeddings times sqrt(D), the root rounded to the weights' dtype first."""
        return self.embed_tokens(input_ids_T) * _root(
            self.config.hidden_size, self.embed_tokens.weight.dtype
        )

    def per_layer_inputs(self, h_TD: Tensor, ids_T: Tensor, first: int, stop: int) -> Tensor | None:
        """The small vector that each of layers first..stop-1 adds for each token, [T, l, P].

        The token's own row of the table, plus a projection of its embedding; both come from the
        input, not from the running hidden states.
        """
        P = self.config.hidden_size_per_layer_input
        if not P or first == stop:
            return None
        shape = (h_TD.shape[0], stop - first, P)
        rows = self.embed_tokens_per_layer(ids_T)[:, first * P : stop * P].view(shape)
        weight = self.per_layer_model_projection.weight[first * P : stop * P]
        context = (linear(h_TD, weight) * self.config.hidden_size**-0.5).view(shape)
        identity = rows * _root(P, rows.dtype)
        norm: RMSNorm = self.per_layer_projection_norm
        return add_norm(identity, context, norm.weight, norm.eps, 2**-0.5)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32 [R, V], capped: c * tanh(logits / c).

        The head is the token embedding, save in low-bit checkpoints that store the two apart.
        """
        return self._capped(linear(hidden_RD, self._head).float())

    def logits_of(self, hidden_RD: Tensor, ids_n: Tensor) -> Tensor:
        """Columns ids of `logits`, [R, n], for a step at which few tokens are allowed: of the head
        only their rows are read. See `ops.linear.linear_rows` for equality."""
        return self._capped(linear_rows(hidden_RD, self._head, ids_n).float())

    def likeliest(self, hidden_RD: Tensor, count: int, skipped: Tensor) -> Likeliest | None:
        """The `count` greatest of each row of `logits` and their ids, [R, count] each: greatest
        first, of equal ones the lowest id first. skipped: ids left out, ascending.

        None where they cannot be told without the whole row: of floats, where a logit is not
        finite, where capping may have made some equal to others that were not looked at.
        """
        wanted = self._reach(count, skipped)
        found = top(hidden_RD, self._head, wanted, skipped) if wanted else None
        return found and self._settled(*found, count, skipped)

    def _reach(self, count: int, skipped: Tensor) -> int:
        """How many of the greatest to look for, to know `count` of them; 0: these are not to be
        had."""
        wanted = min(count + SPARE, self.config.vocab_size - len(skipped))
        return wanted if count <= wanted else 0

    def _settled(
        self, raw_RC: Tensor, ids_RC: Tensor, most_R: Tensor, count: int, skipped: Tensor
    ) -> Likeliest | None:
        """`likeliest` from what the head's greatest outputs are."""
        if not all(map(isfinite, most_R.tolist())):
            return None
        values, ids = self._capped(raw_RC).numpy(), ids_RC.numpy()
        # Capping rounds: what was in order before may be equal now.
        rises = values[:, 1:] > values[:, :-1]
        rises |= (values[:, 1:] == values[:, :-1]) & (ids[:, 1:] < ids[:, :-1])
        if np.count_nonzero(rises):  # any() takes ten times as long for so few
            order = np.lexsort((ids, -values))
            values, ids = (np.take_along_axis(each, order, 1) for each in (values, ids))
        if values.shape[1] < self.config.vocab_size - len(skipped):
            wanted, others = values[:, count - 1].tolist(), values[:, -1].tolist()
            if any(least - most <= NEAR for least, most in zip(wanted, others, strict=True)):
                return None
        return values[:, :count], ids[:, :count]

    @property
    def _head(self) -> Any:
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        if cap is None:
            return logits
        if torch.is_grad_enabled() and logits.requires_grad:
            return cap * torch.tanh(logits / cap)
        return logits.div_(cap).tanh_().mul_(cap)  # a row is a megabyte, written once

    def k_from_v(self, layer: int) -> KeyRule:
        """How the keys of a K = V layer follow from its values."""
        block: Any = self.layers[layer]
        norm_H: Tensor = block.self_attn.k_norm.weight
        kind = block.plan.rope, block.plan.head_dim, norm_H.device
        if kind not in self._turns:
            self._turns[kind] = Turns(rope_frequencies(*kind))
        return KeyRule(norm_H.detach().float().contiguous(), self._turns[kind])

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill with random weights for training: normal(0, 0.02) matrices, unit norms."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if "norm" in name or name.endswith(("scale", "layer_scalar")):
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.02, generator=generator)
