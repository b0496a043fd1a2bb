"""Trained leaves as a Hugging Face folder: weights in N files, config and tokenizer of the model it came from."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qjax import sharding
from qjax.checkpoint.leaf import contiguous
from qjax.checkpoint.names import leaf_of
from qjax.checkpoint.safetensors import INDEX_NAME, SINGLE_NAME
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import abstract_model

COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
)
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


def export_folder(
    leaves: tuple[jax.Array, ...],
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    source: str | Path,
    folder: str | Path,
    *,
    num_shards: int = 1,
    dtype: str = "bfloat16",
) -> None:
    """Writes a folder that transformers and qjax load.

    Args:
      source: the folder whose config.json, generation_config.json and tokenizer it gets.
      num_shards: of the weights, about equal in bytes; a shard holds whole tensors.

    Raises:
      ValueError: `folder` is `source`, or the model is quantised.
    """
    config.check_not_quantized("export")
    source, folder = Path(source), Path(folder)
    if folder.exists() and folder.resolve() == source.resolve():
        raise ValueError(f"output: {folder} is the model's own folder; choose another one.")
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_NAME]:
        old.unlink(missing_ok=True)
    hf_config = json.loads((source / "config.json").read_text())
    hf_config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(hf_config | {"dtype": dtype}, indent=2) + "\n")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)

    shapes, tensors = _tensors(leaves, config, mesh, DTYPES[dtype])
    sizes = {name: int(np.prod(shape)) * DTYPES[dtype].itemsize for name, shape in shapes.items()}
    names = (
        [SINGLE_NAME]
        if num_shards == 1
        else [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    )
    weight_map = {name: names[i] for name, i in _assign(sizes, num_shards).items()}
    num_tensors, shard = Counter(weight_map.values()), dict[str, np.ndarray]()
    for name, tensor in tensors:
        shard[name] = tensor
        if len(shard) == num_tensors[weight_map[name]]:
            path = folder / weight_map[name]
            save_file(shard, path, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", path)  # save_file leaves a file that only its owner reads
            shard = {}
    if num_shards > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _assign(sizes: dict[str, int], num_shards: int) -> dict[str, int]:
    """The shard of each tensor: in order, about equal in bytes, none empty.

    Raises:
      ValueError: there are fewer tensors than shards.
    """
    if num_shards > len(sizes):
        raise ValueError(f"num_shards={num_shards}, but the model has {len(sizes)} tensors.")
    total, filled, shard = sum(sizes.values()), 0, 0
    out: dict[str, int] = {}
    for i, (name, size) in enumerate(sizes.items()):
        is_full = filled + size / 2 > total * (shard + 1) / num_shards
        is_last_chance = len(sizes) - i < num_shards - shard  # each later shard needs a tensor of its own
        if out and shard < num_shards - 1 and shard in out.values() and (is_full or is_last_chance):
            shard += 1
        out[name] = shard
        filled += size
    return out


def _tensors(
    leaves: tuple[jax.Array, ...], config: ModelConfig, mesh: jax.sharding.Mesh, dtype: np.dtype
) -> tuple[dict[str, tuple[int, ...]], Iterator[tuple[str, np.ndarray]]]:
    """Shapes of Hugging Face's tensors by name, and the tensors themselves in the same order, leaf after leaf."""
    modeldef, _ = abstract_model(config, leaves[0].dtype, mesh)
    tp = sharding.tensor_parallel_size(mesh)
    num_kv_heads, _ = sharding.split_heads(config.num_attention_heads, config.num_key_value_heads, tp)
    rules = [leaf_of(path, config, num_kv_heads) for path in modeldef.paths]

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for rule, leaf in zip(rules, leaves, strict=True):
            for name, tensor in rule.write(np.asarray(leaf).astype(dtype)).items():
                yield name, contiguous(tensor)

    return {name: shape for rule in rules for name, shape in rule.shapes.items()}, read()
