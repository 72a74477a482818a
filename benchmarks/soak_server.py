"""`gemsmith serve` with one more route for soak.py: /idle tells what is still held.

Run by soak.py: python -m benchmarks.soak_server serve MODEL ...
"""

from typing import Any

from fastapi import FastAPI

from gemsmith.cli.main import app as command
from gemsmith.server import app as application
from gemsmith.server.service import Service

plain = application.create_app


def with_idle(service: Service, **options: Any) -> FastAPI:
    made = plain(service, **options)

    @made.get("/idle")
    async def idle() -> dict[str, Any]:
        """Requests that are left; blocks held by none of them and by no checkpoint, if any are."""
        stats = service.engine.stats()
        try:
            service.engine._engine.check()
        except AssertionError as error:
            leaked = f"leaked: {error}"
        else:
            leaked = ""
        return {"running": stats.running, "waiting": stats.waiting, "leaked": leaked}

    return made


if __name__ == "__main__":
    application.create_app = with_idle
    command()
