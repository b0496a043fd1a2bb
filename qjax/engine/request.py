"""`Request`: one sequence on its way through the engine. Plain Python; changed by the scheduler alone."""

import enum
from dataclasses import dataclass, field

from qjax.engine.repetition import LoopDetector
from qjax.outputs import FinishReason
from qjax.sampling_params import SamplingParams
from qjax.text.constraint import Constraint


class RequestError(Exception):
    """What a request asks for makes its step impossible; `__cause__` says how. The others in the step are fine."""

    def __init__(self, request: "Request"):
        super().__init__(f"request {request.request_id!r} cannot be computed")
        self.request = request


class RequestStatus(enum.Enum):
    WAITING = "waiting"  # new, or preempted: holds no page and no slot
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence: its tokens, how far they are computed, and what it holds.

    A sampled token exists on the device before the host has read it: it counts in `num_pending` and so in
    `num_tokens`, but is not yet in `output_token_ids`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int  # resolved: never more than the context has room for
    stop_token_ids: frozenset[int] = frozenset()  # the request's own; they are its stop_reason
    eos_token_ids: frozenset[int] = frozenset()  # the model's, empty with ignore_eos; they end without a stop_reason
    arrival_time: float = 0.0
    priority: int = 0  # lower runs earlier
    cache_salt: str | None = None
    seed: int = 0
    is_pooling: bool = False  # ends with its prompt; the one token it gets stands for nothing
    constraint: Constraint | None = None  # what the next token may be, by grammar and thinking budget
    loops: LoopDetector | None = None  # ends the answer where it repeats itself
    bad_words_token_ids: list[list[int]] = field(default_factory=list)  # token sequences that are never completed

    status: RequestStatus = RequestStatus.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # tokens whose K and V are written, or dispatched to be
    num_pending: int = 0  # steps dispatched that sample a token for this request, not yet read
    page_ids: list[int] = field(default_factory=list)
    slot: int | None = None  # row in the device's per-request state while RUNNING
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when first scheduled
    num_loaded_tokens: int = 0  # those of them that the host's memory had
    num_preemptions: int = 0
    arrival_order: int = 0  # set by the scheduler: its n-th request
    has_device_token: bool = False  # the last token was sampled in the present slot, so the device knows it
    page_hashes: list[bytes] = field(default_factory=list, repr=False)  # chained, of the first full pages
    num_registered_pages: int = 0  # while RUNNING: leading `page_ids` that were offered to the prefix cache
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    has_edits: bool = field(init=False)  # see `edits_of`
    has_penalties: bool = field(init=False)
    may_be_held_back: bool = field(init=False)  # see `is_held_back`: asked in every step
    is_plain: bool = field(init=False)  # nothing but its tokens is asked for, and no token depends on the host

    def __post_init__(self) -> None:
        p = self.params
        has_long_words = any(len(word) > 1 for word in self.bad_words_token_ids)
        self.may_be_held_back = self.constraint is not None or has_long_words
        self.has_edits = bool(p.logit_bias or p.allowed_token_ids or self.bad_words_token_ids or p.min_tokens)
        self.has_penalties = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        has_extras = self.has_edits or self.has_penalties or p.logprobs is not None or self.is_pooling
        self.is_plain = self.constraint is None and self.loops is None and not has_extras

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens that the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_known_tokens + self.num_pending

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def tokens(self, start: int, end: int) -> list[int]:
        """Known token ids of the positions [start, end)."""
        n = len(self.prompt_token_ids)
        if end <= n:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[max(start - n, 0) : end - n]
