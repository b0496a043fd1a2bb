"""Plain weights to FP8 while they are loaded: on the devices, one leaf after the other, each device its own part."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from qjax.kernels.fp8_matmul.reference import quantize
from qjax.quantization.config import Quantization

SCALE = ".weight_scale_inv"


def scales_to_make(quantization: Quantization | None, paths: Sequence[str]) -> dict[int, int]:
    """The places of weights that are quantised here, and of their scales, which no file has."""
    if quantization is None or not quantization.is_made:
        return {}
    places = {path: i for i, path in enumerate(paths)}
    return {places[path.removesuffix(SCALE) + ".weight"]: i for path, i in places.items() if path.endswith(SCALE)}


def as_read(leaf: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    """The leaf before it is quantised."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)


def quantize_on_devices(weight: jax.Array, scale: jax.ShapeDtypeStruct) -> tuple[jax.Array, jax.Array]:
    """The weight in e4m3 and its scales, of the shape and sharding that `scale` says."""
    sharding: Any = scale.sharding
    return _quantizer(sharding.mesh, sharding.spec, sharding.shard_shape(scale.shape))(weight)


@functools.cache
def _quantizer(mesh: Mesh, spec: PartitionSpec, scale_shape: tuple[int, ...]):
    on_device = functools.partial(quantize, scale_shape=scale_shape)
    return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(spec,), out_specs=(spec, spec)))
