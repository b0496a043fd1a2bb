"""From a router's logits to rows sorted by expert: one kernel where few tokens are, and plain jnp."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.kernels.dispatch import dispatch
from qjax.kernels.grouped_matmul.choosing import choose_experts, weights_of
from qjax.kernels.grouped_matmul.groups import group_rows, max_tiles

# The kernel was compiled for an H100 and checked in interpret mode, but has not run on a GPU yet: until it has, it is
# used only where `implementation` asks for it.
IS_CHECKED_ON_GPU = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """T tokens, each sent to k of E experts, as R rows of the products."""

    position: jax.Array  # int32 [k, T] the row of each assignment; R: it was dropped
    weights: jax.Array  # float32 [k, T] of the experts' outputs
    work: jax.Array  # int32 [1 + W] number of tiles, then the expert of each; a tile has R / W rows
    source: jax.Array | None  # int32 [R] the token of each row, T: padding; None: padding rows may hold anything

    def rows_of(self, x: jax.Array, tile: int) -> jax.Array:
        """[R, D]: the token of each row, of x [T, D]."""
        if self.source is not None:
            return x.at[self.source].get(mode="fill", fill_value=0)
        R = (self.work.shape[0] - 1) * tile
        rows = lax.empty((R, x.shape[1]), x.dtype)
        repeated = jnp.broadcast_to(x, (*self.position.shape, x.shape[1]))
        return rows.at[self.position].set(repeated, mode="drop", unique_indices=True)

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
    implementation: str | None = None,
) -> Routing:
    """Each token to the k experts with the highest softmax of its logits, of equal ones the first.

    Args:
      logits: float32 [T, E].
      is_token: bool [T]; what is none is sent nowhere.
      tile: rows; see `tile_rows`.
      is_normalized: the weights of a token are divided by their sum.
      own_experts: (first, number) of those that are on this device: what is sent to others is dropped; None: all.
    """
    T, E = logits.shape

    def reference() -> Routing:
        probs = jax.nn.softmax(logits)
        chosen = choose_experts(probs, k)
        weights = weights_of(probs, chosen, is_normalized=is_normalized)
        first, number = own_experts or (0, E)
        groups = group_rows(jnp.where(is_token[:, None], chosen - first, number), number, tile)
        return Routing(groups.position.T, weights.T, groups.work, groups.source)

    def mosaic(interpret: bool) -> Routing:
        if implementation is None and not IS_CHECKED_ON_GPU:
            raise NotImplementedError("the kernel was not checked on a GPU")
        if own_experts is not None:
            raise NotImplementedError("routing to a part of the experts")
        from qjax.kernels.grouped_matmul.route_mosaic_gpu import route_mosaic

        num_tiles = max_tiles(T * k, E, tile)
        options: Any = {"k": k, "tile": tile, "num_tiles": num_tiles, "is_normalized": is_normalized}
        position, weights, work = route_mosaic(logits, is_token, interpret=interpret, **options)
        return Routing(position, weights, work, source=None)

    return dispatch(implementation, reference, mosaic)
