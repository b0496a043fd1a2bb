"""A server over a real engine, on a real socket, for the length of a `with`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from qjax import EngineConfig
from qjax.config import ServerConfig
from qjax.engine.async_engine import AsyncEngine
from qjax.server.lifecycle import Stop, serve
from tests.server.conftest import free_port


@contextlib.asynccontextmanager
async def serving(config: EngineConfig, **options) -> AsyncIterator[tuple[str, AsyncEngine]]:
    """Yields the address and the engine once requests are served; stops cleanly, with exit code 0."""
    engine, stop, port = AsyncEngine(config), Stop(), free_port()
    server = asyncio.ensure_future(serve(engine, ServerConfig(host="127.0.0.1", port=port, **options), stop))
    while engine.phase != "ready":
        await asyncio.sleep(0.01)
        if server.done():
            server.result()
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        stop.ask()
        code = await server
    assert code == 0
