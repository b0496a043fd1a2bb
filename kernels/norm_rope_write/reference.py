"""The operation in plain jnp: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qjax.kernels.elementwise import E4M3, norm_and_rotate, sum_parts, to_bits

LARGEST = 448.0  # of e4m3; what is beyond saturates


def norm_rope_write_ref(
    kv, parts, norms, cos, sin, slots, scales, *, dtype: jnp.dtype, eps: float, layer: jax.Array | int
):
    q, k, v = norm_and_rotate(sum_parts(parts, dtype), norms, eps, cos, sin)
    num_pages, page_size = kv.shape[2], kv.shape[4]
    # A skipped row goes to a page past the end, which the scatter drops; −1 would wrap around to the last page.
    page = jnp.where(slots < 0, num_pages, slots // page_size)
    rows = to_bits(in_cache(jnp.stack([k, v], axis=1), kv.dtype, scales))  # [T, 2, K, H]
    q = as_queries(q, query_dtype(kv.dtype, dtype))
    return q, kv.at[layer, :, page, :, slots % page_size].set(rows, mode="drop")


def in_cache(rows: jax.Array, kv_dtype: DTypeLike, scales: jax.Array | None) -> jax.Array:
    """Keys and values [T, 2, K, H] as they are stored, those of a uint8 cache in e4m3."""
    if kv_dtype != jnp.uint8:
        return rows.astype(kv_dtype)
    rows = rows.astype(jnp.float32)
    return saturate(rows if scales is None else rows / scales[:, :, None])


def saturate(x: jax.Array) -> jax.Array:
    """float32 to e4m3: rounded to nearest (even); what is beyond becomes +-448, NaN stays NaN. With the division before
    it, it is vLLM's formula for an FP8 KV cache."""
    return jnp.clip(x, -LARGEST, LARGEST).astype(E4M3)


def query_dtype(kv_dtype: DTypeLike, dtype: DTypeLike) -> jnp.dtype:
    """Of the queries for a cache: e4m3 is widened to float16 in one instruction, to bfloat16 in four, and a product has
    operands of one dtype."""
    return jnp.dtype(jnp.float16 if kv_dtype == jnp.uint8 and dtype == jnp.bfloat16 else dtype)


def as_queries(q: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """bfloat16 to float16, exact above 2 ** -17; what is beyond float16's range saturates."""
    if dtype != q.dtype:
        most = float(jnp.finfo(dtype).max)
        q = jnp.clip(q.astype(jnp.float32), -most, most)
    return q.astype(dtype)
