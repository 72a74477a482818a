"""How much a client may ask for, and who may ask.

Keys are kept as digests and compared in constant time; they are never logged. `Guard` stands before
every route: it checks the name that the server is asked under and the key, and counts the bytes of
the body as they come.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemsmith.errors import ConfigError
from gemsmith.server.errors import ApiError, speller
from gemsmith.server.page import is_page

OPEN = ("/health", "/ready")
"""What a load balancer asks without a key."""
MIN_KEY_CHARACTERS = 8
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]*)(:[0-9]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may ask for. Sizes of pictures are bounded where they are read."""

    body_bytes: int = 64 << 20
    """Of the whole body; base64 takes four bytes for three."""
    request_s: float = 600.0
    """From the arrival to the last token; the time in the queue counts."""
    media: int = 32
    """Images, sounds and videos."""
    choices: int = 16
    """`n`."""
    remote_media: bool = False
    """Whether http(s) addresses of media are fetched."""
    remote_bytes: int = 32 << 20
    remote_s: float = 20.0


class Keys:
    """Who may ask. Without keys everybody may."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        """Raises:
        ConfigError: a key that is too short to be one.
        """
        self._digests = []
        for key in keys:
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"an API key has {len(key)} characters: at least {MIN_KEY_CHARACTERS} are "
                    "needed, of printable ASCII without spaces around; make one with "
                    "`openssl rand -hex 24`"
                )
            self._digests.append(hashlib.sha256(key.encode()).digest())

    @classmethod
    def read(cls, path: Path | None, environment: str | None) -> "Keys":
        """Keys of a file, one a line (# begins a comment), and of a variable, between commas.

        Raises:
          ConfigError: a file without keys, or a bad key.
          OSError: no such file.
        """
        keys = [key.strip() for key in (environment or "").split(",") if key.strip()]
        if path is not None:
            lines = (line.strip() for line in path.read_text("utf-8").splitlines())
            found = [line for line in lines if line and not line.startswith("#")]
            if not found:
                raise ConfigError(f"{path} holds no API key; write one a line")
            keys += found
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def tenant(self, key: str | None) -> str | None:
        """Whose key it is, as a name that does not give the key away; None if nobody's."""
        if not self._digests:
            return ""
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).digest()
        found = None
        for known in self._digests:  # all of them, whichever it is
            if hmac.compare_digest(known, digest):
                found = hashlib.sha256(b"tenant" + known).hexdigest()[:12]
        return found


class Guard:
    """An ASGI layer: host names, keys and body sizes."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys, limits: Limits, hosts: Iterable[str] = ()
    ) -> None:
        """hosts: names and addresses that the server may be asked under; none: any.

        A page that had its own name point to this machine (DNS rebinding) would be let in by a
        browser, as the same origin; but it asks under that name.
        """
        self.app, self.keys, self.limits = app, keys, limits
        self.hosts = {host_of(host) for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = _header(scope, b"host")
        if self.hosts and host is not None and host_of(host) not in self.hosts:
            await _refuse(scope, send, ApiError(403, _NO_HOST.format(host=host[:100])))
            return
        tenant = self.keys.tenant(_key(scope))
        path = scope["path"]
        is_open = path in OPEN or is_page(path) or scope["method"] == "OPTIONS"
        if tenant is None and not is_open:
            await _refuse(scope, send, ApiError(401, _NO_KEY, code="invalid_api_key"))
            return
        scope.setdefault("state", {})["tenant"] = tenant or ""
        limit = self.limits.body_bytes
        too_large = ApiError(
            413, f"the body has more than the {limit} bytes that are read here; send less at once"
        )
        declared = _header(scope, b"content-length") or ""
        if declared.isdecimal() and int(declared) > limit:
            await _refuse(scope, send, too_large)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            # The body was cut off: whatever the application makes of that, this is the answer.
            if read <= limit:
                await send(message)

        with suppress(_TooLarge):
            await self.app(scope, counted, watched)
        if read > limit:
            await _refuse(scope, send, too_large)


class _TooLarge(Exception):
    pass


_NO_KEY = "no valid API key: send one as `Authorization: Bearer KEY` or as `x-api-key: KEY`"


_NO_HOST = (
    "nothing is served under the name {host!r}; ask at localhost or 127.0.0.1, or name it when the "
    "server is started: --allow-host NAME"
)


def host_of(header: str) -> str:
    """The name or address of a Host header, without its port; "" if it is none."""
    found = _HOST.fullmatch(header.strip().lower())
    return found[1].strip("[]").removesuffix(".") if found else ""


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return None


def _key(scope: Scope) -> str | None:
    bearer = _header(scope, b"authorization") or ""
    if bearer[:7].lower() == "bearer ":
        return bearer[7:].strip()
    return _header(scope, b"x-api-key")


async def _refuse(scope: Scope, send: Send, error: ApiError) -> None:
    body = json.dumps(speller(scope)(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
