"""The log: one line a request with how it ended, the request's id on every line, text or JSON."""

import asyncio
import contextlib
import io
import json
import logging
import socket

import pytest

from qjax import logs
from qjax.config import ServerConfig

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def lines(request):
    """What is written to the log, line by line, in the format of the fixture's parameter."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        logs.JsonFormatter() if getattr(request, "param", "json") == "json" else logs.TextFormatter(logs.TEXT)
    )
    logger = logging.getLogger("qjax")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: stream.getvalue().splitlines()
    logger.removeHandler(handler)
    logger.setLevel(level)


def access(lines):
    return [line for line in map(json.loads, lines()) if line["logger"] == "qjax.access" and line["path"] != "/health"]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_one_line_a_request(server, lines):
    _, whole, _ = await server.post(CHAT, {"messages": HI}, headers={"X-Request-Id": "my-id"})
    await server.events(CHAT, {"messages": HI, "n": 2})
    await server.post(TEXT, {"prompt": ["x", "y", "z"], "max_tokens": 2})
    await server.post(CHAT, {"messages": "x"})
    await server.get("/nowhere")
    one, two, three, four, five = access(lines)
    usage = whole["usage"]
    assert one["request_id"] == "my-id" and one["status"] == 200 and one["method"] == "POST" and one["path"] == CHAT
    assert (one["prompt_tokens"], one["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert one["client"] == "127.0.0.1" and 0 < one["first_token_seconds"] <= one["seconds"] < 5
    assert one["finish_reason"] == "stop" and one["level"] == "INFO" and "error" not in one
    assert "my-id" not in one["message"] and one["time"].endswith("+00:00")
    assert two["finish_reason"] == "stop,stop" and two["output_tokens"] == 2 * one["output_tokens"]
    assert two["prompt_tokens"] == one["prompt_tokens"], "a prompt counts once, whatever n is"
    assert three["finish_reason"] == "length,length,length" and three["output_tokens"] == 6
    assert four["status"] == 400 and "messages" in four["error"] and "prompt_tokens" not in four
    assert five["status"] == 404 and five["path"] == "/nowhere"
    assert len({line["request_id"] for line in (one, two, three, four, five)}) == 5


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_goes_away_is_499(start, lines, is_stream):
    server = await start(answer=lambda *_: "word " * 10_000, delay=0.01)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await server.post(CHAT, {"messages": HI, "stream": is_stream})
    await until(lambda: access(lines))
    [line] = access(lines)
    assert line["status"] == 499 and line["output_tokens"] > 0 and "finish_reason" not in line


@pytest.mark.parametrize("is_stream", [True, False])
async def test_what_fails_says_why_with_its_id(start, lines, is_stream):
    server = await start()
    server.engine.fail_after = 3
    with contextlib.suppress(Exception):
        async with server.session.post(
            server.url + CHAT, json={"messages": HI, "stream": is_stream}, headers={"X-Request-Id": "it"}
        ) as response:
            await response.read()
    await until(lambda: access(lines))
    [line] = access(lines)
    assert line["status"] == (200 if is_stream else 500) and "engine has failed" in line["error"]
    assert line["request_id"] == "it" and line["output_tokens"] == 3


async def test_a_failed_step_can_be_tried_again(start, lines):
    server = await start()
    server.engine.error_after, server.engine.error_stop_reason = 2, "step_failed"
    status, body, headers = await server.post(CHAT, {"messages": HI})
    assert status == 503 and headers["Retry-After"] and "send it again" in body["error"]["message"]
    *_, last = await server.events(CHAT, {"messages": HI})
    assert last["error"]["code"] == 503
    server.engine.error_stop_reason = None
    assert (await server.post(CHAT, {"messages": HI}))[0] == 500
    assert (await server.get("/health"))[0] == 200


async def test_paths_and_all_can_be_left_out(start, lines):
    server = await start({"disable_access_log_for_endpoints": ["/version"], "root_path": "/qjax"})
    await server.get("/version")
    await server.get("/qjax/version")
    await server.get("/v1/models")
    assert [line["path"] for line in access(lines)] == ["/v1/models"]
    server = await start({"disable_uvicorn_access_log": True})
    await server.get("/v1/models")
    assert len(access(lines)) == 1


@pytest.mark.parametrize("lines", ["text"], indirect=True)
async def test_text_for_people(server, lines):
    await server.post(CHAT, {"messages": HI}, headers={"X-Request-Id": "my-id"})
    await server.get("/%0aINFO%20forged")
    line, forged = [line for line in lines() if " 127.0.0.1 " in line and "/health" not in line]
    assert f"INFO 127.0.0.1 POST {CHAT} 200 seconds=0." in line and line.endswith("finish_reason=stop [my-id]")
    assert "404" in forged, "one request is one line"


def test_json_lines():
    record = logging.makeLogRecord({"msg": "a %s", "args": ("ü\n",), "levelname": "ERROR", "name": "qjax", "n": 3})
    try:
        raise ValueError("inner")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == "a ü\n" and parsed["n"] == 3 and "ValueError: inner" in parsed["exception"]
    assert "request_id" not in parsed


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="disable_access_log_for_endpoints"):
        ServerConfig(disable_access_log_for_endpoints=["health"])
    with pytest.raises(ValueError, match="send_timeout"):
        ServerConfig(send_timeout=-1)
    with pytest.raises(ValueError, match="log_format"):
        ServerConfig(log_format="xml")


class TestClientsThatDoNotRead:
    async def ask(self, server, body):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)  # or the system takes the whole answer for it
        sock.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        reader, writer = await asyncio.open_connection(sock=sock)
        data = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        writer.write(head.encode() + b"\r\n\r\n" + data)
        return reader, writer

    async def test_they_are_dropped(self, start, lines):
        server = await start({"send_timeout": 0.3}, answer=lambda *_: "word " * 10_000, max_model_len=10_000)
        body = {"messages": HI, "stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}
        _, writer = await self.ask(server, body)
        await until(lambda: server.engine.num_unfinished)
        async with asyncio.timeout(10):
            while server.engine.num_unfinished:
                await asyncio.sleep(0.01)
        assert set(server.engine.ends.values()) == {"closed"}, "it was not answered to its end"
        await until(lambda: access(lines))
        [line] = access(lines)
        assert "read nothing for 0.3 s" in line["error"] and line["status"] == 499
        warning = next(line for line in map(json.loads, lines()) if line["level"] == "WARNING")
        assert warning["request_id"] == line["request_id"]
        writer.close()
        assert (await server.post(CHAT, {"messages": HI, "max_tokens": 1}))[0] == 200

    async def test_who_reads_slowly_is_not(self, start, lines):
        server = await start({"send_timeout": 1}, answer=lambda *_: "word " * 10_000, max_model_len=10_000)
        body = {"messages": HI, "stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}
        reader, writer = await self.ask(server, body)
        end, size = asyncio.get_running_loop().time() + 2, 0
        while asyncio.get_running_loop().time() < end:
            size += len(await reader.read(16384))
            await asyncio.sleep(0.02)
        assert server.engine.num_unfinished == 1 and not access(lines) and size > 10_000
        writer.close()
