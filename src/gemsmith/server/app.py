"""The application: routes, and the layers before them.

    app = create_app(Service(lm, AsyncEngine(lm)))

A request passes CORS (if origins are allowed at all), the log, the guard (host name, keys, body
size), then its route: the API's module translates it to an `Ask`, `Service` queues it, and the same
module turns the events into the API's answer, in one piece or as server-sent events.
"""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from gemsmith.cache.prefix import WHY
from gemsmith.errors import GemsmithError
from gemsmith.server import anthropic, chat, errors, responses, transcription
from gemsmith.server.errors import ApiError, problem
from gemsmith.server.http import EventStream, Gone, Log, answer, connected, note_error
from gemsmith.server.limits import Guard, Keys
from gemsmith.server.page import add_page
from gemsmith.server.protocol import ChatRequest, CompletionRequest, ResponsesRequest
from gemsmith.server.service import Ask, Replies, Service

DRAIN_S = 5.0
"""What is left for requests to end once every connection is closed."""


def create_app(
    service: Service,
    *,
    keys: Keys | None = None,
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
    version: str = "0",
) -> FastAPI:
    """The application around a service. Shutting it down drains and closes the engine.

    keys: who may ask; without any everybody may. origins: pages of which a browser may ask, "*"
    for all; none by default. hosts: names that the server may be asked under, see `limits.Guard`;
    any by default. version: what `/openapi.json` says.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.engine.drain(DRAIN_S)

    app = FastAPI(
        title="gemsmith",
        version=version,
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    for kind in (GemsmithError, RequestValidationError, HTTPException, Gone):
        app.add_exception_handler(kind, _failed(service))
    _plain_routes(app, service)
    _openai_routes(app, service)
    _anthropic_routes(app, service)
    add_page(app)
    # The layer that is added last comes first.
    app.add_middleware(Guard, keys=keys or Keys(), limits=service.limits, hosts=hosts)
    app.add_middleware(Log, service=service)
    return app


def _failed(service: Service) -> Any:
    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, Gone):
            return Response(status_code=499)  # nobody reads it; the log does
        note_error(request.scope, error)
        told = problem(error, retry_after_s=service.retry_after_s())
        return answer(errors.speller(request.scope)(told), told)

    return failed


async def _started(service: Service, request: Request, ask: Ask) -> Replies:
    replies = await connected(request, service.start(ask, request.state.tenant))
    request.state.replies = replies
    return replies


def _plain_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the engine works."""
        return answer({"status": "ok"} if service.engine.healthy else {"status": "broken"},
                      None if service.engine.healthy else ApiError(503, ""))  # fmt: skip

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        told = ApiError(503, "", retry_after_s=1)
        return answer({"ready": service.ready}, None if service.ready else told)

    @app.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/debug/cache")
    async def debug_cache(request: Request) -> Response:
        """How the prefix cache does, and what it had for the caller's own latest requests."""
        stats = service.engine.stats()
        # Nobody is told what others ask, nor that somebody else has asked the same.
        own = [each for each in stats.lookups if each.tenant == request.state.tenant]
        return answer(
            {
                "hits": stats.prefix_hits,
                "misses": stats.prefix_misses,
                "cached_tokens": stats.cached_tokens,
                "computed_tokens": stats.prompt_tokens,
                "checkpoints": stats.checkpoints,
                "checkpoints_restored": stats.checkpoints_restored,
                "kv_used_bytes": stats.kv_used_bytes,
                "kv_bytes": stats.kv_bytes,
                "recent": [
                    {
                        "seconds_ago": round(time.time() - each.at, 3),
                        "prompt_tokens": each.prompt_tokens,
                        "cached_tokens": each.cached_tokens,
                        "known_tokens": each.known_tokens,
                        "miss": each.miss,
                        "why": each.miss and WHY[each.miss],
                    }
                    for each in reversed(own)
                ],
            }
        )

    def model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "gemsmith",
            "max_model_len": service.engine.plan.max_model_len,
            "modalities": service.modalities,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """What is served."""
        return answer({"object": "list", "data": [model(name) for name in service.names]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """One of them."""
        service.check_model(name)
        return answer(model(name))


def _openai_routes(app: FastAPI, service: Service) -> None:
    def failed(error: BaseException) -> bytes:
        return chat.data(errors.openai(problem(error)))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """A reply to a conversation."""
        service.check_model(body.model)
        replies = await _started(service, request, chat.ask_of(body))
        if body.stream:
            return EventStream(chat.chat_stream(service, body, replies), replies, failed)
        return answer(await connected(request, chat.chat(service, replies)))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text."""
        service.check_model(body.model)
        params = service.params(chat.completion_params(body))

        async def start() -> Replies:
            prompts = [await service.text_prompt(prompt) for prompt in chat.prompts_of(body)]
            return await service.submit(
                prompts, params, n=body.n, tenant=request.state.tenant, chat=False
            )

        replies = request.state.replies = await connected(request, start())
        if body.stream:
            return EventStream(chat.completion_stream(service, body, replies), replies, failed)
        return answer(await connected(request, chat.completion(service, replies)))

    @app.post("/v1/responses")
    async def new_response(body: ResponsesRequest, request: Request) -> Response:
        """A reply to a conversation, as items."""
        service.check_model(body.model)
        replies = await _started(service, request, responses.ask_of(body))
        if not body.stream:
            return answer(await connected(request, responses.response(service, body, replies)))
        writer = responses.Writer(service, body)
        chunks = responses.stream(writer, replies)
        return EventStream(chunks, replies, lambda error: responses.data(writer.failed(error)))

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(
        request: Request,
        file: Annotated[UploadFile, File(description="A sound or video file, of any length.")],
        model: Annotated[str, Form()],
        response_format: Annotated[transcription.Format, Form()] = "json",
        temperature: Annotated[float, Form(ge=0, le=2)] = 0.0,
    ) -> Response:
        """The words of a recording."""
        service.check_model(model)
        known = ("file", "model", "response_format", "temperature")
        others = {k: v for k, v in (await request.form()).items() if k not in known}
        transcription.check(others)
        work = transcription.run(
            service, await file.read(), request.state.tenant, temperature=temperature
        )
        made = transcription.spell(await connected(request, work), response_format)
        if isinstance(made, str):
            return Response(made, media_type="text/plain")
        return answer(made)


def _anthropic_routes(app: FastAPI, service: Service) -> None:
    def failed(error: BaseException) -> bytes:
        return anthropic.data(errors.anthropic(problem(error)))

    @app.post("/v1/messages")
    async def messages(body: anthropic.MessagesRequest, request: Request) -> Response:
        """A reply to a conversation, in Anthropic's words."""
        service.check_model(body.model)
        replies = await _started(service, request, anthropic.ask_of(body))
        if body.stream:
            chunks = anthropic.stream(service, body, replies)
            return EventStream(chunks, replies, failed, anthropic.PING)
        return answer(await connected(request, anthropic.message(service, body, replies)))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: anthropic.CountRequest, request: Request) -> Response:
        """How many tokens a prompt has."""
        service.check_model(body.model)
        prompt = await connected(request, service.prompt(anthropic.ask_of(body)))
        return answer({"input_tokens": len(prompt.ids)})
