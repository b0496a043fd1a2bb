import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time

import aiohttp
import pytest

from qjax.config import ServerConfig
from qjax.server.lifecycle import Stop, serve
from tests.server.fake_engine import FakeEngine

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def endless(*_):
    return "word " * 10_000


async def until(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


class TestStart:
    async def test_health_tells_the_phase_while_loading(self, start, capsys):
        server = await start(wait=False, phases=["loading the weights", "compiling"])
        for phase in ("loading the weights", "compiling"):
            await until(lambda phase=phase: server.engine.phase == phase)
            for path in ("/health", "/ping"):
                status, body, headers = await server.get(path)
                assert (status, body) == (503, {"status": "loading", "phase": phase}) and headers["Retry-After"]
            status, body, headers = await server.post(CHAT, {"messages": HI})
            assert status == 503 and phase in body["error"]["message"] and headers["Retry-After"]
            assert (await server.get("/v1/models"))[0] == 503
            assert (await server.get("/version"))[0] == 200
            assert "qjax serves" not in capsys.readouterr().out
            server.engine.go_on.set()
        await until(lambda: server.engine.phase == "ready")
        assert (await server.get("/health"))[:2] == (200, {"status": "ready"})
        status, _, _ = await server.post("/ping")
        assert status == 200
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and f"curl {server.url}/v1/chat/completions" in line and "256 tokens" in line

    async def test_what_start_up_raises_comes_out(self, tokenizer):
        engine = FakeEngine(tokenizer)
        engine.start_error = ValueError("model: no such folder")
        with pytest.raises(ValueError, match="no such folder"):
            await serve(engine, ServerConfig(host="127.0.0.1", port=0), Stop())

    async def test_a_port_in_use_is_named(self, start, server, tokenizer):
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ValueError, match=rf"port {port}.*--port"):
            await serve(FakeEngine(tokenizer), ServerConfig(host="127.0.0.1", port=port), Stop())

    async def test_a_missing_template_is_named(self, tokenizer):
        with pytest.raises(ValueError, match="--chat-template"):
            await serve(FakeEngine(tokenizer), ServerConfig(port=0, chat_template="/no/such.jinja"), Stop())


class TestDisconnect:
    """The client closes its socket: the engine's request ends soon after, streamed or not."""

    @pytest.mark.parametrize("is_stream", [True, False])
    @pytest.mark.parametrize(
        ("path", "body"),
        [(CHAT, {"messages": HI}), (CHAT, {"messages": HI, "n": 3}), (TEXT, {"prompt": ["x", "y"], "max_tokens": 200})],
    )
    async def test_closing_the_socket_ends_the_request(self, start, path, body, is_stream):
        server = await start(answer=endless, delay=0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        data = json.dumps({**body, "stream": is_stream}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        writer.write(head.encode() + b"\r\n\r\n" + data)
        num = len(body.get("prompt", [1]))
        if is_stream:
            await reader.readuntil(b"data: ")
        await until(lambda: server.engine.num_unfinished == num)
        writer.close()
        await until(lambda: server.engine.num_unfinished == 0)
        assert set(server.engine.ends.values()) == {"closed"}
        assert (await server.post(CHAT, {"messages": HI, "max_tokens": 1}))[0] == 200

    async def test_an_answered_request_is_not_aborted(self, server):
        await server.post(CHAT, {"messages": HI})
        await server.events(CHAT, {"messages": HI})
        await server.post(TEXT, {"prompt": ["x", "y"]})
        assert set(server.engine.ends.values()) == {"finished"} and len(server.engine.ends) == 4

    async def test_a_storm_of_disconnects_leaves_nothing(self, start):
        server = await start(answer=endless, delay=0.002)

        async def one(i):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02 + 0.01 * (i % 10)):
                    if i % 2:
                        await server.events(CHAT, {"messages": HI, "n": 1 + i % 3})
                    else:
                        await server.post(CHAT, {"messages": HI})

        await asyncio.gather(*(one(i) for i in range(24)))
        await until(lambda: server.engine.num_unfinished == 0)


class TestStop:
    async def test_running_requests_finish_and_new_ones_are_refused(self, start):
        server = await start({"shutdown_timeout": 10}, delay=0.02)
        stream = asyncio.ensure_future(server.events(CHAT, {"messages": HI}))
        whole = asyncio.ensure_future(server.post(CHAT, {"messages": HI}))
        await until(lambda: server.engine.num_unfinished == 2)
        server.stop.ask()
        await asyncio.sleep(0.01)
        status, body, _ = await server.get("/health")
        assert (status, body["status"]) == (503, "stopping")
        status, body, headers = await server.post(CHAT, {"messages": HI})
        assert status == 503 and headers["Retry-After"] and "stopping" in body["error"]["message"]
        assert (await stream)[-1]["choices"][0]["finish_reason"] == "stop"
        assert (await whole)[1]["choices"][0]["finish_reason"] == "stop"
        assert await server.task == 0
        assert server.engine.phase == "stopping" and set(server.engine.ends.values()) == {"finished"}

    @pytest.mark.parametrize("is_hurried", [False, True])
    async def test_after_the_limit_they_get_a_last_chunk(self, start, is_hurried):
        server = await start({"shutdown_timeout": 60 if is_hurried else 0.1}, answer=endless, delay=0.01)
        stream = asyncio.ensure_future(server.events(CHAT, {"messages": HI, "stream_options": {"include_usage": True}}))
        whole = asyncio.ensure_future(server.post(TEXT, {"prompt": ["x", "y"], "max_tokens": None}))
        await until(lambda: server.engine.num_unfinished == 3)
        began = time.monotonic()
        server.stop.ask()
        if is_hurried:
            server.stop.ask()
        chunks = await stream
        assert chunks[-2]["choices"][0]["finish_reason"] == "abort" and chunks[-1]["usage"]["completion_tokens"] > 0
        assert [c["finish_reason"] for c in (await whole)[1]["choices"]] == ["abort", "abort"]
        assert await server.task == 0 and time.monotonic() - began < 3
        assert set(server.engine.ends.values()) == {"aborted"}

    async def test_the_engines_death_ends_all(self, start):
        server = await start(answer=endless, delay=0.01)
        stream = asyncio.ensure_future(server.events(CHAT, {"messages": HI}))
        whole = asyncio.ensure_future(server.post(CHAT, {"messages": HI}))
        await until(lambda: server.engine.num_tokens > 10)
        server.engine.die()
        status, body, _ = await server.get("/health")
        assert (status, body["status"]) == (503, "failed")
        status, body, _ = await server.post(CHAT, {"messages": HI})
        assert status == 500 and body["error"]["type"] == "InternalServerError"
        assert "secret" not in str(body)
        error = (await stream)[-1]["error"]
        assert error["code"] == 500 and "engine has failed" in error["message"] and "secret" not in error["message"]
        assert (await whole)[0] == 500
        assert await server.task == 1


class TestProcess:
    """A server process and real signals."""

    @contextlib.asynccontextmanager
    async def process(self, folder, *options):
        """The process and its address, once it says that it serves (or, with "load", that it listens)."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.server.fake_engine", str(folder), "0.01", *options),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            output = process.stderr if "load" in options else process.stdout
            line = (await asyncio.wait_for(output.readline(), 60)).decode()
            yield process, re.search(r"http://[\w.:]+", line)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def test_a_signal_ends_streams_in_order_with_code_0(self, folder):
        async with self.process(folder, "0.3") as (process, url), aiohttp.ClientSession() as session:
            async with session.post(url + CHAT, json={"messages": HI, "stream": True}) as response:
                await response.content.readline()
                process.send_signal(signal.SIGTERM)
                text = (await asyncio.wait_for(response.read(), 10)).decode()
            assert '"finish_reason":"abort"' in text and text.endswith("data: [DONE]\n\n")
            assert await asyncio.wait_for(process.wait(), 10) == 0

    async def test_a_dead_engine_ends_the_process_with_another_code(self, folder):
        async with self.process(folder, "die") as (process, url), aiohttp.ClientSession() as session:
            async with session.post(url + CHAT, json={"messages": HI}) as response:
                assert response.status == 500
            assert await asyncio.wait_for(process.wait(), 10) == 1

    async def test_a_step_that_does_not_end_does_not_keep_the_process(self, folder):
        async with self.process(folder, "hang", "0.1") as (process, url), aiohttp.ClientSession() as session:
            async with session.get(url + "/health") as response:
                assert response.status == 503 and (await response.json())["status"] == "stalled"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 10) == 1

    async def test_a_signal_while_loading_does_not_wait_for_it(self, folder):
        async with self.process(folder, "load") as (process, url), aiohttp.ClientSession() as session:
            async with session.get(url + "/health") as response:
                assert (await response.json())["phase"] == "loading the weights"
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), 10) == 0
