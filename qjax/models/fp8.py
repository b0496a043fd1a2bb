"""Weights of FP8 checkpoints: of a projection, and of all experts of a layer."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from qjax import sharding
from qjax.kernels.fp8_matmul import fp8_matmul, grouped_fp8_matmul
from qjax.models.layers import parameter
from qjax.models.quantized import QuantizedLinear, Weights, check_has_no_rngs
from qjax.quantization.config import GROUP, TENSORS

WEIGHT, SCALE = (jnp.dtype(TENSORS["fp8"][kind].dtype) for kind in ("weight", "weight_scale_inv"))


def blocks_of(size: int, axis: str) -> int:
    """Blocks along an axis: of 128, or of the largest divisor of it that also divides what one device holds."""
    return size // math.gcd(GROUP, size // sharding.num_shards(axis))


class FP8Linear(QuantizedLinear):
    """x [T, *inputs] times an e4m3 weight [*outputs, *inputs] with a float32 scale for each block (+ bias).

    The weight lies as in the checkpoint, as FP8 tensor cores want the summed axis last. The axes of `weight_scale_inv`
    are the weight's, the last output and the last input axis counting `blocks_of`. So each device has the scales of its
    part.
    """

    method = "fp8"

    def make_weights(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        self.axes = (*self.out_axes, *self.in_axes)
        self.weight = parameter((*outputs, *inputs), self.axes, WEIGHT, rngs=None)
        blocks = [
            (*sizes[:-1], blocks_of(sizes[-1], names[-1]))
            for sizes, names in ((outputs, self.out_axes), (inputs, self.in_axes))
        ]
        self.weight_scale_inv = parameter((*blocks[0], *blocks[1]), self.axes, SCALE, rngs=None)

    @property
    def weights(self) -> Weights:
        return (self.weight, self.axes), (self.weight_scale_inv, self.axes)

    def product(self, rows: jax.Array, *weights: jax.Array, implementation: str | None) -> jax.Array:
        weight, scale = weights
        num_outputs = len(self.out_axes)
        blocks = scale.reshape(math.prod(scale.shape[:num_outputs]), -1)
        parts = fp8_matmul(rows, weight.reshape(-1, rows.shape[1]), blocks, implementation=implementation)
        return parts.reshape(*parts.shape[:2], *weight.shape[:num_outputs])


class FP8Experts(nnx.Module):
    """`ExpertsLinear`'s in e4m3: `weight` [E, (2,) outputs, inputs] and a scale for each block, as of `FP8Linear`."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        del dtype
        check_has_no_rngs("fp8", rngs)
        order = (0, *range(2, len(shape)), 1)
        shape, self.axes = tuple(shape[i] for i in order), tuple(axes[i] for i in order)
        blocks = (*shape[:-2], *(blocks_of(size, axis) for size, axis in zip(shape[-2:], self.axes[-2:], strict=True)))
        self.weight = parameter(shape, self.axes, WEIGHT, rngs=None)
        self.weight_scale_inv = parameter(blocks, self.axes, SCALE, rngs=None)

    @property
    def weights(self) -> Weights:
        return (self.weight, self.axes), (self.weight_scale_inv, self.axes)

    product = staticmethod(grouped_fp8_matmul)
