"""What can go wrong with a request, and how each API says it.

`problem` is the one table from exceptions to HTTP. Of an error that is not the client's nothing but
the request's number goes out: its text may name files.
"""

from collections.abc import Callable
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from gemsmith.errors import CapacityError, GemsmithError, QueueFullError, RequestError

OVERLOADED = 503
FAILED = "the server failed on this request; its log says more"
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(GemsmithError):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """param: the field it is about, as a path with dots. code: a word for programs."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def refused(param: str, message: str) -> ApiError:
    """A field that cannot be served."""
    return ApiError(400, f"{param}: {message}", param=param)


def problem(error: BaseException, *, retry_after_s: int = 1) -> ApiError:
    """Any exception as what the client is told."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case QueueFullError():
            return ApiError(OVERLOADED, str(error), code="queue_full", retry_after_s=retry_after_s)
        case CapacityError():
            return ApiError(OVERLOADED, str(error), code="no_capacity", retry_after_s=retry_after_s)
        case RequestError():
            return ApiError(400, str(error))
        case _:
            return ApiError(500, FAILED)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, and where."""
    found = max(error.errors(), key=lambda each: len(each["loc"]))
    if found["type"] == "json_invalid":
        reason = found.get("ctx", {}).get("error", "")
        return ApiError(400, f"the body is not JSON: {reason}")
    place = [str(step) for step in found["loc"][1:]]
    param = ".".join(place)
    if not place:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if found["type"] == "extra_forbidden":
        return refused(param, "this field is not known here; leave it out")
    return refused(param, found["msg"].removeprefix("Value error, "))


def openai(error: ApiError) -> dict[str, Any]:
    """The body of an error in OpenAI's APIs."""
    kind = KINDS.get(error.status, "server_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def anthropic(error: ApiError) -> dict[str, Any]:
    """The body of an error in Anthropic's API."""
    kind = KINDS.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def speller(scope: Scope) -> Callable[[ApiError], dict[str, Any]]:
    """How errors are spelled where a request went."""
    return anthropic if scope["path"].startswith("/v1/messages") else openai
