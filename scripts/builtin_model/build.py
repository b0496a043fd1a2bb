"""Makes the training data of the built-in model, a pure function of the seed.

python -m scripts.builtin_model.build              # build/builtin_model/packed: what travels, and statistics
python -m scripts.builtin_model.build --tokenizer  # trains the tokenizer anew first (model/tokenizer.json)
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from scripts.builtin_model import dataset, mixture, render, tokenizer

ROOT = Path(__file__).parents[2]
SEED = 20261123
NUM_DOCUMENTS = 860_000
NUM_VALID = 4_000
NUM_SHARDS = 24
TOKENIZER_SEED = 7
NUM_TOKENIZER_DOCUMENTS = 40_000


def tokenizer_texts() -> Iterator[str]:
    for i in range(NUM_TOKENIZER_DOCUMENTS):
        yield from (piece.text for piece in render.pieces(mixture.make(TOKENIZER_SEED, i)))


def _shard(job: tuple[str, int, range, str, str]) -> tuple[Counter[str], int]:
    name, seed, indices, split, folder = job
    arrays, counts = dataset.encode(seed, indices, split)  # type: ignore[arg-type]
    (Path(folder) / name).write_bytes(dataset.pack(arrays))
    counts["targets"] = int(arrays.loss_mask.sum())
    return counts, int(arrays.lengths.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "builtin_model" / "packed")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--documents", type=int, default=NUM_DOCUMENTS)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tokenizer", action="store_true", help="train the tokenizer anew")
    args = parser.parse_args()
    start = time.perf_counter()
    if args.tokenizer:
        tokenizer.save(tokenizer.train(tokenizer_texts()), tokenizer.FILE.parent)
        print(f"tokenizer: {time.perf_counter() - start:.0f} s", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    args.out.mkdir(parents=True, exist_ok=True)
    size = -(-args.documents // NUM_SHARDS)
    jobs = []
    for i in range(NUM_SHARDS):
        indices = range(i * size, min((i + 1) * size, args.documents))
        jobs.append((f"train_{i:02}.xz", args.seed, indices, "train", str(args.out)))
    jobs.append(("valid_00.xz", args.seed, range(NUM_VALID), "test", str(args.out)))
    total: Counter[str] = Counter()
    longest = 0
    with ProcessPoolExecutor(args.workers) as pool:
        for (name, *_), (counts, length) in zip(jobs, pool.map(_shard, jobs), strict=True):
            if name.startswith("train"):
                total.update(counts)
                longest = max(longest, length)
                print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    _report(args.out, total, longest, time.perf_counter() - start)


def _report(out: Path, total: Counter[str], longest: int, seconds: float) -> None:
    skills = {name: {"documents": total["#" + name], "tokens": total[name]} for name in mixture.NAMES}
    tokens = sum(s["tokens"] for s in skills.values())
    summary = {
        "documents": sum(s["documents"] for s in skills.values()),
        "tokens": tokens,
        "targets": total["targets"],
        "longest": longest,
        "packed_bytes": sum(f.stat().st_size for f in out.glob("*.xz")),
        "skills": skills,
    }
    (out / "statistics.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for name, s in skills.items():
        average = s["tokens"] / max(s["documents"], 1)
        print(f"{name:18} {s['documents']:8} documents {s['tokens']:10} tokens, {average:5.0f} each")
    print({k: v for k, v in summary.items() if k != "skills"}, f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
