"""Measures the engine offline: one JSON line per figure, the same requests and figures as the peer's bench script.

    python scripts/bench_offline.py --model FOLDER --tokenizer FOLDER [--what latency,decode,prefill,throughput]

The model folder needs only config.json: weights are random, prompts are token ids (the same every run), prefix
caching is off. Each figure is run once to warm up (which also compiles), then --reps times; the median counts.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True, help="any tokenizer folder: it is loaded, not used")
    parser.add_argument("--what", default="latency,decode,sampled,prefill,throughput")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--kv-cache-memory-bytes", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tp", type=int, default=1, help="tensor_parallel_size")
    parser.add_argument("--batches", default="1,8,32,128,256")
    parser.add_argument("--sampled-batches", default="32", help="batches of the figure 'sampled'")
    parser.add_argument("--prefill", default="1x2048,16x2048,8x512,32x512")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--out-len", type=int, default=257, help="tokens of each answer in the decode figures")
    parser.add_argument("--enforce-eager", action="store_true", help="compile at first use, in each figure's warm-up")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--out", default="", help="append the JSON lines to this file")
    parser.add_argument("--profile", default="", help="folder for a profile of each decode batch, after all figures")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    import jax

    from qjax import LLM, SamplingParams

    import_seconds = time.perf_counter() - started
    name = os.path.basename(os.path.normpath(args.model))

    def say(**figure) -> None:
        line = json.dumps({"engine": "qjax", "model": name, "tp": args.tp, **figure})
        print("FIGURE " + line, flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(line + "\n")

    started = time.perf_counter()
    llm = LLM(
        args.model,
        tokenizer=args.tokenizer,
        load_format="dummy",
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        tensor_parallel_size=args.tp,
        enable_prefix_caching=False,
        enforce_eager=args.enforce_eager,
        generation_config="vllm",
        override_generation_config={"temperature": 0.0},  # what is compiled ahead: the figures are greedy
    )
    plan = llm.engine.plan
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    say(
        figure="startup",
        seconds=round(time.perf_counter() - started, 2),
        import_seconds=round(import_seconds, 2),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        commit=commit or None,
        dtype=plan.dtype,
        kv_tokens=plan.kv_capacity_tokens,
    )

    rng = random.Random(0)

    def prompt(num_tokens: int) -> list[int]:
        return [rng.randrange(0, 10000) for _ in range(num_tokens)]

    def params(num_tokens: int, **sampling) -> SamplingParams:
        sampling = {"temperature": 0.0} | sampling
        return SamplingParams(ignore_eos=True, max_tokens=num_tokens, detokenize=False, **sampling)

    def run(prompts: list[list[int]], sampling_params) -> tuple[float, int]:
        start = time.perf_counter()
        outputs = llm.generate(prompts, sampling_params, use_tqdm=False)
        return time.perf_counter() - start, sum(len(o.outputs[0].token_ids) for o in outputs)

    def median(function, reps: int | None = None) -> tuple[float, list[float], int]:
        function()
        results = [function() for _ in range(reps or args.reps)]
        times = sorted(seconds for seconds, _ in results)
        return statistics.median(times), [round(t, 4) for t in times], results[0][1]

    what = set(args.what.split(","))
    run([prompt(16)], params(8))

    if "latency" in what:
        one = prompt(128)
        first, raw_first, _ = median(lambda: run([one], params(1)), 5)
        total, raw, _ = median(lambda: run([one], params(128)))
        say(figure="ttft_b1_in128", ms=round(first * 1e3, 3), raw=raw_first)
        say(
            figure="decode_b1_in128_out128",
            ms_per_token=round((total - first) / 127 * 1e3, 4),
            tok_s=round(127 / (total - first), 1),
            raw=raw,
        )

    # Qwen3's own sampling values, beside the greedy figures.
    decode = {"decode": {}, "sampled": {"temperature": 0.6, "top_k": 20, "top_p": 0.95}}
    for kind in decode.keys() & what:
        steps, sampling = args.out_len - 1, decode[kind]
        for batch in (int(b) for b in (args.batches if kind == "decode" else args.sampled_batches).split(",")):
            prompts = [prompt(128) for _ in range(batch)]
            first, raw_first, _ = median(lambda p=prompts, s=sampling: run(p, params(1, **s)))
            total, raw, _ = median(lambda p=prompts, s=sampling: run(p, params(args.out_len, **s)))
            step = (total - first) / steps
            say(
                figure=f"{kind}_b{batch}_in128_out{args.out_len}",
                ms_per_step=round(step * 1e3, 4),
                tok_s=round(batch / step, 1),
                raw=raw,
                raw_first=raw_first,
            )

    if "prefill" in what:
        for shape in args.prefill.split(","):
            batch, length = (int(x) for x in shape.split("x"))
            prompts = [prompt(length) for _ in range(batch)]
            seconds, raw, _ = median(lambda p=prompts: run(p, params(1)))
            say(figure=f"prefill_{shape}", tok_s=round(batch * length / seconds, 1), seconds=round(seconds, 4), raw=raw)

    if "throughput" in what:
        r = random.Random(0)
        prompts = [[r.randint(0, 10000) for _ in range(r.randint(100, 1024))] for _ in range(args.requests)]
        many = [params(r.randint(100, 1024)) for _ in range(args.requests)]
        seconds, raw, num_tokens = median(lambda: run(prompts, many), min(2, args.reps))
        say(
            figure=f"throughput_{args.requests}req_rand",
            out_tok_s=round(num_tokens / seconds, 1),
            seconds=round(seconds, 3),
            out_tokens=num_tokens,
            in_tokens=sum(map(len, prompts)),
            raw=raw,
        )

    for batch in (int(b) for b in args.batches.split(",")) if args.profile else ():
        prompts = [prompt(128) for _ in range(batch)]
        with jax.profiler.trace(os.path.join(args.profile, f"decode_b{batch}")):
            run(prompts, params(33))

    compiles = llm.engine.runner.compiles
    say(figure="done", num_compiles=compiles.count, compile_seconds=round(compiles.seconds, 1))


if __name__ == "__main__":
    main()
