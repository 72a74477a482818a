"""The chat page at `/`: static files, and the headers that keep them to themselves.

The page is a client like any other: it asks this server's own API, with a key if there are keys, so
its files are given to anybody. What a model writes is shown in it: no script but its own may run,
nothing is loaded from elsewhere, and text is never parsed as HTML (Trusted Types see to that).
"""

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FILES = Path(__file__).parent / "page"
HEADERS = {
    "content-security-policy": "; ".join(
        [
            "default-src 'self'",
            "img-src 'self' blob:",  # blob: what the user attached
            "media-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # asked for again with an ETag: an update is seen at once
}


def is_page(path: str) -> bool:
    """Whether a path is the page's or one of its files', which need no key."""
    return path == "/" or path.startswith("/page/")


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its files below `/page/`."""

    async def index(_: Request) -> Response:
        return FileResponse(FILES / "index.html", headers=HEADERS)

    app.add_route("/", index, methods=["GET"], include_in_schema=False)
    app.mount("/page", _Files(directory=FILES), name="page")
