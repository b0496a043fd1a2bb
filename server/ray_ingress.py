"""`Ingress`: where Ray's proxies bring requests. It hashes a prompt's beginning, has Ray choose a replica by it
(`ray_router`), and passes request and answer through. What concerns all replicas is asked of all, and merged.
"""

import json
import logging
from collections.abc import AsyncIterator

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from qjax.server.errors import ApiError, unavailable
from qjax.server.merged_answers import merge_bodies, merge_metrics
from qjax.server.messages_errors import error_body
from qjax.server.prefix_routing import hash_blocks, prompt_text
from qjax.server.ray_replica import HOP_BY_HOP, Headers, ReplicaGoneError
from qjax.server.sse import event, named_event

log = logging.getLogger("qjax.server")

NUM_TRIES = 3  # of a request whose replica dies before it has answered anything
ASK_SECONDS = 10.0  # that all replicas get to answer what all are asked
GONE = (RayActorError, ReplicaGoneError)
NOT_PASSED_ON = HOP_BY_HOP | {"expect", "content-length"}  # the body has been read: its length is known
# Paths that all replicas are asked for. /health is good while one is.
ALL = {"/metrics", "/load", "/reset_prefix_cache", "/abort_requests"}
ANY = {"/health", "/ping"}


class Ingress:
    """The class of the Serve deployment that has the route.

    Args:
      max_body_size: bytes.
      root_path: a prefix of paths.
    """

    def __init__(self, replicas: DeploymentHandle, max_body_size: int, root_path: str):
        self._one = replicas.options(method_name="forward", stream=True)
        self._all = replicas
        self._max_body_size = max_body_size
        self._root_path = root_path

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except ApiError as error:
            return _error(error, request.url.path)

    async def _answer(self, request: Request) -> Response:
        body = await _read(request, self._max_body_size)
        headers = [(name, value) for name, value in request.headers.items() if name not in NOT_PASSED_ON]
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        path = request.url.path.removeprefix(self._root_path)
        if path in ALL | ANY:
            return await self._ask_all(path, request.method, target, headers, body)
        for _ in range(NUM_TRIES):
            stream = self._one.remote(request.method, target, headers, body, blocks=_blocks(body))
            try:
                head = await anext(stream)
            except GONE as error:
                log.warning("a replica has gone before it answered: %s", error)
                continue
            except DeploymentUnavailableError:
                raise unavailable("No replica could be started; the logs have the reason.") from None
            status, answer_headers = head
            return _with_headers(StreamingResponse(_body(stream, path, answer_headers), status), answer_headers)
        raise unavailable("The replicas that were to answer have gone. Please try again later.")

    async def _ask_all(self, path: str, method: str, target: str, headers: Headers, body: bytes) -> Response:
        try:
            asked = self._all.broadcast("ask", method, target, headers, body)
            given = await asked.results_async(timeout_s=ASK_SECONDS, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            given = []
        answers = [answer for answer in given if not isinstance(answer, BaseException)]
        if not answers:
            raise unavailable("No replica is ready yet.")
        good = [answer for answer in answers if answer.status == 200]
        first = (good or answers)[0]
        content = first.body
        if good and path == "/metrics":
            content = merge_metrics({answer.replica: answer.body.decode() for answer in good}).encode()
        elif len(good) > 1 and path in ALL:
            content = merge_bodies([answer.body for answer in good])
        return _with_headers(Response(content, first.status), first.headers)


def _with_headers(response: Response, headers: Headers) -> Response:
    """With the replica's own, but for a length where the response knows its own."""
    known = {name for name, _ in response.raw_headers}
    given = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    response.raw_headers += [(name, value) for name, value in given if name not in known]
    return response


async def _read(request: Request, limit: int) -> bytes:
    """Raises ApiError 413 for a body that is too large, as the server behind would."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"The request's body is larger than {limit} bytes.", headers={"Connection": "close"})
    return bytes(body)


def _blocks(body: bytes) -> list[int]:
    """Hashes of a prompt's beginning; none where the body is no JSON object, which the replica will say."""
    try:
        fields = json.loads(body) if body else None
    except (ValueError, RecursionError):  # compressed, or wrong
        return []
    return hash_blocks(prompt_text(fields)) if isinstance(fields, dict) else []


async def _body(stream: DeploymentResponseGenerator, path: str, headers: Headers) -> AsyncIterator[bytes]:
    """What is left of an answer. Where its replica dies, a stream of events ends with an error, as the replica's own
    would; any other answer breaks off."""
    try:
        async for chunk in stream:
            yield chunk
    except GONE as error:
        log.error("a replica has gone while it answered: %s", error)
        if not any(name.lower() == "content-type" and value.startswith("text/event-stream") for name, value in headers):
            raise
        failure = unavailable("The replica that was answering has gone.")
        yield named_event(error_body(failure)) if path.endswith("/v1/messages") else event(failure.body)


def _error(error: ApiError, path: str) -> Response:
    is_anthropic = path.endswith(("/v1/messages", "/v1/messages/count_tokens"))
    body = error_body(error) if is_anthropic else error.body
    return JSONResponse(body, error.status, error.headers)
