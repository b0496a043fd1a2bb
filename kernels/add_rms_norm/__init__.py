"""The residual stream takes up what a block computed, and is normalised for the next block."""

import jax

from qjax.kernels.add_rms_norm.reference import add_rms_norm_ref
from qjax.kernels.dispatch import dispatch

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: jax.Array, parts: jax.Array, weight: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(y, RMSNorm(y) * weight) with y = x + the sum of the parts, both [T, D] in x's dtype.

    x       [T, D]
    parts   [P, T, D]  in x's dtype or float32; their sum is rounded to x's dtype first
    weight  [D]
    """
    if parts.shape[1:] != x.shape or weight.shape != x.shape[1:]:
        raise ValueError(f"add_rms_norm: x {x.shape}, parts {parts.shape} and weight {weight.shape} do not fit")

    def mosaic(interpret: bool) -> tuple[jax.Array, jax.Array]:
        from qjax.kernels.add_rms_norm.mosaic_gpu import add_rms_norm_mosaic

        return add_rms_norm_mosaic(x, parts, weight, eps=eps, interpret=interpret)

    return dispatch(implementation, lambda: add_rms_norm_ref(x, parts, weight, eps=eps), mosaic)
