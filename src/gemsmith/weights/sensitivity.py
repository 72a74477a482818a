"""What it costs the whole model when a weight loses precision: measured, unit by unit.

A unit is one weight, or the few that share their inputs. It is shaken by noise like that of
rounding to 4 bits, the rest of the model is left as it is, and the next-token distributions at the
end are compared with the clean model's: KL divergence, in nats. That is proportional to the energy
of the noise (in pocket within a factor of 1.7 from 4 bits down to 2, mostly 1.2), so divided by the
noise's relative squared error it is a number of the unit alone, its sensitivity; times the relative
squared error of a format it is what the format will cost. In pocket the sensitivities of units span
a factor of a thousand, and neither their size nor their place foretells them.

All shaken models go through the checkpoint together, layer by layer, and part from the clean one
where they are shaken: each layer is read once. Keys and values that later layers read, the tied
head and the table of per-layer inputs are thereby counted wherever they act.

Tokens are those of calibration data or, without, drawn at random from the vocabulary.

Memory: a layer in float32 and, for each unit, the hidden states of PROBE_TOKENS tokens: 0.9 GB in
E2B, 5 GB in 31B. Time: that of PROBE_TOKENS / 2 tokens through the model for each unit.

Shapes: T tokens, R of them compared, D hidden_size, V vocabulary, n rows of the head.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemsmith.config import TextConfig
from gemsmith.errors import WeightsError
from gemsmith.weights.names import EMBEDDING, HEAD, PLE_TABLE
from gemsmith.weights.streaming import Batch, Streamed
from gemsmith.weights.tensors import StoredTensor, read_rows

PROBE_TOKENS = 1024
SEQUENCE_TOKENS = 256
"""Of a conversation: several of them are better than the beginning of one."""
COMPARED = 256
"""Tokens whose distributions are compared: the head of a real vocabulary is a third of the work."""
NOISE_GROUP = 32
"""Neighbouring weights whose largest says how strong the noise is, as in the usual formats."""
SEED = 1

Unit = tuple[str, ...]
"""Names of weights that get one format."""


@dataclass(slots=True)
class _Model(Batch):
    """The batch in one of the models: clean, or with a unit shaken."""

    table: str = ""
    """The table that is shaken, if one is."""


class _Given(nn.Module):
    """Stands for a table, of which only the rows of the batch are ever asked."""

    rows_TK = torch.empty(0)

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.rows_TK


def probe_tokens(config: TextConfig, tokens: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """About PROBE_TOKENS of the data, from beginnings of conversations spread over it."""
    if tokens is None:
        generator = torch.Generator().manual_seed(SEED)
        shape = PROBE_TOKENS // SEQUENCE_TOKENS, SEQUENCE_TOKENS
        return torch.randint(0, config.vocab_size, shape, generator=generator).tolist()
    begun = [list(ids[:SEQUENCE_TOKENS]) for ids in tokens if len(ids)]
    wanted = max(1, PROBE_TOKENS * len(begun) // max(1, sum(map(len, begun))))
    return begun[:: max(1, len(begun) // wanted)][:wanted]


def sensitivities(
    config: TextConfig,
    weights: dict[str, StoredTensor],
    units: Sequence[Unit],
    tokens: Sequence[Sequence[int]],
    advance: Callable[[str], None] = lambda name: None,
) -> list[float]:
    """Of each unit: nats of KL divergence per unit of relative squared error.

    weights: where each of the decoder's lies, by name. tokens: as `probe_tokens` gives them.

    Raises:
      RequestError: ids outside the vocabulary.
      WeightsError: the checkpoint is damaged, by name, or its logits are no numbers.
    """
    return _Probe(config, weights, {}, tokens).run(units, advance)


class _Probe(Streamed):
    @torch.no_grad()
    def run(self, units: Sequence[Unit], advance: Callable[[str], None]) -> list[float]:
        self._begin()
        first = self._batches[0]
        clean = _Model(first.ids_T, first.positions_T, first.kv)
        self._rows: dict[tuple[str, str], Tensor] = {}
        for name in {EMBEDDING, PLE_TABLE} & self.weights.keys():
            at = name.removesuffix(".weight")
            self._rows[name, ""] = self._model.get_submodule(at)(clean.ids_T)
            self._model.set_submodule(at, _Given())
        clean.x_TD = self._embedded(clean)
        models: dict[int, _Model] = {}
        noise: dict[int, float] = {}
        for at, unit in enumerate(units):
            if unit[0] in (EMBEDDING, PLE_TABLE):
                rows = self._rows[unit[0], ""]
                shaken_rows = self._rows[unit[0], unit[0]] = self._shaken_rows(unit[0], rows)
                noise[at] = _relative(shaken_rows - rows, rows)
                models[at] = _Model(clean.ids_T, clean.positions_T, clean.kv.fork(), table=unit[0])
                models[at].x_TD = self._embedded(models[at])
        for index in range(self.config.num_hidden_layers):
            here = f"layers.{index}."
            self._inputs: dict[str, Tensor | None] = {}
            for name in self.weights:
                if name.startswith(here):
                    self._put(name, self._floats(name))
            for model in models.values():
                model.x_TD = self._through(index, model)
            for at, unit in enumerate(units):
                if unit[0].startswith(here):
                    advance(unit[0])
                    model = _Model(clean.ids_T, clean.positions_T, clean.kv.fork())
                    model.x_TD = clean.x_TD
                    noise[at], plain = self._shake(unit)
                    model.x_TD = self._through(index, model)
                    models[at] = model
                    for name, values in plain.items():
                        self._put(name, values)
            clean.x_TD = self._through(index, clean)
            self._drop(index)
        self._put("norm.weight", self._floats("norm.weight"))
        head = HEAD if HEAD in self.weights else EMBEDDING
        shaken = next((at for at, unit in enumerate(units) if unit[0] == head), None)
        if shaken is not None and shaken not in models:
            models[shaken] = clean
        advance(head)
        kl, head_noise = self._divergences(head, clean, models, shaken)
        if shaken is not None:
            noise.setdefault(shaken, head_noise)
        wrong = [units[at][0] for at in kl if not 0 <= kl[at] < float("inf")]
        if wrong:
            raise WeightsError(f"{wrong[0]}: with noise on it logits are no numbers")
        return [kl[at] / noise[at] if noise[at] else 0.0 for at in range(len(units))]

    def _shaken_rows(self, name: str, rows_TK: Tensor) -> Tensor:
        """The same noise wherever a token comes again."""
        ids, back = self._batches[0].ids_T.unique(return_inverse=True)
        at = torch.empty_like(ids).scatter_(0, back, torch.arange(len(back)))
        return _shaken(rows_TK[at], _generator(name))[back]

    def _embedded(self, batch: Batch) -> Tensor:
        if not isinstance(batch, _Model):
            return super()._embedded(batch)
        shaken = batch.table if batch.table == EMBEDDING else ""
        return self._rows[EMBEDDING, shaken] * self.config.hidden_size**0.5

    def _per_layer_input(self, index: int, batch: Batch) -> Tensor | None:
        assert isinstance(batch, _Model)
        if batch.table not in self._inputs:
            if PLE_TABLE in self.weights:
                shaken = batch.table if batch.table == PLE_TABLE else ""
                given = self._model.get_submodule(PLE_TABLE.removesuffix(".weight"))
                given.rows_TK = self._rows[PLE_TABLE, shaken]
            self._inputs[batch.table] = super()._per_layer_input(index, batch)
        return self._inputs[batch.table]

    def _shake(self, unit: Unit) -> tuple[float, dict[str, Tensor]]:
        """Put noise on weights of the layer; returns its relative squared error, and them as they
        were."""
        plain: dict[str, Tensor] = {}
        errors: list[float] = []
        for name in unit:
            values = plain[name] = self._model.get_parameter(name).detach()
            shaken = _shaken(values, _generator(name))
            errors.append(_relative(shaken - values, values))
            self._put(name, shaken)
        return sum(errors) / len(errors), plain

    def _divergences(
        self, head: str, clean: _Model, models: dict[int, _Model], shaken: int | None
    ) -> tuple[dict[int, float], float]:
        """Mean KL divergence of each model from the clean one, and the noise on the head.

        The head is read twice, some rows at a time. With d the difference of two logits,
        KL(p, q) = log(sum of p e^d) - sum of p d.
        """
        step = -(-len(clean.x_TD) // COMPARED)
        hidden_RD = self._model.norm(clean.x_TD)[::step]
        of = {at: self._model.norm(model.x_TD)[::step] for at, model in models.items()}
        total_R = torch.full((len(hidden_RD),), -torch.inf, dtype=torch.float64)
        for rows_nD in read_rows(self.weights[head]):
            logits_Rn = self._logits(hidden_RD, rows_nD.float()).double()
            total_R = torch.logaddexp(total_R, logits_Rn.logsumexp(-1))
        grown = {at: torch.zeros_like(total_R) for at in models}
        moved = {at: torch.zeros_like(total_R) for at in models}
        generator, wrong, whole = _generator(head), 0.0, 0.0
        for rows_nD in read_rows(self.weights[head]):
            plain_nD = rows_nD.float()
            shaken_nD = _shaken(plain_nD, generator) if shaken is not None else plain_nD
            wrong += (shaken_nD - plain_nD).square().sum().item()
            whole += plain_nD.square().sum().item()
            clean_Rn = self._logits(hidden_RD, plain_nD)
            p_Rn = (clean_Rn - total_R[:, None]).exp()
            for at, states_RD in of.items():
                weight_nD = shaken_nD if at == shaken else plain_nD
                d_Rn = (self._logits(states_RD, weight_nD) - clean_Rn).double()
                grown[at] += (p_Rn * d_Rn.expm1()).sum(-1)
                moved[at] += (p_Rn * d_Rn).sum(-1)
        kl = {at: (grown[at].log1p() - moved[at]).clamp_min(0).mean().item() for at in models}
        return kl, wrong / whole if whole else 0.0

    def _logits(self, states_RD: Tensor, rows_nD: Tensor) -> Tensor:
        logits_Rn = states_RD @ rows_nD.T
        cap = self.config.final_logit_softcapping
        return logits_Rn if cap is None else cap * torch.tanh(logits_Rn / cap)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _shaken(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The weight plus evenly distributed noise, as wide as the steps of 4 bits."""
    K = weight.shape[-1]
    groups = weight.unflatten(-1, (-1, NOISE_GROUP if K % NOISE_GROUP == 0 else K))
    noise = torch.rand(groups.shape, generator=generator).sub_(0.5)
    noise *= groups.abs().amax(-1, keepdim=True) / 8
    return (groups + noise).view(weight.shape)


def _relative(wrong: Tensor, whole: Tensor) -> float:
    energy = whole.square().sum().item()
    return wrong.square().sum().item() / energy if energy else 0.0
