"""The operation in plain jnp: the specification, and what runs where there is no kernel."""

import jax

from qjax.kernels.elementwise import rms_norm


def add_rms_norm_ref(x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    x = x + delta
    return x, rms_norm(x, weight, eps)
