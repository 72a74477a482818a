"""Our own server keeps its word: every probe passes, or is skipped for a reason stated here."""

import pytest
from tests.server.conftest import on_a_socket

from gemsmith.engine.batching import EngineConfig
from gemsmith.evals.conformance import run, select
from gemsmith.evals.endpoint import Endpoint

NO_MEDIA = "this model takes no"
SKIPPED = {
    "image-read": NO_MEDIA, "image-detail": NO_MEDIA, "image-budget": NO_MEDIA,
    "image-two": NO_MEDIA, "image-again": NO_MEDIA,
    "audio-read": NO_MEDIA, "audio-long": "refused, and said so", "audio-transcribed": NO_MEDIA,
    "stream-pieces": "the reply is short",
    "stream-characters": "the model itself writes no whole characters",
    "json-object": "the answer was cut by max_tokens",
    "other-seeds": "six seeds, one reply",
}  # fmt: skip
"""What depends on the model, not on the server; of others not one may be skipped."""


@pytest.mark.slow
def test_every_probe_passes_on_our_own_server(pocket):
    config = EngineConfig(max_num_seqs=4, max_model_len=2048)
    with (
        on_a_socket(pocket, config) as (url, service),
        Endpoint(url, timeout_s=60) as endpoint,
    ):
        endpoint.connect()
        report = run(endpoint, select())
        assert service.engine.stats().failed == 0
    failed = [each for each in report.outcomes if each.status == "fail"]
    assert not failed, "\n".join(f"{f.name}: {f.reason}\n  {f.evidence[:500]}" for f in failed)
    for each in report.outcomes:
        if each.status == "skip":
            assert SKIPPED.get(each.name, "no reason known here") in each.reason, each
