"""Media of a request: the gate that every one of them passes, and fetching what is elsewhere.

Clients give bytes: base64 and data URLs. A path of this machine is never opened for them. Addresses
of the network are fetched only where the server was told to, and then: http or https alone; the
name is resolved once, every address it has must be public, and the connection goes to what was
resolved; no redirect is followed; bytes and seconds are bounded.
"""

import asyncio
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from gemsmith.server.errors import ApiError, refused
from gemsmith.server.limits import Limits

_FORMAT = re.compile(r"[a-z0-9.+-]{1,20}")
_VIDEO_OPTIONS = ("frames", "fps", "tokens", "budget")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
CHUNK = 1 << 16


async def gate(messages: list[dict[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """The messages with each part rebuilt from what is known of it, media as bytes or data URLs.

    Raises:
      ApiError: a part of another kind, or a medium that is not given as bytes.
    """
    passed = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                await _part(part, f"messages.{index}.content.{place}", limits)
                for place, part in enumerate(content)
            ]
            message = message | {"content": parts}
        passed.append(message)
    return passed


async def _part(part: Any, where: str, limits: Limits) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise refused(where, "must be an object with a type")
    kind = part.get("type")
    given = part.get(kind) if isinstance(kind, str) else None
    match kind:
        case "text":
            if not isinstance(part.get("text"), str):
                raise refused(f"{where}.text", "must be a string")
            return {"type": "text", "text": part["text"]}
        case "image_url":
            given = {"url": given} if isinstance(given, str) else given
            image: dict[str, Any] = {"url": await _source(given, f"{where}.image_url", limits)}
            if isinstance(given, Mapping) and given.get("detail") is not None:
                image["detail"] = given["detail"]
            made = {"type": "image_url", "image_url": image}
            return made if part.get("budget") is None else made | {"budget": part["budget"]}
        case "input_audio":
            given = given if isinstance(given, Mapping) else {}
            data, form = given.get("data"), given.get("format") or "wav"
            if (
                not isinstance(data, str)
                or not isinstance(form, str)
                or not _FORMAT.fullmatch(form)
            ):
                raise refused(f"{where}.input_audio", "must have data (base64) and a format")
            return {"type": "audio", "audio": f"data:audio/{form};base64,{data}"}
        case "audio_url":
            return {"type": "audio", "audio": await _source(given, f"{where}.audio_url", limits)}
        case "video_url":
            url = await _source(given, f"{where}.video_url", limits)
            options = {name: part[name] for name in _VIDEO_OPTIONS if part.get(name) is not None}
            return {"type": "video", "video": url, **options}
    known = "text, image_url, input_audio, audio_url or video_url"
    raise refused(f"{where}.type", f"{kind!r} is not known here; use {known}")


async def _source(given: Any, where: str, limits: Limits) -> str | bytes:
    url = given.get("url") if isinstance(given, Mapping) else None
    if not isinstance(url, str):
        raise refused(where, "must be an object with a url")
    if url[:5].lower() == "data:":
        return url
    if not url.isascii() or url.partition(":")[0].lower() not in ("http", "https"):
        raise refused(where, "must be a data URL with base64, such as data:image/png;base64,...")
    if not limits.remote_media:
        raise refused(
            where,
            "addresses of the network are not fetched here; send the bytes as a data URL, or "
            "serve with --remote-media",
        )
    try:
        return await asyncio.to_thread(fetch, url, limits)
    except ApiError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise refused(where, f"could not be fetched ({type(error).__name__})") from None


def is_public(address: str) -> bool:
    """Whether an address belongs to no private, local or otherwise special network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside:
            return is_public(str(inside))
    return ip.is_global and not ip.is_multicast


def fetch(url: str, limits: Limits) -> bytes:
    """What stands at a public address. Blocks; for a thread of its own.

    Raises:
      ApiError: an address that is not public, a redirect, another status than 200, too much, too
        slow. OSError, ValueError, HTTPException: of the network.
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme.lower() == "https" else 80)
    if not host or parts.username is not None:
        raise refused("url", "must have a host, and no user name")
    until = time.monotonic() + limits.remote_s
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise refused("url", f"{host} is not a public address")
    connection = _To(addresses[0], host, port, parts.scheme.lower() == "https", limits.remote_s)
    # A socket's timeout is that of one read: headers that come a byte at a time would never end.
    watch = threading.Timer(until - time.monotonic(), connection.cut)
    watch.daemon = True
    watch.start()
    body = b""
    try:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"User-Agent": "gemsmith", "Accept": "*/*"})
        with connection.getresponse() as answer:
            body = _body(answer, host, limits)
    except (OSError, http.client.HTTPException):
        if time.monotonic() < until:
            raise
    finally:
        watch.cancel()
        connection.close()
    if time.monotonic() >= until:
        raise refused("url", f"took more than {limits.remote_s:g} s")
    return body


def _body(answer: http.client.HTTPResponse, host: str, limits: Limits) -> bytes:
    if 300 <= answer.status < 400:
        raise refused("url", "redirects are not followed; give the final address")
    if answer.status != 200:
        raise refused("url", f"{host} answered with status {answer.status}")
    body = bytearray()
    while chunk := answer.read1(CHUNK):
        body += chunk
        if len(body) > limits.remote_bytes:
            raise refused("url", f"more than the {limits.remote_bytes} bytes that are fetched")
    return bytes(body)


class _To(http.client.HTTPConnection):
    """A connection to an address that was resolved before; TLS is checked against the name."""

    def __init__(self, address: str, host: str, port: int, tls: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self._address, self._tls = address, tls
        self._open: socket.socket | None = None  # `sock` is forgotten while the body comes

    def connect(self) -> None:
        self.sock = self._open = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            self.sock = self._open = ssl.create_default_context().wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock.do_handshake()

    def cut(self) -> None:
        """End whatever another thread waits for."""
        if self._open is not None:
            with contextlib.suppress(OSError):
                self._open.shutdown(socket.SHUT_RDWR)
