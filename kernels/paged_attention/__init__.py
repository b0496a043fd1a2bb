"""Attention over a paged KV cache: one new token a sequence (`paged_decode`), chunks of prompts (`paged_prefill`)."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qjax.kernels.dispatch import dispatch
from qjax.kernels.paged_attention.reference import paged_decode_ref, paged_prefill_ref

__all__ = ["paged_decode", "paged_prefill"]


def paged_decode(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    scales: jax.Array | None = None,
    *,
    layer: jax.Array | int,
    scale: float | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of one new token a sequence, whose own key and value are in the cache already: [B, N, H].

    q             [B, N, H]            query head n reads KV head n // (N // K); in kv's dtype, wider if kv is uint8
    kv            [L, 2, P, K, S, H]   see `norm_rope_write`
    page_table    int32 [B, W]         the sequence's pages in order; entries past its end are page 0
    context_lens  int32 [B]            tokens, the new one included; 0 = a padding row, whose output is 0
    scales        float32 [2, K]       of the layer's keys and values: what is in the cache times these; None: 1
    scale         of the scores, H ** -0.5 by default
    out_dtype     of the result, q's by default
    """
    _check(q, kv, page_table, context_lens, scales)
    options = {"layer": layer, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    options["out_dtype"] = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    args = (q, kv, page_table, context_lens, scales)

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.paged_attention.decode_mosaic_gpu import paged_decode_mosaic

        return paged_decode_mosaic(*args, **options, interpret=interpret)

    return dispatch(implementation, lambda: paged_decode_ref(*args, **options), mosaic)


def paged_prefill(
    q: jax.Array,
    kv: jax.Array,
    page_table: jax.Array,
    context_lens: jax.Array,
    query_starts: jax.Array,
    scales: jax.Array | None = None,
    *,
    layer: jax.Array | int,
    scale: float | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention of chunks of prompts whose keys and values are in the cache already: [T, N, H].

    q             [T, N, H]            see `paged_decode`
    kv            [L, 2, P, K, S, H]   see `norm_rope_write`
    page_table    int32 [B, W]         the sequence's pages in order; entries past its end are page 0
    context_lens  int32 [B]            tokens of the sequence up to its chunk's end
    query_starts  int32 [B + 1]        chunk i has rows query_starts[i] to query_starts[i + 1], the last of them at
                                       position context_lens[i] - 1; rows past query_starts[B] get 0
    scales, scale, out_dtype           see `paged_decode`
    """
    _check(q, kv, page_table, context_lens, scales)
    if query_starts.shape != (page_table.shape[0] + 1,):
        raise ValueError(f"query_starts has shape {query_starts.shape}, {page_table.shape[0]} chunks need one more")
    options = {"layer": layer, "scale": q.shape[-1] ** -0.5 if scale is None else scale}
    options["out_dtype"] = jnp.dtype(q.dtype if out_dtype is None else out_dtype)
    args = (q, kv, page_table, context_lens, query_starts, scales)

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.paged_attention.prefill_mosaic_gpu import paged_prefill_mosaic

        return paged_prefill_mosaic(*args, **options, interpret=interpret)

    return dispatch(implementation, lambda: paged_prefill_ref(*args, **options), mosaic)


def _check(
    q: jax.Array, kv: jax.Array, page_table: jax.Array, context_lens: jax.Array, scales: jax.Array | None
) -> None:
    fits = q.dtype == kv.dtype or (kv.dtype == jnp.uint8 and q.dtype != jnp.uint8)
    if q.shape[2] != kv.shape[5] or q.shape[1] % kv.shape[3] or not fits:
        raise ValueError(f"queries {q.shape} {q.dtype} do not fit the cache {kv.shape} {kv.dtype}")
    if context_lens.shape != page_table.shape[:1]:
        raise ValueError(f"page_table {page_table.shape} and context_lens {context_lens.shape} differ in sequences")
    if scales is not None and scales.shape != (2, kv.shape[3]):
        raise ValueError(f"scales {scales.shape} do not fit the cache {kv.shape}: [2, K] are needed")
