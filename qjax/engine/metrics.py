"""`Metrics`: what an engine counts, under vLLM's Prometheus names, so that existing dashboards work.

Each engine has a registry of its own. The engine's thread writes, any thread may `render`.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from qjax.engine.host_cache import HostCache
from qjax.engine.request import Request

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
TOKEN_LATENCY_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)


class Metrics:
    """Counters of one engine; all carry the labels `model_name` and `engine`."""

    def __init__(self, model_name: str, max_model_len: int, host_cache: HostCache[Any] | None = None):
        self.registry = CollectorRegistry()
        label = {"model_name": model_name, "engine": "0"}
        names = list(label)

        def make(kind, name: str, help: str, **options):
            return kind(name, help, names, registry=self.registry, **options).labels(**label)

        self._running = make(Gauge, "vllm:num_requests_running", "Requests that hold KV pages.")
        self._waiting = make(Gauge, "vllm:num_requests_waiting", "Requests that wait for a place.")
        self._kv_usage = make(Gauge, "vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.")
        self._prompt_tokens = make(Counter, "vllm:prompt_tokens", "Prompt tokens of the requests that were started.")
        self._generation_tokens = make(Counter, "vllm:generation_tokens", "Tokens generated.")
        self._cache_queries = make(Counter, "vllm:prefix_cache_queries", "Prompt tokens looked up.")
        self._cache_hits = make(Counter, "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._has_host_cache = host_cache is not None
        if host_cache is not None:
            self._external_queries = make(
                Counter, "vllm:external_prefix_cache_queries", "Prompt tokens looked up in the host's memory."
            )
            self._external_hits = make(Counter, "vllm:external_prefix_cache_hits", "Prompt tokens found there.")
            self.registry.register(_HostCacheCounts(host_cache, label))
        self._preemptions = make(Counter, "vllm:num_preemptions", "Times a request lost its pages to another.")
        self._success = Counter(
            "vllm:request_success", "Requests that ended.", [*names, "finished_reason"], registry=self.registry
        )
        self._label = label
        seconds = {"buckets": LATENCY_BUCKETS}
        self._ttft = make(Histogram, "vllm:time_to_first_token_seconds", "From arrival.", buckets=TTFT_BUCKETS)
        self._itl = _CountedHistogram(
            "vllm:inter_token_latency_seconds", "Between two tokens.", label, TOKEN_LATENCY_BUCKETS
        )
        self.registry.register(self._itl)
        self._e2e = make(Histogram, "vllm:e2e_request_latency_seconds", "From arrival to the end.", **seconds)
        self._queue = make(Histogram, "vllm:request_queue_time_seconds", "From arrival to the first step.", **seconds)
        self._inference = make(
            Histogram, "vllm:request_inference_time_seconds", "From the first step to the end.", **seconds
        )
        lengths = {"buckets": _one_two_five(max_model_len)}
        self._prompt_lengths = make(Histogram, "vllm:request_prompt_tokens", "Length of prompts.", **lengths)
        self._output_lengths = make(Histogram, "vllm:request_generation_tokens", "Length of answers.", **lengths)
        self._compiles = make(Gauge, "qjax:num_compiles", "Shapes of the step compiled since the start.")
        self._compile_seconds = make(Gauge, "qjax:compile_seconds", "Seconds spent on compiling them.")
        self._steps = make(Counter, "qjax:num_steps", "Steps of the engine.")
        self._late_steps = make(
            Counter, "qjax:num_late_steps", "Steps sent after the device had ended the one before: it waited."
        )
        self._failed_steps = make(Counter, "qjax:num_failed_steps", "Steps that ended with an error.")
        self._last_token_times: dict[Request, float] = {}

    def on_dispatch(self, *, is_late: bool) -> None:
        """A step is about to be sent. Not late: the device is still at the one before, or had no work."""
        self._steps.inc()
        self._late_steps.inc(is_late)

    def on_step(self, *, running: int, waiting: int, kv_usage: float) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)

    def on_preempted(self, num: int) -> None:
        self._preemptions.inc(num)

    def on_failure(self) -> None:
        """A step has failed."""
        self._failed_steps.inc()

    def on_compiles(self, count: int, seconds: float) -> None:
        self._compiles.set(count)
        self._compile_seconds.set(seconds)

    def on_tokens(self, requests: Sequence[Request]) -> None:
        """A token of each of these has reached the host."""
        now = time.monotonic()
        self._generation_tokens.inc(len(requests))
        gaps: dict[float, int] = {}  # of most requests of a step the last token came at the same time
        for request in requests:
            last = self._last_token_times.get(request)
            if last is None:
                self.on_prompt(request)
                self._ttft.observe(now - request.arrival_time)
            else:
                gaps[last] = gaps.get(last, 0) + 1
            self._last_token_times[request] = now
        for last, count in gaps.items():
            self._itl.observe(now - last, count)

    def on_prompt(self, request: Request) -> None:
        """A request's prompt has been computed."""
        num_prompt = len(request.prompt_token_ids)
        self._prompt_tokens.inc(num_prompt)
        self._cache_queries.inc(num_prompt)
        num_here = request.num_cached_tokens - request.num_loaded_tokens
        self._cache_hits.inc(num_here)
        if self._has_host_cache:
            self._external_queries.inc(num_prompt - num_here)
            self._external_hits.inc(request.num_loaded_tokens)
        if request.first_scheduled_time is not None:
            self._queue.observe(request.first_scheduled_time - request.arrival_time)

    def on_end(self, request: Request) -> None:
        """A request has ended, for whatever reason."""
        self._last_token_times.pop(request, None)
        self._success.labels(**self._label, finished_reason=request.finish_reason).inc()
        end = request.finished_time or time.monotonic()
        self._e2e.observe(end - request.arrival_time)
        if request.first_scheduled_time is not None:
            self._inference.observe(end - request.first_scheduled_time)
        self._prompt_lengths.observe(len(request.prompt_token_ids))
        self._output_lengths.observe(len(request.output_token_ids))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _CountedHistogram(Collector):
    """A histogram that takes many equal values at once, which prometheus_client's own does not."""

    def __init__(self, name: str, help: str, label: dict[str, str], buckets: Sequence[float]):
        self._name, self._help, self._label = name, help, label
        self._bounds = [*buckets, math.inf]
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._help, labels=list(self._label))
        buckets = list(zip(map(floatToGoString, self._bounds), accumulate(self._counts), strict=True))
        family.add_metric(list(self._label.values()), buckets, self._sum)
        yield family


class _HostCacheCounts(Collector):
    """What a host cache has counted, read when somebody asks."""

    def __init__(self, host_cache: HostCache[Any], label: dict[str, str]):
        self._cache, self._label = host_cache, label

    def collect(self) -> Iterator[Metric]:
        cache, names = self._cache, list(self._label)
        stored, loaded = cache.num_stored * cache.page_bytes, cache.num_loaded * cache.page_bytes
        families: list[tuple[CounterMetricFamily | GaugeMetricFamily, float]] = [
            (CounterMetricFamily("vllm:kv_offload_store_bytes", "Copied to the host's memory.", labels=names), stored),
            (CounterMetricFamily("vllm:kv_offload_load_bytes", "Copied from there.", labels=names), loaded),
            (
                GaugeMetricFamily("qjax:kv_offload_usage_perc", "Share of it that is full, 0 to 1.", labels=names),
                len(cache) / cache.capacity,
            ),
        ]
        for family, value in families:
            family.add_metric(list(self._label.values()), value)
            yield family


def _one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to `limit`."""
    sizes, power = [], 1
    while power <= limit:
        sizes += [float(power * digit) for digit in (1, 2, 5) if power * digit <= limit]
        power *= 10
    return sizes
