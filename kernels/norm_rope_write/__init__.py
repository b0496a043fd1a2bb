"""Between the projection and attention: norm of queries and keys, rotary embedding, write into the paged cache."""

import jax

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
    *,
    eps: float,
    layer: jax.Array | int,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(q [T, K, G, H], the cache with the rows of one layer written, in place where the caller donates `kv`).

    kv        [L, 2, P, K, S, H]   the cache of all layers: keys at 0, values at 1; each (page, head) is an S x H tile
    parts     [N, T, K, G + 2, H]  that add up to the projection: of each KV head its G queries, its key, its value;
                                   in kv's dtype or float32; their sum is rounded to kv's dtype first
    norms     [H], [H]             weights of the queries' and the keys' RMSNorm; None: the model has none
    cos, sin  float32 [T, H / 2]   of each token's position
    slots     int32 [T]            page * S + offset of each token, -1 = written nowhere; slots >= 0 must be distinct
    """
    _, T, K, _, H = parts.shape
    fits_cache = kv.shape[3] == K and kv.shape[5] == H
    if not fits_cache or slots.shape != (T,) or not cos.shape == sin.shape == (T, H // 2):
        raise ValueError(f"norm_rope_write: {parts.shape}, {cos.shape}, {slots.shape} do not fit the cache {kv.shape}")
    args = (kv, parts, norms, cos, sin, slots)

    def mosaic(interpret: bool) -> tuple[jax.Array, jax.Array]:
        from qjax.kernels.norm_rope_write.mosaic_gpu import norm_rope_write_mosaic

        return norm_rope_write_mosaic(*args, eps=eps, layer=layer, interpret=interpret)

    return dispatch(implementation, lambda: norm_rope_write_ref(*args, eps=eps, layer=layer), mosaic)
