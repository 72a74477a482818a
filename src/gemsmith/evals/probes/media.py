"""Pictures and sound: seen and heard at all, at the cost that was asked for, longer than a window.

They are made here, byte by byte; no library and no file is needed.
"""

import base64
import io
import math
import struct
import wave
import zlib
from typing import Any

from gemsmith.evals.conformance import probe
from gemsmith.evals.endpoint import Endpoint, Failed, Json, Reply, Skipped, need

RATE = 16_000


def picture(width: int, height: int) -> str:
    """A PNG of stripes, as a data URL."""
    row = b"".join(bytes((x % 256, (x // 16 * 40) % 256, 128)) for x in range(width))
    raw = b"".join(b"\0" + row for _ in range(height))

    def piece(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", zlib.compress(raw))
    return _data("image/png", made + piece(b"IEND", b""))


def tone(seconds: float) -> str:
    """A WAV file of a tone that comes and goes, in base64."""
    count = int(seconds * RATE)
    one = [
        int(9000 * math.sin(2 * math.pi * 330 * i / RATE) * (i % RATE > RATE // 3))
        for i in range(RATE)
    ]
    samples = struct.pack(f"<{RATE}h", *one) * (count // RATE + 1)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples[: 2 * count])
    return base64.b64encode(out.getvalue()).decode()


def _data(kind: str, made: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(made).decode()}"


def _message(*parts: Json) -> list[Json]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def _image(url: str, **more: Any) -> Json:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def _sound(data: str) -> Json:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def _costs(e: Endpoint, *parts: Json, **fields: Any) -> int:
    """Prompt tokens beyond the text's.

    Raises:
      Skipped: the model takes no such part.
    """
    try:
        reply: Reply = e.ask(_message(*parts), max_tokens=2, **fields)
    except Failed as error:
        # llama.cpp, for one, says 500 of a model without the towers.
        if "not support" in str(error):
            raise Skipped(str(error)) from None
        raise
    text = e.ask(_message(), max_tokens=2)
    return reply.count("prompt_tokens") - text.count("prompt_tokens")


def _sees(e: Endpoint) -> int:
    cost = _costs(e, _image(picture(512, 384)))
    need(cost >= 16, f"a picture costs {cost} tokens: it was not read")
    return cost


def _hears(e: Endpoint, seconds: float = 4) -> int:
    cost = _costs(e, _sound(tone(seconds)))
    need(cost >= 4, f"{seconds:g} s of sound cost {cost} tokens: they were not read")
    return cost


@probe("images", "a picture is read: it costs tokens")
def image_read(e: Endpoint) -> None:
    _sees(e)


@probe("images", "detail high costs more than detail low: the budget is honoured")
def image_detail(e: Endpoint) -> None:
    _sees(e)
    low, high = (_costs(e, _image(picture(1024, 768), detail=word)) for word in ("low", "high"))
    need(low < high, f"low costs {low} tokens, high {high}")


@probe("images", "a budget in tokens is honoured")
def image_budget(e: Endpoint) -> None:
    _sees(e)
    url = picture(1024, 768)
    for word in (lambda n: {"mm_budget": n}, lambda n: {"mm_processor_kwargs": _soft(n)}):
        try:
            low, high = (_costs(e, _image(url), **word(n)) for n in (70, 560))
        except Skipped:
            continue
        if low < high:
            need(low <= 80 and high <= 580, f"a budget of 70 costs {low}, one of 560 {high}")
            return
    raise Skipped("neither mm_budget nor mm_processor_kwargs changes what a picture costs")


def _soft(count: int) -> Json:
    return {"max_soft_tokens": count}


@probe("images", "two pictures cost twice what one costs")
def image_two(e: Endpoint) -> None:
    one = _sees(e)
    two = _costs(e, *[_image(picture(512, 384))] * 2)
    need(abs(two - 2 * one) <= 8, f"one costs {one} tokens, two {two}")


@probe("images", "a picture that is known already costs and says the same")
def image_again(e: Endpoint) -> None:
    _sees(e)
    message = _message(_image(picture(512, 384)))
    one, other = (e.ask(message, max_tokens=12) for _ in range(2))
    need(one.content == other.content, f"{one.content!r}, then {other.content!r}")


@probe("images", "a picture that is none is refused, with status 4xx")
def image_broken(e: Endpoint) -> None:
    for url in (_data("image/png", b"\x89PNG\r\n\x1a\nno"), "data:image/png;base64,???", "nowhere"):
        answer = e.chat(_message(_image(url)))
        need(400 <= answer.status < 500, f"status {answer.status} for {url[:40]}")


@probe("images", "a file of this machine is never opened for a client")
def image_local(e: Endpoint) -> None:
    for url in ("file:///etc/hostname", "/etc/hostname"):
        answer = e.chat(_message(_image(url)))
        need(400 <= answer.status < 500, f"status {answer.status} for {url}")


@probe("audio", "sound is read: it costs tokens")
def audio_read(e: Endpoint) -> None:
    _hears(e)


@probe("audio", "65 s cost more than 29 s: what is longer than a window is not cut in silence")
def audio_long(e: Endpoint) -> None:
    _hears(e)
    short = _hears(e, 29)
    answer = e.chat(_message(_sound(tone(65))), max_tokens=2)
    if 400 <= answer.status < 500:
        raise Skipped(f"65 s are refused, and said so: {answer.refusal()}")
    long = _hears(e, 65)
    need(long > 1.8 * short, f"29 s cost {short} tokens, 65 s {long}")


@probe("audio", "sound that is none is refused, with status 4xx")
def audio_broken(e: Endpoint) -> None:
    answer = e.chat(_message(_sound(base64.b64encode(b"RIFFnothing").decode())))
    need(400 <= answer.status < 500, f"status {answer.status}")


@probe("audio", "a recording longer than a window is transcribed")
def audio_transcribed(e: Endpoint) -> None:
    file = {"file": ("tone.wav", base64.b64decode(tone(40)), "audio/wav")}
    path, form = "/v1/audio/transcriptions", {"model": e.model}
    with e.opened("POST", path, form, files=file) as response:
        e.last = body = response.read()
    if response.status_code in (400, 404, 405, 501):
        raise Skipped(f"refused, status {response.status_code}: {body[:200].decode('utf-8')!r}")
    need(response.status_code == 200, f"status {response.status_code}")
    need(b'"text"' in body, "no text came")
