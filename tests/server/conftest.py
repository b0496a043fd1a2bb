import asyncio
import contextlib
import json

import aiohttp
import openai
import pytest

from qjax.config import ServerConfig
from qjax.server.lifecycle import Stop, serve
from qjax.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine
from tests.text.small_tokenizer import write_small_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


class Server:
    """A server on a real socket, and clients for it."""

    def __init__(self, engine, url, stop, task, session):
        self.engine, self.url, self.stop, self.task, self.session = engine, url, stop, task, session
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    async def get(self, path, **options):
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await response.json(), response.headers

    async def post(self, path, body=None, **options):
        if body is not None:
            options["json"] = body
        async with self.session.post(self.url + path, **options) as response:
            return response.status, await response.json(), response.headers

    async def events(self, path, body):
        """The data of each event of a stream, the last one being "[DONE]"."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            text = (await response.read()).decode()
            assert response.status == 200, text
            assert response.content_type == "text/event-stream"
        lines = text.split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") and "\n" not in line for line in lines)
        data = [line.removeprefix("data: ") for line in lines]
        assert data[-1] == "[DONE]"
        return [json.loads(d) for d in data[:-1]]


@pytest.fixture
async def start(tokenizer, capsys, monkeypatch):
    """Starts servers: `await start(engine options, config=ServerConfig options)`."""
    monkeypatch.delenv("QJAX_API_KEY", raising=False)
    async with contextlib.AsyncExitStack() as stack:

        async def start_server(config=None, wait=True, **engine_options):
            engine = FakeEngine(tokenizer, **engine_options)
            stop = Stop()
            port = free_port()
            options = ServerConfig(host="127.0.0.1", port=port, **{"shutdown_timeout": 0.2, **(config or {})})
            task = asyncio.ensure_future(serve(engine, options, stop))
            session = await stack.enter_async_context(aiohttp.ClientSession())
            server = Server(engine, f"http://127.0.0.1:{port}", stop, task, session)
            stack.push_async_callback(end, server)
            for _ in range(500):
                if task.done():
                    break
                with contextlib.suppress(aiohttp.ClientConnectorError):
                    status, _, _ = await server.get("/health")
                    if status == 200 or not wait:
                        break
                await asyncio.sleep(0.01)
            return server

        yield start_server


async def end(server):
    server.stop.ask()
    await server.client.close()
    with contextlib.suppress(Exception):
        await server.task


@pytest.fixture
async def server(start):
    return await start()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
