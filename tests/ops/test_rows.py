"""What stands between products, by the extension and by torch, near its definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import needs_extension
from torch import Tensor

from gemsmith.ops import native, reference, rows
from gemsmith.ops.rotary import table
from gemsmith.testing import assert_close, tolerance

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EPS = 1e-6


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(dtype: torch.dtype, tokens: int, width: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each operation what it gives for so many tokens, and its definition."""
    x, branch = (random(tokens, width, seed=n, dtype=dtype) for n in (0, 1))
    weight = random(width, seed=2, dtype=dtype)
    wide, more, norm = x.double(), branch.double(), weight.double()
    scale = torch.tensor([0.75], dtype=dtype)
    both = random(tokens, 3, width, seed=3, dtype=dtype)[:, 1]  # rows apart
    heads = random(tokens, 3, 2 * width, seed=4, dtype=dtype)
    at, frequencies = 5 * torch.arange(tokens), torch.linspace(1, 0.1, width - 1)
    still = torch.cat((frequencies.double(), torch.zeros(1, dtype=torch.float64)))
    added = reference.rms_norm(more, norm, EPS)
    return {
        "norm": (rows.rms_norm(x, weight, EPS), reference.rms_norm(wide, norm, EPS)),
        "norm without weight": (rows.rms_norm(x, None, EPS), reference.rms_norm(wide, None, EPS)),
        "norm of heads": (
            rows.rms_norm(x.view(tokens, 1, width), weight, EPS).view(x.shape),
            reference.rms_norm(wide, norm, EPS),
        ),
        "sum": (rows.add_norm(x, branch, weight, EPS), wide + added),
        "scaled sum": (rows.add_norm(x, branch, weight, EPS, scale), (wide + added) * 0.75),
        "gated": (rows.geglu(x, both), F.gelu(wide, approximate="tanh") * both.double()),
        "turned": (
            rows.rotate(heads, table(at, frequencies)),
            reference.rope(heads.double(), at, still),
        ),
    }


@DTYPES
@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (9, 32), (90, 1037)])
def test_rows_are_near_their_definition(monkeypatch, dtype, extension, tokens, width):
    """Rounded once by the extension, after each of up to five steps by torch."""
    if not extension:
        monkeypatch.setattr(native, "available", lambda: False)
    for name, (found, wanted) in made(dtype, tokens, width).items():
        assert found.dtype == dtype, name
        # Angles are float32 of up to 450 turns.
        limit = tolerance(torch.float32, max(width, 450))
        if dtype == torch.bfloat16:
            limit += torch.finfo(dtype).eps * (0.5 if extension and native.available() else 2)
        assert_close(found, wanted, limit)


@needs_extension
@DTYPES
def test_every_instruction_set_and_number_of_threads_gives_the_same_rows(isa, threads, dtype):
    found = made(dtype, 90, 1037)
    native.force_isa("generic")
    for name, (wanted, _) in made(dtype, 90, 1037).items():
        assert torch.equal(found[name][0], wanted), name


@needs_extension
@DTYPES
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(isa, dtype):
    x, branch, up = (random(90, 1037, seed=n, dtype=dtype) for n in range(3))
    weight = x[0].clone()
    whole = rows.add_norm(x, branch, weight, EPS), rows.geglu(x, up)
    for at in (slice(0, 1), slice(40, 57)):
        assert torch.equal(rows.add_norm(x[at], branch[at], weight, EPS), whole[0][at])
        assert torch.equal(rows.geglu(x[at], up[at]), whole[1][at])


@needs_extension
def test_values_that_are_no_numbers_or_too_great_stay_so(isa):
    odd = torch.tensor([[torch.nan, torch.inf, 3e38, 1.0]]).bfloat16()
    one = torch.ones_like(odd)
    gated = rows.geglu(odd, one)[0]
    assert gated[0].isnan()
    assert gated[1:].tolist() == [torch.inf, odd[0, 2].item(), 0.83984375]
    assert rows.rms_norm(odd[:, [0, 3]], None, EPS).isnan().all()
    doubled = rows.add_norm(odd[:, 2:], one[:, 2:], one[0, 2:], EPS, 2.0)
    assert doubled[0].tolist() == [torch.inf, 4.0]


@DTYPES
def test_what_asks_for_a_gradient_gets_one(dtype):
    x = random(3, 8, seed=0, dtype=dtype).requires_grad_()
    weight = random(8, seed=1, dtype=dtype).requires_grad_()
    rows.add_norm(rows.geglu(x, x), rows.rms_norm(x, weight, EPS), weight, EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    with torch.no_grad():
        assert not rows.rms_norm(x, weight, EPS).requires_grad


@needs_extension
def test_shapes_and_types_that_the_extension_does_not_take_are_for_torch():
    x = random(4, 6, 8, seed=0, dtype=torch.bfloat16)
    wide = random(8, seed=1, dtype=torch.float32)
    assert rows.rms_norm(x, wide, EPS).dtype == torch.bfloat16
    assert rows.rms_norm(x[0, 0], None, EPS).shape == (8,)
    assert rows.add_norm(x, x[0], wide, EPS).shape == x.shape
    across = rows.rms_norm(x.transpose(0, 1), None, EPS)
    assert torch.equal(across.transpose(0, 1), rows.rms_norm(x, None, EPS))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        rows.rms_norm(x, wide[1:].bfloat16(), EPS)
