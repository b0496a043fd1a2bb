"""The benchmark scripts on a CPU: their lines have the peer's form, and the clients ask what they say."""

import asyncio
import json
import math
import re
import sys

import pytest
from safetensors import safe_open

from scripts import bench_offline, bench_serving, bench_startup
from scripts.bench_common import random_requests
from tests.engine.conftest import TINY
from tests.server.conftest import folder, start, tokenizer  # noqa: F401 (fixtures)
from tests.test_readme import ROOT
from tests.text.small_tokenizer import write_small_tokenizer
from tests.tiny import shapes

COMMON = {"engine", "version", "jax", "model", "dtype", "kv", "tp", "eager", "commit", "device", "driver"}


@pytest.fixture
def checkpoint(tmp_path):
    """config.json and a tokenizer, without weights; prompts have ids up to 10 000."""
    write_small_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"vocab_size": 10016}))
    return tmp_path


def test_offline_lines_have_the_peers_form(checkpoint, tmp_path, monkeypatch, capsys):
    out = tmp_path / "lines.jsonl"
    flags = "--batches 1 --out-len 5 --reps 1 --long 1x20,9x20 --prefill 1x24 --what decode,prefill"
    limits = "--max-model-len 192 --max-num-seqs 1 --max-num-batched-tokens 128 --kv-cache-memory-bytes 1MiB"
    given = [
        "--model",
        str(checkpoint),
        "--tokenizer",
        str(checkpoint),
        "--out",
        str(out),
        *flags.split(),
        *limits.split(),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_offline.py", *given])
    monkeypatch.setattr(bench_offline, "LONG_STEPS", 6)
    bench_offline.Bench(bench_offline.arguments()).all()

    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert capsys.readouterr().out.count("FIGURE {") == len(lines)
    assert all(set(line) >= COMMON and line["dtype"] == line["kv"] == "fp32" for line in lines)
    found = {line["figure"]: line for line in lines}
    assert list(found) == [
        "startup",
        "decode_b1_in128_out5",
        "long_b1_ctx20",
        "long_b9_ctx20",
        "prefill_1x24",
        "done",
    ]
    decode, long = found["decode_b1_in128_out5"], found["long_b1_ctx20"]
    assert {"ms_per_step", "tok_s", "raw", "raw_first"} <= set(decode)
    assert {"ms_per_step", "tok_s", "steps", "raw", "prefill_s"} <= set(long) and 1 <= long["steps"] <= 6
    assert long["tok_s"] == pytest.approx(1e3 / long["ms_per_step"], rel=0.01)
    assert "skipped" in found["long_b9_ctx20"]


def test_requests_are_the_peers():
    """The lengths that its script draws: the same generator, seed and order of calls."""
    prompts, outs = random_requests(256)
    assert (len(prompts), sum(map(len, prompts)), sum(outs)) == (256, 142_827, 133_966)
    assert random_requests(256) == (prompts, outs) and prompts[0][0] != prompts[1][0]


async def test_serving_asks_by_the_client(start, folder):  # noqa: F811
    server = await start(answer=lambda *_: " ".join(["one"] * 30))
    flags = "--num-prompts 3 --min-len 4 --max-len 8 --what rand,sampled"
    args, more = bench_serving.arguments(["--model", "m", "--tokenizer", str(folder), *flags.split(), "--port-x", "1"])
    assert more == ["--port-x", "1"], "what is not known goes to the server"
    own = bench_serving.figures(args)
    assert own["concurrency"][0] == "serve_3req_concurrency32" and own["sampled"][1]["top_p"] == 0.95
    client = [sys.executable, "-m", "qjax", "bench", "serve"]
    result = await asyncio.to_thread(
        bench_serving.measure, client, args, server.url, "org/fake-model", own["sampled"][1]
    )
    asked = [(p.temperature, p.top_k, p.ignore_eos) for _, _, p, *_ in server.engine.calls]
    assert asked == [(0.6, 20, True)] * 3 and all(4 <= p.max_tokens <= 8 for _, _, p, *_ in server.engine.calls)
    line = bench_serving.line_of(result)
    assert line["completed"] == 3 and line["failed"] == 0 and line["out_tokens"] == result["total_output_tokens"]
    assert all(line[f"{name}_ms_p{p}"] > 0 for name in ("ttft", "itl") for p in (50, 99))


def test_the_client_is_the_peers_where_it_is_installed(monkeypatch):
    assert bench_serving.client_command("other bench")[0] == ["other", "bench"]
    monkeypatch.setattr(bench_serving.importlib.util, "find_spec", lambda name: None)
    assert bench_serving.client_command("")[1] == "qjax bench serve"
    monkeypatch.setattr(bench_serving.importlib.util, "find_spec", lambda name: object())
    command, name = bench_serving.client_command("")
    assert name == "vllm bench serve" and command[-2:] == ["bench", "serve"]


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.headers.get("Content-Length"):
            self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.end_headers()
        self.wfile.write(b'{"data": [{"id": "m"}], "version": "9"}')
    do_POST = do_GET
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_startup_is_timed_to_the_first_answer(tmp_path):
    (tmp_path / "serve.py").write_text(SERVER)
    line = bench_startup.start_once(f"{sys.executable} {tmp_path / 'serve.py'} {{port}}", 30)
    assert line["version"] == "9" and 0 < line["ready_s"] <= line["seconds"] < 30


def test_a_server_that_ends_is_told_with_its_log(tmp_path):
    (tmp_path / "serve.py").write_text("raise SystemExit('no GPU here')")
    with pytest.raises(RuntimeError, match=r"(?s)exit status 1.*no GPU here"):
        bench_startup.start_once(f"{sys.executable} {tmp_path / 'serve.py'}", 30)


def test_random_weights_are_a_checkpoint(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    size = bench_startup.write_weights(checkpoint)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in set(index.values()):
        with safe_open(checkpoint / file, "np") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    assert found == shapes({"attention_bias": False, **config}) and set(index) == set(found)
    assert size == 2 * sum(math.prod(shape) for shape in found.values())


def test_the_comparison_is_a_shell_script_with_real_parts():
    text = (ROOT / "scripts/bench_vs_vllm.sh").read_text()
    names = set(re.findall(r"scripts/(\w+\.py)", text))
    assert all((ROOT / "scripts" / name).exists() for name in names) and "bench_table.py" in names
