"""`ServerState`: what all handlers share, and the engine's interface as the server sees it. Holds no requests' data."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, Protocol

from aiohttp import web

from qjax.config import ServerConfig
from qjax.outputs import PoolingRequestOutput, RequestOutput
from qjax.pooling_params import PoolingParams
from qjax.sampling_params import SamplingParams
from qjax.server.errors import ApiError, unavailable
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
    async def shutdown(self) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def render_metrics(self) -> bytes: ...
    async def reset_prefix_cache(self) -> bool: ...
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
        self._is_aborting = False
        self._engine_ids: set[str] = set()
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
            raise ApiError(500, "The engine has failed; the server is about to stop.")
        if self.is_stopping:
            raise unavailable("The server is stopping and takes no new requests.")
        if not self.is_ready:
            raise unavailable(f"The model is not ready yet: {self.engine.phase}.")

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
        return len(self._engine_ids)

    @contextlib.contextmanager
    def engine_request(self, request_id: str) -> Iterator[None]:
        """Makes a request of the engine known to `abort_all`."""
        if self._is_aborting:
            raise unavailable("The server is stopping.")
        self._engine_ids.add(request_id)
        try:
            yield
        finally:
            self._engine_ids.discard(request_id)
            if not self._has_answered:
                self._has_answered = True
                log.info("the first request ended %.1f s after the start", time.monotonic() - self._started)

    def abort_all(self) -> None:
        """Ends what is running; the clients get their last chunk with finish_reason "abort"."""
        self._is_aborting = True
        for request_id in list(self._engine_ids):
            self.engine.abort(request_id)

    async def wait_idle(self, timeout: float) -> bool:
        """Whether all requests were answered within the time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)
        return self.is_idle


STATE: web.AppKey[ServerState] = web.AppKey("state", ServerState)
