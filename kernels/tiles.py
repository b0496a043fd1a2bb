"""What products along a work list share: the loop in plain jnp, tile after tile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def each_tile(
    x: jax.Array, work: jax.Array, num_columns: int, product: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """[R, num_columns] of `product(rows, expert)` for each tile of the list (see `Groups`); 0 past the last tile."""
    tile = x.shape[0] // (work.shape[0] - 1)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        y = product(lax.dynamic_slice_in_dim(x, i * tile, tile), work[1 + i])
        return lax.dynamic_update_slice_in_dim(out, y, i * tile, 0)

    return lax.fori_loop(0, work[0], body, jnp.zeros((x.shape[0], num_columns), x.dtype))


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up of [R, 2 N] → [R, N]."""
    gate, up = jnp.split(gate_up, 2, axis=1)
    return jax.nn.silu(gate) * up
