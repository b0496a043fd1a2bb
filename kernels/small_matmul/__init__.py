"""A few rows times a weight matrix, where reading the weights is what takes the time."""

from typing import Any

import jax

from qjax.kernels.dispatch import dispatch
from qjax.kernels.small_matmul.reference import small_matmul_ref

__all__ = ["small_matmul"]


def small_matmul(
    x: jax.Array,
    w: jax.Array,
    *,
    transpose_w: bool = False,
    out_dtype: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """x times w, summed in float32: [M, N].

    x          [M, D]
    w          [D, N], or [N, D] with `transpose_w`
    out_dtype  what the sum is rounded to, x's dtype by default
    """
    if x.shape[1] != w.shape[1 if transpose_w else 0]:
        raise ValueError(f"small_matmul: x {x.shape} does not fit w {w.shape}, transpose_w={transpose_w}")
    out_dtype = out_dtype or x.dtype

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.small_matmul.mosaic_gpu import small_matmul_mosaic

        return small_matmul_mosaic(x, w, transpose_w=transpose_w, out_dtype=out_dtype, interpret=interpret)

    return dispatch(
        implementation, lambda: small_matmul_ref(x, w, transpose_w=transpose_w, out_dtype=out_dtype), mosaic
    )
