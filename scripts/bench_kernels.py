"""Times every kernel alone at the shapes of published models: microseconds, rate, share of its floor. Needs a GPU.

    python scripts/bench_kernels.py [--models Qwen3-0.6B,Qwen3-8B] [--only decode] [--implementation reference]
        [--out kernels.jsonl]

A case runs its kernel on one piece of memory after the other, more than the L2 cache holds, under the profiler; its
time is the sum of the durations of all GPU kernels, so launches and gaps do not count. `scripts/check_kernels.py` says
whether the kernels are right: run that first. Each operation has a process and a time limit of its own.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from qjax.models.config import ModelConfig
from scripts.bench_common import setting, writer
from scripts.bench_floors import MODELS, Peaks, Work, peaks_of
from scripts.check_kernels import filled_cache

LIMIT_S = 120  # for one operation and model
COLD_BYTES = 200e6  # what a call touches at least: four times the L2 cache
CALLS = 5
PAGE_SIZE = 64
DECODES = ((1, 1024), (32, 1024), (128, 1024), (256, 1024), (8, 32768))
PREFILLS = ((1, 2048), (16, 2048), (1, 16384), (32, 512))
ROWS = (1, 32, 128, 256)
PROMPT_ROWS = (8192,)


@dataclass(frozen=True)
class Case:
    """`run(state, *args)` gives the next state, donated, and anything else; it runs the operation `count` times."""

    name: str
    run: Callable[..., tuple[Any, Any]]
    state: Any
    args: tuple
    count: int
    work: Work  # of one time


def copies(num_bytes: float) -> int:
    return int(min(48, max(2, -(-COLD_BYTES // num_bytes))))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def add_rms_norm(model: ModelConfig, implementation: str | None) -> Iterator[Case]:
    from qjax.kernels.add_rms_norm import add_rms_norm

    D = model.hidden_size
    for rows in (*ROWS, *PROMPT_ROWS):
        work = Work(4 * rows * D * 2 + D * 2, 0)
        count = copies(work.bytes)

        def run(xs, parts, weight):
            outs = [add_rms_norm(x, parts, weight, eps=1e-6, implementation=implementation) for x in xs]
            return [y for y, _ in outs], [normed for _, normed in outs]

        state = [normal(rows, D, seed=i) for i in range(count)]
        yield Case(f"add_rms_norm {rows}", run, state, (normal(1, rows, D), normal(D)), count, work)


def norm_rope_write(model: ModelConfig, implementation: str | None) -> Iterator[Case]:
    from qjax.kernels.norm_rope_write import norm_rope_write

    K, G, H = model.num_key_value_heads, model.num_queries_per_kv, model.head_dim
    for rows in (*ROWS, *PROMPT_ROWS):
        work = Work(2 * rows * K * (G + 2) * H * 2, 0)
        count = copies(work.bytes)
        angle = jax.random.uniform(jax.random.key(3), (rows, H // 2), maxval=6)
        slots = jax.random.permutation(jax.random.key(2), rows).astype(jnp.int32)

        def run(kv, qkv, norm, cos, sin, slots, count=count):
            outs = []
            for layer in range(count):
                args = (kv, qkv[layer][None], (norm, norm), cos, sin, slots)
                q, kv = norm_rope_write(*args, eps=1e-6, layer=layer, implementation=implementation)
                outs.append(q)
            return kv, outs

        kv = jnp.zeros((count, 2, rows // PAGE_SIZE + 2, K, PAGE_SIZE, H), jnp.bfloat16)
        qkv = [normal(rows, K, G + 2, H, seed=i) for i in range(count)]
        args = (qkv, normal(H), jnp.cos(angle), jnp.sin(angle), slots)
        yield Case(f"norm_rope_write {rows}", run, kv, args, count, work)


def paged_decode(model: ModelConfig, implementation: str | None) -> Iterator[Case]:
    from qjax.kernels.paged_attention import paged_decode

    N, K, H = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    for batch, context in DECODES:
        tokens = batch * context
        work = Work(tokens * K * H * 4 + 2 * batch * N * H * 2, 4 * N * H * tokens)
        count = copies(work.bytes)
        kv, table = filled_cache(count, [context] * batch, K, PAGE_SIZE, H)

        def run(q, kv, table, lens, count=count):
            for layer in range(count):
                q = paged_decode(q, kv, table, lens, layer=layer, implementation=implementation)
            return q, None

        args = (kv, table, jnp.full(batch, context, jnp.int32))
        yield Case(f"decode {batch} x {context}", run, normal(batch, N, H), args, count, work)


def paged_prefill(model: ModelConfig, implementation: str | None) -> Iterator[Case]:
    from qjax.kernels.paged_attention import paged_prefill

    N, K, H, count = model.num_attention_heads, model.num_key_value_heads, model.head_dim, 2
    for batch, length in PREFILLS:
        work = Work(batch * length * (2 * N + 2 * K) * H * 2, 4 * N * H * batch * length * (length + 1) / 2)
        kv, table = filled_cache(count, [length] * batch, K, PAGE_SIZE, H)

        def run(q, kv, table, lens, starts):
            for layer in range(count):
                q = paged_prefill(q, kv, table, lens, starts, layer=layer, implementation=implementation)
            return q, None

        starts = jnp.arange(batch + 1, dtype=jnp.int32) * length
        args = (kv, table, jnp.full(batch, length, jnp.int32), starts)
        yield Case(f"prefill {batch} x {length}", run, normal(batch * length, N, H), args, count, work)


def bf16_weight(D: int, N: int, seed: int) -> tuple[jax.Array, ...]:
    return (normal(D, N, seed=seed),)


def fp8_weight(D: int, N: int, seed: int) -> tuple[jax.Array, ...]:
    return normal(N, D, seed=seed).astype(jnp.float8_e4m3fn), jnp.ones((N // 128, D // 128), jnp.float32)


def int4_weight(D: int, N: int, seed: int) -> tuple[jax.Array, ...]:
    words = jax.random.randint(jax.random.key(seed), (D // 128, N // 64, 1024), -(2**31), 2**31 - 1, jnp.int32)
    return words, jnp.full((D // 128, N), 0x3C000008, jnp.int32)  # the bits of a small scale, zero point 8


def products(model: ModelConfig, implementation: str | None, kind: str = "bf16") -> Iterator[Case]:
    """Each weight as the model multiplies with it: by its kernel where that is picked, else by XLA."""
    from qjax.kernels.fp8_matmul import fp8_matmul
    from qjax.kernels.int4_matmul import int4_matmul
    from qjax.kernels.small_matmul import small_matmul
    from qjax.models.layers import matmul

    op, make, prefix = {
        "bf16": (small_matmul, bf16_weight, ""),
        "fp8": (fp8_matmul, fp8_weight, "fp8 "),
        "int4": (int4_matmul, int4_weight, "int4 "),
    }[kind]
    D, F, H = model.hidden_size, model.intermediate_size, model.head_dim
    N, K = model.num_attention_heads * H, model.num_key_value_heads * H
    shapes = {"qkv": (D, N + 2 * K), "o": (N, D), "gate_up": (D, 2 * F), "down": (F, D)}
    if kind == "bf16":
        shapes["head"] = (D, model.vocab_size)
    for name, (inputs, outputs) in shapes.items():
        if name == "head":  # the embedding, where it is the output layer
            is_tied = model.tie_word_embeddings
            op = lambda x, w, implementation, tied=is_tied: matmul(x, w, (int(tied),), out_dtype=jnp.float32)
            make = lambda D, N, seed, tied=is_tied: (normal(N, D, seed=seed) if tied else normal(D, N, seed=seed),)
        first = make(inputs, outputs, 0)
        num_bytes = sum(array.nbytes for array in first)
        count = copies(num_bytes) if name != "head" else 1
        weights = [first, *(make(inputs, outputs, seed) for seed in range(1, count))]
        for rows in ROWS:
            work = Work(num_bytes + rows * (inputs + outputs) * 2, 2 * rows * inputs * outputs)

            def run(state, xs, weights, op=op):  # each x its own, or XLA may join the products
                return state, [op(x, *w, implementation=implementation) for x, w in zip(xs, weights, strict=True)]

            xs = [normal(rows, inputs, seed=9 + i) for i in range(count)]
            yield Case(f"{prefix}{name} {rows}", run, jnp.zeros(1), (xs, weights), count, work)


def sampling(model: ModelConfig, implementation: str | None) -> Iterator[Case]:
    """XLA's code, greedy and with Qwen3's own values."""
    from qjax.engine.sampler import SamplingBatch, greedy, sample

    for rows in ROWS:
        logits = jax.random.normal(jax.random.key(0), (rows, model.vocab_size))
        work = Work(logits.size * 4, 0)
        full = lambda value, dtype=jnp.float32, rows=rows: jnp.full(rows, value, dtype)
        seeds, counters = jnp.zeros((rows, 2), jnp.uint32), jnp.arange(rows, dtype=jnp.int32)
        batch = SamplingBatch(full(0.6), full(20, jnp.int32), full(0.95), full(0.0), seeds, counters)
        for name, pick in (("greedy", lambda x, batch: greedy(x)), ("sample", sample)):

            def run(state, logits, batch, pick=pick):
                return state, pick(logits, batch)

            yield Case(f"{name} {rows}", run, jnp.zeros(1), (logits, batch), 1, work)


OPERATIONS: dict[str, Callable[[ModelConfig, str | None], Iterator[Case]]] = {
    "add_rms_norm": add_rms_norm,
    "norm_rope_write": norm_rope_write,
    "decode": paged_decode,
    "prefill": paged_prefill,
    "products": products,
    "fp8_products": functools.partial(products, kind="fp8"),
    "int4_products": functools.partial(products, kind="int4"),
    "sampling": sampling,
}


def seconds_of(case: Case) -> float:
    """Of the operation once. On a GPU the sum of its kernels' durations; elsewhere by the clock."""
    run = jax.jit(case.run, donate_argnums=0)
    state, _ = jax.block_until_ready(run(case.state, *case.args))
    is_gpu = jax.devices()[0].platform == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        if is_gpu:
            jax.profiler.start_trace(folder)
        started = time.perf_counter()
        for _ in range(CALLS):
            state, _ = jax.block_until_ready(run(state, *case.args))
        seconds = time.perf_counter() - started
        if is_gpu:
            from scripts.profile_table import kernels

            jax.profiler.stop_trace()
            seconds = sum(duration for _, duration, _ in kernels(Path(folder))) / 1e9
    return seconds / CALLS / case.count


def line_of(case: Case, seconds: float, peaks: Peaks | None) -> dict[str, Any]:
    line = {"figure": f"kernel {case.name}", "us": round(seconds * 1e6, 2)}
    if peaks is not None:
        floor = case.work.seconds(peaks)
        line |= {"floor_us": round(floor * 1e6, 2), "of_floor": round(floor / seconds, 3)}
    rates = {"tb_s": case.work.bytes / seconds / 1e12, "tflop_s": case.work.flops / seconds / 1e12}
    return line | {name: round(rate, 3) for name, rate in rates.items() if rate}


def run_one(operation: str, args: argparse.Namespace) -> None:
    """What a child does: one operation at the shapes of one model."""
    device = jax.devices()[0].device_kind
    common = {"engine": "qjax", "jax": jax.__version__, "model": args.models, "dtype": "bf16", **setting()}
    say = writer(common | {"device": device, "implementation": args.implementation or "picked"}, args.out)
    for case in OPERATIONS[operation](MODELS[args.models], args.implementation):
        say(**line_of(case, seconds_of(case), peaks_of(device)))


def row(line: dict[str, Any]) -> str:
    share = f"{100 * line['of_floor']:5.1f} % of the floor" if "of_floor" in line else ""
    rates = " ".join(
        f"{line[key]:8.2f} {unit}" for key, unit in (("tb_s", "TB/s"), ("tflop_s", "TFLOP/s")) if key in line
    )
    return f"{line['model']:<12}{line['figure'].removeprefix('kernel '):<26}{line['us']:10.1f} us  {share}  {rates}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="Qwen3-0.6B,Qwen3-8B", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--only", default="", help=f"operations whose name contains one of these, a|b: {', '.join(OPERATIONS)}"
    )
    parser.add_argument("--implementation", default=None, help="reference or mosaic_gpu [what the engine picks]")
    parser.add_argument("--out", default="", help="append the JSON lines to this file")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_one(args.child, args)
        return 0

    failed = False
    for model in args.models.split(","):
        for name in (n for n in OPERATIONS if any(part in n for part in args.only.split("|"))):
            command = [sys.executable, __file__, "--child", name, "--models", model, "--out", args.out]
            command += ["--implementation", args.implementation] if args.implementation else []
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
                out, failure = done.stdout, done.returncode and done.stderr[-1500:]
            except subprocess.TimeoutExpired as error:
                out, failure = (error.stdout or b"").decode(), f"no end after {LIMIT_S} s"
            for text in out.splitlines():
                if text.startswith("FIGURE "):
                    print(row(json.loads(text.removeprefix("FIGURE "))), flush=True)
            if failure:
                failed = True
                print(f"FAILED {model} {name}: {failure}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
