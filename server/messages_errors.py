"""Errors of the Messages endpoints in Anthropic's form: `{"type": "error", "error": {"type", "message"}}`."""

from typing import Any

from aiohttp import web

from qjax.server.errors import ApiError, Handler, as_api_error

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",  # Anthropic's own status is 529; proxies and probes know 503
}


def error_body(error: ApiError) -> dict[str, Any]:
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def is_anthropic(request: web.Request) -> bool:
    """Whether Anthropic's clients are spoken to, whatever a proxy's prefix is."""
    return request.path.endswith(("/v1/messages", "/v1/messages/count_tokens"))


class MessagesError(ApiError):
    """An ApiError with Anthropic's body."""

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self)


@web.middleware
async def messages_error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Inside of `error_middleware`, which answers all other paths."""
    if not is_anthropic(request):
        return await handler(request)
    try:
        return await handler(request)
    except Exception as error:
        api_error = as_api_error(request, error)
        raise MessagesError(api_error.status, str(api_error), headers=api_error.headers) from error
