"""The product in plain jnp: weight-only, which runs where there is no kernel, and the kernel's own arithmetic."""

import jax
import jax.numpy as jnp

from qjax.kernels.tiles import each_tile, swiglu

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_AMAX = 1e-10  # a row of zeros keeps a finite scale


def dequantize(w: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """w times scale, whose axes are shorter by the size of a block; in float32, rounded once."""
    for axis, size in enumerate(w.shape):
        if scale.shape[axis] != size:
            scale = jnp.repeat(scale, size // scale.shape[axis], axis=axis)
    return (w.astype(jnp.float32) * scale).astype(dtype)


def quantize(w: jax.Array, scale_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """w in e4m3 and float32 scales of `scale_shape`, one for each block: what `dequantize` takes back to about w."""
    pairs = zip(w.shape, scale_shape, strict=True)
    blocks = w.astype(jnp.float32).reshape([n for size, count in pairs for n in (count, size // count)])
    amax = jnp.max(jnp.abs(blocks), axis=tuple(range(1, blocks.ndim, 2)), keepdims=True)
    scale = jnp.maximum(amax, SMALLEST_AMAX) / LARGEST
    return (blocks / scale).astype(E4M3).reshape(w.shape), scale.reshape(scale_shape)


def fp8_matmul_ref(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """Weight-only: the activations keep their dtype."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # tf32 only for narrower weights
    over = (((1,), (1,)), ((), ()))
    weight = dequantize(w, scale, x.dtype)
    return jax.lax.dot_general(x, weight, over, precision=precision, preferred_element_type=x.dtype)[None]


def grouped_fp8_matmul_ref(
    x: jax.Array, w: jax.Array, scale: jax.Array, work: jax.Array, *, is_gated: bool
) -> jax.Array:
    """Weight-only: an expert's weight is dequantised for each of its tiles, so that one is there at a time."""

    def product(rows: jax.Array, expert: jax.Array) -> jax.Array:
        return fp8_matmul_ref(rows, *_of_expert(w, scale, expert))[0]

    y = each_tile(x, work, w[0].size // w.shape[-1], product)
    return swiglu(y) if is_gated else y


def _of_expert(w: jax.Array, scale: jax.Array, expert: jax.Array) -> list[jax.Array]:
    """An expert's weight and scales, each [outputs, inputs], those of gate before those of up."""
    # Without the barrier XLA makes float16 of all experts before the loop, where the CPU does not know e4m3.
    w, expert = jax.lax.optimization_barrier((w, expert))
    own = [jax.lax.dynamic_index_in_dim(a, expert, keepdims=False) for a in (w, scale)]
    return [a.reshape(-1, a.shape[-1]) for a in own]


def quantize_rows(x: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """x [M, D] in e4m3, and the scales, float32 [D / group, M]: one for each row and `group` columns."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, group)
    amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=2), SMALLEST_AMAX)
    q = (groups * (LARGEST / amax)[:, :, None]).astype(E4M3).reshape(x.shape)
    return q, (amax / LARGEST).T


def fp8_product(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """[M, N] in float32 as the kernel computes it: x is quantised, each block of D summed and scaled by itself."""
    group = x.shape[1] // scale.shape[1]
    q, row_scale = quantize_rows(x, group)
    split = lambda a: a.astype(jnp.float32).reshape(a.shape[0], -1, group)
    products = jnp.einsum("MBC,NBC->BMN", split(q), split(w), precision=jax.lax.Precision.HIGHEST)
    column_scale = jnp.repeat(scale, w.shape[0] // scale.shape[0], axis=0).T  # [D / group, N]
    return jnp.sum(products * row_scale[:, :, None] * column_scale[:, None, :], axis=0)


def grouped_fp8_product(x: jax.Array, w: jax.Array, scale: jax.Array, work: jax.Array, *, is_gated: bool) -> jax.Array:
    """[R, N] as the kernel computes it: see `fp8_product`."""

    def product(rows: jax.Array, expert: jax.Array) -> jax.Array:
        return fp8_product(rows, *_of_expert(w, scale, expert))

    y = each_tile(x.astype(jnp.float32), work, w[0].size // w.shape[-1], product)
    return (swiglu(y) if is_gated else y).astype(x.dtype)
