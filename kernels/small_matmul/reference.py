"""The product in plain jnp: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp


def small_matmul_ref(x: jax.Array, w: jax.Array, *, transpose_w: bool, out_dtype: jnp.dtype) -> jax.Array:
    # tf32 only where the weights are not float32
    return jax.lax.dot_general(
        x,
        w,
        (((1,), (1 if transpose_w else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype,
    )
