"""Measures a returning conversation's time to first token: computed again, copied from the host, found on the device.

    python scripts/bench_kv_offload.py --model FOLDER --tokenizer FOLDER [--load-format dummy] [--lengths 2048,8192]

One JSON line per figure, in the form of bench_offline.py. A conversation is token ids of its own in each repetition and
returns with --turn tokens more. Each figure is run once to warm up, then --reps times; the median counts.
"""

import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from scripts.bench_common import DTYPES, dtype_of, setting, writer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True, help="any tokenizer folder: it is loaded, not used")
    parser.add_argument("--load-format", default="dummy", help="dummy: the model folder needs only config.json")
    parser.add_argument("--lengths", default="2048,8192,32768", help="tokens of the conversation")
    parser.add_argument("--turn", type=int, default=32, help="tokens that it returns with")
    parser.add_argument("--kv-offloading-size", type=float, default=12, help="GiB")
    parser.add_argument("--kv-cache-memory-bytes", default=None)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--tp", type=int, default=1, help="tensor_parallel_size")
    parser.add_argument("--eager", action="store_true", help="enforce_eager: all is compiled in the warm-up")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--out", default="", help="append the JSON lines to this file")
    return parser.parse_args()


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rng = random.Random(0)
        import jax

        import qjax
        from qjax import LLM, SamplingParams

        self.lengths = [int(n) for n in args.lengths.split(",")]
        started = time.perf_counter()
        self.llm = LLM(
            args.model,
            tokenizer=args.tokenizer,
            load_format=args.load_format,
            max_model_len=max(self.lengths) + 2 * args.turn + 2,
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            kv_cache_dtype=args.kv_cache_dtype,
            kv_offloading_size=args.kv_offloading_size,
            tensor_parallel_size=args.tp,
            enforce_eager=args.eager,
            generation_config="vllm",
            override_generation_config={"temperature": 0.0},
        )
        seconds = time.perf_counter() - started
        self.params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1, detokenize=False)
        self.host = self.llm.engine.pool.host
        self.plan = plan = self.llm.engine.plan
        self.say = writer(
            {
                "engine": "qjax",
                "version": qjax.__version__,
                "jax": jax.__version__,
                "model": os.path.basename(os.path.normpath(args.model)),
                "dtype": dtype_of(Path(args.model), plan.dtype),
                "kv": "fp8" if plan.kv_dtype == "uint8" else DTYPES[plan.kv_dtype],
                "tp": args.tp,
                "eager": args.eager,
                **setting(),
                "device": jax.devices()[0].device_kind,
            },
            args.out,
        )
        sizes = {"kv_tokens": plan.kv_capacity_tokens, "host_pages": plan.num_host_pages}
        self.say(figure="startup", seconds=round(seconds, 2), page_bytes=plan.host_page_bytes, **sizes)

    def prompt(self, num_tokens: int) -> list[int]:
        return [self.rng.randrange(0, min(10000, self.llm.engine.model_config.vocab_size)) for _ in range(num_tokens)]

    def first_token(self, prompt: list[int]) -> tuple[float, int, int]:
        """Seconds, the prompt's tokens that were cached, and the token."""
        start = time.perf_counter()
        [output] = self.llm.generate([prompt], self.params, use_tqdm=False)
        return time.perf_counter() - start, output.num_cached_tokens, output.outputs[0].token_ids[0]

    def leave(self) -> float:
        """The device forgets; what was not copied out yet is, before the next step. Seconds until the host has it."""
        import jax

        start = time.perf_counter()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("a request runs")
        self.first_token(self.prompt(8))
        jax.block_until_ready(list(self.host._pages.values()))
        return time.perf_counter() - start

    def returning(self, length: int) -> dict[str, tuple[float, int, int]]:
        """Of one conversation: how it is computed, found on the device, and copied from the host."""
        conversation = self.prompt(length)
        computed = self.first_token(conversation + self.prompt(self.args.turn))
        returned = conversation + self.prompt(self.args.turn)
        on_device = self.first_token(returned)
        self.leave()
        from_host = self.first_token(returned)
        return {"computed": computed, "on_device": on_device, "from_host": from_host}

    def all(self) -> None:
        page = self.plan.page_size
        for length in self.lengths:
            runs = [self.returning(length) for _ in range(self.args.reps + 1)][1:]
            ms = {}
            for kind in ("computed", "on_device", "from_host"):
                times = sorted(run[kind][0] * 1e3 for run in runs)
                ms[kind] = statistics.median(times)
                self.say(
                    figure=f"returning_{length}_{kind}",
                    ms=round(ms[kind], 2),
                    cached_tokens=runs[0][kind][1],
                    raw=[round(t, 2) for t in times],
                )
            copied = runs[0]["from_host"][1] // page * self.plan.host_page_bytes
            more_ms = ms["from_host"] - ms["on_device"]
            self.say(
                figure=f"returning_{length}",
                times_as_fast=round(ms["computed"] / ms["from_host"], 2),
                same_token=f"{sum(run['on_device'][2] == run['from_host'][2] for run in runs)}/{len(runs)}",
                copied_mb=round(copied / 1e6, 1),
                copied_gb_s=round(copied / 1e6 / more_ms, 2) if more_ms > 0.1 else None,
                computed_tok_s=round(length / ms["computed"] * 1e3),
            )
        self.copying_out()
        compiles = self.llm.engine.runner.compiles
        self.say(figure="done", num_compiles=compiles.count, compile_seconds=round(compiles.seconds, 1))

    def copying_out(self) -> None:
        """What the copies out cost: the same prompts with and without them, and the host's time for starting them."""
        runner, length = self.llm.engine.runner, self.lengths[-1]
        start_copies, spent = runner.copy_out, [0.0, 0]

        def timed() -> None:
            start, before = time.perf_counter(), self.host.num_stored
            start_copies()
            spent[0] += time.perf_counter() - start
            spent[1] += self.host.num_stored - before

        figures = {}
        for kind, copy_out in (("with", timed), ("without", lambda: None)):
            runner.copy_out = copy_out
            times = [self.first_token(self.prompt(length))[0] * 1e3 for _ in range(self.args.reps)]
            figures[f"ms_{kind}"] = round(statistics.median(times), 2)
        runner.copy_out = start_copies
        self.say(
            figure=f"copying_out_{length}", **figures, host_us_per_page=round(spent[0] / max(spent[1], 1) * 1e6, 1)
        )


if __name__ == "__main__":
    Bench(arguments()).all()
