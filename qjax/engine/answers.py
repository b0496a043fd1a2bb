"""What the engine keeps of a user's request while its answers are on their way. Plain Python, no jax."""

from dataclasses import dataclass, field

from qjax.engine.request import Request
from qjax.outputs import Logprob
from qjax.text.detokenizer import Detokenizer


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
