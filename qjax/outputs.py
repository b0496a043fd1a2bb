"""What generation returns: vLLM's `RequestOutput` and `CompletionOutput`. Plain Python, no arrays.

`LLM` returns whole answers. The engine's step and the streams made of it give deltas: `text`, `token_ids` and
`logprobs` then hold only what is new, and `merge` puts two of them together.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position, of the raw logits (before penalties and temperature)."""

    logprob: float
    rank: int | None = None  # 1 is the most likely token of the vocabulary
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's `n` answers: the whole of it, or in a stream what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # of all tokens up to here, in a delta too
    logprobs: list[dict[int, Logprob]] | None = None  # one dict a generated token: token id -> Logprob
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or stop token id; None for EOS and for length

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def merge(self, new: "CompletionOutput") -> "CompletionOutput":
        """This answer continued by a delta of the same index."""
        return replace(
            new,
            text=self.text + new.text,
            token_ids=self.token_ids + new.token_ids,
            logprobs=None if new.logprobs is None else (self.logprobs or []) + new.logprobs,
        )


@dataclass(frozen=True)
class RequestMetrics:
    """Host times of a request, in seconds of `time.monotonic`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request and its answers so far. `finished` is true once every answer has ended."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # None for the first prompt token
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    metrics: RequestMetrics | None = None
