"""`ScheduledBatch`: what one step computes, as the scheduler tells the runner. Plain Python, no jax."""

from dataclasses import dataclass

from qjax.engine.request import Request


@dataclass(slots=True)
class ScheduledChunk:
    """Tokens [start, start + num_tokens) of a request, computed in one step."""

    request: Request
    start: int
    num_tokens: int
    samples: bool  # the chunk's last row samples a token

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def slot(self) -> int:
        """Of the request; it has one as long as the batch is not dispatched."""
        if self.request.slot is None:
            raise RuntimeError(f"request {self.request.request_id!r} is in a step but holds no slot.")
        return self.request.slot


@dataclass(frozen=True)
class ScheduledBatch:
    """One step. Slots and pages are read from the requests, so dispatch it before anything else changes them.

    A decode's one token was sampled in the request's slot and lies on the device; the host may not know it yet. The
    tokens of a prefill chunk are known: `request.tokens(chunk.start, chunk.end)`.
    """

    decodes: list[ScheduledChunk]
    prefills: list[ScheduledChunk]
    preempted: list[Request]
    num_steps: int = 1  # tokens that each decode samples one after the other, without the host; 1 with prefills

    @property
    def is_empty(self) -> bool:
        return not self.decodes and not self.prefills

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.prefills)

    @property
    def sampling(self) -> list[ScheduledChunk]:
        """Chunks that sample a token: the decodes, then prefills, in order."""
        return self.decodes + [chunk for chunk in self.prefills if chunk.samples]
