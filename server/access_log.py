"""One line of the log for each HTTP request, once it has ended: what was asked, how it ended, how long it took.

As JSON (`--log-format json`) the parts are fields of their own.
"""

import asyncio
import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from qjax.config import ServerConfig
from qjax.logs import request_id
from qjax.outputs import RequestOutput
from qjax.server.errors import FAILURE, Handler
from qjax.server.request_id import request_id_of

log = logging.getLogger("qjax.access")

CLIENT_GONE = 499  # nginx's: the client closed the connection before its answer was complete


@dataclass
class Record:
    """What is known of an HTTP request besides its status.

    Attributes:
      first_token: when it was there, in time.monotonic's seconds.
      error: why it failed, also where its stream had begun with status 200.
      is_elsewhere: the replica that has the request writes its line.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    error: str | None = None
    is_gone: bool = False
    is_elsewhere: bool = False
    _prompts: set[str] = field(default_factory=set)

    def add(self, output: RequestOutput) -> None:
        """Counts a delta."""
        if output.request_id not in self._prompts:
            self._prompts.add(output.request_id)
            self.add_prompt(len(output.prompt_token_ids), output.num_cached_tokens)
        for delta in output.outputs:
            self.output_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self.finish_reasons.append(delta.finish_reason)
        if self.first_token is None and self.output_tokens:
            self.first_token = time.monotonic()

    def add_prompt(self, num_tokens: int, num_cached: int) -> None:
        self.prompt_tokens += num_tokens
        self.cached_tokens += num_cached


_record: ContextVar[Record | None] = ContextVar("record", default=None)


def current() -> Record:
    """Of the request that is being handled; one that nobody reads where there is none."""
    return _record.get() or Record()


def access_log_middleware(config: ServerConfig):
    """The outermost: it sees the status that the client gets."""
    prefixes = {"", config.root_path}
    hidden = {prefix + path for prefix in prefixes for path in config.disable_access_log_for_endpoints}

    @web.middleware
    async def write_line(request: web.Request, handler: Handler) -> web.StreamResponse:
        record, began = Record(), time.monotonic()
        id_token, record_token = request_id.set(request_id_of(request)), _record.set(record)
        status = 500
        try:
            response = await handler(request)
            status = CLIENT_GONE if record.is_gone else response.status
            return response
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            record.error = record.error or request.get(FAILURE)
            is_hidden = config.disable_uvicorn_access_log or request.path in hidden or record.is_elsewhere
            if not is_hidden:
                _write(request, record, status, began)
            _record.reset(record_token)
            request_id.reset(id_token)

    return write_line


def client_of(request: web.Request) -> str | None:
    """Its address; behind a proxy on a unix socket, which has none, what the proxy says."""
    return request.remote or request.headers.get("X-Forwarded-For")


def _write(request: web.Request, record: Record, status: int, began: float) -> None:
    parts: dict[str, Any] = {
        "client": client_of(request),
        "method": request.method,
        "path": request.path,
        "status": status,
        "seconds": round(time.monotonic() - began, 4),
    }
    if record.prompt_tokens:
        parts |= {"prompt_tokens": record.prompt_tokens, "cached_tokens": record.cached_tokens}
    if record.first_token is not None:
        first = {"first_token_seconds": round(record.first_token - began, 4)}
        parts |= {"output_tokens": record.output_tokens, **first}
    if record.finish_reasons:
        parts["finish_reason"] = ",".join(record.finish_reasons)
    if record.error is not None:
        parts["error"] = record.error
    if not log.isEnabledFor(logging.INFO):
        return
    rest = " ".join(f"{name}={value}" for name, value in list(parts.items())[4:] if name != "error")
    error = "" if record.error is None else f" error={record.error!r}"
    path = request.path if request.path.isprintable() else ascii(request.path)
    log.info(
        "%s %s %s %d %s%s",
        *(parts["client"] or "-", request.method, path, status, rest, error),
        extra=parts,
    )
