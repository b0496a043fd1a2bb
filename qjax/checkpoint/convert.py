"""A plain checkpoint's folder as a quantised one: FP8 in Qwen's own format, or int4 in AWQ's, which vLLM loads too.

Tensor after tensor, on the CPU: a few of the largest weights are in memory, never the model.
"""

import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qjax.checkpoint.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME, check_not_modelopt, open_folder
from qjax.models.config import ModelConfig
from qjax.quantization.writing import CONFIGS, Made, shapes_of, tensors_of

SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit
CODES = {dtype: code for code, dtype in DTYPES.items()}
MODULE = r"(?:self_attn\.[qkvo]|mlp\.(?:experts\.\d+\.)?(?:gate|up|down))_proj"
PROJECTION = re.compile(rf"(?:model\.)?layers\.\d+\.{MODULE}\.weight")
# Weights are written anew; what else a folder may hold at its top level, and sentence-transformers' small folders.
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "1_*/*.json")


@dataclass(frozen=True)
class Piece:
    """Tensors of the output that are made together."""

    shapes: dict[str, tuple[tuple[int, ...], np.dtype]]  # by name, in the order of the file
    make: Callable[[], list[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())


def convert(
    source: Path,
    output: Path,
    method: Made,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Writes the folder `output`, which is there when all of it is written and not before.

    Args:
      source: the folder of a checkpoint that qjax serves, not quantised.
      shard_bytes: of a file of weights, at most, unless one weight is larger.
      progress: show a bar; None: where stderr is a terminal.

    Raises:
      ValueError: `output` is there already, the disk is full, or the model cannot be quantised.
    """
    hf_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig.from_hf(hf_config)
    if config.quantization is not None:
        raise ValueError(f"{source} is quantised already ({config.quantization.method}): convert its plain checkpoint.")
    config.with_quantization(method).sizes_to_split(1)  # or it is refused
    if output.exists():
        raise ValueError(f"{output} exists already: remove it, or name another folder.")
    check_not_modelopt(source)
    tensors = open_folder(source)
    sparse = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    expected = 7 * config.num_hidden_layers + 3 * (config.num_experts - 1) * len(sparse)
    found = sum(map(bool, map(PROJECTION.fullmatch, tensors)))
    if found != expected:
        raise ValueError(f"{source} has {found} weights of projections, expected {expected}: is a part missing?")
    pieces = _pieces(tensors, method)
    unfinished = output.with_name(f"{output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        needed, free = sum(piece.num_bytes for piece in pieces), shutil.disk_usage(unfinished).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        for path in sorted({path for pattern in COPIED for path in source.glob(pattern)} - {source / INDEX_NAME}):
            (unfinished / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, unfinished / path.relative_to(source))
        own = dict(CONFIGS[method])
        own["modules_to_not_convert"] = own["modules_to_not_convert"] + [f"model.layers.{i}.mlp.gate" for i in sparse]
        text = json.dumps(hf_config | {"quantization_config": own}, indent=2) + "\n"
        (unfinished / "config.json").write_text(text, encoding="utf-8")
        with tqdm(
            total=needed,
            unit="B",
            unit_scale=True,
            desc="Converting",
            disable=None if progress is None else not progress,
        ) as bar:
            _write(unfinished, _shards(pieces, shard_bytes), bar)
        unfinished.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"The disk is full while writing {output}: {error}. Nothing is left of it.") from error
        raise ValueError(f"{output} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _pieces(tensors: Mapping[str, np.ndarray], method: Made) -> list[Piece]:
    pieces = []
    for name, tensor in tensors.items():
        if PROJECTION.fullmatch(name):
            shapes = {name.removesuffix("weight") + kind: shape for kind, shape in shapes_of(method, tensor).items()}
            pieces.append(Piece(shapes, partial(tensors_of, method, tensor)))
        else:
            pieces.append(Piece({name: (tensor.shape, tensor.dtype)}, partial(list, (tensor,))))
    return pieces


def _shards(pieces: list[Piece], shard_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    return shards


def _write(folder: Path, shards: list[list[Piece]], bar: tqdm) -> None:
    count = len(shards)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file_name = SINGLE_NAME if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
        weight_map |= {name: file_name for piece in shard for name in piece.shapes}
        with open(folder / file_name, "wb") as file:
            file.write(_header(shard))
            for piece in shard:
                for (shape, dtype), tensor in zip(piece.shapes.values(), piece.make(), strict=True):
                    assert (tensor.shape, tensor.dtype) == (shape, dtype)
                    file.write(np.ascontiguousarray(tensor).view(f"u{dtype.itemsize}").data)
                bar.update(piece.num_bytes)
    if count > 1:
        total = sum(piece.num_bytes for shard in shards for piece in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(shard: list[Piece]) -> bytes:
    """The beginning of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in shard:
        for name, (shape, dtype) in piece.shapes.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
