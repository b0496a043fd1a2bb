"""Attention over a paged KV cache: one new token a sequence (`paged_decode`), chunks of prompts (`paged_prefill`)."""

import jax

from qjax.kernels.dispatch import dispatch
from qjax.kernels.paged_attention.reference import paged_decode_ref, paged_prefill_ref

__all__ = ["paged_decode", "paged_prefill"]


def paged_decode(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    *,
    layer: jax.Array | int,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of one new token a sequence, whose own key and value are in the cache already: [B, N, H].

    q             [B, N, H]            query head n reads KV head n // (N // K)
    kv            [L, 2, P, K, S, H]   see `norm_rope_write`
    page_table    int32 [B, W]         the sequence's pages in order; entries past its end are page 0
    context_lens  int32 [B]            tokens, the new one included; 0 = a padding row, whose output is 0
    scale         of the scores, H ** -0.5 by default
    """
    _check(q, kv, page_table, context_lens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (q, kv, page_table, context_lens)

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.paged_attention.decode_mosaic_gpu import paged_decode_mosaic

        return paged_decode_mosaic(*args, layer=layer, scale=scale, interpret=interpret)

    return dispatch(implementation, lambda: paged_decode_ref(*args, layer=layer, scale=scale), mosaic)


def paged_prefill(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    query_starts: jax.Array,
    *,
    layer: jax.Array | int,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of chunks of prompts whose keys and values are in the cache already: [T, N, H].

    q             [T, N, H]
    kv            [L, 2, P, K, S, H]   see `norm_rope_write`
    page_table    int32 [B, W]         the sequence's pages in order; entries past its end are page 0
    context_lens  int32 [B]            tokens of the sequence up to its chunk's end
    query_starts  int32 [B + 1]        chunk i has rows query_starts[i] to query_starts[i + 1], the last of them at
                                       position context_lens[i] - 1; rows past query_starts[B] get 0
    """
    _check(q, kv, page_table, context_lens)
    if query_starts.shape != (page_table.shape[0] + 1,):
        raise ValueError(f"query_starts has shape {query_starts.shape}, {page_table.shape[0]} chunks need one more")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (q, kv, page_table, context_lens, query_starts)

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.paged_attention.prefill_mosaic_gpu import paged_prefill_mosaic

        return paged_prefill_mosaic(*args, layer=layer, scale=scale, interpret=interpret)

    return dispatch(implementation, lambda: paged_prefill_ref(*args, layer=layer, scale=scale), mosaic)


def _check(q: jax.Array, kv: jax.Array, page_table: jax.Array, context_lens: jax.Array) -> None:
    if q.shape[2] != kv.shape[5] or q.shape[1] % kv.shape[3] or q.dtype != kv.dtype:
        raise ValueError(f"queries {q.shape} {q.dtype} do not fit the cache {kv.shape} {kv.dtype}")
    if context_lens.shape != page_table.shape[:1]:
        raise ValueError(f"page_table {page_table.shape} and context_lens {context_lens.shape} differ in sequences")
