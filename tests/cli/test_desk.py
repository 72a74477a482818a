"""The demo's tools do what they say and cannot leave their folder."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from gemsmith.cli.desk import Desk, Event, convert, make_folder
from gemsmith.text.calls import ToolCall


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    make_folder(tmp_path / "inside")
    (tmp_path / "secret.txt").write_text("hidden")
    return Desk(tmp_path / "inside", now=lambda: datetime(2026, 6, 12, 9, 5))


def use(desk: Desk, name: str, **arguments: Any) -> dict[str, Any]:
    return desk.toolbox().run(ToolCall(name, arguments))


@pytest.mark.parametrize(
    ("value", "start", "end", "result"),
    [
        (26.2, "miles", "km", 42.1648),
        (1, "kg", "pounds", 2.2046),
        (2, "Gallons", "liters", 7.5708),
        (-40, "celsius", "fahrenheit", -40),
        (0, "kelvin", "celsius", -273.15),
        (90, "minutes", "hours", 1.5),
    ],
)
def test_units_are_converted(value: float, start: str, end: str, result: float):
    assert convert(value, start, end) == pytest.approx(result, abs=1e-9)


def test_units_of_different_kinds_are_refused():
    with pytest.raises(ValueError, match="cannot convert km to celsius; known units: meters"):
        convert(1, "km", "celsius")


def test_whole_results_have_no_point(desk: Desk):
    result = use(desk, "convert_units", value=3, from_unit="km", to_unit="meters")
    assert repr(result) == "{'result': 3000}"


def test_the_calendar_keeps_and_lists_events(desk: Desk):
    use(desk, "add_event", title="gym", date="June 12", time="09:30")
    assert desk.events == [Event("gym", "June 12", "09:30")]
    listed = use(desk, "list_events", date="June 12")
    assert listed == {"count": 1, "events": ["gym at 09:30"]}
    assert use(desk, "list_events", date="June 13") == {"count": 0, "events": []}


def test_files_are_listed_and_read(desk: Desk):
    listed = use(desk, "list_files", path="recipes")
    assert listed == {"count": 3, "files": ["bread.txt", "cake.txt", "soup.txt"]}
    assert use(desk, "list_files", path="/")["files"] == ["plans/", "recipes/"]
    assert use(desk, "read_file", path="plans/garden.txt") == {"text": "plant the olive tree"}


def test_a_file_is_no_folder_and_the_answer_says_so(desk: Desk):
    assert use(desk, "list_files", path="plans/garden.txt") == {
        "error": "plans/garden.txt is a file; read_file reads it"
    }
    assert use(desk, "read_file", path="plans") == {
        "error": "plans is a folder; list_files lists it"
    }


@pytest.mark.parametrize("path", ["../secret.txt", "/../secret.txt", "plans/../../secret.txt"])
def test_nothing_outside_the_folder_is_read(desk: Desk, path: str):
    result = use(desk, "read_file", path=path)
    assert "outside the folder" in result["error"]


def test_a_link_out_of_the_folder_is_not_followed(desk: Desk):
    (desk.folder / "link").symlink_to(desk.folder.parent / "secret.txt")
    assert "outside the folder" in use(desk, "read_file", path="link")["error"]


@pytest.mark.parametrize("path", ["nothing.txt", "a\0b", "loop", "x" * 5000])
def test_a_path_that_cannot_be_read_is_an_error_for_the_model(desk: Desk, path: str):
    (desk.folder / "loop").symlink_to("loop")
    assert use(desk, "read_file", path=path)["error"]


def test_an_absolute_path_means_the_folder(desk: Desk):
    assert use(desk, "read_file", path="/etc/passwd") == {"error": "/etc/passwd does not exist"}


def test_a_long_file_is_cut(desk: Desk):
    (desk.folder / "long.txt").write_text("x" * 10_000)
    assert len(use(desk, "read_file", path="long.txt")["text"]) == 2000


def test_the_clock_tells_the_time(desk: Desk):
    assert use(desk, "get_time") == {"time": "09:05"}


def test_a_choice_of_tools_is_offered(desk: Desk):
    names = {tool["function"]["name"] for tool in desk.toolbox(("get_time",)).declarations}
    assert names == {"get_time"}
