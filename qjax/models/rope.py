"""Rotary position embeddings: default, linear and YaRN (Peng et al. 2023, arXiv:2309.00071), equal to transformers'.

`models/config.py` says which kinds and keys are accepted.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(angle per position, float32 [H / 2]; factor on cos and sin)."""
    dim, base = config.head_dim, config.rope_theta
    # Powers and quotients in float32, as transformers computes them: at position 131072 the last bit matters.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = np.power(np.float32(base), exponents)
    inv_freq = np.float32(1.0) / wavelengths
    rope = config.rope_scaling
    if rope is None:
        return inv_freq, 1.0
    factor = float(rope["factor"])
    if rope["rope_type"] == "linear":
        return inv_freq / np.float32(factor), 1.0
    # YaRN: dimensions that turn more than beta_fast times in the original length keep their frequency, those that
    # turn less than beta_slow times are stretched by `factor`, a linear ramp lies between.
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings

    def dim_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = dim_that_turns(rope.get("beta_fast") or 32)
    high = dim_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low or 0.001)
    keep = np.float32(1.0) - np.clip(ramp, 0, 1)
    stretched = np.float32(1.0) / (np.float32(factor) * wavelengths)
    return stretched * (np.float32(1.0) - keep) + inv_freq * keep, _yarn_attention_factor(rope, factor)


def rope_angles(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [T, H / 2] each, of positions int32 [T] (exact in float32 up to 2**24)."""
    inv_freq, factor = rope_frequencies(config)
    angles = positions.astype(jnp.float32)[:, None] * inv_freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _yarn_attention_factor(rope: dict, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)
