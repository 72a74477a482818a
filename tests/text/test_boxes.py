"""Boxes and points in every spelling that models use, and a problem for all else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemsmith.text.boxes import MAX_CHARACTERS, Box, Point, parse_boxes

KETTLE = Box(100, 200, 300, 400, "red kettle")
NUMBER = st.integers(0, 1000)


@pytest.mark.parametrize(
    "text",
    [
        '[{"box_2d": [100, 200, 300, 400], "label": "red kettle"}]',
        '```json\n[\n  {"box_2d": [100, 200, 300, 400], "label": "red kettle"}\n]\n```',
        'Here it is:\n```json\n{"label": "red kettle", "box_2d": [100, 200, 300, 400]}\n```\nDone.',
        '[{"bbox": [100.0, 200, 300, 400.0], "name": "red kettle"},]',
        "[{'box_2d': [100, 200, 300, 400], 'label': 'red kettle'}]",
        '[{"box_2d": [100, 200, 300, 400,], "label": "red kettle",},]',
        '{box_2d: [100, 200, 300, 400], label: "red kettle"}',
        '[{"box_2d": [[100, 200, 300, 400]], "label": "red kettle"}]',
        '[{"box_2d": "[100, 200, 300, 400]", "label": "red kettle"}]',
        '[{"ymin": 100, "xmin": 200, "ymax": 300, "xmax": 400, "label": "red kettle"}]',
        '[{"box_2d": [300, 400, 100, 200], "label": "red kettle"}]',
        '{"objects": [{"box_2d": [100, 200, 300, 400], "label": "red kettle"}]}',
    ],
)
def test_a_box_is_read_in_any_spelling(text):
    places = parse_boxes(text)
    assert places.boxes == [KETTLE]
    assert places.points == []
    assert places.problems == []


def test_bare_lists_of_numbers_are_boxes_and_points_without_a_label():
    places = parse_boxes("The box is [100, 200, 300, 400] and it is clicked at [150, 250].")
    assert places.boxes == [Box(100, 200, 300, 400)]
    assert places.points == [Point(150, 250)]
    assert places.problems == []


def test_points_are_read_y_first():
    text = '[{"point": [120, 880], "label": "Save"}, {"point_2d": [5, 6]}]'
    assert parse_boxes(text).points == [Point(120, 880, "Save"), Point(5, 6)]


def test_pixels_have_x_first():
    assert KETTLE.pixels(200, 50) == (40, 5, 80, 15)
    assert Point(500, 250).pixels(200, 50) == (50, 25)


@pytest.mark.parametrize("text", ["[]", "```json\n[]\n```", "There is none: []"])
def test_an_empty_list_is_an_answer(text):
    places = parse_boxes(text)
    assert (places.boxes, places.points, places.problems) == ([], [], [])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I see no kettle.", "none_found"),
        ("", "none_found"),
        ('[{"box_2d": [100, 200, 300], "label": "a"}]', "wrong_numbers"),
        ('[{"box_2d": ["a", 1, 2, 3]}]', "wrong_numbers"),
        ('[{"box_2d": null}]', "wrong_numbers"),
        ('[{"box_2d": true}]', "wrong_numbers"),
        ('[{"label": "kettle"}]', "wrong_numbers"),
        ('[{"box_2d": [0, 0, 1001, 5]}]', "outside"),
        ('[{"box_2d": [-1, 0, 10, 5]}]', "outside"),
        ('[{"box_2d": [1e999, 0, 10, 5]}]', "wrong_numbers"),
        ("{kettle at the top}", "unreadable"),
    ],
)
def test_what_gives_no_place_is_a_problem(text, kind):
    places = parse_boxes(text)
    assert (places.boxes, places.points) == ([], [])
    assert [problem.kind for problem in places.problems] == [kind]


def test_what_came_before_a_cut_is_kept_and_the_cut_is_told():
    text = '[{"box_2d": [1, 2, 3, 4], "label": "a"}, {"box_2d": [5, 6'
    places = parse_boxes(text)
    assert places.boxes == [Box(1, 2, 3, 4, "a")]
    assert [(p.kind, p.raw) for p in places.problems] == [("cut_off", '{"box_2d": [5, 6')]


def test_endless_answers_are_read_to_a_limit():
    places = parse_boxes("[" * (MAX_CHARACTERS + 1))
    assert [p.kind for p in places.problems] == ["unreadable", "none_found"]


@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER, st.text(max_size=20)), max_size=5))
def test_every_box_written_is_read_back(rows):
    rows = [(min(a, c), min(b, d), max(a, c), max(b, d), label) for a, b, c, d, label in rows]
    text = json.dumps([{"box_2d": row[:4], "label": row[4]} for row in rows])
    assert parse_boxes(f"Found:\n```json\n{text}\n```").boxes == [Box(*row) for row in rows]


@given(st.text(alphabet="[]{}:,\"'0123456789.-+eabelbox_2d \n`\\", max_size=60))
def test_no_text_raises_and_none_is_passed_over_in_silence(text):
    places = parse_boxes(text)
    assert places.boxes or places.points or places.problems or "[" in text
