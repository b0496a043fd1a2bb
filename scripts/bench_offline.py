"""Measures the engine offline: one JSON line per figure, in the form, and of the requests, of the peer's bench script.

    python scripts/bench_offline.py --model FOLDER --tokenizer FOLDER [--what latency,decode,prefill,throughput]
    python scripts/bench_offline.py --model FOLDER --tokenizer FOLDER --what none --long 8x32768

The model folder needs only config.json: weights are random, prompts are token ids (the same every run), prefix
caching is off. Each figure is run once to warm up (which also compiles), then --reps times; the median counts.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from scripts.bench_common import DTYPES, dtype_of, random_requests, setting, writer

SAMPLING = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}  # Qwen3's own values
LONG_STEPS = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True, help="any tokenizer folder: it is loaded, not used")
    parser.add_argument(
        "--what",
        default="latency,decode,sampled,prefill,throughput,sampled_throughput,burst",
        help="sampled: with temperature 0.6, top_k 20, top_p 0.95; none: only --long",
    )
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--kv-cache-memory-bytes", default=None)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tp", type=int, default=1, help="tensor_parallel_size")
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--sampled-batches", default="32", help="batches of the figure 'sampled'")
    parser.add_argument("--prefill", default="1x2048,16x2048,8x512,32x512")
    parser.add_argument(
        "--long", default="", metavar="BxN,...", help="also steady decode of B sequences with N tokens of context each"
    )
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--out-len", type=int, default=257, help="tokens of each answer in the decode figures")
    parser.add_argument("--num-scheduler-steps", type=int, help="[as the engine chooses]")
    parser.add_argument("--enforce-eager", action="store_true", help="compile at first use, in each figure's warm-up")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--out", default="", help="append the JSON lines to this file")
    parser.add_argument("--profile", default="", help="folder for a profile of each decode batch, after all figures")
    return parser.parse_args()


def shapes(text: str) -> list[tuple[int, int]]:
    """ "8x512,32x512" as [(8, 512), (32, 512)]."""
    return [tuple(int(x) for x in shape.split("x")) for shape in text.split(",") if shape]


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rng = random.Random(0)
        started = time.perf_counter()
        import jax

        import qjax
        from qjax import LLM

        import_seconds = time.perf_counter() - started
        longest = [length + self.long_out(batch, length) + 7 for batch, length in shapes(args.long)]
        started = time.perf_counter()
        self.llm = LLM(
            args.model,
            tokenizer=args.tokenizer,
            load_format="dummy",
            dtype=args.dtype,
            max_model_len=max([args.max_model_len, *longest]),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            kv_cache_dtype=args.kv_cache_dtype,
            tensor_parallel_size=args.tp,
            enable_prefix_caching=False,
            enforce_eager=args.enforce_eager,
            num_scheduler_steps=args.num_scheduler_steps,
            generation_config="vllm",
            override_generation_config={"temperature": 0.0},  # what is compiled ahead: most figures are greedy
        )
        seconds = time.perf_counter() - started
        plan = self.llm.engine.plan
        common = {
            "engine": "qjax",
            "version": qjax.__version__,
            "jax": jax.__version__,
            "model": os.path.basename(os.path.normpath(args.model)),
            "dtype": dtype_of(Path(args.model), plan.dtype),
            "kv": "fp8" if plan.kv_dtype == "uint8" else DTYPES[plan.kv_dtype],
            "tp": args.tp,
            "eager": args.enforce_eager,
            "num_scheduler_steps": plan.num_scheduler_steps,
            **setting(),
            "device": jax.devices()[0].device_kind,
        }
        self.say = writer(common, args.out)
        self.say(
            figure="startup",
            seconds=round(seconds, 2),
            import_seconds=round(import_seconds, 2),
            kv_tokens=plan.kv_capacity_tokens,
        )

    def long_out(self, batch: int, length: int) -> int:
        """Tokens of an answer: LONG_STEPS steps of all, after those in which the others' prompts ran."""
        return LONG_STEPS + 1 + batch * length // (self.args.max_num_batched_tokens or 8192)

    def prompt(self, num_tokens: int) -> list[int]:
        return [self.rng.randrange(0, 10000) for _ in range(num_tokens)]

    def params(self, num_tokens: int, sampling: dict | None = None):
        from qjax import SamplingParams

        sampling = sampling or {"temperature": 0.0}
        return SamplingParams(ignore_eos=True, max_tokens=num_tokens, detokenize=False, **sampling)

    def run(self, prompts: list[list[int]], params) -> tuple[float, int]:
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, sum(len(o.outputs[0].token_ids) for o in outputs)

    def median(self, prompts, params, reps: int | None = None) -> tuple[float, list[float], int]:
        self.run(prompts, params)
        results = [self.run(prompts, params) for _ in range(reps or self.args.reps)]
        times = sorted(seconds for seconds, _ in results)
        return statistics.median(times), [round(t, 4) for t in times], results[0][1]

    def latency(self) -> None:
        one = [self.prompt(128)]
        first, raw_first, _ = self.median(one, self.params(1), 5)
        total, raw, _ = self.median(one, self.params(128))
        self.say(figure="ttft_b1_in128", ms=round(first * 1e3, 3), raw=raw_first)
        self.say(
            figure="decode_b1_in128_out128",
            ms_per_token=round((total - first) / 127 * 1e3, 4),
            tok_s=round(127 / (total - first), 1),
            total_s=round(total, 4),
            raw=raw,
        )

    def decode(self, batches: str, sampling: dict | None = None) -> None:
        """A steady batch: the time for out_len tokens less the time for one, a step."""
        kind, out_len = "sampled" if sampling else "decode", self.args.out_len
        for batch in (int(b) for b in batches.split(",")):
            if batch > self.args.max_num_seqs:
                continue
            prompts = [self.prompt(128) for _ in range(batch)]
            first, raw_first, _ = self.median(prompts, self.params(1, sampling))
            total, raw, _ = self.median(prompts, self.params(out_len, sampling))
            step = (total - first) / (out_len - 1)
            self.say(
                figure=f"{kind}_b{batch}_in128_out{out_len}",
                ms_per_step=round(step * 1e3, 4),
                tok_s=round(batch / step, 1),
                raw=raw,
                raw_first=raw_first,
                **(sampling or {}),
            )

    def prefill(self) -> None:
        for batch, length in shapes(self.args.prefill):
            prompts = [self.prompt(length) for _ in range(batch)]
            seconds, raw, _ = self.median(prompts, self.params(1))
            rate = round(batch * length / seconds, 1)
            self.say(figure=f"prefill_{batch}x{length}", tok_s=rate, seconds=round(seconds, 4), raw=raw)

    def throughput(self, sampling: dict | None = None) -> None:
        prompts, out_lens = random_requests(self.args.requests)
        many = [self.params(n, sampling) for n in out_lens]
        seconds, raw, num_tokens = self.median(prompts, many, min(2, self.args.reps))
        self.say(
            figure=f"throughput_{self.args.requests}req_rand",
            out_tok_s=round(num_tokens / seconds, 1),
            seconds=round(seconds, 3),
            out_tokens=num_tokens,
            in_tokens=sum(map(len, prompts)),
            sampled=bool(sampling),
            raw=raw,
            **(sampling or {}),
        )

    def burst(self) -> None:
        prompts = [self.prompt(256) for _ in range(512)]
        seconds, raw, num_tokens = self.median(prompts, self.params(128), 2)
        self.say(
            figure="burst_512req_in256_out128",
            out_tok_s=round(num_tokens / seconds, 1),
            req_s=round(512 / seconds, 2),
            seconds=round(seconds, 3),
            raw=raw,
        )

    def long(self) -> None:
        room = self.llm.engine.plan.kv_capacity_tokens
        for batch, length in shapes(self.args.long):
            figure = f"long_b{batch}_ctx{length}"
            if batch * (length + self.long_out(batch, length)) > room or batch > self.args.max_num_seqs:
                self.say(figure=figure, skipped=f"room for {room} tokens, {self.args.max_num_seqs} sequences")
                continue
            runs = [self.steady(batch, length) for _ in range(self.args.reps + 1)][1:]
            step = statistics.median(seconds for seconds, _, _ in runs)
            self.say(
                figure=figure,
                ms_per_step=round(step * 1e3, 4),
                tok_s=round(batch / step, 1),
                steps=runs[0][2],
                raw=sorted(round(seconds * 1e3, 4) for seconds, _, _ in runs),
                prefill_s=round(statistics.median(prefill for _, prefill, _ in runs), 4),
            )

    def steady(self, batch: int, length: int) -> tuple[float, float, int]:
        """Of the steps in which all sequences decode: seconds a step; seconds before them; how many there were."""
        engine, out_len = self.llm.engine, self.long_out(batch, length)
        start = time.perf_counter()
        for i in range(batch):
            engine.add_request(f"long-{i}", self.prompt(length), self.params(out_len))
        have: dict[str, int] = {}
        marks = []
        while engine.has_work:
            for output in engine.step():
                have[output.request_id] = have.get(output.request_id, 0) + len(output.outputs[0].token_ids)
            if len(have) == batch and max(have.values()) < out_len:
                marks.append((time.perf_counter(), sum(have.values())))
        (begin, before), (end, after) = marks[1], marks[-1]
        return (end - begin) * batch / (after - before), begin - start, (after - before) // batch

    def profiles(self) -> None:
        import jax

        for batch in (int(b) for b in self.args.batches.split(",")):
            prompts = [self.prompt(128) for _ in range(batch)]
            with jax.profiler.trace(os.path.join(self.args.profile, f"decode_b{batch}")):
                self.run(prompts, self.params(33))

    def all(self) -> None:
        what = set(self.args.what.split(","))
        self.run([self.prompt(16)], self.params(8))
        if "latency" in what:
            self.latency()
        if "decode" in what:
            self.decode(self.args.batches)
        if "sampled" in what:
            self.decode(self.args.sampled_batches, SAMPLING)
        self.long()
        if "prefill" in what:
            self.prefill()
        if "throughput" in what:
            self.throughput()
        if "sampled_throughput" in what:
            self.throughput(SAMPLING)
        if "burst" in what:
            self.burst()
        if self.args.profile:
            self.profiles()
        compiles = self.llm.engine.runner.compiles
        self.say(figure="done", num_compiles=compiles.count, compile_seconds=round(compiles.seconds, 1))


if __name__ == "__main__":
    Bench(arguments()).all()
