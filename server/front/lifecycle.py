"""Start and stop of `qjax serve --data-parallel-size N`: N replicas, and the front on the public port. `run` is what
the command calls. The front holds no model and imports no jax.
"""

import asyncio
import contextlib
import logging
import signal
import tempfile
import time
from pathlib import Path

from qjax.config import EngineConfig, ServerConfig
from qjax.server.app import api_keys
from qjax.server.front import devices
from qjax.server.front.app import make_front_app
from qjax.server.front.command import command, environment, replica_config
from qjax.server.front.proxy import GONE
from qjax.server.front.replica import Replica
from qjax.server.front.state import Front
from qjax.server.lifecycle import FLUSH_SECONDS, SHUTDOWN_SECONDS, Stop, read_chat_template
from qjax.server.listening import Address, listen, make_runner

log = logging.getLogger("qjax.server")


def run(engine: EngineConfig, server: ServerConfig) -> int:
    """Serves until it is told to stop. Returns the exit code: 0, or that of the replicas where none could start.

    Raises:
      ValueError: options that do not go together, too few GPUs, or a port that cannot be had.
    """
    devices.check(engine, server)
    read_chat_template(server)  # refused here, not N times below
    split = devices.split(server.data_parallel_size, engine.tensor_parallel_size, devices.visible_gpus())
    with tempfile.TemporaryDirectory(prefix="qjax-") as folder:  # which only this user can enter
        return asyncio.run(_serve_until_signal(engine, server, split, Path(folder)))


async def _serve_until_signal(
    engine: EngineConfig, server: ServerConfig, split: list[dict[str, str]], folder: Path
) -> int:
    stop, loop = Stop(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.ask)
    replicas = []
    for i, its_devices in enumerate(split):
        uds = str(folder / f"{i}.sock")
        line = command(engine, replica_config(server, uds))
        replicas.append(Replica(i, line, environment(engine, i, its_devices), uds, server.watchdog_timeout))
    return await serve(replicas, server, stop)


async def serve(replicas: list[Replica], config: ServerConfig, stop: Stop) -> int:
    """Listens, starts the replicas, and serves until `stop`, or until all of them have failed to start."""
    began, front = time.monotonic(), Front(replicas, config)
    runner = make_runner(make_front_app(front), config)
    await runner.setup()
    keepers: list[asyncio.Future[None]] = []
    try:
        address = await listen(runner, config)
        log.info("listening on %s; /health says how far each of %d replicas is", address, len(replicas))
        keepers = [asyncio.ensure_future(replica.keep()) for replica in replicas]
        if await _started(front, stop):
            print(await _ready_line(front, address, time.monotonic() - began), flush=True)
            await stop.asked.wait()
        elif not stop.asked.is_set():
            log.error("no replica could be started, so the server stops")
            return max((replica.exit_code or 1 for replica in replicas), default=1)
        await _drain(front, stop, keepers)
        return 0
    finally:
        front.is_stopping = True
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        await runner.cleanup()


async def _started(front: Front, stop: Stop) -> bool:
    """Waits for the first start of each replica. Whether one of them can serve."""
    starts = asyncio.gather(*(replica.has_started.wait() for replica in front.replicas))
    asked = asyncio.ensure_future(stop.asked.wait())
    try:
        await asyncio.wait({starts, asked}, return_when=asyncio.FIRST_COMPLETED)
        return not stop.asked.is_set() and bool(front.serving)
    finally:
        starts.cancel()
        asked.cancel()


async def _drain(front: Front, stop: Stop, keepers: list[asyncio.Future[None]]) -> None:
    """Takes nothing new; each replica lets its requests finish, as a server alone would."""
    front.is_stopping = True
    log.info("stopping: running requests get up to %g seconds", front.config.shutdown_timeout)
    for replica in front.replicas:
        replica.stop()
    ended = asyncio.gather(*keepers)
    hurried = asyncio.ensure_future(stop.hurried.wait())
    limit = time.monotonic() + front.config.shutdown_timeout + FLUSH_SECONDS + SHUTDOWN_SECONDS
    await asyncio.wait({ended, hurried}, timeout=limit - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        for replica in front.replicas:
            replica.stop()
        await asyncio.wait({ended}, timeout=FLUSH_SECONDS + SHUTDOWN_SECONDS)
    hurried.cancel()
    await front.wait_idle(FLUSH_SECONDS)  # what they said last is on its way


async def _ready_line(front: Front, address: Address, seconds: float) -> str:
    """What is printed once requests are served."""
    model = {"id": "the model", "max_model_len": "?"}
    with contextlib.suppress(*GONE, LookupError):  # a replica may end at any time
        async with front.serving[0].session.get("/v1/models") as response:
            model = (await response.json())["data"][0]
    key = ' -H "Authorization: Bearer $QJAX_API_KEY"' if api_keys(front.config) else ""
    return (
        f"qjax serves {model['id']} at {address} ({len(front.serving)} of {len(front.replicas)} replicas, context "
        f"{model['max_model_len']} tokens, ready after {seconds:.1f} s). Try: {address.curl}/v1/models{key}"
    )
