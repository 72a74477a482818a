"""One sequence at a time on one model: a prompt is read in chunks, its reply a token at a time.

What a request leaves of K/V is kept for the next, see `context`. What this is not: replies choose
their tokens themselves (`reply`), and many at a time are run by `batching`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gemsmith.engine.context import Context, Next
from gemsmith.engine.drafters import Text
from gemsmith.engine.media import Prompt
from gemsmith.engine.reply import Event, Reply
from gemsmith.engine.request import SamplingParams
from gemsmith.engine.sampler import Sampler
from gemsmith.engine.soft import SoftTokens
from gemsmith.engine.speculative import Speculation
from gemsmith.model.text import TextModel

RESERVED_TOKENS = 1024
"""K/V space set aside for a reply of no given length; it grows beyond that."""


class SingleEngine:
    """Runs one request at a time; one begun while another still runs has K/V of its own."""

    def __init__(
        self,
        model: TextModel,
        kv: torch.dtype,
        soft: SoftTokens,
        speculation: Speculation | None = None,
    ) -> None:
        """kv: how K/V are stored. speculation: guesses replies ahead; None: nothing does."""
        self.kept: Context | None = None
        """What the last request left; None while a request has it."""
        self._model, self._kv, self._soft, self._speculation = model, kv, soft, speculation

    def run(self, reply: Reply) -> Iterator[Event]:
        """The events of a reply. Nothing is left behind if it is abandoned."""
        reply.started = time.perf_counter()
        with self._context() as context:
            new = min(reply.max_tokens, reply.params.max_tokens or RESERVED_TOKENS)
            cached, following = self._prefill(context, reply.prompt, new)
            text = Text(reply, context)
            events, _ = text.take([following])
            while True:
                yield from events
                yield from reply.take_known()
                if reply.ended:
                    break
                events = self._step(text, context)
            yield from reply.finish(cached)

    def choose(self, prompt: Prompt, replies: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The one of some replies, none of which begins another, of the likeliest tokens."""
        with self._context() as context:
            sampler = Sampler(
                SamplingParams(temperature=0),
                vocab_size=self._model.config.vocab_size,
                prompt_ids=prompt.ids,
                device=context.device,
            )
            longest = max(map(len, replies))
            following, read, at = None, 0, 0  # tokens that the model has read, and that are chosen
            while len(replies) > 1:
                allowed = {reply[at] for reply in replies}
                if len(allowed) > 1:
                    if following is None:
                        _, following = self._prefill(context, prompt, longest)
                    if read < at:
                        following = context.step(replies[0][read:at])
                        read = at
                    token = sampler.choose_next(following, allowed)
                    replies = [reply for reply in replies if reply[at] == token]
                at += 1
            return replies[0]

    @contextmanager
    def _context(self) -> Iterator[Context]:
        """The kept context, or a new one; kept afterwards unless a pass was cut off."""
        context, self.kept = self.kept or Context(self._model, self._kv), None
        try:
            yield context
        finally:
            if context.whole:
                self.kept = context

    def _prefill(self, context: Context, prompt: Prompt, reply_tokens: int) -> tuple[int, Next]:
        """Read what of a prompt the context has not: how many tokens it had, and what follows."""
        keys = prompt.keys()
        cached = context.rewind_for(keys)
        context.reserve(len(prompt.ids) + reply_tokens)
        following = context.step(
            prompt.ids[cached:],
            keys=keys[cached:],
            soft=self._soft.rows(prompt, cached),
            blocks_T=self._soft.blocks(prompt, cached),
        )
        return cached, following

    def _step(self, text: Text, context: Context) -> list[Event]:
        """Read all that is known of a reply, and guesses of what follows, in one pass."""
        unread, ahead = text.ids[text.read :], self._speculation
        if ahead:
            ahead.propose([text], len(unread))
        started, drafts = time.perf_counter(), text.drafts
        text.reply.prepare()
        if drafts:
            events, accepted = text.take(context.verify(unread, drafts, text.reply.sees))
            context.keep(len(unread) + accepted)
        else:
            events, _ = text.take([context.step(unread, sees=text.reply.sees)])
        if ahead:
            ahead.observe(len(unread) + len(drafts), time.perf_counter() - started)
        return events
