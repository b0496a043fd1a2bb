"""The figures of a run against a server: vLLM's definitions, its table and the keys of its JSON file."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qjax.bench.client import Answer
from qjax.bench.config import ServeBenchConfig

_NAMES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def figures(
    config: ServeBenchConfig, answers: Sequence[Answer], seconds: float, count: Callable[[str], int]
) -> dict[str, Any]:
    """What was measured, in seconds and tokens, and latencies in milliseconds.

    Args:
      seconds: from the first request to the last token.
      count: tokens of a text, where the server does not tell them.
    """
    lengths = [count(a.text) if a.output_len is None and not a.error else a.output_len or 0 for a in answers]
    good = [(a, n) for a, n in zip(answers, lengths, strict=True) if not a.error]
    num_in, num_out = sum(a.prompt_len for a, _ in good), sum(n for _, n in good)
    values = {
        "ttft": [a.ttft for a, _ in good],
        "tpot": [tpot(a, n) for a, n in good if n > 1],
        "itl": [gap for a, _ in good for gap in a.itls],
        "e2el": [a.latency for a, _ in good],
    }
    out: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(_is_within(config.goals, a, n) for a, n in good) / seconds if config.goals else None,
        "output_throughput": num_out / seconds,
        "total_token_throughput": (num_in + num_out) / seconds,
        "max_output_tokens_per_s": _peak_tokens([a for a, _ in good]),
        "max_concurrent_requests": _peak_requests([a for a, _ in good]),
    }
    for name in config.metrics:
        ms = np.array(values[name] or [0.0]) * 1e3
        out[f"mean_{name}_ms"], out[f"median_{name}_ms"] = float(ms.mean()), float(np.median(ms))
        out[f"std_{name}_ms"] = float(ms.std())
        for p in config.percentiles:
            out[f"p{p:g}_{name}_ms"] = float(np.percentile(ms, p))
    if config.save_detailed:
        out |= {
            "input_lens": [a.prompt_len for a in answers],
            "output_lens": lengths,
            "ttfts": [a.ttft for a in answers],
            "itls": [a.itls for a in answers],
            "latencies": [a.latency for a in answers],
            "start_times": [a.start for a in answers],
            "queue_times": [a.queue_time for a in answers],
            "generated_texts": [a.text for a in answers],
            "errors": [a.error for a in answers],
        }
    return out


def tpot(answer: Answer, num_tokens: int) -> float:
    """Seconds for each token after the first."""
    return (answer.latency - answer.ttft) / (num_tokens - 1)


def table(config: ServeBenchConfig, result: dict[str, Any]) -> str:
    """The figures in words, 50 characters wide."""
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
    ]
    if config.max_concurrency is not None:
        rows.append(("Maximum request concurrency:", config.max_concurrency))
    if config.request_rate != float("inf"):
        rows.append(("Request rate configured (RPS):", config.request_rate))
    rows += [
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
    ]
    if config.goals:
        rows.append(("Request goodput (req/s):", result["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", float(result["max_concurrent_requests"])),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    lines = [f"{' Serving Benchmark Result ':=^50}", *(_row(name, value) for name, value in rows)]
    for name in config.metrics:
        lines.append(f"{_NAMES[name]:-^50}")
        parts = {"Mean": "mean", "Median": "median"} | {f"P{p:g}": f"p{p:g}" for p in config.percentiles}
        lines += [_row(f"{word} {name.upper()} (ms):", result[f"{key}_{name}_ms"]) for word, key in parts.items()]
    return "\n".join([*lines, "=" * 50])


def _row(name: str, value: Any) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"


def _is_within(goals: dict[str, float], answer: Answer, num_tokens: int) -> bool:
    seconds = {
        "ttft": answer.ttft,
        "tpot": tpot(answer, num_tokens) if num_tokens > 1 else 0.0,
        "e2el": answer.latency,
    }
    return all(seconds[name] * 1e3 <= limit for name, limit in goals.items())


def _peak_tokens(answers: Sequence[Answer]) -> float:
    """Most chunks in one of the seconds since the first request."""
    if not answers:
        return 0.0
    times = np.concatenate([a.start + a.ttft + np.cumsum([0.0, *a.itls]) for a in answers])
    return float(np.bincount((times - min(a.start for a in answers)).astype(int)).max())


def _peak_requests(answers: Sequence[Answer]) -> int:
    """Most requests that were running at one moment."""
    ends = [(a.start + a.latency, -1) for a in answers]
    steps = sorted([(a.start, 1) for a in answers] + ends)
    return int(max(np.cumsum([step for _, step in steps]), default=0))
