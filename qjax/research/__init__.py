"""Training, adapters and scoring, with the engine's own model and arrays.

`from qjax.research import Trainer, TrainConfig`. Names are imported at first use: the command line's help must not
wait for jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qjax.research.config import LoRAConfig, TrainConfig, read_train_config
    from qjax.research.data import Corpus, render_chat
    from qjax.research.scoring import Consistency, Scores, consistency, score_texts
    from qjax.research.train import Trainer

__all__ = [
    "Consistency",
    "Corpus",
    "LoRAConfig",
    "Scores",
    "TrainConfig",
    "Trainer",
    "consistency",
    "read_train_config",
    "render_chat",
    "score_texts",
]

_MODULES = {
    "Consistency": "qjax.research.scoring",
    "Corpus": "qjax.research.data",
    "LoRAConfig": "qjax.research.config",
    "Scores": "qjax.research.scoring",
    "TrainConfig": "qjax.research.config",
    "Trainer": "qjax.research.train",
    "consistency": "qjax.research.scoring",
    "read_train_config": "qjax.research.config",
    "render_chat": "qjax.research.data",
    "score_texts": "qjax.research.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'qjax.research' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
