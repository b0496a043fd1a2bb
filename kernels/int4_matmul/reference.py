"""Weights back to numbers and the product with them, in plain jnp: the specification, and what runs where there is no
kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.kernels.int4_matmul.packing import (
    CELL_OUTPUTS,
    CELL_WORDS,
    GROUP,
    ORDER,
    SPLIT_INPUTS,
    SPLIT_OUTPUTS,
    ZERO_MASK,
)
from qjax.kernels.tiles import each_tile, swiglu

SMALLEST_SCALE = 2.0**-17


def int4_matmul_ref(x: jax.Array, words: jax.Array, scales_zeros: jax.Array) -> jax.Array:
    w = dequantize(words, scales_zeros, x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # tf32 only for narrower numbers
    y = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=x.dtype)
    return y[None]


def grouped_int4_matmul_ref(
    x: jax.Array, words: jax.Array, scales_zeros: jax.Array, work: jax.Array, *, is_gated: bool
) -> jax.Array:
    """An expert's weight is dequantised for each of its tiles, so that one is there at a time."""
    groups = words.shape[1]

    def product(rows: jax.Array, expert: jax.Array) -> jax.Array:
        own, scales = (jax.lax.dynamic_index_in_dim(a, expert, keepdims=False) for a in (words, scales_zeros))
        return int4_matmul_ref(rows, own.reshape(groups, -1, CELL_WORDS), scales.reshape(groups, -1))[0]

    y = each_tile(x, work, scales_zeros[0].size // groups, product)
    return swiglu(y) if is_gated else y


def dequantize(words: jax.Array, scales_zeros: jax.Array, dtype: Any) -> jax.Array:
    """(q - zero) * scale in float32, rounded once: [N, D], as checkpoints that are not quantised have it."""
    scales, zeros = unpack_scales(scales_zeros)  # [D / 128, N]
    expand = lambda a: jnp.repeat(a.T, GROUP, axis=1)
    return ((unpack_weights(words) - expand(zeros)).astype(jnp.float32) * expand(scales)).astype(dtype)


def quantize(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[D, N] → q uint8 [D, N] in 0..15, scales and zero points float32 [D / 128, N], which stand for about w.

    Round to nearest between the least and the largest of a group, 0 among them. Scales are rounded to
    bfloat16 first, and 2^-17 or more, so that they are the same numbers in bfloat16 and in float16.
    """
    groups = w.reshape(-1, GROUP, w.shape[1])
    q, scales, zeros = jax.lax.map(_quantize_group, groups)  # one after the other: little memory on the way
    return q.reshape(w.shape), scales, zeros


def quantize_packed(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[D, N] → `words` and `scales_zeros` of `int4_matmul`."""

    def packed(group: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, scale, zero = _quantize_group(group)
        bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
        return _pack_group(q), (bits & ~ZERO_MASK) | zero.astype(jnp.int32)

    return jax.lax.map(packed, w.reshape(-1, GROUP, w.shape[1]))


def _quantize_group(group: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    w = group.astype(jnp.float32)
    low, high = jnp.minimum(w.min(0), 0), jnp.maximum(w.max(0), 0)
    scale = jax.lax.reduce_precision(jnp.maximum((high - low) / 15, SMALLEST_SCALE), 8, 7)  # XLA may drop two astypes
    zero = jnp.clip(jnp.round(-low / scale), 0, 15)
    q = jnp.clip(jnp.round(w / scale) + zero, 0, 15)
    return q.astype(jnp.uint8), scale, zero


def _pack_group(q: jax.Array) -> jax.Array:
    """`packing.pack_weights` of one group: [128, N] → int32 [N / 64, 1024]."""
    cells = q.shape[1] // CELL_OUTPUTS
    nibbles = q.reshape(1, *SPLIT_INPUTS, cells, *SPLIT_OUTPUTS).transpose(ORDER).reshape(cells, CELL_WORDS, 8)
    shifted = nibbles.astype(jnp.uint32) << (4 * jnp.arange(8, dtype=jnp.uint32))
    return jax.lax.bitcast_convert_type(shifted.sum(-1, dtype=jnp.uint32), jnp.int32)


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
