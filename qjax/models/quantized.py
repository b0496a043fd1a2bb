"""A projection whose weight is quantised: the same calls as `Linear`'s, other parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.models.config import ModelConfig
from qjax.models.layers import Linear, matmul, parameter
from qjax.quantization.config import TENSORS
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


def projection(
    config: ModelConfig, name: str, shape: tuple[int, ...], axes: tuple[str, ...], **options: Any
) -> Linear | QuantizedLinear:
    """The module called `name` in the checkpoint, as the checkpoint stores it; `options` as `Linear` takes them."""
    if config.quantization is None or not config.quantization.covers(name):
        return Linear(shape, axes, **options)
    return QuantizedLinear(config.quantization.method, shape, axes, **options)
