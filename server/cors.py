"""CORS: which web pages browsers let use the server. Off unless `--allowed-origins` names some.

Only browsers ask, and only they obey: it keeps pages out, not other clients. API keys do that.
"""

from aiohttp import web

from qjax.config import ServerConfig
from qjax.server.errors import Handler, bad_request
from qjax.server.request_id import HEADER

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
MAX_AGE_SECONDS = "600"  # that a browser may remember a preflight's answer


def install_cors(app: web.Application, config: ServerConfig) -> None:
    """Must come before what checks keys: a preflight brings none."""
    if not config.allowed_origins:
        return

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_headers(config, request.headers.get("Origin")))
        response.headers.add("Vary", "Origin")

    app.middlewares.append(_preflights(config))
    app.on_response_prepare.append(add_headers)


def _headers(config: ServerConfig, origin: str | None) -> dict[str, str]:
    """What a response says to a page of this origin."""
    if origin is None or not _allows(config.allowed_origins, origin):
        return {}
    is_anyone = "*" in config.allowed_origins and not config.allow_credentials
    headers = {"Access-Control-Allow-Origin": "*" if is_anyone else origin, "Access-Control-Expose-Headers": HEADER}
    return headers | ({"Access-Control-Allow-Credentials": "true"} if config.allow_credentials else {})


def _preflights(config: ServerConfig):
    """Answers a browser that asks what it may send before it does."""

    @web.middleware
    async def preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
        method, origin = request.headers.get("Access-Control-Request-Method"), request.headers.get("Origin")
        if request.method != "OPTIONS" or method is None or origin is None:
            return await handler(request)
        names = request.headers.get("Access-Control-Request-Headers", "")
        headers = {name.strip().lower() for name in names.split(",") if name.strip()}
        allowed = [name.lower() for name in config.allowed_headers]
        for what, refused, option in (
            (f"origin {origin}", not _allows(config.allowed_origins, origin), "--allowed-origins"),
            (f"method {method}", not _allows(config.allowed_methods, method), "--allowed-methods"),
            (f"headers {names}", not all(_allows(allowed, name) for name in headers), "--allowed-headers"),
        ):
            if refused:
                raise bad_request(f"CORS: the {what} is not allowed; the server's {option} says what is.")
        methods = METHODS if "*" in config.allowed_methods else config.allowed_methods
        answer = {"Access-Control-Allow-Methods": ", ".join(methods), "Access-Control-Max-Age": MAX_AGE_SECONDS}
        if headers:
            answer["Access-Control-Allow-Headers"] = names
        return web.Response(headers=answer)

    return preflight


def _allows(allowed: list[str], value: str) -> bool:
    return "*" in allowed or value in allowed
