"""How many replicas serve a load, and how long their clients wait: a simulation, step by step, of N replicas behind the
router that qjax has (`qjax.server.prefix_routing`).

    python scripts/simulate_serving.py --replicas 8 --rate 40 --router prefix
    python scripts/simulate_serving.py --check     # against the measured throughput of one H100

What a step takes is measured: lines of docs/benchmarks, interpolated. A replica is a scheduler with chunked prefill, a
limit of requests and of KV tokens, and a prefix cache. Left out: preemption (a request gets the KV tokens of its whole
answer at once), the network, the front's own time.
"""

import argparse
import heapq
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qjax.server.prefix_routing import PrefixMemory, choose

BENCHMARKS = Path(__file__).parent.parent / "docs/benchmarks"
KV_BYTES = {"Qwen3-8B": 36 * 8 * 128 * 2 * 2, "Qwen3-0.6B": 28 * 8 * 128 * 2 * 2}  # of a token, in bfloat16
BYTES_A_SECOND = 3.0e12  # of an H100's memory, measured
BLOCK_TOKENS = 64  # of a KV page, and of 256 characters


@dataclass(frozen=True)
class Steps:
    """What a step takes.

    Attributes:
      decode: (requests, seconds of a step that gives each a token), by requests.
      prefill: seconds a prompt token.
      context: seconds a token whose keys and values a decode step reads, beyond those of the measured steps.
      num_measured: of these a request.
      mixed_decodes: requests that a step with prompt tokens computes at least, there or not.
    """

    decode: tuple[tuple[int, float], ...]
    prefill: float
    context: float = 0.0
    num_measured: int = 0
    mixed_decodes: int = 0

    @classmethod
    def measured(cls, model: str, file: str = "2026-11-23c.jsonl") -> "Steps":
        lines = [json.loads(line) for line in (BENCHMARKS / file).read_text().splitlines()]
        mine = {x["figure"]: x for x in lines if x["engine"] == "qjax" and x["model"] == model}
        sizes = sorted(
            int(name.split("_")[1][1:]) for name in mine if name.endswith("out257") and name[:8] == "decode_b"
        )
        decode = tuple((b, mine[f"decode_b{b}_in128_out257"]["ms_per_step"] / 1e3) for b in sizes)
        return cls(decode, 1 / mine["prefill_16x2048"]["tok_s"], KV_BYTES[model] / BYTES_A_SECOND, 128 + 257 // 2)

    def seconds(self, num_decodes: int, num_context: int, num_prompt_tokens: int) -> float:
        sizes, times = zip(*self.decode, strict=True)
        rows = max(num_decodes, self.mixed_decodes) if num_prompt_tokens else num_decodes
        decode = float(np.interp(rows, sizes, times)) if num_decodes else 0.0
        decode += max(0, num_context - num_decodes * self.num_measured) * self.context
        return max(decode + num_prompt_tokens * self.prefill, times[0])


@dataclass
class Request:
    """One turn of a conversation. Its blocks cover its prompt; `end` ones its answer too, which is cached as well."""

    arrival: float
    num_prompt: int
    num_output: int
    blocks: Sequence[int] = ()
    end_blocks: Sequence[int] = ()
    num_cached: int = 0
    first: float = 0.0
    done: float = 0.0
    num_left: int = 0  # prompt tokens to compute
    finished: Callable[["Request"], None] = field(default=lambda request: None, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + self.num_output


class Replica:
    """A scheduler without a model: `step` says how long the next step takes."""

    def __init__(self, steps: Steps, max_seqs: int, max_tokens: int, kv_tokens: int):
        self.steps, self.max_seqs, self.max_tokens, self.kv_tokens = steps, max_seqs, max_tokens, kv_tokens
        self.cache, self.memory = PrefixMemory(kv_tokens // BLOCK_TOKENS), PrefixMemory()
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.decoding: list[tuple[int, int, Request]] = []  # a heap of (the step that ends it, …)
        self.num_steps = self.used = self.num_seen = self.num_context = 0
        self.busy = 0.0

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def step(self) -> tuple[float, list[Request], list[Request]] | None:
        """Its seconds, who gets a first token by it, and who the last; None with nothing to do."""
        while self.waiting and self.load - len(self.waiting) < self.max_seqs:
            if self.used + self.waiting[0].num_tokens > self.kv_tokens and self.used:
                break
            request = self.waiting.popleft()
            self.used += request.num_tokens
            num_cached = self.cache.num_known(request.blocks) * BLOCK_TOKENS
            request.num_cached = min(num_cached, request.num_prompt - 1)
            request.num_left = request.num_prompt - request.num_cached
            self.prefilling.append(request)
        num_decodes = len(self.decoding)
        room, num_prompt, begun = self.max_tokens - num_decodes, 0, []
        while self.prefilling and room > num_prompt:
            request = self.prefilling[0]
            part = min(request.num_left, room - num_prompt)
            request.num_left -= part
            num_prompt += part
            if request.num_left:
                break
            begun.append(self.prefilling.popleft())
        if not num_decodes and not num_prompt:
            return None
        self.num_steps += 1
        seconds = self.steps.seconds(num_decodes, self.num_context, num_prompt)
        self.num_context += num_decodes + sum(request.num_prompt for request in begun)
        for request in begun:
            self.cache.add(request.blocks)
            self.num_seen += 1
            heapq.heappush(self.decoding, (self.num_steps + request.num_output - 1, self.num_seen, request))
        ended = []
        while self.decoding and self.decoding[0][0] <= self.num_steps:
            ended.append(heapq.heappop(self.decoding)[2])
        self.num_context -= sum(request.num_prompt + request.num_output - 1 for request in ended)
        return seconds, begun, ended


Window = tuple[float, float]  # seconds from the start, within which things are counted


def simulate(
    replicas: list[Replica], requests: list[Request], router: str, rng: random.Random, window: Window = (0.0, np.inf)
) -> list[Request]:
    """Runs all requests, and those that their ends bring (`finished` returns the next turn). Returns them, ended."""
    events: list[tuple[float, int, object]] = [(r.arrival, i, r) for i, r in enumerate(requests)]
    heapq.heapify(events)
    count, is_running, done = len(events), [False] * len(replicas), []
    memories = dict(enumerate(r.memory for r in replicas))

    def go_on(index: int, now: float) -> None:
        nonlocal count
        taken = replicas[index].step()
        is_running[index] = taken is not None
        if taken is not None:
            replicas[index].busy += taken[0] if window[0] <= now < window[1] else 0.0
            count += 1
            heapq.heappush(events, (now + taken[0], count, (index, taken[1], taken[2])))

    while events:
        now, _, event = heapq.heappop(events)
        if isinstance(event, Request):
            loads = {i: r.load for i, r in enumerate(replicas)}
            index = rng.randrange(len(replicas))
            if router == "prefix":
                index = choose(event.blocks, memories, loads)
            elif router == "load":
                index = min(loads, key=lambda i: (loads[i], rng.random()))
            replicas[index].memory.add(event.blocks)
            replicas[index].waiting.append(event)
            if not is_running[index]:
                go_on(index, now)
            continue
        index, begun, ended = event  # type: ignore[misc]
        for request in begun:
            request.first = now
        for request in ended:
            request.done = now
            replicas[index].used -= request.num_tokens
            replicas[index].cache.add(request.end_blocks)
            done.append(request)
            following = request.finished(request)
            if following is not None:
                count += 1
                heapq.heappush(events, (following.arrival, count, following))
        go_on(index, now)
    return done


@dataclass(frozen=True)
class Talk:
    """What conversations are like, in tokens and seconds."""

    system: int = 512
    question: int = 128
    answer: int = 256
    turns: int = 4
    pause: float = 20.0


def conversations(talk: Talk, rate: float, seconds: float, rng: random.Random) -> list[Request]:
    """First turns as a Poisson process; each end brings the next turn after a pause. `rate`: requests a second."""
    out, now, system = [], 0.0, [-i for i in range(1, talk.system // BLOCK_TOKENS + 1)]
    while now < seconds:
        now += rng.expovariate(rate / talk.turns)
        out.append(_turn(talk, len(out) + 1, 0, now, system, rng))
    return out


def _turn(talk: Talk, number: int, turn: int, arrival: float, system: list[int], rng: random.Random) -> Request:
    def blocks(num_tokens: int) -> list[int]:
        own = num_tokens // BLOCK_TOKENS - len(system)
        return system + [number << 20 | i for i in range(own)]

    def following(request: Request) -> Request | None:
        if turn + 1 == talk.turns:
            return None
        pause = rng.expovariate(1 / talk.pause) if talk.pause else 0.0
        return _turn(talk, number, turn + 1, request.done + pause, system, rng)

    prompt = talk.system + talk.question + turn * (talk.question + talk.answer)
    end = blocks(prompt + talk.answer)
    return Request(arrival, prompt, talk.answer, blocks(prompt), end, finished=following)  # type: ignore[arg-type]


def report(done: list[Request], replicas: list[Replica], window: Window = (0.0, np.inf)) -> dict[str, float]:
    seconds = min(window[1], max(r.done for r in done)) - window[0]
    done = [r for r in done if window[0] <= r.done < window[1] or window[1] == np.inf]
    first = np.array([r.first - r.arrival for r in done])
    gaps = np.array([(r.done - r.first) / max(r.num_output - 1, 1) for r in done])
    prompt = sum(r.num_prompt for r in done)
    return {
        "requests_s": len(done) / seconds,
        "output_tokens_s": sum(r.num_output for r in done) / seconds,
        "ttft_p50_ms": float(np.percentile(first, 50)) * 1e3,
        "ttft_p99_ms": float(np.percentile(first, 99)) * 1e3,
        "token_p50_ms": float(np.percentile(gaps, 50)) * 1e3,
        "cached_share": sum(r.num_cached for r in done) / prompt,
        "busy_share": float(np.mean([r.busy for r in replicas])) / seconds,
        "busiest_to_mean": max(r.busy for r in replicas) / float(np.mean([r.busy for r in replicas])),
    }


def throughputs(model: str, file: str) -> tuple[float, float]:
    """Output tokens a second, simulated and measured, of 256 requests at once, as `throughput_256req_rand` has them."""
    lines = [json.loads(line) for line in (BENCHMARKS / file).read_text().splitlines()]
    mine = {x["figure"]: x for x in lines if x["engine"] == "qjax" and x["model"] == model}
    rng = random.Random(0)
    requests = [Request(0.0, rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
    replica = Replica(Steps.measured(model, file), 256, 8192, mine["startup"]["kv_tokens"])
    found = report(simulate([replica], requests, "load", rng), [replica])["output_tokens_s"]
    return found, mine["throughput_256req_rand"]["out_tok_s"]


def check() -> None:
    for file in ("2026-11-23c.jsonl", "2026-11-24b.jsonl"):
        for model in KV_BYTES:
            simulated, measured = throughputs(model, file)
            print(f"{file}, {model}: simulated {simulated:,.0f} output tokens/s, measured {measured:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulates replicas behind qjax's router.")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second of each replica")
    parser.add_argument("--seconds", type=float, default=240.0, help="the second half is counted")
    parser.add_argument("--router", choices=("prefix", "load", "random"), default="prefix")
    parser.add_argument("--kv-tokens", type=int, default=400_000)
    for name in ("system", "question", "answer", "turns"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Talk, name))
    args = parser.parse_args()
    if args.check:
        return check()
    rng = random.Random(0)
    talk = Talk(args.system, args.question, args.answer, args.turns)
    steps = Steps.measured(args.model)
    replicas = [Replica(steps, 256, 8192, args.kv_tokens) for _ in range(args.replicas)]
    requests = conversations(talk, args.rate * args.replicas, args.seconds, rng)
    window = (args.seconds / 2, args.seconds)
    done = simulate(replicas, requests, args.router, rng, window)
    found = {name: round(value, 3) for name, value in report(done, replicas, window).items()}
    print(json.dumps({"replicas": args.replicas, "router": args.router, "rate": args.rate, **found}))


if __name__ == "__main__":
    main()
