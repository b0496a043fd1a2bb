"""The parts that chat and text answers share: usage, and logprobs in OpenAI's forms. Plain dicts, ready for JSON."""

import codecs
import math
from collections.abc import Iterable
from typing import Any

from qjax.outputs import Logprob
from qjax.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no -inf; the number OpenAI uses for "cannot happen"


def usage(num_prompt: int, num_completion: int, num_cached: int, num_reasoning: int | None = None) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    if num_reasoning is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
    return counts


def finite(logprob: float) -> float:
    """A logprob that JSON can carry."""
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB


def prompt_logprobs_json(
    entries: list[dict[int, Logprob] | None] | None, tokenizer: Tokenizer
) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: for each prompt token None or token id -> logprob, rank, text."""
    if entries is None:
        return None

    def as_json(entry: dict[int, Logprob]) -> dict[str, Any]:
        return {
            str(i): {"logprob": finite(lp.logprob), "rank": lp.rank, "decoded_token": tokenizer.token_text(i)}
            for i, lp in entry.items()
        }

    return [None if entry is None else as_json(entry) for entry in entries]


class TokenNames:
    """How a token is written in logprobs: its text, or `token_id:N` if asked for."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool):
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id))


def chat_logprobs(
    token_ids: list[int], logprobs: list[dict[int, Logprob]], num_top: int, names: TokenNames
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: one entry a token, with its `num_top` likeliest alternatives (-1: all)."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": names.name(token_id),
            "logprob": finite(logprob.logprob),
            "bytes": names.bytes(token_id),
        }

    content = []
    for token_id, position in zip(token_ids, logprobs, strict=False):
        alternatives = likeliest(position, num_top)
        content.append(
            {**entry(token_id, position[token_id]), "top_logprobs": [entry(i, lp) for i, lp in alternatives]}
        )
    return {"content": content, "refusal": None}


def likeliest(position: dict[int, Logprob], num: int) -> list[tuple[int, Logprob]]:
    """The `num` likeliest entries (-1: all), the likeliest first; the sampled token may not be among them."""
    ranked = sorted(position.items(), key=lambda item: -finite(item[1].logprob))
    return ranked if num == -1 else ranked[:num]


class CompletionLogprobs:
    """`choices[].logprobs` of text completions, for one choice's tokens in order.

    Keeps the text position, as a token's offset counts whole characters before it.
    """

    def __init__(self, tokenizer: Tokenizer, names: TokenNames, num_top: int, skip_special_tokens: bool):
        self._table = tokenizer.bytes_table(skip_special_tokens)
        self._names = names
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, token_ids: list[int], logprobs: Iterable[dict[int, Logprob] | None]) -> dict[str, Any]:
        """The next tokens' part. None stands for a prompt's first token, which has no logprob."""
        out: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, position in zip(token_ids, logprobs, strict=False):
            out["text_offset"].append(self._offset)
            out["tokens"].append(self._names.name(token_id))
            if position is None:
                out["token_logprobs"].append(None)
                out["top_logprobs"].append(None)
            else:
                out["token_logprobs"].append(finite(position[token_id].logprob))
                out["top_logprobs"].append(self._top(token_id, position))
            data = self._table[token_id] if token_id < len(self._table) else b""
            self._offset += len(self._decoder.decode(data))
        return out

    def _top(self, token_id: int, position: dict[int, Logprob]) -> dict[str, float]:
        """The likeliest tokens and the sampled one. Of two that look alike (halves of characters) the likelier."""
        chosen = dict(likeliest(position, self._num_top))
        chosen.setdefault(token_id, position[token_id])
        out: dict[str, float] = {}
        for i, logprob in chosen.items():
            out.setdefault(self._names.name(i), finite(logprob.logprob))
        return out
