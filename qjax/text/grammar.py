"""Structured output: which tokens may come next so that the answer obeys a schema, a regex, a choice or a grammar.

llguidance (Rust) does the work; it is imported at the first grammar. A grammar is compiled once (it may take seconds,
outside Python's lock) and each answer walks a copy of its own. What cannot be honoured is refused, never half-enforced.
"""

import asyncio
import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from qjax.sampling_params import StructuredOutputsParams
from qjax.text.structural_tag import WHITESPACE, Format, lark_source, tag_format
from qjax.text.tokenizer import Tokenizer

MAX_CACHED = 128  # compiled grammars
MAX_COMPILING = 8  # grammars of the server at a time; llguidance's limits end each after some seconds
COMPILE_SECONDS = 20.0  # for one, the wait for a thread and at first for the tokenizer included
MAX_REASON = 1000  # characters of an error
MAX_SOURCE = 2**20  # characters; llguidance has limits of its own, on what it makes of them


class Grammar:
    """A compiled grammar. `start` begins an answer."""

    def __init__(self, matcher: Any, first: np.ndarray):
        self._matcher = matcher
        self._first = first  # the mask of the first token

    def start(self) -> "GrammarState":
        return GrammarState(self._matcher.deep_copy())

    def can_begin_with(self, token_id: int) -> bool:
        return bool(self._first[token_id // 32] >> (token_id % 32) & 1)


class GrammarState:
    """Where one answer stands in its grammar.

    Attributes:
      is_finished: nothing but the end of the answer can come.
    """

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self.is_finished = False

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on, such as a limit of llguidance; only the end of the answer is then allowed."""
        return (self._matcher.get_error() or "the grammar was not obeyed") if self._matcher.is_error() else None

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
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._ll_tokenizer: Any = None
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._threads = ThreadPoolExecutor(MAX_COMPILING, thread_name_prefix="qjax-grammar")

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar that `params` asks for.

        Raises:
          ValueError: it is wrong, too large, cannot be honoured, or nothing can obey it; with the reason.
        """
        return self.compile_format(format_of(params), whitespace_of(params))

    async def compile_in_time(self, params: StructuredOutputsParams) -> None:
        """`compile` in a thread beside the event loop, so that `compile` then finds the grammar.

        Raises:
          ValueError: also where it takes longer than `COMPILE_SECONDS`.
        """
        compiled = asyncio.get_running_loop().run_in_executor(self._threads, self.compile, params)
        done, _ = await asyncio.wait([compiled], timeout=COMPILE_SECONDS)
        if not done:
            compiled.add_done_callback(lambda future: future.exception())  # nobody waits for it any more
            raise ValueError(f"Grammar error: it takes more than {COMPILE_SECONDS:g} seconds to compile.")
        compiled.result()

    def compile_format(self, fmt: Format, whitespace: str = WHITESPACE) -> Grammar:
        """The grammar of a format of `structural_tag`; raises as `compile` does."""
        key = lark_source(fmt, self.tokenizer.text_token_ids, whitespace)
        if len(key) > MAX_SOURCE:
            raise ValueError(f"Grammar error: it has {len(key)} characters; at most {MAX_SOURCE} are allowed.")
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self.tokenizer.grammar_tokenizer(self.vocab_size, sorted(self.eos_token_ids))
        grammar = self._compile(key)
        with self._lock:
            self._cache[key] = grammar
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def _compile(self, source: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)  # an error does not quote the whole grammar
        matcher = LLMatcher(self._ll_tokenizer, source, log_level=0, limits=limits)
        warnings = [] if matcher.is_error() else matcher.get_grammar_warnings()
        if warnings:  # something is not enforced
            raise ValueError(f"Grammar error: {' '.join(warnings)}")
        first = np.zeros(-(-self.vocab_size // 32), np.int32)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
            if matcher.is_error():
                raise ValueError("Grammar error: no text can obey it.")
        if matcher.is_error():
            raise ValueError(f"Grammar error: {_reason(matcher.get_error())}")
        return Grammar(matcher, first)


def _reason(error: str) -> str:
    """llguidance's message, without our text around a JSON schema and the place of the mistake in it."""
    found = re.match(r"at \d+\(\d+\): failed to compile JSON schema: (.*?)\n +\d+ \| ", error, re.DOTALL)
    return (found[1] if found else error.rstrip())[:MAX_REASON]


def whitespace_of(params: StructuredOutputsParams) -> str:
    """Regular expression of the white space inside of JSON."""
    if params.disable_any_whitespace:
        return ""
    return WHITESPACE if params.whitespace_pattern is None else params.whitespace_pattern


def format_of(params: StructuredOutputsParams) -> Format:
    """What `params` asks for, as a format of `structural_tag`.

    Raises:
      ValueError: the JSON schema or the structural tag is none.
    """
    if params.json is not None:
        return {"type": "json_schema", "json_schema": _schema(params.json)}
    if params.json_object:
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if params.regex is not None:
        return {"type": "regex", "pattern": params.regex}
    if params.choice is not None:
        return {"type": "or", "elements": [{"type": "const_string", "value": choice} for choice in params.choice]}
    if params.grammar is not None:
        return {"type": "grammar", "grammar": params.grammar}
    return tag_format(params.structural_tag)


def _schema(schema: Any) -> Any:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"structured_outputs.json is not valid JSON: {error}.") from None
    if not isinstance(schema, dict | bool):
        raise ValueError(f"structured_outputs.json must be a JSON schema (an object), got {schema!r}.")
    return schema
