"""Paged attention in plain jnp: the specification, and what runs where there is no kernel.

Both functions run the online softmax over blocks of pages and stop at the longest context, so that work and memory
follow the tokens there are and not the width of the page table.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qjax.kernels.elementwise import from_bits

BLOCK_TOKENS = 512  # keys and values a step of the loop gathers
MASKED = -1e30  # finite, so that a row that sees nothing yields 0 and not NaN
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # no tf32 on GPUs


@functools.partial(jax.jit, static_argnames=("out_dtype",))
def paged_decode_ref(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    scales: jax.Array | None = None,
    *,
    layer: jax.Array | int,
    scale: jax.Array | float,
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    B, N, H = q.shape
    K = kv.shape[3]
    last = jnp.broadcast_to(context_lens[:, None] - 1, (B, N // K))
    out = _attend(q.reshape(B, K, N // K, H), kv, page_table, last, scales, layer=layer, scale=scale)
    return out.reshape(B, N, H).astype(out_dtype or q.dtype)


@functools.partial(jax.jit, static_argnames=("out_dtype", "tile"))
def paged_prefill_ref(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    query_starts: jax.Array,
    scales: jax.Array | None = None,
    *,
    layer: jax.Array | int,
    scale: jax.Array | float,
    out_dtype: jnp.dtype | None = None,
    tile: int | None = None,
) -> jax.Array:
    """`tile`: query rows handled at once; a tile's rows belong to one sequence."""
    T, N, H = q.shape
    K = kv.shape[3]
    G = N // K
    tile = tile or min(128, max(8, T))
    chunk_lens = jnp.diff(query_starts)
    tiles_end = jnp.cumsum(-(-chunk_lens // tile))  # [B] tiles of the chunks up to and including this one

    def one_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        seq = jnp.sum(tiles_end <= i)
        first_tile = jnp.where(seq > 0, tiles_end[seq - 1], 0)
        row = (i - first_tile) * tile + jnp.arange(tile)  # [tile] within the chunk
        is_row = row < chunk_lens[seq]
        index = jnp.where(is_row, query_starts[seq] + row, T)  # T: read as zeros, dropped when written
        q_tile = q.at[index].get(mode="fill", fill_value=0)  # [tile, N, H]
        q_tile = q_tile.reshape(tile, K, G, H).swapaxes(0, 1).reshape(1, K, tile * G, H)
        last = jnp.where(is_row, context_lens[seq] - chunk_lens[seq] + row, -1)
        pages = lax.dynamic_slice_in_dim(page_table, seq, 1)
        out_tile = _attend(q_tile, kv, pages, jnp.repeat(last, G)[None], scales, layer=layer, scale=scale)
        out_tile = out_tile.reshape(K, tile, G, H).swapaxes(0, 1).reshape(tile, N, H)
        return out.at[index].set(out_tile.astype(out.dtype), mode="drop")

    return lax.fori_loop(0, tiles_end[-1], one_tile, jnp.zeros(q.shape, out_dtype or q.dtype))


def _attend(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    last: jax.Array,
    scales: jax.Array | None,
    *,
    layer: jax.Array | int,
    scale: jax.Array | float,
) -> jax.Array:
    """Rows of queries against the pages of their sequence: q [B, K, R, H] -> float32 [B, K, R, H].

    last  int32 [B, R]  the last position each row sees, -1 = none. Slots past a sequence's largest one may hold
    anything, NaN included: their scores are replaced and their values zeroed (0 * NaN would be NaN).
    """
    B, K, R, H = q.shape
    W, S = page_table.shape[1], kv.shape[4]
    block = min(W, max(1, BLOCK_TOKENS // S))  # pages
    # At least two, one of them maybe never read: where the table is one block, XLA drops the slice that picks it, and
    # the code it then makes took 2 to 6 times as long on a CPU at batch 8. Why is not known.
    num_blocks = max(2, -(-W // block))
    page_table = jnp.pad(page_table, ((0, 0), (0, num_blocks * block - W)))
    end = jnp.max(last, axis=1) + 1  # [B]
    q = q.astype(jnp.float32) * scale
    if scales is not None:  # of keys and values, which is the same as of the queries and of the result
        q = q * scales[0, :, None, None]

    def step(i: jax.Array, carry: tuple) -> tuple:
        acc, max_, sum_ = carry
        pages = lax.dynamic_slice_in_dim(page_table, i * block, block, axis=1)
        tiles = (from_bits(kv[layer, j, pages]).swapaxes(1, 2) for j in (0, 1))
        k, v = (tile.reshape(B, K, block * S, H).astype(jnp.float32) for tile in tiles)  # [B, K, C, H]
        position = i * block * S + jnp.arange(block * S)
        v = jnp.where((position < end[:, None])[:, None, :, None], v, 0)
        is_visible = (position <= last[:, :, None])[:, None]  # [B, 1, R, C]
        scores = jnp.where(is_visible, _einsum("BKRH,BKCH->BKRC", q, k), MASKED)
        new_max = jnp.maximum(max_, scores.max(-1, keepdims=True))
        p = jnp.where(is_visible, jnp.exp(scores - new_max), 0)
        decay = jnp.exp(max_ - new_max)
        acc = acc * decay + _einsum("BKRC,BKCH->BKRH", p, v)
        return acc, new_max, sum_ * decay + p.sum(-1, keepdims=True)

    zeros = lambda size: jnp.zeros((B, K, R, size), jnp.float32)
    carry = (zeros(H), zeros(1) + MASKED, zeros(1))
    acc, _, sum_ = lax.fori_loop(0, -(-jnp.max(end) // (block * S)), step, carry)
    out = acc / jnp.where(sum_ == 0, 1, sum_)
    return out if scales is None else out * scales[1, :, None, None]
