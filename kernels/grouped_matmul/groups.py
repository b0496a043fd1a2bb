"""Which rows go to which expert: a counting sort in plain jnp, without `lax.sort`, and the work list of the products.

Every expert's rows follow each other and are padded to whole tiles, so that a tile has one expert.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

MIN_TILE, MAX_TILE = 8, 128  # rows: TMA's boxes are whole 8-row tiles; two warpgroups multiply 64 each
BLOCK = 512  # assignments that are compared with each other; between blocks, counts are summed up


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """T tokens, each sent to k of E experts, as R = W * tile rows."""

    source: jax.Array  # int32 [R] the token of each row; T: padding
    position: jax.Array  # int32 [T, k] the row of each assignment; R: it was dropped
    work: jax.Array  # int32 [1 + W] number of tiles, then the expert of each; past that number anything below E


def tile_rows(num_assignments: int, num_experts: int) -> int:
    """Rows of a tile: about twice an expert's share, so that few experts need two and little is padding."""
    tile = MIN_TILE
    while tile < MAX_TILE and tile * num_experts < 2 * num_assignments:
        tile *= 2
    return tile


def max_tiles(num_assignments: int, num_experts: int, tile: int) -> int:
    """W: the most tiles that so many assignments can need."""
    most = min(num_assignments, num_experts)  # experts that are chosen at all
    return most + (num_assignments - most) // tile


def group_rows(experts: jax.Array, num_experts: int, tile: int | None = None) -> Groups:
    """Sorts assignments by expert; those of one expert keep their order.

    Args:
      experts: int32 [T, k]; an assignment outside of 0 to num_experts - 1 is dropped.
      tile: rows; None: `tile_rows`.
    """
    T, k = experts.shape
    E, flat = num_experts, experts.reshape(-1)
    tile = tile or tile_rows(T * k, E)
    num_tiles = max_tiles(T * k, E, tile)

    blocks = jnp.pad(flat, (0, -(T * k) % BLOCK), constant_values=E) if T * k > BLOCK else flat
    blocks = blocks.reshape(-1, min(T * k, BLOCK))  # [blocks, BLOCK]
    before = jnp.tril(jnp.ones((blocks.shape[1],) * 2, bool), -1)
    is_same = (blocks[:, :, None] == blocks[:, None, :]) & before
    rank = jnp.sum(is_same, axis=2, dtype=jnp.int32).reshape(-1)[: T * k]  # among its block's of the same expert

    # Each expert's first tile. In a decode step each XLA kernel counts: few of them compare all with all.
    is_kept = (flat >= 0) & (flat < E)
    if len(blocks) == 1:
        is_in_front = is_kept & (rank % tile == 0) & (flat < flat[:, None])
        first = jnp.sum(is_in_front, axis=1, dtype=jnp.int32)
    else:
        counts = jnp.sum(blocks[:, :, None] == jnp.arange(E), axis=1, dtype=jnp.int32)  # [blocks, E]
        expert = jnp.where(is_kept, flat, 0)
        rank += (jnp.cumsum(counts, axis=0) - counts)[jnp.arange(T * k) // BLOCK, expert]
        tiles = -(-jnp.sum(counts, axis=0) // tile)
        first = (jnp.cumsum(tiles) - tiles)[expert]
    own = first + rank // tile
    position = jnp.where(is_kept, own * tile + rank % tile, num_tiles * tile)
    source = jnp.full(num_tiles * tile, T, jnp.int32).at[position].set(jnp.arange(T * k) // k, mode="drop")

    # A tile's first row says its expert; the list begins with how many there are.
    index = jnp.arange(-1, num_tiles)[:, None]
    is_first = is_kept & (rank % tile == 0) & ((own == index) | (index < 0))  # [1 + W, T * k]
    work = jnp.sum(jnp.where(is_first, jnp.where(index < 0, 1, flat), 0), axis=1, dtype=jnp.int32)
    return Groups(source, position.reshape(T, k), work)
