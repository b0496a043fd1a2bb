"""Every option a user can set, once: CLI flags, the README's option table and `LLM`'s keywords come from here.

A field's name with dashes is its flag (`max_model_len` → `--max-model-len`), and in capitals its environment variable
(`QJAX_MAX_MODEL_LEN`), which the command line reads where the flag is not given. Standard library only.
"""

import os
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, Union, get_args, get_origin

from qjax.option_values import parse_bytes, parse_json, parse_length, parse_nnodes

BUILTIN_MODEL = "builtin"  # the small Qwen3 that ships with qjax


def option(
    default: Any,
    help: str,
    *,
    group: str,
    metavar: str | None = None,
    parse: Callable[[Any], Any] | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field with what the command line and the documentation need to know of it.

    Args:
      help: ends in `[what happens]` where the default itself does not say it.
      parse: makes the value of what the command line or `LLM` was given; raises ValueError.
      secret: left out of `repr`, so that no log shows it.
    """
    metadata = {"help": help, "group": group, "metavar": metavar, "parse": parse}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default.copy(), metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine loads and how much it may use.

    Raises:
      ValueError: a value is out of range; the message names the option.
    """

    model: str = option(BUILTIN_MODEL, "Local folder, or name on the Hugging Face hub", group="Model", metavar="MODEL")
    tokenizer: str | None = option(
        None, "Folder or hub name of the tokenizer [the model's]", group="Model", metavar="NAME"
    )
    revision: str | None = option(None, "Branch, tag or commit on the hub", group="Model", metavar="NAME")
    hf_token: str | None = option(
        None, "Token for gated models [HF_TOKEN, or the stored login]", group="Model", metavar="TOKEN", secret=True
    )
    download_dir: str | None = option(
        None, "Where downloads are kept [the hub's cache]", group="Model", metavar="FOLDER"
    )
    runner: Literal["auto", "generate", "pooling"] = option(
        "auto", "generate: text; pooling: embeddings and scores; auto: what the checkpoint is for", group="Model"
    )
    load_format: Literal["auto", "dummy"] = option(
        "auto", "auto: safetensors; dummy: random weights from config.json alone", group="Model"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "Weights, activations and KV; auto: bfloat16 on a GPU, float32 on a CPU", group="Model"
    )
    quantization: Literal["awq", "fp8", "gptq", "int4"] | None = option(
        None,
        "What the checkpoint is quantised by; fp8 and int4 quantise a plain one while loading [as it is]",
        group="Model",
    )
    seed: int = option(0, "Seed of requests that bring none, and of dummy weights", group="Model", metavar="NUMBER")
    hf_overrides: dict[str, Any] = option(
        {}, "JSON object of fields that replace those of config.json", group="Model", metavar="JSON", parse=parse_json
    )
    generation_config: str = option(
        "auto", "Folder with default sampling values; auto: the model's; vllm: none", group="Model", metavar="FOLDER"
    )
    override_generation_config: dict[str, Any] = option(
        {}, "JSON object of default sampling values", group="Model", metavar="JSON", parse=parse_json
    )

    max_model_len: int | Literal["auto"] | None = option(
        None,
        "Longest prompt + answer, in tokens (4096, 32k); auto: what the KV cache holds [the model's own]",
        group="Length",
        metavar="TOKENS",
        parse=parse_length,
    )
    rope_scaling: dict[str, Any] | None = option(
        None,
        'JSON object, such as {"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768}',
        group="Length",
        metavar="JSON",
        parse=parse_json,
    )

    gpu_memory_utilization: float = option(
        0.92, "Share of the GPU's memory that qjax takes", group="Memory", metavar="SHARE"
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Size of the KV cache (4GiB) [rest of the share; on a CPU 2GiB]",
        group="Memory",
        parse=parse_bytes,
        metavar="BYTES",
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = option(
        "auto",
        "fp8 (e4m3, with the checkpoint's k_scale and v_scale): twice the tokens in the same memory; auto: as dtype",
        group="Memory",
    )
    block_size: int | None = option(
        None, "Tokens in a KV page: 16, 32, 64 or 128 [GPU 64, CPU 16]", group="Memory", metavar="TOKENS"
    )
    enable_prefix_caching: bool = option(True, "Keep pages of earlier prompts for later ones", group="Memory")
    kv_offloading_size: float | None = option(
        None,
        "GiB of the host's memory, for all devices together, that keep KV pages the devices have no room for",
        group="Memory",
        metavar="GIB",
    )
    kv_offloading_backend: Literal["native"] = option("native", "What keeps them: qjax itself", group="Memory")

    max_num_seqs: int | None = option(None, "Requests that run at a time [GPU 256, CPU 32]", group="Scheduler")
    max_num_batched_tokens: int | None = option(
        None, "Tokens in one step [GPU 8192, CPU 1024]", group="Scheduler", metavar="TOKENS"
    )
    scheduling_policy: Literal["fcfs", "priority"] = option(
        "fcfs", "Order of waiting requests: first come, or lowest priority value", group="Scheduler"
    )
    num_scheduler_steps: int | None = option(
        None,
        "Decode steps sent to the device at once: tokens come in groups, the host has less to do [GPU: 4 or 2 where "
        "reading the weights takes less than 2 or 4 ms, else 1]",
        group="Scheduler",
    )
    max_logprobs: int = option(20, "Most logprobs a request may ask for; -1: the whole vocabulary", group="Scheduler")

    tensor_parallel_size: int = option(1, "Devices that share the model", group="Devices")
    enable_expert_parallel: bool = option(
        False, "Each device has some experts of a layer whole, not a part of every expert", group="Devices"
    )
    nnodes: int | Literal["auto"] = option(
        1,
        "Hosts that share the model; auto: as Slurm or a Kubernetes LeaderWorkerSet says",
        group="Devices",
        parse=parse_nnodes,
    )
    node_rank: int = option(0, "Which of them this is; host 0 serves, the others follow it", group="Devices")
    master_addr: str = option("127.0.0.1", "Address of host 0", group="Devices", metavar="ADDRESS")
    master_port: int = option(
        29501, "Port of host 0 at which the hosts meet; the next one is used too", group="Devices", metavar="PORT"
    )
    enforce_eager: bool = option(False, "Compile nothing ahead: start sooner, compile at first use", group="Devices")
    compilation_cache_dir: str | None = option(
        None, "Folder of compiled code [~/.cache/qjax/xla, or QJAX_CACHE_DIR]", group="Devices", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        coerce_fields(self)
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization}.")
        if self.block_size not in (None, 16, 32, 64, 128):
            raise ValueError(f"block_size must be 16, 32, 64 or 128, got {self.block_size}.")
        if self.kv_offloading_size is not None:
            self._check_offloading(self.kv_offloading_size)
        for name in ("max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.nnodes != "auto" and not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"node_rank must be less than nnodes={self.nnodes}, and at least 0, got {self.node_rank}.")
        if not 0 < self.master_port < 65535:
            raise ValueError(f"master_port must be in [1, 65534], got {self.master_port}.")
        if self.num_scheduler_steps is not None and not 1 <= self.num_scheduler_steps <= 16:
            raise ValueError(f"num_scheduler_steps must be 1 to 16, got {self.num_scheduler_steps}.")
        if self.max_logprobs < -1:
            raise ValueError(
                f"max_logprobs must be at least 0, or -1 for the whole vocabulary, got {self.max_logprobs}."
            )

    def _check_offloading(self, size: float) -> None:
        if not 0 < size < float("inf"):
            raise ValueError(f"kv_offloading_size must be more than 0 GiB, got {size}.")
        if not self.enable_prefix_caching:
            raise ValueError("kv_offloading_size keeps pages of the prefix cache: it needs enable_prefix_caching.")
        if self.nnodes != 1:
            raise ValueError(f"kv_offloading_size is not supported with several hosts (nnodes={self.nnodes}).")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the HTTP server listens and answers."""

    host: str = option("0.0.0.0", "Address to listen on", group="Server", metavar="ADDRESS")
    port: int = option(8000, "Port to listen on; 0: any free one", group="Server", metavar="PORT")
    served_model_name: list[str] = option(
        [], "Names that requests may use for the model; the first is returned [MODEL]", group="Server", metavar="NAME"
    )
    api_key: list[str] = option(
        [], "Keys, one of which each request must bring [no key needed]", group="Server", metavar="KEY", secret=True
    )
    chat_template: str | None = option(
        None, "File of a chat template [the tokenizer's]", group="Server", metavar="FILE"
    )
    default_chat_template_kwargs: dict[str, Any] = option(
        {}, 'JSON object, such as {"enable_thinking": false}', group="Server", metavar="JSON", parse=parse_json
    )
    reasoning_parser: Literal["auto", "qwen3", "deepseek_r1", "none"] = option(
        "auto",
        "auto, qwen3: reasoning as the prompt or the answer opens it; deepseek_r1: always first; none: it is content",
        group="Server",
    )
    enable_reasoning: bool = option(
        True, "Old form of --reasoning-parser; off: the same as --reasoning-parser none", group="Server"
    )
    tool_call_parser: Literal["auto", "hermes", "qwen3_json", "qwen3_coder", "qwen3_xml", "none"] = option(
        "auto",
        "JSON calls (hermes, qwen3_json), XML calls (qwen3_coder, qwen3_xml), or both; none: calls are content",
        group="Server",
    )
    enable_auto_tool_choice: bool = option(
        True, "Read tool calls wherever a request has tools; off: calls are content", group="Server"
    )
    enable_chat_page: bool = option(True, "Serve a page to chat in at /", group="Server")
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests get after SIGTERM", group="Server", metavar="SECONDS"
    )
    watchdog_timeout: float = option(
        300.0,
        "Seconds without a step of the model, while requests run, after which /health answers 503; 0: never",
        group="Server",
        metavar="SECONDS",
    )
    log_format: Literal["text", "json"] = option(
        "text", "Lines of the log: text, or JSON objects with the id of the request", group="Server"
    )
    disable_uvicorn_access_log: bool = option(
        False, "Write no line for each request (vLLM's name; there is no uvicorn)", group="Server"
    )
    disable_access_log_for_endpoints: list[str] = option(
        [], "Paths whose requests get no line, such as /health /metrics", group="Server", metavar="PATH"
    )
    data_parallel_size: int = option(
        1, "Replicas of the server on this machine, each with its own GPUs, behind one port", group="Server"
    )
    headless: bool = option(
        False, "Serve nothing, follow host 0, as every host with another --node-rank does", group="Server"
    )
    server_dev_mode: bool = option(
        False, "Serve /sleep, /wake_up, /is_sleeping, and /abort_requests for all requests at once", group="Server"
    )

    uds: str | None = option(None, "Unix socket to listen on, instead of host and port", group="HTTP", metavar="PATH")
    root_path: str = option("", "Prefix under which a proxy passes requests on, such as /qjax", group="HTTP")
    ssl_keyfile: str | None = option(None, "Private key, to serve HTTPS", group="HTTP", metavar="FILE")
    ssl_certfile: str | None = option(None, "Certificate, to serve HTTPS", group="HTTP", metavar="FILE")
    ssl_ca_certs: str | None = option(None, "Certificates that clients' are checked with", group="HTTP", metavar="FILE")
    ssl_cert_reqs: int = option(
        0, "Clients' certificates: 0 not asked for, 1 optional, 2 required", group="HTTP", metavar="NUMBER"
    )
    allowed_origins: list[str] = option(
        [], "Web pages that browsers let use the server (CORS), such as https://a.org; *: all", group="HTTP"
    )
    allowed_methods: list[str] = option(["*"], "Methods these pages may use [all]", group="HTTP")
    allowed_headers: list[str] = option(["*"], "Headers these pages may send [all]", group="HTTP")
    allow_credentials: bool = option(False, "Let these pages send cookies", group="HTTP")
    max_num_queued_reqs: int | None = option(
        None, "Requests that may wait for a place; more are answered with 503 [no limit]", group="HTTP"
    )
    send_timeout: float = option(
        60.0,
        "Seconds that a client may leave its answer unread before it is dropped; 0: never",
        group="HTTP",
        metavar="SECONDS",
    )
    max_body_size: int = option(
        32 * 2**20, "Largest body of a request [32MiB]", group="HTTP", parse=parse_bytes, metavar="BYTES"
    )
    max_header_size: int = option(
        8190, "Longest request line, and longest header", group="HTTP", parse=parse_bytes, metavar="BYTES"
    )
    max_header_count: int = option(128, "Most headers of a request", group="HTTP")

    def __post_init__(self) -> None:
        coerce_fields(self)
        if not self.enable_reasoning:
            object.__setattr__(self, "reasoning_parser", "none")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65535], got {self.port}.")
        timeouts = ("shutdown_timeout", "watchdog_timeout", "send_timeout")
        counts = ("max_header_count", "data_parallel_size")
        for name, least in (*((name, 0) for name in timeouts), *((name, 1) for name in counts)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.max_num_queued_reqs is not None and self.max_num_queued_reqs < 0:
            raise ValueError(f"max_num_queued_reqs must be at least 0, got {self.max_num_queued_reqs}.")
        if self.root_path and not re.fullmatch(r"(/[\w.~-]+)+", self.root_path):
            raise ValueError(f"root_path must begin with / and not end with it, such as /qjax, got {self.root_path!r}.")
        if wrong := [path for path in self.disable_access_log_for_endpoints if not path.startswith("/")]:
            raise ValueError(f"disable_access_log_for_endpoints must be paths such as /health, got {wrong[0]!r}.")
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ValueError(f"ssl_cert_reqs must be 0, 1 or 2, got {self.ssl_cert_reqs}.")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise ValueError("ssl_keyfile and ssl_certfile go together: give both, or neither to serve plain HTTP.")
        if not self.ssl_certfile and (self.ssl_ca_certs or self.ssl_cert_reqs):
            raise ValueError("ssl_ca_certs and ssl_cert_reqs need ssl_certfile and ssl_keyfile.")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ValueError("ssl_cert_reqs needs ssl_ca_certs: the certificates that clients' are checked with.")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"allowed_origins must be * or like https://example.org (no path), got {origin!r}.")
        if self.allow_credentials and not self.allowed_origins:
            raise ValueError("allow_credentials needs allowed_origins.")


@dataclass(frozen=True)
class Kind:
    """What a field's annotation says: its values are of `base`, or one of `choices`, or None if optional."""

    base: type
    choices: tuple[str, ...] = ()
    is_optional: bool = False


def kind_of(f: Field) -> Kind:
    parts = get_args(f.type) if get_origin(f.type) in (Union, types.UnionType) else (f.type,)
    choices = tuple(c for part in parts if get_origin(part) is Literal for c in get_args(part))
    bases = [get_origin(p) or p for p in parts if get_origin(p) is not Literal and p is not types.NoneType]
    return Kind(bases[0] if bases else str, choices, types.NoneType in parts)


def default_of(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def flag_of(f: Field) -> str:
    return "--" + f.name.replace("_", "-")


def environment_name_of(f: Field) -> str:
    return "QJAX_" + f.name.upper()


def describe(f: Field) -> tuple[str, str]:
    """A field's help without its default, and its default in words."""
    match = re.fullmatch(r"(.*) \[(.*)\]", f.metadata["help"])
    if match:
        return match[1], match[2]
    default = default_of(f)
    if isinstance(default, bool):
        return f.metadata["help"], "on" if default else "off"
    return f.metadata["help"], "none" if default in (None, "", [], {}) else str(default)


def coerce_fields(config: Any) -> None:
    """Parses and checks every field of a frozen config made of `option`s.

    Raises:
      ValueError: a value is of another type, or not one of the choices; the message names the field.
    """
    for f in fields(config):
        _coerce(config, f)


def _coerce(config: Any, f: Field) -> None:
    """Parses and checks a field, so that `LLM(...)` and the command line take the same values.

    Raises:
      ValueError: the value is of another type, or not one of the choices; the message names the field.
    """
    kind, parse, value = kind_of(f), f.metadata["parse"], getattr(config, f.name)
    if value is None and kind.base in (dict, list):
        value = default_of(f)  # None for "nothing" is common in Python callers
    if isinstance(value, os.PathLike) and kind.base is str:
        value = os.fspath(value)
    if isinstance(value, str) and kind.base is list:
        value = [value]
    if isinstance(value, int) and not isinstance(value, bool) and kind.base is float:
        value = float(value)
    if parse is not None and value is not None:
        try:
            value = parse(value)
        except ValueError as error:
            raise ValueError(f"{f.name}: {error}") from None
    object.__setattr__(config, f.name, value)
    if (value is None and kind.is_optional) or (isinstance(value, str) and value in kind.choices):
        return
    if kind.choices and kind.base is str:
        raise ValueError(f"{f.name} must be one of {', '.join(kind.choices)}, got {value!r}.")
    if not isinstance(value, kind.base) or (isinstance(value, bool) and kind.base is not bool):
        raise ValueError(f"{f.name} must be of type {kind.base.__name__}, got {value!r}.")
