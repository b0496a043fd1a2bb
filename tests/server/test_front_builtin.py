"""`qjax serve --data-parallel-size 2` as a user starts it, with the built-in model: the answers of one server, and a
replica that is killed under 64 streams.
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys

import aiohttp
import pytest
import pytest_asyncio

from qjax import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

OPTIONS = ["--kv-cache-memory-bytes", "256MiB", "--max-model-len", "1024", "--max-num-seqs", "32"]
PROMPTS = [f"Question {i}: what is {i} + {i + 3}?" for i in range(12)]
BODY = {"temperature": 0, "max_tokens": 24}


class Service:
    def __init__(self, process, url, session):
        self.process, self.url, self.session = process, url, session

    async def get(self, path):
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()

    async def replicas(self):
        return json.loads((await self.get("/health"))[1])["replicas"]

    async def chat(self, text, **fields):
        body = {**BODY, "messages": [{"role": "user", "content": text}], **fields}
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
            return response.status, await response.json()

    async def stream(self, text, began, **fields):
        """The pieces of text, and the error if there was one."""
        body = {**BODY, "messages": [{"role": "user", "content": text}], "stream": True, **fields}
        pieces, error, tail = [], None, b""
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
            async for line in response.content:
                tail = line if line.strip() else tail
                if not line.startswith(b"data: {"):
                    continue
                began.set()
                event = json.loads(line[6:])
                error = event.get("error", error)
                delta = event["choices"][0]["delta"] if event.get("choices") else {}
                pieces += [delta.get("content") or delta.get("reasoning") or ""]
        assert tail.strip() == b"data: [DONE]"
        return "".join(pieces), error


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service():
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qjax", "serve", "-dp", "2", "--host", "127.0.0.1", "--port", "0", *OPTIONS),
        stdout=asyncio.subprocess.PIPE,
        env=environ,
    )
    try:
        line = (await asyncio.wait_for(process.stdout.readline(), 120)).decode()
        assert "2 of 2 replicas" in line, line
        async with aiohttp.ClientSession() as session:
            yield Service(process, re.search(r"http://[\w.:]+", line)[0], session)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def said(body):
    message = body["choices"][0]["message"]
    return (message.get("reasoning") or "") + (message["content"] or "")


async def test_the_answers_are_those_of_one_engine(service):
    llm = LLM(max_model_len=1024, kv_cache_memory_bytes="64MiB")
    talks = [[{"role": "user", "content": text}] for text in PROMPTS]
    outputs = llm.chat(talks, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
    expected = [output.outputs[0].text for output in outputs]
    whole = await asyncio.gather(*(service.chat(text) for text in PROMPTS))
    streams = await asyncio.gather(*(service.stream(text, asyncio.Event()) for text in PROMPTS))
    assert [said(body) for _, body in whole] == [text for text, _ in streams]
    clean = [re.sub(r"</?think>|\s", "", text) for text in expected]
    assert [re.sub(r"\s", "", said(body)) for _, body in whole] == clean
    text = (await service.get("/metrics"))[1]
    counts = re.findall(r'vllm:generation_tokens_total{replica="\d",[^}]*} ([\d.]+)', text)
    assert len(counts) == 2 and min(map(float, counts)) > 0


async def test_a_killed_replica_under_64_streams(service):
    began = [asyncio.Event() for _ in range(64)]
    fields = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
    streams = [asyncio.ensure_future(service.stream(f"Tell me of {i}", began[i], **fields)) for i in range(64)]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in began)), 200)
    victim = (await service.replicas())[1]
    os.kill(victim["pid"], signal.SIGKILL)
    late = [asyncio.ensure_future(service.chat(f"Late {i}")) for i in range(8)]
    results = await asyncio.wait_for(asyncio.gather(*streams), 250)
    lost = [error for _, error in results if error]
    assert len(lost) == victim["running"] and 24 <= len(lost) <= 40
    assert all(error["code"] == 503 and "send the request again" in error["message"] for error in lost)
    assert all(len(text) > 100 for text, error in results if error is None)
    assert [status for status, _ in await asyncio.gather(*late)] == [200] * 8
    async with asyncio.timeout(120):
        while (again := (await service.replicas())[1])["status"] != "ready":
            await asyncio.sleep(0.2)
    assert again["pid"] != victim["pid"]
    assert (await service.chat("Hi"))[0] == 200


async def test_sigterm_ends_all(service):
    began = [asyncio.Event() for _ in range(4)]
    streams = [asyncio.ensure_future(service.stream(f"Go {i}", began[i], max_tokens=60)) for i in range(4)]
    await asyncio.gather(*(event.wait() for event in began))
    pids = [replica["pid"] for replica in await service.replicas()]
    service.process.send_signal(signal.SIGTERM)
    assert all(error is None for _, error in await asyncio.gather(*streams))
    assert await asyncio.wait_for(service.process.wait(), 60) == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
