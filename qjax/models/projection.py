"""Which module a projection, or the experts of a layer, are: as the checkpoint stores them."""

from typing import Any

from qjax.models.config import ModelConfig
from qjax.models.fp8 import FP8Experts, FP8Linear
from qjax.models.int4 import Int4Experts, Int4Linear
from qjax.models.layers import ExpertsLinear, Linear


def projection(
    config: ModelConfig, name: str, shape: tuple[int, ...], axes: tuple[str, ...], **options: Any
) -> Linear | Int4Linear | FP8Linear:
    """The module called `name` in the checkpoint; `options` as `Linear` takes them."""
    if config.quantization is None or not config.quantization.covers(name):
        return Linear(shape, axes, **options)
    return (Int4Linear if config.quantization.is_int4 else FP8Linear)(shape, axes, **options)


def experts_projection(
    config: ModelConfig, name: str, shape: tuple[int, ...], axes: tuple[str, ...], **options: Any
) -> ExpertsLinear | Int4Experts | FP8Experts:
    """The same of all experts together: `name` ends with "experts.gate_up_proj" or "experts.down_proj"."""
    if config.quantization is None or not config.quantization.covers(name):
        return ExpertsLinear(shape, axes, **options)
    return (Int4Experts if config.quantization.is_int4 else FP8Experts)(shape, axes, **options)
