"""What a request returns: vLLM's `RequestOutput` and `CompletionOutput` of text, `PoolingRequestOutput` of the rest.

`LLM` returns whole answers. The engine's step and the streams made of it give deltas: `text`, `token_ids` and
`logprobs` then hold only what is new, and `CompletionBuilder` puts them together.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]
STEP_FAILED = "step_failed"  # the stop_reason of an "error" that is not the request's own: it may be sent again


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position, of the raw logits (before penalties and temperature)."""

    logprob: float
    rank: int | None = None  # 1 is the most likely token of the vocabulary
    decoded_token: str | None = None


@dataclass(slots=True)  # not frozen: a step makes one for each request, and frozen ones take three times as long
class CompletionOutput:
    """One of a request's `n` answers: the whole of it, or in a stream what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # of all tokens up to here, in a delta too
    logprobs: list[dict[int, Logprob]] | None = None  # one dict a generated token: token id -> Logprob
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id; None for EOS and for length
    message: dict[str, Any] | None = None  # of `LLM.chat(parse=True)`: OpenAI's message with reasoning and tool calls

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


class CompletionBuilder:
    """Puts an answer's deltas together; each is copied once, so a long answer costs no more a token."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._last: CompletionOutput | None = None

    def add(self, delta: CompletionOutput) -> None:
        self._texts.append(delta.text)
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs or []
        self._last = delta

    def build(self) -> CompletionOutput:
        """The answer so far; with `index`, reasons and cumulative logprob of the last delta."""
        if self._last is None:
            raise RuntimeError("no delta was added")
        logprobs = None if self._last.logprobs is None else self._logprobs
        return replace(self._last, text="".join(self._texts), token_ids=self._token_ids, logprobs=logprobs)


@dataclass(slots=True)
class RequestMetrics:
    """Host times of a request, in seconds of `time.monotonic`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request and its answers so far. `finished` is true once every answer has ended."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # None for the first prompt token
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    metrics: RequestMetrics | None = None  # of a request that has ended


@dataclass(frozen=True, eq=False)
class EmbeddingOutput:
    """A text as a vector."""

    vector: "np.ndarray"  # float32 [dimensions]

    @property
    def embedding(self) -> list[float]:
        return self.vector.tolist()


@dataclass(frozen=True)
class ScoringOutput:
    """How well a document answers a query: in [0, 1] from a reranker, the cosine in [-1, 1] from an embedder."""

    score: float


@dataclass(frozen=True)
class PoolingRequestOutput[T: (EmbeddingOutput, ScoringOutput)]:
    """A request that pools; `outputs` is there unless `finish_reason` is "abort" or "error"."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: T | None = None
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    finished: bool = True
