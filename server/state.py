"""`ServerState`: what all handlers share, and the engine's interface as the server sees it. Holds no requests' data."""

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal, Protocol

from aiohttp import web

from qjax.config import ServerConfig
from qjax.outputs import PoolingRequestOutput, RequestOutput
from qjax.pooling_params import PoolingParams
from qjax.sampling_params import SamplingParams
from qjax.server.errors import ApiError, bad_request, engine_failed, unavailable
from qjax.text.tokenizer import Tokenizer

log = logging.getLogger("qjax.server")


class AsyncEngine(Protocol):
    """The part of `qjax.engine.async_engine.AsyncEngine` that the server uses; see there for the contracts.

    A protocol, because importing the real one imports jax.
    """

    phase: str
    error: BaseException | None

    def start(self) -> None: ...
    async def wait_ready(self) -> None: ...
    async def shutdown(self, timeout: float = math.inf) -> bool: ...
    async def sleep(self, level: int) -> None: ...
    async def wake_up(self, tags: Sequence[str] | None) -> None: ...
    def num_queued(self, more: int = 0) -> int: ...
    def abort(self, request_id: str) -> None: ...
    def render_metrics(self) -> bytes: ...
    async def reset_prefix_cache(self, reset_external: bool) -> bool: ...
    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]: ...

    async def encode(
        self,
        prompt_token_ids: list[int],
        params: PoolingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> PoolingRequestOutput: ...

    @property
    def seconds_stalled(self) -> float: ...
    @property
    def is_sleeping(self) -> bool: ...
    @property
    def pooling_kind(self) -> Literal["embed", "score"] | None: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_logprobs(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def model_name(self) -> str: ...
    @property
    def default_sampling_params(self) -> dict[str, Any]: ...


class ServerState:
    """The engine, the options, and which requests are running.

    Attributes:
      is_stopping: no new requests are taken.
      chat_template: text of `--chat-template`, read at start.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig, chat_template: str | None = None):
        self.engine = engine
        self.config = config
        self.chat_template = chat_template
        self.is_stopping = False
        self.num_rejected = 0  # requests that the queue had no room for
        self._refusal: str | None = None
        self._answer_ids: dict[str, str] = {}  # the engine's id of a request -> its answer's
        self._num_requests = 0
        self._started = time.monotonic()
        self._has_answered = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model_names(self) -> list[str]:
        return self.config.served_model_name or [self.engine.model_name]

    @property
    def is_ready(self) -> bool:
        return self.engine.phase == "ready" and not self.is_stopping

    @property
    def is_stalled(self) -> bool:
        """The engine's step has not ended for longer than `--watchdog-timeout`."""
        limit = self.config.watchdog_timeout
        return limit > 0 and self.engine.phase == "ready" and self.engine.seconds_stalled >= limit

    def check_model(self, name: str | None) -> str:
        """The name to answer with. An absent or empty one means the served model.

        Raises:
          ApiError: 404, no such model.
        """
        names = self.model_names
        if not name:
            return names[0]
        if name not in names:
            message = f"The model `{name}` does not exist. Valid aliases: {', '.join(names)}."
            raise ApiError(404, message, param="model")
        return name

    def check_ready(self) -> None:
        """Raises ApiError 503 unless requests can be served now, 500 if the engine has failed."""
        if self.engine.phase == "failed":
            raise engine_failed()
        if self.is_stopping:
            raise unavailable("The server is stopping and takes no new requests.")
        if not self.is_ready:
            raise unavailable(f"The model is not ready yet: {self.engine.phase}.")
        if self.is_stalled:
            raise unavailable(f"The engine has not ended a step for {self.engine.seconds_stalled:.0f} seconds.")

    # Which requests are running

    @property
    def is_idle(self) -> bool:
        return self._idle.is_set()

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts an HTTP request until it has been answered."""
        self._num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_requests -= 1
            if self._num_requests == 0:
                self._idle.set()

    @property
    def num_engine_requests(self) -> int:
        return len(self._answer_ids)

    @contextlib.contextmanager
    def engine_request(self, request_id: str, answer_id: str | None = None) -> Iterator[None]:
        """Makes a request of the engine known to `abort`, if it may begin.

        Args:
          answer_id: of the HTTP request that it is a part of; the same if it is all of it.

        Raises:
          ApiError: 503, the queue is full, the engine sleeps, or the server stops; 400, the id is in use.
        """
        answer_id = answer_id or request_id
        if request_id in self._answer_ids:
            raise bad_request(f"request_id {request_id!r} is in use by a running request.", "request_id")
        if self._refusal is not None:
            raise unavailable(self._refusal)
        if self.engine.is_sleeping:
            raise unavailable("The engine sleeps: POST /wake_up wakes it.")
        self._check_queue(answer_id)
        self._answer_ids[request_id] = answer_id
        try:
            yield
        finally:
            del self._answer_ids[request_id]
            if not self._has_answered:
                self._has_answered = True
                log.info("the first request ended %.1f s after the start", time.monotonic() - self._started)

    def _check_queue(self, answer_id: str) -> None:
        limit = self.config.max_num_queued_reqs
        if limit is None or self.engine.num_queued(1) <= limit or answer_id in self._answer_ids.values():
            return
        self.num_rejected += 1
        raise unavailable(
            "The engine is currently busy and cannot accept new requests. Please try again later or on a different "
            f"instance. ({limit} may wait: --max-num-queued-reqs)"
        )

    @contextlib.contextmanager
    def refusing(self, why: str) -> Iterator[None]:
        """Begins no request of the engine."""
        self._refusal = why
        try:
            yield
        finally:
            self._refusal = None

    def abort(self, ids: Sequence[str] | None = None) -> list[str]:
        """Ends requests by their answer's id, with or without its prefix ("chatcmpl-"), or all. Their clients get a
        last chunk with finish_reason "abort".

        Returns:
          The ids that were found.
        """
        names: dict[str, list[str]] = {}
        for request_id, answer_id in self._answer_ids.items():
            for name in {answer_id, re.sub("^[a-z]+[-_]", "", answer_id)} if ids is not None else {answer_id}:
                names.setdefault(name, []).append(request_id)
        found = [name for name in dict.fromkeys(names if ids is None else ids) if name in names]
        for name in found:
            for request_id in names[name]:
                self.engine.abort(request_id)
        return found

    def abort_all(self) -> None:
        """Ends what is running, and begins nothing more."""
        self._refusal = "The server is stopping."
        self.abort()

    async def wait_idle(self, timeout: float) -> bool:
        """Whether all requests were answered within the time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return self.is_idle


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)
