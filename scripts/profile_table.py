"""How a decode step's time divides: prints one table a profile that `bench_offline.py --profile FOLDER` wrote.

    python scripts/profile_table.py FOLDER [--rows 20] [--model Qwen3-8B --out FILE.jsonl]

A step is what lies between two launches of the sampler. Kernels are timed without CUDA graphs (XLA switches them off
under the profiler), so their durations hold and the gaps between them do not.
"""

import argparse
import collections
import itertools
import re
import statistics
import sys
from pathlib import Path

import jax

sys.path.append(str(Path(__file__).resolve().parent.parent))

from scripts.bench_common import setting, writer

PROMPT, STEPS = 128, 32  # of the requests that bench_offline profiles
# The first pattern found in a kernel's name says what it does; what none finds is "other" (mostly XLA's fusions).
KINDS = {
    "attention": r"paged_(decode|prefill)",
    "norms": r"add_rms_norm",
    "rotary embedding, KV write": r"norm_rope_write|kv_write",
    "products": r"matmul|gemm|nvjet|cutlass|cublas|splitK|xmma",
}


def kernels(folder: Path) -> list[tuple[float, float, str]]:
    """(start in ns, duration in ns, name) of the GPU's kernels in the order they ran."""
    found = []
    for file in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    found += [(event.start_ns, event.duration_ns, event.name) for event in line.events]
    return sorted(found)


def steps(events: list[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """The kernels of each decode step: those between two runs of the least frequent kernel that runs in every step."""
    counts = collections.Counter(name for _, _, name in events)
    layers = counts[max((n for n in counts if "paged_decode" in n), key=counts.get, default=events[0][2])]
    once = [name for name, count in counts.items() if 16 <= count <= layers // 8]
    last = [name for _, _, name in events if name in once][-1]
    ends = [i for i, (_, _, name) in enumerate(events) if name == last]
    return [events[a + 1 : b + 1] for a, b in itertools.pairwise(ends)]


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def kinds_ms(times_us: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each kind, from microseconds of each kernel; the largest first, "other" last."""
    total: collections.Counter = collections.Counter()
    for name, us in times_us.items():
        total[kind_of(name)] += us / 1e3
    return {kind: round(ms, 4) for kind, ms in sorted(total.items(), key=lambda x: (x[0] == "other", -x[1]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--model", default="", help="its name, for the lines of --out")
    parser.add_argument("--out", default="", help="append a JSON line for each profile to this file")
    args = parser.parse_args()
    if args.out and not args.model:
        parser.error("--out needs --model")
    for folder in sorted(path for path in args.folder.iterdir() if path.is_dir()):
        found = steps(kernels(folder))
        size = statistics.mode(len(step) for step in found)
        found = [step for step in found if len(step) == size]  # the same compiled step
        times, counts = collections.Counter(), collections.Counter()
        for step in found:
            for _, duration, name in step:
                times[name] += duration / len(found) / 1e3
                counts[name] += 1
        total = sum(times.values())
        print(f"{folder.name}: {len(found)} steps of {size} kernels, {total / 1e3:.3f} ms in kernels")
        kinds = kinds_ms(times)
        print("  " + ", ".join(f"{kind} {ms:.3f}" for kind, ms in kinds.items()) + " ms")
        if args.out:
            batch, context = int(folder.name.removeprefix("decode_b")), PROMPT + STEPS // 2
            say = writer({"engine": "qjax", "model": args.model, "dtype": "bf16", **setting()}, args.out)
            figure = {"figure": f"step_b{batch}_ctx{context}", "batch": batch, "context": context}
            say(**figure, num_kernels=size, ms_in_kernels=round(total / 1e3, 4), kinds_ms=kinds)
        for name, us in times.most_common(args.rows):
            number = counts[name] / len(found)
            print(f"  {us:9.1f} us {100 * us / total:5.1f} %  {number:5.1f} x {us / number:8.2f} us  {name[:90]}")


if __name__ == "__main__":
    main()
