"""qjax: an inference engine for the Qwen3 models, in JAX. `from qjax import LLM, SamplingParams`.

Names are imported at first use: `qjax --help` and the text layer must not wait for jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qjax.config import EngineConfig
    from qjax.llm import LLM
    from qjax.outputs import CompletionOutput, PoolingRequestOutput, RequestOutput
    from qjax.pooling_params import PoolingParams
    from qjax.sampling_params import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_MODULES = {
    "CompletionOutput": "qjax.outputs",
    "EngineConfig": "qjax.config",
    "LLM": "qjax.llm",
    "PoolingParams": "qjax.pooling_params",
    "PoolingRequestOutput": "qjax.outputs",
    "RequestOutput": "qjax.outputs",
    "SamplingParams": "qjax.sampling_params",
    "StructuredOutputsParams": "qjax.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
