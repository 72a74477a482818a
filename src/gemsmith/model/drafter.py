"""The MTP drafter (assistant) of each size: guesses the tokens after the last one, cheaply.

A few decoder layers that own no K/V. Each attends, with queries alone, to what the model it drafts
for has stored: its sliding layers to that of the model's last sliding layer that owns K/V, its full
ones to the last full one's. It goes in rounds:

  first step   the model's embedding of the newest token, scaled as the model scales it, beside the
               model's hidden state (after the final norm) at the token before, which gave it
  next steps   the embedding of the token just drafted beside the drafter's own hidden state
               brought back to the model's width

All steps of a round ask at one position, that of the newest token. The model has not read this
token yet, so the keys are those of the tokens before it.

What this is not: it neither verifies drafts nor decides how many are worth it, and it owns no
cache: `TargetKV` is where the model's K/V are read.

Shapes: B sequences, D hidden_size of the model, E of the drafter, N query heads of the drafter,
        H head_dim of a layer, V vocabulary, G centroids, C tokens that get logits, J drafts.

Left open by the sources, and how it is done here:
- The window. transformers keeps the keys at most sliding_window before the last key, of those that
  its cache happens to hold; that is one or two more than the model itself would look at from this
  position. Here the model's own rule holds: fewer than sliding_window positions back.
- After a round that was accepted in part, transformers leaves among the keys the one of the first
  token that was refused. Here no refused token is ever seen.
- What tokens without a chosen centroid get. transformers gives them the least logit of the whole
  batch less 1; here it is the least of the row less 1, so that a row is the same in any batch.

Module names are the checkpoint's own.
Sources: transformers 5.23 modeling_gemma4_assistant.py and `SinglePositionMultiTokenCandidate-
Generator` of generation/candidate_generator.py.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gemsmith.config import (
    PRESETS,
    DrafterConfig,
    LayerPlan,
    LayerType,
    TextConfig,
)
from gemsmith.errors import ConfigError, RequestError
from gemsmith.model.text import (
    DecoderLayer,
    Embedding,
    Layers,
    Linear,
    RMSNorm,
    Tables,
    TextModel,
    rope_table,
)
from gemsmith.ops.linear import linear

MAX_DRAFTS = 64
"""Drafts of a round. No released drafter gets nearly as many accepted; see `propose`."""


class TargetKV(Protocol):
    """The K/V of some sequences, as the model that is drafted for has stored them."""

    def read(self, layer: int, q_BNH: Tensor) -> Tensor:
        """Attention of one query a sequence over the K/V of the model's `layer`; as q.

        A sequence's query stands at the position after its last stored token and sees, without
        any more mask, what the model would see there: all stored tokens, or in a sliding layer
        the last sliding_window - 1 of them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Draft:
    """What a drafter proposes."""

    ids_BJ: Tensor
    """int64; each the likeliest by its logits, of equals the lowest id."""
    logits_BJC: Tensor
    """float32, of all tokens or of those that `among_BJC` names."""
    among_BJC: Tensor | None
    """int64: which tokens the logits are of, no two alike in a row; None: of 0..V-1."""

    def whole(self, vocab_size: int) -> Tensor:
        """Logits of the whole vocabulary, [B, J, V]: tokens that have none of their own get the
        least of the row less 1, as the drafter was trained with."""
        if self.among_BJC is None:
            return self.logits_BJC
        least_BJ1 = self.logits_BJC.amin(-1, keepdim=True) - 1.0
        every = least_BJ1.repeat(1, 1, vocab_size)
        return every.scatter(-1, self.among_BJC, self.logits_BJC)


def donors(target: TextConfig) -> dict[LayerType, int]:
    """The layers of a model whose K/V its drafter reads: of each type the last that owns any."""
    return {plan.layer_type: plan.index for plan in target.layers if plan.owns_kv}


def check_target(config: DrafterConfig, target: TextConfig) -> None:
    """Refuse a drafter that was not made for this model.

    Raises:
      ConfigError: a size that must agree does not, or a layer has no K/V to read; with the size
        that the drafter is for, where it is a known one.
    """
    ours, theirs = config.text_config, target
    pairs = [
        ("backbone_hidden_size", config.backbone_hidden_size, "hidden_size", theirs.hidden_size)
    ]
    for key in (
        "vocab_size",
        "head_dim",
        "global_head_dim",
        "num_key_value_heads",
        "global_key_value_heads",
        "sliding_window",
        "sliding_rope",
        "full_rope",
    ):
        pairs.append((key, getattr(ours, key), key, getattr(theirs, key)))
    for key, value, other, wanted in pairs:
        if value != wanted:
            known = [
                name
                for name, preset in PRESETS.items()
                if preset.text_config.hidden_size == config.backbone_hidden_size
            ]
            whose = f"it looks like {known[0]}'s" if known else "it is another model's"
            raise ConfigError(
                f"the drafter's {key} is {value}, and the model's {other} {wanted}: {whose}. "
                "Use the drafter that was published beside this very model"
            )
    absent = set(ours.layer_types) - set(donors(target))
    if absent:
        raise ConfigError(
            f"the drafter has {absent.pop()} layers, and the model no such layer whose K/V they "
            "could read"
        )
    if "sliding_attention" in ours.layer_types and ours.sliding_window < 2:
        raise ConfigError(
            "sliding_window 1 leaves a drafter nothing to look at, since the newest token has no "
            "K/V yet; it must be at least 2"
        )


class Trunk(nn.Module):
    """The drafter's layers, their norm and the head."""

    def __init__(self, config: TextConfig, plans: list[LayerPlan], **where: Any) -> None:
        super().__init__()
        # The model embeds what the drafter reads; this table is the drafter's head alone.
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **where)
        self.layers = Layers(DecoderLayer(config, plan, **where) for plan in plans)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **where)


class OrderedHead(nn.Module):
    """Which tokens are worth a logit: those of the likeliest centroids.

    Each centroid has V / G tokens, listed by `token_ordering`.
    """

    def __init__(self, config: DrafterConfig, **where: Any) -> None:
        super().__init__()
        text = config.text_config
        self.top_k = config.centroid_intermediate_top_k
        self.token_ordering: Tensor
        ids = torch.empty(text.vocab_size, dtype=torch.long, device=where.get("device"))
        self.register_buffer("token_ordering", ids)
        self.centroids = Linear(text.hidden_size, config.num_centroids, **where)

    def forward(self, hidden_BE: Tensor) -> Tensor:
        """Ids [B, C]."""
        chosen_BA = self.centroids(hidden_BE).topk(self.top_k, dim=-1).indices
        return self.token_ordering.view(self.centroids.out_features, -1)[chosen_BA].flatten(1)


class MTPDrafter(nn.Module):
    """The drafter of `target`. Weights are allocated, not initialised: `weights.drafter` loads."""

    def __init__(
        self,
        config: DrafterConfig,
        target: TextConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Raises:
          ConfigError: float16, see `TextModel`; or `check_target`.
        """
        if dtype == torch.float16:
            raise ConfigError(
                "dtype float16: Gemma 4's MLP outputs exceed its largest value, 65504; "
                "use bfloat16 or float32"
            )
        check_target(config, target)
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        text, source = config.text_config, donors(target)
        E, D = text.hidden_size, config.backbone_hidden_size
        # As if these layers came after the model's last: there they would own no K/V either.
        after = target.num_hidden_layers
        plans = [
            replace(plan, index=after + plan.index, kv_source=source[plan.layer_type])
            for plan in text.layers
        ]
        self.config = config
        self.model = Trunk(text, plans, **where)
        self.pre_projection = Linear(2 * D, E, **where)
        self.post_projection = Linear(E, D, **where)
        self.masked_embedding = (
            OrderedHead(config, **where) if config.use_ordered_embeddings else None
        )
        self._rope = {(plan.rope, plan.head_dim) for plan in plans}

    def forward(self, input_BD: Tensor, tables: Tables, kv: TargetKV) -> Tensor:
        """Hidden states after the norm, [B, E], of one step. input: [B, 2 D], see `propose`."""
        x_BE = self.pre_projection(input_BD)
        for layer in self.model.layers:
            assert isinstance(layer, DecoderLayer)
            plan = layer.plan
            q_BNH, _, _ = layer.before_attention(x_BE, tables[plan.rope, plan.head_dim])
            x_BE = layer.after_attention(x_BE, kv.read(plan.kv_source, q_BNH), None)
        return self.model.norm(x_BE)

    def logits(self, hidden_BE: Tensor) -> tuple[Tensor, Tensor | None]:
        """float32 [B, C] and the ids [B, C] they are of; None: of all, [B, V]. Not capped."""
        head_VE = self.model.embed_tokens.weight
        if self.masked_embedding is None:
            return linear(hidden_BE, head_VE).float(), None
        ids_BC = self.masked_embedding(hidden_BE)
        return torch.einsum("be,bce->bc", hidden_BE, head_VE[ids_BC]).float(), ids_BC

    @torch.no_grad()
    def propose(
        self,
        target: TextModel,
        newest_B: Tensor,
        hidden_BD: Tensor,
        positions_B: Tensor,
        kv: TargetKV,
        count: int,
    ) -> Draft:
        """`count` tokens that greedily follow the newest one of each sequence, and their logits.

        newest_B: ids of the newest tokens, which the model has not read yet. hidden_BD: what
        `TextModel.forward` gave for the tokens before, of which the newest were chosen.
        positions_B: the newest tokens' own, int64; `kv` holds as many tokens of each sequence.

        Sequences do not influence each other; a row alone gives the same up to rounding.

        Raises:
          RequestError: count is not from 1 to MAX_DRAFTS, or the shapes are not as above.
        """
        if not 1 <= count <= MAX_DRAFTS:
            raise RequestError(f"{count} drafts: must be 1 to {MAX_DRAFTS}")
        B, D = len(newest_B), self.config.backbone_hidden_size
        found = [tuple(x.shape) for x in (newest_B, hidden_BD, positions_B)]
        if found != [(B,), (B, D), (B,)]:
            raise RequestError(
                f"newest tokens, hidden states and positions have shapes {found}; of {B} sequences "
                f"they are [({B},), ({B}, {D}), ({B},)]"
            )
        dtype = self.pre_projection.weight.dtype
        tables: Tables = {key: rope_table(positions_B, *key) for key in self._rope}
        ids: list[Tensor] = []
        logits: list[Tensor] = []
        among: list[Tensor] = []
        last_B, state_BD = newest_B, hidden_BD.to(dtype)
        for _ in range(count):
            input_BD = torch.cat((target.embed(last_B).to(dtype), state_BD), -1)
            hidden_BE = self(input_BD, tables, kv)
            state_BD = self.post_projection(hidden_BE)
            logits_BC, ids_BC = self.logits(hidden_BE)
            last_B = likeliest(logits_BC, ids_BC)
            ids.append(last_B)
            logits.append(logits_BC)
            if ids_BC is not None:
                among.append(ids_BC)
        return Draft(
            torch.stack(ids, 1), torch.stack(logits, 1), torch.stack(among, 1) if among else None
        )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill with random weights: normal(0, 0.02) matrices, unit norms, tokens in their order."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name.endswith("token_ordering"):
                tensor.copy_(torch.arange(len(tensor)))
            elif "norm" in name or name.endswith("layer_scalar"):
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.02, generator=generator)


def likeliest(logits_BC: Tensor, ids_BC: Tensor | None) -> Tensor:
    """The id of each row's greatest logit, [B]; of equal ones the lowest."""
    best_B1 = logits_BC.amax(-1, keepdim=True)
    if ids_BC is None:
        ids_BC = torch.arange(logits_BC.shape[-1], device=logits_BC.device).expand_as(logits_BC)
    return ids_BC.masked_fill(logits_BC < best_B1, torch.iinfo(torch.long).max).amin(-1)
