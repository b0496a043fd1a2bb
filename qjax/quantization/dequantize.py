"""Quantised weights back to numbers: the formulas of the two checkpoint formats, in jnp, which XLA fuses.

Weights stay quantised in memory; the numbers exist for the one product they are made for. Both formulas are worked out
in float32 and rounded once, to the activations' dtype.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.kernels.fp8_matmul.reference import dequantize as dequantize_fp8

# AutoAWQ's GEMM packing: nibble i of a word, from the lowest, is column ORDER[i] of its eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SHIFTS = tuple(4 * ORDER.index(column) for column in range(8))


def dequantize(method: str, tensors: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    """The kernel [*inputs, *outputs] of a projection's tensors, which `quantization.config.TENSORS` lists; of FP8's
    [*outputs, *inputs]."""
    if method == "fp8":
        return dequantize_fp8(tensors["weight"], tensors["weight_scale_inv"], dtype)
    return dequantize_awq(tensors["qweight"], tensors["qzeros"], tensors["scales"], dtype)


def dequantize_awq(qweight: jax.Array, qzeros: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """(q - zero) * scale. qweight, qzeros: int32, eight columns of the last axis in a word; qzeros and scales (float32)
    have one entry for each group of inputs."""
    q = unpack_awq(qweight)
    centred = (q - _expand(unpack_awq(qzeros), q.shape)).astype(jnp.float32)
    return (centred * _expand(scales, q.shape)).astype(dtype)


def unpack_awq(words: jax.Array) -> jax.Array:
    """int32 [..., n] → int32 [..., 8 * n] in 0..15."""
    nibbles = jnp.right_shift(words[..., None], jnp.array(_SHIFTS, jnp.int32)) & 15
    return nibbles.reshape(*words.shape[:-1], -1)


def _expand(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each element repeated along every axis, so that x has `shape`."""
    for axis, size in enumerate(shape):
        if x.shape[axis] != size:
            x = jnp.repeat(x, size // x.shape[axis], axis=axis)
    return x
