"""`LoopDetector`: notices that an answer repeats itself. Plain Python, on the tokens that the host has read."""

from qjax.sampling_params import RepetitionDetectionParams


class LoopDetector:
    """Follows one answer. It loops if its last tokens are one pattern, `min_count` times in a row."""

    def __init__(self, params: RepetitionDetectionParams):
        self.end_thinking = params.end_thinking
        self._min_count = params.min_count
        self._sizes = range(max(1, params.min_pattern_size), params.max_pattern_size + 1)
        self.reset()

    def reset(self) -> None:
        """Forgets the tokens so far."""
        self._tokens: list[int] = []
        self._runs = [0] * len(self._sizes)  # tokens in a row that equal the one a pattern's size before them

    def add(self, token_id: int) -> bool:
        """Takes the next token. True if the answer loops."""
        tokens, runs, num = self._tokens, self._runs, len(self._tokens)
        tokens.append(token_id)
        is_loop = False
        for i, size in enumerate(self._sizes):
            if size > num:
                break
            runs[i] = runs[i] + 1 if tokens[num - size] == token_id else 0
            is_loop = is_loop or runs[i] >= size * (self._min_count - 1)
        return is_loop


def loop_detector(params: RepetitionDetectionParams | None) -> LoopDetector | None:
    return LoopDetector(params) if params is not None and params.max_pattern_size else None
