"""What the projections of quantised checkpoints share: the same calls as `Linear`'s, other parameters."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.elementwise import sum_parts
from qjax.models.layers import gate, parameter

type Weights = tuple[tuple[nnx.Param, tuple[str, ...]], ...]  # parameters and the logical axes of each


class QuantizedLinear(nnx.Module):
    """x [T, *inputs] times a quantised kernel [*inputs, *outputs] (+ bias [*outputs]), in x's dtype.

    Args:
      shape, axes: of the kernel, whose first `num_inputs` axes are summed over.
      dtype: of the bias.
    """

    method: ClassVar[str]

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
        check_has_no_rngs(self.method, rngs)
        self.in_axes, self.out_axes = axes[:num_inputs], axes[num_inputs:]
        self.make_weights(shape[:num_inputs], shape[num_inputs:])
        self.bias = parameter(shape[num_inputs:], self.out_axes, dtype, rngs=None) if use_bias else None

    def make_weights(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        raise NotImplementedError

    @property
    def weights(self) -> Weights:
        raise NotImplementedError

    def product(self, rows: jax.Array, *weights: jax.Array, implementation: str | None) -> jax.Array:
        """On one device: rows [T, D] → parts [P, T, *outputs]."""
        raise NotImplementedError

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.sum(self._parts(x, None), axis=0).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]

    def parts(self, x: jax.Array, implementation: str | None, *, is_gated: bool = False) -> jax.Array:
        """[P, T, *outputs]: see `Linear.parts`."""
        parts = self._parts(x, implementation) if self.bias is None else self(x)[None]
        return gate(sum_parts(parts, x.dtype)[None]) if is_gated else parts

    def _parts(self, x: jax.Array, implementation: str | None) -> jax.Array:
        def on_device(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array]:
            parts = self.product(x.reshape(x.shape[0], -1), *weights, implementation=implementation)
            if any(sharding.num_shards(axis) > 1 for axis in self.in_axes):
                parts = sharding.sum_over(jnp.sum(parts, axis=0, keepdims=True).astype(x.dtype), self.in_axes)
            return (parts,)

        in_axes = (("tokens", *self.in_axes), *(axes for _, axes in self.weights))
        on_devices = sharding.per_shard(on_device, in_axes=in_axes, out_axes=(("parts", "tokens", *self.out_axes),))
        return on_devices(x, *(weight[...] for weight, _ in self.weights))[0]


def check_has_no_rngs(method: str, rngs: Any) -> None:
    if rngs is not None:
        raise NotImplementedError(f"a quantised ({method}) module has no random weights: use dummy_params.")
