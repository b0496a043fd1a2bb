"""Training, adapters and scoring, with the engine's own model and arrays.

`from qjax.research import Trainer, TrainConfig`. Names are imported at first use: the command line's help must not
wait for jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qjax.research.config import LoRAConfig, TrainConfig, read_train_config
    from qjax.research.data import Corpus, render_chat
    from qjax.research.train import Trainer

__all__ = ["Corpus", "LoRAConfig", "TrainConfig", "Trainer", "read_train_config", "render_chat"]

_MODULES = {
    "Corpus": "qjax.research.data",
    "LoRAConfig": "qjax.research.config",
    "TrainConfig": "qjax.research.config",
    "Trainer": "qjax.research.train",
    "read_train_config": "qjax.research.config",
    "render_chat": "qjax.research.data",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'qjax.research' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
