"""A projection whose weight has 4 bits a number: the same calls as `Linear`'s, other parameters."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.int4_matmul import CELL_OUTPUTS, CELL_WORDS, GROUP, int4_matmul
from qjax.models.layers import parameter


def groups_of(inputs: tuple[int, ...]) -> tuple[int, ...]:
    """Groups of inputs [..., H] on each axis. Of smaller heads all lie on the last: no device can split them."""
    if inputs[-1] % GROUP:
        inputs = (*(1 for _ in inputs[:-1]), math.prod(inputs))
    return (*inputs[:-1], inputs[-1] // GROUP)


class Int4Linear(nnx.Module):
    """x [T, *inputs] times (q - zero) * scale [*inputs, *outputs] (+ bias), in x's dtype.

    `words` and `scales_zeros` are `int4_matmul`'s, with the kernel's axes: the last input axis counts groups, the last
    output axis of `words` counts cells, and behind it lie the words of a cell. So each device has what its part needs.

    Args:
      shape, axes: of the kernel, whose first `num_inputs` axes are summed over.
      dtype: of the bias.
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
        if rngs is not None:
            raise NotImplementedError("a quantised (int4) module has no random weights: use dummy_params.")
        self.axes, self.in_axes, self.out_axes = axes, axes[:num_inputs], axes[num_inputs:]
        inputs, outputs = shape[:num_inputs], shape[num_inputs:]
        groups = groups_of(inputs)
        cells = (*outputs[:-1], outputs[-1] // CELL_OUTPUTS, CELL_WORDS)
        self.words = parameter((*groups, *cells), (*axes, "cell_words"), jnp.dtype("int32"), rngs=None)
        self.scales_zeros = parameter((*groups, *outputs), axes, jnp.dtype("int32"), rngs=None)
        self.bias = parameter(outputs, self.out_axes, dtype, rngs=None) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.sum(self._parts(x, None), axis=0).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]

    def parts(self, x: jax.Array, implementation: str | None) -> jax.Array:
        """[P, T, *outputs]: see `Linear.parts`."""
        return self._parts(x, implementation) if self.bias is None else self(x)[None]

    def _parts(self, x: jax.Array, implementation: str | None) -> jax.Array:
        num_inputs = len(self.in_axes)

        def on_device(x, words, scales_zeros):
            rows = x.reshape(x.shape[0], -1)
            groups, outputs = math.prod(words.shape[:num_inputs]), scales_zeros.shape[num_inputs:]
            words, scales_zeros = words.reshape(groups, -1, CELL_WORDS), scales_zeros.reshape(groups, -1)
            parts = int4_matmul(rows, words, scales_zeros, implementation=implementation)
            if any(sharding.num_shards(axis) > 1 for axis in self.in_axes):
                parts = sharding.sum_over(jnp.sum(parts, axis=0, keepdims=True).astype(x.dtype), self.in_axes)
            return (parts.reshape(parts.shape[0], x.shape[0], *outputs),)

        in_axes = (("tokens", *self.in_axes), (*self.axes, "cell_words"), self.axes)
        on_devices = sharding.per_shard(on_device, in_axes=in_axes, out_axes=(("parts", "tokens", *self.out_axes),))
        return on_devices(x, self.words[...], self.scales_zeros[...])[0]
