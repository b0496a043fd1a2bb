"""From an `EngineConfig` to a model on its devices: checkpoint, tokenizer, memory plan, weights."""

import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.checkpoint import hub
from qjax.checkpoint.kv_scales import has_kv_scales
from qjax.checkpoint.pooling import Pooling, find_pooling, score_weight
from qjax.checkpoint.safetensors import dummy_params, full_names, load_params, open_folder
from qjax.config import EngineConfig
from qjax.engine.compiling import CompiledSteps
from qjax.engine.host_cache import HostCache
from qjax.engine.hosts import Followers, Leader, join
from qjax.engine.memory import Device, Plan, plan
from qjax.engine.program import Program
from qjax.engine.runner import is_filtered, keeps_few
from qjax.engine.step import StepOptions
from qjax.models.config import ModelConfig, apply_overrides
from qjax.models.qwen3 import ModelDef, abstract_model
from qjax.sampling_params import SamplingParams
from qjax.sharding import make_mesh
from qjax.text.tokenizer import Tokenizer

log = logging.getLogger("qjax")


@dataclass(frozen=True)
class Loaded:
    """What the engine is built of."""

    folder: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    generation_defaults: dict[str, Any]
    eos_token_ids: frozenset[int]
    plan: Plan
    mesh: jax.sharding.Mesh
    modeldef: ModelDef
    leaves: tuple[jax.Array, ...]
    compiles: CompiledSteps
    usual_options: StepOptions  # of requests that ask for nothing special
    pooling: Pooling | None = None  # None: it generates
    score_weight: np.ndarray | None = None  # float32 [D] of a converted reranker
    hosts: Followers | Leader | None = None  # None: there is one host
    host_cache: HostCache[jax.Array] | None = None  # of KV pages in the host's memory


def load(config: EngineConfig, *, progress: bool, on_phase: Callable[[str], None]) -> Loaded:
    """Everything that can be wrong with the options or the checkpoint is found before a device's memory is filled.

    Raises:
      ValueError: a wrong option or checkpoint; the message names it.
    """
    on_phase("reading the checkpoint")
    where: dict[str, Any] = {"token": config.hf_token, "download_dir": config.download_dir, "progress": progress}
    folder = hub.resolve(config.model, revision=config.revision, need_weights=False, **where)
    hf_config = apply_overrides(_read_json(folder / "config.json"), config.hf_overrides, config.rope_scaling)
    pooling = find_pooling(config, folder, hf_config)
    model_config = ModelConfig.from_hf(hf_config if pooling is None else pooling.backbone(hf_config))
    model_config = model_config.with_quantization(config.quantization)
    if config.enable_expert_parallel:
        model_config = model_config.with_expert_parallel(config.tensor_parallel_size)
    tokenizer_folder = folder
    if config.tokenizer is not None:
        tokenizer_folder = hub.resolve(config.tokenizer, need_config=False, need_weights=False, **where)
    defaults, eos_token_ids = _generation_config(config, folder, model_config)

    if pooling is not None and config.nnodes != 1:
        raise ValueError("Embedders and rerankers are not supported with several hosts (--nnodes).")
    on_phase("starting the devices" if config.nnodes == 1 else "waiting for the other hosts")
    hosts = join(config)
    devices = start_devices(config)
    sizes = plan(config, model_config, describe_device(jax.local_devices()[0]))
    if hosts is not None:
        sizes = hosts.agree(sizes)
    log.info("%s", sizes.table())
    mesh = make_mesh(config.tensor_parallel_size, devices)

    on_phase("downloading and loading the weights")
    dtype = jnp.dtype(sizes.dtype)
    weight = None
    has_weight = pooling is not None and pooling.kind == "score" and pooling.tokens is None
    if config.load_format == "dummy":
        if has_weight:
            weight = np.random.default_rng(config.seed).standard_normal(model_config.hidden_size, np.float32)
    else:
        folder = hub.resolve(config.model, revision=config.revision, **where)
        if has_weight:
            weight = score_weight(open_folder(folder), model_config.hidden_size)
        if sizes.kv_dtype == "uint8":
            model_config = _with_kv_scales(model_config, folder)
    modeldef, abstract = abstract_model(model_config, dtype, mesh)
    program = Program(model_config, sizes, mesh)
    compiles = CompiledSteps(program, modeldef, abstract, Path(jax.config.jax_compilation_cache_dir) / "steps")
    usual = _usual_options(defaults, pooling)
    if sizes.is_gpu and not config.enforce_eager and hosts is None:
        compiles.begin(program.ahead([usual]))  # beside all that follows
    try:
        tokenizer = Tokenizer.from_pretrained(tokenizer_folder)  # imports for seconds
        leaves = load_weights(config, folder, model_config, mesh, dtype, progress=progress)
    except BaseException:
        compiles.cancel()
        raise
    return Loaded(
        *(folder, model_config, tokenizer, defaults, eos_token_ids, sizes, mesh, modeldef, leaves, compiles, usual),
        pooling=pooling,
        score_weight=weight,
        hosts=hosts,
        host_cache=HostCache(sizes.num_host_pages, sizes.host_page_bytes) if sizes.num_host_pages else None,
    )


def _usual_options(defaults: dict[str, Any], pooling: Pooling | None) -> StepOptions:
    if pooling is not None:
        return StepOptions(pooling=True)
    params = SamplingParams.from_defaults(defaults)
    return StepOptions(sampling=not params.is_greedy, filtering=is_filtered(params), few=keeps_few(params))


def _with_kv_scales(model_config: ModelConfig, folder: Path) -> ModelConfig:
    if has_kv_scales(full_names(open_folder(folder))):
        return replace(model_config, kv_scales=True)
    log.info("The checkpoint has no k_scale and v_scale: the scales of its FP8 KV cache are 1.")
    return model_config


def load_weights(
    config: EngineConfig,
    folder: Path,
    model_config: ModelConfig,
    mesh: jax.sharding.Mesh,
    dtype: Any,
    *,
    progress: bool,
) -> tuple[jax.Array, ...]:
    """The model's leaves on its devices, from the checkpoint's files or made up.

    Raises:
      ValueError: the files are not this model's.
    """
    if config.load_format == "dummy":
        modeldef, abstract = abstract_model(model_config, dtype, mesh)
        return dummy_params(abstract, modeldef, seed=config.seed)
    return load_params(folder, model_config, mesh, dtype, progress=progress)


def start_devices(config: EngineConfig) -> list[jax.Device]:
    """The devices of the mesh, as many of each host. Sets the share of memory and the compile cache, which count from
    jax's start on."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{config.gpu_memory_utilization:.3f}")
    if config.kv_offloading_size is not None:  # what jax may pin is 64 GiB by default; its own transfers need some
        limit = max(64, math.ceil(config.kv_offloading_size) + 16)
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(limit))
    cache = config.compilation_cache_dir or os.path.join(
        os.environ.get("QJAX_CACHE_DIR", os.path.expanduser("~/.cache/qjax")), "xla"
    )
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    devices = jax.devices()
    if len(devices) < config.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs as many devices; jax sees {len(devices)} "
            f"({devices[0].platform}). Lower --tensor-parallel-size."
        )
    hosts = [[d for d in devices if d.process_index == i] for i in range(jax.process_count())]
    num = config.tensor_parallel_size // len(hosts)
    if short := [i for i, of_host in enumerate(hosts) if len(of_host) < num]:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs {num} devices of each of {len(hosts)} hosts; "
            f"host {short[0]} has {len(hosts[short[0]])}."
        )
    return [d for of_host in hosts for d in of_host[:num]]


def describe_device(device: jax.Device) -> Device:
    """What the memory plan must know; the device's memory that is still free counts."""
    if device.platform == "cpu":
        return Device("cpu")
    # jax's pool was sized by XLA_PYTHON_CLIENT_MEM_FRACTION; in a notebook it may be older and hold arrays already.
    stats = device.memory_stats() or {}
    return Device(device.platform, stats["bytes_limit"] - stats["bytes_in_use"])


def _generation_config(
    config: EngineConfig, folder: Path, model_config: ModelConfig
) -> tuple[dict[str, Any], frozenset[int]]:
    """Default sampling values, and the ids that end a text (Qwen3 has two)."""
    own = folder / "generation_config.json"
    values = _read_json(own) if own.exists() else {}
    eos = values.get("eos_token_id")
    eos_token_ids = set(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    if config.generation_config == "vllm":
        values = {}
    elif config.generation_config != "auto":
        values = _read_json(Path(config.generation_config) / "generation_config.json")
    if values.get("do_sample") is False:
        values["temperature"] = 0.0
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: values[name] for name in names if values.get(name) is not None}
    return defaults | config.override_generation_config, frozenset(eos_token_ids | set(model_config.eos_token_ids))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
