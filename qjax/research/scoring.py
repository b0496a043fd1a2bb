"""Log-probabilities and hidden states of given texts, by training's own forward pass; and how far the engine's differ.

`LLM.prompt_logprobs` asks the engine's step for the same numbers: `consistency` is the distance between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import sharding
from qjax.llm import LLM
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import ModelDef
from qjax.outputs import RequestOutput
from qjax.research.attention import choose_implementation
from qjax.research.batch import PackedBatch
from qjax.research.forward import ForwardOptions, hidden_states, token_logprobs
from qjax.research.packing import Rows, assemble, best_fit
from qjax.research.train import Trainer
from qjax.text.tokenizer import Tokenizer

MAX_TOKENS = 16384  # of one forward pass
ROW_MULTIPLE = 128  # row lengths are multiples of this: few shapes to compile


@dataclass(frozen=True)
class Scores:
    """Of one text of n tokens."""

    token_ids: list[int]
    logprobs: np.ndarray  # float32 [n - 1] of the tokens after the first, each given those before it
    hidden_states: np.ndarray | None  # float32 [n, D] after the last norm; None if not asked for


@dataclass(frozen=True)
class Consistency:
    """Distance of two log-probabilities of the same sampled tokens."""

    num_tokens: int
    max_difference: float
    mean_difference: float


def score_texts(
    source: LLM | Trainer, texts: Sequence[str | Sequence[int]], *, with_hidden_states: bool = False
) -> list[Scores]:
    """Scores texts with the weights that an engine or a training run has now, in their compute dtype.

    Args:
      texts: strings, or token ids.

    Raises:
      ValueError: a text has less than two tokens, or more than the model has positions.
    """
    model = _model_of(source)
    ids = [model.encode(text) if isinstance(text, str) else list(text) for text in texts]
    limit = model.config.max_context_len
    for i, tokens in enumerate(ids):
        if not 2 <= len(tokens) <= limit:
            raise ValueError(f"text {i} has {len(tokens)} tokens; between 2 and {limit} can be scored.")
    if not ids:
        return []
    lengths = np.array([len(tokens) for tokens in ids], np.int32)
    L = -(-int(lengths.max()) // ROW_MULTIPLE) * ROW_MULTIPLE
    rows, order = _rows(lengths, L)
    # A place needs a token after it: each text gets one more, whose log-probability nobody reads.
    corpus = np.concatenate([np.array([*tokens, 0], np.int32) for tokens in ids])
    per_pass = max(1, MAX_TOKENS // L // model.data_size) * model.data_size
    run = _forward(model, L, with_hidden_states)
    out: list[Scores | None] = [None] * len(ids)
    for first in range(0, len(rows), per_pass):
        which = np.arange(first, min(first + per_pass, len(rows)))
        batch = assemble(rows, which, corpus, np.zeros(len(corpus), bool))
        missing = per_pass * L - len(batch.token_ids)  # rows of padding, so that one shape is compiled
        arrays = (batch.token_ids, batch.positions, batch.segment_ids, batch.targets)
        logprobs, hidden = run(*(np.pad(array, (0, missing)) for array in arrays))
        for row in which:
            at = (row - first) * L
            for text in order[rows.first_piece[row] : rows.first_piece[row + 1]]:
                n = int(lengths[text])
                states = None if hidden is None else hidden[at : at + n]
                out[text] = Scores(ids[text], logprobs[at : at + n - 1], states)
                at += n
    return [scores for scores in out if scores is not None]


def consistency(source: LLM | Trainer, outputs: Sequence[RequestOutput]) -> Consistency:
    """How far the log-probabilities that the engine reported while sampling are from training's of the same tokens.

    Args:
      outputs: of `LLM.generate` with `SamplingParams(logprobs=0)` or more.

    Raises:
      ValueError: an output has no log-probabilities.
    """
    texts, reported, starts = [], [], []
    for output in outputs:
        for answer in output.outputs:
            if answer.logprobs is None:
                raise ValueError(f"request {output.request_id} was sampled without logprobs: set them to 0 or more.")
            if not answer.token_ids:
                continue
            texts.append([*output.prompt_token_ids, *answer.token_ids])
            starts.append(len(output.prompt_token_ids) - 1)
            pairs = zip(answer.token_ids, answer.logprobs, strict=True)
            reported.append(np.array([row[token].logprob for token, row in pairs]))
    if not texts:
        return Consistency(0, 0.0, 0.0)
    scored = [scores.logprobs[start:] for scores, start in zip(score_texts(source, texts), starts, strict=True)]
    differences = np.abs(np.concatenate(scored) - np.concatenate(reported))
    return Consistency(len(differences), float(differences.max()), float(differences.mean()))


@dataclass(frozen=True)
class _Model:
    config: ModelConfig
    modeldef: ModelDef
    leaves: tuple[jax.Array, ...]
    mesh: jax.sharding.Mesh
    dtype: Any
    tokenizer: Tokenizer | None

    @property
    def data_size(self) -> int:
        return sharding.data_parallel_size(self.mesh)

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("a Trainer scores token ids: encode the text first.")
        return self.tokenizer.encode(text)


def _model_of(source: LLM | Trainer) -> _Model:
    if isinstance(source, Trainer):
        return _Model(source.model_config, source.modeldef, source.params, source.mesh, jnp.dtype(source.dtype), None)
    engine = source.engine
    engine.model_config.check_not_quantized("scoring")
    runner = engine.runner
    return _Model(
        engine.model_config, runner.modeldef, runner.leaves, runner.mesh, runner.leaves[0].dtype, engine.tokenizer
    )


def _rows(lengths: np.ndarray, L: int) -> tuple[Rows, np.ndarray]:
    """Texts packed into rows, and the text of each piece in the rows' order."""
    row_of = best_fit(lengths, L)
    order = np.argsort(row_of, kind="stable")
    counts = np.bincount(row_of)
    starts = np.cumsum(lengths.astype(np.int64) + 1) - lengths - 1
    return Rows(starts[order], lengths[order], np.concatenate([[0], np.cumsum(counts)]), L), order


def _forward(model: _Model, L: int, with_hidden_states: bool) -> Any:
    """Host arrays → host arrays: (log-probabilities [T], hidden states [T, D] or None)."""
    device = model.mesh.devices.flat[0]
    implementation = choose_implementation("auto", str(jnp.dtype(model.dtype)), model.config.head_dim, device)
    vocab_at_a_time = 2**29 // max(1, model.config.vocab_size)  # places whose float32 logits take 2 GiB
    parts = next(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if MAX_TOKENS // n <= vocab_at_a_time or n == 128)
    options = ForwardOptions(model.dtype, num_loss_chunks=parts)

    def step(leaves, token_ids, positions, segment_ids, targets):
        batch = PackedBatch(token_ids, positions, segment_ids, L, implementation)
        hidden = hidden_states(model.modeldef, leaves, batch, options)
        logprobs = token_logprobs(model.modeldef, leaves, hidden, targets, L, options)
        return logprobs, hidden if with_hidden_states else None

    compiled = jax.jit(step)
    place = partial(jax.device_put, device=sharding.named_sharding(model.mesh, "rows"))

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        with jax.set_mesh(model.mesh):
            logprobs, hidden = compiled(model.leaves, *place(arrays))
        return np.asarray(logprobs), None if hidden is None else np.asarray(hidden, np.float32)

    return run
