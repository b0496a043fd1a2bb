"""The simulation beside the thing itself: `qjax serve --data-parallel-size 2` with the built-in model on this machine's
CPU, each replica on a core of its own, and `simulate_serving` with the step times that were measured on them.

    python scripts/check_simulation.py

Conversations without pauses, so that both replicas are busy and nothing depends on who else uses the machine at what
moment. Also: what a request and an event of a stream cost the front in CPU time, which does not depend on it at all.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from pathlib import Path

import aiohttp

from qjax.server.prefix_routing import PrefixMemory
from scripts.simulate_serving import Replica, Steps, Talk, conversations, report, simulate

NUM_TALKS = 16
NUM_ROUNDS = 2
TALK = Talk(system=256, question=64, answer=64, turns=3, pause=0.0)
# Rows that a CPU's step has, of a replica: a batch takes as long as the next of these, and beside a prompt the last.
BUCKETS = (1, 8, 32)
CONTEXT = TALK.system + TALK.turns * (TALK.question + TALK.answer) // 2  # tokens, on average
OPTIONS = ["-dp", "2", "--host", "127.0.0.1", "--port", "0", "--kv-cache-memory-bytes", "256MiB"]
FIELDS = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "stream": True}


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str, rng: random.Random):
        self.session, self.url, self.rng = session, url, rng
        self.num_requests = self.num_events = 0

    def ids(self, num: int) -> list[int]:
        return [self.rng.randrange(100, 6000) for _ in range(num)]

    async def stream(self, prompt: list[int], num: int) -> tuple[float, list[float], list[int]]:
        """When it was sent, when each event came, and the answer's tokens."""
        sent, times, tokens = time.monotonic(), [], []
        body = {"prompt": prompt, "max_tokens": num, **FIELDS}
        async with self.session.post(self.url + "/v1/completions", json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    found = event["choices"][0].get("token_ids") or []
                    times += [time.monotonic()] * bool(found)
                    tokens += found
                    self.num_events += 1
        self.num_requests += 1
        if len(tokens) != num:
            raise RuntimeError(f"{len(tokens)} tokens of {num}")
        return sent, times, tokens

    async def talk(self, system: list[int]) -> list[tuple[float, list[float]]]:
        prompt, out = system, []
        for _ in range(TALK.turns):
            prompt = prompt + self.ids(TALK.question)
            sent, times, tokens = await self.stream(prompt, TALK.answer)
            out.append((sent, times))
            prompt = prompt + tokens
        return out

    async def get(self, path: str) -> str:
        async with self.session.get(self.url + path) as response:
            return await response.text()


async def measure_steps(client: Client) -> Steps:
    """With both replicas busy and contexts as long as they are later."""
    decode: list[tuple[int, float]] = []
    for batch in BUCKETS:
        for _ in range(2):  # the first may compile
            streams = [client.stream(client.ids(CONTEXT), 64) for _ in range(2 * batch)]
            found = await asyncio.gather(*streams)
        # From the last one's first token on, all decode; the mean, since others may take the core for a while.
        began = max(times[0] for _, times, _ in found)
        left = [[t for t in times if t >= began] for _, times, _ in found]
        spans = [(times[-1] - times[0]) / (len(times) - 1) for times in left if len(times) > 8]
        decode += [(size, statistics.mean(spans)) for size in (decode[-1][0] + 1 if decode else batch, batch)]
    firsts = []
    for _ in range(5):
        found = await asyncio.gather(*(client.stream(client.ids(512), 1) for _ in range(2)))
        firsts += [times[0] - sent for sent, times, _ in found]
    prefill = statistics.mean(firsts[2:]) / 512
    return Steps(tuple(dict(decode).items()), prefill, mixed_decodes=BUCKETS[-1])


async def measure(client: Client) -> dict[str, float]:
    system = client.ids(TALK.system)
    before, began = await cached(client), time.monotonic()
    turns = [turn for talk in await asyncio.gather(*(client.talk(system) for _ in range(NUM_TALKS))) for turn in talk]
    seconds = time.monotonic() - began
    after = await cached(client)
    firsts = sorted(times[0] - sent for sent, times in turns)
    gaps = [(times[-1] - times[0]) / (TALK.answer - 1) for _, times in turns]
    return {
        "output_tokens_s": len(turns) * TALK.answer / seconds,
        "ttft_p50_ms": statistics.median(firsts) * 1e3,
        "ttft_p99_ms": firsts[-1] * 1e3,
        "token_p50_ms": statistics.median(gaps) * 1e3,
        "cached_share": (after[1] - before[1]) / (after[0] - before[0]),
    }


async def cached(client: Client) -> tuple[float, float]:
    """Prompt tokens looked up, and found, by both replicas so far."""
    text = await client.get("/metrics")
    sums = [
        sum(map(float, re.findall(rf"^vllm:prefix_cache_{name}_total{{.*}} (\S+)", text, re.M)))
        for name in ("queries", "hits")
    ]
    return sums[0], sums[1]


def predict(steps: Steps) -> dict[str, float]:
    rng = random.Random(0)
    replicas = [Replica(steps, 32, 1024, 16_000) for _ in range(2)]
    requests = conversations(TALK, 1.0, 1e4, rng)[:NUM_TALKS]
    for request in requests:
        request.arrival = 0.0
    for replica in replicas:
        replica.memory = PrefixMemory()
    return report(simulate(replicas, requests, "prefix", rng), replicas)


def cpu_seconds(pid: int) -> float:
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


async def front_costs(client: Client, pid: int) -> dict[str, float]:
    """CPU seconds of the front a whole answer and an event of a stream."""
    body = {"prompt": "word " * 800, "max_tokens": 1}
    began, num = cpu_seconds(pid), 400

    async def ask(num: int) -> None:
        for _ in range(num):
            async with client.session.post(client.url + "/v1/completions", json=body) as response:
                await response.read()

    await asyncio.gather(*(ask(num // 8) for _ in range(8)))
    request = (cpu_seconds(pid) - began) / num
    began, events = cpu_seconds(pid), client.num_events
    await asyncio.gather(*(client.stream(client.ids(16), 400) for _ in range(16)))
    event = (cpu_seconds(pid) - began - 16 * request) / (client.num_events - events)
    return {"front_us_a_request": request * 1e6, "front_us_an_event": event * 1e6}


async def main() -> None:
    environ = {**os.environ, "JAX_PLATFORMS": "cpu", "QJAX_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "qjax", "serve", *OPTIONS]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environ)
    try:
        line = (await process.stdout.readline()).decode()  # type: ignore[union-attr]
        url = re.search(r"http://[\w.:]+", line)[0]  # type: ignore[index]
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            client = Client(session, url, random.Random(1))
            for replica in json.loads(await client.get("/health"))["replicas"]:
                for task in os.listdir(f"/proc/{replica['pid']}/task"):
                    os.sched_setaffinity(int(task), {replica["replica"] % (os.cpu_count() or 1)})
            await measure(client)  # compiles
            for _ in range(NUM_ROUNDS):  # steps beside what they predict, as others may use the machine
                steps = await measure_steps(client)
                measured, predicted = await measure(client), predict(steps)
                print([(b, round(s * 1e3, 2)) for b, s in steps.decode], f"ms, {steps.prefill * 1e3:.3f} ms a token")
                for name, value in measured.items():
                    print(f"{name:18} measured {value:10.2f}  predicted {predicted[name]:10.2f}", flush=True)
            print(await front_costs(client, process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main())
