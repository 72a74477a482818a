"""Stop strings against a slow definition, over every way to cut a text."""

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemsmith.engine.stop import StopStrings

TEXT = st.text("abc", max_size=24)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=3)


def slow_answer(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of two, the longer."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(deadline=None)
@example(text="abc", stops=["abc", "b"], cuts=[])  # the shorter is complete first
@example(text="cab", stops=["b", "ab"], cuts=[])  # the two end together
@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 24)))
def test_any_cutting_gives_the_text_before_the_first_stop_string(text, stops, cuts):
    filter = StopStrings(stops)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = ""
    for start, stop in pairwise(edges):
        shown += filter.add(text[start:stop])
        # What is shown is never taken back, so it must be part of the answer already.
        assert slow_answer(text, stops)[0].startswith(shown)
    shown += filter.flush()
    assert (shown, filter.stopped) == slow_answer(text, stops)


def test_only_what_may_begin_a_stop_string_is_held_back():
    filter = StopStrings(["END"])
    assert [filter.add(piece) for piece in ("one E", "N", "ough. E", "ND two")] == [
        "one ",
        "",
        "ENough. ",
        "",
    ]
    assert filter.stopped
    assert filter.add("more") + filter.flush() == ""
