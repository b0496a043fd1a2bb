"""The operation in plain jnp: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp

from qjax.kernels.elementwise import norm_and_rotate, sum_parts


def norm_rope_write_ref(kv, parts, norms, cos, sin, slots, *, eps: float, layer: jax.Array | int):
    q, k, v = norm_and_rotate(sum_parts(parts, kv.dtype), norms, eps, cos, sin)
    num_pages, page_size = kv.shape[2], kv.shape[4]
    # A skipped row goes to a page past the end, which the scatter drops; −1 would wrap around to the last page.
    page = jnp.where(slots < 0, num_pages, slots // page_size)
    rows = jnp.stack([k, v], axis=1).astype(kv.dtype)  # [T, 2, K, H]
    return q, kv.at[layer, :, page, :, slots % page_size].set(rows, mode="drop")
