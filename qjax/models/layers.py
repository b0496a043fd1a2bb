"""The parts a decoder is built of: parameters with logical axes, projections, embedding, RMSNorm.

Modules hold weights and static sizes only, never a mesh; they are built and called under `jax.set_mesh`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding

INIT_STDDEV = 0.02  # Hugging Face's initializer_range for Qwen


def parameter(
    shape: tuple[int, ...], axes: tuple[str, ...], dtype: jnp.dtype, *, rngs: nnx.Rngs | None, init: float = 0.0
) -> nnx.Param:
    """A weight: normal(0.02) from `rngs`, else filled with `init`."""
    if rngs is None:
        value = jnp.full(shape, init, dtype)
    else:
        value = (INIT_STDDEV * jax.random.normal(rngs.params(), shape)).astype(dtype)
    return nnx.Param(value, out_sharding=axes, sharding_rules=sharding.RULES)


def matmul(einsum: str, x: jax.Array, kernel: jax.Array, **kwargs: Any) -> jax.Array:
    """x times kernel as the einsum says, in float32; no tf32 where the weights are float32."""
    precision = jax.lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else None
    return jnp.einsum(einsum, x, kernel, precision=precision, preferred_element_type=jnp.float32, **kwargs)


class Linear(nnx.Module):
    """y = einsum(x, kernel) + bias, summed in float32, in x's dtype.

    The einsum contracts x's last axes with the kernel's first, so that XLA sees one 2-D GEMM and no transposition.
    """

    def __init__(
        self,
        einsum: str,  # "TD,DF->TF"
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        num_inputs: int = 1,  # leading axes of the kernel that are contracted
        use_bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
    ):
        self.einsum = einsum
        self.out_axes = axes[num_inputs:]
        self.kernel = parameter(shape, axes, dtype, rngs=rngs)
        self.bias = parameter(shape[num_inputs:], self.out_axes, dtype, rngs=None) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # A kernel split on a contracted axis leaves partial sums: out_sharding asks for the all-reduce.
        out_sharding = sharding.spec_like(x, *self.out_axes)
        y = matmul(self.einsum, x, self.kernel[...], out_sharding=out_sharding).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Rows of `weight` [V, D], split on V: each device looks up what it holds, one all-reduce adds them up."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.weight = parameter((vocab_size, hidden_size), ("vocab", "embed"), dtype, rngs=rngs)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """int32 [T] → [T, D]."""
        return self.weight[...].at[token_ids].get(out_sharding=sharding.spec_like(token_ids, "embed"))


class RMSNorm(nnx.Module):
    """Over the last axis; computed in float32 and rounded before the weight is applied, as transformers does."""

    def __init__(self, size: int, axis: str, eps: float, *, dtype: jnp.dtype):
        self.eps = eps
        self.weight = parameter((size,), (axis,), dtype, rngs=None, init=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return x32.astype(x.dtype) * self.weight[...]
