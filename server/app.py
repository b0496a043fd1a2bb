"""The aiohttp application: the table of routes, and what holds for all of them (errors, keys, body size)."""

import hashlib
import hmac
import os
from typing import Any

from aiohttp import web

from qjax.config import ServerConfig
from qjax.server.access_log import access_log_middleware
from qjax.server.admin import AbortRequest, SleepQuery, WakeUpQuery, abort_requests, is_sleeping, sleep, wake_up
from qjax.server.answer_schemas import (
    ABORTED,
    AWAKE,
    CHAT,
    COMPLETION,
    EMBEDDINGS,
    HEALTH,
    INPUT_TOKENS,
    LOAD,
    MESSAGE,
    MODEL,
    MODELS,
    PROMPT,
    RANKING,
    RESPONSE,
    SCORES,
    SLEEP,
    SLEEPING,
    SUCCESS,
    TOKENS,
    VERSION,
)
from qjax.server.chat import chat_completions
from qjax.server.completions import completions
from qjax.server.cors import install_cors
from qjax.server.embeddings import EmbeddingChatRequest, EmbeddingRequest, embeddings
from qjax.server.errors import ApiError, Handler, error_middleware
from qjax.server.messages import count_tokens, messages
from qjax.server.messages_errors import is_anthropic, messages_error_middleware
from qjax.server.messages_protocol import CountTokensRequest, MessagesRequest
from qjax.server.openapi import OPENAPI, describe, openapi
from qjax.server.page import PAGE_ROUTES
from qjax.server.protocol import ChatRequest, CompletionRequest
from qjax.server.request_id import add_request_id
from qjax.server.rerank import RerankRequest, ScoreRequest, rerank, score
from qjax.server.responses import responses
from qjax.server.responses_protocol import ResponsesRequest
from qjax.server.routes import Route, add_routes
from qjax.server.state import STATE, ServerState
from qjax.server.status import ResetQuery, health, load, metrics, model, models, reset_prefix_cache, version
from qjax.server.tokens import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest, detokenize, tokenize

PROBE: dict[str, Any] = {"answer": HEALTH, "other_answers": {503: HEALTH}, "needs_engine": False, "is_open": True}
# A new endpoint is a line here. `needs_engine`: refused with 503 until the model is loaded.
ROUTES = [
    Route("POST", "/v1/chat/completions", chat_completions, "Answer a conversation", ChatRequest, CHAT, streams=True),
    Route("POST", "/v1/completions", completions, "Continue a text", CompletionRequest, COMPLETION, streams=True),
    Route("POST", "/v1/responses", responses, "Answer items with items", ResponsesRequest, RESPONSE, streams=True),
    Route("POST", "/v1/messages", messages, "Answer as Anthropic does", MessagesRequest, MESSAGE, streams=True),
    Route("POST", "/v1/messages/count_tokens", count_tokens, "Tokens of it", CountTokensRequest, INPUT_TOKENS),
    Route("POST", "/tokenize", tokenize, "Token ids of a prompt", (TokenizeRequest, TokenizeChatRequest), TOKENS),
    Route("POST", "/detokenize", detokenize, "The text of token ids", DetokenizeRequest, PROMPT),
    Route(
        "POST",
        "/v1/embeddings",
        embeddings,
        "Texts as vectors",
        (EmbeddingRequest, EmbeddingChatRequest),
        EMBEDDINGS,
    ),
    *(Route("POST", p, score, "Relevance of texts", ScoreRequest, SCORES) for p in ("/v1/score", "/score")),
    *(
        Route("POST", p, rerank, "Documents by their relevance", RerankRequest, RANKING)
        for p in ("/v1/rerank", "/rerank", "/v2/rerank")
    ),
    Route("GET", "/v1/models", models, "The served model under its names", answer=MODELS),
    # names of models have slashes
    Route("GET", "/v1/models/{model:.+}", model, "One name of the served model", answer=MODEL, statuses=(404,)),
    Route("GET", "/health", health, "Whether requests are served", **PROBE),
    Route("GET", "/ping", health, "The same as /health", **PROBE),
    Route("POST", "/ping", health, "The same as /health", **PROBE),
    Route("GET", "/version", version, "The server's version", answer=VERSION, needs_engine=False),
    Route("GET", "/metrics", metrics, "Counters and latencies for Prometheus", answer="text/plain"),
    Route("GET", "/load", load, "How many requests are being served", answer=LOAD, needs_engine=False),
    Route("POST", "/reset_prefix_cache", reset_prefix_cache, "Forget cached prompts", answer=SUCCESS, query=ResetQuery),
    Route("POST", "/abort_requests", abort_requests, "End requests by their ids", AbortRequest, ABORTED),
    Route("POST", "/sleep", sleep, "Give the device's memory back", answer=SLEEP, query=SleepQuery, is_dev=True),
    Route("POST", "/wake_up", wake_up, "Take it again", answer=AWAKE, query=WakeUpQuery, is_dev=True),
    Route("GET", "/is_sleeping", is_sleeping, "Whether the engine sleeps", answer=SLEEPING, is_dev=True),
    Route("GET", "/openapi.json", openapi, "This description", needs_engine=False),
]


def make_app(state: ServerState) -> web.Application:
    return assemble(routes_of(state.config), state.config, STATE, state)


def routes_of(config: ServerConfig) -> list[Route]:
    return ROUTES + PAGE_ROUTES if config.enable_chat_page else ROUTES


def assemble[T](routes: list[Route], config: ServerConfig, key: web.AppKey[T], shared: T) -> web.Application:
    """The routes, and what holds for all of them.

    Args:
      shared: what the handlers find in the application under `key`.
    """
    prefixes = {"", config.root_path}  # a proxy may have cut its prefix off, or not
    open_paths = {prefix + route.path for prefix in prefixes for route in routes if route.is_open}
    app = web.Application(
        middlewares=[access_log_middleware(config), error_middleware], client_max_size=config.max_body_size
    )
    app[key] = shared
    described = [route for route in ROUTES if config.server_dev_mode or not route.is_dev]
    app[OPENAPI] = describe(described, config.root_path, bool(api_keys(config)))
    app.middlewares.append(messages_error_middleware)
    app.on_response_prepare.append(add_request_id)
    install_cors(app, config)
    app.middlewares.append(key_middleware(api_keys(config), open_paths))
    for prefix in prefixes:
        add_routes(app, routes, prefix)
    return app


def api_keys(config: ServerConfig) -> list[str]:
    """The keys of `--api-key`, else the one of the environment. Empty: the server is open."""
    keys = config.api_key or [os.environ.get("QJAX_API_KEY", "")]
    return [key for key in keys if key]


def key_middleware(keys: list[str], open_paths: set[str]):
    """Lets only requests with one of the keys through, on every path but the open ones, known or not."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if digests and request.path not in open_paths:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if not scheme and is_anthropic(request):  # whose clients send it so
                scheme, given = "bearer", request.headers.get("X-Api-Key", "")
            digest = hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
            # all keys are compared, each in constant time: how long it takes says nothing about them
            is_known = sum([hmac.compare_digest(digest, known) for known in digests]) > 0
            if scheme.lower() != "bearer" or not is_known:
                message = "Unauthorized: send one of the server's keys as 'Authorization: Bearer KEY'."
                raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return check_key
