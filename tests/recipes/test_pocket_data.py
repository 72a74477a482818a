"""The conversations pocket learns from: deterministic, derivable, split, and short enough."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes.pocket import build_data, build_heldout, films, letters, pictures, speech, tokenizer
from recipes.pocket.domains import HELDOUT_TOOLS, TOOLS
from recipes.pocket.generator import (
    KINDS,
    Conversation,
    conversations,
    generate,
    kin,
    tool_conversation,
)
from recipes.pocket.schemas import POOLS
from recipes.pocket.tasks import DESK, NO_TOOL
from recipes.pocket.train import POCKET
from recipes.pocket.words import Draw

from gemsmith.cli.desk import Desk
from gemsmith.engine import media
from gemsmith.media.video import load_video
from gemsmith.text import chat
from gemsmith.text.tokenizer import Tokenizer
from gemsmith.train.data import TokenSet, make_batch
from gemsmith.train.media import pcm

COUNT = 300
NOTHING: dict[str, Any] = {"properties": {}}


@pytest.fixture(scope="module")
def train() -> list[Conversation]:
    return list(conversations("train", 0, 0, COUNT))


@pytest.fixture(scope="module")
def heldout() -> list[Conversation]:
    return list(conversations("heldout", 0, 0, COUNT))


@pytest.fixture(scope="module")
def both(train: list[Conversation], heldout: list[Conversation]) -> list[Conversation]:
    return train + heldout + [kin("train", 0, index) for index in range(100)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(tokenizer.train(tokenizer.sample_texts(600)), path)
    return path


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def calls(talk: Conversation) -> Iterator[dict[str, Any]]:
    for message in talk.messages:
        for call in message.get("tool_calls", ()):
            yield call["function"]


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def matches(value: Any, schema: dict[str, Any]) -> bool:
    match schema["type"]:
        case "object":
            known = schema["properties"]
            return (set(schema.get("required", ())) <= set(value) <= set(known)) and all(
                matches(v, known[k]) for k, v in value.items()
            )
        case "array":
            return isinstance(value, list) and all(matches(v, schema["items"]) for v in value)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str) and value in schema.get("enum", [value])


def test_forty_tools_in_training_and_none_of_them_held_out() -> None:
    assert len(TOOLS) >= 40
    assert not {t.name for t in TOOLS} & {t.name for t in HELDOUT_TOOLS}


def test_same_seed_and_index_make_the_same_conversation(train: list[Conversation]) -> None:
    assert [generate("train", 0, i) for i in range(20)] == train[:20]
    assert generate("train", 1, 0) != train[0]


def test_calls_match_the_declared_schema(both: list[Conversation]) -> None:
    for talk in both:
        declared = {
            t["function"]["name"]: t["function"].get("parameters") for t in talk.tools or ()
        }
        assert len(declared) == len(talk.tools or ())
        for call in calls(talk):
            assert matches(call["arguments"], declared[call["name"]]), call


@pytest.mark.parametrize("kind", ["choices", "which"])
def test_only_the_description_tells_which_opaque_tool_is_meant(kind: str) -> None:
    seen = 0
    for index in range(60):
        talk = generate("train", 0, index, kind=kind)
        texts = {t["function"]["name"]: t["function"]["description"] for t in talk.tools or ()}
        for name, text in texts.items():
            assert name.lower() not in text.lower().split()
        meant = {n: re.findall(r"(?:Can|Used to) (\w+) the (\w+)$", t) for n, t in texts.items()}
        for asked, reply in zip(talk.messages, talk.messages[1:], strict=False):
            called = [c["function"]["name"] for c in reply.get("tool_calls", ())]
            name = called[0] if called else reply["content"]
            if asked["role"] == "user" and meant.get(name):
                said = set(re.findall(r"\w+", asked["content"]))
                assert [n for n, m in meant.items() if m and set(m[0]) <= said] == [name]
                seen += 1
    assert seen > 50


def test_tools_near_each_other_are_declared_together_and_asked_for_in_more_ways() -> None:
    places, asked = {t.name: i for i, t in enumerate(TOOLS)}, ""
    desk = near = 0
    for index in range(100):
        talk = kin("train", 0, index)
        assert 3 <= len(talk.tools or ()) <= 7
        asked += "\n".join(m["content"] for m in talk.messages if m["role"] == "user") + "\n"
        mine = {t["function"]["name"] for t in talk.tools or ()}
        if mine <= set(DESK):
            desk += 1
        elif mine <= set(places) and all(check.category != "chained" for check in talk.checks):
            near += 1
            for i in (places[name] for name in mine):
                gaps = [abs(i - places[name]) for name in mine if places[name] != i]
                assert min(min(gap, len(TOOLS) - gap) for gap in gaps) <= 4, mine
    assert min(desk, near) > 5
    assert re.search(r"^Which files are in [^ ]+\?$", asked, re.MULTILINE)


def test_the_desk_of_training_is_that_of_the_package(tmp_path: Path) -> None:
    declared = Desk(tmp_path).toolbox().declarations
    assert {tool["function"]["name"] for tool in declared} == set(DESK)


def test_nothing_found_is_said() -> None:
    """Days and folders are empty too, and the reply names none."""
    found = 0
    for index in range(300):
        talk = kin("train", 0, index)
        found += sum("(0): none." in m["content"] for m in talk.messages)
        assert not any("(0): ." in m["content"] for m in talk.messages)
    assert found > 3


def test_every_argument_stands_in_the_text_before_it(both: list[Conversation]) -> None:
    for talk in both:
        seen = ""
        for message in talk.messages:
            for call in message.get("tool_calls", ()):
                for leaf in leaves(call["function"]["arguments"]):
                    assert isinstance(leaf, bool) or str(leaf) in seen, (leaf, seen)
            if message["role"] != "system":
                seen += message["content"] + str(message.get("tool_responses", ""))


def test_checks_expect_what_the_conversation_does(both: list[Conversation]) -> None:
    for talk in both:
        for check in talk.checks:
            reply, wanted = talk.messages[check.upto], check.expected
            match wanted["type"]:
                case "calls":
                    assert [c["function"] for c in reply["tool_calls"]] == wanted["calls"]
                case "json":
                    assert json.loads(reply["content"]) == wanted["value"]
                case "no_tool":
                    assert reply["content"] == NO_TOOL
                case _:
                    assert str(wanted["value"]) in reply["content"]


@pytest.mark.parametrize("kind", ["direct_arithmetic", "thinking_arithmetic"])
def test_arithmetic_answers_are_right(kind: str) -> None:
    symbols = {"plus": "+", "minus": "-", "times": "*", "and": "+"}
    for index in range(150):
        talk = generate("train", 3, index, kind=kind)
        for check in talk.checks:
            question = talk.messages[check.upto - 1]["content"]
            numbers = [int(n) for n in re.findall(r"\d+", question)]
            if len(numbers) == 3:
                last = -numbers[2] if re.search(r"\b(sells|loses)\b", question) else numbers[2]
                right = numbers[0] + numbers[1] + last
            else:
                sign = re.search(r"[-+*]|plus|minus|times|and", question)
                assert sign
                a, b = numbers
                symbol = symbols.get(sign[0], sign[0])
                right = {"+": a + b, "-": a - b, "*": a * b}[symbol]
            assert check.expected["value"] == right, question


def test_every_worked_step_is_true() -> None:
    steps = 0
    for index in range(150):
        talk = generate("train", 3, index, kind="thinking_arithmetic")
        thought = talk.messages[-1]["reasoning"]
        for equation in re.findall(r"[\d+*-]+(?:=[\d+*-]+)+", thought):
            sides = [_value(side) for side in equation.split("=")]
            assert len(set(sides)) == 1, equation
            steps += 1
        assert re.findall(r"^=(\d+)$", thought, re.M)[-1] in talk.messages[-1]["content"]
    assert steps > 300


def _value(text: str) -> int:
    """A sum or product of literals; a borrowed 10 is written as a leading 1."""
    tree = ast.parse(re.sub(r"\b0+(?=\d)", "", text), mode="eval")
    return eval(compile(tree, "step", "eval"), {"__builtins__": {}})


def test_held_out_values_do_not_occur_in_training(
    train: list[Conversation], heldout: list[Conversation]
) -> None:
    shared = {str(n) for n in range(10)} | {str(v) for pool in POOLS.values() for v in pool}
    sides = []
    for talks in (train, heldout):
        values: set[str] = set()
        for talk in talks:
            enums = {
                e
                for t in talk.tools or ()
                for p in t["function"].get("parameters", NOTHING)["properties"].values()
                for e in p.get("enum", ())
            }
            for call in calls(talk):
                for leaf in leaves(call["arguments"]):
                    if not isinstance(leaf, bool) and str(leaf) not in enums | shared:
                        values.add(str(leaf))
        sides.append(values)
    common = sides[0] & sides[1]
    # Week days, clock hours and units are closed classes; results handed on are not requests.
    closed = re.compile(r"[A-Z][a-z]+day|today|tomorrow|\d+ [ap]m|[a-z]+|\d{1,3}(\.\d+)?|-\d")
    assert not {v for v in common if not closed.fullmatch(v)}
    assert len(sides[1]) > 100


def test_held_out_schemas_do_not_occur_in_training(
    train: list[Conversation], heldout: list[Conversation]
) -> None:
    canonical = {t.name for t in TOOLS}
    names = [
        {t["function"]["name"] for talk in talks for t in talk.tools or ()} - canonical
        for talks in (train, heldout)
    ]
    assert not names[0] & names[1]
    assert min(map(len, names)) > 100
    assert {t.name for t in TOOLS} & {c["name"] for talk in train for c in calls(talk)}


def best_tools(text: str) -> set[str]:
    """Tools one of whose request forms explains most of the text."""
    scores: dict[str, int] = {}
    for tool in TOOLS:
        for form in (*tool.requests, tool.many.replace("{}", "{x}")):
            parts = re.split(r"\{\w+\}", form.replace("{opts}", "").rstrip(".?"))
            pattern = ".+".join(map(re.escape, parts)).replace(r"\ on\ .+", r"(?:\ on)?\ .+")
            if form and re.search(pattern, text, re.IGNORECASE):
                scores[tool.name] = max(scores.get(tool.name, 0), sum(map(len, parts)))
    return {name for name, score in scores.items() if score == max(scores.values())}


@pytest.mark.parametrize(("step", "fits"), [("single", True), ("no_tool", False)])
def test_a_request_fits_the_called_tool_and_no_declared_one_if_none_is_called(
    step: str, fits: bool
) -> None:
    groups = {t.name: t.group for t in TOOLS}
    texts = {text: t.name for t in TOOLS for text in t.texts}
    assert len(texts) == sum(len(t.texts) for t in TOOLS)
    for index in range(200):
        talk = tool_conversation(Draw("train", f"fit/{index}"), [step], "replaced")
        request = next(m["content"] for m in talk.messages if m["role"] == "user")
        declared = {
            t["function"]["name"]: texts[t["function"]["description"]] for t in talk.tools or ()
        }
        best = best_tools(request)
        if fits:
            assert {declared[c["name"]] for c in calls(talk)} <= best, request
        else:
            assert not {groups[n] for n in best} & {groups[n] for n in declared.values()}, request


def test_conversations_fit_in_1024_tokens(words: Tokenizer, train: list[Conversation]) -> None:
    lengths = [len(build_data.encode(words, talk)) for talk in train]
    assert sum(n <= build_data.MAX_TOKENS for n in lengths) >= 0.98 * len(lengths)
    assert sum(lengths) / len(lengths) < 360


def test_mask_covers_what_the_model_says_and_nothing_else(
    words: Tokenizer, train: list[Conversation]
) -> None:
    for talk in train[:100]:
        ids = build_data.encode(words, talk)
        mask = build_data.loss_mask(words, ids)
        learned = words.decode([i for i, m in zip(ids, mask, strict=True) if m])
        rest = words.decode([i for i, m in zip(ids, mask, strict=True) if not m])
        assert "response:" not in learned.replace("<|tool_response>", "")
        assert "declaration:" not in learned
        assert "<tool_response|>" not in learned
        assert "<|tool_call>" not in rest
        assert "thought\n" not in rest
        for message in talk.messages:
            if message["role"] == "assistant" and message["content"]:
                assert message["content"] in learned


def test_what_is_chosen_weighs_more_than_what_is_copied(
    words: Tokenizer, train: list[Conversation]
) -> None:
    begun: set[str] = set()
    for talk in (t for t in train[:200] if t.tools):
        ids = build_data.encode(words, talk)
        mask = build_data.loss_mask(words, ids)
        weighed = mask.copy()
        build_data.weigh_decisions(words, ids, weighed)
        assert ((weighed > 0) == (mask > 0)).all()
        heavy = [(int(weighed[i]), i) for i in np.flatnonzero(weighed > 1)]
        ten = [i for weight, i in heavy if weight == build_data.DECISION_WEIGHT]
        turns, made = words.decode(ids).count("<|turn>model\n"), list(calls(talk))
        assert len(ten) == turns + len(made)
        begun |= {words.decode([ids[i]]) for i in ten}
        named = [i for i in ten if words.decode(ids[i - 2 : i]).endswith("call:")]
        for i, call in zip(named, made, strict=True):
            assert call["name"].startswith(words.decode([ids[i]]))
        four = [words.decode([ids[i]]) for weight, i in heavy if weight == build_data.VALUE_WEIGHT]
        plain = [v for c in made for v in c["arguments"].values() if isinstance(v, str | int)]
        assert len(four) >= len(plain)
    assert {"<|tool_call>", "None", "I"} <= begun


def test_rendered_text_survives_the_tokenizer(words: Tokenizer, train: list[Conversation]) -> None:
    for talk in train[:50]:
        text = chat.render(
            talk.messages, talk.tools, variant="edge", enable_thinking=talk.enable_thinking
        )
        assert words.decode(words.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["zażółć 漢字 🙂", "  two  spaces\n\n\tend ", "\x00\x7f", "e\u0301"]
)
def test_any_unicode_survives_the_tokenizer(words: Tokenizer, text: str) -> None:
    assert words.decode(words.encode(text)) == text


@pytest.mark.parametrize("config", [None, {"model_type": "gemma4"}, {"model_type": "gemma4_text"}])
def test_transformers_reads_the_same_tokenizer(
    folder: Path, words: Tokenizer, train: list[Conversation], config: dict[str, str] | None
) -> None:
    transformers = pytest.importorskip("transformers")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for talk in train[:20]:
        ids = build_data.encode(words, talk)
        text = words.decode(ids)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text


def test_special_tokens_have_gemma_4_ids(words: Tokenizer) -> None:
    assert words.vocab_size == tokenizer.VOCAB_SIZE
    assert {i: words.token(i) for i in tokenizer.SPECIALS} == tokenizer.SPECIALS
    top = range(tokenizer.VOCAB_SIZE - len(tokenizer.MEDIA), tokenizer.VOCAB_SIZE)
    assert tuple(map(words.token, top)) == tokenizer.MEDIA


def test_a_name_is_the_same_tokens_in_a_request_and_in_a_call(words: Tokenizer) -> None:
    name = words.encode("Brimvolka")
    for text in ("Call Brimvolka.", '<|"|>Brimvolka<|"|>', '{"name":"Brimvolka"}'):
        ids = words.encode(text)
        assert any(ids[i : i + len(name)] == name for i in range(len(ids)))


def test_every_kind_is_made(train: list[Conversation]) -> None:
    assert {talk.kind.split("/")[0] for talk in train} == set(KINDS)


def test_held_out_items_are_complete_prompts(words: Tokenizer) -> None:
    for category in build_heldout.COUNTS:
        made = build_heldout.item(category, 0, words)
        assert made == build_heldout.item(category, 0, words)
        last = made["messages"][-1]
        assert last["role"] in ("user", "tool") or last["tool_responses"]
        assert made["category"] == category
        for call in made["expected"].get("calls", ()):
            assert call["name"] in {t["function"]["name"] for t in made["tools"]}


def test_a_needle_lies_four_windows_before_the_question(words: Tokenizer) -> None:
    for number in range(3):
        made = build_heldout.item("needle_4x", number, words)
        text = made["messages"][-1]["content"] + "<turn|>\n<|turn>model\n"
        _, after = text.split(f"{made['expected']['value']}.", 1)
        assert len(words.encode(after)) >= 4 * build_heldout.WINDOW


def built(folder: Path, out: Path, shares: dict[str, float]) -> TokenSet:
    build_data.build(folder, out, start=0, count=6, workers=1, shares=shares)
    return TokenSet(out, "train")


def prompt(words: Tokenizer, talk: Conversation, budget: int) -> media.Prompt:
    """What inference makes of a whole conversation."""
    runs = media.collect(talk.messages, POCKET, image_budget=budget)
    return media.expand(build_data.encode(words, talk), runs, POCKET, words)


def test_a_set_of_text_is_what_the_tokenizer_makes(
    folder: Path, words: Tokenizer, train: list[Conversation], tmp_path: Path
) -> None:
    data = built(folder, tmp_path, build_data.MIXTURES["text"])
    assert data.media is None
    assert data.ids.tolist() == [i for talk in train[:6] for i in build_data.encode(words, talk)]


@pytest.mark.parametrize("source", ["picture", "sheet"])
def test_pictures_of_a_set_are_what_inference_makes(
    folder: Path, words: Tokenizer, tmp_path: Path, source: str
) -> None:
    data = built(folder, tmp_path, {source: 1.0})
    for c in range(6):
        talk = build_data.GENERATORS[source]("train", 0, c)
        assert isinstance(talk, pictures.Picture)
        wanted = prompt(words, talk, talk.budget)
        n = len(wanted.ids)
        batch = make_batch(data, [c], batch_tokens=n)
        [span], soft = wanted.spans, batch.soft
        assert soft is not None
        assert batch.ids_T.tolist() == wanted.ids
        assert soft.at_S.tolist() == list(range(span.start, span.stop))
        assert np.array_equal(soft.values_PC, span.run.features)
        assert np.array_equal(soft.positions_P2, span.run.places)


def test_sheets_are_read_whole_at_few_soft_tokens(words: Tokenizer) -> None:
    for c in range(6):
        talk = letters.generate("train", 0, c)
        assert prompt(words, talk, talk.budget).soft_tokens("image") <= letters.BUDGET
        written = "".join(letter for letter, *_ in talk.image.info["letters"])
        reply = talk.messages[-1]["content"]
        assert reply.replace("\n", "").replace(" ", "") == written.replace(" ", "")


def test_digits_of_places_weigh_more(folder: Path, words: Tokenizer, tmp_path: Path) -> None:
    data = built(folder, tmp_path, {"look": 1.0})
    assert data.media is not None
    heavy = data.mask == build_data.PLACE_WEIGHT
    assert set(data.mask.tolist()) == {0, 1, build_data.PLACE_WEIGHT}
    placed = {i for i, name in enumerate(data.kind_names) if name in build_data.PLACED}
    assert set(np.repeat(data.kinds, data.lengths)[heavy].tolist()) <= placed
    assert set(words.decode(data.ids[heavy].tolist())) <= set("0123456789")
    for image in ("sheet", "look"):
        assert build_data.GENERATORS[image]("heldout", 0, 1) == build_data.GENERATORS[image](
            "heldout", 0, 1
        )


def test_frames_of_a_set_are_what_inference_makes(
    folder: Path, words: Tokenizer, tmp_path: Path
) -> None:
    data = built(folder, tmp_path, {"film": 1.0})
    for c in range(6):
        wanted = prompt(words, films.generate("train", 0, c), films.BUDGET)
        soft = make_batch(data, [c], batch_tokens=len(wanted.ids)).soft
        assert soft is not None
        assert len(wanted.spans) >= 2
        spans = wanted.spans
        assert soft.at_S.tolist() == [i for s in spans for i in range(s.start, s.stop)]
        assert np.array_equal(soft.values_PC, np.concatenate([s.run.features for s in spans]))


def test_what_a_film_shows_is_told_in_order() -> None:
    for index in range(40):
        talk = films.generate("train", 0, index)
        assert talk == films.generate("train", 0, index)
        for check in talk.checks:
            reply = talk.messages[check.upto]["content"]
            assert check.expected["value"] in reply
        reply = " ".join(m["content"] for m in talk.messages if m["role"] == "assistant")
        shown = load_video(talk.messages[0]["content"][0]["video"], frames=4).stamps
        assert set(re.findall(r"00:\d\d", reply)) <= set(shown)


@pytest.mark.skipif(not speech.available(), reason="espeak-ng is not installed")
def test_sounds_of_a_set_are_what_inference_makes(
    folder: Path, words: Tokenizer, tmp_path: Path
) -> None:
    data = built(folder, tmp_path, {"speech": 1.0})
    for c in range(6):
        talk = speech.generate("train", 0, c)
        for message in talk.messages:
            for part in message["content"] if message["role"] == "user" else ():
                if part["type"] == "audio":  # in 16 bits, as a WAV file would be
                    part["audio"] = np.frombuffer(pcm(part["audio"]), "<i2")
        wanted = prompt(words, talk, 0)
        batch = make_batch(data, [c], batch_tokens=len(wanted.ids))
        assert batch.soft is not None
        assert batch.ids_T.tolist() == wanted.ids
        for (mel, valid), span in zip(batch.soft.clips, wanted.spans, strict=True):
            assert np.array_equal(valid, span.run.places)
            assert np.array_equal(mel, span.run.features)


@pytest.mark.skipif(not speech.available(), reason="espeak-ng is not installed")
def test_a_mixed_set_has_every_kind(folder: Path, tmp_path: Path) -> None:
    build_data.build(
        folder, tmp_path, start=0, count=40, workers=1, shares=build_data.MIXTURES["media"]
    )
    data = TokenSet(tmp_path, "train")
    groups = [name.split("/")[0] for name in data.kind_names]
    assert {"picture", "speech"} < set(groups)
    assert set(groups) & set(KINDS)
