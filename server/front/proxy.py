"""One request to one replica: passed on as it came, and its answer as it comes. Another replica is tried while the
client has seen nothing; afterwards the stream ends with an error that says so.
"""

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import ClientConnectionResetError, web
from yarl import URL

from qjax.server import access_log, sse
from qjax.server.front.replica import Replica
from qjax.server.front.state import FRONT, Front, lost
from qjax.server.messages_errors import error_body, is_anthropic
from qjax.server.prefix_routing import hash_blocks, prompt_text
from qjax.server.request_id import HEADER, request_id_of

log = logging.getLogger("qjax.server")

# A request that was sent and not answered may be what ended its replica: it must not end all of them.
MAX_SENT_AGAIN = 1
_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}
# What is the front's own business with its client, or is said anew.
_NOT_SENT = _HOP_BY_HOP | {
    *("host", "content-length", "expect", "authorization", "x-api-key", "accept-encoding", "x-forwarded-for"),
    HEADER.lower(),
}
_NOT_RETURNED = _HOP_BY_HOP | {"content-length", "date", "server", HEADER.lower()}
_DECODED = ("gzip", "deflate")  # what aiohttp has unpacked when a handler sees the body
GONE = (aiohttp.ClientError, OSError, TimeoutError)


class _TryAnotherError(Exception):
    """The client has seen nothing of this replica's answer yet.

    Attributes:
      answer: what the client gets where there is no other replica.
      was_sent: the replica may have worked on it.
    """

    def __init__(self, answer: web.Response | None, was_sent: bool):
        self.answer, self.was_sent = answer, was_sent


async def forward(request: web.Request) -> web.StreamResponse:
    """To the replica that suits it best."""
    front = request.app[FRONT]
    with front.request():
        front.check_ready()
        body = await request.read()
        blocks = hash_blocks(prompt_text(_json(body)))
        tried: set[Replica] = set()
        answer, num_sent = None, 0
        while True:
            try:
                with front.chosen(blocks, tried) as replica:
                    return await _pass(request, body, replica)
            except _TryAnotherError as failure:
                tried.add(replica)
                num_sent += failure.was_sent
                answer = failure.answer or answer
                is_last = num_sent > MAX_SENT_AGAIN or not set(front.serving) - tried
                if is_last and answer is not None:
                    return answer
                if is_last:
                    _blame(front, replica, request)
                    raise lost(f"The {replica} ended before it had answered", request_id_of(request)) from failure
                front.retries.inc()
                log.warning("%s did not answer: the request goes to another", replica)


async def _pass(request: web.Request, body: bytes, replica: Replica) -> web.StreamResponse:
    """Raises _TryAnotherError while nothing of the answer has been sent."""
    access_log.current().is_elsewhere = True
    try:
        upstream = await send(request, body, replica)
    except aiohttp.ClientConnectorError:
        raise _TryAnotherError(None, was_sent=False) from None
    except GONE:
        raise _TryAnotherError(None, was_sent=True) from None
    try:
        if upstream.content_type == "text/event-stream":
            return await _stream(request, upstream, replica)
        return await _whole(upstream, replica)
    finally:
        upstream.close() if not upstream.content.at_eof() else upstream.release()


async def _whole(upstream: aiohttp.ClientResponse, replica: Replica) -> web.Response:
    try:
        answer = web.Response(status=upstream.status, body=await upstream.read(), headers=answer_headers(upstream))
    except GONE:
        raise _TryAnotherError(None, was_sent=True) from None
    if upstream.status == 500:
        await replica.look()  # is it the request, or the engine?
    if upstream.status == 503 or (upstream.status == 500 and replica.status == "failed"):
        raise _TryAnotherError(answer, was_sent=True)
    return answer


async def _stream(request: web.Request, upstream: aiohttp.ClientResponse, replica: Replica) -> web.StreamResponse:
    events = _events(upstream)
    try:
        first = await anext(events, b"")
    except GONE:
        raise _TryAnotherError(None, was_sent=True) from None
    response = web.StreamResponse(status=upstream.status, headers=answer_headers(upstream))
    try:
        await response.prepare(request)
        await response.write(first)
        while True:
            try:
                part = await anext(events, b"")
            except GONE:
                part = _blame(request.app[FRONT], replica, request)
                await response.write(part)
                break
            if not part:
                break
            await response.write(part)
        await response.write_eof()
    except ClientConnectionResetError:  # the client has gone, and with us its request
        access_log.current().is_gone = True
    return response


async def _events(upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole events as they come: a part of one could not be followed by an error."""
    rest = b""
    while part := await upstream.content.readany():
        part = rest + part
        end = len(part) if part.endswith(b"\n\n") else part.rfind(b"\n\n") + 2
        rest = part[end:] if end > 1 else part
        if end > 1:
            yield part[:end]


def _blame(front: Front, replica: Replica, request: web.Request) -> bytes:
    """Counts and logs a request that was lost with its replica. Returns the end of its stream."""
    error = lost(f"The {replica} that was answering has ended", request_id_of(request))
    front.lost.inc()
    record = access_log.current()
    record.is_elsewhere, record.error = False, str(error)
    if is_anthropic(request):
        return sse.named_event(error_body(error))
    if request.path.endswith("/v1/responses"):
        return sse.named_event({"type": "error", **error.body})
    return sse.event(error.body) + sse.DONE


async def send(request: web.Request, body: bytes, replica: Replica) -> aiohttp.ClientResponse:
    """The request as it came, without what it said to the front. Returns the answer's head, its body not yet read."""
    root = request.app[FRONT].config.root_path
    path = request.rel_url.raw_path
    path = path.removeprefix(root) if root and path.startswith(root + "/") else path
    query = request.rel_url.raw_query_string
    headers = [(name, value) for name, value in request.headers.items() if name.lower() not in _NOT_SENT]
    if request.headers.get("Content-Encoding", "").lower() in _DECODED:
        headers = [(name, value) for name, value in headers if name.lower() != "content-encoding"]
    clients = [request.headers.get("X-Forwarded-For"), request.remote]
    headers.append((HEADER, request_id_of(request)))
    headers.append(("X-Forwarded-For", ", ".join(filter(None, clients))))
    url = URL(path + (f"?{query}" if query else ""), encoded=True)
    return await replica.session.request(request.method, url, data=body or None, headers=headers)


def answer_headers(upstream: aiohttp.ClientResponse) -> list[tuple[str, str]]:
    return [(name, value) for name, value in upstream.headers.items() if name.lower() not in _NOT_RETURNED]


def _json(body: bytes) -> dict[str, Any]:
    """The body, or nothing where it is no JSON object: what is wrong with it, the replica says."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}
