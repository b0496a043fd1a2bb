"""Tiny models and documents to train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qjax.research import Corpus, TrainConfig, Trainer
from tests.tiny import write_checkpoint

VOCAB = 160  # of tests/tiny.py


def counting_corpus(num_documents: int = 200, seed: int = 0) -> Corpus:
    """Documents that count by 1, 2 or 3 from a random start: a model learns them in a few steps."""
    rng = np.random.default_rng(seed)
    documents = []
    for length in rng.integers(3, 60, num_documents):
        ids = (rng.integers(0, VOCAB) + rng.integers(1, 4) * np.arange(length)) % VOCAB
        documents.append((ids.tolist(), [i > 1 for i in range(length)]))
    return Corpus.from_documents(documents)


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return counting_corpus()


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: compiling a step takes most of a test's time."""
    folder = tmp_path_factory.mktemp("micro")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_checkpoint(folder, num_hidden_layers=1, **sizes)
    return folder


@pytest.fixture
def make_trainer(micro_checkpoint: Path, corpus: Corpus):
    def make(corpus: Corpus = corpus, **options: Any) -> Trainer:
        defaults = {
            "model": str(micro_checkpoint),
            "seq_len": 64,
            "batch_size": 4,
            "num_steps": 8,
            "learning_rate": 3e-3,
        }
        return Trainer(TrainConfig(**(defaults | options)), corpus=corpus)

    return make


def losses(trainer: Trainer) -> list[float]:
    return [metrics.loss for metrics in trainer.history]
