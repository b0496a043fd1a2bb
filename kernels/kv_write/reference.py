"""The KV write in plain jnp: the specification, and what runs where there is no kernel."""

import jax
import jax.numpy as jnp


@jax.jit
def kv_write_ref(kv: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, *, layer: jax.Array | int) -> jax.Array:
    num_pages, page_size = kv.shape[2], kv.shape[4]
    # A skipped row goes to a page past the end, which the scatter drops; −1 would wrap around to the last page.
    page = jnp.where(slots < 0, num_pages, slots // page_size)
    rows = jnp.stack([k, v], axis=1).astype(kv.dtype)  # [T, 2, K, H]
    return kv.at[layer, :, page, :, slots % page_size].set(rows, mode="drop")
