"""What an operator asks of a running server: sleep and wake-up, and the end of requests by their ids."""

import asyncio
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

from qjax.server.errors import bad_request, from_value_error
from qjax.server.generation import read_json
from qjax.server.schema import body_field, parse, parse_query
from qjax.server.state import STATE

POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class SleepQuery:
    level: Literal[1, 2] = body_field("1: weights go to the host's memory; 2: they are loaded again at wake-up", 1)
    mode: Literal["abort", "wait"] = body_field("What running requests get: an end, or their time", "abort")


@dataclass(frozen=True, kw_only=True)
class WakeUpQuery:
    tags: list[Literal["weights", "kv_cache"]] | None = body_field("What is woken; all if absent")


@dataclass(frozen=True, kw_only=True)
class AbortRequest:
    """POST /abort_requests."""

    request_ids: list[str] | None = body_field(
        "Ids of answers, or of their HTTP requests (X-Request-Id); absent: all requests, with --server-dev-mode"
    )


async def sleep(request: web.Request) -> web.Response:
    """Gives the device's memory back. New requests get a 503 from now on."""
    state = request.app[STATE]
    query = parse_query(SleepQuery, request.query)
    with state.refusing("The engine is about to sleep."):
        while query.mode == "wait" and state.num_engine_requests:
            await asyncio.sleep(POLL_SECONDS)
        try:
            # what has begun ends, whether the client waits for it or not
            await asyncio.shield(state.engine.sleep(query.level))
        except ValueError as error:
            raise from_value_error(error) from None
    return web.json_response({"status": "sleeping", "level": query.level})


async def wake_up(request: web.Request) -> web.Response:
    state = request.app[STATE]
    query = parse_query(WakeUpQuery, request.query)
    try:
        await asyncio.shield(state.engine.wake_up(query.tags))
    except ValueError as error:
        raise from_value_error(error) from None
    status = "sleeping" if state.engine.is_sleeping else "awake"
    return web.json_response({"status": status, "tags": query.tags or ["weights", "kv_cache"]})


async def is_sleeping(request: web.Request) -> web.Response:
    return web.json_response({"is_sleeping": request.app[STATE].engine.is_sleeping})


async def abort_requests(request: web.Request) -> web.Response:
    """Ends requests: their answers get a last chunk, or come as far as they were written, with finish_reason "abort".

    Unknown ids are left out of the answer: the request may just have ended.
    """
    state = request.app[STATE]
    body = parse(AbortRequest, await read_json(request))
    if body.request_ids is None and not state.config.server_dev_mode:
        raise bad_request("request_ids is required; the end of all requests needs --server-dev-mode.", "request_ids")
    ended = state.abort(body.request_ids)
    return web.json_response({"status": "aborted", "aborted": len(ended), "request_ids": ended})
