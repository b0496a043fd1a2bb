"""What embeddings, scores and reranking share: their common fields, and many inputs through the engine at once."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from aiohttp import web

from qjax.outputs import STEP_FAILED, PoolingRequestOutput
from qjax.pooling_params import PoolingParams
from qjax.server import access_log
from qjax.server.answers import usage
from qjax.server.errors import (
    bad_request,
    could_not_compute,
    engine_failed,
    from_value_error,
    internal_error,
    unavailable,
)
from qjax.server.generation import LONG_TEXT
from qjax.server.protocol import CACHE_SALT, PARAM_NAMES, check_request_id
from qjax.server.schema import Refused, body_field
from qjax.server.sse import encode_json
from qjax.server.state import ServerState

MAX_INPUTS = 2048  # OpenAI's limit
MANY_NUMBERS = 100_000  # writing more than this as JSON would hold up everyone else's streams
NAMES = PARAM_NAMES | {"dimensions", "truncate_prompt_tokens"}  # that an error may begin with
LABELS = {"user": "a label for OpenAI's abuse monitoring"}


@dataclass(frozen=True, kw_only=True)
class PoolingFields:
    """The fields that embeddings, scores and reranking share."""

    model: str | None = body_field("Name of the model; the served one if absent")
    truncate_prompt_tokens: int | None = body_field("Keep this many tokens of each input; -1: what fits", minimum=-1)
    use_activation: bool = body_field("false: hidden states and logits as they are", True)
    priority: int = body_field("Lower runs earlier, with --scheduling-policy priority", 0)
    cache_salt: str | None = body_field("Only requests with the same salt share cached prompts")
    request_id: str | None = body_field("Becomes a part of the answer's id")

    NO_EFFECT: ClassVar[dict[str, str]] = LABELS
    REFUSED: ClassVar[dict[str, Refused]] = {
        "normalize": Refused("use use_activation.", (True,)),
        "mm_processor_kwargs": Refused("the model reads only text.", ({},)),
    }

    def __post_init__(self) -> None:
        if self.request_id is not None:
            check_request_id(self.request_id, "request_id")
        if self.cache_salt is not None and not CACHE_SALT.fullmatch(self.cache_salt):
            raise bad_request("cache_salt must be 1 to 128 characters without @, /, \\ and NUL.", "cache_salt")

    def token_limit(self, state: ServerState) -> int | None:
        """Tokens of an input that `truncate_prompt_tokens` keeps."""
        limit, longest = self.truncate_prompt_tokens, state.engine.max_model_len
        if limit is not None and not (limit == -1 or 1 <= limit <= longest):
            message = f"truncate_prompt_tokens must be -1, or from 1 to the context of {longest} tokens, got {limit}."
            raise bad_request(message, "truncate_prompt_tokens", limit)
        return longest if limit == -1 else limit


def check_kind(state: ServerState, path: str, kinds: Sequence[str]) -> str:
    """What the engine gives: "embed" or "score".

    Raises:
      ApiError: 400, it is not what the endpoint needs.
    """
    kind = state.engine.pooling_kind
    if kind is None:
        model = "an embedding model" if "score" not in kinds else "an embedding model or a reranker"
        raise bad_request(f"{path} needs {model}; this server generates text. Start it with --runner pooling.")
    if kind not in kinds:
        raise bad_request(f"{path} needs an embedding model; this one is a reranker: use /v1/score or /v1/rerank.")
    return kind


async def tokenized[T](tokenize: Callable[[], T], num_characters: int) -> T:
    """What `tokenize` returns; in a thread where it takes long.

    Raises:
      ApiError: 400, a text or an option that it refuses.
    """
    try:
        return await asyncio.to_thread(tokenize) if num_characters > LONG_TEXT else tokenize()
    except ValueError as error:
        raise from_value_error(error, NAMES) from None


async def pool(
    state: ServerState, inputs: Sequence[list[int]], params: PoolingParams, body: PoolingFields, answer_id: str
) -> list[PoolingRequestOutput]:
    """The results of all inputs, in their order. The first failure, or a client that goes away, ends all.

    Raises:
      ApiError: 400, an input cannot be served; else what the engine failed with.
    """
    for token_ids in inputs:
        _check_input(state, token_ids)
    ids = [answer_id] if len(inputs) == 1 else [f"{answer_id}-{i}" for i in range(len(inputs))]
    pairs = zip(ids, inputs, strict=True)
    tasks = [asyncio.ensure_future(_one(state, token_ids, params, body, i, answer_id)) for i, token_ids in pairs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_input(state: ServerState, token_ids: list[int]) -> None:
    engine, num_tokens = state.engine, len(token_ids)
    if num_tokens == 0:
        raise bad_request("An input is empty: at least one token is needed.", "input")
    if num_tokens > engine.max_model_len:
        message = (
            f"This model's maximum context length is {engine.max_model_len} tokens. However, an input has {num_tokens} "
            "tokens. Please shorten it, cut it with truncate_prompt_tokens, or raise --max-model-len."
        )
        raise bad_request(message, "input_tokens", num_tokens)
    if min(token_ids) < 0 or max(token_ids) >= engine.vocab_size:
        raise bad_request(f"An input has a token id outside the vocabulary, 0 to {engine.vocab_size - 1}.", "input")


async def _one(
    state: ServerState,
    token_ids: list[int],
    params: PoolingParams,
    body: PoolingFields,
    request_id: str,
    answer_id: str,
) -> PoolingRequestOutput:
    with state.engine_request(request_id, answer_id):
        try:
            output = await state.engine.encode(
                token_ids, params, request_id, priority=body.priority, cache_salt=body.cache_salt
            )
        except ValueError as error:
            raise from_value_error(error, NAMES) from error
        except Exception as error:
            raise (engine_failed() if state.engine.phase == "failed" else internal_error(error)) from error
    if output.finish_reason == "abort":
        raise unavailable("The server has ended the request.")
    if output.outputs is None:
        raise could_not_compute(output.stop_reason == STEP_FAILED)
    access_log.current().add_prompt(len(token_ids), output.num_cached_tokens)
    return output


def usage_of(outputs: Sequence[PoolingRequestOutput]) -> dict[str, Any]:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return usage(num_prompt, 0, sum(output.num_cached_tokens for output in outputs))


async def json_answer(answer: dict[str, Any], num_numbers: int) -> web.Response:
    if num_numbers <= MANY_NUMBERS:
        return web.json_response(answer, dumps=encode_json)
    text = await asyncio.to_thread(json.dumps, answer, separators=(",", ":"), allow_nan=False)
    return web.Response(text=text, content_type="application/json")
