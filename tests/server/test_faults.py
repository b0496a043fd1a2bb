"""A real engine behind the server whose device fails, hangs, has no memory or dies: what clients and probes see."""

import asyncio
import json
import random
import re
import shutil
import struct
import threading
import time

import aiohttp
import pytest

from qjax import EngineConfig
from qjax.checkpoint.safetensors import save_params
from qjax.config import ServerConfig
from qjax.engine.async_engine import AsyncEngine
from qjax.server.lifecycle import Stop, serve
from tests.engine.conftest import (
    make_llm,
    tiny_folder,  # noqa: F401 (a fixture)
)
from tests.server.conftest import free_port
from tests.server.serving import serving

OPTIONS = {"load_format": "dummy", "kv_cache_memory_bytes": "4MiB", "max_num_seqs": 16, "max_num_batched_tokens": 64}
BODY = {"prompt": [5, 6, 7, 8], "max_tokens": 60, "temperature": 0, "ignore_eos": True}
TEXT = "/v1/completions"


@pytest.fixture
def config(tiny_folder):  # noqa: F811
    return EngineConfig(model=str(tiny_folder), **OPTIONS)


async def post(session, url, **fields):
    async with session.post(url + TEXT, json={**BODY, **fields}) as response:
        return response.status, await response.json(), response.headers


async def stream(session, url, **fields):
    """The events' data, parsed."""
    async with session.post(url + TEXT, json={**BODY, **fields, "stream": True}) as response:
        text = await response.text()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


async def health(session, url):
    async with session.get(url + "/health") as response:
        return response.status, (await response.json())["status"]


async def until(condition):
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_a_failed_step_is_503_and_the_server_goes_on(config, monkeypatch):
    async with serving(config) as (url, engine), aiohttp.ClientSession() as session:
        _, expected, _ = await post(session, url)
        real, failures = engine.engine.runner.collect, iter([RuntimeError("an ECC error at /dev/secret")])

        def collect(flight):
            if any(len(chunk.request.output_token_ids) == 20 for chunk in flight.batch.decodes):
                for error in failures:
                    raise error
            return real(flight)

        monkeypatch.setattr(engine.engine.runner, "collect", collect)
        streamed, (status, body, headers) = await asyncio.gather(stream(session, url), post(session, url, seed=1))
        error = streamed[-1]["error"]
        assert len(streamed) > 10 and error["code"] == 503 and "send it again" in error["message"]
        assert status in (200, 503)  # it need not have been in that step
        if status == 503:
            assert headers["Retry-After"] and "secret" not in str(body) and "secret" not in str(error)
        assert await health(session, url) == (200, "ready")
        assert (await post(session, url))[1]["choices"] == expected["choices"]
        engine.engine.scheduler.check_integrity()


async def test_out_of_memory_is_not_seen_by_clients(config, monkeypatch):
    async with serving(config) as (url, engine), aiohttp.ClientSession() as session:
        prompts = [[5 + i, 6, 7] for i in range(8)]
        expected = [(await post(session, url, prompt=p))[1]["choices"][0]["text"] for p in prompts]
        real = engine.engine.runner.dispatch

        def dispatch(batch):
            if len(batch.decodes) + len(batch.prefills) > 3:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12884901888 bytes.")
            return real(batch)

        monkeypatch.setattr(engine.engine.runner, "dispatch", dispatch)
        answers = await asyncio.gather(*(post(session, url, prompt=p) for p in prompts))
        assert [status for status, *_ in answers] == [200] * 8
        assert [body["choices"][0]["text"] for _, body, _ in answers] == expected


async def test_a_corrupt_page_in_a_shard_is_an_error_and_not_an_answer(tiny_folder, tmp_path, caplog):  # noqa: F811
    """4 KiB of ones where the first rows of the embedding were, as a bad sector or a broken copy leaves them: NaNs."""
    llm = make_llm(tiny_folder)
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    save_params(llm.engine.runner.leaves, llm.engine.model_config, folder, llm.engine.runner.mesh)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    start = 8 + size + json.loads(data[8 : 8 + size])["model.embed_tokens.weight"]["data_offsets"][0]
    data[start : start + 4096] = b"\xff" * 4096  # rows 0 to 15
    file.write_bytes(data)
    options = {**OPTIONS, "load_format": "auto"}
    async with serving(EngineConfig(model=str(folder), **options)) as (url, engine), aiohttp.ClientSession() as session:
        status, body, _ = await post(session, url)
        assert status == 500 and "could not compute" in body["error"]["message"]
        assert "are the weights whole?" in caplog.text
        assert (await post(session, url, stream=True))[0] == 500
        whole = {"prompt": [100, 200, 300], "allowed_token_ids": list(range(100, 200))}
        assert (await post(session, url, **whole))[0] == 200, "rows that are whole still answer"
        assert await health(session, url) == (200, "ready") and engine.engine.pool.usage == 0


async def test_clock_jumps_change_nothing(config, monkeypatch):
    """The time of day is only told, never measured with."""
    days = random.Random(0)
    real = time.time
    async with (
        serving(config, watchdog_timeout=5, shutdown_timeout=5) as (url, _),
        aiohttp.ClientSession() as session,
    ):
        _, expected, _ = await post(session, url)
        monkeypatch.setattr(time, "time", lambda: real() + 86400 * days.randrange(-1000, 1000))
        answers = await asyncio.gather(*(post(session, url) for _ in range(12)))
        assert [body["choices"] for _, body, _ in answers] == [expected["choices"]] * 12
        assert await health(session, url) == (200, "ready")
        async with session.get(url + "/metrics") as response:
            metrics = await response.text()
        sums = re.findall(r"^vllm:\w+_seconds_sum{.*} (\S+)$", metrics, re.M)
        assert len(sums) >= 5 and all(0 <= float(seconds) < 3600 for seconds in sums), sums


async def test_a_request_that_breaks_while_it_is_added_is_its_own_fault(config, monkeypatch):
    async with serving(config) as (url, engine), aiohttp.ClientSession() as session:
        with monkeypatch.context() as patch:
            patch.setattr("qjax.engine.engine.Detokenizer", lambda *_: 1 // 0)
            status, body, _ = await post(session, url, n=2)
        assert status == 500 and body["error"]["type"] == "InternalServerError"
        assert (await post(session, url))[0] == 200 and engine.num_unfinished == 0


async def test_a_step_that_hangs_is_seen_by_the_probe(config, monkeypatch):
    async with serving(config, watchdog_timeout=0.5) as (url, engine), aiohttp.ClientSession() as session:
        await post(session, url)  # compiles
        real, goes_on = engine.engine.runner.collect, threading.Event()
        monkeypatch.setattr(engine.engine.runner, "collect", lambda flight: (goes_on.wait(30), real(flight))[1])
        running = asyncio.ensure_future(post(session, url))

        async def is_stalled():
            return await health(session, url) == (503, "stalled")

        await until(is_stalled)
        status, body, _ = await post(session, url)
        assert status == 503 and "has not ended a step" in body["error"]["message"]
        goes_on.set()
        assert (await running)[0] == 200 and await health(session, url) == (200, "ready")


async def test_a_dead_engine_ends_the_server_with_code_1(config, monkeypatch):
    engine, port, stop = AsyncEngine(config), free_port(), Stop()
    server = asyncio.ensure_future(serve(engine, ServerConfig(host="127.0.0.1", port=port), stop))
    url = f"http://127.0.0.1:{port}"
    async with aiohttp.ClientSession() as session:
        while engine.phase != "ready":
            await asyncio.sleep(0.01)
        await post(session, url)
        monkeypatch.setattr(engine.engine.runner, "dispatch", lambda batch: 1 // 0)
        status, _, _ = await post(session, url)
        assert status == 500
        assert await asyncio.wait_for(server, 10) == 1 and engine.phase == "failed"
