"""Show replies while they are written, and hand them on: the model as `agent.loop` wants it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

import gemsmith
from gemsmith.cli.console import spell, write
from gemsmith.engine.engine import LM
from gemsmith.engine.reply import Event, collect
from gemsmith.engine.request import Finished, FinishReason, Generation, Usage
from gemsmith.ops import native
from gemsmith.text.stream import Content, Thinking, ToolCallEvent, ToolProblem

SMALL_BYTES = 64 << 20
"""Weights below this: torch's operations are too little work for two threads to share."""


def load(name: str, *, quant: str | None = None, **options: Any) -> LM:
    """`gemsmith.load` with a bar while it quantizes, and one thread of torch for a small model.

    Pocket's tour beside another busy process took 8 s on one of them, 128 s on two.
    """
    asides = Console(stderr=True)
    with Progress(console=asides, transient=True, disable=not asides.is_terminal) as bar:
        task = bar.add_task(f"quantizing to {quant}", total=None, visible=quant is not None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        lm = gemsmith.load(name, quant=quant, progress=progress, **options)
    if lm.memory()["weights"] < SMALL_BYTES:
        native.leave_torch_one_thread()
    return lm


class Talker:
    """A model whose replies appear as they come.

    answers: where text and calls go. asides: where thoughts and problems go.
    """

    def __init__(
        self, lm: LM, answers: Console, asides: Console | None = None, **options: Any
    ) -> None:
        self.lm, self.answers, self.asides = lm, answers, asides or answers
        self.options = options
        """What every request asks for: enable_thinking and sampling parameters."""
        self.written = ""
        """The answer's text so far, also of a reply that was cut off."""
        self.usages: list[Usage] = []
        """What each reply cost."""

    def chat(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> Generation:
        """One reply, shown while it is written; raises as `LM.stream`."""
        self.written = ""
        return self.show(self.lm.stream(messages, tools=tools or None, **self.options))

    def show(self, events: Iterable[Event]) -> Generation:
        """A reply already asked for."""
        made = collect(self._shown(events))
        self.usages.append(made.usage)
        return made

    def _shown(self, events: Iterable[Event]) -> Iterator[Event]:
        last: type[Event] | None = None
        for event in events:
            if last in (Content, Thinking) and not isinstance(event, last):
                (self.answers if last is Content else self.asides).print()
            match event:
                case Content():
                    self.written += event.text
                    write(self.answers, event.text)
                case Thinking():
                    write(self.asides, event.text, style="dim italic")
                case ToolCallEvent():
                    write(self.answers, f"-> {spell(event.call)}\n", style="cyan")
                case ToolProblem():
                    text = f"unreadable tool call: {event.problem.message}: {event.problem.raw}\n"
                    write(self.asides, text, style="red")
                case Finished():
                    for note in event.notes:
                        write(self.asides, f"note: {note}\n", style="red")
                    if event.finish_reason is FinishReason.LENGTH:
                        write(self.asides, "(cut off: no more tokens allowed)\n", style="dim")
            last = type(event)
            yield event
