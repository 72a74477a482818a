"""Optimizers and schedule."""

import pytest
import torch
from tests.train.copying import fresh_model

from gemsmith.config import TextConfig
from gemsmith.train.optim import Decay, Muon, lr_scale, make_optimizers, orthogonalize


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_orthogonalized_matrix_keeps_singular_vectors_and_levels_values(
    shape: tuple[int, int],
) -> None:
    update = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalize(update)
    values = torch.linalg.svdvals(out)
    assert values.max() < 1.3
    assert values.min() > 0.3  # singular values of the input span a factor of over ten
    u, _, vh = torch.linalg.svd(update, full_matrices=False)
    in_its_basis = u.mT @ out @ vh.mT
    off_diagonal = in_its_basis - torch.diag_embed(torch.diagonal(in_its_basis, dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-4


def test_muon_step_has_the_size_of_an_adamw_step_whatever_the_gradient() -> None:
    for scale in (1e-6, 1.0, 1e4):
        p = torch.nn.Parameter(torch.zeros(64, 256))
        p.grad = scale * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        Muon([p], lr=0.01).step()
        # Full rank 64 x 256: RMS of an orthogonal matrix is 256^-0.5, times 0.2 * 256^0.5.
        assert p.detach().pow(2).mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.2)


def test_muon_goes_downhill_and_decays_weights() -> None:
    p = torch.nn.Parameter(torch.ones(4, 8))
    p.grad = torch.zeros(4, 8)
    Muon([p], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(p.detach(), torch.full((4, 8), 0.95))
    p.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    before = p.detach().clone()
    Muon([p], lr=0.1).step()
    assert ((p.detach() - before) * p.grad).sum() < 0


@pytest.mark.parametrize("muon", [True, False])
def test_every_parameter_has_one_optimizer_and_only_layer_matrices_decay(
    config: TextConfig, muon: bool
) -> None:
    model = fresh_model(config)
    optimizers = make_optimizers(model, lr=1e-3, weight_decay=0.1, muon=muon)
    decays = {
        id(p): group["weight_decay"]
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    listed = sum(len(g["params"]) for o in optimizers for g in o.param_groups)
    assert listed == len(decays) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        is_matrix = p.ndim == 2 and not name.startswith("embed_")
        assert decays[id(p)] == (0.1 if is_matrix else 0.0), name


def test_frozen_parameters_are_left_out(config: TextConfig) -> None:
    model = fresh_model(config)
    model.layers.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in make_optimizers(model, lr=1e-3, weight_decay=0.1, muon=False):
        for group in optimizer.param_groups:
            assert not [names[id(p)] for p in group["params"] if "layers." in names[id(p)]]


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    decay = Decay(start=100, steps=10)
    scale = [lr_scale(s, warmup_steps=4, decay=decay) for s in range(111)]
    assert scale[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert scale[99] == scale[100] == 1.0
    assert scale[105] == pytest.approx(0.5)
    assert scale[110] == 0.0
    assert lr_scale(10_000, warmup_steps=4, decay=None) == 1.0
