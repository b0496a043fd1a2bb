"""Between the projection and attention: norm of queries and keys, rotary embedding, write into the paged cache."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qjax.kernels.dispatch import dispatch
from qjax.kernels.norm_rope_write.reference import norm_rope_write_ref

__all__ = ["norm_rope_write"]


def norm_rope_write(
    kv: jax.Array,
    parts: jax.Array,
    norms: tuple[jax.Array, jax.Array] | None,
    cos: jax.Array,
    sin: jax.Array,
    slots: jax.Array,
    scales: jax.Array | None = None,
    *,
    dtype: DTypeLike | None = None,
    eps: float,
    layer: jax.Array | int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(q [T, K, G, H], the cache with the rows of one layer written, in place where the caller donates `kv`).

    kv        [L, 2, P, K, S, H]   the cache of all layers: keys at 0, values at 1; each (page, head) is an S x H tile;
                                   of uint8: the bits of e4m3
    parts     [N, T, K, G + 2, H]  that add up to the projection: of each KV head its G queries, its key, its value;
                                   in `dtype` or float32; their sum is rounded to `dtype` first
    norms     [H], [H]             weights of the queries' and the keys' RMSNorm; None: the model has none
    cos, sin  float32 [T, H / 2]   of each token's position
    slots     int32 [T]            page * S + offset of each token, -1 = written nowhere; slots >= 0 must be distinct
    scales    float32 [2, K]       of an e4m3 cache: it gets what `reference.to_e4m3` makes of keys and values; None: 1
    dtype     the model's, kv's by default. Queries come in it, but for an e4m3 cache in float16 in place of bfloat16:
              see `reference.query_dtype`
    """
    _, T, K, _, H = parts.shape
    fits_cache = kv.shape[3] == K and kv.shape[5] == H
    if not fits_cache or slots.shape != (T,) or not cos.shape == sin.shape == (T, H // 2):
        raise ValueError(f"norm_rope_write: {parts.shape}, {cos.shape}, {slots.shape} do not fit the cache {kv.shape}")
    if scales is not None and (scales.shape != (2, K) or kv.dtype != jnp.uint8):
        raise ValueError(f"norm_rope_write: scales {scales.shape} for a cache {kv.shape} {kv.dtype}")
    if dtype is None and kv.dtype == jnp.uint8:
        raise ValueError("norm_rope_write: an e4m3 cache needs the model's dtype")
    args = (kv, parts, norms, cos, sin, slots, scales)
    options = {"dtype": jnp.dtype(kv.dtype if dtype is None else dtype), "eps": eps, "layer": layer}

    def mosaic(interpret: bool) -> tuple[jax.Array, jax.Array]:
        from qjax.kernels.norm_rope_write.mosaic_gpu import norm_rope_write_mosaic

        return norm_rope_write_mosaic(*args, **options, interpret=interpret)

    return dispatch(implementation, lambda: norm_rope_write_ref(*args, **options), mosaic)
