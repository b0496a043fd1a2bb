"""The front's application: the server's own table of routes, each with who answers: the front, one replica, or all."""

from dataclasses import replace

from aiohttp import web

from qjax.server.app import ROUTES, assemble, routes_of
from qjax.server.front import everywhere
from qjax.server.front.proxy import forward
from qjax.server.front.state import FRONT, Front
from qjax.server.routes import Route

FRONTS_OWN = {
    "/health": everywhere.health,
    "/ping": everywhere.health,
    "/metrics": everywhere.metrics,
    "/load": everywhere.load,
}
UNCHANGED = {"/version", "/openapi.json"}  # besides the page: they need no engine
ALL_REPLICAS = {"/reset_prefix_cache", "/abort_requests", "/sleep", "/wake_up", "/is_sleeping"}
ONE_REPLICA = {
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
    *("/tokenize", "/detokenize", "/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"),
    *("/v1/models", "/v1/models/{model:.+}"),
}


def make_front_app(front: Front) -> web.Application:
    return assemble([_fronted(route) for route in routes_of(front.config)], front.config, FRONT, front)


def _fronted(route: Route) -> Route:
    if route.path in UNCHANGED or route not in ROUTES:
        return route
    handler = FRONTS_OWN.get(route.path) or (everywhere.everywhere if route.path in ALL_REPLICAS else forward)
    # Whether it is ready, and whether it serves /sleep, a replica says itself.
    return replace(route, handler=handler, needs_engine=False, is_dev=False)
