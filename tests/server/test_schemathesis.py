"""Random requests by the server's own OpenAPI, right and wrong ones: none makes it fail."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.server.conftest import ScriptedLM, on_a_socket, user

from gemsmith.engine.batching import EngineConfig
from gemsmith.engine.engine import LM
from gemsmith.server.errors import FAILED

EXAMPLES = 12
"""Of each operation and mode."""
ROOMY = EngineConfig(max_num_seqs=4, max_model_len=3000, max_num_batched_tokens=4000)
PLAIN = {"messages": user("x"), "input": "x", "prompt": "x"}
LENGTHS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


def bounded(case: Any, plain: bool) -> Any:
    """A case that asks for a model that is there and a short reply.

    plain: with a conversation that can be read, so that the other fields are looked at.
    """
    body = case.body
    if isinstance(body, dict):
        body["model"] = "gemma"
        length = LENGTHS.get(case.path)
        if length and (
            body.get(length) is None or (type(body[length]) is int and body[length] > 8)
        ):
            body[length] = 8
        if plain:
            body |= {name: PLAIN[name] for name in PLAIN if name in body}
    return case


def test_no_request_that_the_openapi_allows_or_forbids_makes_the_server_fail(tiny: ScriptedLM):
    """The model is free to say what it finds likely, and held to the grammars that are asked."""
    lm = LM(tiny.model, tiny.tokenizer, tiny.config, end_ids=tiny.end_ids, kv="float32")
    statuses = set()
    with on_a_socket(lm, ROOMY) as (url, service):
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # pyright: ignore
        for operation in operations:
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                cases = operation.as_strategy(generation_mode=mode)

                @settings(
                    max_examples=EXAMPLES,
                    derandomize=True,
                    database=None,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),  # pyright: ignore
                )
                @given(case=cases, plain=st.booleans())
                def ask(case: Any, plain: bool) -> None:
                    answer = bounded(case, plain).call(timeout=60)
                    told = f"{case.as_curl_command()}\n{answer.text}"
                    assert answer.status_code < 500, told
                    assert FAILED not in answer.text, told  # in the midst of a stream
                    statuses.add((case.path, answer.status_code))

                ask()
        assert service.engine.healthy
    # What is asked is not all refused.
    assert {path for path, status in statuses if status == 200} >= LENGTHS.keys()
