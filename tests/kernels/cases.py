"""Cases for the kernels' tests and for `scripts/check_kernels.py`: poisoned inputs, a float64 oracle, tolerances.

Every slot that holds no token of the case is NaN, the null page and the other layer included; pages are assigned by a
random permutation.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

NUM_LAYERS, LAYER = 2, 1
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
E4M3 = ml_dtypes.float8_e4m3fn
# Largest |out - oracle| and ||out - oracle|| / ||oracle||; the oracle sees the inputs as rounded to the dtype.
TOLERANCES = {"float32": (1e-5, 3e-6), "float16": (4e-3, 1e-3), "bfloat16": (3e-2, 6e-3)}

# (query heads, KV heads, head dim) on one device of each model, tensor parallel over 1, 2, 4 and 8.
MODEL_HEADS = {
    "0.6B, 1.7B": (16, 8, 128),
    "4B, 8B": (32, 8, 128),
    "14B": (40, 8, 128),
    "32B": (64, 8, 128),
    "30B-A3B": (32, 4, 128),
    "2.5-0.5B": (14, 2, 64),
}
HEADS = sorted(
    {(n // tp, max(k // tp, 1), h) for n, k, h in MODEL_HEADS.values() for tp in (1, 2, 4, 8) if n % tp == 0}
)


@dataclass(frozen=True)
class Case:
    context_lens: tuple[int, ...]
    chunk_lens: tuple[int, ...] | None = None  # None: decode
    heads: tuple[int, int, int] = (4, 2, 64)
    page_size: int = 16
    dtype: str = "bfloat16"
    is_narrow: bool = False  # the cache is e4m3, with scales
    extra_width: int = 2  # columns of the page table past the longest context
    extra_rows: int = 0  # rows of the step past the last chunk
    seed: int = 0

    @property
    def name(self) -> str:
        lens = "+".join(map(str, self.context_lens[:6])) + ("..." if len(self.context_lens) > 6 else "")
        chunks = "" if self.chunk_lens is None else " chunks " + "+".join(map(str, self.chunk_lens[:6]))
        n, k, h = self.heads
        dtype = self.dtype + " e4m3" * self.is_narrow
        return f"{lens}{chunks} heads {n}/{k}x{h} page {self.page_size} {dtype} seed {self.seed}"


def make(case: Case) -> dict[str, np.ndarray]:
    """Arguments of `paged_decode` or `paged_prefill` as numpy arrays."""
    rng = np.random.default_rng(case.seed)
    N, K, H = case.heads
    S, dtype = case.page_size, DTYPES[case.dtype]
    pages_needed = [-(-length // S) for length in case.context_lens]
    W = max(pages_needed) + case.extra_width
    num_pages = sum(pages_needed) + 3
    free = list(rng.permutation(num_pages - 1) + 1)
    page_table = np.zeros((len(case.context_lens), W), np.int32)
    kv = np.full((NUM_LAYERS, 2, num_pages, K, S, H), np.nan, E4M3 if case.is_narrow else dtype)
    for row, (length, needed) in enumerate(zip(case.context_lens, pages_needed, strict=True)):
        for i in range(needed):
            page_table[row, i] = page = free.pop()
            used = min(S, length - i * S)
            kv[LAYER, :, page, :, :used] = rng.standard_normal((2, K, used, H))
    args = {
        "kv": kv.view(np.uint8) if case.is_narrow else kv,
        "page_table": page_table,
        "context_lens": np.array(case.context_lens, np.int32),
    }
    if case.is_narrow:
        args["scales"] = rng.uniform(0.5, 2, (2, K)).astype(np.float32)
    num_rows = len(case.context_lens)
    if case.chunk_lens is not None:
        args["query_starts"] = np.concatenate([[0], np.cumsum(case.chunk_lens)]).astype(np.int32)
        num_rows = sum(case.chunk_lens) + case.extra_rows
    args["q"] = (2 * rng.standard_normal((num_rows, N, H))).astype(dtype)
    return args


def oracle(args: dict[str, np.ndarray], scale: float | None = None) -> np.ndarray:
    """Dumb attention in float64: row by row, token by token."""
    q, kv, table = args["q"].astype(np.float64), args["kv"], args["page_table"]
    kv = kv.view(E4M3) if kv.dtype == np.uint8 else kv
    K, S, H = kv.shape[3:]
    scale = H**-0.5 if scale is None else scale
    scales = args.get("scales", np.ones((2, K)))
    out = np.zeros(q.shape)
    group = q.shape[1] // K
    for i, context in enumerate(args["context_lens"]):
        if context == 0:
            continue
        tokens = np.arange(context)
        kept = (kv[LAYER, j][table[i, tokens // S], :, tokens % S].astype(np.float64) for j in (0, 1))  # [C, K, H]
        k, v = (rows * scale[:, None] for rows, scale in zip(kept, scales, strict=True))
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # [C, N, H]
        start, end = (args["query_starts"][i : i + 2]) if "query_starts" in args else (i, i + 1)
        for row in range(start, end):
            seen = context - (end - start) + (row - start) + 1
            scores = np.einsum("NH,CNH->NC", q[row], k[:seen]) * scale
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row] = np.einsum("NC,CNH->NH", p / p.sum(axis=1, keepdims=True), v[:seen])
    return out


def errors(out: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    difference = np.asarray(out).astype(np.float64) - expected
    return float(np.abs(difference).max()), float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30))


def is_close(out: np.ndarray, expected: np.ndarray, dtype: str) -> bool:
    """False for NaN too."""
    worst, relative = errors(out, expected)
    return worst <= TOLERANCES[dtype][0] and relative <= TOLERANCES[dtype][1]


def edge_lengths(page_size: int, most: int) -> tuple[int, ...]:
    return (1, page_size - 1, page_size, page_size + 1, 0, most)


def narrow(cases: list[Case]) -> list[Case]:
    """The same over an e4m3 cache, whose queries are float16."""
    return [replace(case, dtype="float16", is_narrow=True) for case in cases]


def decode_cases(most: int) -> list[Case]:
    by_heads = [Case(edge_lengths(16, most), heads=heads, seed=i) for i, heads in enumerate(HEADS)]
    by_page = [
        Case(edge_lengths(size, most), heads=(8, 2, dim), page_size=size, seed=size)
        for size in (16, 32, 64, 128)
        for dim in (64, 128)
    ]
    return by_heads + by_page + [Case(edge_lengths(16, most), dtype="float16", extra_width=0)]


def prefill_cases(most: int) -> list[Case]:
    """Chunks at odd rows, whole prompts, later chunks, an empty chunk, rows past the last chunk."""
    contexts, chunks = (1, 15, 16, 17, 0, most, most // 2 + 3), (1, 15, 7, 17, 0, most // 3, most // 2 + 3)
    shape = {"chunk_lens": chunks, "extra_rows": 9}
    by_heads = [Case(contexts, heads=heads, seed=i, **shape) for i, heads in enumerate(HEADS)]
    by_page = [
        Case(contexts, heads=(8, 2, dim), page_size=size, seed=size, **shape)
        for size in (16, 32, 64, 128)
        for dim in (64, 128)
    ]
    aligned = Case((256, 300), chunk_lens=(256, 128), heads=(4, 2, 128), page_size=64, extra_rows=128)
    # Few rows late in a prompt: the block's second warpgroup has none, at positions past the context.
    few_late = Case((120, 200, 301), chunk_lens=(20, 1, 3), page_size=64, extra_width=0)
    return [*by_heads, *by_page, aligned, few_late, Case(contexts, dtype="float16", extra_width=0, **shape)]
