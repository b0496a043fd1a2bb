"""`qjax bench serve`: requests to a server with OpenAI's API, at a rate, and how long their tokens took."""

import asyncio
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from qjax.bench import report
from qjax.bench.client import Answer, ask
from qjax.bench.config import SAMPLING, ServeBenchConfig, pairs
from qjax.bench.dataset import Sample, load_tokenizer, make_samples


def run(config: ServeBenchConfig) -> int:
    """Measures, prints the table and saves the result. Returns the exit code: 1 where no request was answered.

    Raises:
      ValueError: a wrong option, or a server that cannot be reached.
    """
    return asyncio.run(_run(config))


async def _run(config: ServeBenchConfig) -> int:
    async with _session(config) as session:
        name, model = await _model(session, config)
        tokenizer_name = config.tokenizer or model
        tokenizer = load_tokenizer(tokenizer_name)
        samples = make_samples(config, tokenizer, config.seed)
        bodies = [request_body(config, name, sample) for sample in samples]
        await _wait_until_ready(session, config, bodies[0], samples[0])
        warmups = [ask(session, config.api_url, bodies[0], samples[0].prompt_len) for _ in range(config.num_warmups)]
        await asyncio.gather(*warmups)
        answers, seconds = await _traffic(session, config, bodies, samples)
    result = report.figures(config, answers, seconds, lambda text: len(tokenizer.encode(text)))
    print(report.table(config, result))
    for error in dict.fromkeys(a.error for a in answers if a.error):
        print(f"failed: {error}", file=sys.stderr)
    if config.save_result:
        print(f"Saved: {_save(config, model, tokenizer_name, result)}")
    return 0 if result["completed"] else 1


@contextlib.asynccontextmanager
async def _session(config: ServeBenchConfig) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    connector = aiohttp.TCPConnector(limit=0, ssl=not config.insecure)
    async with aiohttp.ClientSession(
        connector=connector,
        headers=headers | pairs("header", config.header, "="),
        timeout=aiohttp.ClientTimeout(),
        read_bufsize=2**20,  # the longest line of a stream
    ) as session:
        yield session


async def _model(session: aiohttp.ClientSession, config: ServeBenchConfig) -> tuple[str, str]:
    """The model's name in requests, and the name that its tokenizer is found by."""
    if config.model is not None:
        return config.served_model_name or config.model, config.model
    try:
        async with session.get(f"{config.url}/v1/models") as response:
            response.raise_for_status()
            first = (await response.json())["data"][0]
    except (aiohttp.ClientError, OSError, ValueError, LookupError) as error:
        hint = "Name the server with --base-url, or its model with --model."
        raise ValueError(f"{config.url}/v1/models did not answer: {error}.\n{hint}") from None
    return config.served_model_name or first["id"], first.get("root") or first["id"]


def request_body(config: ServeBenchConfig, model: str, sample: Sample) -> dict[str, Any]:
    """The JSON of a request."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if config.is_chat:
        body |= {"messages": [{"role": "user", "content": sample.prompt}], "max_completion_tokens": sample.output_len}
    else:
        body |= {"prompt": sample.prompt, "max_tokens": sample.output_len}
    if config.ignore_eos or config.dataset_name == "random":
        body["ignore_eos"] = True
    body |= {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
    if config.is_chat and config.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": config.logprobs}
    return body | config.extra_body


def arrivals(config: ServeBenchConfig) -> np.ndarray:
    """When each request is sent, in seconds from the start. The last one arrives when the rate says it should."""
    if config.request_rate == float("inf"):
        return np.zeros(config.num_prompts)
    rng = np.random.default_rng(config.seed)
    gaps = rng.gamma(config.burstiness, 1 / (config.request_rate * config.burstiness), config.num_prompts)
    times = np.cumsum(gaps)
    return times * (config.num_prompts / config.request_rate / times[-1])


async def _wait_until_ready(
    session: aiohttp.ClientSession, config: ServeBenchConfig, body: dict[str, Any], sample: Sample
) -> None:
    """Asks once a second until the server answers, for as long as `ready_check_timeout_sec` says."""
    end = time.monotonic() + config.ready_check_timeout_sec
    while config.ready_check_timeout_sec > 0:
        answer = await ask(session, config.api_url, body, sample.prompt_len)
        if not answer.error:
            return
        if time.monotonic() > end:
            raise ValueError(f"{config.url} is not ready after {config.ready_check_timeout_sec:g} s: {answer.error}")
        await asyncio.sleep(1)


async def _traffic(
    session: aiohttp.ClientSession, config: ServeBenchConfig, bodies: list[dict[str, Any]], samples: Sequence[Sample]
) -> tuple[list[Answer], float]:
    """Sends all requests at their times. Returns the answers and how long it took."""
    room = asyncio.Semaphore(config.max_concurrency or len(samples))

    with tqdm(total=len(samples), disable=config.disable_tqdm or None) as progress:

        async def send(body: dict[str, Any], sample: Sample) -> Answer:
            arrived = time.perf_counter()
            async with room:
                answer = await ask(session, config.api_url, body, sample.prompt_len)
            answer.queue_time = answer.start - arrived
            progress.update()
            return answer

        start = time.perf_counter()
        tasks = []
        for body, sample, at in zip(bodies, samples, arrivals(config), strict=True):
            if (wait := start + at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(send(body, sample)))
        answers = await asyncio.gather(*tasks)
    return answers, time.perf_counter() - start


def _save(config: ServeBenchConfig, model: str, tokenizer: str, result: dict[str, Any]) -> Path:
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    rate = config.request_rate if config.request_rate != float("inf") else "inf"
    head = {
        "date": date,
        "endpoint_type": config.backend,
        "backend": config.backend,
        "label": config.label,
        "model_id": model,
        "tokenizer_id": tokenizer,
        "num_prompts": config.num_prompts,
        **pairs("metadata", config.metadata, "="),
        "request_rate": rate,
        "burstiness": config.burstiness,
        "max_concurrency": config.max_concurrency,
    }
    concurrency = "" if config.max_concurrency is None else f"-concurrency{config.max_concurrency}"
    short = re.sub(r"[^\w.-]", "_", model.rstrip("/").split("/")[-1])
    name = config.result_filename or f"{config.label or config.backend}-{rate}qps{concurrency}-{short}-{date}.json"
    path = Path(config.result_dir or ".") / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head | result))
    except OSError as error:
        raise ValueError(f"result_filename: {path} cannot be written: {error.strerror}.") from None
    return path
