"""A projection whose weight is quantised: the same calls as `Linear`'s, other parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.fp8_matmul import fp8_matmul
from qjax.models.config import ModelConfig
from qjax.models.layers import Linear, matmul, parameter
from qjax.quantization.config import GROUP, TENSORS
from qjax.quantization.dequantize import dequantize


class QuantizedLinear(nnx.Module):
    """x [T, *inputs] times the dequantised kernel [*inputs, *outputs] (+ bias), in x's dtype.

    The parameters are those of `quantization.config.TENSORS[method]`, with the kernel's axes; each device holds the
    scales of its part, so dequantising needs no other device.

    Args:
      shape, axes: of the kernel, whose first `num_inputs` axes are summed over.
      dtype: of the bias.
    """

    def __init__(
        self,
        method: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        num_inputs: int = 1,
        use_bias: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None,
    ):
        if rngs is not None:
            raise NotImplementedError(f"a quantised ({method}) module has no random weights: use dummy_params.")
        self.method, self.axes = method, axes
        self.inputs, self.out_axes = tuple(range(num_inputs)), axes[num_inputs:]
        for name, stored in TENSORS[method].items():
            value = parameter(stored.shape(shape, num_inputs), axes, jnp.dtype(stored.dtype), rngs=None)
            setattr(self, name, value)
        self.bias = parameter(shape[num_inputs:], self.out_axes, dtype, rngs=None) if use_bias else None

    def weight(self, dtype: Any) -> jax.Array:
        """The kernel, dequantised: each device its part."""
        names = tuple(TENSORS[self.method])

        def on_device(*tensors):
            return (dequantize(self.method, dict(zip(names, tensors, strict=True)), dtype),)

        on_devices = sharding.per_shard(on_device, in_axes=(self.axes,) * len(names), out_axes=(self.axes,))
        return on_devices(*(getattr(self, name)[...] for name in names))[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        out_sharding = sharding.spec_like(x, *self.out_axes)
        y = matmul(x, self.weight(x.dtype), self.inputs, out_sharding=out_sharding)
        return y if self.bias is None else y + self.bias[...]

    def parts(self, x: jax.Array, implementation: str | None) -> jax.Array:
        """[1, T, *outputs]: see `Linear.parts`."""
        return self(x)[None]


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
) -> Linear | QuantizedLinear | FP8Linear:
    """The module called `name` in the checkpoint, as the checkpoint stores it; `options` as `Linear` takes them."""
    if config.quantization is None or not config.quantization.covers(name):
        return Linear(shape, axes, **options)
    if config.quantization.method == "fp8":
        return FP8Linear(shape, axes, **options)
    return QuantizedLinear(config.quantization.method, shape, axes, **options)
