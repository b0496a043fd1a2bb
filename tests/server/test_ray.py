"""`qjax ray` as a command, on this machine: replicas answer like one server, and the death of one harms no other."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from qjax import EngineConfig
from tests.server.conftest import free_port
from tests.server.serving import serving

pytest.importorskip("ray.serve", reason="needs the extra ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

OPTIONS = {"kv_cache_memory_bytes": "128MiB", "max_num_seqs": 8, "max_model_len": 2048}
PROMPTS = ["What is 17 + 25?", "What is the capital of France?", "What does the word 'oak' mean?", "Hello!"]
FOREVER = {"prompt": "Once", "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "stream": True}


def chat(text: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24, **more}


class Replicas:
    """A running `qjax ray`."""

    def __init__(self, process: subprocess.Popen, url: str):
        self.process, self.url = process, url
        self.seen: dict[int, str] = {}  # of all processes that were started: pid -> command line

    def processes(self) -> dict[int, tuple[int, str]]:
        """Of the command and all it has started: pid -> (parent, command line)."""
        there = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                there[int(folder.name)] = (parent, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        ours, todo = {}, [self.process.pid]
        while todo:
            pid = todo.pop()
            if pid in there:
                ours[pid] = there[pid]
            todo += [child for child, (parent, _) in there.items() if parent == pid]
        self.seen |= {pid: line for pid, (_, line) in ours.items()}
        return ours

    def servers(self) -> dict[int, int]:
        """pid of each replica's server -> pid of its actor."""
        return {pid: parent for pid, (parent, line) in self.processes().items() if "qjax.server.ray_child" in line}

    async def post(self, session, path, body) -> tuple[int, dict]:
        async with session.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    async def metric(self, session, name: str, **labels) -> Counter:
        """Sums by replica."""
        async with session.get(self.url + "/metrics") as response:
            text = await response.text()
        sums: Counter = Counter()
        for line in re.findall(rf"^{name}{{.*$", text, re.M):
            found = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if labels.items() <= found.items():
                sums[found["replica"]] += float(line.rpartition(" ")[2])
        return sums

    async def until(self, condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not await condition():
            assert time.monotonic() < end, "waited too long"
            await asyncio.sleep(0.2)


def is_running(pid: int, line: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() == line != ""
    return False


@pytest.fixture(scope="module")
def replicas():
    port = free_port()
    command = [sys.executable, "-m", "qjax", "ray", "--host", "127.0.0.1", "--port", str(port), "--min-replicas", "2"]
    command += [part for name, value in OPTIONS.items() for part in ("--" + name.replace("_", "-"), str(value))]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with subprocess.Popen(
        [*command, "--num-cpus", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        started = Replicas(process, f"http://127.0.0.1:{port}")
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("qjax serves"):
                    break
            assert process.poll() is None, "".join(lines)
            started.processes()
            reader = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
            yield started
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
            reader.wait(timeout=10)
            assert not [line for pid, line in started.seen.items() if is_running(pid, line)]
        finally:
            process.kill()
            for pid in [pid for pid, line in started.seen.items() if is_running(pid, line)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


async def test_two_replicas_answer_like_one_server(replicas):
    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(
            *(replicas.post(session, "/v1/chat/completions", chat(text)) for text in PROMPTS * 3)
        )
        served = await replicas.metric(session, "vllm:request_success_total")
        load = await session.get(replicas.url + "/load")
        assert (await load.json())["server_load"] == 0
        models = await session.get(replicas.url + "/v1/models")
        assert (await models.json())["data"][0]["id"] == "builtin"
        wrong, _ = await replicas.post(session, "/v1/chat/completions", {"messages": 3})
        assert wrong == 400
        async with serving(EngineConfig(**OPTIONS)) as (url, _):
            alone = Replicas(replicas.process, url)
            expected = [await alone.post(session, "/v1/chat/completions", chat(text)) for text in PROMPTS]
    assert len(served) == 2 and min(served.values()) >= 2 and sum(served.values()) == len(answers)
    for (status, answer), (_, one) in zip(answers, expected * 3, strict=True):
        assert status == 200 and answer["choices"] == one["choices"] and answer["usage"]["completion_tokens"] > 0


async def test_a_stream_comes_as_it_is_written(replicas):
    async with aiohttp.ClientSession() as session:
        _, whole = await replicas.post(session, "/v1/chat/completions", chat(PROMPTS[0], max_tokens=200))
        times, text = [], ""
        body = chat(PROMPTS[0], max_tokens=200, stream=True)
        async with session.post(replicas.url + "/v1/chat/completions", json=body) as response:
            assert response.content_type == "text/event-stream"
            async for line in response.content:
                if line.startswith(b"data: {"):
                    times.append(time.monotonic())
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert text == whole["choices"][0]["message"]["content"]
    assert times[-1] - times[0] > 0.05 and len({round(t, 2) for t in times}) > 5


async def test_a_conversation_stays_with_its_replica(replicas):
    async with aiohttp.ClientSession() as session:
        before = await replicas.metric(session, "vllm:prefix_cache_hits_total")
        for i in range(6):
            prompt = "".join(f"{i} is a number. " for i in range(100)) + str(i)
            await replicas.post(session, "/v1/completions", {"prompt": prompt, "max_tokens": 1})
        hits = await replicas.metric(session, "vllm:prefix_cache_hits_total")
    assert sorted((hits - before).values())[:-1] == [] and sum((hits - before).values()) > 1000


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_client_that_leaves_ends_its_request(replicas, is_streamed):
    async with aiohttp.ClientSession() as session:
        before = await replicas.metric(session, "vllm:request_success_total", finished_reason="abort")
        asked = asyncio.ensure_future(
            session.post(replicas.url + "/v1/completions", json={**FOREVER, "stream": is_streamed})
        )
        if is_streamed:
            await (await asked).content.readline()

        async def is_running():
            return sum((await replicas.metric(session, "vllm:num_requests_running")).values()) == 1

        async def is_over():
            return sum((await replicas.metric(session, "vllm:num_requests_running")).values()) == 0

        await replicas.until(is_running)
        (await asked).close() if is_streamed else asked.cancel()
        await replicas.until(is_over, 10)
        after = await replicas.metric(session, "vllm:request_success_total", finished_reason="abort")
    assert sum((after - before).values()) == 1


@pytest.mark.parametrize("victim", ["actor", "server"])
async def test_the_death_of_a_replica_harms_no_other(replicas, victim):
    async with aiohttp.ClientSession() as session:
        begun: set[int] = set()

        async def stream(i: int) -> bytes:
            body = {**FOREVER, "max_tokens": 1000, "prompt": f"{i} Once"}
            async with session.post(replicas.url + "/v1/completions", json=body) as response:
                await response.content.readline()
                begun.add(i)
                return await response.read()

        async def all_begun():
            return len(begun) == 4

        async def both_serve():
            async with session.get(replicas.url + "/metrics") as response:
                return len(set(re.findall(r'replica="(\w+)"', await response.text()))) == 2

        streams = [asyncio.ensure_future(stream(i)) for i in range(4)]
        await replicas.until(all_begun)
        server, actor = next(iter(replicas.servers().items()))
        os.kill(actor if victim == "actor" else server, signal.SIGKILL)
        answered = await asyncio.gather(
            *(replicas.post(session, "/v1/chat/completions", chat(text)) for text in PROMPTS)
        )
        assert [status for status, _ in answered] == [200] * len(PROMPTS)
        ends = [text.strip().splitlines()[-1] for text in await asyncio.gather(*streams)]
        whole = [end for end in ends if end == b"data: [DONE]"]
        broken = [json.loads(end[6:])["error"]["code"] for end in ends if end not in whole]
        assert len(whole) == 2 and broken == [503, 503]
        await replicas.until(both_serve, 90)
        assert server not in replicas.servers() and len(replicas.servers()) == 2


async def test_answers_finish_after_sigterm(replicas):
    """The last: the replicas end with it."""
    async with aiohttp.ClientSession() as session:
        streams = []
        for i in range(3):
            body = {**FOREVER, "max_tokens": 600, "prompt": f"{i}"}
            streams.append(await session.post(replicas.url + "/v1/completions", json=body))
            await streams[-1].content.readline()
        replicas.process.send_signal(signal.SIGTERM)
        texts = await asyncio.gather(*(response.read() for response in streams))
    assert [text.strip().splitlines()[-1] for text in texts] == [b"data: [DONE]"] * 3
    assert replicas.process.wait(timeout=60) == 0
