"""`qjax bench throughput` and `latency`: the engine alone, without a server."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from qjax.bench.config import LatencyConfig, ThroughputConfig
from qjax.bench.dataset import make_samples
from qjax.config import EngineConfig
from qjax.llm import LLM
from qjax.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def throughput(config: ThroughputConfig, engine_config: EngineConfig) -> dict[str, float]:
    """Answers all prompts at once; prints and returns requests and tokens a second.

    Raises:
      ValueError: a wrong option or checkpoint, or a request that does not fit.
    """
    llm = _load(engine_config)
    tokenizer = llm.engine.tokenizer

    def prepared(num_prompts: int, seed: int) -> Callable[[], list[Any]]:
        samples = make_samples(replace(config, num_prompts=num_prompts), tokenizer, seed)
        prompts = [sample.prompt for sample in samples]
        params = [_params(config, sample.output_len) for sample in samples]
        return lambda: llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())

    if config.num_warmups:
        prepared(config.num_warmups, engine_config.seed + 1)()
    seconds, outputs = _timed(prepared(config.num_prompts, engine_config.seed))
    num_in = sum(len(output.prompt_token_ids) for output in outputs)
    num_out = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    result = {
        "elapsed_time": seconds,
        "num_requests": len(outputs),
        "total_num_tokens": num_in + num_out,
        "requests_per_second": len(outputs) / seconds,
        "tokens_per_second": (num_in + num_out) / seconds,
    }
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, {result['tokens_per_second']:.2f} "
        f"total tokens/s, {num_out / seconds:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_in}\nTotal num output tokens:  {num_out}")
    _save(config.output_json, result)
    return result


def latency(config: LatencyConfig, engine_config: EngineConfig) -> dict[str, Any]:
    """Answers one batch of random token ids again and again; prints and returns the seconds of a run.

    Raises:
      ValueError: a wrong option or checkpoint, or a batch that does not fit.
    """
    llm = _load(engine_config)
    ids = np.random.default_rng(engine_config.seed).integers(
        min(10_000, llm.engine.tokenizer.vocab_size), size=(config.batch_size, config.input_len)
    )
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    params = _params(config, config.output_len)
    run = lambda: llm.generate(prompts, params, use_tqdm=False)
    for _ in tqdm(range(config.num_iters_warmup), desc="Warm-up", disable=None):
        run()
    seconds = [_timed(run)[0] for _ in tqdm(range(config.num_iters), desc="Runs", disable=None)]
    percentiles = dict(zip(PERCENTILES, np.percentile(seconds, PERCENTILES).tolist(), strict=True))
    result = {
        "avg_latency": float(np.mean(seconds)),
        "std_latency": float(np.std(seconds)),
        "latencies": seconds,
        "percentiles": percentiles,
    }
    print(f"Avg latency: {result['avg_latency']} seconds\nStd latency: {result['std_latency']} seconds")
    for p, value in percentiles.items():
        print(f"{p}% percentile latency: {value} seconds")
    _save(config.output_json, result)
    return result


def _load(config: EngineConfig) -> LLM:
    options = {f.name: getattr(config, f.name) for f in fields(config)}
    return LLM(**options)


def _params(config: ThroughputConfig | LatencyConfig, output_len: int) -> SamplingParams:
    detokenize = not config.disable_detokenize
    return SamplingParams(
        n=config.n, temperature=1.0, top_p=1.0, ignore_eos=True, max_tokens=output_len, detokenize=detokenize
    )


def _timed[T](run: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _save(path: str | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=4)
    except OSError as error:
        raise ValueError(f"output_json {path!r} cannot be written: {error.strerror}.") from None
