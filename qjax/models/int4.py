"""Weights of 4 bits a number: of a projection, and of all experts of a layer."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from qjax.kernels.int4_matmul import CELL_OUTPUTS, CELL_WORDS, GROUP, grouped_int4_matmul, int4_matmul
from qjax.models.layers import parameter
from qjax.models.quantized import QuantizedLinear, Weights, check_has_no_rngs

WORD = jnp.dtype("int32")


def groups_of(inputs: tuple[int, ...]) -> tuple[int, ...]:
    """Groups of inputs [..., H] on each axis. Of smaller heads all lie on the last: no device can split them."""
    if inputs[-1] % GROUP:
        inputs = (*(1 for _ in inputs[:-1]), math.prod(inputs))
    return (*inputs[:-1], inputs[-1] // GROUP)


def cells_of(outputs: tuple[int, ...]) -> tuple[int, ...]:
    return (*outputs[:-1], outputs[-1] // CELL_OUTPUTS, CELL_WORDS)


class Int4Linear(QuantizedLinear):
    """x [T, *inputs] times (q - zero) * scale [*inputs, *outputs] (+ bias), in x's dtype.

    `words` and `scales_zeros` are `int4_matmul`'s, with the kernel's axes: the last input axis counts groups, the last
    output axis of `words` counts cells, and behind it lie the words of a cell. So each device has what its part needs.
    """

    method = "int4"

    def make_weights(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        self.axes, groups = (*self.in_axes, *self.out_axes), groups_of(inputs)
        self.words = parameter((*groups, *cells_of(outputs)), (*self.axes, "cell_words"), WORD, rngs=None)
        self.scales_zeros = parameter((*groups, *outputs), self.axes, WORD, rngs=None)

    @property
    def weights(self) -> Weights:
        return (self.words, (*self.axes, "cell_words")), (self.scales_zeros, self.axes)

    def product(self, rows: jax.Array, *weights: jax.Array, implementation: str | None) -> jax.Array:
        words, scales_zeros = weights
        num_inputs = len(self.in_axes)
        groups, outputs = math.prod(words.shape[:num_inputs]), scales_zeros.shape[num_inputs:]
        words, scales_zeros = words.reshape(groups, -1, CELL_WORDS), scales_zeros.reshape(groups, -1)
        parts = int4_matmul(rows, words, scales_zeros, implementation=implementation)
        return parts.reshape(*parts.shape[:2], *outputs)


class Int4Experts(nnx.Module):
    """`ExpertsLinear`'s in 4 bits: `words` and `scales_zeros` as `Int4Linear`'s, behind the axis of the experts."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        del dtype
        check_has_no_rngs("int4", rngs)
        (E, D), outputs, self.axes = shape[:2], shape[2:], axes
        self.words = parameter((E, D // GROUP, *cells_of(outputs)), (*axes, "cell_words"), WORD, rngs=None)
        self.scales_zeros = parameter((E, D // GROUP, *outputs), axes, WORD, rngs=None)

    @property
    def weights(self) -> Weights:
        return (self.words, (*self.axes, "cell_words")), (self.scales_zeros, self.axes)

    product = staticmethod(grouped_int4_matmul)
