"""Boxes and points in every spelling that models use, and a problem for all else."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemsmith.text.boxes import MAX_CHARACTERS, Box, Places, Point, parse_boxes

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
        '{"label": "red kettle", "box": {"ymin": 100, "xmin": 200, "ymax": 300, "xmax": 400}}',
        '{"label": "red kettle", "places": [{"box_2d": [100, 200, 300, 400]}]}',
        '{"box_2d": [100, 200, 300, 400], "label": "red kettle", "attributes": {"color": "red"}}',
        '{"box_2d": [100, 200, 300, 400], "label": "red kettle", "tags": [{"of": "steel"}, 5]}',
        '{"x": 200, "y": 100, "width": 200, "height": 200, "label": "red kettle"}',
        '{"box": {"x": 200, "y": 100, "w": 200, "h": 200}, "label": "red kettle"}',
        "[{'box_2d': (100, 200, 300, 400), 'label': 'red \\u006bettle'}]",
        '[{"box_2d": [0100, 200., +300, 4e2], "label": "red kettle"}]',
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


@pytest.mark.parametrize("between", ["\n", ", ", "\n```\nand\n```json\n", " isn't all: "])
@pytest.mark.parametrize(
    "one", ['{"box_2d": [1, 2, 3, 4], "label": "a"}', '[{"box_2d": [1, 2, 3, 4], "label": "a"}]']
)
def test_every_value_of_an_answer_is_read(one, between):
    places = parse_boxes(f"```json\n{one}{between}{one.replace('1, 2', '2, 2')}\n```")
    assert places == Places([Box(1, 2, 3, 4, "a"), Box(2, 2, 3, 4, "a")], [], [])


def test_a_box_and_a_point_of_one_object_are_both_read():
    places = parse_boxes('{"box_2d": [1, 2, 3, 4], "point": [2, 3], "label": "a"}')
    assert places == Places([Box(1, 2, 3, 4, "a")], [Point(2, 3, "a")], [])


def test_places_inside_of_what_has_one_are_read_with_their_own_labels():
    inner = '{"box_2d": [5, 6, 7, 8], "label": "leg"}, {"point": [5, 6]}'
    places = parse_boxes(f'{{"box_2d": [1, 2, 3, 4], "label": "table", "parts": [{inner}]}}')
    assert places.boxes == [Box(1, 2, 3, 4, "table"), Box(5, 6, 7, 8, "leg")]
    assert places.points == [Point(5, 6)]
    assert places.problems == []


def test_several_boxes_of_one_object_have_its_label():
    places = parse_boxes('{"label": "a", "box_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}')
    assert places.boxes == [Box(1, 2, 3, 4, "a"), Box(5, 6, 7, 8, "a")]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[05, 10, 20, 30]", Box(5, 10, 20, 30)),
        ("[12., 34., 56., 78.]", Box(12, 34, 56, 78)),
        ("[.5, 1, +2, 3e1]", Box(0.5, 1, 2, 30)),
    ],
)
def test_numbers_that_json_does_not_know_are_read(text, box):
    assert parse_boxes(text) == Places([box], [], [])


def test_words_in_brackets_are_no_problem():
    text = "The kettle [see the picture] is [here](file.png): [1, 2, 3, 4]."
    assert parse_boxes(text) == Places([Box(1, 2, 3, 4)], [], [])


def test_what_stands_around_an_unreadable_object_is_read():
    text = (
        '[{"point": [1, 2]}, {"label": 12" pan", "box_2d": [1, 2, 3, 4]}, {"point": [3, 4]}, '
        "it's all]"
    )
    places = parse_boxes(text)
    assert places.points == [Point(1, 2), Point(3, 4)]
    assert places.boxes == []
    assert [(p.kind, p.raw) for p in places.problems] == [
        ("unreadable", '{"label": 12" pan", "box_2d": [1, 2, 3, 4]}')
    ]


def test_half_a_surrogate_pair_in_a_label_can_be_printed():
    assert parse_boxes('{"point": [1, 2], "label": "\\ud83d"}').points == [Point(1, 2, "?")]


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
        ('{"x": 10, "y": 20, "width": 100, "label": "k"}', "wrong_numbers"),
        ('{"x": 950, "y": 20, "width": 100, "height": 50}', "outside"),
        ("[\u0661, \u0662, \u0663, \u0664]", "unreadable"),
        ("[1, 2, 3, 4 or so]", "unreadable"),
        ('["kettle", "top left"]', "wrong_numbers"),
        ("[" + "9" * 5000 + ", 2, 3, 4]", "wrong_numbers"),
        ('{"a":' + "[" * 200_000 + "}", "unreadable"),
        ("[[1, 2", "cut_off"),
        ('{"box_2d": [1, 2, 3, 4], "label": "kett', "cut_off"),
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


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        ("[[1, 2, 3, 4], [5, 6", "[5, 6"),
        ("[[1, 2, 3, 4],", "[[1, 2, 3, 4],"),
        ('{"found": [{"box_2d": [1, 2, 3, 4]}, {"box_2d": [5', '{"box_2d": [5'),
    ],
)
def test_a_cut_list_gives_what_was_whole_and_is_told(text, raw):
    places = parse_boxes(text)
    assert places.boxes == [Box(1, 2, 3, 4)]
    assert [(p.kind, p.raw) for p in places.problems] == [("cut_off", raw)]


def test_something_beside_the_places_of_a_list_is_told():
    places = parse_boxes('["kettle", [1, 2, 3, 4]]')
    assert places.boxes == [Box(1, 2, 3, 4)]
    assert [(p.kind, p.raw) for p in places.problems] == [("unreadable", '["kettle"]')]


@pytest.mark.parametrize(
    "text",
    [
        "[1,2" + " " * 300_000,
        "[1,2," * 60_000,
        "{a" * 150_000,
        '[{"a":"' * 40_000,
        "[1,2 x" * 50_000,
        '{"a":[1,{"a"' * 25_000,
        "[{'" * 100_000,
        '{"point":"' + "1 " * 150_000 + 'x"}',
    ],
)
def test_no_answer_takes_long(text):
    began = time.process_time()
    assert parse_boxes(text).problems
    assert time.process_time() - began < 20  # a tenth of that; hours where it is quadratic


def test_endless_answers_are_read_to_a_limit():
    places = parse_boxes("[" * (MAX_CHARACTERS + 1))
    assert [p.kind for p in places.problems] == ["unreadable", "unreadable"]


@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER, st.text(max_size=20)), max_size=5))
def test_every_box_written_is_read_back(rows):
    rows = [(min(a, c), min(b, d), max(a, c), max(b, d), label) for a, b, c, d, label in rows]
    text = json.dumps([{"box_2d": row[:4], "label": row[4]} for row in rows])
    assert parse_boxes(f"Found:\n```json\n{text}\n```").boxes == [Box(*row) for row in rows]


@given(st.text(alphabet="[](){}:,\"'0123456789.-+eabelbox_2d \n`\\", max_size=60))
def test_no_text_raises_and_none_is_passed_over_in_silence(text):
    places = parse_boxes(text)
    assert places.boxes or places.points or places.problems or "[" in text
