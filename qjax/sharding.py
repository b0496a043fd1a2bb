"""Which device holds what: the mesh, the logical axes' rules, KV-head replication. No other file names a mesh axis.

Arrays are annotated with logical axes ("vocab", "kv_heads", …); `RULES` says which of them tensor parallelism
splits. Mesh axes are Explicit: every array's type carries its sharding, so a missing collective is a trace error.
`jax.set_mesh(mesh)` is thread-local: the thread that builds or traces a model enters it itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

_DATA, _TENSOR = "data", "tensor"

RULES: tuple[tuple[str, str | None], ...] = (
    ("vocab", _TENSOR),
    ("kv_heads", _TENSOR),  # a KV head travels with its query heads
    ("mlp", _TENSOR),  # also of each expert
    ("experts", None),
    ("split_experts", _TENSOR),  # this and the next: of weights with expert parallelism
    ("whole_mlp", None),
    ("experts_of_token", None),
    ("embed", None),
    ("heads_of_kv", None),  # the query heads of one KV head; in a fused qkv kernel also its k and v
    ("head_dim", None),
    ("gate_up", None),
    ("layers", None),
    ("keys_values", None),
    ("pages", None),
    ("page_slots", None),
    ("tokens", None),
    ("rows", _DATA),  # tokens of packed training rows, row after row
    ("rank", None),  # of a LoRA adapter
    ("parts", None),  # of a sum that is yet to be taken
    ("cell_words", None),  # of int4 weights
)
KV_CACHE_AXES = ("layers", "keys_values", "pages", "kv_heads", "page_slots", "head_dim")
KV_SCALES_AXES = ("keys_values", "kv_heads")  # of one layer


def make_mesh(
    tensor_parallel_size: int, devices: Sequence[jax.Device] | None = None, *, data_parallel_size: int = 1
) -> Mesh:
    """Mesh over the first of `devices` [all of `jax.devices()`], data parallel (training only) × tensor parallel.

    Raises:
      ValueError: there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if not 1 <= tensor_parallel_size <= len(devices):
        raise ValueError(f"tensor_parallel_size={tensor_parallel_size}, but {len(devices)} device(s) are there.")
    size = tensor_parallel_size * data_parallel_size
    if not 1 <= size <= len(devices):
        raise ValueError(
            f"data_parallel_size={data_parallel_size} with tensor_parallel_size={tensor_parallel_size} needs "
            f"{size} devices, but {len(devices)} are there."
        )
    return jax.make_mesh((data_parallel_size, tensor_parallel_size), (_DATA, _TENSOR), devices=devices[:size])


def tensor_parallel_size(mesh: Mesh | AbstractMesh) -> int:
    return mesh.shape[_TENSOR]


def data_parallel_size(mesh: Mesh) -> int:
    return mesh.shape[_DATA]


def num_shards(axis: str) -> int:
    """Into how many parts the mesh of `jax.set_mesh` splits a logical axis."""
    mesh_axis = dict(RULES)[axis]
    return 1 if mesh_axis is None else jax.sharding.get_abstract_mesh().shape[mesh_axis]


def shard_index(axis: str) -> jax.Array | int:
    """In a function of `per_shard`: which of the `num_shards` parts of a logical axis this device has."""
    mesh_axis = dict(RULES)[axis]
    return 0 if mesh_axis is None else jax.lax.axis_index(mesh_axis)


def sum_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """In a function of `per_shard`: the sum over all devices that hold other parts of the logical `axes`."""
    mesh_axes = tuple(sorted({dict(RULES)[axis] or "" for axis in axes if num_shards(axis) > 1}))
    return jax.lax.psum(x, mesh_axes) if mesh_axes else x


def spec(*axes: str | None) -> PartitionSpec:
    """Logical axes → mesh axes. Raises KeyError for an axis that `RULES` does not list."""
    rules = dict(RULES)
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def spec_like(x: jax.Array, *axes: str | None) -> PartitionSpec:
    """Spec of an array whose first axis is split as `x`'s first one is (tokens) and whose others are `axes`."""
    return PartitionSpec(jax.typeof(x).sharding.spec[0], *spec(*axes))


def token_axis(x: jax.Array) -> str:
    """The logical first axis of x [T, ...] for `per_shard`: "rows" in training, where devices split T, or "tokens"."""
    return "tokens" if jax.typeof(x).sharding.spec[0] is None else "rows"


def named_sharding(mesh: Mesh | AbstractMesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*axes))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """What every input of a step has besides weights and KV cache."""
    return NamedSharding(mesh, PartitionSpec())


def kv_cache_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of the cache [L, 2, P, K, S, H], split on K."""
    return named_sharding(mesh, *KV_CACHE_AXES)


def kv_page_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of a page of the cache [L, 2, K, S, H], split on K."""
    return named_sharding(mesh, *(axis for axis in KV_CACHE_AXES if axis != "pages"))


def on_devices(mesh: Mesh | AbstractMesh, x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an abstract array with its sharding bound to the mesh's devices."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))


def split_heads(num_heads: int, num_kv_heads: int, tp: int) -> tuple[int, int]:
    """(K, G): KV heads over all devices together, and query heads of each, on `tp` devices.

    Where tp > num_kv_heads each KV head is held tp / num_kv_heads times, every copy with its share of the queries;
    K is then `tp`. The KV cache is made with this K.

    Raises:
      ValueError: the heads cannot be split evenly.
    """
    copies = max(1, tp // num_kv_heads)
    if num_heads % tp or num_kv_heads * copies % tp:
        raise ValueError(
            f"tensor_parallel_size={tp} does not split num_attention_heads={num_heads} and "
            f"num_key_value_heads={num_kv_heads} evenly."
        )
    return num_kv_heads * copies, num_heads // (num_kv_heads * copies)


def check_split(tp: int, **sizes: int) -> None:
    """Raises ValueError naming the first of `sizes` that `tp` does not divide."""
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(f"tensor_parallel_size={tp} does not divide {name}={size}.")


def per_shard(
    fn: Callable[..., Any], in_axes: tuple[tuple[str, ...] | None, ...], out_axes: tuple[tuple[str, ...] | None, ...]
) -> Callable[..., Any]:
    """`fn` run on every device with the part of each argument that lies there: kernels know no mesh.

    Args:
      in_axes: logical axes of each argument; None: whole on every device (may be a pytree).
      out_axes: the same of each of the results.
    """

    def specs(arguments: tuple[tuple[str, ...] | None, ...]) -> tuple[PartitionSpec, ...]:
        return tuple(spec(*(axes or ())) for axes in arguments)

    return jax.shard_map(fn, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)
