"""int4 weights of AWQ and GPTQ checkpoints, repacked at load as `kernels.int4_matmul` reads them. numpy.

Both formats say (q - zero) * scale, with a scale and a zero point for each output of 128 inputs.
"""

from collections.abc import Sequence

import numpy as np

from qjax.kernels.int4_matmul import CELL_OUTPUTS, CELL_WORDS, GROUP, pack_scales, pack_weights

# AutoAWQ's GEMM packing: nibble i of a word, from the lowest, is column AWQ_ORDER[i] of its eight. GPTQ's are in order.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUPS_AT_ONCE = 8  # repacked: what they are on the way, a byte a weight and more, stays in the cache


def repack_weights(qweight: np.ndarray, method: str) -> np.ndarray:
    """int32 [D, N / 8] of AWQ, eight outputs in a word, or [D / 8, N] of GPTQ, eight inputs → `pack_weights`'s."""
    rows_of_group = GROUP if method == "awq" else GROUP // 8
    groups, N = qweight.shape[0] // rows_of_group, qweight.shape[1] * (8 if method == "awq" else 1)
    out = np.empty((groups, N // CELL_OUTPUTS, CELL_WORDS), np.int32)
    for first in range(0, groups, GROUPS_AT_ONCE):
        last = min(first + GROUPS_AT_ONCE, groups)
        rows = qweight[first * rows_of_group : last * rows_of_group]
        out[first:last] = pack_weights(_unpack_columns(rows, AWQ_ORDER) if method == "awq" else _unpack_rows(rows))
    return out


def repack_scales(qzeros: np.ndarray, scales: np.ndarray, method: str) -> np.ndarray:
    """qzeros int32 [D / 128, N / 8], scales [D / 128, N] → `pack_scales`'s. GPTQ stores its zero points less 1."""
    if method == "awq":
        return pack_scales(scales, _unpack_columns(qzeros, AWQ_ORDER))
    return pack_scales(scales, _unpack_columns(qzeros, range(8)) + np.uint8(1))


def pack_awq(q: np.ndarray) -> np.ndarray:
    """uint8 [R, 8 n] in 0..15 → int32 [R, n] in AWQ's order: a `qweight` of [D, N], or `qzeros` of [D / 128, N]."""
    words = np.zeros((q.shape[0], q.shape[1] // 8), np.uint32)
    for i, column in enumerate(AWQ_ORDER):
        words |= q[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


def is_in_order(g_idx: np.ndarray) -> bool:
    """Whether GPTQ's groups are 128 inputs that follow each other: without desc_act they are."""
    return np.array_equal(g_idx, np.arange(g_idx.size) // GROUP)


def _unpack_columns(words: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """int32 [R, n] → uint8 [R, 8 n] in 0..15."""
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    out = np.empty((*words.shape, 8), np.uint8)
    for i in range(4):
        np.bitwise_and(pairs[..., i], 15, out=out[..., order[2 * i]])
        np.right_shift(pairs[..., i], 4, out=out[..., order[2 * i + 1]])
    return out.reshape(words.shape[0], -1)


def _unpack_rows(words: np.ndarray) -> np.ndarray:
    """int32 [r, N] → uint8 [8 r, N] in 0..15."""
    out = np.empty((words.shape[0], 8, words.shape[1]), np.uint8)
    for i in range(8):
        np.bitwise_and(words >> (4 * i), 15, out=out[:, i], casting="unsafe")
    return out.reshape(-1, words.shape[1])
