"""Settings for every test."""

from collections.abc import Iterator

import pytest
import torch

from gemsmith.ops import native

# Tiny tensors gain nothing from threads and lose much to them on a busy machine.
torch.set_num_threads(1)

needs_extension = pytest.mark.skipif(not native.available(), reason="the extension is not built")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What gemsmith keeps for its next start stays out of the user's folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMSMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
