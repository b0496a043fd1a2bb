"""Start and stop: listen, load, serve, and end in order. `run` is what `qjax serve` calls.

The port is open before the model is loaded, so /health can say how far loading is. On SIGTERM or SIGINT /health turns
first, running requests get their time, then are ended with a last chunk. If the engine dies, so does the server.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from qjax.config import EngineConfig, ServerConfig
from qjax.server.app import api_keys, make_app
from qjax.server.listening import Address, listen, make_runner
from qjax.server.state import AsyncEngine, ServerState

log = logging.getLogger("qjax.server")

WATCH_SECONDS = 0.25  # how often the engine is looked at
SHUTDOWN_SECONDS = 10.0  # that the engine gets to end its last step
FLUSH_SECONDS = 5.0  # that ended requests get to send their last chunk


def run(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serves until it is told to stop. Returns the process's exit code: 0, or 1 where the engine failed.

    Raises:
      ValueError: a wrong option or checkpoint, or a port that cannot be had; the message names it.
    """
    from qjax.engine.async_engine import AsyncEngine as RealEngine  # imports jax
    from qjax.engine.async_engine import follow, follows

    if server_config.headless or follows(engine_config):
        return follow(engine_config)
    return run_engine(RealEngine(engine_config), server_config)


def run_engine(engine: AsyncEngine, config: ServerConfig) -> int:
    """`run` with an engine of the caller's."""
    code = asyncio.run(_serve_until_signal(engine, config))
    if engine.phase != "stopping":
        # Its thread may be inside a download, a compiler, or a step that does not end, and Python would wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class Stop:
    """The wish to end: `asked` by a first signal, `hurried` by a second, which skips the wait for running requests."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def ask(self) -> None:
        (self.hurried if self.asked.is_set() else self.asked).set()


async def _serve_until_signal(engine: AsyncEngine, config: ServerConfig) -> int:
    stop, loop = Stop(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.ask)
    return await serve(engine, config, stop)


async def serve(engine: AsyncEngine, config: ServerConfig, stop: Stop) -> int:
    """Listens, starts the engine, and serves until `stop` or the engine's death. Returns the exit code.

    Raises:
      ValueError: a wrong option, or what the engine's start-up raised.
    """
    started = time.monotonic()
    state = ServerState(engine, config, read_chat_template(config))
    if config.server_dev_mode and not api_keys(config):
        log.warning("--server-dev-mode without --api-key: whoever reaches the server can put it to sleep")
    runner = make_runner(make_app(state), config)
    await runner.setup()
    try:
        address = await listen(runner, config)
        log.info("listening on %s; /health says how far loading is", address)
        engine.start()
        if await _started(engine, stop):
            gc.freeze()  # what is here now stays: a collection that walks through it would stop all streams for long
            print(ready_line(state, address, time.monotonic() - started), flush=True)
            await _watch(state, stop)
        if engine.phase == "failed":
            log.error("the engine has failed, so the server stops")
            state.is_stopping = True
            await state.wait_idle(FLUSH_SECONDS)
            return 1
        await _drain(state, stop)
        if engine.phase in ("ready", "stopping") and not await engine.shutdown(SHUTDOWN_SECONDS):
            log.error("the engine's step does not end, so the process ends without it")
            engine.phase = "hung"
            return 1
        return 0
    finally:
        await runner.cleanup()


async def _started(engine: AsyncEngine, stop: Stop) -> bool:
    """Waits for the engine; false if told to stop before. Raises what start-up raised."""
    ready, asked = asyncio.ensure_future(engine.wait_ready()), asyncio.ensure_future(stop.asked.wait())
    try:
        await asyncio.wait({ready, asked}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
        return ready.done()
    finally:
        ready.cancel()
        asked.cancel()


async def _watch(state: ServerState, stop: Stop) -> None:
    """Returns when told to stop, or when the engine has failed. Says so when a step does not end."""
    engine, was_stalled = state.engine, False
    while not stop.asked.is_set() and engine.phase != "failed":
        if state.is_stalled != was_stalled:
            was_stalled = not was_stalled
            if was_stalled:
                log.error("the engine's step has been going on for %.0f s: /health says 503", engine.seconds_stalled)
            else:
                log.warning("the engine goes on")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.asked.wait(), WATCH_SECONDS)


async def _drain(state: ServerState, stop: Stop) -> None:
    """Takes nothing new, lets running requests finish for a while, then ends them with a last chunk."""
    state.is_stopping = True
    log.info("stopping: running requests get up to %g seconds", state.config.shutdown_timeout)
    idle = asyncio.ensure_future(state.wait_idle(state.config.shutdown_timeout))
    hurried = asyncio.ensure_future(stop.hurried.wait())
    await asyncio.wait({idle, hurried}, return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    hurried.cancel()
    if not state.is_idle:
        log.warning("requests are still running: they are ended")
        state.abort_all()
        await state.wait_idle(FLUSH_SECONDS)


def read_chat_template(config: ServerConfig) -> str | None:
    """The text of `--chat-template`.

    Raises:
      ValueError: the file cannot be read.
    """
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template must name a readable text file: {error}") from None


_EXAMPLES: dict[str | None, tuple[str, dict[str, Any]]] = {
    None: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello!"}]}),
    "embed": ("/v1/embeddings", {"input": "Hello!"}),
    "score": ("/v1/rerank", {"query": "What is Oslo?", "documents": ["Oslo is a city.", "An oak is a tree."]}),
}


def ready_line(state: ServerState, address: Address, seconds: float) -> str:
    """What is printed once requests are served."""
    key = ' -H "Authorization: Bearer $QJAX_API_KEY"' if api_keys(state.config) else ""
    path, example = _EXAMPLES[state.engine.pooling_kind]
    body = json.dumps(example)
    return (
        f"qjax serves {state.model_names[0]} at {address} (context {state.engine.max_model_len} tokens, "
        f"ready after {seconds:.1f} s). Try: "
        f"{address.curl}{path}{key} -H 'Content-Type: application/json' -d '{body}'"
    )
