"""`Metrics`: what an engine counts, under vLLM's Prometheus names, so that existing dashboards work.

Each engine has a registry of its own. The engine's thread writes, any thread may `render`.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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

    def __init__(self, model_name: str, max_model_len: int):
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
        self._preemptions = make(Counter, "vllm:num_preemptions", "Times a request lost its pages to another.")
        self._success = Counter(
            "vllm:request_success", "Requests that ended.", [*names, "finished_reason"], registry=self.registry
        )
        self._label = label
        seconds = {"buckets": LATENCY_BUCKETS}
        self._ttft = make(Histogram, "vllm:time_to_first_token_seconds", "From arrival.", buckets=TTFT_BUCKETS)
        self._itl = make(
            Histogram, "vllm:inter_token_latency_seconds", "Between two tokens.", buckets=TOKEN_LATENCY_BUCKETS
        )
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
        self._last_token_times: dict[Request, float] = {}

    def on_dispatch(self, *, is_late: bool) -> None:
        """A step is about to be sent. Not late: the device is still at the one before, or had no work."""
        self._steps.inc()
        self._late_steps.inc(is_late)

    def on_step(self, *, running: int, waiting: int, kv_usage: float, preempted: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)
        self._preemptions.inc(preempted)

    def on_compiles(self, count: int, seconds: float) -> None:
        self._compiles.set(count)
        self._compile_seconds.set(seconds)

    def on_token(self, request: Request) -> None:
        """A token of a request has reached the host."""
        now = time.monotonic()
        self._generation_tokens.inc()
        last = self._last_token_times.get(request)
        if last is None:
            self.on_prompt(request)
            self._ttft.observe(now - request.arrival_time)
        else:
            self._itl.observe(now - last)
        self._last_token_times[request] = now

    def on_prompt(self, request: Request) -> None:
        """A request's prompt has been computed."""
        num_prompt = len(request.prompt_token_ids)
        self._prompt_tokens.inc(num_prompt)
        self._cache_queries.inc(num_prompt)
        self._cache_hits.inc(request.num_cached_tokens)
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


def _one_two_five(limit: int) -> list[float]:
    """1, 2, 5, 10, 20, 50, … up to `limit`."""
    sizes, power = [], 1
    while power <= limit:
        sizes += [float(power * digit) for digit in (1, 2, 5) if power * digit <= limit]
        power *= 10
    return sizes
