"""The server over a real engine with a tiny model: streamed = whole, disconnects free everything, SIGTERM ends well."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request

import aiohttp
import pytest
from openai import AsyncOpenAI

from qjax import EngineConfig
from tests.engine.conftest import tiny_folder  # noqa: F401 (a fixture)
from tests.server.conftest import free_port
from tests.server.serving import serving

OPTIONS = {"load_format": "dummy", "kv_cache_memory_bytes": "4MiB", "max_num_seqs": 16, "max_num_batched_tokens": 64}
GREEDY = {"temperature": 0.0, "max_tokens": 16, "extra_body": {"ignore_eos": True}}


async def test_the_openai_client_gets_the_same_streamed_and_whole(tiny_folder):  # noqa: F811
    async with serving(EngineConfig(model=str(tiny_folder), **OPTIONS), served_model_name=["tiny"]) as (url, engine):
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [m.id for m in (await client.models.list()).data] == ["tiny"]
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **GREEDY}
        whole = await client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
        stream = await client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 16
        assert len(whole.choices[0].logprobs.content) == 16
        completion = await client.completions.create(model="tiny", prompt=["Hello", "One, two"], **GREEDY)
        alone = await client.completions.create(model="tiny", prompt="One, two", **GREEDY)
        assert completion.choices[1].text == alone.choices[0].text
        seeded = {**chat, "temperature": 1.0, "seed": 5}
        texts = {(await client.chat.completions.create(**seeded)).choices[0].message.content for _ in range(2)}
        assert len(texts) == 1

        # A storm of clients that go away, streamed or not, beside one that stays.
        async def leave(i):
            body = {**chat, "max_tokens": 400, "ignore_eos": True, "stream": i % 2 == 0}
            body.pop("extra_body")
            async with aiohttp.ClientSession() as session:
                task = asyncio.ensure_future(session.post(f"{url}/v1/chat/completions", json=body))
                await asyncio.sleep(0.05 + 0.02 * i)
                task.cancel()

        stays = asyncio.ensure_future(client.chat.completions.create(**chat))
        await asyncio.gather(*(leave(i) for i in range(12)))
        assert (await stays).choices[0].message.content == whole.choices[0].message.content
        for _ in range(1000):
            if engine.num_running == 0 and engine.num_unfinished == 0 and not engine.engine.has_work:
                break
            await asyncio.sleep(0.01)
        engine.engine.scheduler.check_integrity()
        assert (engine.num_running, engine.num_unfinished) == (0, 0)


@pytest.mark.timeout(120)
def test_qjax_serve_as_a_process(tiny_folder):  # noqa: F811
    """The command itself: health while loading, a request, and a clean end on SIGTERM while one is running."""
    port = free_port()
    command = [sys.executable, "-m", "qjax", "serve", str(tiny_folder), "--host", "127.0.0.1", "--port", str(port)]
    command += [part for name, value in OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            line = server.stdout.readline()
            assert f"127.0.0.1:{port}" in line and "curl" in line, line
            body = {"prompt": "Hello", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            answer = json.load(urllib.request.urlopen(request, timeout=60))
            assert answer["usage"]["completion_tokens"] == 5
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
        finally:
            server.kill()
        assert "Traceback" not in server.stderr.read()
