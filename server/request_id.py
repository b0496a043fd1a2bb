"""The id of an HTTP request, for logs on both sides: the client's own from X-Request-Id, else a random one. Every
response carries it, streams and errors too.
"""

import uuid

from aiohttp import web

from qjax.server.protocol import REQUEST_ID

HEADER = "X-Request-Id"
_ID: web.RequestKey[str] = web.RequestKey("id", str)


def request_id_of(request: web.Request) -> str:
    """The same at each call. A header that cannot be an id (`REQUEST_ID`) counts as none: proxies write all sorts."""
    if _ID not in request:
        given = request.headers.get(HEADER, "")
        request[_ID] = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return request[_ID]


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """A signal: runs before the head of a response is sent."""
    response.headers[HEADER] = request_id_of(request)
