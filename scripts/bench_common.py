"""What the benchmarks share: the setting of a run, its JSON lines, the requests, and a server's start and end."""

import argparse
import contextlib
import functools
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # the names of the peer's lines


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def setting(engine: str = "qjax") -> dict[str, str | None]:
    """Where a figure was measured. A copy without git's folder is named by the variable QJAX_COMMIT."""
    commit = os.environ.get("QJAX_COMMIT") or _output("git", "rev-parse", "--short", "HEAD")
    if commit and "QJAX_COMMIT" not in os.environ and _output("git", "status", "--porcelain", "--", "qjax", "kernels"):
        commit += "+"  # not the commit alone
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition("\n")[0]
    device, _, driver = gpu.partition(", ")
    own = {"commit": commit or None} if engine == "qjax" else {}
    return {**own, "device": device or "CPU", "driver": driver or None}


def dtype_of(model: Path, dtype: str) -> str:
    """Of the weights, as the lines have it: "bf16", or the method of a quantised checkpoint."""
    quantization = json.loads((model / "config.json").read_text()).get("quantization_config")
    return quantization["quant_method"] if quantization else DTYPES.get(dtype, dtype)


def form_of(options: list[str]) -> dict[str, str | int | bool]:
    """What the lines say of a server that got these options: dtype of its KV cache, devices, compiled ahead or not."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--enforce-eager", action="store_true")
    found, _ = parser.parse_known_args(options)
    kv = "bf16" if found.kv_cache_dtype == "auto" else found.kv_cache_dtype
    return {"kv": kv, "tp": found.tensor_parallel_size, "eager": found.enforce_eager}


def writer(common: dict, out: str) -> Callable[..., None]:
    """say(figure=..., ...) prints a line, and appends it to the file `out` if that is not empty."""

    def say(**figure) -> None:
        line = json.dumps({**common, **figure})
        print("FIGURE " + line, flush=True)
        if out:
            with open(out, "a") as file:
                file.write(line + "\n")

    return say


def random_requests(num: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 100 to 1 024 token ids and lengths of their answers, 100 to 1 024: the peer's list."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(num)]
    return prompts, [rng.randint(100, 1024) for _ in range(num)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def server(command: str, log: Path) -> Iterator[subprocess.Popen]:
    """Runs a server in a process group of its own, which ends with the block."""
    with open(log, "wb") as file:
        process = subprocess.Popen(shlex.split(command), stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        for sign, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(patience)


def wait_until_ready(url: str, process: subprocess.Popen, log: Path, limit_s: float) -> None:
    """Returns as soon as /health says so.

    Raises:
      RuntimeError: the server ended, or took longer; the message has the end of its log.
    """
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    how = f"exit status {process.returncode}" if process.returncode is not None else f"not ready after {limit_s:g} s"
    raise RuntimeError(f"the server: {how}\n{log.read_text(errors='replace')[-2000:]}")


def ask(url: str, path: str, body: dict | None = None, limit_s: float = 600) -> dict:
    """The JSON that a GET, or a POST of `body`, answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=limit_s) as response:
        return json.loads(response.read() or b"{}")
