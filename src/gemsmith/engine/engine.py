"""A loaded model that answers: messages or text in, typed events out, one sequence at a time.

`LM.stream` is the one path: `generate` and `complete` collect its events, so that streaming and not
streaming cannot differ. What this is not: no batching, no server, no tool is run here.

Life of a request: messages -> token ids (`text.chat`, or the checkpoint's own template) -> prefill
in chunks (`context`) -> one token at a time (`sampler`) -> text -> thinking, content, tool calls
(`text.stream`) -> stop strings (`stop`) -> events. From the sampler on it is one object, `reply`;
the loop around it is `single`. What a checkpoint gives an LM is read in `load`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from gemsmith.config import Gemma4Config
from gemsmith.engine.context import Context, kv_format
from gemsmith.engine.drafters import Mtp, Text
from gemsmith.engine.grammar import Constraint, Follow, Grammar, Grammars
from gemsmith.engine.load import load_parts
from gemsmith.engine.media import Prompt, Run, expand
from gemsmith.engine.media import collect as collect_media
from gemsmith.engine.reply import Event, Reply, collect
from gemsmith.engine.request import Generation, SamplingParams
from gemsmith.engine.single import SingleEngine
from gemsmith.engine.soft import SoftTokens
from gemsmith.engine.speculative import Speculation, check_speculation
from gemsmith.errors import MediaError, RequestError, TokenizerError
from gemsmith.media.image import check_budget
from gemsmith.model.drafter import MTPDrafter, TargetKV
from gemsmith.model.text import TextModel
from gemsmith.model.towers import Towers
from gemsmith.text import chat
from gemsmith.text.grammar import ToolChoice
from gemsmith.text.template import ChatTemplate
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.weights.fuse import same_bits_in_any_pass


class LM:
    """A model, its vocabulary, and the habits its checkpoint asks for. For one thread at a time."""

    def __init__(
        self,
        model: TextModel,
        tokenizer: Tokenizer,
        config: Gemma4Config,
        *,
        sampling: SamplingParams | None = None,
        end_ids: Iterable[int] = (),
        suppressed_ids: Iterable[int] = (),
        template: ChatTemplate | None = None,
        towers: Callable[[], Towers] | None = None,
        kv: str = "auto",
        speculation: str = "auto",
        drafter: MTPDrafter | None = None,
        name: str = "model",
    ) -> None:
        """Put loaded parts together; see `load` for checkpoints.

        sampling: what a request gets that asks for nothing else. end_ids: tokens that end a reply,
        beside the config's. template: the checkpoint's own, used instead of `text.chat`. towers:
        loads them when the first image or sound comes; None refuses these. kv, speculation: see
        `load`. drafter: the model's own, see there.

        Raises:
          TokenizerError: the vocabulary has more tokens than the model.
          ConfigError: kv or speculation is unknown, or there is no use for a drafter.
        """
        check_speculation(speculation, drafter)
        vocab_size = config.text_config.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise TokenizerError(
                f"the vocabulary has {tokenizer.vocab_size} tokens but the model {vocab_size}: "
                "they belong to different checkpoints"
            )
        self.model, self.tokenizer, self.config, self.name = model, tokenizer, config, name
        self.sampling = sampling or SamplingParams()
        """What this checkpoint samples with unless a request says otherwise."""
        special = tokenizer.special
        self.end_ids = frozenset(end_ids) | frozenset(config.eos_token_id)
        self.is_chat = template is not None or special.turn_close in self.end_ids
        """Whether the model knows the chat format; a base model only goes on with a text."""
        if self.is_chat:
            # Some checkpoints name `<eos>` alone; what follows these two is never the model's.
            marks = (special.turn_close, special.tool_response_open)
            self.end_ids |= {id for id in marks if id is not None}
        # Rows of the head without a token would come out as text that nobody can spell.
        unused = range(tokenizer.vocab_size, vocab_size)
        known = (id for id in suppressed_ids if id < vocab_size)
        self._suppressed = tuple(sorted({*known, *unused}))
        # Turns and declarations are begun by who asks: in a reply their marks would stand as text.
        foreign = (
            special.turn_open, special.tool_open, special.tool_close, special.tool_response_close,
            special.think,
        )  # fmt: skip
        never = {id for id in foreign if id is not None} if self.is_chat else set()
        self._suppressed_in_chat = tuple(sorted({*self._suppressed, *never} - self.end_ids))
        self.template = template
        """The checkpoint's own, in place of `text.chat`."""
        variant = "edge" if config.text_config.hidden_size_per_layer_input else "large"
        self._encode = template.encode if template else partial(chat.encode, variant=variant)
        self._grammars = Grammars(tokenizer)
        weight: Any = model.embed_tokens.weight
        self.device: torch.device = weight.device
        self.kv = kv_format(kv, weight.dtype, self.device)
        """How K/V are stored."""
        self.soft = SoftTokens(config.text_config, towers, self.device)
        """What stands in a prompt for images and sounds."""
        self.drafter = drafter
        """Guesses where nothing else does."""
        self.speculates = speculation != "off" and (
            speculation == "on" or drafter is not None or same_bits_in_any_pass(model)
        )
        """Whether replies are guessed ahead where that saves time."""
        ahead = self.speculation(lambda texts: texts[0].past.kv)
        self._engine = SingleEngine(model, self.kv, self.soft, ahead)

    def speculation(self, kv_of: Callable[[Sequence[Text]], TargetKV]) -> Speculation | None:
        """What guesses an engine's replies ahead; None where none are. kv_of: finds their K/V."""
        if not self.speculates:
            return None
        return Speculation(self.drafter and Mtp(self.drafter, self.model, kv_of))

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        towers: Literal["auto", "none"] = "auto",
        kv: str = "auto",
        quant: str | None = None,
        speculation: str = "auto",
        drafter: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        revision: str | None = None,
        offline: bool | None = None,
    ) -> Self:
        """Read a checkpoint: a folder, a hub id, or "pocket" (embedded, no network).

        device: "auto" is CUDA where there is a device, otherwise "cpu". dtype: "auto" is the
        checkpoint's own; "float32" or "bfloat16" convert. towers: "auto" reads those for images
        and sound when the first one comes; "none" never does. kv: how keys and values are stored,
        "float32", "bfloat16" or "int8" (a scale a token and head); "auto" is int8 on the CPU and
        the model's dtype elsewhere.

        quant: "int8", "int4" or "int2" quantizes a checkpoint of floats while it is read, to what
        `gemsmith quantize --bits` would write; a large model takes minutes the first time, and is
        then kept in the user's cache folder (on the CPU).
        speculation: "on" guesses replies ahead from the text before them, and lets the model verify
        several tokens in one pass where measured times say that this is faster; see
        `engine.speculative`. "auto" does so where replies stay the same to the bit, with low-bit
        weights on the CPU, or where a drafter is given; "off" never does.
        drafter: folder or hub id of the small model published beside this one (its name ends in
        -assistant), to guess where the text before has nothing alike.
        progress: told after each piece how many values are quantized, of how many.

        Raises:
          HubError, ConfigError, WeightsError, TokenizerError: see there.
        """
        parts = load_parts(
            name,
            device=device,
            dtype=dtype,
            towers=towers,
            kv=kv,
            quant=quant,
            speculation=speculation,
            drafter=drafter,
            progress=progress,
            revision=revision,
            offline=offline,
        )
        return cls(**parts)

    # -- asking -------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[chat.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        constrained: bool = True,
        enable_thinking: bool = False,
        preserve_thinking: bool = False,
        image_budget: int | str | None = None,
        sampling: SamplingParams | None = None,
        **options: object,
    ) -> Generation:
        """The whole reply to a conversation, or to one user message given as text.

        Images, sounds and videos are content parts, see `engine.media`. image_budget: soft tokens
        an image may cost (70, 140, 280, 560, 1120, or "auto"), where its part says nothing else; by
        default what the checkpoint's config says.

        tools: what the model may call, in OpenAI's shape; a call always fits its tool's schema.
        tool_choice: "auto", "required" (at least one call), "none", or the name of the tool that
        must be called. parallel_tool_calls: whether one reply may hold several. response_format:
        the form of the answer, such as {"type": "json_schema", "json_schema": {"schema": ...}}; see
        `text.grammar.response_grammar`. Thoughts are free of it. constrained: False lets the model
        write calls as it likes, to measure what it can do by itself.

        sampling: all sampling parameters, in place of `self.sampling`. options: single ones, by
        their `SamplingParams` names; `temperature=0` gives the likeliest reply. A base model goes
        on with the text.

        Raises:
          RequestError: an empty prompt, one longer than the context, bad messages or parameters;
            MediaError if it is a picture, sound or video; ToolError if it is a tool, or its schema
            is one that no call can be held to.
          CapacityError: no memory for its K/V.
        """
        return collect(
            self.stream(
                prompt,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                response_format=response_format,
                constrained=constrained,
                enable_thinking=enable_thinking,
                preserve_thinking=preserve_thinking,
                image_budget=image_budget,
                sampling=sampling,
                **options,
            )
        )

    def stream(
        self,
        prompt: str | Sequence[chat.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        constrained: bool = True,
        enable_thinking: bool = False,
        preserve_thinking: bool = False,
        image_budget: int | str | None = None,
        sampling: SamplingParams | None = None,
        **options: object,
    ) -> Iterator[Event]:
        """The reply as events while it is made; the last is `Finished`. Otherwise as `generate`.

        A request that cannot be served raises here, not at the first event. The iterator may be
        dropped at any point, and Ctrl-C may strike in it: the next request starts clean.
        """
        params = (sampling or self.sampling).changed(**options)
        if not constrained and (tool_choice not in ("auto", "none") or response_format is not None):
            raise RequestError(
                "constrained=False leaves the reply to the model, but tool_choice or "
                "response_format asks for a form; leave out one of them"
            )
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError(
                    "the prompt is empty: write something, or call complete('') to let the model "
                    "begin on its own"
                )
            if not (self.is_chat or tools or enable_thinking):
                raw = self.encode_text(prompt, markers=False)
                follow = self.follow(response_format=response_format)
                return self._start(raw, params, chat=False, follow=follow)
            prompt = [{"role": "user", "content": prompt}]
        encoded = self.encode(
            prompt,
            tools=tools,
            enable_thinking=enable_thinking,
            preserve_thinking=preserve_thinking,
            image_budget=image_budget,
        )
        follow = None
        if constrained:
            follow = self.follow(
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                response_format=response_format,
                enable_thinking=enable_thinking,
            )
        return self._start(encoded, params, chat=True, follow=follow)

    def encode(
        self,
        messages: Sequence[chat.Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        preserve_thinking: bool = False,
        image_budget: int | str | None = None,
        reply_follows: bool = True,
        media: list[list[Run]] | None = None,
    ) -> Prompt:
        """What the model reads of a conversation: token ids, and what the soft ones stand for.

        reply_follows: end where the model is to go on; otherwise after the last message.
        media: of the messages, as `read_media` gives them; None reads them here.

        Raises:
          RequestError: as `generate`, but for the length of the prompt.
        """
        if not self.is_chat:
            raise RequestError(
                f"{self.name} is a base model: it knows no messages, tools or thinking. Give plain "
                "text, or load the instruction-tuned checkpoint (its name ends in -it)"
            )
        if not messages:
            raise RequestError(
                "no messages: give at least one, such as {'role': 'user', 'content': 'Hello'}"
            )
        ids = self._encode(
            messages,
            tools,
            self.tokenizer,
            enable_thinking=enable_thinking,
            preserve_thinking=preserve_thinking,
            add_generation_prompt=reply_follows,
        )
        if media is None:
            media = self.read_media(messages, image_budget=image_budget)
        return expand(ids, media, self.config, self.tokenizer)

    def read_media(
        self, messages: Sequence[chat.Message], *, image_budget: int | str | None = None
    ) -> list[list[Run]]:
        """The images, sounds and videos of a conversation, decoded: most of what `encode` does.

        It needs neither tokenizer nor template, so it may run beside another `encode`.

        Raises:
          RequestError: as `generate`.
        """
        if image_budget not in (None, "auto"):
            check_budget(image_budget)
        media = collect_media(messages, self.config, image_budget=image_budget)
        if media and self.soft.load_towers is None:
            raise MediaError(
                f"{self.name} was loaded without its image and audio towers; load it again with "
                "towers='auto' to use images, sound or video"
            )
        return media

    def encode_text(self, text: str, *, markers: bool = True) -> Prompt:
        """What `complete` reads of a text, with `<bos>` in front unless it is there.

        markers: whether those written in it become their tokens; otherwise they are plain text.
        """
        bos = self.tokenizer.special.bos
        ids = self.tokenizer.encode_parts([(text, markers)])
        return Prompt(ids if bos is None or ids[:1] == [bos] else [bos, *ids])

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        **options: object,
    ) -> Generation:
        """Go on with a text as it is, without any chat format: base models, experiments.

        Markers written in the text become their tokens. `<bos>` is put in front unless it is
        there, so "" is a valid start: the model begins on its own. Token ids are taken as given.
        The text of the reply shows every marker.

        Raises: as `generate`.
        """
        params = (sampling or self.sampling).changed(**options)
        read = self.encode_text(prompt) if isinstance(prompt, str) else Prompt(list(prompt))
        return collect(self._start(read, params, chat=False))

    def choose(self, prompt: str | Sequence[chat.Message], choices: Sequence[str]) -> str:
        """The one of some texts that the model replies with when it may say nothing else.

        Tokens are chosen one at a time, the likeliest of those with which some choice goes on (or
        ends); nothing is computed where there is but one. For a classifier or a router this costs
        less than a reply: of the model's head only the rows of such tokens are read.

        Raises:
          RequestError: no choices, two alike, or an empty one; otherwise as `generate`.
        """
        texts = not isinstance(choices, str) and all(isinstance(c, str) and c for c in choices)
        if not choices or not texts or len(set(choices)) < len(choices):
            raise RequestError(
                f"choices {choices!r}: give a list of one text or more, none of them empty or twice"
            )
        if isinstance(prompt, str) and self.is_chat:
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            encoded = self.encode_text(prompt, markers=False)
        else:
            encoded = self.encode(prompt)
        turn_close = self.tokenizer.special.turn_close
        end = turn_close if turn_close in self.end_ids else min(self.end_ids)
        replies: dict[tuple[int, ...], str] = {
            (*self.tokenizer.encode(text), end): text for text in choices
        }
        longest = max(map(len, replies))
        limit = self.config.text_config.max_position_embeddings
        if len(encoded.ids) + longest > limit:
            raise RequestError(
                f"the prompt has {len(encoded.ids)} tokens and the longest choice {longest - 1}, "
                f"but the model's context holds {limit}; shorten them"
            )
        self._check_ids(encoded.ids)
        return replies[self._engine.choose(encoded, list(replies))]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after each of the given tokens, float32 [T, V], on the model's device.

        Raises:
          RequestError: no tokens, more than the context, or ids outside the vocabulary.
        """
        return torch.cat(list(self.scan(Prompt(list(token_ids)))))

    def scan(self, prompt: Prompt, *, block: int = 512) -> Iterator[Tensor]:
        """As `logits`, in blocks float32 [<= block, V], so that long prompts need little memory.

        prompt: as `encode` makes it.
        """
        self._check_ids(prompt.ids)
        return Context(self.model, self.kv).scan(
            prompt.ids,
            block=block,
            keys=prompt.keys(),
            soft=self.soft.rows(prompt, 0),
            blocks_T=self.soft.blocks(prompt, 0),
        )

    def memory(self) -> dict[str, int]:
        """Bytes held: `weights` in memory, `kv` of the last request, kept for the next."""
        modules = [m for m in (self.model, self.soft.loaded, self.drafter) if m is not None]
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        kept = self._engine.kept
        return {
            "weights": sum(t.nbytes for t in tensors),
            "kv": kept.nbytes if kept else 0,
        }

    # -- the reply ----------------------------------------------------------------------------

    def follow(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | None = None,
        enable_thinking: bool = False,
    ) -> Follow | None:
        """What holds a reply to tools and form, arguments as in `generate`; None: it is free.

        Raises: as `generate`.
        """
        grammar = self._grammars.get(
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            response_format=response_format,
        )
        return grammar and partial(self._constraint, grammar, enable_thinking)

    def _constraint(self, grammar: Grammar, enable_thinking: bool, in_thought: bool) -> Constraint:
        return Constraint(
            grammar,
            vocab_size=self.config.text_config.vocab_size,
            end_ids=self.end_ids,
            enable_thinking=enable_thinking,
            in_thought=in_thought,
            device=self.device,
        )

    def _start(
        self, prompt: Prompt, params: SamplingParams, *, chat: bool, follow: Follow | None = None
    ) -> Iterator[Event]:
        return self._engine.run(self.reply(prompt, params, chat=chat, follow=follow))

    def reply(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        chat: bool = True,
        max_model_len: int | None = None,
        follow: Follow | None = None,
    ) -> Reply:
        """The beginning of an answer to a prompt, to be fed with what follows.

        follow: makes what holds the reply to a grammar, told whether it begins in a thought.
        max_model_len: most tokens of prompt and reply, where that is less than the model's context.

        Raises:
          RequestError: no prompt, one that leaves no room for a reply, or ids outside the
            vocabulary.
        """
        ids, limit = prompt.ids, self.config.text_config.max_position_embeddings
        limit = min(limit, max_model_len or limit)
        if len(ids) >= limit:
            whose = "a sequence here" if limit == max_model_len else "the model's context"
            soft = f", {sum(s.run.tokens for s in prompt.spans)} of them for media" * bool(
                prompt.spans
            )
            raise RequestError(
                f"the prompt has {len(ids)} tokens{soft}, but {whose} holds {limit} and "
                "the reply needs room in it; shorten the prompt or drop old messages"
            )
        self._check_ids(ids)
        return Reply(
            prompt,
            params,
            self.tokenizer,
            vocab_size=self.config.text_config.vocab_size,
            max_tokens=min(params.max_tokens or limit, limit - len(ids)),
            end_ids=self.end_ids,
            suppressed=self._suppressed_in_chat if chat else self._suppressed,
            device=self.device,
            chat=chat,
            follow=follow,
        )

    def _check_ids(self, ids: list[int]) -> None:
        text = self.config.text_config
        if not ids:
            raise RequestError("no token ids: give at least one, such as that of <bos>")
        # As a whole first: of a long prompt a look at each takes a while.
        right = {*map(type, ids)} == {int} and 0 <= min(ids) <= max(ids) < text.vocab_size
        for id in () if right else ids:
            if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < text.vocab_size:
                raise RequestError(
                    f"token id {id!r}: must be a whole number from 0 to {text.vocab_size - 1}"
                )
        if len(ids) > text.max_position_embeddings:
            raise RequestError(
                f"{len(ids)} token ids, but the model's context holds "
                f"{text.max_position_embeddings}; give fewer, in pieces"
            )
