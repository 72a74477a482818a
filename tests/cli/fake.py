"""A language model for tests of the command line: says what it is told to, as the engine would."""

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, cast

from gemsmith.engine.engine import LM
from gemsmith.engine.reply import Event, collect
from gemsmith.engine.request import Finished, FinishReason, Generation, Usage

Reply = Sequence[Event | BaseException]


class FakeLM:
    """Gives its replies in order; an exception among the events is raised in its place."""

    def __init__(self, *replies: Reply, pause_s: float = 0) -> None:
        self.replies, self.pause_s = list(replies), pause_s
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def stream(self, prompt: Any, **options: Any) -> Iterator[Event]:
        self.asked.append((deepcopy(prompt), options))
        return self._events(self.replies.pop(0))

    def generate(self, prompt: Any, **options: Any) -> Generation:
        return collect(self.stream(prompt, **options))

    def memory(self) -> dict[str, int]:
        return {"weights": 1 << 20, "kv": 0}

    def _events(self, reply: Reply) -> Iterator[Event]:
        reason = FinishReason.STOP
        for event in reply:
            time.sleep(self.pause_s)
            if isinstance(event, BaseException):
                raise event
            yield event
        usage = Usage(
            prompt_tokens=3,
            cached_tokens=0,
            completion_tokens=2,
            thinking_tokens=0,
            time_to_first_token_s=0.1,
            total_s=0.2,
        )
        yield Finished(finish_reason=reason, usage=usage, token_ids=(1, 2))


def fake(*replies: Reply, pause_s: float = 0) -> LM:
    return cast(LM, FakeLM(*replies, pause_s=pause_s))
