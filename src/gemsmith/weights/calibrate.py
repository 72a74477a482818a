"""Calibration data through a checkpoint that need not fit into memory: one layer at a time.

A layer's weights are read as floats and its inputs computed with the low-bit layers before it, so
that each layer makes up for what those before it lost. Within the layer the same, in the order of
computation: once the weights with the same inputs are chosen (q, k and v; o; gate and up; down),
what follows sees them rounded. An expert is calibrated on the tokens that the router sends to it,
if there are enough; otherwise, as tables, heads and weights of 8 bits, it is searched without data.

Memory: one layer in float32, the hidden states of all tokens (4 * T * D bytes) and, of the weight
in work, three matrices [K, K]: 5 GB for the widest of 31B.

What it is not: the method, see quant/calibrate.py, or a reader of data: it is given token ids.

Shapes: T tokens, D hidden_size, K inputs, E experts.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemsmith.config import TextConfig
from gemsmith.errors import WeightsError
from gemsmith.model.text import Experts
from gemsmith.quant.calibrate import gptq, gram
from gemsmith.quant.formats import Format, Quantized
from gemsmith.quant.quantize import quantize
from gemsmith.weights.rounding import settled
from gemsmith.weights.streaming import STAGES, Streamed
from gemsmith.weights.tensors import StoredTensor

MIN_EXPERT_TOKENS = 0.25
"""Of its K inputs: an expert that saw fewer tokens is not calibrated."""
Found = Callable[[str], Quantized | None]
"""A weight by its name, if it was chosen before."""


class _Reached(Exception):
    """A module was reached whose inputs were all that was asked for."""


class Calibration(Streamed):
    """Chooses the codes of a decoder's layers, in order."""

    def __init__(
        self,
        config: TextConfig,
        weights: dict[str, StoredTensor],
        formats: dict[str, Format],
        tokens: Sequence[Sequence[int]],
        found: Found = lambda name: None,
        advance: Callable[[str], None] = lambda name: None,
    ) -> None:
        """weights: where each of the decoder's lies, by name. formats: of those that get one.

        tokens: sequences of ids. found: weights that an earlier call chose. advance: told the name
        of each weight before it is worked on.

        Raises:
          RequestError: no tokens, or ids outside the vocabulary.
        """
        super().__init__(config, weights, formats, tokens)
        self.found, self.advance = found, advance
        self.calibrated: dict[str, int] = {}
        """How many matrices of each weight were chosen with data: of a stack perhaps not all."""
        self._ready: dict[str, Quantized] = {}
        self._next = 0

    def covers(self, name: str) -> bool:
        """Whether this is a weight that data can help."""
        format = self.formats.get(name)
        staged = any(f".{part}." in f".{name}." for stage in STAGES for part in stage)
        return format is not None and format.bits < 8 and staged

    @torch.no_grad()
    def take(self, name: str) -> Quantized:
        """The weight of this name, once; layers up to its own are run if they have not been.

        Raises:
          WeightsError: the checkpoint is damaged, by name.
        """
        while name not in self._ready:
            if self._next == 0:
                self._begin()
            self._run_layer(self._next)
            self._next += 1
        return self._ready.pop(name)

    def _run_layer(self, index: int) -> None:
        """Choose the codes of a layer, and go through it."""
        prefix = f"layers.{index}."
        names = [name for name in self.weights if name.startswith(prefix)]
        todo: list[str] = []
        for name in names:
            if self.covers(name):
                before = self.found(name)
                if before is not None:
                    self._put(name, before.dequantize())
                    continue
                format, grid = settled(name, self.weights[name], self.formats[name])
                self.formats[name] = format
                if not grid:
                    todo.append(name)
                    self._put(name, self._floats(name))
                    continue
                self._keep(name, quantize(self._floats(name), format, grid=True))
                self.calibrated[name] = 0
                continue
            self._put(name, self._plain(name))
        for stage in STAGES:
            paths = [path for path in stage if any(n.startswith(prefix + path) for n in todo)]
            if paths == ["experts"]:
                self._calibrate_experts(index, todo)
            elif paths:
                self._calibrate(index, paths)
        for batch in self._batches:
            batch.x_TD = self._through(index, batch)
        self._drop(index)

    def _calibrate(self, index: int, paths: list[str]) -> None:
        """Linear layers with the same inputs."""
        H_KK: Tensor | None = None
        for inputs in self._inputs(index, paths[0]):
            H_KK = gram(inputs[0], H_KK)
        assert H_KK is not None
        for path in paths:
            name = f"layers.{index}.{path}.weight"
            self.advance(name)
            weight = self._model.get_parameter(name)
            self._keep(name, self._chosen(name, weight, H_KK, self.formats[name]))
            self.calibrated[name] = 1

    def _calibrate_experts(self, index: int, todo: list[str]) -> None:
        """Each expert on its own tokens; the down projection sees what rounded gate and up give."""
        path = f"layers.{index}.experts."
        up, down = path + "gate_up_proj", path + "down_proj"
        experts: Experts = self._model.get_submodule(path[:-1])  # pyright: ignore[reportAssignmentType]
        seen = [inputs[:2] for inputs in self._inputs(index, path[:-1].split(".", 2)[2])]
        x_TD, index_TA = (torch.cat(parts) for parts in zip(*seen, strict=True))
        stacks: dict[str, list[Quantized]] = {name: [] for name in (up, down) if name in todo}
        counts = dict.fromkeys(stacks, 0)
        for expert in range(experts.gate_up_proj.shape[0]):
            hidden_TK = x_TD[(index_TA == expert).any(1)]
            for name in (up, down):
                weight = self._model.get_parameter(name)[expert]
                if name in stacks:
                    self.advance(name)
                    if len(hidden_TK) >= MIN_EXPERT_TOKENS * weight.shape[1]:
                        chosen = self._chosen(name, weight, gram(hidden_TK), self.formats[name])
                        counts[name] += 1
                    else:
                        chosen = quantize(weight, self.formats[name], grid=False)
                    stacks[name].append(chosen)
                    weight = chosen.dequantize()
                if name == up:
                    gate, wide = F.linear(hidden_TK, weight).chunk(2, -1)
                    hidden_TK = F.gelu(gate, approximate="tanh") * wide
        for name, stack in stacks.items():
            packed, scales = (
                torch.stack([getattr(q, f) for q in stack]) for f in ("packed", "scales")
            )
            shape = len(stack), *stack[0].shape
            self._keep(name, Quantized(self.formats[name], shape, packed, scales))
            self.calibrated[name] = counts[name]

    def _chosen(self, name: str, weight: Tensor, H_KK: Tensor, format: Format) -> Quantized:
        try:
            return gptq(weight, H_KK, format)
        except WeightsError as error:
            file = self.weights[name].file.name
            raise WeightsError(f"{file}: {name}: {error}") from None

    def _inputs(self, index: int, path: str) -> Iterator[tuple[Tensor, ...]]:
        """What a module of the layer is called with, batch by batch."""
        caught: list[tuple[Tensor, ...]] = []

        def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            caught.append(inputs)
            raise _Reached

        module = self._model.get_submodule(f"layers.{index}.{path}")
        handle = module.register_forward_pre_hook(catch)
        try:
            for batch in self._batches:
                try:
                    self._through(index, batch)
                except _Reached:
                    yield caught.pop()
        finally:
            handle.remove()

    def _keep(self, name: str, weight: Quantized) -> None:
        self._ready[name] = weight
        self._put(name, weight.dequantize())
