"""`PoolingEngine`: prompts in, vectors or scores out. A request ends with its prompt; no token is sampled.

Prompts go through the same scheduler, pages and prefix cache as those of a generating engine, in the same chunks. The
step returns the last token's hidden state, and what is made of it is a few thousand multiplications on the host.
"""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qjax import sharding
from qjax.checkpoint.pooling import Pooling
from qjax.config import EngineConfig
from qjax.engine.answers import Answer, Group
from qjax.engine.engine import Engine
from qjax.engine.loading import Loaded, load
from qjax.engine.request import Request
from qjax.engine.sleeping import TAGS
from qjax.models.qwen3 import merge
from qjax.outputs import EmbeddingOutput, PoolingRequestOutput, ScoringOutput
from qjax.pooling_params import PoolingParams
from qjax.sampling_params import SamplingParams
from qjax.text.tokenizer import Tokenizer

NOTHING_SAMPLED = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)


def make_engine(
    config: EngineConfig, *, progress: bool = True, on_phase: Callable[[str], None] = lambda phase: None
) -> Engine:
    """A `PoolingEngine` where `--runner` or the checkpoint says so, else an `Engine`. Arguments and errors are those of
    `Engine`."""
    loaded = load(config, progress=progress, on_phase=on_phase)
    kind = Engine if loaded.pooling is None else PoolingEngine
    return kind(config, progress=progress, on_phase=on_phase, loaded=loaded)


class PoolingEngine(Engine):
    """Driven as an `Engine` is, but `step` returns a `PoolingRequestOutput` for each request that has ended.

    Attributes:
      pooling: what is made of a hidden state.
      head: float32 [D] of a reranker, whose score is sigmoid(head · hidden state).
    """

    pooling: Pooling

    def __init__(
        self,
        config: EngineConfig,
        *,
        progress: bool = True,
        on_phase: Callable[[str], None] = lambda phase: None,
        loaded: Loaded,
    ):
        super().__init__(config, progress=progress, on_phase=on_phase, loaded=loaded)
        self.head = loaded.score_weight
        self._token_ids = _token_ids(self.pooling, self.tokenizer)
        self._read_head()
        self._params: dict[Request, PoolingParams] = {}
        self._hidden: dict[Request, np.ndarray] = {}

    def _read_head(self) -> None:
        """Of the output layer's rows of two tokens, the second's minus the first's."""
        if self._token_ids is None:
            return
        runner = self.runner

        def rows(leaves: tuple[jax.Array, ...]) -> jax.Array:  # float32 [2, D]
            model, ids = merge(runner.modeldef, leaves), jnp.array(self._token_ids)
            if model.lm_head is None:
                return model.embed_tokens(ids).astype(jnp.float32)
            columns = model.lm_head.kernel[...].at[:, ids].get(out_sharding=sharding.spec(None, None))
            return columns.T.astype(jnp.float32)

        with jax.set_mesh(runner.mesh):
            no, yes = np.asarray(jax.jit(rows)(runner.leaves))
        self.head = yes - no

    # Requests in

    def check_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        what = "embeddings" if self.pooling.kind == "embed" else "scores"
        raise ValueError(
            f"{self.config.model} is served for {what} and does not generate. Start with --runner generate for text."
        )

    def check_pooling_request(self, request_id: str, prompt_token_ids: list[int], params: PoolingParams) -> None:
        """Raises ValueError if the engine cannot serve this request."""
        self.sleeper.check_awake(*TAGS)
        if request_id in self._groups:
            raise ValueError(f"request_id {request_id!r} is in use by a running request.")
        num_tokens, vocab, size = len(prompt_token_ids), self.model_config.vocab_size, self.model_config.hidden_size
        if num_tokens == 0:
            raise ValueError("The input is empty: at least one token is needed.")
        if num_tokens > self.max_model_len:
            raise ValueError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your input contains "
                f"{num_tokens} tokens. Please shorten it, cut it with truncate_prompt_tokens, or raise --max-model-len."
            )
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocab:
            raise ValueError(f"The input has a token id outside the vocabulary, 0 to {vocab - 1}.")
        if params.dimensions is not None and self.pooling.kind != "embed":
            raise ValueError("dimensions are those of an embedding; this model gives scores.")
        if params.dimensions is not None and params.dimensions > size:
            raise ValueError(f"dimensions must be at most {size}, the model's hidden size, got {params.dimensions}.")

    def add_pooling_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: PoolingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queues a request.

        Raises:
          ValueError: the request cannot be served; nothing was queued.
        """
        self.check_pooling_request(request_id, prompt_token_ids, params)
        if priority and self.config.scheduling_policy != "priority":
            raise ValueError(f"priority={priority} needs --scheduling-policy priority.")
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            params=NOTHING_SAMPLED,
            max_tokens=1,
            is_pooling=True,
            arrival_time=time.monotonic(),
            priority=priority,
            cache_salt=cache_salt,
        )
        self._queue(Group(request_id, None, [Answer(request, 0, None)]))
        self._params[request] = params

    # The step

    def _update(self) -> dict[Group, None]:
        flight, self._flight = self._flight, None
        if flight is None:
            return {}
        result = self._collect(flight)
        if result.hidden is None:
            raise RuntimeError("a step of a pooling engine gave no hidden states")
        touched: dict[Group, None] = {}
        accepted = dict(self.scheduler.update(flight.batch, result.token_ids[0]))
        for chunk, hidden in zip(flight.batch.sampling, result.hidden, strict=True):
            request = chunk.request
            if request not in accepted:  # aborted since
                continue
            group, answer = self._answers[request.request_id]
            request.output_token_ids.clear()
            if accepted[request] >= 0:
                self._hidden[request] = hidden
                request.finish_reason = "stop"
            self.metrics.on_prompt(request)
            self._flush(answer)
            touched[group] = None
        return touched

    def _emit(self, group: Group) -> PoolingRequestOutput | None:  # type: ignore[override]
        request = group.answers[0].request
        if not request.is_finished:
            return None
        del self._groups[group.request_id], self._answers[group.request_id]
        params, hidden = self._params.pop(request), self._hidden.pop(request, None)
        return PoolingRequestOutput(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            outputs=None if hidden is None else self._result(hidden, params),
            num_cached_tokens=request.num_cached_tokens,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def _result(self, hidden: np.ndarray, params: PoolingParams) -> EmbeddingOutput | ScoringOutput:
        if self.head is None:
            vector = hidden[: params.dimensions]
            length = max(np.linalg.norm(vector), np.finfo(np.float32).tiny)
            return EmbeddingOutput(vector / length if params.use_activation else vector)
        logit = float(self.head.astype(np.float64) @ hidden.astype(np.float64))
        return ScoringOutput(_sigmoid(logit) if params.use_activation else logit)

    def update_weights(self, params: Sequence[jax.Array]) -> None:
        super().update_weights(params)
        self._read_head()


def _token_ids(pooling: Pooling, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """Ids of the two answers.

    Raises:
      ValueError: one of them is no single token.
    """
    if pooling.tokens is None:
        return None
    ids = [[token] if isinstance(token, int) else tokenizer.encode(token) for token in pooling.tokens]
    for token, parts in zip(pooling.tokens, ids, strict=True):
        if len(parts) != 1 or not 0 <= parts[0] < tokenizer.vocab_size:
            raise ValueError(f"classifier_from_token: {token!r} is no token of the tokenizer.")
    return tuple(parts[0] for parts in ids)


def _sigmoid(logit: float) -> float:
    return float(0.5 * (1.0 + np.tanh(0.5 * logit)))  # cannot overflow
