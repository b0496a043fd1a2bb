"""Rows times a weight in FP8 with a scale for each block, the format of Qwen's FP8 checkpoints."""

import jax
import jax.numpy as jnp

from qjax.kernels.dispatch import dispatch
from qjax.kernels.fp8_matmul.reference import fp8_matmul_ref, grouped_fp8_matmul_ref

__all__ = ["fp8_matmul", "grouped_fp8_matmul"]


def fp8_matmul(x: jax.Array, w: jax.Array, scale: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """x times the transpose of w * scale, in parts [P, M, N] that add up to it: one in x's dtype, or float32 ones.

    The kernel rounds x to e4m3 too, with a scale for each row and block of D, as checkpoints of `activation_scheme`
    dynamic are made for; without it x keeps its dtype.

    x      [M, D]
    w      [N, D]                 float8_e4m3fn
    scale  [N / rows, D / columns]  float32, of blocks of w; 128 x 128 in the checkpoints
    """
    N, D = w.shape
    if x.shape[1] != D or w.dtype != jnp.float8_e4m3fn or N % scale.shape[0] or D % scale.shape[1]:
        raise ValueError(f"fp8_matmul: x {x.shape}, w {w.shape} {w.dtype} and scale {scale.shape} do not fit")

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.fp8_matmul.mosaic_gpu import fp8_matmul_mosaic

        return fp8_matmul_mosaic(x, w, scale, interpret=interpret)

    return dispatch(implementation, lambda: fp8_matmul_ref(x, w, scale), mosaic)


def grouped_fp8_matmul(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    work: jax.Array,
    *,
    is_gated: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """`fp8_matmul` of tiles of rows, each with its expert's weight: [R, N] in x's dtype.

    Rows past the last tile hold anything. The kernel rounds x to e4m3 as `fp8_matmul`'s does.

    x      [R, D]         sorted by expert, each expert's rows padded to tiles: `grouped_matmul.Groups`
    w      [E, N, D]      float8_e4m3fn; or, `is_gated`, [E, 2, N, D]: the result is silu(x w[:, 0]^T) * (x w[:, 1]^T)
    scale  w's shape, with N / rows and D / columns of a block for N and D; float32
    work   int32 [1 + W]  number of tiles, then the expert of each; a tile has R / W rows
    """
    fits = w.ndim == scale.ndim == 3 + is_gated and w.shape[:-2] == scale.shape[:-2] and x.shape[1] == w.shape[-1]
    is_whole = not any(size % blocks for size, blocks in zip(w.shape, scale.shape, strict=False))
    if not (fits and is_whole and w.dtype == jnp.float8_e4m3fn) or x.shape[0] % (work.shape[0] - 1):
        raise ValueError(
            f"grouped_fp8_matmul: x {x.shape}, w {w.shape} {w.dtype}, scale {scale.shape} and work {work.shape} do not "
            "fit"
        )

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.fp8_matmul.grouped_mosaic_gpu import grouped_fp8_matmul_mosaic

        return grouped_fp8_matmul_mosaic(x, w, scale, work, is_gated=is_gated, interpret=interpret)

    return dispatch(implementation, lambda: grouped_fp8_matmul_ref(x, w, scale, work, is_gated=is_gated), mosaic)
