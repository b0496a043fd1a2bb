"""Which GPUs each replica gets. Asks the environment and the driver, not jax: the front has no device."""

import importlib.util
import os
import subprocess
from collections.abc import Mapping

from qjax.config import EngineConfig, ServerConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def check(engine: EngineConfig, server: ServerConfig) -> None:
    """Raises ValueError for options that do not go with `--data-parallel-size`."""
    num = server.data_parallel_size
    if engine.nnodes != 1 or server.headless:
        option = "--headless" if engine.nnodes == 1 else f"--nnodes {engine.nnodes}"
        raise ValueError(
            f"--data-parallel-size {num} does not go with {option}: replicas are processes of one machine. Start one "
            "server for each group of hosts, without --data-parallel-size, and put a load balancer before them."
        )


def split(num_replicas: int, num_each: int, gpus: list[str]) -> list[dict[str, str]]:
    """The variables that give each replica its devices: `num_each` GPUs each; without GPUs there is nothing to split.

    Raises:
      ValueError: there are too few GPUs.
    """
    if not gpus:
        return [{} for _ in range(num_replicas)]
    needed = num_replicas * num_each
    if needed > len(gpus):
        hint = f", or set {VISIBLE}" if VISIBLE in os.environ else ""
        raise ValueError(
            f"--data-parallel-size {num_replicas} with --tensor-parallel-size {num_each} needs {needed} GPUs, and "
            f"{len(gpus)} can be seen: lower one of the two{hint}."
        )
    return [{VISIBLE: ",".join(gpus[i * num_each : (i + 1) * num_each])} for i in range(num_replicas)]


def visible_gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs that jax would use, as CUDA_VISIBLE_DEVICES names them; none where it would use the CPU."""
    platforms = environ.get("JAX_PLATFORMS", "").lower().split(",")
    if platforms[0] not in ("", "cuda", "gpu") or not any(map(importlib.util.find_spec, _PLUGINS)):
        return []
    if VISIBLE in environ:
        return [name.strip() for name in environ[VISIBLE].split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    num = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(i) for i in range(num)]
