"""The products in plain jnp, tile after tile along the work list: only the weights of chosen experts are read.

Never `lax.ragged_dot`: on a GPU it multiplies every row with every expert.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.kernels.tiles import each_tile, swiglu


def grouped_matmul_ref(x: jax.Array, w: jax.Array, work: jax.Array, *, is_gated: bool) -> jax.Array:
    E, D = w.shape[:2]
    y = _product(x, w.reshape(E, D, -1), work)
    return swiglu(y) if is_gated else y


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array, work: jax.Array) -> jax.Array:
    """[R, N]; rows past the last tile are 0."""
    return _each_tile(x, w, work, contracted=0)


def _each_tile(x: jax.Array, w: jax.Array, work: jax.Array, *, contracted: int) -> jax.Array:
    """Rows of x times w [E, ...] over axis `contracted` of an expert's matrix."""

    def product(rows: jax.Array, expert: jax.Array) -> jax.Array:
        weights = lax.dynamic_index_in_dim(w, expert, keepdims=False)
        over = (((1,), (contracted,)), ((), ()))
        return lax.dot_general(rows, weights, over, precision=_precision(w), preferred_element_type=x.dtype)

    return each_tile(x, work, w.shape[2 - contracted], product)


def _forward(x: jax.Array, w: jax.Array, work: jax.Array) -> tuple[jax.Array, Any]:
    return _product(x, w, work), (x, w, work)


def _backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    """A loop of unknown length has no gradient of its own, and that of one of known length would add E matrices."""
    x, w, work = saved
    tile = x.shape[0] // (work.shape[0] - 1)

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        rows, grads = (lax.dynamic_slice_in_dim(array, i * tile, tile) for array in (x, grad))
        product = lax.dot_general(
            rows, grads, (((0,), (0,)), ((), ())), precision=_precision(w), preferred_element_type=jnp.float32
        )
        return total.at[work[1 + i]].add(product)

    grad_w = lax.fori_loop(0, work[0], body, jnp.zeros(w.shape, jnp.float32))
    return _each_tile(grad, w, work, contracted=1), grad_w.astype(w.dtype), None


_product.defvjp(_forward, _backward)


def _precision(w: jax.Array) -> Any:
    return lax.Precision.HIGHEST if w.dtype == jnp.float32 else None  # tf32 only for narrower weights
