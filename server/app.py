"""The aiohttp application: routes, and what holds for all of them (errors, keys, readiness, body size)."""

import hashlib
import hmac
import os

from aiohttp import web

from qjax.config import ServerConfig
from qjax.server.chat import chat_completions
from qjax.server.completions import completions
from qjax.server.errors import ApiError, Handler, error_middleware
from qjax.server.state import STATE, ServerState
from qjax.server.status import health, load, metrics, model, models, reset_prefix_cache, version
from qjax.server.tokens import detokenize, tokenize

MAX_BODY_BYTES = 32 * 2**20  # ten times the text of the longest context
OPEN_PATHS = {"/health", "/ping"}  # probes bring no key
NEEDS_ENGINE = ("/v1/", "/tokenize", "/detokenize", "/metrics", "/reset_prefix_cache")


def make_app(state: ServerState) -> web.Application:
    middlewares = [error_middleware, key_middleware(api_keys(state.config)), readiness_middleware]
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app[STATE] = state
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat_completions),
            web.post("/v1/completions", completions),
            web.get("/v1/models", models),
            web.get("/v1/models/{model:.+}", model),  # names of models have slashes
            web.get("/health", health),
            web.get("/ping", health),
            web.post("/ping", health),
            web.get("/version", version),
            web.post("/tokenize", tokenize),
            web.post("/detokenize", detokenize),
            web.get("/metrics", metrics),
            web.get("/load", load),
            web.post("/reset_prefix_cache", reset_prefix_cache),
        ]
    )
    return app


def api_keys(config: ServerConfig) -> list[str]:
    """The keys of `--api-key`, else the one of the environment. Empty: the server is open."""
    keys = config.api_key or [os.environ.get("QJAX_API_KEY", "")]
    return [key for key in keys if key]


def key_middleware(keys: list[str]):
    """Lets only requests with one of the keys through, on every path but the probes, known or not."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if digests and request.path not in OPEN_PATHS:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
            # all keys are compared, each in constant time: how long it takes says nothing about them
            is_known = sum([hmac.compare_digest(digest, known) for known in digests]) > 0
            if scheme.lower() != "bearer" or not is_known:
                message = "Unauthorized: send one of the server's keys as 'Authorization: Bearer KEY'."
                raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return check_key


@web.middleware
async def readiness_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses what needs the engine while there is none, and counts what is running."""
    is_known = request.match_info.http_exception is None
    if not is_known or not request.path.startswith(NEEDS_ENGINE):
        return await handler(request)
    state = request.app[STATE]
    state.check_ready()
    with state.request():
        return await handler(request)
