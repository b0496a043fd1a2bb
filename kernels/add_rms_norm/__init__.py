"""The residual stream takes up what a block computed, and is normalised for the next block."""

import jax

from qjax.kernels.add_rms_norm.reference import add_rms_norm_ref
from qjax.kernels.dispatch import dispatch

__all__ = ["add_rms_norm"]


def add_rms_norm(
    x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """(x + delta, RMSNorm(x + delta) * weight), both [T, D] in x's dtype.

    x, delta  [T, D]
    weight    [D]
    """
    if x.shape != delta.shape or weight.shape != x.shape[1:] or x.dtype != delta.dtype:
        raise ValueError(f"add_rms_norm: x {x.shape} {x.dtype}, delta {delta.shape} {delta.dtype}, {weight.shape}")

    def mosaic(interpret: bool) -> tuple[jax.Array, jax.Array]:
        from qjax.kernels.add_rms_norm.mosaic_gpu import add_rms_norm_mosaic

        return add_rms_norm_mosaic(x, delta, weight, eps=eps, interpret=interpret)

    return dispatch(implementation, lambda: add_rms_norm_ref(x, delta, weight, eps=eps), mosaic)
