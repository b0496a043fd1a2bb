"""Which tokens a request's next token may not be, or is pushed towards: bias, allowed, banned and bad words.

Plain Python. The sampler gets them as a short list of (token id, value to add) a row.
"""

from qjax.engine.request import Request

BAN = float("-inf")


def is_held_back(request: Request) -> bool:
    """Whether the next step cannot compute the request: its bans depend on a token that the host has not read."""
    if not request.num_pending:
        return False
    is_constrained = request.constraint is not None and request.constraint.needs_text
    return is_constrained or any(len(word) > 1 for word in request.bad_words_token_ids)


def edits_of(request: Request) -> tuple[dict[int, float], bool]:
    """Token id -> value to add to its logit, and whether every token that is not listed is banned."""
    p = request.params
    edits = dict(p.logit_bias or {})
    if p.allowed_token_ids is not None:
        edits = {token: edits.get(token, 0.0) for token in p.allowed_token_ids}
    # `edits_of` runs while the step that samples this token is being made: that token is pending already.
    if len(request.output_token_ids) + request.num_pending - 1 < p.min_tokens:
        ends = request.stop_token_ids | request.eos_token_ids
        edits |= {token: BAN for token in ends if token in edits or p.allowed_token_ids is None}
    tokens = request.output_token_ids
    for *prefix, last in request.bad_words_token_ids:
        if not prefix or tokens[-len(prefix) :] == prefix:
            edits[last] = BAN
    return edits, p.allowed_token_ids is not None


def bad_words_token_ids(words: list[str], encode) -> list[list[int]]:
    """Token sequences of the words as they stand at the start of a text and after a space."""
    sequences = []
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = encode(text)
            if ids and ids not in sequences:
                sequences.append(ids)
    return sequences
