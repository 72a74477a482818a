"""What one request is answered: from logits to tokens, from tokens to events, to the last event.

One object a request, fed with what follows its last token, one position at a time; who computes
it, alone or in a batch, is not known here.
"""

import time
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch

from gemsmith.engine.context import Next
from gemsmith.engine.grammar import Follow
from gemsmith.engine.media import Prompt
from gemsmith.engine.request import (
    Finished,
    FinishReason,
    Generation,
    SamplingParams,
    TokenLogprob,
    Usage,
)
from gemsmith.engine.sampler import Sampler, Sees, token_logprob
from gemsmith.engine.stop import StopStrings
from gemsmith.engine.thinking import Thought
from gemsmith.text.stream import Content, Splitter, Thinking, ToolCallEvent, ToolProblem
from gemsmith.text.stream import Event as SplitEvent
from gemsmith.text.tokenizer import Detokenizer, Tokenizer

Event: TypeAlias = SplitEvent | Finished
"""What a stream is made of: `Thinking`, `Content`, `ToolCallEvent`, `ToolProblem`, `Finished`."""


FEW = 256
"""Allowed tokens up to which the head's rows of them alone are read."""


class Reply:
    """The answer to one prompt so far. `take` what follows until `ended`, then `finish`."""

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_tokens: int,
        end_ids: frozenset[int],
        suppressed: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        chat: bool = True,
        follow: Follow | None = None,
    ) -> None:
        """max_tokens: most there may be, what the context leaves room for. suppressed: ids never
        chosen. chat: whether thoughts and tool calls are split off. follow: see `Follow`."""
        self.prompt, self.params, self.max_tokens = prompt, params, max_tokens
        self.started = time.perf_counter()
        """When the clock of its usage began."""
        self.token_ids: list[int] = []
        """The reply as the model wrote it, forced tokens and the end token included."""
        self.ended = False
        """Whether nothing more is to be computed."""
        self.drafted = self.accepted = 0
        """Guesses that the model verified, and those of them that it would have chosen."""
        self._end_ids = end_ids
        self._sampler = Sampler(
            params,
            vocab_size=vocab_size,
            prompt_ids=prompt.ids,
            suppressed=suppressed,
            device=device,
        )
        self._thought = Thought(tokenizer, prompt.ids, params.thinking_budget)
        self._constraint = follow(self._thought.inside) if follow else None
        self._output = _Output(tokenizer, params, chat=chat, in_thought=self._thought.inside)
        self._logprobs: list[TokenLogprob] = []
        self._closed = False
        """Ended by an end token, a stop string or a marker spelled out, not by its length."""
        self._first_token_s = 0.0

    @property
    def sees(self) -> Sees | None:
        """What of the logits the choice of the next token may depend on; None: on all."""
        return None if self._constraint else self._sampler.sees

    @property
    def knows_next(self) -> bool:
        """Whether the next token is known without the model: forced by the grammar or a spent
        thinking budget. Then `take(None)`; the model may read several such tokens in one pass."""
        return self.params.logprobs is None and bool(self.forced())

    def forced(self) -> list[int]:
        """The next tokens, in order, as far as the grammar or a spent thinking budget leaves no
        choice."""
        closing = self._thought.forced()
        if closing is not None:
            return [closing]
        return self._constraint.forced() if self._constraint else []

    def fitting(self, ids: list[int]) -> int:
        """How many of some guesses of the next tokens the grammar may let through."""
        return self._constraint.fitting(ids) if self._constraint and ids else len(ids)

    def prepare(self) -> None:
        """Begin to work out what the grammar allows next, in a thread beside the model's pass."""
        if self._constraint:
            self._constraint.prepare()

    def take(self, following: Next | None) -> list[Event]:
        """Choose the next token from what follows the last one; the events it completes.

        following: None where `knows_next`.

        Raises:
          WeightsError: logits are not finite.
          RequestError: the grammar leaves no token to choose.
        """
        params = self.params
        if forced := self.forced():
            token = forced[0]
        else:
            assert following is not None, "the next token is not known"
            token = self._choose(following)
        self._first_token_s = self._first_token_s or time.perf_counter() - self.started
        self.token_ids.append(token)
        if params.logprobs is not None:
            assert following is not None, "tokens whose probability is asked for are looked at"
            self._logprobs.append(token_logprob(following.logits_V, token, params.logprobs))
        self._sampler.observe(token)
        self._thought.observe(token)
        if self._constraint:
            self._constraint.accept(token)
        is_end = token in self._end_ids
        events: list[Event] = []
        if token not in self._end_ids:
            events += self._output.add(token)
        self._closed = self._output.ended or (is_end and not params.ignore_eos)
        self.ended = self._closed or len(self.token_ids) == self.max_tokens
        return events

    def take_known(self) -> list[Event]:
        """Take the tokens that are known without the model; its next pass reads all of them."""
        events: list[Event] = []
        while self.knows_next and not self.ended:
            events += self.take(None)
        return events

    def _choose(self, following: Next) -> int:
        constraint, sampler = self._constraint, self._sampler
        if constraint is None:
            return sampler.choose_next(following)
        if few := constraint.allowed_ids(FEW):
            return sampler.choose_next(following, few)
        return sampler.choose(constraint.apply(following.logits_V))

    def finish(self, cached_tokens: int) -> list[Event]:
        """The last events, `Finished` at the end. cached_tokens: of the prompt, not computed."""
        output, prompt = self._output, self.prompt
        events: list[Event] = list(output.finish(cut=not self._closed))
        reason = FinishReason.STOP if self._closed or output.cut else FinishReason.LENGTH
        if self._closed and output.num_calls:
            reason = FinishReason.TOOL_CALLS
        usage = Usage(
            prompt_tokens=len(prompt.ids),
            cached_tokens=cached_tokens,
            completion_tokens=len(self.token_ids),
            thinking_tokens=self._thought.tokens,
            image_tokens=prompt.soft_tokens("image"),
            audio_tokens=prompt.soft_tokens("audio"),
            video_tokens=prompt.soft_tokens("video"),
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            time_to_first_token_s=self._first_token_s,
            total_s=time.perf_counter() - self.started,
        )
        events.append(
            Finished(
                finish_reason=reason,
                usage=usage,
                token_ids=tuple(self.token_ids),
                logprobs=None if self.params.logprobs is None else tuple(self._logprobs),
                notes=prompt.notes(),
            )
        )
        return events


def collect(events: Iterable[Event]) -> Generation:
    """All events of a stream as one reply."""
    text, thinking = [], []
    calls, problems = [], []
    for event in events:
        match event:
            case Content():
                text.append(event.text)
            case Thinking():
                thinking.append(event.text)
            case ToolCallEvent():
                calls.append(event.call)
            case ToolProblem():
                problems.append(event.problem)
            case Finished():
                return Generation(
                    text="".join(text),
                    thinking="".join(thinking),
                    tool_calls=tuple(calls),
                    problems=tuple(problems),
                    finish_reason=event.finish_reason,
                    usage=event.usage,
                    token_ids=event.token_ids,
                    logprobs=event.logprobs,
                    notes=event.notes,
                )
    raise AssertionError("a stream ends with Finished")


class _Output:
    """Tokens of one reply to events: decoded, split (in a chat), cut at stop strings."""

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, *, chat: bool, in_thought: bool
    ) -> None:
        self._text = Detokenizer(tokenizer)
        self._splitter = Splitter(started_in_thinking=in_thought) if chat else None
        self._stops = StopStrings(params.stop)
        self.num_calls = 0

    @property
    def cut(self) -> bool:
        """A stop string is complete."""
        return self._stops.stopped

    @property
    def ended(self) -> bool:
        """Nothing more can come: cut, or an end marker came spelled out as ordinary text."""
        return self.cut or (self._splitter is not None and self._splitter.ended)

    def add(self, token: int) -> Iterator[SplitEvent]:
        text = self._text.add(token)
        return self._passed(self._splitter.feed(text) if self._splitter else [Content(text)])

    def finish(self, *, cut: bool) -> Iterator[SplitEvent]:
        """cut: see `Splitter.finish`."""
        text = self._text.flush()
        if self._splitter is None:
            yield from self._passed([Content(text)])
        else:
            yield from self._passed(self._splitter.feed(text) + self._splitter.finish(cut=cut))
        yield from self._content(self._stops.flush())

    def _passed(self, events: Iterable[SplitEvent]) -> Iterator[SplitEvent]:
        for event in events:
            if self.cut:
                return
            if isinstance(event, Content):
                yield from self._content(self._stops.add(event.text))
            else:
                # A stop string does not reach over a thought or a call.
                yield from self._content(self._stops.flush())
                self.num_calls += isinstance(event, ToolCallEvent)
                yield event

    def _content(self, text: str) -> Iterator[SplitEvent]:
        if text:
            yield Content(text)
