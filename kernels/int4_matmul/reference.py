"""Weights back to numbers and the product with them, in plain jnp: the specification, and what runs where there is no
kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.kernels.int4_matmul.packing import GROUP, ORDER, SPLIT_INPUTS, SPLIT_OUTPUTS, ZERO_MASK


def int4_matmul_ref(x: jax.Array, words: jax.Array, scales_zeros: jax.Array) -> jax.Array:
    w = dequantize(words, scales_zeros, x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # tf32 only for narrower numbers
    y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=x.dtype)
    return y[None]


def dequantize(words: jax.Array, scales_zeros: jax.Array, dtype: Any) -> jax.Array:
    """(q - zero) * scale in float32, rounded once: [N, D], as checkpoints that are not quantised have it."""
    scales, zeros = unpack_scales(scales_zeros)  # [D / 128, N]
    expand = lambda a: jnp.repeat(a.T, GROUP, axis=1)
    return ((unpack_weights(words) - expand(zeros)).astype(jnp.float32) * expand(scales)).astype(dtype)


def unpack_weights(words: jax.Array) -> jax.Array:
    """`packing.pack_weights` undone, and transposed: int32 [N, D] in 0..15."""
    groups, cells, _ = words.shape
    nibbles = (words[..., None] >> (4 * jnp.arange(8, dtype=jnp.int32))) & 15
    packed = (groups, *SPLIT_INPUTS, cells, *SPLIT_OUTPUTS)
    nibbles = nibbles.reshape([packed[axis] for axis in ORDER])
    back = np.argsort(ORDER)
    return nibbles.transpose([*back[6:], *back[:6]]).reshape(cells * 64, groups * GROUP)


def unpack_scales(scales_zeros: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`packing.pack_scales` undone: float32 and int32."""
    bits = scales_zeros & ~ZERO_MASK
    return jax.lax.bitcast_convert_type(bits, jnp.float32), scales_zeros & ZERO_MASK
