"""Writes the step's keys and values into the paged cache."""

import jax

from qjax.kernels.dispatch import dispatch
from qjax.kernels.kv_write.reference import kv_write_ref

__all__ = ["kv_write"]


def kv_write(
    kv: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, layer: int, implementation: str | None = None
) -> jax.Array:
    """Returns the cache with the rows of one layer written; in place where the caller donates `kv`.

    kv     [L, 2, P, K, S, H]  the cache of all layers: keys at 0, values at 1; each (page, head) is an S x H tile
    k, v   [T, K, H]
    slots  int32 [T]           page * S + offset of each row, -1 = skip the row; slots >= 0 must be distinct
    """
    if k.shape != v.shape or k.shape != (slots.shape[0], kv.shape[3], kv.shape[5]):
        raise ValueError(f"kv_write: k {k.shape}, v {v.shape} and slots {slots.shape} do not fit the cache {kv.shape}")

    def mosaic(interpret: bool) -> jax.Array:
        from qjax.kernels.kv_write.mosaic_gpu import kv_write_mosaic

        return kv_write_mosaic(kv, k, v, slots, layer=layer, interpret=interpret)

    return dispatch(implementation, lambda: kv_write_ref(kv, k, v, slots, layer=layer), mosaic)
