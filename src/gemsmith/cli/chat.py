"""`gemsmith chat`: a conversation at the terminal.

A line that begins with / is for the session, everything else for the model. A picture, sound or
video goes along where its path stands in the line, as dragging it onto the window types it.
Ctrl-C stops a reply and keeps the session, Ctrl-D leaves it.
"""

import contextlib
import json
import os
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gemsmith.agent import loop
from gemsmith.agent.tools import Toolbox
from gemsmith.cli.console import short, write
from gemsmith.cli.desk import Desk, make_folder
from gemsmith.cli.generate import show_plans
from gemsmith.cli.prompt import with_dropped_files
from gemsmith.cli.talk import Talker, load
from gemsmith.errors import GemsmithError, RequestError
from gemsmith.media.source import Named

if TYPE_CHECKING:  # the video library alone takes a while
    from gemsmith.media.video import Survey

HELP = """\
/think on|off   let the model think before it answers
/tools on|off   a calendar, a unit converter, files of a small folder, a clock
/system [TEXT]  show or set the system message; TEXT of - removes it
/reset          forget the conversation, keep the settings
/save FILE      write the conversation as JSON
FILE            a picture, sound or video in the line is shown to the model
/help           this list
/quit           leave (Ctrl-D too); Ctrl-C stops a reply"""
MAX_KEPT_BYTES = 256 << 20
"""Of a file that a talk keeps; a longer film is read anew on every turn, and must stay there."""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]


class Session:
    """One conversation and its settings."""

    def __init__(self, talker: Talker, toolbox: Toolbox, *, system: str | None = None) -> None:
        self.talker, self.console = talker, talker.answers
        self.toolbox, self.no_tools = toolbox, Toolbox(())
        self.tools_on = False
        self.system = system
        self.messages: list[dict[str, Any]] = []

    def answer(self, text: str) -> None:
        """Ask the model; a reply stopped by Ctrl-C stays as far as it got."""
        kept = len(self.messages)
        self.messages.append({"role": "user", "content": _read_now(with_dropped_files(text))})
        head = [{"role": "system", "content": self.system}] if self.system else []
        conversation = [*head, *self.messages]
        replied = len(conversation)
        self.talker.written = ""
        try:
            show_plans(self.messages[-1:], self.talker.lm, self.talker.asides)
            for step in loop.run(self.talker, conversation, self.tools):
                for result in step.results:
                    write(self.console, f"<- {short(result)}\n", style="green")
                replied = len(conversation)
        except KeyboardInterrupt:
            write(self.console, "\n(stopped)\n", style="dim")
            if len(conversation) == replied and self.talker.written.strip():
                conversation.append({"role": "assistant", "content": self.talker.written})
        except GemsmithError as error:
            write(self.console, f"error: {error}\n", style="red")
        self.messages = conversation[len(head) :]
        if len(self.messages) == kept + 1:
            self.messages.pop()  # a question without any reply would stand beside the next one

    @property
    def tools(self) -> Toolbox:
        return self.toolbox if self.tools_on else self.no_tools

    def command(self, line: str) -> bool:
        """Run a /command; False to leave.

        Raises:
          RequestError: no such command, or a value it does not take.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/quit":
                return False
            case "/help":
                write(self.console, HELP + "\n")
            case "/think":
                self.talker.options["enable_thinking"] = _switch(name, value)
            case "/tools":
                self.tools_on = _switch(name, value)
            case "/system" if value:
                self.system = None if value == "-" else value
            case "/system":
                write(self.console, f"{self.system or '(no system message)'}\n")
            case "/reset":
                self.messages = []
                write(self.console, "(forgotten)\n", style="dim")
            case "/save":
                self.save(value)
            case _:
                near = get_close_matches(name, COMMANDS, n=1)
                hint = f"did you mean {near[0]}?" if near else "/help lists them"
                raise RequestError(f"no command {name}; {hint}")
        return True

    def save(self, path: str) -> None:
        """Write the conversation to a new file, media as their paths.

        Raises:
          RequestError: no name, or a file that cannot be made.
        """
        if not path:
            raise RequestError("/save needs a file name, such as /save talk.json")
        head = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                talk = [*head, *self.messages]
                json.dump(talk, file, ensure_ascii=False, indent=2, default=_path)
        except FileExistsError:
            raise RequestError(f"{path} exists already; choose another name") from None
        except (OSError, ValueError) as error:
            raise RequestError(f"cannot write {path}: {error}") from None
        write(self.console, f"({len(self.messages)} messages in {path})\n", style="dim")

    def loop(self) -> None:
        """Read and answer until the end of input or /quit."""
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
                if line.startswith("/") and isinstance(with_dropped_files(line), str):
                    if not self.command(line):
                        return
                elif line:
                    self.answer(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                write(self.console, "\n(Ctrl-D or /quit leaves)\n", style="dim")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                text = f"error: the input is not UTF-8: byte 0x{byte:02x} at offset {error.start}\n"
                write(self.console, text, style="red")
                return
            except RequestError as error:
                write(self.console, f"error: {error}\n", style="red")


def _read_now(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The files of a message as they are now: every turn shows them again, moved or not."""
    for part in content:
        if isinstance(part, dict) and part["type"] != "text":
            path = part[part["type"]]
            # What cannot be read stays a path: the engine says why.
            with contextlib.suppress(OSError), open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size <= MAX_KEPT_BYTES:
                    part[part["type"]] = Named(file.read(MAX_KEPT_BYTES), path)
    return content


def _path(file: "Named | Survey") -> str:
    found = file if isinstance(file, Named) else file.found
    return found.name if isinstance(found, Named) else str(found)


def _switch(name: str, value: str) -> bool:
    if value not in ("on", "off"):
        raise RequestError(f"{name} takes on or off, not {value!r}")
    return value == "on"


def run(
    model: str,
    *,
    device: str,
    dtype: str,
    kv: str,
    quant: str | None,
    system: str | None,
    think: bool,
    tools: bool,
) -> None:
    """Load a model and talk to it."""
    console = Console()
    lm = load(model, device=device, dtype=dtype, kv=kv, quant=quant)
    with _history(), tempfile.TemporaryDirectory(prefix="gemsmith-") as folder:
        make_folder(Path(folder))
        talker = Talker(lm, console, enable_thinking=think)
        session = Session(talker, Desk(Path(folder)).toolbox(), system=system)
        session.tools_on = tools
        if sys.stdin.isatty():
            write(console, f"{model}; /help lists what else there is\n", style="dim")
        session.loop()


@contextlib.contextmanager
def _history():
    """Line editing with a history that outlives the session, where the platform has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "gemsmith" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
