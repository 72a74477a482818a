"""Which tokens a reply may go on with: calls that fit their schemas, answers that fit a format.

A `Grammar` is what a request asks for, compiled; a `Constraint` follows one reply under it. Text
and thoughts are free, but for what would be lost: an end before anything was said, a marker out of
place, a marker spelled out in ordinary letters. From `<|tool_call>` to `<tool_call|>` and in an
answer of a given format llguidance says what may come. Where it leaves no choice about the text,
the tokens are those the vocabulary has for it: `forced`. They are part of the rule, not a guess,
so an engine may run them in one pass or one by one and gets the same reply. What this is not: it
compiles no schema (see text.grammar) and chooses no token (see `sampler`).

Shapes: V tokens of the model, some of which the vocabulary may not have.
"""

import json
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from gemsmith.errors import RequestError, ToolError
from gemsmith.text.grammar import ToolChoice, call_grammar, chosen_tools, response_grammar
from gemsmith.text.lark import matcher, reason
from gemsmith.text.stream import MARKERS
from gemsmith.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")

SLICES = (r'[^<"\\\x00-\x1f\x7f]{1,12}', r'[^<"\\\x00-\x1f\x7f]+')
"""Tokens that are let through together where the text between quotes is free."""
THREADED = 65_536
"""Tokens from which on a mask (1 to 5 ms for 262,144) and reading the vocabulary (a second) are
worth a thread of their own; llguidance lets go of Python's lock."""
KEPT = 32
"""Compiled grammars kept for requests that ask the same again."""


# -- the vocabulary ---------------------------------------------------------------------------


class _Wrapped:
    """A tokenizer as `llguidance.TokenizerWrapper` takes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = special.eos if special.eos is not None else special.turn_close or 0
        self.bos_token_id = special.bos
        self.special_token_ids = sorted(tokenizer.special_ids())
        # A marker's letters are no text: the grammar knows it by its id alone.
        self.tokens = [tokenizer.piece(id) for id in ids]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode_parts([(text, False)])


class Vocabulary:
    """What llguidance and `Constraint` need of a tokenizer; `of` builds it once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        wrapped = _Wrapped(tokenizer)
        self.size, self.eos = tokenizer.vocab_size, wrapped.eos_token_id
        self._core = _beside(self.size, lambda: _build(wrapped, tokenizer.vocab_size))
        special = tokenizer.special_ids()
        self._closers = [
            (id, piece)
            for id, piece in enumerate(wrapped.tokens)
            if b">" in piece and id not in special
        ]
        self._known: dict[bytes, tuple[int, ...]] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        with _building:
            found = _built.get(tokenizer)
            if found is None:
                found = _built[tokenizer] = cls(tokenizer)
            return found

    @property
    def core(self) -> "LLTokenizer":
        return self._core.result()

    @property
    def is_built(self) -> bool:
        """Whether `core` is there without waiting for it."""
        return self._core.done()

    def spelling(self, tail: bytes) -> tuple[int, ...]:
        """Ids whose letters would, after `tail`, complete a marker that is no marker."""
        found: list[int] = []
        for marker in _SPELLED if b"<" in tail else ():
            for length in range(len(marker) - 1, 0, -1):
                if tail.endswith(marker[:length]):
                    found += self._beginning(marker[length:])
        return tuple(found) + self._beginning(b"")

    def _beginning(self, rest: bytes) -> tuple[int, ...]:
        """Ids that begin with the rest of a marker; for no rest, those that hold a whole one."""
        if rest not in self._known:
            self._known[rest] = tuple(
                id
                for id, piece in self._closers
                if (piece.startswith(rest) if rest else any(m in piece for m in _SPELLED))
            )
        return self._known[rest]


def _build(wrapped: _Wrapped, size: int) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(wrapped), n_vocab=size, slices=list(SLICES))


_built: weakref.WeakKeyDictionary[Tokenizer, Vocabulary] = weakref.WeakKeyDictionary()
_building = Lock()

_SPELLED = tuple(marker.encode() for marker in MARKERS)
"""Markers that the splitter of a reply would read in ordinary text too."""
_LONGEST = max(map(len, _SPELLED))


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="gemsmith-grammar")


def _beside(size: int, work: Callable[[], T]) -> "Future[T]":
    """The result of `work`, made by a thread beside the model where the vocabulary is large."""
    if size >= THREADED and (os.cpu_count() or 1) > 1:
        return _thread().submit(work)
    done: Future[T] = Future()
    done.set_result(work())
    return done


# -- what a request asks for ------------------------------------------------------------------


class Grammar:
    """Tools that may or must be called, and the form of the answer; for any number of replies."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
    ) -> None:
        """Compile; nothing of it depends on a conversation.

        Raises:
          ToolError: a tool's schema cannot be held to, or the choice is unknown.
          RequestError: the response format cannot be held to.
        """
        allowed, self.must_call = chosen_tools(tools, tool_choice)
        self.parallel = parallel_tool_calls
        self.tokenizer, self.vocabulary = tokenizer, Vocabulary.of(tokenizer)
        special = tokenizer.special
        if allowed and None in (special.quote, special.tool_call_open, special.tool_call_close):
            raise ToolError(
                "this checkpoint's vocabulary has no tool call markers; ask without tools, or load "
                "an instruction-tuned Gemma 4"
            )
        self.may_call = bool(allowed)
        self._calls: Future[LLMatcher] | None = None
        self.answer: LLMatcher | None = None
        if allowed:
            text = call_grammar(allowed, special)
            # The first request goes on while the vocabulary is read: its schemas were tried above.
            size = 0 if self.vocabulary.is_built else self.vocabulary.size
            self._calls = _beside(size, lambda: self._matcher(text, "the tools", ToolError))
        if grammar := response_grammar(response_format):
            kind = f"response_format {(response_format or {}).get('type')}"
            self.answer = self._matcher(grammar, kind, RequestError)

    def call(self) -> "LLMatcher":
        """What follows one call."""
        assert self._calls is not None
        return self._calls.result().deep_copy()

    def _matcher(self, grammar: str, what: str, error: type[RequestError]) -> "LLMatcher":
        made = matcher(self.vocabulary.core, grammar)
        if not made.is_error():
            made.compute_bitmask()
        if made.is_error() or (made.is_stopped() and not made.is_accepting()):
            raise error(
                f"{what} cannot be held to: {reason(made)}; ask for less, or simpler, at once"
            )
        return made


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the latest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = Lock()

    def get(self, **asked: Any) -> Grammar | None:
        """The grammar of a request, arguments as `Grammar`; None where nothing is asked for.

        Raises: as `Grammar`.
        """
        wanted = asked.get("response_format")
        free = wanted is None or (isinstance(wanted, Mapping) and wanted.get("type") == "text")
        if not asked.get("tools") and free and asked.get("tool_choice", "auto") in ("auto", "none"):
            return None
        try:
            key = json.dumps(asked)
        except (TypeError, ValueError, RecursionError):
            return Grammar(self._tokenizer, **asked)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = Grammar(self._tokenizer, **asked)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made


# -- one reply --------------------------------------------------------------------------------

_State = Literal["thought", "text", "call", "called", "answer", "ended"]


class Constraint:
    """Follows one reply. Tell it each token (`accept`), ask it what may come next.

    enable_thinking: the prompt asks for a thought. in_thought: the prompt ends inside one.
    end_ids: tokens that end a reply. vocab_size: V.
    """

    def __init__(
        self,
        grammar: Grammar,
        *,
        vocab_size: int,
        end_ids: Iterable[int],
        enable_thinking: bool = False,
        in_thought: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.grammar, self._vocabulary = grammar, grammar.vocabulary
        self._special = special = grammar.tokenizer.special
        self._vocab_size, self._device = vocab_size, device
        self._ends = frozenset(end_ids)
        marks = (special.channel_open, special.channel_close, special.tool_call_open)
        self._open, self._close, self._call = (-1 if mark is None else mark for mark in marks)
        call_end = special.tool_response_open
        self._turn_ends = self._ends - {call_end}
        self._call_ends = frozenset({call_end}) if call_end in self._ends else self._turn_ends
        strict = grammar.must_call or grammar.answer is not None
        self._may_think = enable_thinking or not strict
        self._state: _State = "thought" if in_thought else "text"
        self._matcher: LLMatcher | None = None
        self._bits: Future[bytes] | None = None
        self._forced: list[int] = []
        self._tail = b""
        self._said = False
        """Whether the answer has begun to show."""
        self._look_ahead()

    # What may come next.

    def forced(self) -> list[int]:
        """The tokens that must come next, in order; empty where there is a choice."""
        return list(self._forced)

    def fitting(self, ids: Sequence[int]) -> int:
        """How many of these tokens could come one after the other, as far as llguidance alone can
        tell; where it does not rule, all."""
        if self._state not in ("call", "answer") or self._matcher is None:
            return len(ids)
        if self._bits is not None:
            self._bits.result()  # as in `accept`
        known = next((n for n, id in enumerate(ids) if id >= self._vocabulary.size), len(ids))
        return self._matcher.validate_tokens(list(ids[:known]))

    def allowed_mask(self) -> Tensor | None:
        """Bool [V], True where a token may come next; None where any may."""
        only, never = self._rule()
        if only is None and not never:
            return None
        mask_V = torch.full((self._vocab_size,), only is None)
        if isinstance(only, bytes):
            bits = np.unpackbits(np.frombuffer(only, np.uint8), bitorder="little")
            count = min(len(bits), self._vocabulary.size)
            mask_V[:count] = torch.from_numpy(bits[:count].view(np.bool_))
        elif only is not None:
            mask_V[list(only)] = True
        if never:
            mask_V[list(never)] = False
        return mask_V.to(self._device)

    def allowed_ids(self, most: int) -> list[int] | None:
        """The tokens that may come next, ascending; None if they are more than `most`.

        For a head that computes the logits of these alone.
        """
        only, never = self._rule()
        if isinstance(only, bytes):
            if sum(map(int.bit_count, only)) - len(never) > most:
                return None
            bits = np.unpackbits(np.frombuffer(only, np.uint8), bitorder="little")
            only = frozenset(np.flatnonzero(bits[: self._vocabulary.size]).tolist())
        ids = None if only is None else sorted(only - never)
        return None if ids is None or len(ids) > most else ids

    def apply(self, logits_V: Tensor) -> Tensor:
        """The logits with -inf where a token may not come; the tensor itself where any may.

        Raises:
          RequestError: no token may come: a response format that demands the format's own markers.
        """
        only, never = self._rule()
        if only is None:
            if not never:
                return logits_V
            index = torch.tensor(sorted(never), device=logits_V.device)
            return logits_V.index_fill(0, index, float("-inf"))
        mask_V = self.allowed_mask()
        assert mask_V is not None
        if not mask_V.any():
            raise RequestError(
                "response_format: the text so far can only go on with a marker of the chat format, "
                f"such as {self._tail.decode(errors='replace')!r} begins; ask for another text"
            )
        return logits_V.masked_fill(~mask_V, float("-inf"))

    def _rule(self) -> tuple[bytes | frozenset[int] | None, frozenset[int]]:
        """What alone may come (bits, ids, or None for anything) and what of that may not."""
        if self._forced:
            return frozenset(self._forced[:1]), frozenset()
        special = self._special
        may_call = frozenset({self._call} if self.grammar.may_call else ()) - {-1}
        spelled = frozenset(self._vocabulary.spelling(self._tail))
        match self._state:
            case "ended":
                return None, frozenset()
            case "call":
                return self._computed(), frozenset()
            case "called":
                return self._call_ends | (may_call if self.grammar.parallel else frozenset()), (
                    frozenset()
                )
            case "answer":
                bits = self._computed()
                assert self._matcher is not None
                if self._matcher.is_accepting():
                    bits = _with(bits, self._turn_ends)
                return bits, spelled
        never = {special.tool_call_close, *self._ends}
        if self._state == "thought":
            never |= {self._open} | ({self._call} - may_call)
            return None, frozenset(never - {None, -1}) | spelled
        may_think = frozenset({self._open} if self._thinkable else ()) - {-1}
        if self.grammar.must_call:
            return may_call | may_think, frozenset()
        if self.grammar.answer is not None:
            bits = _with(self._computed(), may_call | may_think)
            return bits, spelled
        never |= {self._close, *({self._open} - may_think), *({self._call} - may_call)}
        never -= self._turn_ends if self._said else set()
        return None, frozenset(never - {None, -1}) | spelled

    @property
    def _thinkable(self) -> bool:
        return self._may_think and not self._said

    def _computed(self) -> bytes:
        """The bits of the grammar's mask; ends are not for it to give."""
        if self._bits is None:
            self.prepare()
        assert self._bits is not None
        assert self._matcher is not None
        bits = self._bits.result()
        if self._matcher.is_error():
            raise RequestError(
                "the grammar of this request is too complex to follow: "
                f"{reason(self._matcher)}; use a simpler schema or response format"
            )
        return _without(bits, {*self._ends, self._vocabulary.eos})

    def prepare(self) -> None:
        """Begin to compute the next mask; worth a call before the model runs."""
        if self._matcher is None or self._bits is not None or self._forced:
            return
        self._bits = _beside(self._vocabulary.size, self._matcher.compute_bitmask)

    # What has come.

    def accept(self, token_id: int) -> None:
        """Follow one token of the reply, chosen or forced."""
        if self._state == "ended":
            return
        if self._bits is not None:
            self._bits.result()  # the matcher is not to change under a thread's hands
            self._bits = None
        known = bool(self._forced) and self._forced[0] == token_id
        self._forced = self._forced[1:] if known else []
        if self._state == "call":
            self._feed(token_id)
            if token_id == self._special.tool_call_close:
                self._state, self._matcher, self._said = "called", None, True
        elif token_id in self._ends:
            self._state, self._matcher = "ended", None
        elif self._state == "answer":
            self._feed(token_id)
            self._remember(token_id)
        elif token_id == self._open and self._state == "text":
            self._state, self._matcher, self._tail = "thought", None, b""
        elif token_id == self._close and self._state == "thought":
            self._state, self._tail, self._may_think = "text", b"", False
        elif token_id == self._call and self.grammar.may_call:
            self._state, self._tail = "call", b""
            self._matcher = self.grammar.call()
        else:
            self._remember(token_id)
            if self._state == "text":
                self._said = self._said or bool(self._piece(token_id).strip())
                if self.grammar.answer is not None and self._matcher is not None:
                    self._state, self._said = "answer", True
                    self._feed(token_id)
        if not self._forced:
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Find what is forced, and the grammar that the next token falls under."""
        if self._state == "text" and self.grammar.answer is not None and self._matcher is None:
            self._matcher = self.grammar.answer.deep_copy()
        if self._state in ("call", "answer") and self._matcher is not None:
            self._forced = self._matcher.compute_ff_tokens()
            if self._state == "answer" and not self._speakable(self._forced):
                self._forced = []
            return
        if self._state in ("text", "called"):
            only, never = self._rule() if self._matcher is None else (None, frozenset())
            if isinstance(only, frozenset) and len(only - never) == 1:
                self._forced = list(only - never)

    def _feed(self, token_id: int) -> None:
        assert self._matcher is not None
        if not self._matcher.consume_token(token_id):
            raise RequestError(
                f"token {token_id} cannot be followed in the grammar of this request: "
                f"{reason(self._matcher)}; use a simpler schema or response format"
            )

    def _speakable(self, ids: list[int]) -> bool:
        """Whether forced text spells no marker and ends nothing."""
        text = self._tail + b"".join(map(self._piece, ids))
        return not any(marker in text for marker in _SPELLED) and not self._ends.intersection(ids)

    def _remember(self, token_id: int) -> None:
        self._tail = (self._tail + self._piece(token_id))[-_LONGEST:]

    def _piece(self, token_id: int) -> bytes:
        known = token_id < self._vocabulary.size
        return self.grammar.tokenizer.piece(token_id) if known else b""


def _with(bits: bytes, ids: Iterable[int]) -> bytes:
    """A mask with the bits of `ids` set."""
    changed = bytearray(bits)
    for id in ids:
        if id // 8 < len(changed):
            changed[id // 8] |= 1 << id % 8
    return bytes(changed)


def _without(bits: bytes, ids: Iterable[int]) -> bytes:
    """A mask with the bits of `ids` cleared."""
    changed = bytearray(bits)
    for id in ids:
        if id // 8 < len(changed):
            changed[id // 8] &= ~(1 << id % 8)
    return bytes(changed)


Follow: TypeAlias = Callable[[bool], Constraint]
"""Makes what holds one reply to a grammar, told whether it begins in a thought."""
