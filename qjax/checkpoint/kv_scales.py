"""The scales of an FP8 KV cache that a checkpoint may bring: one a layer or one a KV head, for keys and for values.

Tools name them differently; the names that vLLM's loader takes are taken here.
"""

import re
from collections.abc import Mapping

import numpy as np

from qjax.checkpoint.leaf import Leaf, Tensors
from qjax.models.config import ModelConfig

# kv_scale is the old form for both. Those of queries and probabilities are for attention that rounds these to FP8 too,
# which qjax's does not.
NAME = re.compile(r"(model\.layers\.\d+\.self_attn)\.(?:attn\.|(?:q|k|v|qkv)_proj\.)?(q|k|v|kv|prob)_scale")


def has_kv_scales(names: Mapping[str, np.ndarray]) -> bool:
    return any(match[2] in ("k", "v", "kv") for match in map(NAME.fullmatch, names) if match)


def with_kv_scales(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors without scales or, with `config.kv_scales`, `k_scale` and `v_scale` [KV heads] in each layer.

    Where a layer has no scale it is 1; where it has one of the two, that is both.

    Raises:
      ValueError: a scale has another shape or is not a number above 0; the message names the tensor.
    """
    found: dict[tuple[str, str], np.ndarray] = {}
    others = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            others[name] = tensor
        elif config.kv_scales and match[2] in ("k", "v", "kv"):
            scale = _of_heads(name, tensor, config.num_key_value_heads)
            found |= {(match[1], kind): scale for kind in match[2]}
    if config.kv_scales:
        for layer in range(config.num_hidden_layers):
            owner = f"model.layers.{layer}.self_attn"
            for kind, other in ("kv", "vk"):
                default = found.get((owner, other), np.ones(config.num_key_value_heads, np.float32))
                others[f"{owner}.{kind}_scale"] = found.get((owner, kind), default)
    return others


def kv_scales_leaf(owner: str, num_heads: int, num_copied: int) -> Leaf:
    """float32 [2, K] of `k_scale` and `v_scale`, each KV head as often as devices hold it."""
    names, copies = [f"{owner}.k_scale", f"{owner}.v_scale"], num_copied // num_heads

    def read(tensors: Tensors, start: int, stop: int) -> np.ndarray:
        return np.stack([tensors[name][np.arange(start, stop) // copies] for name in names])

    write = lambda leaf: dict(zip(names, leaf[:, ::copies], strict=True))
    return Leaf(dict.fromkeys(names, (num_heads,)), 1, read, write)


def _of_heads(name: str, tensor: np.ndarray, num_heads: int) -> np.ndarray:
    if tensor.size not in (1, num_heads):
        raise ValueError(f"tensor {name} has shape {list(tensor.shape)}, expected 1 or {num_heads} (KV heads) scales.")
    scale = np.broadcast_to(tensor.reshape(-1).astype(np.float32), num_heads)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"tensor {name} is {scale.tolist()}, expected numbers above 0.")
    return np.ascontiguousarray(scale)
