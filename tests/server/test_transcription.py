"""Recordings to text through the engine."""

import base64
import io

import pytest
from PIL import Image
from tests.server.conftest import ScriptedLM, recording, run, serving, user

from gemsmith.engine.transcribe import Transcript
from gemsmith.media.transcript import Segment
from gemsmith.server.transcription import spell

URL = "/v1/audio/transcriptions"


@pytest.fixture
def hearing(sensing: ScriptedLM) -> ScriptedLM:
    sensing.script, sensing.asked = lambda _: "hello there<turn|>", []
    return sensing


def test_a_recording_is_written_down_in_each_form(hearing):
    async def scenario():
        async with serving(hearing) as (client, _):
            files = {"file": ("a.wav", recording(1.0))}

            async def ask(**fields):
                return await client.post(URL, files=files, data={"model": "gemma", **fields})

            assert (await ask()).json() == {"text": "hello there"}
            assert (await ask(response_format="text")).text == "hello there\n"
            assert (
                "00:00:00,000 --> 00:00:01,000\nhello there"
                in (await ask(response_format="srt")).text
            )
            verbose = (await ask(response_format="verbose_json")).json()
            assert verbose["segments"] == [
                {"id": 0, "start": 0.0, "end": 1.0, "text": "hello there"}
            ]
            for fields, param in (
                ({"response_format": "vtt"}, "response_format"),
                ({"language": "it"}, "language"),
                ({"stream": "true"}, "stream"),
            ):
                refused = await ask(**fields)
                assert refused.status_code == 400
                assert refused.json()["error"]["param"] == param
            broken = await client.post(
                URL, files={"file": ("a.wav", b"nonsense")}, data={"model": "gemma"}
            )
            assert broken.status_code == 400

    run(scenario)


def test_sound_and_pictures_in_a_conversation_are_counted(hearing):

    file = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(file, "png")
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    sound = base64.b64encode(recording(1.0)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "text", "text": "What is this?"},
    ]

    async def scenario():
        async with serving(hearing) as (client, _):
            costs = {}
            for budget in (70, 280):
                body = {"model": "gemma", "messages": user(content), "mm_budget": budget}
                answer = await client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                costs[budget] = answer.json()["usage"]["prompt_tokens_details"]
            assert 0 < costs[70]["image_tokens"] <= 70 < costs[280]["image_tokens"] <= 280
            assert costs[70]["audio_tokens"] == costs[280]["audio_tokens"] == 25

    run(scenario)


def test_what_went_wrong_is_said_in_json_too():
    made = Transcript((Segment(0.0, 1.0, "hello"),), ("0.0-1.0 s: it repeats itself",))
    problems = ["0.0-1.0 s: it repeats itself"]
    assert spell(made, "json") == {"text": "hello", "problems": problems}
    assert spell(made, "verbose_json")["problems"] == problems
