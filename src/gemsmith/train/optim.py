"""Optimizers and the learning-rate schedule.

Matrices of the decoder layers take Muon steps: momentum, made orthogonal by Newton-Schulz
iterations, scaled so that its root mean square is that of an AdamW step (0.2), which lets both
share one learning rate. Embeddings, norms and other vectors take AdamW steps.

The schedule is warm-up, stable, decay (WSD): how long a run will be need not be known when it
starts, and the decay can be run at the end of any stretch.

Sources: K. Jordan, Muon: an optimizer for hidden layers (2024), for the iteration and its
coefficients; Liu et al., Muon is scalable for LLM training, arXiv 2502.16982, for the 0.2 scale;
Hu et al., MiniCPM, arXiv 2404.06395, for WSD.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from gemsmith.ops.linear import cpu_multiplies_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def training_dtype(device: torch.device) -> torch.dtype:
    """Of a step's products: bfloat16 where the hardware multiplies it fast, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def orthogonalize(update_BMN: torch.Tensor) -> torch.Tensor:
    """A batch of matrices with all singular values near 1 and the singular vectors of the input.

    Float32 or bfloat16 in, the same out. Singular values end in about [0.7, 1.2], which is all
    that Muon needs.
    """
    a, b, c = NEWTON_SCHULZ
    tall = update_BMN.shape[-2] > update_BMN.shape[-1]
    x = update_BMN.mT if tall else update_BMN
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum for weight matrices; decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; matrices of one shape are orthogonalized together."""
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]]
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum: torch.Tensor = state["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                same_shape[p.shape].append((p, p.grad.lerp(momentum, group["momentum"])))
            for shape, members in same_shape.items():
                params, updates = zip(*members, strict=True)
                scale = 0.2 * max(shape) ** 0.5
                wanted = torch.stack(updates)
                steps = orthogonalize(wanted.to(training_dtype(wanted.device)))
                for p, update in zip(params, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, *, lr: float, weight_decay: float, muon: bool = True
) -> list[torch.optim.Optimizer]:
    """Optimizers for the parameters of `model` that require gradients.

    Decay goes to matrices of the layers alone: not to embeddings, norms or scalars.
    """
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    groups = [{"params": rest, "weight_decay": 0.0}]
    if not muon:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return [adamw, Muon(matrices, lr=lr, weight_decay=weight_decay)] if muon else [adamw]


@dataclass(frozen=True, slots=True)
class Decay:
    """The last phase of a run: the rate falls in a line to zero over `steps` from `start`."""

    start: int
    steps: int


def lr_scale(step: int, *, warmup_steps: int, decay: Decay | None) -> float:
    """Fraction of the full learning rate at `step`, counted from 0."""
    scale = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if decay is not None and step >= decay.start:
        scale *= max(0.0, 1 - (step - decay.start) / decay.steps)
    return scale


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
