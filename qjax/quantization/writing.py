"""Plain weights as the tensors of a quantised checkpoint: Qwen's FP8, or AWQ's int4. On the CPU."""

from typing import Any, Literal

import jax
import numpy as np

from qjax.kernels.fp8_matmul.reference import quantize as quantize_fp8
from qjax.kernels.int4_matmul.reference import quantize as quantize_int4
from qjax.quantization.config import GROUP, TENSORS
from qjax.quantization.int4 import pack_awq

Made = Literal["fp8", "int4"]
CONFIGS: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [GROUP, GROUP],
        "modules_to_not_convert": ["lm_head"],
    },
    "int4": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    },
}


def shapes_of(method: Made, weight: np.ndarray) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each tensor of a weight [out, in], by the end of its name."""
    outputs, inputs = weight.shape
    if method == "fp8":
        shapes = {"weight": (outputs, inputs), "weight_scale_inv": (outputs // GROUP, inputs // GROUP)}
        return {kind: (shape, np.dtype(TENSORS["fp8"][kind].dtype)) for kind, shape in shapes.items()}
    return {
        "qweight": ((inputs, outputs // 8), np.dtype(np.int32)),
        "qzeros": ((inputs // GROUP, outputs // 8), np.dtype(np.int32)),
        "scales": ((inputs // GROUP, outputs), np.dtype(np.float16)),
    }


def tensors_of(method: Made, weight: np.ndarray) -> list[np.ndarray]:
    """The tensors of a weight [out, in], in the order of `shapes_of`."""
    if method == "fp8":
        return [np.asarray(array) for array in _fp8(weight, shapes_of("fp8", weight)["weight_scale_inv"][0])]
    q, scales, zeros = (np.asarray(array) for array in _int4(weight))
    return [pack_awq(q), pack_awq(zeros.astype(np.uint8)), scales.astype(np.float16)]


_fp8 = jax.jit(quantize_fp8, static_argnums=1)
_int4 = jax.jit(lambda weight: quantize_int4(weight.T))
