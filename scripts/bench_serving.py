"""Measures a server over HTTP, streamed: one JSON line per figure. Any server with OpenAI's API can be asked.

    python scripts/bench_serving.py --model FOLDER --tokenizer FOLDER [more options of qjax serve]
    python scripts/bench_serving.py --model FOLDER --tokenizer FOLDER --engine vllm --start 'bash serve.sh {port}'
    python scripts/bench_serving.py --model FOLDER --tokenizer FOLDER --engine vllm --base-url http://localhost:8000

The client is vLLM's own `vllm bench serve` where vLLM is installed, else `qjax bench serve`; --client names another.
Compare lines of the same client only. Each figure is run once to warm up, as a server compiles shapes when it meets
them, and once more to count. One of the four is sampled with Qwen3's values, the others are greedy.
"""

import argparse
import contextlib
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from scripts.bench_common import ask, dtype_of, form_of, free_port, server, setting, wait_until_ready, writer

SAMPLED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
PERCENTILES = ("50", "99")


def arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder with at least config.json; without weights: random ones")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--engine", default="qjax", help="name of the server's engine in the lines")
    parser.add_argument("--base-url", default="", help="a server that runs already")
    parser.add_argument("--start", default="", help="command of a server, with {port}; default: qjax serve")
    parser.add_argument("--client", default="", help="command of the client, such as 'vllm bench serve'")
    parser.add_argument("--what", default="rand,rate,concurrency,sampled")
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--min-len", type=int, default=100, help="tokens of the shortest prompt and answer")
    parser.add_argument("--max-len", type=int, default=1024, help="tokens of the longest")
    parser.add_argument("--rate", type=float, default=8, help="requests a second of the figure 'rate'")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at a time of the figure 'concurrency'")
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--ready-limit", type=float, default=600, help="seconds that the server may take to start")
    parser.add_argument("--dtype", default="bfloat16", help="of the model, for the lines")
    parser.add_argument("--out", default="", help="append the JSON lines to this file")
    return parser.parse_known_args(argv)


def serve_command(args: argparse.Namespace, more: list[str]) -> str:
    """`qjax serve` as the peer's script starts vLLM: no prefix cache, no sampling values of the model's."""
    # -P: not the qjax folder of a clone, which has no kernels before it is installed.
    has_weights = any(Path(args.model).glob("*.safetensors"))
    command = [sys.executable, "-P", "-m", "qjax", "serve", args.model, "--tokenizer", args.tokenizer]
    command += ["--load-format", "auto" if has_weights else "dummy", "--generation-config", "vllm"]
    command += ["--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", "{port}"]
    return shlex.join([*command, *more]).replace("'{port}'", "{port}")


def client_command(client: str) -> tuple[list[str], str]:
    """The client's command and its name."""
    if client:
        return shlex.split(client), client
    if importlib.util.find_spec("vllm"):
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"], "vllm bench serve"
    return [sys.executable, "-P", "-m", "qjax", "bench", "serve"], "qjax bench serve"


def figures(args: argparse.Namespace) -> dict[str, tuple[str, dict]]:
    """Figure's name and its own flags, by what --what calls it."""
    n = args.num_prompts
    return {
        "rand": (f"serve_{n}req_rand", {"temperature": 0.0}),
        "rate": (f"serve_{n}req_rate{args.rate:g}", {"temperature": 0.0, "request_rate": args.rate}),
        "concurrency": (
            f"serve_{n}req_concurrency{args.concurrency}",
            {"temperature": 0.0, "max_concurrency": args.concurrency},
        ),
        "sampled": (f"serve_{n}req_rand", SAMPLED),
    }


def measure(client: list[str], args: argparse.Namespace, url: str, model: str, own: dict) -> dict:
    """One run of the client: its result file."""
    middle = (args.min_len + args.max_len) / 2
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "backend": "openai",
            "base_url": url,
            "model": model,
            "tokenizer": args.tokenizer,
            "dataset_name": "random",
            "random_input_len": round(middle),
            "random_output_len": round(middle),
            "random_range_ratio": round((args.max_len - middle) / middle, 4),
            "num_prompts": args.num_prompts,
            "seed": 0,
            "percentile_metrics": "ttft,tpot,itl",
            "metric_percentiles": ",".join(PERCENTILES),
            "result_dir": folder,
            "result_filename": "result.json",
            **own,
        }
        flags = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", str(value))]
        command = [*client, *flags, "--ignore-eos", "--disable-tqdm", "--save-result"]
        done = subprocess.run(command, capture_output=True, text=True)
        path = Path(folder) / "result.json"
        if done.returncode or not path.exists():
            raise RuntimeError(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
        return json.loads(path.read_text())


def line_of(result: dict) -> dict:
    """What a line keeps of the client's result."""
    line = {
        "out_tok_s": round(result["output_throughput"], 1),
        "duration_s": round(result["duration"], 3),
        "completed": result["completed"],
        "failed": result.get("failed", 0),
        "in_tokens": result["total_input_tokens"],
        "out_tokens": result["total_output_tokens"],
    }
    for name in ("ttft", "itl", "tpot"):
        line |= {f"{name}_ms_p{p}": round(result[f"p{p}_{name}_ms"], 3) for p in PERCENTILES}
    return line


def main() -> None:
    args, more = arguments()
    client, client_name = client_command(args.client)
    chosen = [figures(args)[name] for name in args.what.split(",")]
    with contextlib.ExitStack() as stack:
        url = args.base_url.rstrip("/")
        if not url:
            port = free_port()
            log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
            command = (args.start or serve_command(args, more)).replace("{port}", str(port))
            process = stack.enter_context(server(command, log))
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url, process, log, args.ready_limit)
        model = ask(url, "/v1/models")["data"][0]["id"]
        common = {
            "engine": args.engine,
            "version": ask(url, "/version").get("version"),
            "model": Path(args.model).resolve().name,
            "dtype": dtype_of(Path(args.model), args.dtype),
            **form_of(more),
            **setting(args.engine),
            "client": client_name,
        }
        say = writer(common, args.out)
        for figure, own in chosen:
            if not args.no_warm_up:
                measure(client, args, url, model, own)
            result = measure(client, args, url, model, own)
            say(figure=figure, **line_of(result), sampled=own["temperature"] > 0, **own)


if __name__ == "__main__":
    main()
