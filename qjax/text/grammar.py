"""Structured output: which tokens may come next so that the answer obeys a schema, a regex, a choice or a grammar.

llguidance (Rust) does the work; it is imported at the first grammar. A grammar is compiled once (it may take seconds,
outside Python's lock) and each answer walks a copy of its own. What cannot be honoured is refused, never half-enforced.
"""

import json
import threading
from collections import OrderedDict
from typing import Any, Literal

import numpy as np

from qjax.sampling_params import StructuredOutputsParams
from qjax.text.tokenizer import Tokenizer

MAX_CACHED = 128  # compiled grammars
# Bounded: with free white space a small model can write blanks for ever.
WHITESPACE = r"[ \n\r\t]{0,8}"
THINK_START, THINK_END, TURN_START = "<think>", "</think>", "<|im_start|>"
Thinking = Literal["open", "possible", "over"]


class Grammar:
    """A compiled grammar. `start` begins an answer."""

    def __init__(self, matcher: Any, num_words: int, think_ids: tuple[int, int] | None):
        self._matcher = matcher
        self._num_words = num_words
        self._think_ids = think_ids

    def start(self, thinking: Thinking = "possible") -> "GrammarState":
        """Of one answer. `thinking`: see `thinking_after`; without `after_thinking` it changes nothing."""
        return GrammarState(self._matcher.deep_copy(), self._num_words, self._think_ids, thinking)


class GrammarState:
    """Where one answer stands in its grammar. A think block before it is free text.

    Attributes:
      is_finished: nothing but the end of the answer can come.
    """

    def __init__(self, matcher: Any, num_words: int, think_ids: tuple[int, int] | None, thinking: Thinking):
        self._matcher = matcher
        self._num_words = num_words
        self._think_ids = think_ids
        self._is_thinking = think_ids is not None and thinking == "open"
        self._may_think = think_ids is not None and thinking == "possible"  # the first token may open the block
        self.is_finished = False

    def fill(self, mask: np.ndarray) -> None:
        """Writes the allowed tokens as bits into int32 [ceil(V / 32)], contiguous: token i is bit i % 32 of i // 32."""
        if self._is_thinking:
            mask[:] = -1
            return
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._may_think and self._think_ids is not None:
            start = self._think_ids[0]
            mask[start // 32] |= np.int32(1 << start % 32 if start % 32 < 31 else -(2**31))

    def accept(self, token_id: int) -> bool:
        """Takes the token that was sampled. False if the grammar does not know it: the mask was not obeyed."""
        if self._think_ids is not None:
            start, end = self._think_ids
            if self._is_thinking:
                self._is_thinking = token_id != end
                return True
            if self._may_think and token_id == start:
                self._may_think, self._is_thinking = False, True
                return True
            self._may_think = False
        is_known = self._matcher.consume_token(token_id)
        self.is_finished = self._matcher.is_stopped()
        return is_known


def thinking_after(prompt_token_ids: list[int], tokenizer: Tokenizer) -> Thinking:
    """Whether the prompt leaves a think block open, or has closed it, in the turn that the answer continues."""
    ids = {tuple(tokenizer.encode(tag)): tag for tag in (THINK_START, THINK_END, TURN_START)}
    for token_id in reversed(prompt_token_ids):
        tag = ids.get((token_id,))
        if tag is not None:
            return "open" if tag == THINK_START else "over" if tag == THINK_END else "possible"
    return "possible"


class GrammarCompiler:
    """Makes `Grammar`s for one tokenizer and keeps the latest. Safe to use from several threads.

    Args:
      vocab_size: of the model, which may be padded beyond the tokenizer's; padding is never allowed.
      eos_token_ids: allowed where the grammar can end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._ll_tokenizer: Any = None
        self._cache: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar that `params` asks for.

        Raises:
          ValueError: it is wrong or cannot be honoured; with the reason.
        """
        source = grammar_source(params)
        key = f"{params.after_thinking} {source}"
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._tokenizer.grammar_tokenizer(self._vocab_size, self._eos_token_ids)
        grammar = self._compile(source, params.after_thinking)
        with self._lock:
            self._cache[key] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _compile(self, source: str, after_thinking: bool) -> Grammar:
        from llguidance import LLMatcher

        is_error, messages = LLMatcher.validate_grammar_with_warnings(source, self._ll_tokenizer)
        if is_error or messages:  # a warning says that something is not enforced
            raise ValueError(f"Grammar error: {' '.join(messages)}")
        matcher = LLMatcher(self._ll_tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValueError(f"Grammar error: {matcher.get_error()}")
        think_ids = None
        if after_thinking:
            ids = [self._tokenizer.encode(tag) for tag in (THINK_START, THINK_END)]
            if all(len(i) == 1 for i in ids):
                think_ids = (ids[0][0], ids[1][0])
        return Grammar(matcher, -(-self._vocab_size // 32), think_ids)


def grammar_source(params: StructuredOutputsParams) -> str:
    """llguidance's text of what `params` asks for.

    Raises:
      ValueError: the JSON schema is not an object, or no JSON at all.
    """
    from llguidance import LLMatcher

    if params.json is not None or params.json_object:
        schema: Any = {"type": "object"} if params.json is None else params.json
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except json.JSONDecodeError as error:
                raise ValueError(f"structured_outputs.json is not valid JSON: {error}.") from None
        if not isinstance(schema, dict | bool):
            raise ValueError(f"structured_outputs.json must be a JSON schema (an object), got {schema!r}.")
        schema = schema if isinstance(schema, dict) else ({} if schema else {"not": {}})
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in params.choice)
        )
    if params.grammar is None:
        raise RuntimeError("StructuredOutputsParams has checked that one of its fields is set")
    return LLMatcher.grammar_from_lark(_lark_of(params.grammar))


def _lark_of(grammar: str) -> str:
    """Lark as it is; GBNF (llama.cpp's EBNF, with `::=`) translated."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # its parser raises what it likes
        raise ValueError(f"Grammar error: the EBNF cannot be read: {error}") from error
