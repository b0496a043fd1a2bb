"""`Constraint`: what one answer's next token may be, by its grammar and by the budget of its think block.

The grammar holds outside the think block; inside, anything goes but the end of the answer, until the budget is used up
or a loop is found. Then the block is closed with its own token, so that a budget never cuts into an answer or a tool
call. Where the grammar can begin with `<tool_call>`, that token closes the block too, as models forget to do it.
"""

from typing import Literal

import numpy as np

from qjax.sampling_params import SamplingParams
from qjax.text.grammar import GrammarCompiler, GrammarState
from qjax.text.tokenizer import Tokenizer

THINK_START, THINK_END, TURN_START, TOOL_CALL = "<think>", "</think>", "<|im_start|>", "<tool_call>"


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
      call_id: the token that closes the think block and goes on with the grammar; None: there is none.
      inside: what the think block must obey: text that does not spell the call token. Goes with `call_id`.
      eos_token_ids: not allowed in the think block of an answer that has a grammar to obey.
    """

    def __init__(
        self,
        grammar: GrammarState | None,
        thoughts: ThinkBlock | None,
        budget: int | None,
        *,
        call_id: int | None = None,
        inside: GrammarState | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ):
        self._grammar = grammar
        self._thoughts = thoughts
        self._budget = budget
        self._call_id = call_id
        self._inside = inside
        self._eos_token_ids = eos_token_ids

    @property
    def is_finished(self) -> bool:
        """Nothing but the end of the answer can come."""
        return self._grammar is not None and self._grammar.is_finished

    @property
    def is_thinking(self) -> bool:
        return self._thoughts is not None and self._thoughts.state == "open"

    @property
    def error(self) -> str | None:
        """Why the answer cannot be finished."""
        return self._grammar.error if self._grammar is not None else None

    @property
    def needs_text(self) -> bool:
        """Whether the next mask depends on the token before it, also if that is not known yet."""
        if self._grammar is not None:
            return True
        thoughts = self._thoughts
        return thoughts is not None and thoughts.state != "over" and self._num_left <= (thoughts.state == "open")

    def end_thinking(self) -> None:
        """Closes the think block with the next token, if it is open."""
        if self._thoughts is not None:
            self._budget = self._thoughts.num_tokens

    def fill(self, mask: np.ndarray) -> None:
        """Writes the allowed tokens as bits into int32 [ceil(V / 32)]: token i is bit i % 32 of word i // 32."""
        thoughts = self._thoughts
        if thoughts is not None and thoughts.state == "open":
            if self._num_left <= 0:
                mask[:] = 0
            elif self._inside is not None:
                self._inside.fill(mask)
            else:
                mask[:] = -1
            if self._grammar is not None:
                for token_id in self._eos_token_ids:
                    _set(mask, token_id, False)
            _set(mask, thoughts.end_id, True)
            if self._call_id is not None and self._num_left > 0:
                _set(mask, self._call_id, True)
        elif self._grammar is None:
            mask[:] = -1
        else:
            self._grammar.fill(mask)
            if thoughts is not None and thoughts.state == "possible":
                _set(mask, thoughts.start_id, True)

    def accept(self, token_id: int) -> bool:
        """Takes the token that was sampled. False if the grammar does not know it: the mask was not obeyed."""
        thoughts = self._thoughts
        if thoughts is not None:
            if thoughts.state == "open" and token_id == self._call_id:
                thoughts.state = "over"
            elif thoughts.accept(token_id):
                is_text = token_id not in (thoughts.start_id, thoughts.end_id)
                return self._inside is None or not is_text or self._inside.accept(token_id)
        return self._grammar is None or self._grammar.accept(token_id)

    @property
    def _num_left(self) -> float:
        """Tokens that the think block may still have."""
        if self._budget is None or self._thoughts is None:
            return float("inf")
        return self._budget - self._thoughts.num_tokens


def make_constraint(
    grammars: GrammarCompiler, prompt_token_ids: list[int], params: SamplingParams
) -> Constraint | None:
    """A new one for each answer to a prompt; None: it is free.

    Raises:
      ValueError: the grammar cannot be honoured.
    """
    structure, budget, loops = params.structured_outputs, params.thinking_token_budget, params.repetition_detection
    may_end_thinking = loops is not None and loops.end_thinking
    if structure is None and budget is None and not may_end_thinking:
        return None
    tokenizer = grammars.tokenizer
    may_think = structure is None or structure.after_thinking
    thoughts = ThinkBlock.after(prompt_token_ids, tokenizer) if may_think else None
    if structure is None:
        return Constraint(None, thoughts, budget)
    grammar = grammars.compile(structure)
    if thoughts is None or thoughts.state == "over":
        return Constraint(grammar.start(), None, None)
    if thoughts.state == "possible" and grammar.can_begin_with(thoughts.start_id):
        return Constraint(grammar.start(), None, None)  # the block is a part of the grammar
    call_id = tokenizer.text_token_ids.get(TOOL_CALL)
    inside = None
    if call_id is not None and grammar.can_begin_with(call_id):
        inside = grammars.compile_format({"type": "any_text", "excludes": [TOOL_CALL]}).start()
    else:
        call_id = None
    return Constraint(
        grammar.start(), thoughts, budget, call_id=call_id, inside=inside, eos_token_ids=grammars.eos_token_ids
    )


def _set(mask: np.ndarray, token_id: int, is_allowed: bool) -> None:
    word, bit = mask.view(np.uint32), np.uint32(1 << token_id % 32)
    if is_allowed:
        word[token_id // 32] |= bit
    else:
        word[token_id // 32] &= ~bit
