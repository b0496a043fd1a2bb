"""Structured output: which tokens may come next so that the answer obeys a schema, a regex, a choice or a grammar.

llguidance (Rust) does the work; it is imported at the first grammar. A grammar is compiled once (it may take seconds,
outside Python's lock) and each answer walks a copy of its own. What cannot be honoured is refused, never half-enforced.
"""

import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from qjax.sampling_params import StructuredOutputsParams
from qjax.text.tokenizer import Tokenizer

MAX_CACHED = 128  # compiled grammars
# Bounded: with free white space a small model can write blanks for ever.
WHITESPACE = r"[ \n\r\t]{0,8}"


class Grammar:
    """A compiled grammar. `start` begins an answer."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def start(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy())


class GrammarState:
    """Where one answer stands in its grammar.

    Attributes:
      is_finished: nothing but the end of the answer can come.
    """

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self.is_finished = False

    def fill(self, mask: np.ndarray) -> None:
        """Writes the allowed tokens as bits into int32 [ceil(V / 32)], contiguous: token i is bit i % 32 of i // 32."""
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def accept(self, token_id: int) -> bool:
        """Takes the token that was sampled. False if the grammar does not know it: the mask was not obeyed."""
        is_known = self._matcher.consume_token(token_id)
        self.is_finished = self._matcher.is_stopped()
        return is_known


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
        key = grammar_source(params)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._tokenizer.grammar_tokenizer(self._vocab_size, self._eos_token_ids)
        grammar = self._compile(key)
        with self._lock:
            self._cache[key] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _compile(self, source: str) -> Grammar:
        from llguidance import LLMatcher

        is_error, messages = LLMatcher.validate_grammar_with_warnings(source, self._ll_tokenizer)
        if is_error or messages:  # a warning says that something is not enforced
            raise ValueError(f"Grammar error: {' '.join(messages)}")
        matcher = LLMatcher(self._ll_tokenizer, source, log_level=0)
        if matcher.is_error():
            raise ValueError(f"Grammar error: {matcher.get_error()}")
        return Grammar(matcher)


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
