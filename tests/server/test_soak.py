"""10 000 requests of random lengths and parameters to the built-in model, many of which are aborted or left by their
clients: nothing leaks, nothing hangs, memory stays, and whoever stays gets the text that the request gets alone.
`QJAX_SOAK_REQUESTS` says how many.
"""

import asyncio
import collections
import json
import os
import random
import re
import resource

import aiohttp
import pytest

from qjax import EngineConfig
from tests.server.serving import serving

NUM_REQUESTS = int(os.environ.get("QJAX_SOAK_REQUESTS", "10000"))
NUM_CLIENTS = 64
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTIONS = [
    *("What is 17 + 25?", "What is the capital of France?", "What is 803 - 77?", "What does 'river' mean?", "Hello!"),
    *("Write a JSON object with a name and an age.", "What is 6 times 7?", "Which country is Oslo in?"),
]
# Of few kinds, since each mixture of them that meets in a step is compiled.
GREEDY = {"temperature": 0}
SEEDED = {"temperature": 0.8, "top_k": 20, "seed": 11}
WORDS = {**SEEDED, "structured_outputs": {"regex": "[a-z ,.]{1,200}"}}
STOPPED = {**GREEDY, "stop": ["e", "1 "]}
TOO_LONG = {"prompt": [5] * 600}


def make_requests() -> list[tuple[str, dict]]:
    """What is asked again and again."""
    rng = random.Random(0)
    requests = []
    for i in range(40):
        kind = (GREEDY, GREEDY, STOPPED, SEEDED, WORDS)[i % 5]
        if i % 2:
            messages = [{"role": "user", "content": rng.choice(QUESTIONS)}]
            body = {"messages": messages, "max_tokens": rng.choice([1, 5, 12, 40])}
            requests.append((CHAT, {**body, **kind}))
        else:
            prompt = [rng.randrange(100, 5000) for _ in range(rng.choice([1, 15, 16, 17, 60, 200]))]
            body = {"prompt": prompt, "max_tokens": rng.choice([1, 3, 8, 30]), "ignore_eos": kind is not WORDS}
            requests.append((TEXT, {**body, **kind}))
    return requests


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def text_of(choice) -> str:
    if "text" in choice:
        return choice["text"]
    part = choice.get("message") or choice["delta"]
    return (part.get("reasoning") or "") + (part.get("content") or "")


async def ask(session, url, path, body, *, leave_after: int | None = None, request_id: str = "") -> str | None:
    """The whole answer; None where the client left, after so many chunks of a stream or so many 20 ms of a wait."""
    headers = {"X-Request-Id": request_id} if request_id else {}
    if not body.get("stream"):
        call = session.post(url + path, json=body, headers=headers)
        try:
            async with asyncio.timeout(None if leave_after is None else 0.02 * leave_after), call as response:
                answer = await response.json()
                assert response.status == 200, answer
                return text_of(answer["choices"][0])
        except TimeoutError:
            return None
    text, num_chunks = "", 0
    async with session.post(url + path, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += text_of(chunk["choices"][0])
                num_chunks += 1
                if num_chunks == leave_after:
                    response.close()
                    return None
    return text


@pytest.mark.slow
@pytest.mark.timeout(60 + NUM_REQUESTS)
async def test_many_requests_that_come_and_go():
    # Most requests wait, and pages run out.
    config = EngineConfig(max_model_len=256, kv_cache_memory_bytes="5MiB", max_num_seqs=8, max_num_batched_tokens=128)
    connector = aiohttp.TCPConnector(limit=0)
    quiet = {"disable_uvicorn_access_log": True}
    async with serving(config, **quiet) as (url, engine), aiohttp.ClientSession(connector=connector) as session:
        requests = make_requests()
        alone = [await ask(session, url, path, body) for path, body in requests]
        counts: collections.Counter[str] = collections.Counter()
        sizes = [resident_mib()]
        numbers = iter(range(NUM_REQUESTS))

        async def abort(request_id: str, rng: random.Random) -> None:
            await asyncio.sleep(rng.random() * 0.5)
            async with session.post(url + "/abort_requests", json={"request_ids": [request_id]}) as response:
                counts["aborts that found it"] += (await response.json())["aborted"]

        async def client() -> None:
            for number in numbers:
                rng = random.Random(number)
                i = rng.randrange(len(requests))
                path, body = requests[i]
                body = {**body, "stream": rng.random() < 0.7}
                fate = rng.choices(["stays", "leaves", "is aborted", "is refused"], [60, 24, 12, 4])[0]
                counts[fate] += 1
                if fate == "stays":
                    answer = await ask(session, url, path, body)
                    assert answer == alone[i], f"{body}: {answer!r} is not {alone[i]!r}"
                elif fate == "leaves":
                    body |= {"n": 2} if rng.random() < 0.3 else {}
                    await ask(session, url, path, body, leave_after=rng.randrange(1, 40))
                elif fate == "is aborted":
                    name = f"soak-{number}"
                    answer, _ = await asyncio.gather(ask(session, url, path, body, request_id=name), abort(name, rng))
                    assert alone[i].startswith(answer.rstrip("\ufffd"))
                else:
                    async with session.post(url + TEXT, json=TOO_LONG) as response:
                        assert response.status == 400
                if number % (NUM_REQUESTS // 20) == 0:
                    sizes.append(resident_mib())

        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_CLIENTS):
                group.create_task(client())
        async with asyncio.timeout(60):
            while engine.num_unfinished or engine.num_running or engine.engine.has_work:
                await asyncio.sleep(0.05)
        pool = engine.engine.pool
        assert pool.usage == 0 and engine.engine.scheduler.num_waiting == 0 and engine.num_queued() == 0
        engine.engine.scheduler.check_integrity()
        async with session.get(f"{url}/load") as response:
            assert await response.json() == {"server_load": 0, "num_queued": 0, "num_rejected": 0}
        async with session.get(f"{url}/metrics") as response:
            metrics = dict(re.findall(r"^(\S+?){.*} (\S+)$", await response.text(), re.M))
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert float(metrics[f"vllm:{gauge}"]) == 0, gauge
        assert float(metrics["qjax:num_failed_steps_total"]) == 0
        preempted, compiled = float(metrics["vllm:num_preemptions_total"]), engine.engine.runner.compiles.count
        print(dict(counts), f"{preempted:.0f} preemptions, {compiled} shapes; MiB resident:", *map(round, sizes))
        assert preempted > 0
        third, last = sizes[len(sizes) // 2 : -len(sizes) // 4], sizes[-len(sizes) // 4 :]  # by then all is compiled
        assert min(last) - min(third) < 30, f"resident memory grows: {sizes}"
        again = [await ask(session, url, path, body) for path, body in requests]
        assert again == alone
