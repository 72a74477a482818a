"""A client of a server on this machine, in the standard library alone.

It writes and reads sockets itself: a client that parses every chunk as it comes would take more
from the servers' cores than a small model does. What it read is parsed once the answer is whole.

What it is not: a client for anything else. An answer that is cut off is an error here.
"""

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got, and when, in seconds of `time.perf_counter`."""

    status: int
    body: bytes
    began: float
    first: float
    """When the first event of a stream was there; of anything else, when all was."""
    ended: float

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def events(self) -> list[dict[str, Any]]:
        """Of a stream."""
        lines = (line[6:] for line in self.body.splitlines() if line.startswith(b"data: "))
        return [json.loads(line) for line in lines if line != b"[DONE]"]


async def ask(
    port: int,
    path: str,
    body: dict[str, Any] | bytes | None = None,
    *,
    kind: str = "application/json",
    most: int | None = None,
) -> Answer:
    """POST of a body, GET without one, to a server on this machine.

    most: bytes after which the connection is closed, whatever is still to come.

    Raises:
      OSError: nobody answers, or the answer is cut off, by `most` too.
    """
    sent = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    head = (
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(sent)}\r\nConnection: close\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}\r\n".encode() + sent)
        got, first = bytearray(), None
        while piece := await reader.read(1 << 16):
            got += piece
            if first is None and b"data: " in got:
                first = time.perf_counter()
            if most is not None and len(got) > most:
                raise ConnectionAbortedError(f"{path}: {len(got)} bytes read, more not wanted")
        ended = time.perf_counter()
    finally:
        writer.close()
    told, _, rest = bytes(got).partition(b"\r\n\r\n")
    if not told.startswith(b"HTTP/1."):
        raise ConnectionError(f"{path}: no answer but {bytes(got[:100])!r}")
    chunked = b"transfer-encoding: chunked" in told.lower()
    return Answer(int(told[9:12]), joined(rest) if chunked else rest, began, first or ended, ended)


def joined(chunks: bytes) -> bytes:
    """A chunked body in one piece.

    Raises:
      ConnectionError: its end is missing.
    """
    whole, at = bytearray(), 0
    while True:
        line = chunks.find(b"\r\n", at)
        if line < 0:
            raise ConnectionError(f"an answer was cut off after {len(whole)} bytes")
        size = int(chunks[at:line].partition(b";")[0], 16)
        if size == 0:
            return bytes(whole)
        whole += chunks[line + 2 : line + 2 + size]
        at = line + 2 + size + 2
