"""Errors as OpenAI's clients expect them: every failure is `{"error": {"message", "type", "param", "code"}}`.

Types and texts are vLLM's where it has some. What the client did wrong is an `ApiError`; anything else is a fault of
ours, is logged, and reaches the client as a plain 500.
"""

import json
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

log = logging.getLogger("qjax.server")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

FAILURE: web.RequestKey[str] = web.RequestKey("failure", str)  # what the client was told, for the log

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    417: "ExpectationFailedError",
    431: "RequestHeaderFieldsTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
RETRY_AFTER_SECONDS = "5"


class ApiError(Exception):
    """A failure with its HTTP status, for the client to read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        type: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.type = type or TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.status}
        return {"error": error}

    def response(self) -> web.Response:
        text = json.dumps(self.body, ensure_ascii=False)
        # a lone surrogate of the request may be quoted in the message
        body = text.encode("utf-8", "backslashreplace")
        return web.Response(status=self.status, body=body, content_type="application/json", headers=self.headers)


def bad_request(message: str, param: str | None = None, *value: Any) -> ApiError:
    """A 400; with a value given, it is named at the end as vLLM does."""
    if value:
        text = value[0] if isinstance(value[0], str) else shorten(value[0])
        message = f"{message} (parameter={param}, value={text[:200]})"
    return ApiError(400, message, param=param)


def from_value_error(error: ValueError, names: Any = ()) -> ApiError:
    """A 400 for bad input that another room refused; `param` is the option that the message begins with."""
    message = str(error)
    word = re.match(r"\w+", message)
    param = word[0] if word and word[0] in names else None
    return ApiError(400, message, param=param)


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, headers={"Retry-After": RETRY_AFTER_SECONDS})


def engine_failed() -> ApiError:
    return ApiError(500, "The engine has failed; the server is about to stop.")


def could_not_compute(is_temporary: bool) -> ApiError:
    """The engine ended a request with an error; temporary: a step failed, which need not be the request's fault."""
    if is_temporary:
        return unavailable("A step of the model failed, and the request with it. Please send it again.")
    return ApiError(500, "The engine could not compute this request; the server's log has more.")


def internal_error(error: BaseException) -> ApiError:
    """A fault of the server or the engine. Details go to the log only: they may hold paths or addresses."""
    log.error("a request failed: %s", error, exc_info=error)
    return ApiError(500, "The server failed to answer the request; its log has the reason.")


def shorten(value: Any, limit: int = 200) -> str:
    """A value of a request for an error's text."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:  # the parser allows a little more depth than the writer
        text = "a deeply nested value"
    return text if len(text) <= limit else text[: limit - 3] + "..."


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever a handler raises into OpenAI's error object."""
    try:
        return await handler(request)
    except Exception as error:
        api_error = as_api_error(request, error)
        request[FAILURE] = str(api_error)
        return api_error.response()


def as_api_error(request: web.Request, error: Exception) -> ApiError:
    """What the client is told of an exception; a fault of ours is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, web.HTTPException):
        return _of_http(request, error)
    if isinstance(error, RequestPayloadError | HttpProcessingError):
        message = f"The request's body is not what its headers say: {' '.join(str(error).split())[:300]}"
        return ApiError(400, message, headers={"Connection": "close"})
    return internal_error(error)


def _of_http(request: web.Request, error: web.HTTPException) -> ApiError:
    """aiohttp's own refusals: no such route, wrong method, body too large, …"""
    if error.status == 404:
        return ApiError(404, f"The path {request.path} does not exist.")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.path} does not take {request.method}; it takes {allowed}."
        return ApiError(405, message, headers={"Allow": allowed})
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = request.client_max_size
        return ApiError(413, f"The request's body is larger than {limit} bytes.", headers={"Connection": "close"})
    return ApiError(error.status, error.text or error.reason)
