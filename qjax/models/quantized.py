"""A projection whose weight is quantised: the same calls as `Linear`'s, other parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.fp8_matmul import fp8_matmul
from qjax.models.config import ModelConfig
from qjax.models.int4 import Int4Linear
from qjax.models.layers import Linear, parameter
from qjax.quantization.config import GROUP, TENSORS


class FP8Linear(nnx.Module):
    """x [T, *inputs] times an e4m3 weight [*outputs, *inputs] with a float32 scale for each block (+ bias).

    The weight lies as in the checkpoint, as FP8 tensor cores want the summed axis last. The axes of `weight_scale_inv`
    are the weight's, the last output and the last input axis shorter by the side of a block: 128, or the largest
    divisor of it that also divides what one device holds. So each device has the scales of its part.

    Args:
      shape, axes: of the kernel [*inputs, *outputs], whose first `num_inputs` axes are summed over.
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
            raise NotImplementedError("a quantised (fp8) module has no random weights: use dummy_params.")
        self.in_axes, self.out_axes = axes[:num_inputs], axes[num_inputs:]
        self.axes = (*self.out_axes, *self.in_axes)
        inputs, outputs = shape[:num_inputs], shape[num_inputs:]
        tensors = TENSORS["fp8"]
        self.weight = parameter((*outputs, *inputs), self.axes, jnp.dtype(tensors["weight"].dtype), rngs=None)
        blocks = [
            (*sizes[:-1], sizes[-1] // math.gcd(GROUP, sizes[-1] // sharding.num_shards(names[-1])))
            for sizes, names in ((outputs, self.out_axes), (inputs, self.in_axes))
        ]
        scale = tensors["weight_scale_inv"]
        self.weight_scale_inv = parameter((*blocks[0], *blocks[1]), self.axes, jnp.dtype(scale.dtype), rngs=None)
        self.bias = parameter(outputs, self.out_axes, dtype, rngs=None) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.sum(self._parts(x, None), axis=0).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]

    def parts(self, x: jax.Array, implementation: str | None) -> jax.Array:
        """[P, T, *outputs]: see `Linear.parts`."""
        return self._parts(x, implementation) if self.bias is None else self(x)[None]

    def _parts(self, x: jax.Array, implementation: str | None) -> jax.Array:
        num_outputs = len(self.out_axes)

        def on_device(x, weight, scale):
            rows = x.reshape(x.shape[0], -1)
            blocks = scale.reshape(math.prod(scale.shape[:num_outputs]), -1)
            parts = fp8_matmul(rows, weight.reshape(-1, rows.shape[1]), blocks, implementation=implementation)
            if any(sharding.num_shards(axis) > 1 for axis in self.in_axes):
                parts = sharding.sum_over(jnp.sum(parts, axis=0, keepdims=True).astype(x.dtype), self.in_axes)
            return (parts.reshape(parts.shape[0], x.shape[0], *weight.shape[:num_outputs]),)

        in_axes = (("tokens", *self.in_axes), self.axes, self.axes)
        on_devices = sharding.per_shard(on_device, in_axes=in_axes, out_axes=(("parts", "tokens", *self.out_axes),))
        return on_devices(x, self.weight[...], self.weight_scale_inv[...])[0]


def projection(
    config: ModelConfig, name: str, shape: tuple[int, ...], axes: tuple[str, ...], **options: Any
) -> Linear | Int4Linear | FP8Linear:
    """The module called `name` in the checkpoint, as the checkpoint stores it; `options` as `Linear` takes them."""
    if config.quantization is None or not config.quantization.covers(name):
        return Linear(shape, axes, **options)
    return (Int4Linear if config.quantization.is_int4 else FP8Linear)(shape, axes, **options)
