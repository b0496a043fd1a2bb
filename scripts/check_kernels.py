"""Checks every kernel on the GPU it runs on, then times it against its floor.

    python scripts/check_kernels.py [--only SUBSTRING] [--jobs 12] [--implementation mosaic_gpu] [--out results.jsonl]

Each check runs in a process of its own with a time limit, so that a kernel that hangs or faults costs one line of the
report. Timings run one after another. The last thing printed is a table.
"""

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

CHECK_LIMIT_S = 100
TIMING_LIMIT_S = 150
READ_BYTES_PER_S = 3.0e12  # ceilings of one H100
FLOPS_PER_S = 798e12
LARGE_WIDTH = 640  # columns of the page table when max_model_len is 40 960 and pages have 64 tokens


# ------------------------------------------------------------------------------------------------------------ checks


def checks() -> dict:
    """Name -> function(implementation) -> dict of what was seen, with "ok"."""
    from tests.kernels.cases import Case, decode_cases, narrow, prefill_cases

    large = {"heads": (32, 8, 128), "page_size": 64}
    decode = [
        *decode_cases(1500),
        Case((8192, 8191, 8193, 100, 0, 1, 2048, 2049), **large),
        Case((8192, 1000), heads=(16, 8, 128), page_size=16, extra_width=0),
        Case((32768,), heads=(8, 1, 128), page_size=64, extra_width=100),
        Case(tuple(range(1, 260, 2)), heads=(16, 8, 128), page_size=64, extra_width=600),
    ]
    prefill = [
        *prefill_cases(900),
        Case((2048, 1900, 64), chunk_lens=(2048, 500, 64), extra_rows=100, **large),
        Case((9000,), chunk_lens=(700,), heads=(16, 8, 128), page_size=32),
    ]
    rng = random.Random(0)
    for seed in range(6):  # ragged: chunks begin and end at any row and any position
        chunks = tuple(rng.choice((1, 2, 5, 20, 64, 127, 128, 129, 300)) for _ in range(24))
        contexts = tuple(n + rng.choice((0, 0, 1, 63, 100, 128, 500)) for n in chunks)
        prefill.append(Case(contexts, chunk_lens=chunks, heads=(4, 2, 128), page_size=64, extra_rows=37, seed=seed))
    decode, prefill = decode + narrow(decode[::3]), prefill + narrow(prefill[::3])
    found = {"numerics canary": canary}
    for shape in ((1, 32, 8, 64), (37, 16, 8, 16), (300, 40, 8, 128), (5, 8, 1, 64), (64, 64, 8, 64)):
        found[f"norm_rope_write tokens {shape[0]} heads {shape[1]}/{shape[2]} page {shape[3]}"] = functools.partial(
            check_norm_rope_write, *shape
        )
    for shape in ((1, 1024), (37, 2560), (300, 4096)):
        found[f"add_rms_norm {shape[0]} x {shape[1]}"] = functools.partial(check_add_rms_norm, *shape)
    found |= {f"decode {case.name}": functools.partial(check_attention, case) for case in decode}
    found |= {f"prefill {case.name}": functools.partial(check_attention, case) for case in prefill}
    return found


def canary(implementation: str) -> dict:
    """jit against un-jitted: whether this GPU, driver and compiler compute at all."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (512, 512))
    f = lambda x: jnp.tanh(x @ x.T / 23).sum(axis=0)
    with jax.disable_jit():
        plain = f(x)
    error = float(jnp.abs(jax.jit(f)(x) - plain).max())
    return {"ok": error < 1e-2, "max_abs": error}


def check_attention(case, implementation: str) -> dict:
    import jax
    import numpy as np

    from qjax.kernels.paged_attention import paged_decode, paged_prefill
    from tests.kernels.cases import LAYER, errors, is_close, make, oracle

    op = paged_decode if case.chunk_lens is None else paged_prefill
    run = jax.jit(functools.partial(op, layer=LAYER, implementation=implementation))
    args = make(case)
    device_args = {name: jax.device_put(value) for name, value in args.items()}
    out, again = np.asarray(run(**device_args)), np.asarray(run(**device_args))
    expected = oracle(args)
    worst, relative = errors(out, expected)
    seen = {
        "is_close": is_close(out, expected, case.dtype),
        "runs_equal": out.tobytes() == again.tobytes(),
        "alone_equal": is_alone_equal(case, args, out, run),
        "max_abs": worst,
        "relative": relative,
    }
    return {"ok": seen["is_close"] and seen["runs_equal"] and seen["alone_equal"], **seen}


def is_alone_equal(case, args: dict, out, run) -> bool:
    """The last two sequences alone, with only the columns they need, give the bits they gave in the batch."""
    import numpy as np

    for i in range(max(0, len(case.context_lens) - 2), len(case.context_lens)):
        width = max(1, -(-case.context_lens[i] // case.page_size))
        alone = {"kv": args["kv"], "page_table": args["page_table"][i : i + 1, :width]}
        alone["context_lens"] = args["context_lens"][i : i + 1]
        alone |= {"scales": args["scales"]} if "scales" in args else {}
        start, end = i, i + 1
        if case.chunk_lens is not None:
            start, end = args["query_starts"][i : i + 2]
            alone["query_starts"] = np.array([0, end - start], np.int32)
        if end > start and np.asarray(run(q=args["q"][start:end], **alone)).tobytes() != out[start:end].tobytes():
            return False
    return True


def check_norm_rope_write(num_tokens: int, N: int, K: int, S: int, implementation: str) -> dict:
    """Against the reference: within rounding; the values written and all other slots bit by bit."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.kernels.norm_rope_write import norm_rope_write

    H, num_pages = 128, num_tokens // S + 3
    keys = jax.random.split(jax.random.key(0), 6)
    kv = jax.random.normal(keys[0], (3, 2, num_pages, K, S, H), jnp.bfloat16)
    qkv = jax.random.normal(keys[1], (num_tokens, K, N // K + 2, H), jnp.bfloat16)
    norms = tuple(jax.random.normal(key, (H,), jnp.bfloat16) for key in keys[2:4])
    angle = jax.random.uniform(keys[4], (num_tokens, H // 2), maxval=6)
    slots = jax.random.permutation(keys[5], num_pages * S)[:num_tokens].astype(jnp.int32)
    slots = slots.at[num_tokens // 2].set(-1) if num_tokens > 1 else slots
    args = (kv, qkv[None], norms, jnp.cos(angle), jnp.sin(angle), slots)

    def run(name: str) -> list[np.ndarray]:
        return [
            np.array(x)
            for x in jax.jit(functools.partial(norm_rope_write, eps=1e-6, layer=1, implementation=name))(*args)
        ]

    (q, out), (expected_q, expected) = run(implementation), run("reference")
    worst = max(
        float(np.abs(a.astype(np.float32) - b.astype(np.float32)).max()) for a, b in ((q, expected_q), (out, expected))
    )
    keys_written = out[1, 0] != np.asarray(kv)[1, 0]
    out[1, 0][keys_written] = expected[1, 0][keys_written]
    return {"ok": worst < 0.07 and out.tobytes() == expected.tobytes(), "max_abs": worst}


def check_add_rms_norm(num_rows: int, size: int, implementation: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qjax.kernels.add_rms_norm import add_rms_norm

    keys = jax.random.split(jax.random.key(0), 3)
    x, delta = (jax.random.normal(key, (num_rows, size), jnp.bfloat16) for key in keys[:2])
    weight = jax.random.normal(keys[2], (size,), jnp.bfloat16)
    run = lambda name: jax.jit(functools.partial(add_rms_norm, eps=1e-6, implementation=name))(x, delta[None], weight)
    (added, normed), (expected_added, expected) = run(implementation), run("reference")
    worst = float(jnp.abs(normed.astype(jnp.float32) - expected.astype(jnp.float32)).max())
    return {
        "ok": worst < 0.07 and np.asarray(added).tobytes() == np.asarray(expected_added).tobytes(),
        "max_abs": worst,
    }


# ----------------------------------------------------------------------------------------------------------- timings


def time_decode(implementation: str):
    import jax
    import jax.numpy as jnp

    from qjax.kernels.paged_attention import paged_decode

    N, K, H, S = 32, 8, 128, 64
    shapes = [(1, 1024), (8, 1024), (32, 1024), (128, 1024), (256, 1024), (8, 8192), (1, 32768), ("ragged 64", 1024)]
    for batch, context in shapes:
        lens = [context] * batch if isinstance(batch, int) else [16 + (i * 997) % 2033 for i in range(64)]
        read_bytes = sum(lens) * K * H * 2 * 2
        # More than the L2 cache holds, and enough layers for the work list, built once a step, to count as it should.
        L = min(48, max(16, -(-400_000_000 // read_bytes)))
        kv, page_table = filled_cache(L, lens, K, S, H)
        q = jax.random.normal(jax.random.key(1), (len(lens), N, H), jnp.bfloat16)

        def step(q, kv, page_table, context_lens, L=L):
            for layer in range(L):
                q = paged_decode(q, kv, page_table, context_lens, layer=layer, implementation=implementation)
            return q

        seconds = seconds_a_call(step, q, kv, page_table, jnp.asarray(lens, jnp.int32)) / L
        yield timing(
            f"decode {batch} x {context}", seconds, read_bytes / READ_BYTES_PER_S, tb_s=read_bytes / seconds / 1e12
        )


def time_prefill(implementation: str):
    import jax
    import jax.numpy as jnp

    from qjax.kernels.paged_attention import paged_prefill

    N, K, H, S, L = 32, 8, 128, 64, 4
    for batch, length in [(1, 4096), (4, 2048), (1, 16384), (32, 512), ("ragged 16", 512)]:
        lens = [length] * batch if isinstance(batch, int) else [1 + (i * 397) % 1021 for i in range(16)]
        kv, page_table = filled_cache(L, lens, K, S, H)
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(jnp.asarray(lens, jnp.int32))])
        num_rows = -(-sum(lens) // 128) * 128
        q = jax.random.normal(jax.random.key(1), (num_rows, N, H), jnp.bfloat16)

        def step(q, kv, page_table, context_lens, starts):
            for layer in range(L):
                q = paged_prefill(q, kv, page_table, context_lens, starts, layer=layer, implementation=implementation)
            return q

        seconds = seconds_a_call(step, q, kv, page_table, jnp.asarray(lens, jnp.int32), starts) / L
        flops = sum(4 * N * H * n * (n + 1) / 2 for n in lens)
        yield timing(f"prefill {batch} x {length}", seconds, flops / FLOPS_PER_S, tflop_s=flops / seconds / 1e12)


def time_norm_rope_write(implementation: str):
    import jax
    import jax.numpy as jnp

    from qjax.kernels.norm_rope_write import norm_rope_write

    L, K, G, H, S = 16, 8, 4, 128, 64
    for num_tokens in (1, 32, 256, 8192):
        kv = jnp.zeros((L, 2, num_tokens // S + 2, K, S, H), jnp.bfloat16)
        qkv = jax.random.normal(jax.random.key(1), (num_tokens, K, G + 2, H), jnp.bfloat16)
        angle = jax.random.uniform(jax.random.key(3), (num_tokens, H // 2), maxval=6)
        slots = jax.random.permutation(jax.random.key(2), num_tokens).astype(jnp.int32)
        for name in dict.fromkeys((implementation, "reference")):

            def step(kv, qkv, cos, sin, slots, name=name):
                norms = (qkv[0, 0, 0], qkv[0, 0, 1])
                for layer in range(L):
                    rope = (cos, sin)
                    q, kv = norm_rope_write(
                        kv, qkv[None], norms, *rope, slots, eps=1e-6, layer=layer, implementation=name
                    )
                    qkv = qkv.at[:, :, :G].set(q)  # each layer waits for the one before
                return kv

            seconds = seconds_a_call(step, kv, qkv, jnp.cos(angle), jnp.sin(angle), slots) / L
            moved = 2 * qkv.size * 2  # all read, all written
            yield timing(f"norm_rope_write {num_tokens} tokens, {name}", seconds, moved / READ_BYTES_PER_S)
            kv = jnp.zeros(kv.shape, kv.dtype)


def filled_cache(L: int, lens: list[int], K: int, S: int, H: int):
    """A cache of random values whose pages are dealt at random, and a page table as wide as a server's."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    needed = [-(-n // S) for n in lens]
    num_pages = sum(needed) + 1
    pages = np.random.default_rng(0).permutation(num_pages - 1) + 1
    table = np.zeros((len(lens), LARGE_WIDTH), np.int32)
    for row, (end, count) in enumerate(zip(np.cumsum(needed), needed, strict=True)):
        table[row, :count] = pages[end - count : end]

    @jax.jit
    def fill():
        some = jax.random.normal(jax.random.key(0), (16, 8192 * H), jnp.bfloat16)
        size = L * 2 * num_pages * K * S * H
        return jnp.tile(some.reshape(-1), -(-size // some.size))[:size].reshape(L, 2, num_pages, K, S, H)

    return fill(), jnp.asarray(table)


def seconds_a_call(f, first, *args) -> float:
    """Median over rounds of back-to-back calls; each call's first argument is the call before's result.

    It is donated, so that every buffer stays where it is and XLA need not record its CUDA graph again.
    """
    import jax

    run = jax.jit(f, donate_argnums=0)
    for _ in range(5):  # compiles, and records the CUDA graph
        first = run(first, *args)
    jax.block_until_ready(first)
    start = time.perf_counter()
    first = jax.block_until_ready(run(first, *args))
    count = max(3, int(0.1 / (time.perf_counter() - start)))
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(count):
            first = run(first, *args)
        jax.block_until_ready(first)
        rounds.append((time.perf_counter() - start) / count)
    return sorted(rounds)[len(rounds) // 2]


def timing(name: str, seconds: float, floor: float, **rates: float) -> dict:
    return {"name": name, "us": seconds * 1e6, "floor_us": floor * 1e6, "of_floor": floor / seconds, **rates}


TIMINGS = {"decode": time_decode, "prefill": time_prefill, "norm_rope_write": time_norm_rope_write}


# ------------------------------------------------------------------------------------------------------------- parent


def run_child(kind: str, name: str, implementation: str, limit_s: float) -> list[dict]:
    """The child's JSON lines; a last one tells of a crash or of the time limit."""
    command = [sys.executable, __file__, "--implementation", implementation, f"--{kind}", name]
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        out, err = process.communicate(timeout=limit_s)
        failure = None if process.returncode == 0 else f"exit status {process.returncode}: {err[-1500:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        failure = f"no end after {limit_s} s"
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return lines + ([{"name": name, "ok": False, "failure": failure}] if failure else [])


def run_one(kind: str, name: str, implementation: str) -> None:
    """What a child does."""
    if kind == "check":
        print(json.dumps({"name": name, **checks()[name](implementation=implementation)}))
    else:
        for line in TIMINGS[name](implementation):
            print(json.dumps(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run checks and timings whose name contains one of these, a|b|c")
    parser.add_argument("--jobs", type=int, default=12, help="checks at once; timings always run alone")
    parser.add_argument("--implementation", default="mosaic_gpu")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-timings", action="store_true")
    parser.add_argument("--out", default="check_kernels.jsonl", help="where the results go, one JSON object a line")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--timing", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for kind in ("check", "timing"):
        if name := getattr(options, kind):
            run_one(kind, name, options.implementation)
            return 0

    only = options.only.split("|")
    results = []
    with open(options.out, "w") as file:

        def keep(lines: list[dict]) -> None:
            for line in lines:
                results.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                if "us" in line:
                    rate = " ".join(f"{line[key]:8.2f} {key}" for key in ("tb_s", "tflop_s") if key in line)
                    print(f"{line['name']:<36}{line['us']:10.1f} us, floor {line['floor_us']:8.1f} us,"
                          f" {100 * line['of_floor']:5.1f} % {rate}", flush=True)  # fmt: skip
                elif not line["ok"]:
                    print("FAILED", json.dumps(line), flush=True)

        if not options.no_checks:
            names = [name for name in checks() if any(part in name for part in only)]
            start = time.perf_counter()
            with ThreadPoolExecutor(options.jobs) as pool:
                child = lambda name: run_child("check", name, options.implementation, CHECK_LIMIT_S)
                for lines in pool.map(child, names):
                    keep(lines)
            passed = sum(line["ok"] for line in results)
            print(f"{passed} of {len(names)} checks passed in {time.perf_counter() - start:.0f} s", flush=True)
        if not options.no_timings:
            for name in TIMINGS:
                if any(name in part or part in name for part in only):
                    keep(run_child("timing", name, options.implementation, TIMING_LIMIT_S))
    return 0 if all(line.get("ok", True) for line in results) else 1


if __name__ == "__main__":
    sys.exit(main())
