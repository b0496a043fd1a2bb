"""Rows times a weight in FP8 with a scale for each block, the format of Qwen's FP8 checkpoints."""

import jax
import jax.numpy as jnp

from qjax.kernels.dispatch import dispatch
from qjax.kernels.fp8_matmul.reference import fp8_matmul_ref

__all__ = ["fp8_matmul"]


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
