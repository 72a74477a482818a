"""The decision: what is ruled out and why, what is chosen, what would change it."""

import json
from dataclasses import replace
from typing import Any

import pytest

from gemsmith import fit, probe, sizing, work
from gemsmith.choose import (
    BENCHMARKS,
    Decision,
    Needs,
    decide,
    examine,
    to_dict,
)
from gemsmith.config import PRESETS
from gemsmith.devices import DEVICES
from gemsmith.errors import ConfigError
from gemsmith.fit import GIB, Target

HUGE = Target("huge", "gpu", 1 << 40, 1e13, dict.fromkeys(probe.RATES, 1e15))


def on(device: str, **needs: Any) -> Decision:
    return decide(Needs(**needs), fit.named(device))


def chosen(decision: Decision) -> str | None:
    return decision.choice and decision.choice.size


# -- facts ------------------------------------------------------------------------------------


def test_every_score_is_of_a_size_and_on_its_scale() -> None:
    for benchmark in BENCHMARKS.values():
        assert set(benchmark.scores) <= set(PRESETS)
        most = 1 if benchmark.lower_is_better else 100
        assert all(0 < score < most for score in benchmark.scores.values())


def test_the_published_figures_that_others_quote_are_these() -> None:
    assert list(BENCHMARKS["tau2"].scores.values()) == [24.5, 42.2, 69.0, 68.2, 76.9]
    assert list(BENCHMARKS["mrcr"].scores.values()) == [19.1, 25.4, 43.4, 44.1, 66.4]


def test_what_is_not_published_is_not_known() -> None:
    assert BENCHMARKS["fleurs"].merit("31B") is None
    assert BENCHMARKS["fleurs"].merit("E2B") == pytest.approx(91)


# -- what is ruled out ------------------------------------------------------------------------


def test_a_model_without_ears_is_never_chosen_for_sound() -> None:
    for device in DEVICES:
        assert chosen(on(device, audio=True)) in ("E2B", "E4B", "12B")
    assert chosen(decide(Needs(audio=True), HUGE)) == "12B"
    assert chosen(decide(Needs(), HUGE)) == "31B"


def test_a_context_beyond_the_edge_models_rules_them_out() -> None:
    decision = decide(Needs(context=131_073), HUGE)
    out = {option.size for option in decision.options if option.missing}
    assert out == {"E2B", "E4B"}
    assert "its context ends at 131,072 tokens, 131,073 are asked" in str(decision.options)


def test_memory_is_weights_kv_of_all_users_and_the_runtime() -> None:
    needs = Needs(context=32_768, users=4)
    option = examine("31B", "int4", "int8", needs, HUGE)
    config = PRESETS["31B"]
    wanted = sizing.memory(
        config, "int4", 32_768, kv="int8", sequences=4, place="gpu", towers=False
    )
    assert option.memory_bytes == wanted.total
    exact = replace(HUGE, memory=option.memory_bytes)
    assert not examine("31B", "int4", "int8", needs, exact).missing
    short = replace(HUGE, memory=option.memory_bytes - 1)
    [lack] = examine("31B", "int4", "int8", needs, short).missing
    assert lack.endswith(": 0.0 MiB are missing")


def test_pictures_cost_the_eyes_memory_and_text_does_not() -> None:
    seeing = examine("31B", "int8", "int8", Needs(images="normal"), HUGE)
    reading = examine("31B", "int8", "int8", Needs(), HUGE)
    parts = sizing.parameters(PRESETS["31B"])
    eyes = parts["vision"] + parts["vision_projection"]
    assert eyes < seeing.memory_bytes - reading.memory_bytes < 1.1 * eyes


def test_speed_is_held_against_half_of_what_the_memory_allows() -> None:
    slow = Target("slow", "gpu", 1 << 40, 50e9)
    ceiling = examine("E4B", "int8", "int8", Needs(), slow).rates.decode_bound
    assert ceiling is not None
    assert not examine("E4B", "int8", "int8", Needs(speed=ceiling / 2), slow).missing
    [what] = examine("E4B", "int8", "int8", Needs(speed=ceiling / 1.9), slow).missing
    assert "tokens a second for each user" in what


def test_the_first_token_is_held_against_half_the_peak_rate() -> None:
    option = examine("12B", "int8", "int8", Needs(context=4096, first=1e-3), HUGE)
    bound = option.rates.ttft_bound
    assert bound is not None
    assert bound >= work.prefill_flops(PRESETS["12B"].text_config, 4096, 1) / 1e15
    assert option.first == pytest.approx(2 * bound)
    assert "s to the first token of a full context" in option.missing[0]


def test_what_cannot_be_said_is_unknown_and_neither_met_nor_missed() -> None:
    blind = Target("blind", "gpu", 1 << 40)
    option = examine("31B", "int8", "int8", Needs(speed=1e6, first=1e-6), blind)
    assert option.missing == ()
    assert [what.split(":")[0] for what in option.unknown] == [
        "its speed here",
        "its time to the first token here",
    ]
    heard = examine("31B", "int8", "int8", Needs(floors={"fleurs": 0.08}), HUGE)
    assert heard.unknown == ("its FLEURS: no score is published",)
    assert heard.merit is None
    # An unknown never wins over what is known.
    assert chosen(decide(Needs(floors={"fleurs": 0.08}), HUGE)) == "12B"


def test_floors_hold_in_the_direction_of_their_scale() -> None:
    above = decide(Needs(floors={"mmlu-pro": 82.6}), HUGE)
    assert {o.size for o in above.options if not o.missing} == {"26B-A4B", "31B"}
    below = decide(Needs(images="fine", floors={"omnidocbench": 0.149}), HUGE)
    assert {o.size for o in below.options if not o.missing} == {"26B-A4B", "31B"}
    assert "OmniDocBench 1.5 0.29, at most 0.149 is asked" in str(below.options)


# -- what is chosen ---------------------------------------------------------------------------


def test_scores_of_the_kind_of_work_decide() -> None:
    middle = replace(HUGE, memory=17 * GIB)  # 31B does not fit
    assert chosen(decide(Needs(task="general"), middle)) == "26B-A4B"
    assert chosen(decide(Needs(task="agents"), middle)) == "12B"


@pytest.mark.parametrize(
    ("needs", "benchmarks"),
    [
        ({}, ["mmlu-pro"]),
        ({"task": "code", "images": "coarse"}, ["livecodebench", "mmmu-pro"]),
        ({"images": "fine", "audio": True}, ["mmlu-pro", "omnidocbench", "fleurs"]),
        ({"video": True, "context": 65_536}, ["mmlu-pro", "mmmu-pro", "mrcr"]),
        ({"floors": {"gpqa": 1, "mmlu-pro": 1}}, ["mmlu-pro", "gpqa"]),
    ],
)
def test_a_job_names_the_scores_that_matter(needs: dict[str, Any], benchmarks: list[str]) -> None:
    assert Needs(**needs).benchmarks == benchmarks


def test_the_most_exact_format_that_will_do_is_taken() -> None:
    formats = []
    for memory in (70, 60, 40, 20):
        decision = decide(Needs(), replace(HUGE, memory=memory * GIB))
        assert decision.choice is not None
        formats.append(str(decision.choice))
    assert formats == ["31B bfloat16", "31B bfloat16", "31B int8", "31B int4"]


def test_a_small_board_gets_the_smallest_and_is_told_why() -> None:
    board = fit.named("raspberry-pi-5-8gb")
    least = examine("E2B", "int4", "int8", Needs(images="fine"), board).speed
    assert least
    decision = on("raspberry-pi-5-8gb", images="fine", speed=0.95 * least)
    assert (chosen(decision), decision.runner_up) == ("E2B", None)
    text = "\n".join(decision.reasons())
    for words in (
        "it is the only size",
        "table that stays on disk",
        "int8 would not fit or be too",
    ):
        assert words in text
    [change] = [c for c in decision.changes if "speed" in c.what]
    assert (change.what, change.then[:3]) == ("without the demand on speed", "12B")


def test_what_would_change_the_answer_does_change_it() -> None:
    needs = Needs(audio=True, context=32_768, users=4)
    machine = fit.named("rtx-3060-12gb")
    decision = decide(needs, machine)
    assert chosen(decision) == "12B"
    changes = {change.what: change.then for change in decision.changes}
    other = decide(replace(needs, audio=False), machine)
    assert changes.get("without sound", chosen(decision)) == (
        str(other.choice) if chosen(other) != "12B" else "12B"
    )
    text = decide(Needs(), fit.named("rtx-3060-12gb"))
    [more] = [change for change in text.changes if change.what.startswith("with ")
              and "memory" in change.what]  # fmt: skip
    needed = float(more.what.split()[1])
    bigger = decide(Needs(), replace(machine, memory=int((needed + 0.01) * GIB)))
    smaller = decide(Needs(), replace(machine, memory=int((needed - 0.01) * GIB)))
    assert str(bigger.choice) == more.then
    assert chosen(smaller) == chosen(text)


def test_where_nothing_will_do_the_closest_three_say_what_is_missing() -> None:
    decision = on("t4", audio=True, context=262_144, users=8)
    assert decision.choice is None
    assert decision.runner_up is None
    assert decision.reasons() == []
    sizes = [option.size for option in decision.closest]
    assert sizes[0] == "12B"
    assert set(sizes[1:]) == {"E2B", "E4B"}
    assert "GiB are missing" in decision.closest[0].missing[0]
    assert any(change.what.endswith("of memory to use") for change in decision.changes)


def test_the_nearest_to_a_floor_is_the_closest() -> None:
    decision = decide(Needs(audio=True, floors={"mmlu-pro": 80}), HUGE)
    assert [option.size for option in decision.closest] == ["12B", "E4B", "E2B"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("audio", [False, True])
def test_every_device_gets_an_answer_that_is_json(device: str, audio: bool) -> None:
    for images in ("none", "fine"):
        for context in (4096, 262_144):
            facts = to_dict(on(device, audio=audio, images=images, context=context, users=2))
            json.loads(json.dumps(facts, allow_nan=False))
            assert (facts["choice"] is None) == bool(facts["closest"])
            assert {option["size"] for option in facts["options"]} == set(PRESETS)


# -- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"task": "poetry"}, "task 'poetry': choose general, science, code, agents, languages"),
        ({"images": "hd"}, "images 'hd': choose none, coarse, normal, fine"),
        ({"context": 0}, "context 0: must be from 1 to 16,777,216"),
        ({"users": 0}, "users 0: must be from 1 to 4,096"),
        ({"speed": 0.0}, "speed 0.0: must be above 0"),
        ({"speed": float("nan")}, "speed nan: must be above 0"),
        ({"first": float("inf")}, "first inf: must be above 0"),
        ({"floors": {"glue": 1}}, "quality 'glue': no such score; known: mmlu-pro, gpqa"),
        ({"floors": {"mrcr": 101}}, "quality mrcr=101: must be from 0 to 100"),
        ({"floors": {"fleurs": 8}}, "quality fleurs=8: must be from 0 to 1"),
        ({"images": "fine", "context": 1000}, "context 1000: one picture, video and sound of this"),
    ],
)
def test_a_job_that_cannot_be_meant_is_refused(needs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Needs(**needs)
