"""What is right, by replies written by hand; word errors and intervals counted by hand."""

import json
from typing import Any

import pytest

from gemsmith.evals.items import Item
from gemsmith.evals.scoring import (
    Reply,
    WordErrors,
    border_errors,
    dropped,
    iou,
    judge,
    same_json,
    wilson,
    word_errors,
    words,
)
from gemsmith.text.boxes import Box

SINE = {"name": "sine", "arguments": {"x": 1, "loud": True}}
WAVE = {"name": "wave", "arguments": {"to": ["a", "b"]}}
RED = {"box_2d": [100, 200, 300, 400], "label": "red circle"}
BLUE = {"box_2d": [500, 500, 700, 700], "label": "blue star"}


def item(kind: str, wanted: Any) -> Item:
    expected = {"type": kind, "calls" if kind == "calls" else "value": wanted}
    return Item("1", "any", [{"role": "user", "content": "?"}], None, False, expected)


def calls(*made: dict[str, Any]) -> Reply:
    return Reply(calls=tuple((call["name"], call["arguments"]) for call in made))


@pytest.mark.parametrize(
    ("made", "right"),
    [
        ((SINE, WAVE), True),
        ((WAVE, SINE), True),
        ((SINE,), False),
        ((SINE, WAVE, WAVE), False),
        ((SINE, SINE), False),
        ((SINE, {"name": "wave", "arguments": {"to": ["b", "a"]}}), False),
        ((SINE, {"name": "wave", "arguments": {"to": ["a", "b"], "more": None}}), False),
        ((SINE, {"name": "wavy", "arguments": {"to": ["a", "b"]}}), False),
        ((), False),
    ],
)
def test_calls_must_be_equal_in_any_order(made: tuple[dict[str, Any], ...], right: bool) -> None:
    assert (judge(item("calls", [SINE, WAVE]), calls(*made)) is None) == right


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (True, True, True),
        ("1", 1, False),
        (None, 0, False),
        ([1, 2], [2, 1], False),
        ({"a": 1, "b": [True]}, {"b": [True], "a": 1.0}, True),
        ({"a": 1, "b": [1]}, {"b": [True], "a": 1}, False),
        ({"a": {}}, {"a": []}, False),
    ],
)
def test_json_values_compare_as_json_does(a: Any, b: Any, same: bool) -> None:
    assert same_json(a, b) is same
    assert same_json(b, a) is same


@pytest.mark.parametrize(
    ("value", "text", "right"),
    [
        (849, "The answer is 849.", True),
        (849, "849", True),
        (-5, "That makes -5.", True),
        (5, "12-5", True),
        (849, "849 or 850", False),
        (849, "The answer is 8490.", False),
        (849, "The answer is 849.5", False),
        (849, "The answer is -849.", False),
        (1860, "1,860", False),
        ("22:00", "It leaves at 22:00.", True),
        ("22", "It leaves at 22:00.", False),
        ("00", "It leaves at 22:00.", False),
        ("4", "There are 4.", True),
        ("4", "There are 14 and 4.5.", False),
        ("purple peaf", "The secret is the purple peaf.", True),
        ("peaf", "The secret is the purple peafowl.", False),
        ("peaf", "Peaf.", False),
        ("c++ (new)", "It is c++ (new).", True),
    ],
)
def test_an_answer_holds_the_value_as_a_whole(value: Any, text: str, right: bool) -> None:
    assert (judge(item("answer", value), Reply(text)) is None) == right


def test_a_recital_of_the_prompt_is_no_answer() -> None:
    text = "There is a lot of filler here. " * 30 + "The code is 8955."
    assert judge(item("answer", "8955"), Reply(text)) == "other answer"


def test_no_tool_is_missed_when_a_tool_is_called_or_something_else_is_said() -> None:
    sentence = "None of the available tools can do that."
    wanted = item("no_tool", sentence)
    assert judge(wanted, Reply(sentence)) is None
    assert judge(wanted, Reply("Hello! What can I do for you?")) == "other words"
    assert judge(wanted, Reply(f"{sentence} But here is a poem.")) == "other words"
    assert judge(wanted, Reply(sentence, calls=(("sine", {}),))) == "called sine"


def test_json_replies_are_json_and_nothing_else() -> None:
    wanted = item("json", {"a": 1, "b": ["x"]})
    assert judge(wanted, Reply('{"b":["x"], "a":1}')) is None
    assert judge(wanted, Reply('Here: {"a":1,"b":["x"]}')) == "not JSON"
    assert judge(wanted, Reply('{"a":true,"b":["x"]}')) == "other JSON"
    assert judge(wanted, Reply("[" * 100_000)) == "not JSON"


def test_a_right_call_beside_an_unreadable_one_is_wrong() -> None:
    reply = Reply(calls=(("sine", SINE["arguments"]),), problems=("truncated: ...",))
    assert judge(item("calls", [SINE]), reply) == "unreadable call: truncated: ..."


def test_a_reply_cut_by_the_token_limit_is_wrong() -> None:
    reply = Reply("The answer is 7.", finish_reason="length")
    assert judge(item("answer", 7), reply) == "no end within 384 tokens"


def test_wilson_interval_of_known_counts() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


# -- pictures ---------------------------------------------------------------------------------


def moved(place: dict[str, Any], down: int = 0, right: int = 0, **other: Any) -> dict[str, Any]:
    y0, x0, y1, x1 = place["box_2d"]
    return place | {"box_2d": [y0 + down, x0 + right, y1 + down, x1 + right]} | other


def test_iou_of_known_boxes() -> None:
    a = Box(0, 0, 100, 100)
    assert iou(a, a) == 1
    assert iou(a, Box(0, 50, 100, 150)) == pytest.approx(1 / 3)
    assert iou(a, Box(0, 0, 50, 100)) == 0.5
    assert iou(a, Box(0, 100, 100, 200)) == 0
    assert iou(Box(5, 5, 5, 5), Box(5, 5, 5, 5)) == 0


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([RED, BLUE], None),
        ([BLUE, RED], None),
        # 35 of 200 aside: 165 * 200 / (2 * 200 * 200 - 165 * 200) = 0.7021; 36 aside: 0.6949
        ([moved(RED, right=35), moved(BLUE, down=-35)], None),
        ([moved(RED, right=36), BLUE], "1 of 2 boxes are elsewhere"),
        ([RED], "1 boxes where 2 are wanted"),
        ([RED, BLUE, moved(BLUE, down=250)], "3 boxes where 2 are wanted"),
        ([RED, moved(RED, right=5)], "1 of 2 boxes are elsewhere"),
        ([RED | {"label": "Red Circle"}, BLUE], None),
        ([RED | {"label": "blue star"}, BLUE | {"label": "red circle"}], "other labels"),
        ([], "0 boxes where 2 are wanted"),
        ([RED, {"point": [600, 600], "label": "blue star"}], "1 boxes where 2 are wanted, and"),
        (
            [RED, BLUE, {"point": [600, 600], "label": "x"}],
            "2 boxes where 2 are wanted, and others",
        ),
        ([RED, BLUE | {"box_2d": [500, 500, 700]}], "a place needs four numbers"),
    ],
)
def test_boxes_lie_over_the_wanted_ones(found: list[dict[str, Any]], wrong: str | None) -> None:
    got = judge(item("boxes", [RED, BLUE]), Reply(f"```json\n{json.dumps(found)}\n```"))
    assert got is None if wrong is None else got is not None and got.startswith(wrong)


def test_the_best_pair_of_boxes_goes_first() -> None:
    # What is found first lies over both wanted ones, but the other one over the first alone.
    one = {"box_2d": [0, 0, 100, 100], "label": "a"}
    found = [moved(one, right=14), one]
    assert judge(item("boxes", [one, moved(one, right=20)]), Reply(json.dumps(found))) is None


def test_one_box_does_not_stand_for_two() -> None:
    one = {"box_2d": [0, 0, 100, 100], "label": "a"}
    found = [moved(one, right=5), moved(one, right=300)]
    wrong = judge(item("boxes", [one, moved(one, right=10)]), Reply(json.dumps(found)))
    assert wrong == "1 of 2 boxes are elsewhere"


@pytest.mark.parametrize(
    ("points", "wrong"),
    [
        ([[200, 300], [600, 600]], None),
        ([[100, 200], [700, 700]], None),
        ([[99, 300], [600, 600]], "1 of 2 points are elsewhere"),
        ([[200, 300], [210, 310]], "1 of 2 points are elsewhere"),
        ([[200, 300]], "1 points where 2 are wanted"),
    ],
)
def test_one_point_lies_in_each_box(points: list[list[int]], wrong: str | None) -> None:
    labels = ("red circle", "blue star")
    found = [{"point": p, "label": label} for p, label in zip(points, labels, strict=False)]
    assert judge(item("points", [RED, BLUE]), Reply(json.dumps(found))) == wrong


def test_words_instead_of_places_are_wrong() -> None:
    assert (
        judge(item("boxes", [RED]), Reply("It is on the left.")) == "no box or point in the answer"
    )
    assert judge(item("points", [RED]), Reply(json.dumps([RED]))) is not None


@pytest.mark.parametrize(
    ("text", "right"),
    [("K7P2", True), ("K7P2\n", True), ("k7p2", False), ("K7P2.", False), ("It says K7P2", False)],
)
def test_what_is_read_is_the_reply_letter_by_letter(text: str, right: bool) -> None:
    assert (judge(item("text", "K7P2"), Reply(text)) is None) == right


# -- speech -----------------------------------------------------------------------------------


def test_words_leave_case_and_punctuation_aside() -> None:
    assert words("Anna's train, at 16:05 o'clock. 4.5 - OK!") == [
        "anna's", "train", "at", "16:05", "o'clock", "4.5", "ok",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("heard", "errors"),
    [
        ("the old lamp is red", 0),
        ("The old lamp is red.", 0),
        ("the old lamp is bread", 1),
        ("the lamp is red", 1),
        ("the old old lamp is red", 1),
        ("old lamp the is red", 2),
        ("", 5),
        ("no no no no no no no", 7),
    ],
)
def test_word_errors_are_the_fewest_changes(heard: str, errors: int) -> None:
    assert word_errors("the old lamp is red", heard) == WordErrors(errors, 5)
    wrong = judge(item("transcript", "the old lamp is red"), Reply(heard))
    assert wrong == (f"{errors} word errors in 5 words" if errors else None)


def test_word_errors_add_up_and_may_pass_one() -> None:
    assert (WordErrors(1, 5) + WordErrors(2, 3)).rate == 3 / 8
    assert word_errors("yes", "no no no").rate == 3


def test_a_call_is_no_transcript() -> None:
    assert judge(item("transcript", "play some jazz"), calls(SINE)) == "called sine"


SAID = " ".join(f"w{n}" for n in range(40))


def said(*spans: tuple[int, int]) -> str:
    return " ".join(f"w{n}" for start, stop in spans for n in range(start, stop))


@pytest.mark.parametrize(
    ("heard", "runs"),
    [
        (SAID, 0),
        (said((0, 10), (13, 40)), 0),
        (said((0, 10), (14, 40)), 1),
        (said((5, 10), (20, 36)), 3),
        ("", 1),
        (said((0, 10)) + " la la la la " + said((14, 40)), 1),
        (said((0, 10)) + " la la la " + said((13, 40)), 0),
        ("la " * 200, 1),
    ],
)
def test_four_words_in_a_row_that_nobody_heard_are_a_dropped_segment(heard: str, runs: int) -> None:
    assert dropped(SAID, heard) == runs
    assert (judge(item("reading", SAID), Reply(heard)) is None) == (runs == 0)


def test_errors_near_borders_are_counted_by_themselves() -> None:
    whole = [said((0, 20)), said((20, 40))]
    assert border_errors(SAID, whole) == WordErrors(0, 10)
    # Words 18-21 fell out at the border: five before it and five after, the missing ones between.
    missing = [said((0, 18)), said((22, 40))]
    assert border_errors(SAID, missing) == WordErrors(4, 14)
    doubled = [said((0, 20)), said((18, 40))]
    assert border_errors(SAID, doubled).errors == 2
    far = [said((0, 10), (11, 20)), said((20, 40))]
    assert border_errors(SAID, far) == WordErrors(0, 10)
    assert border_errors(SAID, [SAID]) == WordErrors(0, 0)
