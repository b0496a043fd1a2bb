"""The product in plain jnp: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp

from qjax.kernels.tiles import swiglu


def small_matmul_ref(x: jax.Array, w: jax.Array, *, is_gated: bool = False) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None  # tf32 only for narrower weights
    y = jnp.dot(x, w, precision=precision, preferred_element_type=x.dtype)
    return (swiglu(y) if is_gated else y)[None]
