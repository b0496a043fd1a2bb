"""From a router's logits to rows sorted by expert."""

import functools
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from qjax.kernels.grouped_matmul.groups import group_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """T tokens, each sent to k of E experts, as R rows of the products."""

    position: jax.Array  # int32 [k, T] the row of each assignment; R: it was dropped
    weights: jax.Array  # float32 [k, T] of the experts' outputs
    work: jax.Array  # int32 [1 + W] number of tiles, then the expert of each; a tile has R / W rows
    source: jax.Array  # int32 [R] the token of each row, T: padding

    def rows_of(self, x: jax.Array) -> jax.Array:
        """[R, D]: the token of each row, of x [T, D]."""
        return x.at[self.source].get(mode="fill", fill_value=0)

    def join(self, y: jax.Array) -> jax.Array:
        """float32 [T, D]: the weighted sum of each token's rows of y [R, D]."""
        return jnp.sum(y.at[self.position].get(mode="fill", fill_value=0) * self.weights[:, :, None], axis=0)


def route(
    logits: jax.Array,
    is_token: jax.Array,
    *,
    k: int,
    tile: int,
    is_normalized: bool,
    own_experts: tuple[jax.Array | int, int] | None = None,
) -> Routing:
    """Each token to the k experts with the highest softmax of its logits, of equal ones the first.

    Args:
      logits: float32 [T, E].
      is_token: bool [T]; what is none is sent nowhere.
      tile: rows; see `tile_rows`.
      is_normalized: the weights of a token are divided by their sum.
      own_experts: (first, number) of those that are on this device: what is sent to others is dropped; None: all.
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), k)
    if is_normalized:
        # Not jnp.sum: a few additions are computed where the weights are needed, a sum is a kernel of its own.
        weights /= functools.reduce(operator.add, [weights[:, j] for j in range(k)])[:, None]
    first, number = own_experts or (0, logits.shape[1])
    groups = group_rows(jnp.where(is_token[:, None], chosen - first, number), number, tile)
    return Routing(groups.position.T, weights.T, groups.work, groups.source)
