"""`qjax collect-env`: what a bug report should say of the machine, as text. No keys, tokens or passwords."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

PACKAGES = (
    *("qjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes"),
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "llguidance", "aiohttp"),
)
PLUGINS = re.compile(r"jax[-_](cuda|rocm|plugins)|nvidia[-_]|libtpu")
ENVIRONMENT = ("QJAX_", "JAX_", "XLA_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "TRANSFORMERS_", "OMP_", "LD_")
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CRED", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(?:hf|sk|ghp|gho)[_-]\w{8,}|(?<=://)[^/@\s]+(?=@)"
)  # the latter: of https://NAME:KEY@host


def report() -> str:
    """All sections, each a title and lines `name: value`."""
    sections = {
        "Versions": {"python": f"{platform.python_version()} ({platform.python_implementation()})", **versions()},
        "System": system(),
        "Environment": environment(),  # before jax is imported, which sets some
        "Devices": devices(),
    }
    lines: list[str] = []
    for title, rows in sections.items():
        width = max(map(len, rows), default=0) + 2
        lines += [f"== {title}", *(f"{name + ':':<{width}}{value}" for name, value in rows.items()), ""]
    return "\n".join(lines).rstrip()


def versions() -> dict[str, str]:
    """Of the packages that matter, and of every plugin and library for an accelerator."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    names = {name.lower().replace("-", "_"): name for name in found}
    out = {name: found.get(names.get(name.lower().replace("-", "_"), ""), "not installed") for name in PACKAGES}
    return out | {name: found[name] for name in sorted(found) if PLUGINS.match(name.lower())}


def system() -> dict[str, str]:
    """Operating system, processor and memory; limits of a container beside what the machine has."""
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = platform.system()
    cpu = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE))
    out = {
        "os": f"{name}, {platform.system()} {platform.release()} ({platform.machine()})",
        "libc": " ".join(platform.libc_ver()).strip() or "unknown",
        "cpu": f"{cpu[1] if cpu else platform.processor() or 'unknown'}, {os.cpu_count()} cores",
        "usable cores": str(os.process_cpu_count() if hasattr(os, "process_cpu_count") else _affinity()),
        "memory": ", ".join(f"{_gib(int(kb) * 1024)} {name[3:].lower()}" for name, kb in memory.items()) or "unknown",
    }
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return out | ({"memory limit": f"{_gib(int(limit))} (container)"} if limit.isdigit() else {})


def environment() -> dict[str, str]:
    """The variables that change what qjax, JAX, CUDA and the hub do. Of secrets it is said only that they are set."""
    names = sorted(name for name in os.environ if name.startswith(ENVIRONMENT))
    out = {}
    for name in names:
        is_secret = SECRET_NAME.search(name) and os.environ[name]
        out[name] = "(set, not shown)" if is_secret else SECRET_VALUE.sub("(not shown)", os.environ[name])
    return out or {"none set": ", ".join(prefix + "*" for prefix in ENVIRONMENT)}


def devices() -> dict[str, str]:
    """The driver's view of GPUs, then JAX's of its devices."""
    out: dict[str, str] = {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
        lines = answer.stdout.strip().splitlines() if answer.returncode == 0 else [answer.stdout.strip() or "failed"]
        out |= {f"nvidia-smi {i}": line for i, line in enumerate(lines)}
    except (OSError, subprocess.SubprocessError) as error:
        out["nvidia-smi"] = f"not available ({type(error).__name__})"
    # A report must not take the memory of a GPU that somebody else is using.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax

        for device in jax.devices():
            memory = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
            out[f"jax {device.id}"] = f"{device.platform}, {device.device_kind}" + (
                f", {_gib(memory)}" if memory else ""
            )
    except Exception as error:  # whatever a broken installation raises is what the report is for
        out["jax"] = f"{type(error).__name__}: {error}"
    return out


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
