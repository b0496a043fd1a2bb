"""The options of `qjax bench`, under vLLM's names. Standard library only, as the command line makes flags of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qjax.config import coerce_fields, option, parse_json

METRICS = ("ttft", "tpot", "itl", "e2el")
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs"),
)
_ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What is asked.

    Raises:
      ValueError: a value is out of range; the message names the option.
    """

    dataset_name: Literal["random", "sharegpt"] = option(
        "random", "random: words without meaning; sharegpt: conversations from --dataset-path", group="Requests"
    )
    dataset_path: str | None = option(None, "Local JSON file of a dataset", group="Requests", metavar="FILE")
    num_prompts: int = option(1000, "Requests to send", group="Requests")
    input_len: int | None = option(
        None, "The same as --random-input-len, for every dataset", group="Requests", metavar="TOKENS"
    )
    output_len: int | None = option(
        None, "The same as --random-output-len, for every dataset", group="Requests", metavar="TOKENS"
    )
    random_input_len: int = option(1024, "Tokens of a random prompt", group="Requests", metavar="TOKENS")
    random_output_len: int = option(128, "Tokens of its answer", group="Requests", metavar="TOKENS")
    random_range_ratio: float = option(
        0.0, "Lengths vary by this share to both sides, in [0, 1)", group="Requests", metavar="SHARE"
    )
    random_prefix_len: int = option(
        0, "Tokens that all random prompts begin with, beside their own", group="Requests", metavar="TOKENS"
    )

    def __post_init__(self) -> None:
        coerce_fields(self)
        for name in ("num_prompts", "random_input_len", "random_output_len", "input_len", "output_len"):
            check_at_least(self, name, 1)
        check_at_least(self, "random_prefix_len", 0)
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(f"random_range_ratio must be in [0, 1), got {self.random_range_ratio}.")
        if (self.dataset_name == "random") != (self.dataset_path is None):
            needs = "takes no" if self.dataset_name == "random" else "needs a"
            raise ValueError(f"dataset_name {self.dataset_name} {needs} dataset_path.")
        if self.dataset_name != "random" and self.input_len is not None:
            raise ValueError(f"input_len is for random prompts: those of {self.dataset_name} have their own length.")


@dataclass(frozen=True, kw_only=True)
class ServeBenchConfig(DatasetConfig):
    """`qjax bench serve`: how a server is asked, and what is reported.

    Raises:
      ValueError: a value is out of range; the message names the option.
    """

    backend: Literal["openai", "openai-chat", "vllm"] = option(
        "openai", "openai, vllm: text completions; openai-chat: chats", group="Server"
    )
    base_url: str | None = option(None, "Address of the server [of --host and --port]", group="Server", metavar="URL")
    host: str = option("127.0.0.1", "Its host", group="Server", metavar="ADDRESS")
    port: int = option(8000, "Its port", group="Server", metavar="PORT")
    endpoint: str | None = option(None, "Path of the API [the backend's]", group="Server", metavar="PATH")
    header: list[str] = option([], "Headers of each request", group="Server", metavar="KEY=VALUE", secret=True)
    insecure: bool = option(False, "Take a certificate that nobody has signed", group="Server")
    model: str | None = option(None, "Name of the model [the server's first]", group="Server", metavar="MODEL")
    served_model_name: str | None = option(None, "Its name in requests [--model]", group="Server", metavar="NAME")
    tokenizer: str | None = option(
        None, "Folder or hub name of the tokenizer that prompts are made with [the model's]", group="Server"
    )
    ready_check_timeout_sec: float = option(
        0.0, "Wait so long for the server to become ready", group="Server", metavar="SECONDS"
    )

    request_rate: float = option(float("inf"), "Requests a second; inf: all at once", group="Traffic")
    burstiness: float = option(
        1.0, "Shape of the gamma distribution of gaps; 1: a Poisson process, lower: in bursts", group="Traffic"
    )
    max_concurrency: int | None = option(None, "Most requests that run at a time", group="Traffic")
    num_warmups: int = option(0, "Requests sent before, not measured", group="Traffic")
    seed: int = option(0, "Of prompts, lengths and gaps", group="Traffic", metavar="NUMBER")
    disable_tqdm: bool = option(False, "No progress bar", group="Traffic")

    ignore_eos: bool = option(
        False, "Go on after the end of text; random prompts always do", group="Fields of the requests"
    )
    extra_body: dict[str, Any] = option(
        {}, "JSON object of more fields", group="Fields of the requests", metavar="JSON", parse=parse_json
    )
    temperature: float | None = option(None, "0: greedy [the server's]", group="Fields of the requests")
    top_p: float | None = option(None, "As in the API [the server's]", group="Fields of the requests")
    top_k: int | None = option(None, "As in the API [the server's]", group="Fields of the requests")
    min_p: float | None = option(None, "As in the API [the server's]", group="Fields of the requests")
    repetition_penalty: float | None = option(None, "As in the API [the server's]", group="Fields of the requests")
    presence_penalty: float | None = option(None, "As in the API [the server's]", group="Fields of the requests")
    frequency_penalty: float | None = option(None, "As in the API [the server's]", group="Fields of the requests")
    logprobs: int | None = option(None, "As in the API", group="Fields of the requests")

    percentile_metrics: str = option(
        ",".join(METRICS), "What is reported, of ttft, tpot, itl and e2el", group="Report", metavar="NAMES"
    )
    metric_percentiles: str = option("99", "Percentiles, such as 50,90,99", group="Report", metavar="NUMBERS")
    goodput: list[str] = option(
        [],
        "Limits in ms, such as ttft:200 tpot:20: count requests within them",
        group="Report",
        metavar="NAME:MS",
    )
    save_result: bool = option(False, "Write the figures to a JSON file", group="Report")
    save_detailed: bool = option(False, "With the times and the text of each request", group="Report")
    result_dir: str | None = option(None, "Folder of the file [the current one]", group="Report", metavar="FOLDER")
    result_filename: str | None = option(None, "Name of the file [of label, rate, model and date]", group="Report")
    metadata: list[str] = option([], "More fields of the file", group="Report", metavar="KEY=VALUE")
    label: str | None = option(None, "Name of the run [the backend]", group="Report", metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "max_concurrency", 1)
        check_at_least(self, "num_warmups", 0)
        for name in ("request_rate", "burstiness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        if unknown := set(self.metrics) - set(METRICS):
            raise ValueError(f"percentile_metrics knows {', '.join(METRICS)}, got {min(unknown)!r}.")
        if not all(0 <= p <= 100 for p in self.percentiles):
            raise ValueError(f"metric_percentiles must be in [0, 100], got {self.metric_percentiles!r}.")
        pairs("header", self.header, "=")
        pairs("metadata", self.metadata, "=")
        if unknown := set(self.goals) - {"ttft", "tpot", "e2el"}:
            raise ValueError(f"goodput knows ttft, tpot and e2el, got {min(unknown)!r}.")

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (self.base_url or f"http://{host}:{self.port}").rstrip("/")

    @property
    def api_url(self) -> str:
        return self.url + (self.endpoint or _ENDPOINTS[self.backend])

    @property
    def is_chat(self) -> bool:
        return self.backend == "openai-chat"

    @property
    def metrics(self) -> list[str]:
        return [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]

    @property
    def percentiles(self) -> list[float]:
        try:
            return [float(p) for p in self.metric_percentiles.split(",")]
        except ValueError:
            message = f"metric_percentiles must be numbers such as 50,90,99, got {self.metric_percentiles!r}."
            raise ValueError(message) from None

    @property
    def goals(self) -> dict[str, float]:
        """Longest time in milliseconds by metric."""
        try:
            return {name: float(limit) for name, limit in pairs("goodput", self.goodput, ":").items()}
        except ValueError:
            raise ValueError(f"goodput must be pairs such as ttft:200, got {' '.join(self.goodput)!r}.") from None


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig(DatasetConfig):
    """`qjax bench throughput`: all requests at once, without a server."""

    n: int = option(1, "Answers to each prompt", group="Requests")
    num_warmups: int = option(0, "Other requests before, not measured", group="Requests")
    disable_detokenize: bool = option(False, "Make no text of the answers", group="Requests")
    output_json: str | None = option(None, "File that the figures go to", group="Requests", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "n", 1)
        check_at_least(self, "num_warmups", 0)


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """`qjax bench latency`: one batch again and again, without a server.

    Raises:
      ValueError: a value is out of range; the message names the option.
    """

    input_len: int = option(32, "Tokens of a prompt", group="Batch", metavar="TOKENS")
    output_len: int = option(128, "Tokens of an answer", group="Batch", metavar="TOKENS")
    batch_size: int = option(8, "Prompts in the batch", group="Batch")
    n: int = option(1, "Answers to each prompt", group="Batch")
    num_iters_warmup: int = option(10, "Runs before, not measured", group="Batch")
    num_iters: int = option(30, "Runs that are measured", group="Batch")
    disable_detokenize: bool = option(False, "Make no text of the answers", group="Batch")
    output_json: str | None = option(None, "File that the figures go to", group="Batch", metavar="FILE")

    def __post_init__(self) -> None:
        coerce_fields(self)
        for name in ("input_len", "output_len", "batch_size", "n", "num_iters"):
            check_at_least(self, name, 1)
        check_at_least(self, "num_iters_warmup", 0)


def check_at_least(config: Any, name: str, minimum: int) -> None:
    value = getattr(config, name)
    if value is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def pairs(name: str, texts: Sequence[str], separator: str) -> dict[str, str]:
    """`["a=b"]` as `{"a": "b"}`."""
    for text in texts:
        if separator not in text:
            raise ValueError(f"{name} must be pairs KEY{separator}VALUE, got {text!r}.")
    return {key.strip(): value.strip() for key, _, value in (text.partition(separator) for text in texts)}
