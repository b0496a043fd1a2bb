"""The operation in plain jnp: the specification, and what runs where there is no kernel."""

import jax

from qjax.kernels.elementwise import add_parts, rms_norm


def add_rms_norm_ref(x: jax.Array, parts: jax.Array, weight: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    x = add_parts(x, parts)
    return x, rms_norm(x, weight, eps)
