"""`Replica`: the Ray actor that keeps a server running and passes requests to it, byte for byte, over a unix socket."""

import asyncio
import logging
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp
from ray import serve

from qjax.config import EngineConfig, ServerConfig
from qjax.server.ray_child import to_line

log = logging.getLogger("qjax.server")

Headers = list[tuple[str, str]]
POLL_SECONDS = 0.1  # between two looks at a server that loads
LAST_LINES = 20  # of a server that could not start, for the error
# Each hop has its own of these.
HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)


class Answer(NamedTuple):
    """A whole answer, and whose it is."""

    replica: str
    status: int
    headers: Headers
    body: bytes


class ReplicaGoneError(RuntimeError):
    """The replica's server has ended, or closed the connection before its answer was whole."""


class Replica:
    """One engine behind a unix socket. The class of the Serve deployment; its methods are called by Ray."""

    async def __init__(self, engine: EngineConfig, server: ServerConfig):  # type: ignore[misc]  # Ray awaits it
        """Returns once requests are served.

        Raises:
          RuntimeError: the server ended while it started; the message has its last lines.
        """
        self._folder = tempfile.mkdtemp(prefix="qjax-")
        socket = f"{self._folder}/socket"
        listening = replace(
            server,
            uds=socket,
            ssl_certfile=None,  # TLS is the proxy's
            ssl_keyfile=None,
            disable_access_log_for_endpoints=[*server.disable_access_log_for_endpoints, "/health"],  # Ray asks often
        )
        self._stop_timeout = server.shutdown_timeout + 20
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "qjax.server.ray_child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._log = asyncio.ensure_future(self._pass_log_on())
        assert self._process.stdin is not None
        self._process.stdin.write(to_line(engine, listening))  # and stays open: its end is the server's
        self._session = aiohttp.ClientSession(
            "http://localhost",
            connector=aiohttp.UnixConnector(socket, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        while not await self._is_ready():
            if self._process.returncode is not None:
                await self._log
                raise RuntimeError("the server could not start: " + "\n".join(self._last_lines))
            await asyncio.sleep(POLL_SECONDS)
        self._guard = asyncio.ensure_future(self._end_with_server())

    async def forward(
        self, method: str, target: str, headers: Headers, body: bytes, blocks: Sequence[int] = ()
    ) -> AsyncIterator[Any]:
        """Passes a request on: first the answer's status and headers, then its body as it comes. Closed early, the
        connection is closed too, and with it the server aborts the request.

        Args:
          blocks: of the prompt, for the router alone.

        Raises:
          ReplicaGoneError: see there.
        """
        try:
            request = self._session.request(method, target, headers=headers, data=body or None, allow_redirects=False)
            async with request as response:
                yield response.status, _end_to_end(response)
                async for chunk in response.content.iter_any():
                    yield chunk
        except aiohttp.ClientError as error:
            raise ReplicaGoneError(f"the replica's server has gone: {error}") from None

    async def ask(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        """A whole answer: what all replicas are asked at once.

        Raises:
          ReplicaGoneError: see there.
        """
        answer = self.forward(method, target, headers, body)
        status, answer_headers = await anext(answer)
        whole = b"".join([chunk async for chunk in answer])
        return Answer(serve.get_replica_context().replica_id.unique_id, status, answer_headers, whole)

    async def check_health(self) -> None:
        """Raises RuntimeError unless the server's /health is good: then Ray puts another replica in its place."""
        try:
            async with self._session.get("/health") as response:
                if response.status != 200:
                    raise RuntimeError(f"/health: {await response.text()}")
        except aiohttp.ClientError as error:
            raise RuntimeError(f"/health: {error}") from None

    async def __del__(self) -> None:
        """Ray has drained the replica: the server ends as `qjax serve` does."""
        if hasattr(self, "_guard"):
            self._guard.cancel()
            await self._session.close()
        if self._process.returncode is None:
            self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), self._stop_timeout)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _is_ready(self) -> bool:
        try:
            await self.check_health()
        except RuntimeError:
            return False
        return True

    async def _pass_log_on(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            self._last_lines.append(line.decode(errors="replace").rstrip())

    async def _end_with_server(self) -> None:
        """A replica without its server is no replica: Ray sees at once that it is gone, and starts another."""
        code = await self._process.wait()
        log.error("the replica's server has ended with exit code %s, so the replica ends", code)
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(1)


def _end_to_end(response: aiohttp.ClientResponse) -> Headers:
    names = HOP_BY_HOP | {"date", "server", "x-request-id"}  # which Ray's proxy writes
    return [(name, value) for name, value in response.headers.items() if name.lower() not in names]
