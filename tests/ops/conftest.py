"""Every instruction set of this machine, and numbers of threads."""

from collections.abc import Iterator

import pytest

from gemsmith.ops import native


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.force_isa(request.param)
    yield request.param
    native.force_isa(None)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whatever the machine grants: the pool must be right on shared cores too."""
    monkeypatch.setattr(native, "threads", lambda: request.param)
    return request.param
