"""The socket: where the server listens, with or without TLS, and how requests that are no HTTP are refused."""

import asyncio
import contextlib
import fcntl
import logging
import ssl
import struct
import termios
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from qjax.config import ServerConfig
from qjax.server import access_log
from qjax.server.errors import ApiError, internal_error
from qjax.server.request_id import HEADER, request_id_of

log = logging.getLogger("qjax.server")

BACKLOG = 2048  # connections that may wait while Python is busy: hundreds of clients come at once


@dataclass(frozen=True)
class Address:
    """Where a client on this machine finds the server."""

    url: str
    uds: str | None = None

    def __str__(self) -> str:
        return f"{self.url} (unix socket {self.uds})" if self.uds else self.url

    @property
    def curl(self) -> str:
        """The command line up to a path of the server."""
        return f"curl --unix-socket {self.uds} {self.url}" if self.uds else f"curl {self.url}"


def make_runner(app: web.Application, config: ServerConfig) -> web.AppRunner:
    return Runner(
        app,
        handler_cancellation=True,  # a client that goes away ends its request
        access_log=None,
        shutdown_timeout=1.0,  # by then the lifecycle has given requests their time
        send_timeout=config.send_timeout,
        max_line_size=config.max_header_size,
        max_field_size=config.max_header_size,
        max_headers=config.max_header_count,
    )


async def listen(runner: web.AppRunner, config: ServerConfig) -> Address:
    """Opens the port or the socket.

    Raises:
      ValueError: it cannot be had, or a file of TLS is wrong; the message names the option.
    """
    context = ssl_context(config)
    if config.uds is not None:
        try:
            await web.UnixSite(runner, config.uds, ssl_context=context, backlog=BACKLOG).start()
        except OSError as error:
            raise ValueError(f"cannot listen on the unix socket {config.uds} (--uds): {error}.") from None
        return Address("https://localhost" if context else "http://localhost", config.uds)
    try:
        await web.TCPSite(runner, config.host, config.port, ssl_context=context, backlog=BACKLOG).start()
    except OSError as error:
        raise ValueError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror or error}. "
            "Choose others with --host and --port."
        ) from None
    port = runner.addresses[0][1]
    host = "localhost" if config.host in ("0.0.0.0", "::", "") else config.host
    host = f"[{host}]" if ":" in host else host
    return Address(f"{'https' if context else 'http'}://{host}:{port}")


def ssl_context(config: ServerConfig) -> ssl.SSLContext | None:
    """What `--ssl-certfile` and its like say; None for plain HTTP.

    Raises:
      ValueError: a file cannot be read or does not fit.
    """
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:  # of which SSLError is one
        raise ValueError(
            f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile} must be a PEM certificate "
            f"and its key: {error}."
        ) from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except OSError as error:
            raise ValueError(f"--ssl-ca-certs {config.ssl_ca_certs} must hold PEM certificates: {error}.") from None
    context.verify_mode = ssl.VerifyMode(config.ssl_cert_reqs)
    return context


class Runner(web.AppRunner):
    """aiohttp's, but what its HTTP parser refuses gets OpenAI's error object too, and who does not read is dropped.

    Args:
      send_timeout: seconds; 0: never.
    """

    def __init__(self, app: web.Application, *, send_timeout: float, **options: Any):
        super().__init__(app, **options)
        self._send_timeout = send_timeout

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        server = _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,
        )
        server.send_timeout = self._send_timeout
        return server


class _Server(web.Server):
    send_timeout: float

    def __call__(self) -> RequestHandler:
        return _Protocol(self, self.send_timeout, loop=self._loop, **self._kwargs)


class _Protocol(RequestHandler):
    """A connection. Its transport calls `pause_writing` when much is unsent, and `resume_writing` when little is."""

    __slots__ = ("_drop_timer", "_num_unread", "_send_timeout")

    def __init__(self, server: _Server, send_timeout: float, **options: Any):
        super().__init__(server, **options)
        self._send_timeout = send_timeout
        self._drop_timer: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._keep()
        super().connection_lost(exc)

    def _keep(self) -> None:
        if self._drop_timer is not None:
            self._drop_timer.cancel()
            self._drop_timer = None

    def _watch_reader(self) -> None:
        if self._send_timeout:
            self._num_unread = self._unread()
            self._drop_timer = self._loop.call_later(self._send_timeout, self._check_reader)

    def _unread(self) -> int:
        """Bytes that the client's machine has not taken: of the transport, and of the kernel, whose buffer has MiBs."""
        if self.transport is None:
            return 0
        num_kernel, sock = 0, self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            (num_kernel,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
        return self.transport.get_write_buffer_size() + num_kernel

    def _check_reader(self) -> None:
        """Drops who has read nothing: without a word, as nobody would read it. What it asked for ends with it."""
        if self._unread() < self._num_unread:
            return self._watch_reader()
        message = f"the client read nothing for {self._send_timeout:g} s, so it was dropped"
        access_log.current().error = message
        log.warning("%s", message)
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.Request,  # type: ignore[override]
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """No handler has seen the request, or one failed while its answer was on its way."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, so there is no place for an error")
        if status >= 500 and exc is not None:
            error = internal_error(exc)
        elif isinstance(exc, LineTooLong):
            error = ApiError(431, f"A line of the request's head is too long (--max-header-size): {_one_line(message)}")
        else:
            error = ApiError(status, f"The request is not valid HTTP: {_one_line(message)}")
        response = error.response()
        response.headers[HEADER] = request_id_of(request)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """What a client did wrong has been answered, and is no fault for the log."""
        if isinstance(kw.get("exc_info"), RequestPayloadError):
            self.logger.debug(*args, **kw)
        else:
            super().log_exception(*args, **kw)


def _one_line(message: Any) -> str:
    """The parser's messages quote the request over several lines."""
    return " ".join(str(message).split())[:300]
