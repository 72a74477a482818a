"""`gemsmith demo`: what works, shown on the built-in model with checks that can fail.

Nothing is scripted: every reply is computed here, greedily, and compared with what is right; a tick
says that it was. The tour fails if the tools of its longest stop did not really fill the calendar;
that the small model errs elsewhere is shown and forgiven. What a model with towers is shown and
told are the samples of the package; their list, samples.json, says what is in them.

By default the model computes with weights of 4 bits, quantized while it is loaded.
"""

import json
import random
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.rule import Rule

from gemsmith import hardware
from gemsmith.agent import loop
from gemsmith.cli import info
from gemsmith.cli.console import short, write
from gemsmith.cli.desk import Desk, Event, make_folder
from gemsmith.cli.detect import draw
from gemsmith.cli.talk import Talker, load
from gemsmith.engine.engine import LM
from gemsmith.engine.request import Generation
from gemsmith.errors import GemsmithError
from gemsmith.evals.scoring import MIN_IOU, iou
from gemsmith.media.video import plan
from gemsmith.text.boxes import Box, Places, parse_boxes

WEATHER = {
    "type": "function",
    "function": {
        "name": "sky_report_v2",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "townName": {"description": "Name of the city", "type": "string"},
                "scale": {
                    "description": "Temperature unit",
                    "type": "string",
                    "enum": ["celsius", "fahrenheit"],
                },
            },
            "required": ["townName"],
        },
    },
}
ERRANDS: dict[str, tuple[str, ...]] = {
    "Read plans/garden.txt. Put that text as an event in my calendar on June 12 at 09:30.": (),
    "Which files are in recipes?": ("bread.txt", "cake.txt", "soup.txt"),
    "Convert 26.2 miles to km.": ("42.1648",),
    "What is on my calendar on June 12?": ("plant the olive tree",),
}
"""Each errand and what its answer must name, which only the tools can tell."""
WANTED = [Event("plant the olive tree", "June 12", "09:30")]
DESK_TOOLS = ("add_event", "list_events", "convert_units", "list_files", "read_file")
SPOKEN_TOOLS, CHORE = ("list_events", "convert_units"), "water the roses"
"""What a spoken question about the calendar may use, and what it finds there."""
SAMPLES = Path(str(resources.files("gemsmith") / "pocket" / "samples"))


class Tour:
    """The stops, in order. Each returns whether the model got it right."""

    def __init__(self, lm: LM, console: Console, quant: str | None = None) -> None:
        """quant: what the weights were quantized to while they were loaded."""
        self.lm, self.console, self.quant = lm, console, quant
        self.talker = Talker(lm, console, temperature=0, max_tokens=200)
        self.events: list[Event] = []
        """The calendar that the tools have filled."""
        self.facts: dict[str, Any] = json.loads((SAMPLES / "samples.json").read_text("utf-8"))
        """What is in each of the samples."""

    def run(self) -> bool:
        """All stops; False if the tool loop did not do its work."""
        started = time.perf_counter()
        self.introduce()
        stops: list[Callable[[], bool]] = [
            self.greeting, self.arithmetic, self.json_answer, self.needle, self.single_call,
            self.tool_loop,
        ]  # fmt: skip
        if self.lm.config.vision_config is not None:
            stops += [self.picture, self.film]
        if self.lm.config.audio_config is not None:
            stops.append(self.command)
        right: list[bool] = []
        for stop in stops:
            title = (stop.__doc__ or "").splitlines()[0]
            self.console.print(Rule(f"{len(right) + 1}. {title}", align="left"))
            try:
                right.append(stop())
            except GemsmithError as error:
                write(self.console, f"error: {error}\n", style="red")
                right.append(False)
            self.verdict(right[-1])
        seconds = time.perf_counter() - started
        self.console.print(
            Rule(f"{sum(right)} of {len(right)} right, {seconds:.0f} s", align="left")
        )
        self.costs()
        done = self.events == WANTED
        if not done:
            self.console.print("The tool loop did not do its work: the tour failed.", style="red")
        return done

    def introduce(self) -> None:
        facts = info.describe("pocket", self.lm.config)
        memory = self.lm.memory()
        made = "text, pictures and speech" if self.lm.config.vision_config else "text"
        self.console.print(Rule("gemsmith", align="left"))
        self.console.print(
            f"This is pocket, a Gemma 4 decoder of {facts['total_parameters'] / 1e6:.1f} million "
            "parameters that comes with the package. It has every part of the real E-series "
            f"models and is hundreds of times smaller: it was trained on generated {made} to speak "
            "the chat and tool format. It knows nothing of the world, and it errs."
        )
        self.console.print(info.parameter_table(facts))
        self.console.print(info.memory_table(facts))
        form = f", quantized to {self.quant} while loading" if self.quant else ""
        self.console.print(f"In memory now: {info.size(memory['weights'])} of weights{form}.")

    def costs(self) -> None:
        """How fast it was, and in how much memory."""
        usages = self.talker.usages
        spans = [(u.completion_tokens - 1, u.total_s - u.time_to_first_token_s) for u in usages]
        tokens, seconds = (sum(column) for column in zip(*spans, strict=True)) if spans else (0, 0)
        memory, peak = self.lm.memory(), hardware.peak_bytes()
        held = f"{info.size(memory['weights'])} of weights, {info.size(memory['kv'])} of K/V"
        process = f", {info.size(peak)} in the whole process at its peak" if peak else ""
        speed = f"{tokens / seconds:.0f} tokens a second" if seconds > 0 else "no tokens"
        self.console.print(
            f"Weights of {self.quant or 'floats'}: {speed}, one after the other; {held}{process}."
        )

    def ask(
        self,
        text: str,
        tools: list[dict[str, Any]] | None = None,
        *,
        beside: Sequence[dict[str, Any]] = (),
        show: str = "",
        **options: Any,
    ) -> Generation:
        """One question and the streamed reply.

        beside: content parts in front of the text. show: stands for a question too long to print.
        """
        shown = "".join(f"[{part[part['type']].name}] " for part in beside)
        write(self.console, f"> {shown}{show or text}\n", style="bold")
        talker = Talker(self.lm, self.console, **{**self.talker.options, **options})
        content = [*beside, {"type": "text", "text": text}] if beside else text
        made = talker.chat([{"role": "user", "content": content}], tools)
        self.talker.usages.append(made.usage)
        return made

    def verdict(self, right: bool) -> None:
        mark, style = ("✓ right", "green") if right else ("✗ wrong", "red")
        self.console.print(mark, style=style)

    def greeting(self) -> bool:
        """A greeting"""
        return bool(self.ask("Hello!").text.strip())

    def arithmetic(self) -> bool:
        """Arithmetic, thinking first"""
        reply = self.ask("What is 3847 + 586?", enable_thinking=True)
        return bool(reply.thinking) and str(3847 + 586) in reply.text

    def json_answer(self) -> bool:
        """An answer in JSON"""
        reply = self.ask(
            "The name is Nora. The age is 34. The city is Lisbon.\n"
            "Answer in JSON with the keys city, name and age."
        )
        try:
            return json.loads(reply.text) == {"city": "Lisbon", "name": "Nora", "age": 34}
        except ValueError:
            return False

    def needle(self) -> bool:
        """A fact far back in a long text"""
        window = self.lm.config.text_config.sliding_window
        text = long_text("The password for the harbor is velmora.", self.count, 4 * window)
        question = "What is the password for the harbor?"
        shown = f"({self.count(text)} tokens, {window} seen by a sliding layer) {question}"
        return "velmora" in self.ask(f"{text}\n{question}", show=shown).text

    def single_call(self) -> bool:
        """A tool call, for a tool whose names it has never seen"""
        reply = self.ask("What is the weather in Oslo in celsius?", [WEATHER])
        wanted = {"townName": "Oslo", "scale": "celsius"}
        calls = [(call.name, call.arguments) for call in reply.tool_calls]
        return calls == [("sky_report_v2", wanted)]

    def tool_loop(self) -> bool:
        """Tools that really run: calendar, units, files, several steps in a row"""
        with tempfile.TemporaryDirectory(prefix="gemsmith-demo-") as folder:
            make_folder(Path(folder))
            desk = Desk(Path(folder))
            self.events = desk.events
            right = [self.errand(text, named, desk) for text, named in ERRANDS.items()]
        events = ", ".join(f"{e.title!r} on {e.date} at {e.time}" for e in desk.events)
        write(self.console, f"In the calendar now: {events or 'nothing'}\n")
        return all(right) and desk.events == WANTED

    def errand(
        self,
        content: str | list[dict[str, Any]],
        named: tuple[str, ...],
        desk: Desk,
        tools: Sequence[str] = DESK_TOOLS,
        *,
        show: str = "",
    ) -> bool:
        """One errand, a conversation of its own; the answer must name what the tools alone tell."""
        write(self.console, f"> {show or content}\n", style="bold")
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        answer = ""
        for step in loop.run(self.talker, messages, desk.toolbox(tools)):
            answer = step.turn.text
            for result in step.results:
                write(self.console, f"<- {short(result)}\n", style="green")
        missing = [name for name in named if name not in answer]
        return self.told(not missing, f"the answer does not name {', '.join(missing)}")

    def picture(self) -> bool:
        """Pictures: a color, places drawn on a copy, a text to read"""
        facts, scene = self.facts["scene.png"], _part("image", "scene.png")
        right = [self.color(facts, facts[0], scene)]
        found = Places([], [], [])
        for fact in facts:
            reply = self.ask(f"Detect the {fact['color']} {fact['shape']}.", beside=[scene])
            boxes = parse_boxes(reply.text).boxes
            found.boxes.extend(boxes)
            hit = len(boxes) == 1 and iou(boxes[0], Box(*fact["box_2d"])) >= MIN_IOU
            right.append(self.told(hit, f"the box is {fact['box_2d']}"))
        if not found.boxes:
            self.console.print("No box was found: nothing is drawn.")
        else:
            self.save(draw(Image.open(SAMPLES / "scene.png").convert("RGB"), found))
        text = self.facts["text.png"]
        reply = self.ask("What does it say?", beside=[_part("image", "text.png")])
        right.append(self.told(reply.text.strip() == text, f"it says {text}"))
        return all(right)

    def film(self) -> bool:
        """A short video: frames with their times"""
        facts = self.facts["film.mp4"]
        part = _part("video", "film.mp4", frames=len(facts))
        write(self.console, f"film.mp4: {plan(part['video'], frames=len(facts))}\n", style="dim")
        # What comes last is in none of the frames before it.
        return self.color(facts, facts[-1], part)

    def command(self) -> bool:
        """A spoken command, and the tool that it calls"""
        fact = self.facts["command.wav"]
        desk = Desk(Path())  # none of the tools offered looks at files
        desk.add_event(CHORE, fact["date"], "16:00")
        shown = f"[command.wav] (a voice: {fact['said']})"
        heard = [_part("audio", "command.wav")]
        return self.errand(heard, (CHORE,), desk, SPOKEN_TOOLS, show=shown)

    def color(
        self, facts: list[dict[str, Any]], fact: dict[str, Any], part: dict[str, Any]
    ) -> bool:
        """Asks for the color of one of several shapes; the answer must name it and no other's."""
        reply = self.ask(f"What color is the {fact['shape']}?", beside=[part])
        words = set(re.findall(r"\w+", reply.text.lower()))
        named = words & {other["color"] for other in facts}
        return self.told(named == {fact["color"]}, f"it is {fact['color']}")

    def told(self, right: bool, truth: str) -> bool:
        """Says what is true where the answer was wrong."""
        if not right:
            write(self.console, f"✗ {truth}\n", style="red")
        return right

    def save(self, picture: Image.Image) -> None:
        """Keeps a picture under a name that nothing else has."""
        with tempfile.NamedTemporaryFile(
            prefix="gemsmith-demo-", suffix=".png", delete=False
        ) as file:
            picture.save(file, "PNG")
        write(self.console, f"drawn on a copy, which stays: {file.name}\n")

    def count(self, text: str) -> int:
        return len(self.lm.tokenizer.encode(text))


def long_text(fact: str, count: Callable[[str], int], tokens: int) -> str:
    """At least `tokens` tokens of idle sentences with `fact` near the beginning."""
    draw = random.Random(4)
    colors, things = (
        ["green", "old", "quiet", "tall", "warm", "round"],
        ["lamp", "river", "gate", "fox", "hill", "boat"],
    )
    sentences = [fact]
    while count(" ".join(sentences)) < tokens:
        color, thing, other = draw.choice(colors), draw.choice(things), draw.choice(things)
        sentences.append(f"The {color} {thing} stood near the {other}.")
    return " ".join(sentences)


def _part(kind: str, name: str, **options: Any) -> dict[str, Any]:
    """A sample as a content part."""
    return {"type": kind, kind: SAMPLES / name, **options}


def run(quant: str) -> bool:
    """The whole tour on the embedded model. quant: as for `LM.load`, or "none"."""
    form = None if quant == "none" else quant
    return Tour(load("pocket", quant=form), Console(highlight=False), form).run()
