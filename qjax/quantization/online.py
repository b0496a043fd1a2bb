"""Plain weights quantised while they are loaded: on the devices, one leaf after the other, each device its own part."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qjax.kernels.fp8_matmul.reference import quantize as quantize_fp8
from qjax.kernels.int4_matmul import quantize_packed
from qjax.quantization.config import GROUP, Quantization

SCALES = {"weight": "weight_scale_inv", "words": "scales_zeros"}  # what is made beside what, by FP8 and by int4


def scales_to_make(quantization: Quantization | None, paths: Sequence[str]) -> dict[int, int]:
    """The places of weights that are quantised here, and of their scales, which no file has."""
    if quantization is None or not quantization.is_made:
        return {}
    places = {path: i for i, path in enumerate(paths)}
    owners = {i: path.rpartition(".") for path, i in places.items()}
    made = {i: places.get(f"{owner}.{SCALES.get(kind)}") for i, (owner, _, kind) in owners.items()}
    return {i: scale for i, scale in made.items() if scale is not None}


def as_read(path: str, leaf: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    """The weight at `path` before it is quantised: in FP8's shape, or as the kernel [*inputs, *outputs] for int4."""
    if leaf.dtype != jnp.int32:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    last_input = 2 if path.endswith("o_proj.words") else int(".experts." in path)
    shape = [size * GROUP if axis == last_input else size for axis, size in enumerate(scale.shape)]
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=scale.sharding)


def quantize_on_devices(
    weight: jax.Array, leaf: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct, *, is_of_experts: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The weight quantised and its scales, of the shapes and shardings that `leaf` and `scale` say."""
    source: Any = weight.sharding
    shardings: tuple[Any, Any] = leaf.sharding, scale.sharding
    shapes = shardings[0].shard_shape(leaf.shape), shardings[1].shard_shape(scale.shape)
    specs = (source.spec, shardings[0].spec, shardings[1].spec)
    return _quantizer(shardings[1].mesh, specs, *shapes, is_of_experts)(weight)


@functools.cache
def _quantizer(
    mesh: Mesh,
    specs: tuple[PartitionSpec, ...],
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    is_of_experts: bool,
) -> Any:
    def of_one(weight: jax.Array, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        if weight.shape == shape:
            return quantize_fp8(weight, scale_shape)
        last_input = next(axis for axis, size in enumerate(scale_shape) if size != weight.shape[axis])
        words, scales = quantize_packed(weight.reshape(math.prod(weight.shape[: last_input + 1]), -1))
        return words.reshape(shape), scales.reshape(scale_shape)

    def on_device(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        if not is_of_experts:
            return of_one(weight, shape, scale_shape)
        return jax.lax.map(lambda expert: of_one(expert, shape[1:], scale_shape[1:]), weight)  # one after the other

    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(specs[0],), out_specs=specs[1:]))
