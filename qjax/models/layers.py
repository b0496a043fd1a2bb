"""The parts a decoder is built of: parameters with logical axes, projections, embedding, RMSNorm.

Modules hold weights and static sizes only, never a mesh; they are built and called under `jax.set_mesh`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.add_rms_norm import add_rms_norm
from qjax.kernels.elementwise import rms_norm
from qjax.kernels.grouped_matmul import grouped_matmul
from qjax.kernels.small_matmul import small_matmul

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


def matmul(
    x: jax.Array, kernel: jax.Array, inputs: tuple[int, ...] = (0,), *, out_dtype: Any = None, out_sharding: Any = None
) -> jax.Array:
    """x [T, *inputs] times kernel, over the kernel's axes `inputs` and x's last ones, summed in float32.

    Args:
      out_dtype: what the sum is rounded to [x's dtype].
    """
    # dot_general keeps the axes in the order they lie in, so that XLA sees one 2-D GEMM; an einsum over several
    # axes sorts them by letter, which copies the weight in every step. The GEMM rounds its own float32 sums: a
    # float32 result cast afterwards costs a kernel more. tf32 only where the weights are not float32.
    first = x.ndim - len(inputs)
    return jax.lax.dot_general(
        x,
        kernel,
        ((tuple(range(first, x.ndim)), inputs), ((), ())),
        precision=jax.lax.Precision.HIGHEST if kernel.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype or x.dtype,
        out_sharding=out_sharding,
    )


def gate(gate_up: jax.Array) -> jax.Array:
    """SwiGLU's product: [P, T, 2, F] → [P, T, F]."""
    return jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]


class Linear(nnx.Module):
    """x [T, *inputs] times kernel [*inputs, *outputs] (+ bias [*outputs]), in x's dtype.

    Args:
      shape, axes: of the kernel, whose first `num_inputs` axes are summed over.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        num_inputs: int = 1,
        use_bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
    ):
        self.inputs = tuple(range(num_inputs))
        self.axes, self.out_axes = axes, axes[num_inputs:]
        self.kernel = parameter(shape, axes, dtype, rngs=rngs)
        self.bias = parameter(shape[num_inputs:], self.out_axes, dtype, rngs=None) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # A kernel split on a summed axis leaves partial sums: out_sharding asks for the all-reduce.
        out_sharding = sharding.spec_like(x, *self.out_axes)
        y = matmul(x, self.kernel[...], self.inputs, out_sharding=out_sharding)
        return y if self.bias is None else y + self.bias[...]

    def parts(self, x: jax.Array, implementation: str | None, *, is_gated: bool = False) -> jax.Array:
        """[P, T, *outputs] that adds up to what a call gives: float32 where the sum is left to the next kernel.

        `is_gated`: [1, T, F] of outputs [2, F], the second times the silu of the first.
        """
        is_split = sharding.tensor_parallel_size(jax.sharding.get_abstract_mesh()) > 1
        if implementation == "reference" or is_split or self.bias is not None:
            return gate(self(x)[None]) if is_gated else self(x)[None]
        inputs, shape = self.axes[: len(self.inputs)], self.kernel.shape[len(self.inputs) + is_gated :]

        def on_device(x, kernel):
            rows = x.reshape(x.shape[0], -1)
            kernel = kernel.reshape(rows.shape[1], -1)
            parts = small_matmul(rows, kernel, is_gated=is_gated, implementation=implementation)
            return (parts.reshape(parts.shape[0], x.shape[0], *shape),)

        out_axes = ("parts", "tokens", *self.out_axes[is_gated:])
        on_devices = sharding.per_shard(on_device, in_axes=(("tokens", *inputs), self.axes), out_axes=(out_axes,))
        return on_devices(x, self.kernel[...])[0]


class ExpertsLinear(nnx.Module):
    """One projection of all experts: `kernel` [E, inputs, outputs], of gate and up together [E, inputs, 2, outputs].

    `product` runs on a device, on its part of `weights`: rows [R, inputs] and the work list of `grouped_matmul`.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.axes = axes
        self.kernel = parameter(shape, axes, dtype, rngs=rngs)

    @property
    def weights(self) -> tuple[tuple[nnx.Param, tuple[str, ...]], ...]:
        return ((self.kernel, self.axes),)

    product = staticmethod(grouped_matmul)


class Embedding(nnx.Module):
    """Rows of `weight` [V, D], split on V: each device looks up what it holds, one all-reduce adds them up."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.weight = parameter((vocab_size, hidden_size), ("vocab", "embed"), dtype, rngs=rngs)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """int32 [T] → [T, D]."""
        return self.weight[...].at[token_ids].get(out_sharding=sharding.spec_like(token_ids, "embed"))


class RMSNorm(nnx.Module):
    """Over the last axis."""

    def __init__(self, size: int, axis: str, eps: float, *, dtype: jnp.dtype):
        self.eps = eps
        self.weight = parameter((size,), (axis,), dtype, rngs=None, init=1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)

    def after(self, x: jax.Array, parts: jax.Array | None, implementation: str | None) -> tuple[jax.Array, jax.Array]:
        """x + parts and the norm of that, [T, D]; `parts` [P, T, D] is what the block before adds to the residual."""
        if parts is None:
            return x, self(x)
        run = functools.partial(add_rms_norm, eps=self.eps, implementation=implementation)
        if implementation == "reference":
            return run(x, parts, self.weight[...])
        rows = ("tokens", "embed")
        on_shards = sharding.per_shard(run, in_axes=(rows, ("parts", *rows), ("embed",)), out_axes=(rows, rows))
        return on_shards(x, parts, self.weight[...])
