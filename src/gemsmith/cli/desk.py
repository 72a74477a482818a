"""The tools of `demo` and `chat`: a calendar, a unit converter, file listing and a clock.

They really run, and can do no harm: the calendar lives in memory, and files are looked at, never
written, inside one folder alone.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gemsmith.agent.tools import Tool, Toolbox

MAX_FILES, MAX_CHARACTERS = 50, 2000

# How much of the first unit of its row one unit is.
UNITS: tuple[dict[str, float], ...] = (
    {"meters": 1, "km": 1000, "cm": 0.01, "mm": 0.001, "miles": 1609.344, "feet": 0.3048,
     "yards": 0.9144, "inches": 0.0254},
    {"grams": 1, "kg": 1000, "tons": 1e6, "pounds": 453.59237, "ounces": 28.349523125,
     "stone": 6350.29318},
    {"liters": 1, "ml": 0.001, "gallons": 3.785411784, "pints": 0.473176473, "cups": 0.2365882365},
    {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400, "weeks": 604_800},
)  # fmt: skip
TO_CELSIUS: dict[str, Callable[[float], float]] = {
    "celsius": lambda t: t,
    "fahrenheit": lambda t: (t - 32) / 1.8,
    "kelvin": lambda t: t - 273.15,
}
FROM_CELSIUS: dict[str, Callable[[float], float]] = {
    "celsius": lambda t: t,
    "fahrenheit": lambda t: t * 1.8 + 32,
    "kelvin": lambda t: t + 273.15,
}


def convert(value: float, from_unit: str, to_unit: str) -> float:
    """`value` in another unit of the same kind, rounded to four decimals.

    Raises:
      ValueError: an unknown unit, or two of different kinds.
    """
    start, end = from_unit.strip().lower(), to_unit.strip().lower()
    if start in TO_CELSIUS and end in FROM_CELSIUS:
        return round(FROM_CELSIUS[end](TO_CELSIUS[start](value)), 4)
    for row in UNITS:
        if start in row and end in row:
            return round(value * row[start] / row[end], 4)
    known = ", ".join(unit for row in (*UNITS, TO_CELSIUS) for unit in row)
    raise ValueError(f"cannot convert {from_unit} to {to_unit}; known units: {known}")


@dataclass(frozen=True, slots=True)
class Event:
    title: str
    date: str
    time: str


@dataclass
class Desk:
    """A calendar and a folder, and the tools over them."""

    folder: Path
    events: list[Event] = field(default_factory=list)
    now: Callable[[], datetime] = datetime.now

    def add_event(self, title: str, date: str, time: str) -> dict[str, Any]:
        self.events.append(Event(title, date, time))
        return {"status": "added"}

    def list_events(self, date: str) -> dict[str, Any]:
        found = [f"{event.title} at {event.time}" for event in self.events if event.date == date]
        return {"count": len(found), "events": found}

    def list_files(self, path: str) -> dict[str, Any]:
        folder = self.inside(path)
        if not folder.is_dir():
            raise ValueError(f"{path} is a file; read_file reads it")
        entries = sorted(folder.iterdir())
        names = [entry.name + "/" * entry.is_dir() for entry in entries]
        return {"count": len(names), "files": names[:MAX_FILES]}

    def read_file(self, path: str) -> dict[str, Any]:
        place = self.inside(path)
        if place.is_dir():
            raise ValueError(f"{path} is a folder; list_files lists it")
        with place.open(encoding="utf-8", errors="replace") as file:
            return {"text": file.read(MAX_CHARACTERS).strip()}

    def inside(self, path: str) -> Path:
        """The place that `path` names in the folder; links are followed first."""
        root = self.folder.resolve()
        place = Path(os.path.realpath(root / path.lstrip("/")))  # also of a loop of links
        if not place.is_relative_to(root):
            raise ValueError(f"{path} is outside the folder; only names inside it can be looked at")
        if not place.exists():
            raise ValueError(f"{path} does not exist")
        return place

    def toolbox(self, names: Collection[str] | None = None) -> Toolbox:
        """The tools, or those of `names` alone."""
        text = {"type": "string"}
        tools = (
            _tool(
                "add_event",
                "Add an event to the calendar",
                self.add_event,
                title={"description": "Title of the event", **text},
                date={"description": "Date of the event", **text},
                time={"description": "Start time", **text},
            ),
            _tool(
                "list_events",
                "List the events of a day",
                self.list_events,
                date={"description": "Date to look at", **text},
            ),
            _tool(
                "convert_units",
                "Convert a value between units",
                lambda value, from_unit, to_unit: {
                    "result": _plain(convert(value, from_unit, to_unit))
                },
                value={"description": "Value to convert", "type": "number"},
                from_unit={"description": "Unit to convert from", **text},
                to_unit={"description": "Unit to convert to", **text},
            ),
            _tool(
                "list_files",
                "List the files in a folder",
                self.list_files,
                path={"description": "Path of the folder", **text},
            ),
            _tool(
                "read_file",
                "Read a text file",
                self.read_file,
                path={"description": "Path of the file", **text},
            ),
            _tool(
                "get_time",
                "Get the current time",
                lambda: {"time": self.now().strftime("%H:%M")},
            ),
        )
        return Toolbox(tool for tool in tools if names is None or tool.name in names)


def _tool(
    name: str,
    description: str,
    run: Callable[..., dict[str, Any]],
    **properties: dict[str, Any],
) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return Tool(name=name, description=description, parameters=parameters, run=run)


def _plain(number: float) -> int | float:
    """Whole numbers without a point, as people write them."""
    return int(number) if number.is_integer() else number


def make_folder(folder: Path) -> None:
    """Fill an empty folder with a few small files to look at."""
    for name, text in {
        "recipes/soup.txt": "Cut the onions, add water, wait.\n",
        "recipes/bread.txt": "Flour, water, salt and time.\n",
        "recipes/cake.txt": "Butter, sugar, eggs, flour.\n",
        "plans/garden.txt": "plant the olive tree\n",
        "plans/trip.txt": "pack the blue tent\n",
    }.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
