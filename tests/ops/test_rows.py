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
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(isa, threads, dtype):
    """Each row alone, and some. Rounded to bfloat16 another order of adding is seen where it
    counts: beside a square that swallows those of its lane, in what is left of a difference, and
    where units are nearly off."""
    tokens, width = 90, 1037
    gate, up = (2 * random(tokens, width, seed=n, dtype=dtype) for n in (0, 1))
    weight = gate[0].clone()
    # Another root in each row, of squares of 1.9 in lanes beside one near which floats are 4 apart.
    branch = 1.375 * up.sign() * (torch.arange(width) >= 8 * torch.arange(tokens)[:, None])
    branch[:, 0] = 6000
    x = -rows.rms_norm(branch, weight, EPS)
    heads = random(tokens, 3, 64, seed=4, dtype=dtype)
    cos, sin = table(5 * torch.arange(tokens), torch.linspace(1, 0.1, 31))
    for name, of in {
        "norm": lambda at: rows.rms_norm(branch[at], weight, EPS),
        "norm without weight": lambda at: rows.rms_norm(branch[at], None, EPS),
        "sum": lambda at: rows.add_norm(x[at], branch[at], weight, EPS, 0.75),
        "gated": lambda at: rows.geglu(gate[at], up[at]),
        "turned": lambda at: rows.rotate(heads[at], (cos[at], sin[at])),
    }.items():
        whole = of(slice(None))
        for at in (slice(40, 57), *(slice(row, row + 1) for row in range(tokens))):
            assert torch.equal(of(at), whole[at]), (name, at)


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
@pytest.mark.parametrize("name", ["norm", "sum", "gated", "turned"])
def test_what_alone_asks_for_a_gradient_gets_the_definition_s(dtype, name):
    tokens, width = 9, 32
    x, y = (random(tokens, width, seed=n, dtype=dtype) for n in (0, 1))
    weight, heads = (
        random(width, seed=2, dtype=dtype),
        random(tokens, 3, width, seed=3, dtype=dtype),
    )
    at, frequencies = torch.arange(tokens), torch.linspace(1, 0.1, width // 2)
    ours, definition, arguments = {
        "norm": (
            lambda x, weight: rows.rms_norm(x, weight, EPS),
            lambda x, weight: reference.rms_norm(x, weight, EPS),
            (x, weight),
        ),
        "sum": (
            lambda x, y, weight: rows.add_norm(x, y, weight, EPS, 0.75),
            lambda x, y, weight: (x + reference.rms_norm(y, weight, EPS)) * 0.75,
            (x, y, weight),
        ),
        "gated": (rows.geglu, lambda x, y: F.gelu(x, approximate="tanh") * y, (x, y)),
        "turned": (
            lambda heads: rows.rotate(heads, table(at, frequencies)),
            lambda heads: reference.rope(heads, at, frequencies.double()),
            (heads,),
        ),
    }[name]
    limit = tolerance(torch.float32, tokens * width)
    if dtype == torch.bfloat16:  # torch rounds by half after each of some five steps, and back
        limit += 4 * torch.finfo(dtype).eps
    for n in range(len(arguments)):
        asks = [each.detach().requires_grad_(n == m) for m, each in enumerate(arguments)]
        made = ours(*asks)
        out = random(*made.shape, seed=5, dtype=dtype)
        (found,) = torch.autograd.grad(made, asks[n], out)
        wide = [each.double().requires_grad_(n == m) for m, each in enumerate(arguments)]
        (wanted,) = torch.autograd.grad(definition(*wide), wide[n], out.double())
        assert found.dtype == dtype
        assert_close(found, wanted, limit)
        with torch.no_grad():  # as what cannot ask for one, to the bit
            assert torch.equal(ours(*asks), ours(*arguments))


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
