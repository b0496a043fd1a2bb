"""A few rows times a weight matrix, where reading the weights is what takes the time."""

import jax

from qjax.kernels.dispatch import dispatch
from qjax.kernels.small_matmul.reference import small_matmul_ref

__all__ = ["small_matmul"]


def small_matmul(x: jax.Array, w: jax.Array, *, is_gated: bool = False, implementation: str | None = None) -> jax.Array:
    """x times w in parts [P, M, N] that add up to it: one part in x's dtype, or several in float32.

    x  [M, D]
    w  [D, N]; or, `is_gated`, [D, 2 N]: the result is silu(x times the first half) * (x times the second), one part
    """
    if x.shape[1] != w.shape[0]:
        raise ValueError(f"small_matmul: x {x.shape} does not fit w {w.shape}")

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.small_matmul.mosaic_gpu import small_matmul_mosaic

        return small_matmul_mosaic(x, w, is_gated=is_gated, interpret=interpret)

    return dispatch(implementation, lambda: small_matmul_ref(x, w, is_gated=is_gated), mosaic)
