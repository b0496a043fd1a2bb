"""What the engine keeps of a user's request while its answers are on their way. Plain Python, no jax."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qjax.engine.request import Request
from qjax.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from qjax.text.detokenizer import Detokenizer
from qjax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qjax.engine.runner import Logprobs


@dataclass(eq=False)
class Answer:
    """One of a request's `n` answers on its way: its sequence and what is not emitted yet."""

    request: Request
    index: int
    detokenizer: Detokenizer | None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    is_reported: bool = False  # its end has been emitted


@dataclass(eq=False)
class Group:
    """A user's request: its `n` answers."""

    request_id: str
    prompt: str | None
    answers: list[Answer]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    is_reported: bool = False  # the ends of all have been emitted

    def add_prompt_logprobs(self, request: Request, start: int, rows: list["Logprobs"], tokenizer: Tokenizer) -> None:
        """Row r has the logprobs of the prompt token after position `start + r`. Those of the first answer count."""
        prompt, num = request.prompt_token_ids, request.params.prompt_logprobs
        if request is not self.answers[0].request or num is None:
            return
        if self.prompt_logprobs is None:
            self.prompt_logprobs = [None] * len(prompt)
        for position, row in enumerate(rows, start + 1):
            if position < len(prompt):
                self.prompt_logprobs[position] = logprob_dict(prompt[position], row, num, tokenizer)

    def take(self) -> RequestOutput | None:
        """What is new since the last call."""
        outputs = []
        for answer in self.answers:
            request = answer.request
            if answer.is_reported or not (answer.token_ids or request.is_finished):
                continue
            answer.is_reported = request.is_finished
            outputs.append(
                CompletionOutput(
                    index=answer.index,
                    text=answer.text,
                    token_ids=answer.token_ids,
                    cumulative_logprob=answer.cumulative_logprob if request.params.logprobs is not None else None,
                    logprobs=answer.logprobs if request.params.logprobs is not None else None,
                    finish_reason=request.finish_reason,
                    stop_reason=request.stop_reason,
                )
            )
            answer.text, answer.token_ids, answer.logprobs = "", [], []
        if not outputs:
            return None
        self.is_reported = all(answer.is_reported for answer in self.answers)
        first = self.answers[0].request
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=outputs,
            finished=self.is_reported,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
            metrics=_metrics(first) if self.is_reported else None,
        )


def logprob_dict(token_id: int, row: "Logprobs", num: int, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """The token itself first, then the `num` likeliest (-1: all)."""
    piece = lambda i: tokenizer.token_bytes(i).decode("utf-8", "replace")
    num = len(row.top_ids) if num == -1 else num
    entries = {token_id: Logprob(row.logprob, row.rank, piece(token_id))}
    for rank, (i, logprob) in enumerate(zip(row.top_ids[:num], row.top_logprobs, strict=False), 1):
        entries.setdefault(i, Logprob(logprob, rank, piece(i)))
    return entries


def _metrics(request: Request) -> RequestMetrics:
    return RequestMetrics(
        request.arrival_time, request.first_scheduled_time, request.first_token_time, request.finished_time
    )
