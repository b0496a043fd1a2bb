"""What is not generation: health, version, and the list of models."""

import time
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from qjax.server.errors import RETRY_AFTER_SECONDS
from qjax.server.schema import body_field, parse_query
from qjax.server.state import STATE, ServerState
from qjax.server.version import VERSION

_STARTED = int(time.time())


async def health(request: web.Request) -> web.Response:
    """200 once requests are served (or the engine sleeps, as it was asked to); 503 with the reason while loading, while
    stopping, after a failure, and while a step does not end."""
    state = request.app[STATE]
    if state.is_stalled:
        body = {"status": "stalled", "seconds": round(state.engine.seconds_stalled, 1)}
        return web.json_response(body, status=503)
    if state.is_ready:
        return web.json_response({"status": "sleeping" if state.engine.is_sleeping else "ready"})
    phase = state.engine.phase
    if phase == "failed":
        return web.json_response({"status": "failed", "phase": phase}, status=503)
    status = "stopping" if state.is_stopping or phase == "stopping" else "loading"
    headers = {"Retry-After": RETRY_AFTER_SECONDS}
    return web.json_response({"status": status, "phase": phase}, status=503, headers=headers)


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format, under vLLM's names."""
    text = request.app[STATE].engine.render_metrics()
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def load(request: web.Request) -> web.Response:
    """How many requests are being served, how many of their answers wait for a place, and how many requests found the
    queue full since the start."""
    state = request.app[STATE]
    num_queued = state.engine.num_queued() if state.engine.phase == "ready" else 0
    load = {"server_load": state.num_engine_requests, "num_queued": num_queued, "num_rejected": state.num_rejected}
    return web.json_response(load)


@dataclass(frozen=True, kw_only=True)
class ResetQuery:
    reset_external: bool = body_field("Also what --kv-offloading-size keeps in the host's memory", False)


async def reset_prefix_cache(request: web.Request) -> web.Response:
    """Forgets cached prompts; `success` is false while requests hold some of their pages."""
    query = parse_query(ResetQuery, request.query)
    return web.json_response({"success": await request.app[STATE].engine.reset_prefix_cache(query.reset_external)})


async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": VERSION})


async def models(request: web.Request) -> web.Response:
    state = request.app[STATE]
    return web.json_response({"object": "list", "data": [_card(state, name) for name in state.model_names]})


async def model(request: web.Request) -> web.Response:
    state = request.app[STATE]
    return web.json_response(_card(state, state.check_model(request.match_info["model"])))


def _card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "qjax",
        "root": state.engine.model_name,
        "parent": None,
        "max_model_len": state.engine.max_model_len,
    }
