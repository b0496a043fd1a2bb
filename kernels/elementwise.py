"""Plain jnp of what several kernels compute along the way."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

E4M3 = jnp.float8_e4m3fn


def from_bits(kv: jax.Array) -> jax.Array:
    """A KV cache, or a part of it, as the numbers it holds: those of uint8 are the bits of e4m3.

    For a scatter or a gather of e4m3 XLA on a CPU widens the whole cache and narrows it again; of bytes it does not.
    """
    return jax.lax.bitcast_convert_type(kv, E4M3) if kv.dtype == jnp.uint8 else kv


def to_bits(kv: jax.Array) -> jax.Array:
    """The inverse of `from_bits`."""
    return jax.lax.bitcast_convert_type(kv, jnp.uint8) if kv.dtype == E4M3 else kv


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Over the last axis; in float32 and rounded before the weight is applied, as transformers does."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight


def sum_parts(parts: jax.Array, dtype: Any) -> jax.Array:
    """The sum of parts [P, ...], rounded once."""
    return functools.reduce(lambda a, b: a + b, list(parts)).astype(dtype)


def add_parts(x: jax.Array, parts: jax.Array) -> jax.Array:
    """x + the sum of parts [P, ...], which is rounded to x's dtype first."""
    return x + sum_parts(parts, x.dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H / 2) of x [T, ..., H] in float32; cos and sin [T, H / 2]. Returns x's dtype."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (cos.shape[-1],)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def norm_and_rotate(
    qkv: jax.Array, norms: tuple[jax.Array, jax.Array] | None, eps: float, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q [T, K, G, H], k and v [T, K, H] of qkv [T, K, G + 2, H].

    Args:
      norms: weights [H] of q's and k's RMSNorm, None where the model has none.
      cos, sin: float32 [T, H / 2].
    """
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v
