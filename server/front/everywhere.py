"""What concerns all replicas: each is asked, and the answers become one."""

import asyncio
from collections.abc import Sequence

from aiohttp import web

from qjax.server.errors import RETRY_AFTER_SECONDS
from qjax.server.front.proxy import GONE, answer_headers, send
from qjax.server.front.replica import Replica
from qjax.server.front.state import FRONT, lost
from qjax.server.merged_answers import merge_bodies, merge_metrics
from qjax.server.prefix_routing import PrefixMemory
from qjax.server.request_id import request_id_of

ASK_SECONDS = 10.0  # that replicas get to answer a question
_FORGETTING = ("/reset_prefix_cache", "/sleep")
_ALIKE = ("/sleep", "/wake_up")  # all answer the same


async def everywhere(request: web.Request) -> web.Response:
    """The first refusal, if a replica refuses; else one answer for all."""
    front = request.app[FRONT]
    with front.request():
        front.check_ready()
        body, replicas = await request.read(), front.serving
        answers = await asyncio.gather(*(_ask(request, body, replica) for replica in replicas))
        if request.path.endswith(_FORGETTING):
            for replica in replicas:
                replica.memory = PrefixMemory()
        refusal = next((answer for answer in answers if answer.status >= 400), None)
        if refusal is not None or request.path.endswith(_ALIKE):
            return refusal or answers[0]
        return web.json_response(body=merge_bodies([bytes(answer.body) for answer in answers]))  # type: ignore[arg-type]


async def _ask(request: web.Request, body: bytes, replica: Replica) -> web.Response:
    try:
        async with await send(request, body, replica) as upstream:
            return web.Response(status=upstream.status, body=await upstream.read(), headers=answer_headers(upstream))
    except GONE:
        raise lost(f"The {replica} ended before it had answered", request_id_of(request)) from None


async def _texts(request: web.Request, path: str) -> dict[str, bytes]:
    """The answers of those that have one, by the replicas' names."""

    async def text(replica: Replica) -> bytes | None:
        try:
            async with asyncio.timeout(ASK_SECONDS), replica.session.get(path) as upstream:
                return await upstream.read() if upstream.status == 200 else None
        except GONE:
            return None

    replicas: Sequence[Replica] = request.app[FRONT].serving
    found = await asyncio.gather(*map(text, replicas))
    return {str(replica.index): body for replica, body in zip(replicas, found, strict=True) if body is not None}


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format: each replica's under the label `replica`, then the front's own."""
    found = await _texts(request, "/metrics")
    text = merge_metrics({name: body.decode() for name, body in found.items()}) + request.app[FRONT].render_metrics()
    return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def load(request: web.Request) -> web.Response:
    """The replicas' loads together."""
    found = list((await _texts(request, "/load")).values())
    if not found:
        return web.json_response({"server_load": 0, "num_queued": 0, "num_rejected": 0})
    return web.json_response(body=merge_bodies(found))


async def health(request: web.Request) -> web.Response:
    """200 while a replica serves (or all sleep), with what is known of each; 503 otherwise."""
    front = request.app[FRONT]
    body = {"status": front.status, "replicas": [replica.health for replica in front.replicas]}
    if front.status in ("ready", "sleeping"):
        return web.json_response(body)
    return web.json_response(body, status=503, headers={"Retry-After": RETRY_AFTER_SECONDS})
