"""A few rows times a weight matrix of 4 bits a number, with a scale and a zero point for 128 inputs of an output."""

import jax

from qjax.kernels.dispatch import dispatch
from qjax.kernels.int4_matmul.packing import CELL_OUTPUTS, CELL_WORDS, GROUP, pack_scales, pack_weights
from qjax.kernels.int4_matmul.reference import (
    dequantize,
    grouped_int4_matmul_ref,
    int4_matmul_ref,
    quantize,
    quantize_packed,
)

__all__ = [
    "CELL_OUTPUTS",
    "CELL_WORDS",
    "GROUP",
    "dequantize",
    "grouped_int4_matmul",
    "int4_matmul",
    "pack_scales",
    "pack_weights",
    "quantize",
    "quantize_packed",
]


def int4_matmul(
    x: jax.Array, words: jax.Array, scales_zeros: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """x times (q - zero) * scale in parts [P, M, N] that add up to it: one part in x's dtype, or several in float32.

    The kernel multiplies by q - zero, exactly, and then by the scale in float32, so it does not round the weights; the
    reference, which XLA runs for many rows, rounds them to x's dtype.

    x             [M, D]
    words         int32 [D / 128, N / 64, 1024], of `pack_weights`
    scales_zeros  int32 [D / 128, N], of `pack_scales`
    """
    groups, cells, size = words.shape
    if (x.shape[1], size, scales_zeros.shape) != (groups * GROUP, CELL_WORDS, (groups, cells * CELL_OUTPUTS)):
        raise ValueError(f"int4_matmul: x {x.shape} does not fit {words.shape} with scales {scales_zeros.shape}")

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.int4_matmul.mosaic_gpu import int4_matmul_mosaic

        return int4_matmul_mosaic(x, words, scales_zeros, interpret=interpret)

    return dispatch(implementation, lambda: int4_matmul_ref(x, words, scales_zeros), mosaic)


def grouped_int4_matmul(
    x: jax.Array,
    words: jax.Array,
    scales_zeros: jax.Array,
    work: jax.Array,
    *,
    is_gated: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """`int4_matmul` of tiles of rows, each with its expert's weight: [R, N] in x's dtype.

    Rows past the last tile hold anything.

    x             [R, D], sorted by expert, each expert's rows padded to tiles: `grouped_matmul.Groups`
    words         int32 [E, D / 128, N / 64, 1024]; or, `is_gated`, [E, D / 128, 2, N / 64, 1024]: the result is
                  silu(x times the first) * (x times the second)
    scales_zeros  int32 [E, D / 128, N], or [E, D / 128, 2, N]
    work          int32 [1 + W], number of tiles, then the expert of each; a tile has R / W rows
    """
    E, groups = words.shape[:2]
    outputs = (*words.shape[2:-2], words.shape[-2] * CELL_OUTPUTS)
    fits = x.shape[1] == groups * GROUP and words.shape[-1] == CELL_WORDS and len(outputs) == 1 + is_gated
    if not fits or scales_zeros.shape != (E, groups, *outputs) or x.shape[0] % (work.shape[0] - 1):
        raise ValueError(
            f"grouped_int4_matmul: x {x.shape}, words {words.shape}, scales {scales_zeros.shape} and work {work.shape} "
            "do not fit"
        )

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.int4_matmul.grouped_mosaic_gpu import grouped_int4_matmul_mosaic

        return grouped_int4_matmul_mosaic(x, words, scales_zeros, work, is_gated=is_gated, interpret=interpret)

    reference = lambda: grouped_int4_matmul_ref(x, words, scales_zeros, work, is_gated=is_gated)
    return dispatch(implementation, reference, mosaic)
