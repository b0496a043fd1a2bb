"""`Constraint`: what one answer's next token may be, by its grammar and by the budget of its think block.

The grammar holds outside the think block; inside, anything goes until the budget is used up. Then the block is closed
with its own token, so that a budget never cuts into an answer or a tool call.
"""

from typing import Literal

import numpy as np

from qjax.text.grammar import GrammarState
from qjax.text.tokenizer import Tokenizer

THINK_START, THINK_END, TURN_START = "<think>", "</think>", "<|im_start|>"


class ThinkBlock:
    """Follows an answer's think block, by token ids.

    Attributes:
      state: "possible" (the first token may open it), "open" or "over".
      num_tokens: in the block so far, its tags left out.
    """

    def __init__(self, start_id: int, end_id: int, state: Literal["possible", "open", "over"]):
        self.start_id = start_id
        self.end_id = end_id
        self.state = state
        self.num_tokens = 0

    @classmethod
    def after(cls, prompt_token_ids: list[int], tokenizer: Tokenizer) -> "ThinkBlock | None":
        """Of the answer to a prompt, whose last turn may have opened the block or closed it. None: the tokenizer has
        no such tags."""
        ids = [tokenizer.encode(tag) for tag in (THINK_START, THINK_END)]
        if any(len(i) != 1 for i in ids):
            return None
        start, end = ids[0][0], ids[1][0]
        turn = tokenizer.encode(TURN_START)
        for token_id in reversed(prompt_token_ids):
            if token_id in (start, end):
                return cls(start, end, "open" if token_id == start else "over")
            if [token_id] == turn:
                break
        return cls(start, end, "possible")

    def accept(self, token_id: int) -> bool:
        """Takes a token. True if it is part of the block."""
        if self.state == "open":
            if token_id == self.end_id:
                self.state = "over"
            else:
                self.num_tokens += 1
            return True
        opens = self.state == "possible" and token_id == self.start_id
        self.state = "open" if opens else "over"
        return opens


class Constraint:
    """Of one answer.

    Args:
      grammar: what is outside the think block must obey it; None: it is free.
      thoughts: None: the answer has no think block, the grammar holds from its first token on.
      budget: tokens that the think block may have; None: any number.
    """

    def __init__(self, grammar: GrammarState | None, thoughts: ThinkBlock | None, budget: int | None):
        self._grammar = grammar
        self._thoughts = thoughts
        self._budget = budget

    @property
    def is_finished(self) -> bool:
        """Nothing but the end of the answer can come."""
        return self._grammar is not None and self._grammar.is_finished

    def fill(self, mask: np.ndarray) -> None:
        """Writes the allowed tokens as bits into int32 [ceil(V / 32)]: token i is bit i % 32 of word i // 32."""
        thoughts = self._thoughts
        if thoughts is not None and thoughts.state == "open":
            is_over_budget = self._budget is not None and thoughts.num_tokens >= self._budget
            mask[:] = 0 if is_over_budget else -1
            _allow(mask, thoughts.end_id)
        elif self._grammar is None:
            mask[:] = -1
        else:
            self._grammar.fill(mask)
            if thoughts is not None and thoughts.state == "possible":
                _allow(mask, thoughts.start_id)

    def accept(self, token_id: int) -> bool:
        """Takes the token that was sampled. False if the grammar does not know it: the mask was not obeyed."""
        if self._thoughts is not None and self._thoughts.accept(token_id):
            return True
        return self._grammar is None or self._grammar.accept(token_id)


def _allow(mask: np.ndarray, token_id: int) -> None:
    mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)
