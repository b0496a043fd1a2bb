"""`AsyncEngine`: an `Engine` in a thread of its own, for an asyncio program such as the server.

Requests reach the thread through a queue, deltas come back through one asyncio queue a request. All methods are
called from one event loop.
"""

import asyncio
import contextlib
import logging
import math
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Literal

from qjax.config import EngineConfig
from qjax.engine.engine import Engine
from qjax.engine.hosts import Followers
from qjax.engine.lockstep import follow as follow
from qjax.engine.lockstep import follows as follows  # for the server, which knows no other file here
from qjax.engine.pooling import PoolingEngine, make_engine
from qjax.outputs import PoolingRequestOutput, RequestOutput
from qjax.pooling_params import PoolingParams
from qjax.sampling_params import SamplingParams
from qjax.text.tokenizer import Tokenizer

log = logging.getLogger("qjax")


class EngineDeadError(RuntimeError):
    """The engine's thread has ended with an error; `__cause__` has it."""


class AsyncEngine:
    """Starts an engine in a thread and streams from it.

    `phase` says what the engine is doing: "starting", what start-up does in words, "ready", "stopping" or "failed".
    """

    def __init__(self, config: EngineConfig):
        self.config = config
        self.phase = "starting"
        self.error: BaseException | None = None
        self._engine: Engine | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[RequestOutput | PoolingRequestOutput | Exception]] = {}
        self._num_sequences: dict[str, int] = {}  # by request
        self._thread: threading.Thread | None = None
        self._step_began: float | None = None  # in time.monotonic's seconds; None between steps
        self._is_sleeping = False
        self._calls: set[asyncio.Future] = set()

    # Start and stop

    def start(self) -> None:
        """Begins loading; returns at once. Must be called inside the event loop that will use the engine."""
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="qjax-engine", daemon=True)
        self._thread.start()

    async def wait_ready(self) -> None:
        """Returns once requests can be served.

        Raises:
          ValueError: a wrong option or checkpoint; whatever else start-up raised.
        """
        await asyncio.shield(self._ready)

    async def shutdown(self, timeout: float = math.inf) -> bool:
        """Aborts what is left and ends the thread. False where it has not ended in time: its device hangs."""
        if self.phase != "failed":
            self.phase = "stopping"
        self._inbox.put(None)
        end = time.monotonic() + timeout
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return self._thread is None or not self._thread.is_alive()

    # What the server asks

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the engine is not ready: await wait_ready() first")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.model_config.vocab_size

    @property
    def max_logprobs(self) -> int:
        return self.vocab_size if self.config.max_logprobs == -1 else self.config.max_logprobs

    @property
    def model_name(self) -> str:
        return self.config.model

    @property
    def pooling_kind(self) -> Literal["embed", "score"] | None:
        """What is made of prompts; None: they are continued."""
        return self.engine.pooling.kind if self.engine.pooling else None

    @property
    def default_sampling_params(self) -> dict[str, Any]:
        return self.engine.default_sampling_params

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    def num_queued(self, more: int = 0) -> int:
        """Sequences that wait for a place, were there so many `more`. Where the last step had a place for all, those to
        come find one too, as long as there are any."""
        engine, num = self.engine, sum(self._num_sequences.values()) + more
        return max(0, num - (engine.num_running if engine.num_waiting else engine.plan.max_num_seqs))

    @property
    def seconds_stalled(self) -> float:
        """How long the step has been going on that the engine is at; 0 between steps, and while it compiles."""
        began, compiles = self._step_began, self.engine.runner.compiles
        if began is None or compiles.is_running:
            return 0.0
        return max(0.0, time.monotonic() - max(began, compiles.ended))

    @property
    def is_sleeping(self) -> bool:
        """True from the call of `sleep` on until all is awake again."""
        return self._is_sleeping

    def render_metrics(self) -> bytes:
        """Prometheus' text format."""
        return self.engine.metrics.render()

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Streams a request's deltas. Closing the iterator early aborts the request.

        Raises:
          ValueError: before the first delta, if the request cannot be served.
          EngineDeadError: the engine has failed.
        """
        self._check_alive()
        if request_id in self._streams:
            raise ValueError(f"request_id {request_id!r} is in use by a running request.")
        self.engine.check_request(request_id, prompt_token_ids, params)
        if params.structured_outputs is not None:
            # A slow grammar keeps neither the loop nor the engine's thread from others; that finds it in the cache.
            await self.engine.grammars.compile_in_time(params.structured_outputs)
        add = partial(
            self.engine.add_request, request_id, prompt_token_ids, params, priority=priority, cache_salt=cache_salt
        )
        async with contextlib.aclosing(self._outputs(request_id, add, params.n)) as outputs:
            async for output in outputs:
                yield output

    async def encode(
        self,
        prompt_token_ids: list[int],
        params: PoolingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> PoolingRequestOutput:
        """The embedding or the score of a prompt. Cancelling it aborts the request.

        Raises:
          ValueError: the request cannot be served, or the engine generates text.
          EngineDeadError: the engine has failed.
        """
        self._check_alive()
        engine = self.engine
        if not isinstance(engine, PoolingEngine):
            raise ValueError(f"{self.config.model} generates text; embeddings and scores need --runner pooling.")
        if request_id in self._streams:
            raise ValueError(f"request_id {request_id!r} is in use by a running request.")
        engine.check_pooling_request(request_id, prompt_token_ids, params)
        add = partial(
            engine.add_pooling_request, request_id, prompt_token_ids, params, priority=priority, cache_salt=cache_salt
        )
        async with contextlib.aclosing(self._outputs(request_id, add)) as outputs:
            return await anext(outputs)

    async def _outputs(
        self, request_id: str, add: Callable[[], None], num_sequences: int = 1
    ) -> AsyncGenerator[Any, None]:
        """What a request gives, from `add` in the engine's thread to its end; closed early, it is aborted."""
        stream: asyncio.Queue[RequestOutput | PoolingRequestOutput | Exception] = asyncio.Queue()
        self._streams[request_id], self._num_sequences[request_id] = stream, num_sequences

        def add_or_refuse() -> None:
            try:
                add()
            except Exception as error:  # of this request alone: nothing was queued
                self._loop.call_soon_threadsafe(stream.put_nowait, error)

        self._inbox.put(add_or_refuse)
        finished = False
        try:
            while not finished:
                output = await stream.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finished
                yield output
        finally:
            del self._streams[request_id], self._num_sequences[request_id]
            if not finished:
                self._inbox.put(lambda: self._abort_in_thread(request_id))

    def abort(self, request_id: str) -> None:
        """Ends a request; its stream gets a last delta with finish_reason "abort"."""
        self._inbox.put(lambda: self._abort_in_thread(request_id))

    async def reset_prefix_cache(self, reset_external: bool = False) -> bool:
        """Forgets cached pages, or also the host's copies; False while requests hold some."""
        return await self._call(lambda: self.engine.reset_prefix_cache(reset_external))

    async def sleep(self, level: int = 1) -> None:
        """Gives the devices' memory back, see `Engine.sleep`. What still runs is aborted.

        Raises:
          ValueError: another level than 1 and 2, or it sleeps already.
        """

        def sleep() -> None:
            for request_id in self.engine.request_ids:
                self._abort_in_thread(request_id)
            self.engine.sleep(level)

        was_sleeping, self._is_sleeping = self._is_sleeping, True
        try:
            await self._call(sleep)
        except Exception:
            self._is_sleeping = was_sleeping
            raise

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Puts back what `sleep` took, see `Engine.wake_up`.

        Raises:
          ValueError: an unknown tag, or the checkpoint cannot be read again.
        """
        await self._call(lambda: self.engine.wake_up(tags))
        self._is_sleeping = bool(self.engine.sleeper.asleep)

    async def _call[T](self, function: Callable[[], T]) -> T:
        """What the function returns or raises in the engine's thread, between two steps."""
        self._check_alive()
        done: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: Exception | None) -> None:
            if not done.done():  # whoever waited may have gone
                done.set_result(result) if error is None else done.set_exception(error)  # type: ignore[arg-type]

        def call() -> None:
            try:
                self._loop.call_soon_threadsafe(settle, function(), None)
            except Exception as error:
                self._loop.call_soon_threadsafe(settle, None, error)

        self._calls.add(done)
        done.add_done_callback(self._calls.discard)
        self._inbox.put(call)
        return await done

    # The engine's thread

    def _run(self) -> None:
        try:
            self._engine = make_engine(self.config, progress=sys.stderr.isatty(), on_phase=self._set_phase)
            if isinstance(self._engine.hosts, Followers):
                self._engine.hosts.on_lost = lambda error: self._tell_loop(self._fail, error)
            self._set_phase("ready")
            self._loop.call_soon_threadsafe(self._ready.set_result, None)
            while self._take_inbox():
                self._step_began = time.monotonic()
                outputs = self._engine.step()
                self._step_began = None
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
            for request_id in list(self._engine.request_ids):
                self._abort_in_thread(request_id)
            if self._engine.hosts is not None:
                self._engine.hosts.close()
        except BaseException as error:
            self._tell_loop(self._fail, error)

    def _tell_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is there to be told
            self._loop.call_soon_threadsafe(function, *args)

    def _take_inbox(self) -> bool:
        """Runs what was asked of the engine; waits while there is nothing to do. False: stop."""
        while True:
            try:
                task = self._inbox.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if task is None:
                return False
            task()

    def _abort_in_thread(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._loop.call_soon_threadsafe(self._deliver, [output])

    def _set_phase(self, phase: str) -> None:
        if self.phase != "stopping":
            self.phase = phase

    # Back in the event loop

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)

    def _fail(self, error: BaseException) -> None:
        if self.error is not None:
            return
        self.error = error
        if not self._ready.done():
            self._ready.set_exception(error)
            self.phase = "failed"
            return
        log.error("the engine has failed: %s", error, exc_info=error)
        self.phase = "failed"
        for stream in self._streams.values():
            stream.put_nowait(self._dead())
        for call in list(self._calls):
            call.set_exception(self._dead())

    def _check_alive(self) -> None:
        if self.error is not None:
            raise self._dead()

    def _dead(self) -> EngineDeadError:
        dead = EngineDeadError(f"The engine has failed: {self.error}")
        dead.__cause__ = self.error
        return dead
