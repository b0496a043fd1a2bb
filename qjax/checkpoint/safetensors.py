"""Weights from and to safetensors folders of Hugging Face's layout, and random weights where there is no folder.

A file is mapped into memory; each device's part of each leaf is cut from the mapping, so the host holds a few
parts at a time and never a model. Everything is checked before the first byte goes to a device.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from tqdm import tqdm

from qjax import sharding
from qjax.checkpoint.kv_scales import with_kv_scales
from qjax.checkpoint.leaf import Leaf, contiguous
from qjax.checkpoint.names import leaf_of
from qjax.models.config import ModelConfig
from qjax.models.layers import INIT_STDDEV
from qjax.models.qwen3 import ModelDef, abstract_model
from qjax.quantization.config import SUPPORTED
from qjax.quantization.int4 import pack_scales
from qjax.quantization.online import as_read, quantize_on_devices, scales_to_make

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MODELOPT_NAME = "hf_quant_config.json"
FLOATS = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
# Those of quantised weights are never converted.
DTYPES = FLOATS | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "I32": np.dtype(np.int32)}
# Of dummy weights: numbers of the size that normal(0.02) has once dequantised; int4's zero points are all 8.
INT4_FILL = int(pack_scales(np.full((1, 1), INIT_STDDEV / 4.6), np.full((1, 1), 8))[0, 0])
FILLS = {"bias": 0, "weight": 1, "weight_scale_inv": INIT_STDDEV, "scales_zeros": INT4_FILL}
NUM_READERS = min(16, os.cpu_count() or 1)  # threads; each holds one device's part of one leaf


def load_params(
    folder: str | os.PathLike,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    dtype: Any,
    *,
    progress: bool | None = None,
) -> tuple[jax.Array, ...]:
    """The leaves of `abstract_model(config, dtype, mesh)`, read from a folder; each device reads only its part.

    Args:
      progress: show a bar; None: where stderr is a terminal.
    Raises:
      ValueError: the folder is no checkpoint of this model; the message names the file or the tensor.
    """
    check_not_modelopt(folder)
    modeldef, leaves = abstract_model(config, dtype, mesh)
    rules = _rules(config, mesh, modeldef)
    tensors = with_kv_scales(full_names(open_folder(folder)), config)
    scales = scales_to_make(config.quantization, modeldef.paths)
    sources = {i: leaf for i, leaf in enumerate(leaves) if i not in set(scales.values())}
    sources |= {i: as_read(modeldef.paths[i], leaves[i], leaves[scale], dtype) for i, scale in scales.items()}
    _check_tensors(tensors, [rules[i] for i in sources], sources.values(), config, folder)

    total = sum(tensors[name].nbytes for i in sources for name in rules[i].shapes)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="Loading weights",
        disable=None if progress is None else not progress,
    ) as bar:

        def load(i: int) -> dict[int, jax.Array]:
            made = {i: _place(rules[i], sources[i], tensors)}
            if i in scales:
                is_of_experts = ".experts." in modeldef.paths[i]
                pair = quantize_on_devices(made[i], leaves[i], leaves[scales[i]], is_of_experts=is_of_experts)
                made[i], made[scales[i]] = pair
            jax.block_until_ready(made)  # the part's copy on the host is free again
            bar.update(sum(tensors[name].nbytes for name in rules[i].shapes))
            return made

        longest_first = sorted(sources, key=lambda i: modeldef.paths[i].startswith("layers."))
        pool = ThreadPoolExecutor(NUM_READERS, "qjax-load")
        try:
            arrays = {i: array for made in pool.map(load, longest_first) for i, array in made.items()}
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure (device memory is full), do not load the rest first
    return tuple(arrays[i] for i in range(len(leaves)))


def dummy_params(leaves: Iterable[jax.ShapeDtypeStruct], modeldef: ModelDef, seed: int = 0) -> tuple[jax.Array, ...]:
    """Random weights made on the devices: norms 1, biases 0, all else normal(0.02). The same on any mesh.

    Quantised weights are random and their scales one number, so that they are about normal(0.02) (AWQ's: uniform).
    """
    leaves = tuple(leaves)
    where = sharding.replicated(leaves[0].sharding.mesh)
    key = jax.jit(partial(jax.random.key, seed), out_shardings=where)()  # device_put has no keys on several hosts

    def make(i: int, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path.endswith((".bias", "norm.weight", ".weight_scale_inv", ".scales_zeros")):
            fill = np.full(leaf.shape, FILLS[path.rpartition(".")[2]], leaf.dtype)
            return jax.device_put(fill, leaf.sharding)
        return _random_leaf(key, i, shape=leaf.shape, dtype=leaf.dtype, where=leaf.sharding)

    return tuple(make(i, path, leaf) for i, (path, leaf) in enumerate(zip(modeldef.paths, leaves, strict=True)))


def save_params(
    leaves: Iterable[jax.Array], config: ModelConfig, folder: str | os.PathLike, mesh: jax.sharding.Mesh
) -> None:
    """Writes `model.safetensors` with Hugging Face's names and shapes, in the leaves' dtype, leaf after leaf.

    Raises:
      ValueError: the model is quantised.
    """
    config.check_not_quantized("save_params")
    leaves = tuple(leaves)
    modeldef, _ = abstract_model(config, leaves[0].dtype, mesh)
    rules = _rules(config, mesh, modeldef)
    code = next(code for code, dtype in DTYPES.items() if dtype == leaves[0].dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for rule in rules:
        for name, shape in rule.shapes.items():
            size = math.prod(shape) * DTYPES[code].itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(Path(folder) / SINGLE_NAME, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for rule, leaf in zip(rules, leaves, strict=True):
            for tensor in rule.write(np.asarray(leaf)).values():
                file.write(contiguous(tensor.view(f"u{tensor.itemsize}")).data)


def check_not_modelopt(folder: str | os.PathLike) -> None:
    """Raises ValueError where NVIDIA's ModelOpt quantised: older versions of it say so in a file of their own alone."""
    if (Path(folder) / MODELOPT_NAME).exists():
        raise ValueError(f"{folder}: {MODELOPT_NAME}: quant_method='modelopt' is not supported. {SUPPORTED}")


def open_folder(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """All tensors of a folder by name, mapped into memory and not yet read.

    Raises:
      ValueError: no safetensors there, a file of the index missing, truncated or with a dtype qjax does not read.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        try:
            weight_map = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX_NAME}: not a safetensors index: {error!r}.") from None
        files = {name: folder / name for name in sorted(set(weight_map.values()))}
        for name, path in files.items():
            if not path.is_file():
                raise ValueError(f"{folder}: {name} is missing, which {INDEX_NAME} lists.")
        tensors: dict[str, np.ndarray] = {}
        for path in files.values():
            tensors |= _open_file(path)
        for tensor, name in weight_map.items():
            if tensor not in tensors:
                raise ValueError(f"{folder / name}: tensor {tensor} is missing, which {INDEX_NAME} lists there.")
        return tensors
    if (folder / SINGLE_NAME).is_file():
        return _open_file(folder / SINGLE_NAME)
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
    hint = f" It has {', '.join(others[:3])}: convert it to safetensors." if others else ""
    raise ValueError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there.{hint}")


def full_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Qwen3-Embedding was saved without its output layer, and so without the prefix of all that is below it."""
    if "embed_tokens.weight" not in tensors:
        return tensors
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def _open_file(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path}: truncated: {size} bytes, its header alone should have {length}. Download it again."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: the header is not JSON: {error}. Download it again.") from None
    try:
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
                raise ValueError(f"tensor {name} has shape {list(shape)} and offsets {[start, stop]}")
            entries.append((name, str(entry["dtype"]), shape, start, stop))
        end = 0
        for start, stop, name in sorted((start, stop, name) for name, _, _, start, stop in entries):
            if start != end:
                raise ValueError(f"tensor {name} begins at byte {start}, the one before it ends at {end}")
            end = stop
        expected = 8 + length + end
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: the header is not that of a safetensors file: {error!r}. Download it again."
        ) from None
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise ValueError(f"{path}: {what}: {size} bytes instead of {expected}. Download it again.")
    data = np.memmap(path, np.uint8, mode="r", offset=8 + length) if entries else np.empty(0, np.uint8)
    tensors = {}
    for name, code, shape, start, stop in entries:
        dtype = DTYPES.get(code)
        if dtype is None:
            raise ValueError(f"{path}: tensor {name} has dtype {code}, expected one of {', '.join(DTYPES)}.")
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: tensor {name} has {stop - start} bytes for shape {list(shape)}.")
        tensors[name] = np.asarray(data[start:stop]).view(dtype).reshape(shape)
    return tensors


def _rules(config: ModelConfig, mesh: jax.sharding.Mesh, modeldef: ModelDef) -> list[Leaf]:
    tp = sharding.tensor_parallel_size(mesh)
    num_kv_heads, _ = sharding.split_heads(config.num_attention_heads, config.num_key_value_heads, tp)
    return [leaf_of(path, config, num_kv_heads, tp) for path in modeldef.paths]


def _check_tensors(
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Leaf],
    leaves: Iterable[jax.ShapeDtypeStruct],
    config: ModelConfig,
    folder: str | os.PathLike,
) -> None:
    expected: dict[str, tuple[tuple[int, ...], Any]] = {}
    for rule, leaf in zip(rules, leaves, strict=True):
        expected |= {name: (shape, rule.dtypes.get(name, leaf.dtype)) for name, shape in rule.shapes.items()}
    for name, (shape, dtype) in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name} {list(shape)} is missing.")
        if tensors[name].shape != shape:
            raise ValueError(f"{folder}: tensor {name} has shape {list(tensors[name].shape)}, expected {list(shape)}.")
        allowed = list(FLOATS.values()) if dtype in FLOATS.values() else [dtype]
        if tensors[name].dtype not in allowed:
            expects = ", ".join(map(str, allowed))
            raise ValueError(f"{folder}: tensor {name} has dtype {tensors[name].dtype}, expected {expects}.")
    for name in tensors:
        unused = name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")
        unused |= name == "score.weight"  # a converted reranker's: see checkpoint/pooling
        if name not in expected and not unused:
            raise ValueError(f"{folder}: tensor {name} is none of {config.architecture}'s.")


def _place(rule: Leaf, leaf: jax.ShapeDtypeStruct, tensors: Mapping[str, np.ndarray]) -> jax.Array:
    # numpy moves the standard integers without the interpreter lock, bfloat16 only with it.
    bits = {name: tensors[name].view(f"u{tensors[name].itemsize}") for name in rule.shapes}
    stored = tensors[next(iter(bits))].dtype
    is_remade = bool(rule.dtypes)

    def part(index: Any) -> np.ndarray:  # a slice for each axis
        start, stop, _ = index[rule.axis].indices(leaf.shape[rule.axis])
        if is_remade:
            return rule.read(tensors, start, stop)
        return rule.read(bits, start, stop).view(stored).astype(leaf.dtype, copy=False)

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


@partial(jax.jit, static_argnames=("shape", "dtype", "where"))  # compiled once a shape, not once a leaf
def _random_leaf(
    key: jax.Array, index: int, *, shape: tuple[int, ...], dtype: Any, where: jax.NamedSharding
) -> jax.Array:
    key = jax.random.fold_in(key, index)
    if dtype == jnp.int32:  # packed: any bits are weights
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32, out_sharding=where), dtype)
    values = jax.random.normal(key, shape, jnp.float32, out_sharding=where)
    return (values if dtype == jnp.float8_e4m3fn else INIT_STDDEV * values).astype(dtype)
