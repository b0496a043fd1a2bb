"""The ends of an answer that the host finds in its tokens, other than stop strings. Plain Python."""

from qjax.engine.request import Request
from qjax.outputs import FinishReason


def host_end(request: Request, token_id: int) -> tuple[FinishReason, str | None] | None:
    """(finish_reason, stop_reason) where the token that was just read ends an answer: its grammar is complete or has
    failed, or it has run into a loop. None: it goes on, or has ended by itself."""
    constraint, loops = request.constraint, request.loops
    if request.is_finished:
        # A grammar that cannot go on allows nothing but the end, which must not pass for a complete answer.
        is_failed = constraint is not None and constraint.error is not None
        return ("error", "the grammar failed") if is_failed and request.finish_reason == "stop" else None
    if constraint is not None and not constraint.accept(token_id):
        return "error", "the grammar was not obeyed"
    if constraint is not None and constraint.is_finished:
        return "stop", None
    if loops is None or not loops.add(token_id):
        return None
    if loops.end_thinking and constraint is not None and constraint.is_thinking:
        constraint.end_thinking()
        loops.reset()
        return None
    return "repetition", "repetition_detected"
