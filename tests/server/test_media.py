"""The gate for media: bytes pass, paths never, addresses of the network only if public."""

import asyncio
import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from gemsmith.server import media
from gemsmith.server.errors import ApiError
from gemsmith.server.limits import Limits

REMOTE = Limits(remote_media=True, remote_bytes=1000, remote_s=2)


def passed(part: dict[str, Any], limits: Limits = REMOTE) -> dict[str, Any]:
    messages = [{"role": "user", "content": [part]}]
    [message] = asyncio.run(media.gate(messages, limits))
    return message["content"][0]


def image(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_parts_are_rebuilt_from_what_is_known():
    url = "data:image/png;base64,eA=="
    assert passed(image(url, detail="low", path="/etc/passwd") | {"path": "/x", "budget": 70}) == {
        "type": "image_url",
        "image_url": {"url": url, "detail": "low"},
        "budget": 70,
    }
    sound = {"type": "input_audio", "input_audio": {"data": "eA==", "format": "mp3"}}
    assert passed(sound) == {"type": "audio", "audio": "data:audio/mp3;base64,eA=="}
    film = {"type": "video_url", "video_url": {"url": url}, "fps": 1, "audio": "/x"}
    assert passed(film) == {"type": "video", "video": url, "fps": 1}
    assert passed({"type": "text", "text": "x", "image": "/x"}) == {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "/etc/passwd"},
        {"type": "audio", "audio": "/etc/passwd"},
        {"type": "video", "path": "/etc/passwd"},
        image("/etc/passwd"),
        image("file:///etc/passwd"),
        image("ftp://example.org/x"),
        image("http://["),
        image(None),
        image(["x"]),
        {"type": "input_audio", "input_audio": {"data": "eA==", "format": "../x"}},
        {"type": "input_audio", "input_audio": "/etc/passwd"},
        {"type": "text", "text": None},
        {"type": ["text"]},
        {},
    ],
)
def test_what_is_not_given_as_bytes_is_refused(part):
    with pytest.raises(ApiError, match=r"messages\.0\.content\.0"):
        passed(part)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "ff02::1",
    ],
)
def test_special_addresses_are_not_public(address):
    assert not media.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are(address):
    assert media.is_public(address)


class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(302 if "moved" in self.path else 200)
        self.send_header("location", "http://127.0.0.1/secret")
        self.end_headers()
        self.wfile.write(b"x" * (5000 if "large" in self.path else 10))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def site() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_an_address_inside_is_refused_however_it_is_written(monkeypatch):
    with site() as url:
        port = url.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"):
            with pytest.raises(ApiError, match=r"not a public address|could not be fetched"):
                passed(image(f"http://{host}:{port}/x"))
        # One private address among those of a name is one too many.
        both = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("127.0.0.1", 80))]
        monkeypatch.setattr(media.socket, "getaddrinfo", lambda *_, **__: both)
        with pytest.raises(ApiError, match="not a public address"):
            passed(image(f"http://example.org:{port}/x"))


def test_what_is_fetched_is_bounded_and_stays_where_it_was_resolved(monkeypatch):
    with site() as url:
        monkeypatch.setattr(media, "is_public", lambda _: True)
        asked: list[str] = []
        resolve = media.socket.getaddrinfo

        def once(host: str, *args: Any, **more: Any) -> Any:
            asked.append(host)
            return resolve("127.0.0.1" if host == "name.example" else host, *args, **more)

        monkeypatch.setattr(media.socket, "getaddrinfo", once)
        named = url.replace("127.0.0.1", "name.example")
        assert passed(image(f"{named}/x"))["image_url"]["url"] == b"x" * 10
        # The name was asked for once; then only the address.
        assert asked.count("name.example") == 1
        with pytest.raises(ApiError, match="redirects are not followed"):
            passed(image(f"{url}/moved"))
        with pytest.raises(ApiError, match="more than the 1000 bytes"):
            passed(image(f"{url}/large"))
        with pytest.raises(ApiError, match="no user name"):
            passed(image("http://me:pass@name.example/x"))
        with pytest.raises(ApiError, match="not fetched here"):
            passed(image(f"{url}/x"), replace(REMOTE, remote_media=False))
    with pytest.raises(ApiError, match="could not be fetched"):
        passed(image(f"{url}/x"))


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\nx: ", b"HTTP/1.0 200 OK\r\n\r\n"])
def test_an_answer_that_drips_ends_when_its_time_is_up(monkeypatch, answer):
    monkeypatch.setattr(media, "is_public", lambda _: True)
    over = threading.Event()

    def drip() -> None:
        with listening.accept()[0] as peer, contextlib.suppress(OSError):
            peer.sendall(answer)
            for _ in range(200):  # ten seconds, and then a whole answer
                if over.wait(0.05):
                    return
                peer.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x"
        try:
            with pytest.raises(ApiError, match=r"took more than 0\.3 s"):
                media.fetch(url, replace(REMOTE, remote_s=0.3))
            assert thread.is_alive(), "it was ended, not waited for"
        finally:
            over.set()
            thread.join()
