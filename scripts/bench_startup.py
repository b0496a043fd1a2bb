"""Measures from the command to the first answer over HTTP, with an empty and with a filled compile cache.

    python scripts/bench_startup.py --model FOLDER --tokenizer FOLDER [--write-weights] [more options of qjax serve]
    python scripts/bench_startup.py --model FOLDER --tokenizer FOLDER --engine vllm \
        --start 'env VLLM_CACHE_ROOT={cache} bash serve.sh {port}'

Two JSON lines, `startup_cold` and `startup_warm`. The time counts from the command on: imports, loading, compiling, and
one token for a prompt of three. --write-weights first writes random weights in bf16 as safetensors into the folder, so
that loading counts too; without weights they are made on the device. The page cache is as it is: say how it was.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from scripts.bench_common import ask, dtype_of, form_of, free_port, server, setting, wait_until_ready, writer
from scripts.bench_serving import serve_command


def write_weights(folder: Path) -> int:
    """Fills a folder that has config.json with a random checkpoint, a file a layer. Returns its bytes."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from tests.tiny import shapes

    config = json.loads((folder / "config.json").read_text())
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**22, np.float32)).astype(ml_dtypes.bfloat16)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes({"attention_bias": False, **config}).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else name
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    weight_map, total = {}, 0
    for file, tensors in files.items():
        arrays = {
            name: np.ones(shape, noise.dtype) if "norm" in name else np.resize(noise, shape)
            for name, shape in tensors.items()
        }
        save_file(arrays, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(array.nbytes for array in arrays.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def start_once(command: str, limit_s: float) -> dict:
    """Starts the server, asks it once, and ends it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        start = time.perf_counter()
        with server(command.replace("{port}", str(port)), log) as process:
            wait_until_ready(url, process, log, limit_s)
            ready = time.perf_counter() - start
            model = ask(url, "/v1/models")["data"][0]["id"]
            ask(
                url,
                "/v1/completions",
                {"model": model, "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0},
                limit_s,
            )
            return {
                "seconds": round(time.perf_counter() - start, 2),
                "ready_s": round(ready, 2),
                "version": ask(url, "/version").get("version"),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder with at least config.json")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--engine", default="qjax", help="name of the server's engine in the lines")
    parser.add_argument("--start", default="", help="command of a server, with {port} and {cache}; default: qjax serve")
    parser.add_argument("--write-weights", action="store_true", help="write random weights into the folder first")
    parser.add_argument("--limit", type=float, default=600, help="seconds that a start may take")
    parser.add_argument("--dtype", default="bfloat16", help="of the model, for the lines")
    parser.add_argument("--out", default="", help="append the JSON lines to this file")
    args, more = parser.parse_known_args()
    folder = Path(args.model)
    if args.write_weights:
        print(f"wrote {write_weights(folder) / 2**30:.2f} GiB", flush=True)
    common = {"engine": args.engine, "model": folder.resolve().name, "dtype": dtype_of(folder, args.dtype)}
    common |= form_of(more)
    from_disk = any(folder.glob("*.safetensors"))
    say = writer({**common, **setting(args.engine), "load_format": "safetensors" if from_disk else "dummy"}, args.out)
    with tempfile.TemporaryDirectory() as cache:
        more += ["--compilation-cache-dir", cache]
        command = args.start.replace("{cache}", shlex.quote(cache)) or serve_command(args, more)
        for kind in ("cold", "warm"):
            say(figure=f"startup_{kind}", **start_once(command, args.limit))


if __name__ == "__main__":
    main()
