"""Checkpoints as Qwen publishes them, FP8, AWQ and GPTQ, and what their numbers are: numpy loops, no line of qjax."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.tiny import write_checkpoint

CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
QUANTIZATION: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    },
}
PACKING = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's: which column the next higher four bits of a word are


def write_pair(folder: Path, method: str, skip: tuple[str, ...] = (), **config: Any) -> tuple[Path, Path]:
    """A random model's folder quantised, and another with the numbers of the first in float32.

    Args:
      skip: modules, or what they lie in, that stay as they are (`modules_to_not_convert`).
    """
    plain, quantised = folder / "plain", folder / method
    tensors = write_checkpoint(plain, dtype=np.float32, **(CONFIG | config))
    quantised.mkdir()
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or any(f"{module}.".startswith(f"{name}.") for name in skip):
            stored[name] = tensor
            continue
        parts, tensors[name] = QUANTIZE[method](0.4 * tensor)
        stored |= {f"{module}.{kind}": part for kind, part in parts.items()}
    save_file(tensors, plain / "model.safetensors")
    save_file(stored, quantised / "model.safetensors")
    hf_config = json.loads((plain / "config.json").read_text())
    hf_config["quantization_config"] = QUANTIZATION[method] | ({"modules_to_not_convert": [*skip]} if skip else {})
    (quantised / "config.json").write_text(json.dumps(hf_config))
    return quantised, plain


def quantize_fp8(weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of a weight [out, in], and the float32 numbers that they stand for."""
    rows, columns = (size // 128 for size in weight.shape)
    q = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    scales, numbers = np.empty((rows, columns), ml_dtypes.bfloat16), np.empty(weight.shape, np.float32)
    for i in range(rows):
        for j in range(columns):
            block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scales[i, j] = np.abs(weight[block]).max() / 440
            scale = np.float32(scales[i, j])
            q[block] = (weight[block] / scale).astype(q.dtype)
            numbers[block] = q[block].astype(np.float32) * scale
    return {"weight": q, "weight_scale_inv": scales}, numbers


def quantize_awq(weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of a weight [out, in], and the float32 numbers that they stand for."""
    inputs, outputs = weight.shape[1], weight.shape[0]
    q, zeros = np.empty((inputs, outputs), np.int64), np.empty((inputs // 128, outputs), np.int64)
    scales, numbers = np.empty((inputs // 128, outputs), np.float16), np.empty(weight.shape, np.float32)
    for group in range(inputs // 128):
        rows = slice(128 * group, 128 * (group + 1))
        part = weight.T[rows]
        scales[group] = (part.max(0) - part.min(0)) / 15
        scale = scales[group].astype(np.float32)
        zeros[group] = np.clip(np.round(-part.min(0) / scale), 0, 15)
        q[rows] = np.clip(np.round(part / scale) + zeros[group], 0, 15)
        numbers.T[rows] = (q[rows] - zeros[group]).astype(np.float32) * scale
    return {"qweight": pack(q), "qzeros": pack(zeros), "scales": scales}, numbers


def quantize_gptq(weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of a weight [out, in], and the float32 numbers that they stand for: the zero point is 8 everywhere."""
    inputs, outputs = weight.shape[1], weight.shape[0]
    q, scales = np.empty((inputs, outputs), np.int64), np.empty((inputs // 128, outputs), np.float16)
    numbers = np.empty(weight.shape, np.float32)
    for group in range(inputs // 128):
        rows = slice(128 * group, 128 * (group + 1))
        part = weight.T[rows]
        scales[group] = np.abs(part).max(0) / 7.5
        scale = scales[group].astype(np.float32)
        q[rows] = np.clip(np.round(part / scale) + 8, 0, 15)
        numbers.T[rows] = (q[rows] - 8).astype(np.float32) * scale
    qweight = pack(q.T, range(8)).T.copy()  # eight inputs in a word
    qzeros = pack(np.full((inputs // 128, outputs), 8 - 1), range(8))  # stored less 1
    g_idx = (np.arange(inputs) // 128).astype(np.int32)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}, numbers


QUANTIZE = {"fp8": quantize_fp8, "awq": quantize_awq, "gptq": quantize_gptq}


def pack(q: np.ndarray, order: Iterable[int] = PACKING) -> np.ndarray:
    """[n, 8 * m] of 0..15 → int32 [n, m]."""
    words = np.zeros((q.shape[0], q.shape[1] // 8), np.uint32)
    for i, column in enumerate(order):
        words |= q[:, column::8].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)
