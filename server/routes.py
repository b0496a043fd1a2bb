"""`Route`: one line of the server's table of routes, from which both the application and its description are made."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from aiohttp import web

from qjax.server.errors import ApiError, Handler
from qjax.server.state import STATE


@dataclass(frozen=True)
class Route:
    """What the server does at a path, and what it takes and answers there.

    Attributes:
      body: the dataclass (or several, one of which) that the JSON body is parsed with.
      answer: JSON schema of the answer; None: any object. A text is a content type instead.
      query: the dataclass that the query is parsed with.
      streams: the answer may also be server-sent events.
      needs_engine: refused while there is no engine to serve it; counted as a running request.
      is_open: needs no API key.
      is_dev: only with `--server-dev-mode`.
      other_answers: schemas by status, where it is not an error that comes with it.
      statuses: error statuses beyond those that follow from the other fields.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type | tuple[type, ...] = ()
    answer: dict[str, Any] | str | None = None
    query: type | None = None
    streams: bool = False
    needs_engine: bool = True
    is_open: bool = False
    is_dev: bool = False
    other_answers: Mapping[int, dict[str, Any]] = MappingProxyType({})
    statuses: tuple[int, ...] = ()

    @property
    def bodies(self) -> tuple[type, ...]:
        return self.body if isinstance(self.body, tuple) else (self.body,)


def add_routes(app: web.Application, routes: list[Route], prefix: str = "") -> None:
    for route in routes:
        handler = _when_ready(route.handler) if route.needs_engine else route.handler
        if route.is_dev and not app[STATE].config.server_dev_mode:
            handler = _off
        add = web.get if route.method == "GET" else functools.partial(web.route, route.method)  # `get` is HEAD too
        app.add_routes([add(prefix + route.path, handler, expect_handler=_expect)])


async def _off(request: web.Request) -> web.StreamResponse:
    raise ApiError(404, f"The path {request.path} needs --server-dev-mode.")


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """`Expect: 100-continue`, as curl sends it with a large body; aiohttp's own would refuse others in plain text."""
    expected = request.headers.get("Expect", "")
    if expected.lower() != "100-continue":
        return ApiError(417, f"Expect: {expected!r} is not supported; 100-continue is.").response()
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer has not begun: it may still be an error
    return None


def _when_ready(handler: Handler) -> Handler:
    """Refuses what needs the engine while there is none, and counts what is running."""

    @functools.wraps(handler)
    async def guarded(request: web.Request) -> web.StreamResponse:
        state = request.app[STATE]
        state.check_ready()
        with state.request():
            return await handler(request)

    return guarded
