"""64 clients at a time with the built-in model, many of which go away: nothing is left behind, and greedy answers are
what they are when asked alone. `QJAX_SOAK_SECONDS` says how long (300).
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

SECONDS = float(os.environ.get("QJAX_SOAK_SECONDS", "300"))
NUM_CLIENTS = 64
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTIONS = [
    *("What is 17 + 25?", "What is the capital of France?", "What is 803 - 77?", "What does 'river' mean?", "Hello!"),
    *("Write a JSON object with a name and an age.", "What is 6 times 7?", "Which country is Oslo in?"),
]
BODIES = [
    *((CHAT, {"messages": [{"role": "user", "content": question}], "max_tokens": 100}) for question in QUESTIONS),
    *((TEXT, {"prompt": question, "max_tokens": 40, "ignore_eos": True}) for question in QUESTIONS[:4]),
]


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def text_of(choice) -> str:
    if "text" in choice:
        return choice["text"]
    part = choice.get("message") or choice["delta"]
    return (part.get("reasoning") or "") + (part.get("content") or "")


async def ask(session, url, path, body, *, leave_after: int | None = None) -> str | None:
    """The whole answer; None where the client left, after so many chunks of a stream or so many 20 ms of a wait."""
    if not body.get("stream"):
        call = session.post(url + path, json=body)
        try:
            async with asyncio.timeout(None if leave_after is None else 0.02 * leave_after), call as response:
                answer = await response.json()
                assert response.status == 200, answer
                return text_of(answer["choices"][0])
        except TimeoutError:
            return None
    text, num_chunks = "", 0
    async with session.post(url + path, json=body) as response:
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
@pytest.mark.timeout(SECONDS + 600)
async def test_many_clients_that_come_and_go():
    # some requests wait, and some lose their pages
    config = EngineConfig(max_model_len=512, kv_cache_memory_bytes="16MiB", max_num_seqs=32)
    connector = aiohttp.TCPConnector(limit=0)
    async with serving(config) as (url, engine), aiohttp.ClientSession(connector=connector) as session:
        greedy = [(path, {**body, "temperature": 0}) for path, body in BODIES]
        alone = [await ask(session, url, path, body) for path, body in greedy]
        counts: collections.Counter[str] = collections.Counter()
        loop = asyncio.get_running_loop()
        end, sizes = loop.time() + SECONDS, [resident_mib()]

        async def client(number: int) -> None:
            rng = random.Random(number)
            while loop.time() < end:
                i = rng.randrange(len(greedy))
                path, body = greedy[i]
                body = {**body, "stream": rng.random() < 0.7}
                stays = rng.random() < 0.4
                if not stays and rng.random() < 0.3:
                    body |= {"temperature": 1.0, "n": 2}
                answer = await ask(session, url, path, body, leave_after=None if stays else rng.randrange(1, 40))
                counts["left" if answer is None else "stayed"] += 1
                if stays:
                    counts["compared"] += 1
                    assert answer == alone[i], f"{body}: {answer!r} is not {alone[i]!r}"

        async def watch() -> None:
            while loop.time() < end:
                await asyncio.sleep(SECONDS / 20)
                sizes.append(resident_mib())

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            for number in range(NUM_CLIENTS):
                group.create_task(client(number))
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
        preempted = float(metrics["vllm:num_preemptions_total"])
        print(dict(counts), f"{preempted:.0f} preemptions; MiB resident:", *map(round, sizes))
        assert min(counts["left"], counts["compared"]) > min(NUM_CLIENTS, SECONDS)
        third, last = sizes[len(sizes) // 2 : -len(sizes) // 4], sizes[-len(sizes) // 4 :]  # by then all is compiled
        assert min(last) - min(third) < 30, f"resident memory grows: {sizes}"
        again = [await ask(session, url, path, body) for path, body in greedy]
        assert again == alone
